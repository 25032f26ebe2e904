"""Classifiers whose probabilities are calibrated on held-out data (Guo et al., ICML 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common.loaders import labelled_batches
from .._common.user_model import Model, left_alone, logits_of

if TYPE_CHECKING:
    from typing_extensions import Self


class _Scaling(nn.Module):
    """A classifier whose logits go through a function with parameters that fit() finds."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(N, classes) scaled logits."""
        return self.scaled(logits_of(self.model(x), len(x)))

    def scaled(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def fit(self, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Find what makes the targets of held-out data most likely, from where it is now.

        Args:
            loader: yields (x, target, ...), or mappings with "pixel_values" and "labels": (N, ...)
                inputs and (N,) class indices that the model was not trained on.
            progress: show a tqdm bar on standard error.

        Raises:
            ValueError: the loader gives no batch, or no targets.
        """
        logits, targets = [], []
        for bound, x, target in labelled_batches(self.model, loader, progress, "calibrate"):
            with left_alone(bound, x):
                logits.append(logits_of(bound(x), len(x)).double().cpu())
            targets.append(target.cpu())
        z, t = torch.cat(logits), torch.cat(targets)
        self._begin(z)
        own = [value for name, value in self.named_buffers() if "." not in name]
        found = [value.detach().double().cpu().requires_grad_() for value in own]
        optimizer = torch.optim.LBFGS(found, max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            nll = F.cross_entropy(self._applied(z, *found), t)
            nll.backward()
            return nll

        with torch.inference_mode(False), torch.enable_grad():
            optimizer.step(loss)
        for value, better in zip(own, found, strict=True):
            value.copy_(better.detach())
        return self

    def _begin(self, logits: Tensor) -> None:
        """Make the buffers for these logits."""

    @staticmethod
    def _applied(logits: Tensor, *parameters: Tensor) -> Tensor:
        raise NotImplementedError


class TemperatureScaling(_Scaling):
    """``z / T`` with one temperature T, which keeps every prediction; ``fit`` finds T.

    A model like any other: scores, radii and gates take it. The order of MSR can change, that of
    the margin and of the predicted classes does not. ::

        calibrated = models.TemperatureScaling(model).fit(held_out_loader)

    Args:
        model: from (N, ...) inputs to (N, classes) logits, or an object with ``.logits``.
        temperature: before fit().

    Attributes:
        temperature: T, larger than 1 where the model was over-confident.
    """

    log_temperature: Tensor

    def __init__(self, model: Model, temperature: float = 1.0) -> None:
        super().__init__(model)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        value = torch.tensor(temperature, dtype=torch.float64).log()
        self.register_buffer("log_temperature", value)

    @property
    def temperature(self) -> float:
        return float(self.log_temperature.exp())

    def scaled(self, logits: Tensor) -> Tensor:
        return self._applied(logits, self.log_temperature.to(logits.dtype))

    @staticmethod
    def _applied(logits: Tensor, *parameters: Tensor) -> Tensor:
        return logits / parameters[0].exp()


class VectorScaling(_Scaling):
    """``w * z + b`` with a factor and an offset for each class, which ``fit`` finds.

    It can change predictions. Needs more held-out data than `TemperatureScaling`, of each class.

    Args:
        model: from (N, ...) inputs to (N, classes) logits, or an object with ``.logits``.
        num_classes: the number of logits.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, model: Model, num_classes: int) -> None:
        super().__init__(model)
        self.register_buffer("weight", torch.ones(num_classes))
        self.register_buffer("bias", torch.zeros(num_classes))

    def scaled(self, logits: Tensor) -> Tensor:
        return self._applied(logits, self.weight.to(logits.dtype), self.bias.to(logits.dtype))

    def _begin(self, logits: Tensor) -> None:
        if logits.shape[1] != len(self.weight):
            raise ValueError(
                f"num_classes is {len(self.weight)}, but the model has {logits.shape[1]} logits"
            )

    @staticmethod
    def _applied(logits: Tensor, *parameters: Tensor) -> Tensor:
        weight, bias = parameters
        return weight * logits + bias
