"""Robust radii: how far each input is from the classifier's decision boundary.

The method is RR-BS and RR-Fast of Yan and Weng, "RAT: Boosting Misclassification Detection Ability
without Extra Data" (arXiv 2503.14783), searched on a ray that is computed once. The loops run in
the compiled core (csrc/search_rule.h tells how a probe is chosen); `rat_ext.reference` is the same
in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._build import core
from ._model import Model, check_device, logits_of, undisturbed, warn_not_finite
from ._options import WIDE, Options, bounds_error
from .result import RadiusResult

_COLUMN = {name: i for i, name in enumerate(core.BRACKET_FIELDS)}


class LoaderRadii(NamedTuple):
    """Radii of a whole data set, on the CPU, in the loader's order."""

    radius: Tensor
    prediction: Tensor
    target: Tensor | None


@overload
def robust_radius(
    model: Model, x: Tensor, *, full: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def robust_radius(
    model: Model, x: Tensor, *, full: Literal[True], **options: Any
) -> RadiusResult: ...
def robust_radius(
    model: Model,
    x: Tensor,
    *,
    method: str = "bs",
    rtol: float = 1e-2,
    bounds: tuple[float, float] = (0.0, 1.0),
    temperature: float = 1.0,
    eps_max: float | None = None,
    attack: str = "fgsm",
    batch_size: int | None = None,
    full: bool = False,
    h: float = 1e-3,
    search: str = "interpolate",
    probes: int = 1,
) -> Tensor | RadiusResult:
    """Distance of each input from the decision boundary along its FGSM ray, in the L-inf norm.

    The ray of x is ``clip(x + eps * d, *bounds)`` with ``d = sign(grad_x CE(f(x) / temperature,
    y))`` and y the model's prediction. The radius is the eps at which the prediction changes, an
    upper bound of the true robust radius, and a confidence: a larger one means that the prediction
    is more likely right (RR-BS and RR-Fast, arXiv 2503.14783).

    The model is run in eval mode and left as it was, also after an error: parameters, their
    ``.grad``, train/eval flags and random state. Works under ``no_grad``, ``inference_mode`` and
    autocast. Any normalisation must be inside the model, so that x is in ``bounds`` and the radius
    is in the units of x.

    Args:
        model: callable from (N, ...) inputs to (N, C) logits, C >= 2, or to an object with
            ``.logits``.
        x: (N, ...) floating-point inputs, every element within ``bounds``.
        method: "bs" narrows a bracket around the flip; "fast" extrapolates the logits linearly from
            one extra forward at radius ``h`` (radius = lower = upper; may exceed eps_max).
        rtol: a bracket is narrow enough when upper - lower <= rtol * upper.
        bounds: smallest and largest value of an input element.
        temperature: softmax temperature of the cross-entropy that directs the ray; > 0.
        eps_max: how far to search; default the width of the bounds.
        attack: how the ray is directed; "fgsm".
        batch_size: most rows in one forward; default all of x. Does not change the results beyond
            rounding.
        full: return a RadiusResult instead of the radii alone.
        h: step of method "fast", in the units of x.
        search: "interpolate", or "bisect" for plain doubling from 1e-6 and bisection (slower).
        probes: points probed per sample and forward. More than one spends rows to save rounds, for
            small batches on a device that they leave idle.

    Returns:
        (N,) radii on x's device, float64 for float64 x and float32 otherwise: inf where the
        prediction does not change up to eps_max, nan (with one RuntimeWarning) where the input or
        the logits are not finite. With ``full=True`` a `RadiusResult`.

    Raises:
        ValueError: x out of bounds or without a batch dimension, logits that are not (N, C >= 2),
            model and x on different devices, an option out of its range.
        TypeError: x or the logits are not floating-point tensors.
    """
    options = Options.checked(
        x, method, rtol, bounds, temperature, eps_max, attack, batch_size, h, search, probes
    )
    result = _radii(model, x, [options])[0]
    return result if full else result.radius


def temperature_sweep(
    model: Model, x: Tensor, temperatures: Sequence[float], **options: Any
) -> list[RadiusResult]:
    """Radii at several temperatures, for the price of one forward and a backward for each.

    The forward of the ray and its graph are shared by all temperatures; each has its own direction
    and search. Equals ``[robust_radius(model, x, temperature=t, full=True, **options) for t in
    temperatures]``; all options of `robust_radius` but ``temperature`` and ``full`` are taken.
    """
    if not len(temperatures):
        raise ValueError("temperatures is empty; give at least one")
    if {"temperature", "full"} & options.keys():
        raise TypeError("temperature_sweep takes temperatures, and always returns full results")
    return _radii(model, x, [Options.checked(x, temperature=t, **options) for t in temperatures])


def robust_radii(
    model: Model,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> LoaderRadii:
    """Radii of every batch of a DataLoader, with a progress bar.

    Args:
        model: as in `robust_radius`.
        loader: yields (x, target, ...) or x alone.
        device: where to move the inputs; default the device of the model's first parameter.
        progress: show a tqdm bar on standard error.
        options: passed to `robust_radius` (all but ``full``).

    Returns:
        Radii, predictions and targets, (N,) tensors on the CPU; target is None if the loader has
        none.
    """
    from tqdm.auto import tqdm

    if device is None and isinstance(model, torch.nn.Module):
        device = next((p.device for p in model.parameters()), None)
    radii: list[Tensor] = []
    predictions: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in tqdm(loader, desc="robust radius", unit="batch", disable=not progress):
        x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        result = robust_radius(model, x.to(device), full=True, **options)
        radii.append(result.radius.cpu())
        predictions.append(result.prediction.cpu())
        if rest:
            targets.append(torch.as_tensor(rest[0]).cpu())
    if not radii:
        raise ValueError("the loader gave no batch")
    return LoaderRadii(
        torch.cat(radii), torch.cat(predictions), torch.cat(targets) if targets else None
    )


def _radii(model: Model, x: Tensor, runs: Sequence[Options]) -> list[RadiusResult]:
    """One search for each of `runs`, which differ in their temperature only."""
    shared = runs[0]
    # Tensors made in inference mode cannot enter a graph, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach()
        if not len(x):
            return [RadiusResult.empty(x) for _ in runs]
        x = _with_dense_rows(x)
        launch = _launch_arguments(x)
        finite = _checked_input(x, shared, launch)
        check_device(model, x)
        chunk = min(shared.batch_size or len(x), len(x))
        with undisturbed(model, x.device):
            searches = _rays(model, x, runs, chunk, launch)
            for search in searches:
                if not finite.all():
                    search.brackets[~finite, _COLUMN["status"]] = core.NOT_FINITE
                search.run(model, chunk)
        results = [search.result() for search in searches]
    warn_not_finite(results[0].radius, stacklevel=3)
    return results


def _rays(
    model: Model, x: Tensor, runs: Sequence[Options], chunk: int, launch: dict[str, Any]
) -> list[_Search]:
    """The searches of `runs`, each with its ray: one forward, and a backward for each run."""
    searches: list[_Search] = []
    for begin in range(0, len(x), chunk):
        rows = x[begin : begin + chunk]
        leaf = (rows.clone() if rows.is_inference() else rows.detach()).requires_grad_()
        with torch.enable_grad():
            logits = logits_of(model(leaf), len(leaf))
        if not logits.requires_grad:
            raise RuntimeError(
                "the logits do not depend on the input through autograd, so there is no direction "
                "to search in. Is the model's forward under no_grad, or does it detach?"
            )
        if logits.device != x.device:
            raise ValueError(f"x is on {x.device} but the model returned logits on {logits.device}")
        if not searches:
            searches = [_Search(x, logits.shape[1], run, launch) for run in runs]
        values = _for_core(logits, x)
        seed = torch.empty_like(values)
        for i, search in enumerate(searches):
            core.start(values, seed, search.state, begin, **launch)
            (gradient,) = torch.autograd.grad(
                logits, leaf, seed.to(logits.dtype), retain_graph=i + 1 < len(searches)
            )
            search.aim(gradient, begin)
    return searches


class _Search:
    """The bracket searches of all rows of x on one set of rays."""

    def __init__(self, x: Tensor, classes: int, options: Options, launch: dict[str, Any]) -> None:
        self.x, self.options, self.launch = x, options, launch
        n, dtype, device = len(x), WIDE[x.dtype], x.device
        self.direction = _empty_rows_like(x, n, torch.int8)
        self.brackets = torch.empty(n, len(_COLUMN), dtype=dtype, device=device)
        self.probes = torch.empty(n, options.probes, dtype=dtype, device=device)
        gaps = torch.empty(n, core.KNOTS * classes, dtype=dtype, device=device)
        self.state = core.State(
            self.brackets,
            gaps,
            self.probes,
            rtol=options.rtol,
            eps_max=options.eps_max,
            eps_min=options.eps_min,
            temperature=options.temperature,
            bisect=options.bisect,
        )

    def aim(self, gradient: Tensor, begin: int) -> None:
        """Take the ray of rows begin, begin + 1, ... from the gradient of the negated log-odds."""
        rows = slice(begin, begin + len(gradient))
        x, direction = self.x[rows], self.direction[rows]
        if gradient.stride() != x.stride():
            gradient = _empty_rows_like(x, len(x), x.dtype).copy_(gradient)
        low, high = self.options.low, self.options.high
        core.aim(gradient, x, direction, low, high, self.state, begin, **self.launch)

    def run(self, model: Model, chunk: int) -> None:
        """Probe until no row is active. Finished rows leave the batch, and waiting ones fill it."""
        n, device = len(self.x), self.x.device
        active = torch.arange(n, dtype=torch.int32, device=device)
        count = torch.empty(1, dtype=torch.int32, device=device)
        if self.options.method == "fast":
            self.probes.fill_(self.options.h)
        rows = max(1, chunk // self.options.probes)
        points = _empty_rows_like(self.x, rows * self.options.probes, self.x.dtype)
        while True:
            core.compact(active, self.state, active, count, **self.launch)
            active = active[: int(count)]
            if not len(active):
                return
            for index in active.split(rows):
                logits = self._probe(model, index, points[: len(index) * self.options.probes])
                if self.options.method == "fast":
                    core.extrapolate(logits, index, self.options.h, self.state, **self.launch)
                else:
                    core.advance(logits, index, self.state, **self.launch)

    def _probe(self, model: Model, index: Tensor, points: Tensor) -> Tensor:
        low, high = self.options.low, self.options.high
        core.perturb(self.x, self.direction, index, self.probes, low, high, points, **self.launch)
        return _for_core(logits_of(model(points), len(points)), self.x)

    def result(self) -> RadiusResult:
        column = {name: self.brackets[:, i] for name, i in _COLUMN.items()}
        status = column["status"]
        finite = status != core.NOT_FINITE
        lower = column["lower"].where(finite, math.nan)
        upper = column["upper"].where(finite, math.nan)
        found = status == core.FOUND
        searched = self.options.method == "bs"
        return RadiusResult(
            radius=(lower + upper) / 2,
            lower=lower,
            upper=upper,
            found=found,
            prediction=column["prediction"].where(finite, -1).long(),
            flipped_to=column["flipped_to"].where(found, -1).long(),
            forward_rows=column["rows"].long(),
            fallbacks=column["fallbacks"].long(),
            worst_case_rows=self.state.max_rows() if searched else 0,
        )


def _checked_input(x: Tensor, options: Options, launch: dict[str, Any]) -> Tensor:
    """(N,) bool: the row is finite. Raises if an element of a finite row is out of bounds."""
    flags = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    core.inspect(x, options.low, options.high, flags, **launch)
    outside = flags == core.INPUT_OUTSIDE
    if outside.any():
        raise bounds_error(x[outside], len(x), options)
    return flags != core.INPUT_NOT_FINITE


def _for_core(logits: Tensor, x: Tensor) -> Tensor:
    """Detached logits in a dtype whose wide type is that of the search state."""
    state = WIDE[x.dtype]
    logits = logits.detach()
    return logits if WIDE.get(logits.dtype) == state else logits.to(state)


def _with_dense_rows(x: Tensor) -> Tensor:
    """x itself if each row is one dense block in any order (channels_last is), else a copy."""
    inner = sorted((s, n) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True) if n != 1)
    expected = 1
    for stride, size in inner:
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def _empty_rows_like(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, ...) with the memory order of x's rows, one row after the other."""
    elements = math.prod(x.shape[1:])
    return torch.empty_strided(
        (rows, *x.shape[1:]), (elements, *x.stride()[1:]), dtype=dtype, device=x.device
    )


def _launch_arguments(x: Tensor) -> dict[str, Any]:
    if x.device.type == "cuda":
        return {"stream": torch.cuda.current_stream(x.device).cuda_stream}
    return {"threads": torch.get_num_threads()}
