"""Robust radii: how far each input is from the classifier's decision boundary.

The method is RR-BS and RR-Fast of Yan and Weng, "RAT: Boosting Misclassification Detection Ability
without Extra Data" (arXiv 2503.14783), searched on a ray that is computed once. The loops run in
the compiled core (csrc/search_rule.h tells how a probe is chosen); `rat_ext.reference` is the same
in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._build import core
from ._model import Model, check_device, logits_of, undisturbed, warn_not_finite
from ._options import WIDE, AttackFunction, Options, bounds_error
from .result import RadiusResult

if TYPE_CHECKING:
    from .shards import RadiusShards

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
    attack: str | AttackFunction | Sequence[str | AttackFunction] = "fgsm",
    batch_size: int | None = None,
    full: bool = False,
    h: float = 1e-3,
    search: str = "interpolate",
    probes: int = 1,
    norm: str | None = None,
    target: str | None = None,
    steps: int | None = None,
) -> Tensor | RadiusResult:
    """Distance of each input from the decision boundary: by default on its FGSM ray, in L-inf.

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
        eps_max: how far to search; default the largest distance of two points in the bounds: their
            width, times the square root of the elements for L2.
        attack: how the change of prediction is looked for; see `rat_ext.attacks`. "fgsm" is the ray
            above, "fgsm_l2" that of the gradient scaled to L2 norm 1. "pgd" and "pgd_l2" attack
            anew at each radius. "deepfool", "fmn" and "fab", each also with "_l2", and functions
            ``(model, x, y) -> x_adv`` choose the ray that is searched. "best", "best_l2" or a
            sequence of attacks of one norm: the smallest radius counts.
        batch_size: most rows in one forward; default all of x. Does not change the results beyond
            rounding.
        full: return a RadiusResult instead of the radii alone.
        h: step of method "fast", in the units of x.
        search: "interpolate", or "bisect" for plain doubling from 1e-6 and bisection (slower).
        probes: points probed per sample and forward. More than one spends rows to save rounds, for
            small batches on a device that they leave idle. Not for PGD.
        norm: that of the distance, "linf" (default) or "l2", where ``attack`` is a function; named
            attacks have theirs.
        target: "runner-up" directs fgsm and pgd at the second most likely class at x instead of
            away from the prediction. Any change of the prediction still counts.
        steps: iterations of PGD (default 10) and of the libraries' attacks (default theirs).

    Returns:
        (N,) radii on x's device, float64 for float64 x and float32 otherwise: inf where the
        prediction does not change up to eps_max, nan (with one RuntimeWarning) where the input or
        the logits are not finite. With ``full=True`` a `RadiusResult`.

    Raises:
        ValueError: x out of bounds or without a batch dimension, logits that are not (N, C >= 2),
            model and x on different devices, an option out of its range.
        TypeError: x or the logits are not floating-point tensors.
        ImportError: the library of an attack is not installed.
    """
    options = Options.checked(
        x,
        method,
        rtol,
        bounds,
        temperature,
        eps_max,
        attack,
        batch_size,
        h,
        search,
        probes,
        norm=norm,
        target=target,
        steps=steps,
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


@overload
def robust_radii(
    model: Model, loader: Iterable[Any], *, out: None = ..., **options: Any
) -> LoaderRadii: ...
@overload
def robust_radii(
    model: Model, loader: Iterable[Any], *, out: str | Path, **options: Any
) -> RadiusShards: ...
def robust_radii(
    model: Model,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    batches_per_shard: int = 16,
    format: str = "npz",
    **options: Any,
) -> LoaderRadii | RadiusShards:
    """Radii of every batch of a DataLoader, with a progress bar.

    With ``out`` the results go to files in that folder, one for every ``batches_per_shard`` batches
    (a shard), and memory does not grow with the data. A run that was killed goes on with
    ``resume=True``: finished shards are kept, the one in work is done again. Batches of a
    DataLoader over a map-style data set that are done already are not loaded; those of other
    iterables are read and passed over. The loader must give the same batches each time.

    Under torchrun, after ``torch.distributed.init_process_group``, every process makes the same
    call with the same loader (without a DistributedSampler), and shard i is computed by process
    i mod (number of processes). A run may be resumed with another number of processes.

    Args:
        model: as in `robust_radius`. Resuming with other weights is refused; those of a callable
            that is not a module cannot be compared.
        loader: yields (x, target, ...) or x alone.
        device: where to move the inputs; default the device of the model's first parameter.
        progress: show a tqdm bar on standard error.
        out: folder to write to; one run in each. Default: the results are kept in memory.
        resume: go on with the run in ``out``, if there is one.
        batches_per_shard: how many batches a kill can cost at most, in each process.
        format: of the files: "npz", or "parquet" (needs pyarrow).
        options: passed to `robust_radius` (all but ``full``).

    Returns:
        Radii, predictions and targets, (N,) tensors on the CPU; target is None if the loader has
        none. With ``out`` a `RadiusShards`, whose ``load()`` returns them.

    Raises:
        ValueError: the loader is empty; with ``out``, it shuffles, or the run in the folder is of
            another model, other data or other options.
        FileExistsError: there is a run in ``out``, and ``resume`` is False.
        ImportError: the format needs pyarrow.
    """
    if device is None and isinstance(model, torch.nn.Module):
        device = next((p.device for p in model.parameters()), None)
    if out is not None:
        from .shards import write_radii

        return write_radii(
            model,
            loader,
            out,
            resume=resume,
            batches_per_shard=batches_per_shard,
            format=format,
            device=device,
            progress=progress,
            options=options,
        )
    if resume:
        raise ValueError("resume=True needs the folder out of the run to go on with")
    from tqdm.auto import tqdm

    radii: list[Tensor] = []
    predictions: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in tqdm(loader, desc="robust radius", unit="batch", disable=not progress):
        result, target = batch_radii(model, batch, device, options)
        radii.append(result.radius.cpu())
        predictions.append(result.prediction.cpu())
        if target is not None:
            targets.append(target)
    if not radii:
        raise ValueError("the loader gave no batch")
    return LoaderRadii(
        torch.cat(radii), torch.cat(predictions), torch.cat(targets) if targets else None
    )


def batch_radii(
    model: Model, batch: Any, device: torch.device | str | None, options: dict[str, Any]
) -> tuple[RadiusResult, Tensor | None]:
    """The result for one batch of a loader, and the batch's targets on the CPU, if it has any."""
    x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
    result = robust_radius(model, x.to(device), full=True, **options)
    return result, torch.as_tensor(rest[0]).cpu() if rest else None


