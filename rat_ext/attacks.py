"""Other ways to the nearest change of the prediction than the FGSM ray: the ``attack`` option.

    rat_ext.robust_radius(model, x, attack="pgd", steps=20)
    rat_ext.robust_radius(model, x, attack=["pgd_l2", "deepfool_l2"], full=True).won

Every attack has a norm, L-inf or, if its name ends in ``_l2``, L2, and gives an upper bound of the
true distance in it:

- ``fgsm``, ``fgsm_l2``: the ray ``clip(x + e * d)`` with d the gradient's sign, or the gradient
  scaled to L2 norm 1. Where the bounds clip the step, the input has moved by less than e: the
  radius e is never smaller than the distance to the point that was found.
- ``pgd``, ``pgd_l2``: at each radius e that the search probes, projected gradient descent in the
  ball of radius e around x (Madry et al., ICLR 2018). The first e is the radius of FGSM, and the
  result is never larger than that.
- ``deepfool`` (Moosavi-Dezfooli et al., CVPR 2016) and ``fmn`` (Pintor et al., NeurIPS 2021) of
  foolbox, ``fab`` (Croce and Hein, ICML 2020) of torchattacks, each also with ``_l2``, and any
  function ``(model, x, y) -> x_adv``. The library says where to look, the search how far: what is
  searched is the ray from x through x_adv, so that overshooting costs nothing.
- ``best``, ``best_l2``, or a sequence of attacks of one norm: for each sample the smallest radius.

All searches follow the one bracket rule (csrc/search_rule.h), and no named attack starts at random.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._build import core
from ._model import Model, logits_of
from ._options import ATTACKS, BEST, WIDE, Attack, Options
from .radius import (
    Search,
    differentiable_logits,
    empty_rows_like,
    for_core,
    launch_arguments,
)
from .result import RadiusResult

__all__ = ["names", "radii"]

PGD_STEPS = 10
PGD_STEP_SIZE = 2.5
"""Of all steps together, in radii: Madry et al. take 2.5 * eps / steps, to reach the ball's edge
from anywhere in it."""


def names() -> list[str]:
    """The names that ``attack`` takes."""
    return [*ATTACKS, *BEST]


def radii(
    model: Model, x: Tensor, runs: Sequence[Options], finite: Tensor, chunk: int
) -> list[RadiusResult]:
    """The results of each of `runs`, which differ in their temperature only.

    Args:
        finite: (N,) bool: the rows of x that are to be searched.
        chunk: most rows in one forward.
    """
    by_attack = []
    for attack in runs[0].attacks:
        alone = [run.only(attack) for run in runs]
        search = functools.partial(_searched, model, x, finite=finite, chunk=chunk)
        if attack.kind == "fgsm":
            results = [ray.result() for ray, _ in search(alone, _ray_of(attack))]
        elif attack.kind == "pgd":
            results = []
            for ray, start in search(alone, _ray_of(attack)):
                balls = PGDSearch(ray, start)
                balls.run(model, chunk)
                results.append(_smallest([ray.result(), balls.result()]))
        else:  # temperature plays no part
            ((ray, _),) = search(alone[:1], functools.partial(AttackRay, model))
            results = [ray.result() for _ in runs]
        by_attack.append(results)
    return [_best(results) for results in zip(*by_attack, strict=True)]


def _searched(
    model: Model,
    x: Tensor,
    runs: Sequence[Options],
    make: Callable[[Tensor, int, Options], Search],
    *,
    finite: Tensor,
    chunk: int,
) -> list[tuple[Search, Sequence[Tensor]]]:
    """The finished search of each run on its own ray, and the state that it started from."""
    searches: list[Search] = []
    for begin in range(0, len(x), chunk):
        # One forward for all, and a backward for each.
        leaf, logits = differentiable_logits(model, x[begin : begin + chunk])
        if not searches:
            searches = [make(x, logits.shape[1], run) for run in runs]
        for i, search in enumerate(searches):
            search.aim(leaf, logits, begin, retain_graph=i + 1 < len(searches))
    done = []
    for search in searches:
        search.exclude(~finite)
        start = [tensor.clone() for tensor in search.tensors]
        search.run(model, chunk)
        done.append((search, start))
    return done


# --- The smallest radius --------------------------------------------------------------------------


def _smallest(results: Sequence[RadiusResult]) -> RadiusResult:
    """For each row the result with the smallest radius, and what all of them took together."""
    # Not found is worse than any radius, and not finite worse than that. The first of equals wins.
    worst = torch.finfo(results[0].radius.dtype).max
    radius = torch.stack([result.radius for result in results])
    won = radius.nan_to_num(nan=math.inf, posinf=worst).argmin(0)

    def of_winner(name: str) -> Tensor:
        return torch.stack([getattr(result, name) for result in results]).gather(0, won[None])[0]

    def total(name: str) -> Any:
        return sum(getattr(result, name) for result in results)

    chosen = ("radius", "lower", "upper", "found", "prediction", "flipped_to")
    summed = ("forward_rows", "backward_rows", "fallbacks", "worst_case_rows")
    return replace(
        results[0],
        won=won,
        **{name: of_winner(name) for name in chosen},
        **{name: total(name) for name in summed},
    )


def _best(results: Sequence[RadiusResult]) -> RadiusResult:
    """The smallest of the results of different attacks."""
    if len(results) == 1:
        return replace(results[0], won=torch.zeros_like(results[0].won))
    best = _smallest(results)
    # Each of the other attacks began with a forward and a backward of its own.
    others = len(results) - 1
    return replace(
        best,
        forward_rows=best.forward_rows + others,
        backward_rows=best.backward_rows + others,
        worst_case_rows=best.worst_case_rows + others,
        attacks=tuple(name for result in results for name in result.attacks),
    )


# --- Vectors of a norm ----------------------------------------------------------------------------


def length(vectors: Tensor, norm: str) -> Tensor:
    """(N,) L-inf or L2 norm of each row, without over- or underflow on the way."""
    largest = vectors.abs().flatten(1).amax(1)
    if norm == "linf":
        return largest
    scale = largest.clamp_min(torch.finfo(vectors.dtype).tiny)
    return scale * (vectors / like_rows(scale, vectors)).flatten(1).norm(dim=1)


def unit(vectors: Tensor, norm: str) -> Tensor:
    """Each row scaled to norm 1; rows of zeros stay."""
    for each in dict.fromkeys(("linf", norm)):  # by the largest first: squares may underflow
        scale = length(vectors, each).clamp_min(torch.finfo(vectors.dtype).tiny)
        vectors = vectors / like_rows(scale, vectors)
    return vectors


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of norm 1 in which a function with this gradient rises fastest."""
    return gradient.sign() if norm == "linf" else unit(gradient, norm)


