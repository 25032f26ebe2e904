"""RR-BS, RR-Fast and the RAT loss in plain PyTorch, written to be read beside the paper.

"RAT: Boosting Misclassification Detection Ability without Extra Data", Yan and Weng, arXiv
2503.14783. This is the oracle that the tests hold the compiled core to: run it in float64. It takes
the arguments of `rat_ext.robust_radius` and returns the same, slower.

Notation: f is the model, z = f(x) its logits, y = argmax z its prediction, T the temperature. The
FGSM ray of x is x(eps) = clip(x + eps * d, low, high) with d = sign(grad_x CE(z / T, y)); for L2
distances d is that gradient scaled to L2 norm 1. PGD (Madry et al., ICLR 2018) looks for a change
of the prediction anywhere in the ball of radius eps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common.per_sample import of_rows, with_arguments
from ._common.resolution import least_step
from ._common.user_model import Model, check_device, full_float32, logits_of, undisturbed
from .search.checked import WIDE, Options, check_classes
from .search.options import SearchOptions, shows_options
from .search.result import RadiusResult, concatenate, problems, verified, warn_about

if TYPE_CHECKING:
    from typing_extensions import Unpack

TEXTBOOK_PROBES = 24
"""Probes of the textbook RR-BS (`regrad=True`)."""

PGD_STEPS = 10


@shows_options(without=["norm", "probes", "search"])
def robust_radius(
    model: Model,
    x: Tensor,
    *,
    full: bool | Literal["points"] = False,
    regrad: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[SearchOptions],
) -> Tensor | RadiusResult:
    """Distance of each input from the decision boundary: by default on its FGSM ray, in L-inf.

    Args:
        model: as in `rat_ext.robust_radius`, and so are ``x``, ``full`` and the options. The search
            is a doubling from 1e-6 and then a bisection, so ``search`` and ``probes``
            are not taken; ``attack`` is "fgsm", "fgsm_l2", "pgd" or "pgd_l2".
        x: (N, ...) inputs; float64 where the result is to be an oracle.
        full: return a RadiusResult instead of the radii alone; "points", with ``x_adv``.
        regrad: RR-BS as it is commonly run: a new FGSM gradient, of the cross-entropy itself, at
            each of 24 probes, and no early end (``rtol`` is not used). Its ``forward_rows`` count
            both forwards of a probe; its 24 backwards a row come on top.
        model_kwargs: as in `rat_ext.robust_radius`.

    Returns:
        As `rat_ext.robust_radius`, which also says what is raised.
    """
    if other := options.keys() & {"norm", "probes", "search"}:
        raise TypeError(f"the reference has no option {min(other)!r}")
    chosen = Options.checked(x, **options).keeping(full)
    names = [each.name for each in chosen.attacks]
    if names[1:] or names[0] not in TWINS:
        raise ValueError(
            f"the reference has one of {', '.join(TWINS)} at a time, not {', '.join(names)}"
        )
    if regrad and (chosen.method != "bs" or names != ["fgsm"] or chosen.target is not None):
        raise ValueError(
            f"regrad=True is a variant of method 'bs' with attack 'fgsm' and no target; got method "
            f"{chosen.method!r}, attack {names[0]!r} and target {chosen.target!r}"
        )
    method = rr_fast if chosen.method == "fast" else rr_bs_regrad if regrad else TWINS[names[0]]
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().clone() if x.is_inference() else x.detach()
        if not len(x):
            empty = RadiusResult.empty(x, chosen)
            return empty if full else empty.radius
        outside = chosen.bounds.outside(x) & finite(x)
        if outside.any():
            raise chosen.bounds.error(x[outside], len(x))
        model = with_arguments(model, x, model_kwargs)
        check_device(model, x)
        exact = full_float32() if chosen.tf32 is False else contextlib.nullcontext()
        with undisturbed(model, x.device), exact:
            rows = torch.arange(len(x)).split(chosen.batch_size or len(x))
            result = concatenate([method(of_rows(model, i), x[i], chosen.of_rows(i)) for i in rows])
            if chosen.keep_points:
                result = verified(model, result, chosen.batch_size)
    warn_about(problems(result).tolist(), len(result), stacklevel=2)
    return result if full else result.radius


def finite(*tensors: Tensor) -> Tensor:
    """(N,) bool: the rows whose elements are finite in all of the tensors."""
    return torch.stack([each.isfinite().flatten(1).all(1) for each in tensors]).all(0)


def like_rows(values: Tensor, x: Tensor) -> Tensor:
    """(N,) values in a shape that broadcasts over the rows of x."""
    return values.view(-1, *[1] * (x.ndim - 1))


def changed(now: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """(N,) bool: these classes are other ones than y; with targets, they are the targets."""
    return now != y if target is None else now == target


# --- The ray --------------------------------------------------------------------------------------


def log_odds(z: Tensor, y: Tensor) -> Tensor:
    """(N,) log(p_y / (1 - p_y)) of the softmax p of (N, C) logits z, without cancellation."""
    others = z.scatter(1, y[:, None], -math.inf)
    return z.gather(1, y[:, None]).squeeze(1) - others.logsumexp(1)


def fgsm_direction(
    model: Model,
    x: Tensor,
    temperature: float,
    norm: str = "linf",
    target: Literal["runner-up"] | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The direction d = sign(grad_x CE(z / T, y)) of x, with the logits z and predictions y at x.

    The gradient taken is that of minus the log-odds of y, which is that of the cross-entropy up to
    the positive factor 1 - p_y. That factor does not change the sign, but underflows where the
    model is confident. For L2 d is the gradient, scaled to norm 1.
    """
    gradient, z, y, _ = attack_gradient(model, x, temperature, target)
    failed = like_rows(~finite(gradient), x)
    gradient = gradient.masked_fill(failed, math.nan)
    return steepest(gradient, norm), z, y


