"""RR-BS, RR-Fast and the RAT loss in plain PyTorch, written to be read beside the paper.

"RAT: Boosting Misclassification Detection Ability without Extra Data", Yan and Weng, arXiv
2503.14783. This is the oracle that the tests hold the compiled core to: run it in float64. It takes
the arguments of `rat_ext.robust_radius` and returns the same, slower.

Notation: f is the model, z = f(x) its logits, y = argmax z its prediction, T the temperature. The
FGSM ray of x is x(eps) = clip(x + eps * d, low, high) with d = sign(grad_x CE(z / T, y)).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._model import Model, check_device, logits_of, undisturbed, warn_not_finite
from ._options import WIDE, Options, bounds_error
from .result import RadiusResult, concatenate

FIRST_STEP = 1e-6
"""The first radius that RR-BS probes, as a share of eps_max."""

TEXTBOOK_PROBES = 24
"""Probes of the textbook RR-BS (`regrad=True`)."""


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
    regrad: bool = False,
) -> Tensor | RadiusResult:
    """Distance of each input from the decision boundary along its FGSM ray, in the L-inf norm.

    Args:
        regrad: RR-BS as it is commonly run: a new FGSM gradient, of the cross-entropy itself, at
            each of 24 probes, and no early end (``rtol`` is not used). Its ``forward_rows`` count
            both forwards of a probe; its 24 backwards a row come on top.

    All else is as in `rat_ext.robust_radius`, also what is returned and raised. The search is a
    doubling from 1e-6 of eps_max and then a bisection, so ``search`` and ``probes`` are not taken.
    """
    options = Options.checked(x, method, rtol, bounds, temperature, eps_max, attack, batch_size, h)
    if regrad and method != "bs":
        raise ValueError(f"regrad=True is a variant of method 'bs'; got method {method!r}")
    method_of = {"bs": rr_bs_regrad if regrad else rr_bs, "fast": rr_fast}
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().clone() if x.is_inference() else x.detach()
        if not len(x):
            return RadiusResult.empty(x) if full else RadiusResult.empty(x).radius
        finite_rows = x.isfinite().flatten(1).all(1)
        outside = ((x < options.low) | (x > options.high)).flatten(1).any(1) & finite_rows
        if outside.any():
            raise bounds_error(x[outside], len(x), options)
        check_device(model, x)
        with undisturbed(model, x.device):
            chunks = x.split(batch_size or len(x))
            result = concatenate([method_of[method](model, chunk, options) for chunk in chunks])
    warn_not_finite(result.radius, stacklevel=2)
    return result if full else result.radius


# --- The ray --------------------------------------------------------------------------------------


def log_odds(z: Tensor, y: Tensor) -> Tensor:
    """(N,) log(p_y / (1 - p_y)) of the softmax p of (N, C) logits z, without cancellation."""
    others = z.scatter(1, y[:, None], -math.inf)
    return z.gather(1, y[:, None]).squeeze(1) - others.logsumexp(1)


def fgsm_direction(model: Model, x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The direction d = sign(grad_x CE(z / T, y)) of x, with the logits z and predictions y at x.

    The gradient taken is that of minus the log-odds of y, which is that of the cross-entropy up to
    the positive factor 1 - p_y. That factor does not change the sign, but underflows where the
    model is confident.
    """
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        z = logits_of(model(leaf), len(x)).to(WIDE[x.dtype])
        y = z.argmax(1)
        loss = -log_odds(z / temperature, y).sum()
    if not loss.requires_grad:
        raise RuntimeError(
            "the logits do not depend on the input through autograd, so there is no direction to "
            "search in. Is the model's forward under no_grad, or does it detach?"
        )
    (gradient,) = torch.autograd.grad(loss, leaf)
    gradient[~gradient.isfinite().flatten(1).all(1)] = math.nan
    return gradient.sign(), z.detach(), y


