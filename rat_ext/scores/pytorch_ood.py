"""The detectors of the library pytorch-ood as scores."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._common.extras import install
from .._common.loaders import labelled_batches
from .._common.per_sample import PerSample
from .._common.user_model import Model, check_device, logits_of, undisturbed
from .base import Score, no_prediction
from .registry import register_family

if TYPE_CHECKING:
    from typing_extensions import Self


class PytorchOOD(Score):
    """A detector of the library pytorch-ood: ``scores.get("pytorch-ood:ViM", d=64)``.

    Kirchheim et al., "PyTorch-OOD: A Library for Out-of-Distribution Detection based on PyTorch"
    (CVPR Workshops 2022). Its detectors give outlier scores; the confidence is the negative of it.
    What their constructors ask of a model is found in the classifier: ``model`` is the classifier,
    ``head`` (``w`` and ``b``) its last linear layer, ``encoder`` (``backbone``) what comes before.
    So detectors that work on logits or on the features before the last layer can be used, not those
    that need feature maps, several layers or text.

    `fit` is always needed, and makes the detector; then `score` takes the same model. It cannot be
    saved with a `rat_ext.Detector`.

    Args:
        layer: name of the last linear layer among the model's modules; default the last one.
        options: of the detector.

    Raises:
        ImportError: pytorch-ood is not installed.
        ValueError: it has no such detector.
    """

    listed = False
    detector_name: ClassVar[str]

    def __init__(self, *, layer: str | None = None, **options: Any) -> None:
        self.layer, self.options = layer, options
        self.kind = _detector(self.detector_name)
        self.model: nn.Module | None = None

    @property
    def needs_fit(self) -> bool:
        return self.model is None

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}; {self.detector_name} of pytorch-ood needs an "
                "nn.Module"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.detector = self.kind(**self._arguments(model), **self.options).to(device)
        with torch.inference_mode(False), undisturbed(model, device):
            self.detector.fit(_Pairs(model, loader, progress, self.detector_name))
        self.model = model
        return self

    def score(self, model: Model, x: Tensor) -> Tensor:
        return self.score_and_predict(model, x)[0]

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        if model is not self.model:
            raise ValueError(
                f"call fit(model, loader) first: {self.detector_name} of pytorch-ood is made "
                "there, for that model alone"
            )
        if not len(x):
            return x.new_empty(0), no_prediction(x)
        check_device(model, x)
        with torch.inference_mode(False), undisturbed(model, x.device):
            with torch.no_grad():
                prediction = logits_of(model(x), len(x)).argmax(1)
            # Some take gradients in the input.
            outlier = torch.as_tensor(self.detector.predict(x.clone())).detach()
        return -outlier.to(x.device).view(len(x)), prediction

    def _arguments(self, model: nn.Module) -> dict[str, Any]:
        """What the detector's constructor asks of a model."""
        parameters = inspect.signature(self.kind.__init__).parameters
        needed = [name for name in parameters if name not in ("self", *self.options)]
        found: dict[str, Any] = {}
        if "model" in needed:
            found["model"] = _Logits(model)
        if {"encoder", "backbone", "head", "w", "b"} & set(needed):
            last = self._last_layer(model)
            parts = {
                "encoder": _Features(model, last, "head" in needed),
                "head": last,
                "w": last.weight,
            }
            parts["backbone"] = parts["encoder"]
            parts["b"] = last.weight.new_zeros(len(last.weight)) if last.bias is None else last.bias
            found |= {name: part for name, part in parts.items() if name in needed}
        missing = [
            name
            for name in needed
            if name not in found
            and parameters[name].default is inspect.Parameter.empty
            and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        ]
        if missing:
            raise ValueError(
                f"{self.detector_name} of pytorch-ood needs {', '.join(missing)}: "
                f"scores.get('pytorch-ood:{self.detector_name}', {missing[0]}=...)"
            )
        return found

    def _last_layer(self, model: nn.Module) -> nn.Linear:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        if self.layer is not None and self.layer not in layers:
            raise ValueError(
                f"layer is {self.layer!r}; the model's linear layers are {', '.join(layers)}"
            )
        if not layers:
            raise ValueError(f"{self.detector_name} needs a linear layer; the model has none")
        return layers[self.layer] if self.layer is not None else list(layers.values())[-1]


class _Logits(nn.Module):
    """The classifier as a function to a tensor of logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x), len(x))


class _Features(nn.Module):
    """What reaches a layer of a classifier: (N, D)."""

    def __init__(self, model: nn.Module, layer: nn.Module, exact: bool) -> None:
        super().__init__()
        self.model, self.layer, self.exact = model, layer, exact

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = self.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.model(x)
        finally:
            hook.remove()
        if not seen or seen[-1].ndim != 2 or len(seen[-1]) != len(x):
            shape = tuple(seen[-1].shape) if seen else "nothing"
            raise ValueError(
                f"the last linear layer gets {shape} for {len(x)} inputs; expected (N, D) "
                "features. Name another one by layer="
            )
        # The layer itself needs its own dtype; some detectors work in float32 only.
        return seen[-1] if self.exact else seen[-1].float()


class _Pairs:
    """The (x, target) batches of a loader, as often as it can be gone through."""

    def __init__(self, model: Model, loader: Iterable[Any], progress: bool, what: str) -> None:
        self._batches = functools.partial(labelled_batches, model, loader, progress, what)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for model, x, target in self._batches():
            if isinstance(model, PerSample):
                raise ValueError("the detectors of pytorch-ood take no model_kwargs")
            yield x, target


def _detector(name: str) -> type[Any]:
    try:
        from pytorch_ood import detector
    except ImportError as error:
        raise ImportError(f"pytorch-ood:{name} needs pytorch-ood: {install('ood')}") from error
    kind = getattr(detector, name, None)
    if not inspect.isclass(kind):
        known = [each for each in dir(detector) if inspect.isclass(getattr(detector, each))]
        raise ValueError(f"pytorch-ood has no detector {name!r}; there are {', '.join(known)}")
    return kind


@register_family("pytorch-ood")
@functools.cache
def pytorch_ood(name: str) -> type[Score]:
    """The class of scores for a detector of pytorch-ood."""
    return type(name, (PytorchOOD,), {"detector_name": name, "__doc__": PytorchOOD.__doc__})