def _radii(model: Model, x: Tensor, runs: Sequence[Options]) -> list[RadiusResult]:
    """One result for each of `runs`, which differ in their temperature only."""
    from . import attacks  # which builds on what is here

    shared = runs[0]
    # Tensors made in inference mode cannot enter a graph, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach()
        if not len(x):
            return [RadiusResult.empty(x, shared) for _ in runs]
        x = with_dense_rows(x)
        finite = checked_input(x, shared)
        check_device(model, x)
        chunk = min(shared.batch_size or len(x), len(x))
        with undisturbed(model, x.device):
            results = attacks.radii(model, x, runs, finite, chunk)
    warn_not_finite(results[0].radius, stacklevel=3)
    return results


def differentiable_logits(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf that shares x's memory, and the logits that depend on it through autograd."""
    leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model(leaf), len(leaf))
    if not logits.requires_grad:
        raise RuntimeError(
            "the logits do not depend on the input through autograd, so there is no direction "
            "to search in. Is the model's forward under no_grad, or does it detach?"
        )
    if logits.device != x.device:
        raise ValueError(f"x is on {x.device} but the model returned logits on {logits.device}")
    return leaf, logits


class ActiveCount:
    """Reads from the device how many rows are active.

    On a GPU the number comes by an asynchronous copy to pinned memory, and the host waits for the
    event behind it alone. In the first `sure` rounds no row can have settled (unless it is not
    finite or cannot move), so `total` is returned at once, and the host runs ahead. Reading every
    count one round late would spare the other waits too, of some microseconds each, but it costs
    exactly one forward row more for every sample: the rows launched would be those that were active
    a round before.
    """

    def __init__(self, device: torch.device, total: int = 0, sure: int = 0) -> None:
        self.total, self.sure = total, sure
        self.device = device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.host = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self.event = torch.cuda.Event()

    def __call__(self, count: Tensor) -> int:
        """How many rows are active at most; never fewer than the (1,) int32 `count`."""
        if not self.on_gpu:
            return int(count)
        if self.sure > 0:
            self.sure -= 1
            return self.total
        self.host.copy_(count, non_blocking=True)
        self.event.record(torch.cuda.current_stream(self.device))
        self.event.synchronize()
        return int(self.host)


