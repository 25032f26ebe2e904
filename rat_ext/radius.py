"""Robust radii: how far each input is from the classifier's decision boundary.

The method is RR-BS and RR-Fast of Yan and Weng, "RAT: Boosting Misclassification Detection Ability
without Extra Data" (arXiv 2503.14783), searched on a ray that is computed once. The loops run in
the compiled core (csrc/search_rule.h tells how a probe is chosen); `rat_ext.reference` is the same
in plain PyTorch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._build import core
from ._model import Model, check_device, logits_of, undisturbed

_COLUMN = {name: i for i, name in enumerate(core.BRACKET_FIELDS)}
_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@dataclass(frozen=True)
class SearchReport:
    """What a search cost, in forward rows (one sample through the model once)."""

    rows: Tensor
    """(N,) int64: rows spent on each sample."""
    histogram: Tensor
    """(max rows + 1,) int64: how many samples took 0, 1, 2, ... rows."""
    mean: float
    p95: float
    """95th percentile of rows."""
    worst_case: int
    """No sample can take more rows than this, whatever the model (0 where it is not searched)."""
    fallback_share: float
    """Share of the search's rounds, over all samples, that bisected instead of interpolating."""


@dataclass(frozen=True)
class RadiusResult:
    """Robust radii of N inputs. Every tensor has shape (N,) and is on the input's device."""

    radius: Tensor
    """Midpoint of the bracket; inf where no flip was found; nan where a row is not finite."""
    lower: Tensor
    """Largest radius probed at which the prediction holds."""
    upper: Tensor
    """Smallest radius probed at which it has changed; inf where none was found."""
    found: Tensor
    """bool: a change of prediction was found up to eps_max."""
    prediction: Tensor
    """int64: the model's prediction; -1 where a row is not finite."""
    flipped_to: Tensor
    """int64: the class at ``upper``; -1 where no flip was found."""
    forward_rows: Tensor
    """int64: forward rows that the search took, beside the one forward and backward of the ray."""
    fallbacks: Tensor
    """int64: rounds of the search that fell back to bisection."""
    worst_case_rows: int = 0
    norm: str = "linf"

    def __len__(self) -> int:
        return self.radius.shape[0]

    @property
    def search_report(self) -> SearchReport:
        """Rows per sample, their histogram, and the share of bisection fallbacks."""
        rows = self.forward_rows
        total = int(rows.sum())
        return SearchReport(
            rows=rows,
            histogram=torch.bincount(rows) if len(self) else rows.new_zeros(1),
            mean=float(rows.double().mean()) if len(self) else math.nan,
            p95=float(rows.double().quantile(0.95)) if len(self) else math.nan,
            worst_case=self.worst_case_rows,
            fallback_share=int(self.fallbacks.sum()) / total if total else 0.0,
        )

    def __getitem__(self, index: Any) -> RadiusResult:
        """The results of some of the rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = {name: v[index] for name, v in values.items() if isinstance(v, Tensor)}
        return RadiusResult(**{**values, **rows})


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
    options = _Options.checked(
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
    return _radii(model, x, [_Options.checked(x, temperature=t, **options) for t in temperatures])


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


@dataclass(frozen=True)
class _Options:
    method: str
    rtol: float
    low: float
    high: float
    temperature: float
    eps_max: float
    batch_size: int | None
    h: float
    bisect: bool
    probes: int

    @property
    def eps_min(self) -> float:
        # Half the spacing of float32 numbers below 1, in units of the bounds: smaller steps are
        # rounded away. Inputs in half precision are coarser still, but not near their low end.
        return (self.high - self.low) * 2.0**-24

    @classmethod
    def checked(
        cls,
        x: Tensor,
        method: str = "bs",
        rtol: float = 1e-2,
        bounds: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        eps_max: float | None = None,
        attack: str = "fgsm",
        batch_size: int | None = None,
        h: float = 1e-3,
        search: str = "interpolate",
        probes: int = 1,
    ) -> _Options:
        _require_choice("method", method, ("bs", "fast"))
        _require_choice("attack", attack, ("fgsm",))
        _require_choice("search", search, ("interpolate", "bisect"))
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor")
        if x.dtype not in _WIDE:
            raise TypeError(
                f"x is {x.dtype}; expected a floating-point tensor. Scale integer images first, "
                "for example x.float() / 255"
            )
        if x.ndim < 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected a batch (N, ...). Use x[None] for one "
                "sample"
            )
        if len(bounds) != 2 or not (math.isfinite(bounds[0]) and math.isfinite(bounds[1])):
            raise ValueError(f"bounds is {bounds}; expected two finite numbers (low, high)")
        low, high = map(float, bounds)
        if not low < high:
            raise ValueError(f"bounds is {bounds}; low must be below high")
        finest = 64 * torch.finfo(_WIDE[x.dtype]).eps
        if not finest <= rtol < 1:
            raise ValueError(
                f"rtol is {rtol}; for {x.dtype} inputs it must be at least {finest:.1e} and below "
                "1. For a finer one use float64 inputs and a float64 model"
            )
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; it must be positive and finite")
        if eps_max is None:
            eps_max = high - low
        if not (eps_max > 0 and math.isfinite(eps_max)):
            raise ValueError(f"eps_max is {eps_max}; it must be positive and finite")
        if not (h > 0 and math.isfinite(h)):
            raise ValueError(f"h is {h}; it must be positive and finite")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None")
        if not 1 <= probes <= core.MAX_PROBES:
            raise ValueError(f"probes is {probes}; it must be from 1 to {core.MAX_PROBES}")
        return cls(
            method, rtol, low, high, temperature, eps_max, batch_size, h, search == "bisect", probes
        )


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; expected {known}")


def _radii(model: Model, x: Tensor, runs: Sequence[_Options]) -> list[RadiusResult]:
    """One search for each of `runs`, which differ in their temperature only."""
    shared = runs[0]
    # Tensors made in inference mode cannot enter a graph, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach()
        if not len(x):
            return [_empty(x) for _ in runs]
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
    bad = int(results[0].radius.isnan().sum())
    if bad:
        warnings.warn(
            f"{bad} of {len(x)} rows have inputs, logits or gradients that are not finite; their "
            "radius is nan",
            RuntimeWarning,
            stacklevel=3,
        )
    return results


def _rays(
    model: Model, x: Tensor, runs: Sequence[_Options], chunk: int, launch: dict[str, Any]
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

    def __init__(self, x: Tensor, classes: int, options: _Options, launch: dict[str, Any]) -> None:
        self.x, self.options, self.launch = x, options, launch
        n, dtype, device = len(x), _WIDE[x.dtype], x.device
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


def _empty(x: Tensor) -> RadiusResult:
    real = torch.empty(0, dtype=_WIDE[x.dtype], device=x.device)
    integer = torch.empty(0, dtype=torch.int64, device=x.device)
    found = torch.empty(0, dtype=torch.bool, device=x.device)
    return RadiusResult(real, real, real, found, integer, integer, integer, integer)


def _checked_input(x: Tensor, options: _Options, launch: dict[str, Any]) -> Tensor:
    """(N,) bool: the row is finite. Raises if an element of a finite row is out of bounds."""
    flags = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    core.inspect(x, options.low, options.high, flags, **launch)
    outside = flags == core.INPUT_OUTSIDE
    if outside.any():
        bad = x[outside]
        raise ValueError(
            f"x has values from {bad.min().item():.4g} to {bad.max().item():.4g}, outside bounds "
            f"({options.low:g}, {options.high:g}), in {int(outside.sum())} of {len(x)} rows. The "
            "usual cause is normalising before the model: put the normalisation inside the model, "
            "as its first layer, and pass x unnormalised. If x has another range, pass "
            "bounds=(low, high)"
        )
    return flags != core.INPUT_NOT_FINITE


def _for_core(logits: Tensor, x: Tensor) -> Tensor:
    """Detached logits in a dtype whose wide type is that of the search state."""
    state = _WIDE[x.dtype]
    logits = logits.detach()
    return logits if _WIDE.get(logits.dtype) == state else logits.to(state)


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
