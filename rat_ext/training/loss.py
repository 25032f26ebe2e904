"""The RAT training loss (Yan and Weng, arXiv 2503.14783), at the price of two backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common.bounds import Bounds
from .._common.per_sample import with_arguments
from .._common.user_model import at_least_float32, check_device, logits_of


@dataclass(frozen=True)
class RATLossOutput:
    """One evaluation of the RAT loss on a batch of N samples."""

    loss: Tensor
    """Scalar, clean + lam * perturbed: what to call ``backward()`` on."""
    clean: Tensor
    """Scalar, detached: mean cross-entropy at x."""
    perturbed: Tensor
    """Scalar, detached: mean cross-entropy at the perturbed inputs."""
    logits: Tensor
    """(N, C), detached: the logits at x."""


class RATLoss:
    """``CE(f(x), t) + lam * CE(f(x'), t)``: pushes the boundary away from right samples only.

    ``x' = clip(x + s * eps * sign(grad_x CE(f(x), t)), *bounds)``, where per sample s = +1 if it is
    classified right (it is attacked, so that training moves the boundary away from it) and -1 if
    it is wrong (it is moved to where its loss is lower, so that training does not). With
    ``steps > 1`` the perturbation is found by PGD: that many steps of ``step_size`` with the same
    s, projected on the eps ball around x.

    The backward pass of the clean term, which the perturbation needs anyway, also gives the clean
    term's parameter gradients; they are kept, and handed on when ``loss.backward()`` runs. So a
    step costs two forward and two backward passes (and a pair more for each further PGD step).

    The model runs in the mode that it is in: in training mode batch normalisation sees both the
    clean and the perturbed batch. ::

        criterion = rat_ext.RATLoss(eps=1e-3, lam=1.0)
        out = criterion(model, x, t)
        out.loss.backward()

    Args:
        eps: size of the perturbation, in the units of x; >= 0.
        lam: weight of the perturbed term; >= 0.
        bounds: smallest and largest value of an input element; None for an end that is none.
        steps: 1 for FGSM, more for PGD.
        step_size: of a PGD step; default 2.5 * eps / steps, as in Madry et al. 2018. FGSM has eps.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        eps: float = 1e-3,
        lam: float = 1.0,
        *,
        bounds: tuple[float | None, float | None] | None = (0.0, 1.0),
        steps: int = 1,
        step_size: float | None = None,
    ) -> None:
        for name, value in (("eps", eps), ("lam", lam)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1")
        if step_size is None:
            step_size = eps if steps == 1 else 2.5 * eps / steps
        if not (step_size >= 0 and math.isfinite(step_size)):
            raise ValueError(f"step_size is {step_size}; it must be finite and not negative")
        self.eps, self.lam, self.bounds = eps, lam, bounds
        self._range = Bounds.parse(bounds, torch.empty(1, 1))
        self.steps, self.step_size = steps, step_size
        self._input_checked = False

    def __repr__(self) -> str:
        return (
            f"RATLoss(eps={self.eps}, lam={self.lam}, bounds={self.bounds}, steps={self.steps}, "
            f"step_size={self.step_size})"
        )

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        t: Tensor,
        *,
        extra: Callable[[Tensor], Tensor] | None = None,
        mix: tuple[Callable[[Tensor], Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> RATLossOutput:
        """The loss of `model` on inputs x with targets t.

        Args:
            model: from (N, ...) inputs to (N, C) logits, or to an object with ``.logits``.
            x: (N, ...) floating-point inputs within ``bounds`` (checked on the first call).
            t: (N,) int64 classes, or (N, C) class probabilities (mixup); then a sample is right if
                the prediction is the most probable class.
            extra: another loss, a function of the (N, C) logits at x, to add to the clean term. The
                perturbation is without it. It costs one more backward pass.
            mix: how the clean term is mixed, as the authors of RAT do: a differentiable function of
                x, and the (N, C) targets of its results. The clean term is then that of the mixed
                inputs; the perturbed term stays that of x and t, in the direction of the gradient
                in x of the mixed loss, and whether a sample is right is told by x itself, for one
                more forward pass.
            model_kwargs: more arguments of the model: ``model(x, **model_kwargs)``.

        Raises:
            TypeError: the model is not an nn.Module, x is not floating-point.
            ValueError: x out of bounds, model and x on different devices, t of another shape; the
                logits do not depend on x through autograd.
        """
        self._check(model, x, t)
        bound = with_arguments(model, x, model_kwargs)
        assert isinstance(bound, nn.Module)
        model = bound
        parameters = [p for p in model.parameters() if p.requires_grad]
        training = torch.is_grad_enabled()

        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            shown, shown_t = (leaf, t) if mix is None else (mix[0](leaf), mix[1])
            logits = logits_of(model(shown), len(x))
            if not torch.is_floating_point(t):
                _check_classes(t, logits)
            values = at_least_float32(logits)
            shown_t = shown_t.to(values.dtype) if shown_t.is_floating_point() else shown_t
            clean = F.cross_entropy(values, shown_t)
            seed = _cross_entropy_gradient(values.detach(), shown_t).to(logits.dtype)
            wanted = parameters if training else []
            gradient, kept = None, []
            added = None
            if extra is not None:
                own = values.detach().requires_grad_()
                more = extra(own)
                clean = clean + more.detach()
                if wanted:
                    (more_seed,) = torch.autograd.grad(more, own)
                    added = torch.autograd.grad(
                        logits, wanted, more_seed.to(logits.dtype), True, allow_unused=True
                    )
            if logits.requires_grad:
                gradient, *kept = torch.autograd.grad(
                    logits, [leaf, *wanted], seed, allow_unused=True
                )
            if gradient is None:
                raise ValueError(
                    "the logits do not depend on the input through autograd, so there is no "
                    "direction to perturb it in. Is the model's forward under no_grad, or does it "
                    "detach? Train it with plain cross-entropy, or let gradients reach the input"
                )
        clean = clean.detach()
        if added is not None:
            pairs = zip(kept, added, strict=True)
            kept = [a if b is None else b if a is None else a + b for a, b in pairs]

        with torch.no_grad():
            if mix is not None:
                logits = logits_of(model(x), len(x))
            target = t.argmax(1) if torch.is_floating_point(t) else t
            right = logits.argmax(1) == target
            sign = torch.where(right, 1.0, -1.0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        point = self._moved(x, x, sign, gradient)
        for _ in range(self.steps - 1):
            point = self._moved(x, point, sign, _input_gradient(model, point, t))

        perturbed_logits = logits_of(model(point), len(x))
        perturbed = F.cross_entropy(perturbed_logits.to(clean.dtype), t)
        loss = clean
        if training and parameters:
            loss = _WithGradients.apply(clean, kept, *parameters)
        return RATLossOutput(
            loss=loss + self.lam * perturbed,
            clean=clean,
            perturbed=perturbed.detach(),
            logits=logits.detach(),
        )

    @torch.no_grad()
    def _moved(self, x: Tensor, point: Tensor, sign: Tensor, gradient: Tensor) -> Tensor:
        moved = point + sign * self.step_size * gradient.sign()
        return self._range.clip(moved.clamp(x - self.eps, x + self.eps))

    def _check(self, model: nn.Module, x: Tensor, t: Tensor) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}; RATLoss needs an nn.Module, whose parameters "
                "it can see"
            )
        if not torch.is_floating_point(x):
            raise TypeError(
                f"x is {x.dtype}; expected a floating-point tensor. Scale integer images first, "
                "for example x.float() / 255"
            )
        if t.ndim not in (1, 2) or len(t) != len(x) or (t.ndim == 2) != t.is_floating_point():
            raise ValueError(
                f"t has shape {tuple(t.shape)} and {t.dtype} for {len(x)} inputs; expected (N,) "
                "integer classes or (N, C) class probabilities"
            )
        check_device(model, x)
        if not self._input_checked:  # only once: it waits for the device
            outside = self._range.outside(x)
            if outside.any():
                raise self._range.error(x[outside], len(x))
            self._input_checked = True


def _check_classes(t: Tensor, logits: Tensor) -> None:
    if t.device.type == "cpu" and len(t) and not 0 <= int(t.min()) <= int(t.max()) < len(logits[0]):
        raise ValueError(
            f"t has classes from {int(t.min())} to {int(t.max())}, but the model has "
            f"{len(logits[0])} classes"
        )


def _cross_entropy_gradient(logits: Tensor, t: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy in (N, C) logits.

    For class targets its entry at t is minus the sum of the others rather than softmax_t - 1, which
    rounds to 0 in float32 where the model is confident, and takes the input gradient's signs along.
    """
    p = logits.softmax(1)
    if torch.is_floating_point(t):
        return (p - t) / len(t)
    others = p.scatter(1, t[:, None], 0.0)
    return others.scatter(1, t[:, None], -others.sum(1, keepdim=True)) / len(t)


@torch.enable_grad()
def _input_gradient(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    logits = logits_of(model(leaf), len(x))
    values = at_least_float32(logits.detach())
    seed = _cross_entropy_gradient(values, t).to(logits.dtype)
    return torch.autograd.grad(logits, leaf, seed)[0]


class _WithGradients(torch.autograd.Function):
    """The identity on a loss whose gradients in the parameters are already known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known = [g for g in ctx.gradients if g is not None]
        present = iter(torch._foreach_mul(known, grad) if known else ())
        return None, None, *(None if g is None else next(present) for g in ctx.gradients)