class Search:
    """The bracket searches of all rows of x on one set of rays."""

    def __init__(self, x: Tensor, classes: int, options: Options) -> None:
        self.x, self.options = x, options
        n, dtype, device = len(x), WIDE[x.dtype], x.device
        self.direction = empty_rows_like(x, n, torch.int8)
        self.brackets = torch.empty(n, len(_COLUMN), dtype=dtype, device=device)
        self.probes = torch.empty(n, options.probes, dtype=dtype, device=device)
        self.gaps = torch.empty(n, core.KNOTS * classes, dtype=dtype, device=device)
        self.state = core.State(
            self.brackets,
            self.gaps,
            self.probes,
            rtol=options.rtol,
            eps_max=options.eps_max,
            eps_min=options.eps_min,
            temperature=options.temperature,
            bisect=options.bisect,
        )

    def aim(self, leaf: Tensor, logits: Tensor, begin: int = 0, retain_graph: bool = False) -> None:
        """Take the ray of rows begin, begin + 1, ... from the logits of `leaf` and their graph."""
        launch = launch_arguments(self.x)
        values = for_core(logits, self.x)
        seed = torch.empty_like(values)
        core.start(values, seed, self.state, begin, **launch)
        if self.options.target:
            seed = runner_up_seed(values, self.predicted(slice(begin, begin + len(leaf))))
        (gradient,) = torch.autograd.grad(
            logits, leaf, seed.to(logits.dtype), retain_graph=retain_graph
        )
        self.head(gradient, begin)

    def head(self, gradient: Tensor, begin: int) -> None:
        """Take the direction and the first probes of rows begin, ... from the input gradient."""
        low, high = self.options.low, self.options.high
        rows = slice(begin, begin + len(gradient))
        x, direction = self.x[rows], self.direction[rows]
        if gradient.stride() != x.stride():
            gradient = empty_rows_like(x, len(x), x.dtype).copy_(gradient)
        core.aim(gradient, x, direction, low, high, self.state, begin, **launch_arguments(x))
        if self.options.method == "fast":
            self.probes[rows].fill_(self.options.h)

    def exclude(self, rows: Tensor) -> None:
        """Give up the first len(rows) rows where the (...,) bool `rows` is True."""
        self.column("status")[: len(rows)].masked_fill_(rows, core.NOT_FINITE)

    def compact(self, index: Tensor, count: Tensor) -> None:
        """Move the active ones of the first `count` rows in `index` to its front; update count."""
        core.compact(index, self.state, index, count, count, **launch_arguments(self.x))

    def step(self, model: Model, index: Tensor, points: Tensor, count: Tensor) -> None:
        """Probe the rows in `index`; those beyond the (1,) int32 `count` do not change."""
        logits = self.logits_at(model, index, self.probes, points, count)
        launch = launch_arguments(self.x)
        if self.options.method == "fast":
            core.extrapolate(logits, index, self.options.h, self.state, count, **launch)
        else:
            core.advance(logits, index, self.state, count, **launch)

    def logits_at(
        self, model: Model, index: Tensor, radii: Tensor, points: Tensor, count: Tensor
    ) -> Tensor:
        """Logits of the rows in `index` at each of their `radii`; `points` is room for them."""
        low, high = self.options.low, self.options.high
        points = points[: len(index) * radii.shape[1]]
        launch = launch_arguments(self.x)
        core.perturb(self.x, self.direction, index, radii, low, high, points, count, **launch)
        return for_core(logits_of(model(points), len(points)), self.x)

    def run(self, model: Model, chunk: int) -> None:
        """Probe until no row is active. Finished rows leave the batch, and waiting ones fill it."""
        n, device = len(self.x), self.x.device
        index = torch.arange(n, dtype=torch.int32, device=device)
        count = torch.full((1,), n, dtype=torch.int32, device=device)
        active = ActiveCount(device, total=n, sure=self.options.least_rounds)
        rows = max(1, chunk // self.options.probes)
        points = empty_rows_like(self.x, rows * self.options.probes, self.x.dtype)
        while True:
            self.compact(index, count)
            index = index[: active(count)]
            if not len(index):
                return
            for i, part in enumerate(index.split(rows)):
                left = count if i == 0 else (count - i * rows).clamp_min_(0)
                self.step(model, part, points, left)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a search changes, each with one row per sample."""
        return self.brackets, self.gaps, self.probes

    def column(self, name: str) -> Tensor:
        """(N,) view of one field of the brackets (csrc/search_rule.h)."""
        return self.brackets[:, _COLUMN[name]]

    def predicted(self, rows: slice | Tensor) -> Tensor:
        """int64: the classes at radius 0 of some rows; any class for those that are not finite."""
        classes = self.gaps.shape[1] // core.KNOTS
        return self.column("prediction")[rows].long().clamp_(0, classes - 1)

    def result(self, rows: int | None = None) -> RadiusResult:
        """The results of the first `rows` rows, of all by default."""
        column = {name: self.column(name)[:rows] for name in _COLUMN}
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
            backward_rows=torch.zeros_like(status, dtype=torch.int64),
            won=torch.zeros_like(status, dtype=torch.int64),
            worst_case_rows=self.state.max_rows() if searched else 0,
            norm=self.options.norm,
            attacks=tuple(attack.name for attack in self.options.attacks),
        )


def checked_input(x: Tensor, options: Options) -> Tensor:
    """(N,) bool: the row is finite. Raises if an element of a finite row is out of bounds."""
    flags = input_flags(x, options)
    outside = flags == core.INPUT_OUTSIDE
    if outside.any():
        raise bounds_error(x[outside], len(x), options)
    return flags != core.INPUT_NOT_FINITE


def input_flags(x: Tensor, options: Options) -> Tensor:
    """(N,) uint8: 0 where the row is finite and in bounds, else one of core.INPUT_*."""
    flags = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    core.inspect(x, options.low, options.high, flags, **launch_arguments(x))
    return flags


def runner_up_seed(logits: Tensor, prediction: Tensor) -> Tensor:
    """Gradient of the runner-up's logit minus the prediction's: +1 and -1, 0 elsewhere."""
    y = prediction[:, None]
    runner_up = logits.scatter(1, y, -math.inf).argmax(1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, runner_up, 1).scatter_(1, y, -1)


def for_core(logits: Tensor, x: Tensor) -> Tensor:
    """Detached logits in a dtype whose wide type is that of the search state."""
    state = WIDE[x.dtype]
    logits = logits.detach()
    return logits if WIDE.get(logits.dtype) == state else logits.to(state)


def with_dense_rows(x: Tensor) -> Tensor:
    """x itself if each row is one dense block in any order (channels_last is), else a copy."""
    inner = sorted((s, n) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True) if n != 1)
    expected = 1
    for stride, size in inner:
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def empty_rows_like(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, ...) with the memory order of x's rows, one row after the other."""
    elements = math.prod(x.shape[1:])
    return torch.empty_strided(
        (rows, *x.shape[1:]), (elements, *x.stride()[1:]), dtype=dtype, device=x.device
    )


def launch_arguments(x: Tensor) -> dict[str, Any]:
    """How the core runs on x's device: on torch's current stream, or with its threads."""
    if x.device.type == "cuda":
        return {"stream": torch.cuda.current_stream(x.device).cuda_stream}
    return {"threads": torch.get_num_threads()}