def like_rows(values: Tensor, x: Tensor) -> Tensor:
    """(N,) values in a shape that broadcasts over the rows of x."""
    return values.view(-1, *[1] * (x.ndim - 1))


# --- Rays -----------------------------------------------------------------------------------------


def _ray_of(attack: Attack) -> Callable[[Tensor, int, Options], Search]:
    return Search if attack.norm == "linf" else VectorRay


class VectorRay(Search):
    """Searches on the rays ``clip(x + e * d)`` of any directions d; here, those of the gradient.

    A step on such a ray is plain torch, which costs 1 to 2 % of a search (docs/attacks.md); int8
    directions are what keeps the FGSM search as small as it is.
    """

    def __init__(self, x: Tensor, classes: int, options: Options) -> None:
        super().__init__(x, classes, options)
        self.direction = empty_rows_like(x, len(x), WIDE[x.dtype])

    def head(self, gradient: Tensor, begin: int) -> None:
        rows = slice(begin, begin + len(gradient))
        gradient = gradient.to(self.direction.dtype)
        self.direction[rows] = unit(gradient, self.options.norm)
        self.start(self.slope(gradient, rows), begin)

    def slope(self, gradient: Tensor, rows: slice) -> Tensor:
        """(N,) derivative along the ray at its start, of the elements that can move."""
        x, direction = self.x[rows], self.direction[rows]
        low, high = self.options.low, self.options.high
        held = ((direction > 0) & (x >= high)) | ((direction < 0) & (x <= low))
        return (gradient * direction).masked_fill_(held, 0).flatten(1).sum(1)

    def start(self, slope: Tensor, begin: int) -> None:
        """Plan the first probes of rows begin, begin + 1, ... from their slopes."""
        # The core sums |gradient| over the elements that can move: here one, whose gradient it is.
        one = slope[:, None].clamp_min(0)
        x, direction = torch.zeros_like(one), torch.empty_like(one, dtype=torch.int8)
        core.aim(one, x, direction, -1, 1, self.state, begin, **launch_arguments(one))

    def logits_at(
        self, model: Model, index: Tensor, radii: Tensor, points: Tensor, count: Tensor
    ) -> Tensor:
        rows = index.long()
        e = radii[rows].flatten()
        rows = rows.repeat_interleave(radii.shape[1])
        moved = torch.addcmul(self.x[rows].to(e.dtype), self.direction[rows], like_rows(e, self.x))
        points = points[: len(rows)].copy_(moved.clamp_(self.options.low, self.options.high))
        return for_core(logits_of(model(points), len(points)), self.x)