def attack_gradient(
    model: Model,
    x: Tensor,
    temperature: float,
    target: Literal["runner-up"] | Tensor | None,
    y: Tensor | None = None,
    runner_up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient at x of minus the log-odds of y, or of what raises a target.

    That is the runner-up's logit minus that of y, or the log-odds of the class of each row.

    Returns it with the logits z, y and the runner-up, which are those at x unless they are given.
    """
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        z = logits_of(model(leaf), len(x)).to(WIDE[x.dtype])
        y = z.argmax(1) if y is None else y
        others = z.scatter(1, y[:, None], -math.inf)
        runner_up = others.argmax(1) if runner_up is None else runner_up
        if target is None:
            loss = -log_odds(z / temperature, y).sum()
        elif isinstance(target, Tensor):
            check_classes(target, z.shape[1])
            loss = log_odds(z / temperature, target).sum()
        else:
            loss = (z.gather(1, runner_up[:, None]) - z.gather(1, y[:, None])).sum()
    if not loss.requires_grad:
        raise RuntimeError(
            "the logits do not depend on the input through autograd, so there is no direction to "
            "search in. Is the model's forward under no_grad, or does it detach?"
        )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient, z.detach(), y, runner_up


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of norm 1 in which a function with this gradient rises fastest."""
    if norm == "linf":
        return gradient.sign()
    length = gradient.flatten(1).norm(dim=1)
    return gradient.div(like_rows(length.where(length != 0, 1), gradient))


def textbook_direction(model: Model, x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """sign(grad_x CE(z / T, y)), by the gradient of the cross-entropy itself."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(logits_of(model(leaf), len(x)) / temperature, y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.sign()


def on_ray(x: Tensor, direction: Tensor, eps: Tensor, options: Options) -> Tensor:
    """x(eps), with one eps for each row."""
    eps = like_rows(eps, x)
    moved = x.to(eps.dtype) + eps * direction.to(eps.dtype)
    return options.bounds.clip(moved).to(x.dtype)


# --- RR-BS ----------------------------------------------------------------------------------------


def rr_bs(model: Model, x: Tensor, options: Options) -> RadiusResult:
    """RR-BS on a fixed ray: doubling until the prediction changes, then bisection."""
    row, _ = searched_ray(model, x, options)
    return row.result()


def searched_ray(model: Model, x: Tensor, options: Options) -> tuple[_Rows, Tensor]:
    """The rows, their search on the ray done, and the directions of the ray."""
    direction, z, y = fgsm_direction(model, x, options.temperature, options.norm, options.target)
    row = _Rows(x, z, y, options)
    row.least_step = least_step(x, direction)
    row.fail(~finite(direction))

    def probe(i: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        row.rows[i] += 1
        point = on_ray(x[i], direction[i], eps, options)
        return logits_of(of_rows(model, i)(point), len(i)), point

    row.search(probe)
    return row, direction


def rr_bs_regrad(model: Model, x: Tensor, options: Options) -> RadiusResult:
    """RR-BS as it is commonly run: FGSM anew at each of 24 probes, for the whole batch."""
    z = logits_of(model(x), len(x)).to(WIDE[x.dtype])
    y = z.argmax(1)
    row = _Rows(x, z, y, options)
    everything = torch.arange(len(x), device=x.device)
    for _ in range(TEXTBOOK_PROBES):
        direction = textbook_direction(model, x, y, options.temperature)
        point = on_ray(x, direction, row.eps, options)
        row.update(everything, logits_of(model(point), len(x)), point)
        row.rows += 2
    result = row.result()
    result.resolved.copy_(~result.radius.isnan())  # as well as 24 probes do
    return result


# --- PGD ------------------------------------------------------------------------------------------


def rr_pgd(model: Model, x: Tensor, options: Options) -> RadiusResult:
    """The same search, with PGD in the ball of radius eps in place of the point of the ray.

    The first radius is the one at which the ray's search saw the prediction change. A row starts in
    the direction in which its last attack ended, at first that of the ray.
    """
    ray, direction = searched_ray(model, x, options)
    steps = options.steps or PGD_STEPS
    y = ray.prediction.clamp_min(0)
    _, z, _, runner_up = attack_gradient(model, x, options.temperature, options.target, y)
    row = _Rows(x, z, ray.prediction, options)
    row.least_step = ray.least_step
    row.fail(ray.lower.isnan())
    row.eps = ray.upper.where(ray.found, row.eps)
    seen = torch.zeros_like(row.active)

    def attack(i: int, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The point nearest to another class, or furthest into it, that is met; logits first."""
        xi, yi = x[i : i + 1].to(z.dtype), y[i : i + 1]
        aim = options.of_rows(torch.tensor([i]))
        point = projected(xi + eps * direction[i : i + 1].to(z.dtype), xi, eps, options)
        best = math.inf
        for step in range(steps + 1):
            gradient, zi, _, _ = attack_gradient(
                of_rows(model, slice(i, i + 1)),
                point.to(x.dtype),
                aim.temperature,
                aim.target,
                yi,
                runner_up[i : i + 1],
            )
            row.rows[i] += 1
            row.backwards[i] += step < steps
            margin = margin_of(zi, yi, aim.classes).item()
            if not margin >= best:
                best, best_z, best_point = margin, zi[0], point
            flipped = changed(zi.argmax(1), yi, aim.classes)
            if step == steps or (flipped and seen[i]) or not zi.isfinite().all():
                break
            moved = point + 2.5 * eps / steps * steepest(gradient, options.norm).to(z.dtype)
            point = projected(moved, xi, eps, options)
        seen[i] = True
        direction[i] = (best_point - xi)[0] / eps
        return best_z, best_point[0].to(x.dtype)

    def probe(i: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        met = [attack(j, e) for j, e in zip(i.tolist(), eps, strict=True)]
        logits, points = (torch.stack(each) for each in zip(*met, strict=True))
        return logits, points

    row.search(probe)
    result = row.result()
    # The ray is one of the ball's: where its bracket is lower, that is the radius.
    nearer = ray.found & ~(result.radius <= ray.result().radius)
    names = ["radius", "lower", "upper", "resolved", "flipped_to"]
    for name in [*names, "x_adv"] if options.keep_points else names:
        getattr(result, name)[nearer] = getattr(ray.result(), name)[nearer]
    result.forward_rows.add_(ray.rows)
    return result


def margin_of(z: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """(N,) logit of y minus the largest other one; or the largest but the target's minus its."""
    c = (y if target is None else target)[:, None]
    margin = (z.gather(1, c) - z.scatter(1, c, -math.inf).amax(1, keepdim=True)).squeeze(1)
    return margin if target is None else -margin


def projected(point: Tensor, x: Tensor, eps: Tensor, options: Options) -> Tensor:
    """The point, pulled into the ball of radius eps around x and then into the bounds."""
    step = point - x
    if options.norm == "linf":
        step = step.clamp(-eps, eps)
    elif step.norm() > eps:
        step = step * (eps / step.norm())
    return options.bounds.clip(x + step)


TWINS = {"fgsm": rr_bs, "fgsm_l2": rr_bs, "pgd": rr_pgd, "pgd_l2": rr_pgd}
"""Of the attacks that are here too: what measures the radius."""


# --- What both searches keep ----------------------------------------------------------------------


class _Rows:
    """The bracket (lower, upper) of each row, and the radius eps that it probes next."""

    def __init__(self, x: Tensor, z: Tensor, y: Tensor, options: Options) -> None:
        self.options, self.prediction, self.x, self.x_adv = options, y, x, x.clone()
        self.lower = x.new_zeros(len(x), dtype=z.dtype)
        self.upper = torch.full_like(self.lower, math.inf)
        self.eps = torch.full_like(self.lower, options.first_step)
        self.least_step = torch.zeros_like(self.lower)
        self.flipped_to = torch.full_like(y, -1)
        self.rows, self.backwards = torch.zeros_like(y), torch.zeros_like(y)
        self.active = torch.ones_like(y, dtype=torch.bool)
        if options.classes is not None:
            there = y == options.classes
            self.upper[there], self.flipped_to[there], self.active[there] = 0, y[there], False
        self.fail(~finite(x, z))

    @property
    def found(self) -> Tensor:
        return self.upper.isfinite()

    @property
    def narrow(self) -> Tensor:
        return self.upper - self.lower <= self.options.rtol * self.upper

    @property
    def exhausted(self) -> Tensor:
        """Nothing has flipped up to the end of the ray."""
        return ~self.found & (self.lower >= self.options.eps_max)

    def fail(self, rows: Tensor) -> None:
        """Take the rows of this mask out: something about them is not finite."""
        self.lower[rows] = self.upper[rows] = math.nan
        self.prediction = self.prediction.where(~rows, -1)
        self.active = self.active & ~rows

    def search(self, probe: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Narrow all brackets with probe(i, eps): logits and points of rows i at their eps."""
        while self.active.any():
            i = self.active.nonzero().squeeze(1)
            self.update(i, *probe(i, self.eps[i]))
            gap = self.upper - self.lower.maximum(self.least_step)
            closed = self.found & (gap <= self.options.narrowest * self.upper)
            self.active &= ~closed & ~self.exhausted

    def update(self, i: Tensor, z: Tensor, point: Tensor) -> None:
        """Take the logits z that rows i have at a point at their eps, and choose the next eps."""
        eps, y = self.eps[i], z.argmax(1)
        classes = self.options.classes
        flip = changed(y, self.prediction[i], None if classes is None else classes[i])
        self.upper[i] = eps.where(flip, self.upper[i])
        self.lower[i] = eps.where(~flip, self.lower[i])
        self.flipped_to[i] = y.where(flip, self.flipped_to[i])
        self.x_adv[i] = point.where(like_rows(flip, point), self.x_adv[i])
        middle = (self.lower[i] + self.upper[i]) / 2
        self.eps[i] = (2 * eps).clamp_max(self.options.eps_max).where(~self.found[i], middle)
        failed = torch.zeros_like(self.active)
        failed[i] = ~finite(z)
        self.fail(failed | self.lower.isnan())

    def result(self) -> RadiusResult:
        return RadiusResult(
            radius=(self.lower + self.upper) / 2,
            lower=self.lower,
            upper=self.upper,
            found=self.found,
            resolved=self.narrow.where(self.found, self.exhausted),
            prediction=self.prediction,
            flipped_to=self.flipped_to.where(self.found, -1),
            forward_rows=self.rows,
            fallbacks=torch.zeros_like(self.rows),
            backward_rows=self.backwards,
            won=torch.zeros_like(self.rows),
            norm=self.options.norm,
            attacks=(self.options.attacks[0].name,),
            x_adv=self.x_adv.where(like_rows(self.found, self.x), self.x)
            if self.options.keep_points
            else None,
        )


# --- RR-Fast --------------------------------------------------------------------------------------


def rr_fast(model: Model, x: Tensor, options: Options) -> RadiusResult:
    """RR-Fast: each gap z_y - z_j is taken as linear between 0 and h; the earliest root counts."""
    direction, z, y = fgsm_direction(model, x, options.temperature, target=options.target)
    step = torch.full((len(x),), options.h, dtype=z.dtype, device=x.device)
    z_h = logits_of(model(on_ray(x, direction, step, options)), len(x)).to(z.dtype)
    failed = ~finite(x, z, z_h, direction)
    prediction, target = y, options.classes
    if target is not None:  # two classes: all others as one, and the target
        z, z_h = (
            torch.stack([margin_of(each, y, target), torch.zeros_like(each[:, 0])], 1)
            for each in (z, z_h)
        )
        y = torch.zeros_like(y)
    gap = z.gather(1, y[:, None]) - z
    fall = gap - (z_h.gather(1, y[:, None]) - z_h)
    crossing = (options.h * gap / fall).where(fall > 0, math.inf)
    crossing.scatter_(1, y[:, None], math.inf)
    radius, flipped_to = crossing.min(1)
    if target is not None:
        radius, flipped_to = radius.where(prediction != target, 0), target
    found = radius.isfinite()
    radius = radius.where(~failed, math.nan)
    return RadiusResult(
        radius=radius,
        lower=radius.where(found | failed, options.eps_max),
        upper=radius,
        found=found & ~failed,
        resolved=~failed,
        prediction=prediction.where(~failed, -1),
        flipped_to=flipped_to.where(found & ~failed, -1),
        forward_rows=torch.ones_like(y),
        fallbacks=torch.zeros_like(y),
        backward_rows=torch.zeros_like(y),
        won=torch.zeros_like(y),
    )


# --- The RAT loss ---------------------------------------------------------------------------------


def rat_loss(
    model: Model,
    x: Tensor,
    t: Tensor,
    *,
    eps: float = 1e-3,
    lam: float = 1.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: int = 1,
    step_size: float | None = None,
) -> Tensor:
    """CE(f(x), t) + lam * CE(f(x'), t), a scalar; its gradient flows to the model's parameters.

    x' = clip(x + s * eps * sign(grad_x CE(f(x), t))), with s = +1 for the samples that are
    classified right and -1 for those that are wrong. ``steps > 1`` is the PGD inner loop: steps of
    ``step_size`` (default 2.5 * eps / steps) with the same s, projected on the eps ball around x.
    """
    if step_size is None:
        step_size = eps if steps == 1 else 2.5 * eps / steps
    z = logits_of(model(x), len(x))
    sign = torch.where(z.argmax(1) == t, 1.0, -1.0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    point = x
    for _ in range(steps):
        leaf = point.detach().requires_grad_()
        loss = F.cross_entropy(logits_of(model(leaf), len(x)), t, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        moved = leaf.detach() + sign * step_size * gradient.sign()
        point = moved.clamp(x - eps, x + eps).clamp(*bounds)
    clean = F.cross_entropy(z, t)
    return clean + lam * F.cross_entropy(logits_of(model(point), len(x)), t)