def textbook_direction(model: Model, x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """sign(grad_x CE(z / T, y)), by the gradient of the cross-entropy itself."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(logits_of(model(leaf), len(x)) / temperature, y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.sign()


def on_ray(x: Tensor, direction: Tensor, eps: Tensor, options: Options) -> Tensor:
    """x(eps), with one eps for each row."""
    eps = eps.view(-1, *[1] * (x.ndim - 1))
    moved = x.to(eps.dtype) + eps * direction.to(eps.dtype)
    return moved.clamp(options.low, options.high).to(x.dtype)


# --- RR-BS ----------------------------------------------------------------------------------------


def rr_bs(model: Model, x: Tensor, options: Options) -> RadiusResult:
    """RR-BS on a fixed ray: doubling until the prediction changes, then bisection."""
    direction, z, y = fgsm_direction(model, x, options.temperature)
    row = _Rows(x, z, y, options)
    row.fail(~direction.isfinite().flatten(1).all(1))
    while row.active.any():
        i = row.active.nonzero().squeeze(1)
        row.update(i, logits_of(model(on_ray(x[i], direction[i], row.eps[i], options)), len(i)))
        row.rows[i] += 1
        gap = row.upper - row.lower.clamp_min(options.eps_min)
        closed = row.found & (gap <= options.rtol * row.upper)
        row.active &= ~closed & ~row.exhausted
    return row.result()


def rr_bs_regrad(model: Model, x: Tensor, options: Options) -> RadiusResult:
    """RR-BS as it is commonly run: FGSM anew at each of 24 probes, for the whole batch."""
    z = logits_of(model(x), len(x)).to(WIDE[x.dtype])
    y = z.argmax(1)
    row = _Rows(x, z, y, options)
    everything = torch.arange(len(x), device=x.device)
    for _ in range(TEXTBOOK_PROBES):
        direction = textbook_direction(model, x, y, options.temperature)
        row.update(everything, logits_of(model(on_ray(x, direction, row.eps, options)), len(x)))
        row.rows += 2
    return row.result()


class _Rows:
    """The bracket (lower, upper) of each row, and the radius eps that it probes next."""

    def __init__(self, x: Tensor, z: Tensor, y: Tensor, options: Options) -> None:
        self.options, self.prediction = options, y
        self.lower = x.new_zeros(len(x), dtype=z.dtype)
        self.upper = torch.full_like(self.lower, math.inf)
        self.eps = torch.full_like(self.lower, FIRST_STEP * options.eps_max)
        self.flipped_to = torch.full_like(y, -1)
        self.rows = torch.zeros_like(y)
        self.active = torch.ones_like(y, dtype=torch.bool)
        self.fail(~z.isfinite().all(1))

    @property
    def found(self) -> Tensor:
        return self.upper.isfinite()

    @property
    def exhausted(self) -> Tensor:
        """Nothing has flipped up to the end of the ray."""
        return ~self.found & (self.lower >= self.options.eps_max)

    def fail(self, rows: Tensor) -> None:
        """Take the rows of this mask out: something about them is not finite."""
        self.lower[rows] = self.upper[rows] = math.nan
        self.prediction = self.prediction.where(~rows, -1)
        self.active = self.active & ~rows

    def update(self, i: Tensor, z: Tensor) -> None:
        """Take the logits z that rows i have at their eps, and choose their next eps."""
        eps, y = self.eps[i], z.argmax(1)
        flip = y != self.prediction[i]
        self.upper[i] = eps.where(flip, self.upper[i])
        self.lower[i] = eps.where(~flip, self.lower[i])
        self.flipped_to[i] = y.where(flip, self.flipped_to[i])
        middle = (self.lower[i] + self.upper[i]) / 2
        self.eps[i] = (2 * eps).clamp_max(self.options.eps_max).where(~self.found[i], middle)
        failed = torch.zeros_like(self.active)
        failed[i] = ~z.isfinite().all(1)
        self.fail(failed | self.lower.isnan())

    def result(self) -> RadiusResult:
        return RadiusResult(
            radius=(self.lower + self.upper) / 2,
            lower=self.lower,
            upper=self.upper,
            found=self.found,
            prediction=self.prediction,
            flipped_to=self.flipped_to.where(self.found, -1),
            forward_rows=self.rows,
            fallbacks=torch.zeros_like(self.rows),
        )


# --- RR-Fast --------------------------------------------------------------------------------------


def rr_fast(model: Model, x: Tensor, options: Options) -> RadiusResult:
    """RR-Fast: each gap z_y - z_j is taken as linear between 0 and h; the earliest root counts."""
    direction, z, y = fgsm_direction(model, x, options.temperature)
    step = torch.full((len(x),), options.h, dtype=z.dtype, device=x.device)
    z_h = logits_of(model(on_ray(x, direction, step, options)), len(x)).to(z.dtype)
    gap = z.gather(1, y[:, None]) - z
    fall = gap - (z_h.gather(1, y[:, None]) - z_h)
    crossing = (options.h * gap / fall).where(fall > 0, math.inf)
    crossing.scatter_(1, y[:, None], math.inf)
    radius, flipped_to = crossing.min(1)
    found = radius.isfinite()
    failed = ~(z.isfinite() & z_h.isfinite()).all(1) | ~direction.isfinite().flatten(1).all(1)
    radius = radius.where(~failed, math.nan)
    return RadiusResult(
        radius=radius,
        lower=radius.where(found | failed, options.eps_max),
        upper=radius,
        found=found & ~failed,
        prediction=y.where(~failed, -1),
        flipped_to=flipped_to.where(found & ~failed, -1),
        forward_rows=torch.ones_like(y),
        fallbacks=torch.zeros_like(y),
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