class AttackRay(VectorRay):
    """Searches on the rays through the points that somebody else's attack finds."""

    def __init__(self, model: Model, x: Tensor, classes: int, options: Options) -> None:
        super().__init__(x, classes, options)
        self.model = model
        self.attack_rows = torch.zeros(2, len(x), dtype=torch.int64, device=x.device)

    def head(self, gradient: Tensor, begin: int) -> None:
        rows = slice(begin, begin + len(gradient))
        step, watched = self.attack(rows)
        totals = (watched.forwards, watched.backwards)
        for spent, total in zip(self.attack_rows[:, rows], totals, strict=True):
            # Which of its batch's rows an attack goes on with is not known: all pay alike.
            spent.fill_(total // len(step))[: total % len(step)] += 1
        self.direction[rows] = unit(step, self.options.norm)
        slope = self.slope(gradient.to(step.dtype), rows)
        # The ray need not start downhill; 0 would say that nothing can move.
        found = length(step, self.options.norm)
        self.start(slope.clamp_min(torch.finfo(slope.dtype).tiny).where(found > 0, 0), begin)
        parts = self.options.probes
        shares = torch.arange(1, parts + 1, device=found.device, dtype=found.dtype) / parts
        limits = (self.options.eps_min, self.options.eps_max)
        self.probes[rows] = (found[:, None] * shares).clamp_(*limits)

    def attack(self, rows: slice) -> tuple[Tensor, WatchedModel]:
        """The steps from rows of x to what the attack finds, and the model that it used."""
        attack, options = self.options.attacks[0], self.options
        x = self.x[rows].contiguous()
        wide = WIDE[x.dtype]
        # Rows that are given up anyway must not upset the others.
        x = x.where(like_rows(x.flatten(1).isfinite().all(1), x), options.low)
        low, width = (options.low, options.high - options.low) if attack.library else (0.0, 1.0)
        watched = WatchedModel(self.model, x, low, width)
        run = attack.function or functools.partial(
            _LIBRARIES[attack.library], attack, options.steps
        )
        start = (x - low) / width
        if attack.library:
            start.clamp_(0, 1)  # what rounding did
        with torch.enable_grad():
            found = run(watched, start.clone(), self.predicted(rows))
        if not isinstance(found, Tensor) or found.shape != x.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"attack {attack.name!r} returned {what}; expected inputs of shape {tuple(x.shape)}"
            )
        # A difference of the library's points, so that what it left alone has not moved at all.
        step = (found.detach().to(x.device, wide) - start.to(wide)) * width
        return (x.to(wide) + step).clamp_(options.low, options.high) - x.to(wide), watched

    def result(self, rows: int | None = None) -> RadiusResult:
        result = super().result(rows)
        forwards, backwards = self.attack_rows[:, :rows]
        return replace(
            result,
            forward_rows=result.forward_rows + forwards,
            backward_rows=backwards.clone(),
            worst_case_rows=result.worst_case_rows + int(forwards.max()),
        )


# --- PGD ------------------------------------------------------------------------------------------


class PGDSearch(Search):
    """Searches whose probe of a radius is PGD in the ball of that radius, on all rows of `ray`.

    Gradients are those of the log-odds, as for the FGSM ray: right where the model is confident. A
    row starts in the direction in which its last probe ended, at first that of the ray, and leaves
    as soon as its prediction has changed. Only in its first probe, at the radius that the ray gave,
    it takes all the steps: how deep they lead into another class tells how much too far that is.
    """

    def __init__(self, ray: Search, start: Sequence[Tensor]) -> None:
        classes = ray.gaps.shape[1] // core.KNOTS
        super().__init__(ray.x, classes, ray.options)
        for now, then in zip(self.tensors, start, strict=True):
            now.copy_(then)
        at_x = self.gaps[:, :classes].scatter(1, self.predicted(slice(None))[:, None], math.inf)
        self.runner_up = at_x.argmin(1)
        found = ray.column("status") == core.FOUND
        self.probes[:, 0] = ray.column("upper").where(found, self.probes[:, 0])
        self.direction = ray.direction.to(self.probes.dtype)
        self.steps = ray.options.steps or PGD_STEPS
        self.forwards, self.backwards = torch.zeros(
            2, len(ray.x), dtype=torch.int64, device=ray.x.device
        )

    def logits_at(
        self, model: Model, index: Tensor, radii: Tensor, points: Tensor, count: Tensor
    ) -> Tensor:
        low, high, norm = self.options.low, self.options.high, self.options.norm
        rows = index.long()
        x, y = self.x[rows].to(radii.dtype), self.predicted(rows)
        eps = like_rows(radii[rows, 0], x)
        first = self.column("rows")[rows] == 0
        point = (x + eps * self.direction[rows]).clamp_(low, high)
        best, best_margin = point.clone(), radii.new_full((len(rows),), math.inf)
        best_logits = self.gaps.new_empty(len(rows), self.gaps.shape[1] // core.KNOTS)
        left = torch.arange(len(rows), device=rows.device)  # the rows that go on, and their points
        for step in range(self.steps + 1):
            self.forwards[rows[left]] += 1
            leaf, logits = self._forward(model, point, with_graph=step < self.steps)
            z = logits.detach().to(radii.dtype)
            margin = _margin(z, y[left])
            deeper = ~(margin >= best_margin[left])  # also where it is not finite
            at = left[deeper]
            best_margin[at], best_logits[at], best[at] = margin[deeper], z[deeper], point[deeper]
            if step == self.steps:
                break
            self.backwards[rows[left]] += 1
            seed = self._seed(z, y[left], self.runner_up[rows[left]])
            (gradient,) = torch.autograd.grad(logits, leaf, seed.to(logits.dtype))
            going = (z.argmax(1) == y[left]) | first[left]
            going &= margin.isfinite()
            left, point, gradient = left[going], point[going], gradient[going].to(point.dtype)
            if not len(left):
                break
            size = eps[left] * (PGD_STEP_SIZE / self.steps)
            moved = point + size * steepest(gradient, norm) - x[left]
            point = (x[left] + _project(moved, eps[left], norm)).clamp_(low, high)
        self.direction[rows] = (best - x) / eps
        return best_logits

    def _forward(self, model: Model, point: Tensor, with_graph: bool) -> tuple[Tensor, Tensor]:
        point = point.to(self.x.dtype)
        if with_graph:
            return differentiable_logits(model, point)
        return point, logits_of(model(point), len(point))

    def _seed(self, logits: Tensor, y: Tensor, runner_up: Tensor) -> Tensor:
        """Gradient in the logits of what the attack lets rise: another class against y."""
        if self.options.target:
            seed = torch.zeros_like(logits).scatter_(1, runner_up[:, None], 1)
            return seed.scatter_(1, y[:, None], -1)
        others = logits.scatter(1, y[:, None], -math.inf) / self.options.temperature
        return others.softmax(1).scatter_(1, y[:, None], -1)

    def result(self, rows: int | None = None) -> RadiusResult:
        result = super().result(rows)
        return replace(
            result,
            forward_rows=self.forwards[:rows],
            backward_rows=self.backwards[:rows],
            worst_case_rows=result.worst_case_rows * (self.steps + 1),
        )


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) z_y minus the largest other logit; nan where a logit is not finite."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    margin = logits.gather(1, y[:, None]).squeeze(1) - others
    return margin.where(logits.isfinite().all(1), math.nan)


def _project(steps: Tensor, eps: Tensor, norm: str) -> Tensor:
    """The nearest steps (N, ...) of norm eps or less."""
    if norm == "linf":
        return steps.clamp(-eps, eps)
    tiny = torch.finfo(steps.dtype).tiny
    return steps * (eps / like_rows(length(steps, norm), steps).clamp_min(tiny)).clamp_max(1)


# --- Attacks of libraries and users ---------------------------------------------------------------


class WatchedModel(nn.Module):
    """The model as other people's attacks see it: rows are counted, and it is left alone.

    It takes inputs of any floating dtype, ``low + width * u`` being what the model gets. Gradients
    reach the inputs and nothing else: ``backward()`` leaves no ``.grad`` on the model's parameters.
    """

    def __init__(self, model: Model, x: Tensor, low: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        self.training = False
        self.device_of = nn.Parameter(x.new_empty(0), requires_grad=False)  # libraries ask for it
        self.run = lambda u: logits_of(model((low + width * u).to(x.dtype)), len(u)).to(u.dtype)
        self.forwards = self.backwards = 0

    def forward(self, u: Tensor) -> Tensor:
        self.forwards += len(u)
        if u.requires_grad and torch.is_grad_enabled():
            return _ToTheInput.apply(u, self)
        with torch.no_grad():
            return self.run(u)


class _ToTheInput(torch.autograd.Function):
    """A watched model's logits, with a gradient in the input alone."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, watched: WatchedModel) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = u.detach().requires_grad_()
            ctx.logits = watched.run(ctx.leaf)
        ctx.watched = watched
        return ctx.logits.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor, None]:
        ctx.watched.backwards += len(seed)
        # FAB asks for one gradient after the other.
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.leaf, seed, retain_graph=True)
        return gradient, None


def _foolbox(
    attack: Attack, steps: int | None, model: WatchedModel, u: Tensor, y: Tensor
) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what newer libraries deprecate
        import foolbox

    kinds = {
        "deepfool": foolbox.attacks.LinfDeepFoolAttack,
        "deepfool_l2": foolbox.attacks.L2DeepFoolAttack,
        "fmn": foolbox.attacks.LInfFMNAttack,
        "fmn_l2": foolbox.attacks.L2FMNAttack,
    }
    run = kinds[attack.name](**({} if steps is None else {"steps": steps})).run
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=u.device)
    return run(wrapped, u, foolbox.criteria.Misclassification(y))


def _torchattacks(
    attack: Attack, steps: int | None, model: WatchedModel, u: Tensor, y: Tensor
) -> Tensor:
    import torchattacks

    norm = {"linf": "Linf", "l2": "L2"}[attack.norm]
    options = {} if steps is None else {"steps": steps}
    # eps is where it gives up; nothing in the bounds is that far.
    start = u.float()  # the one dtype that it knows
    found = torchattacks.FAB(model, norm=norm, eps=math.inf, **options)(start, y)
    return u + (found - start)


_LIBRARIES = {"foolbox": _foolbox, "torchattacks": _torchattacks}
