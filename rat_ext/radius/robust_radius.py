"""Robust radii: how far each input is from the classifier's decision boundary.

The method is RR-BS and RR-Fast of Yan and Weng, "RAT: Boosting Misclassification Detection Ability
without Extra Data" (arXiv 2503.14783), searched on a ray that is computed once. The loops run in
the compiled core (csrc/search_rule.h tells how a probe is chosen); `rat_ext.reference` is the same
in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._common.user_model import Model, check_device, undisturbed, warn_not_finite
from ..search.attack import AttackFunction
from ..search.options import Options
from ..search.result import RadiusResult
from ..search.tensors import checked_input, with_dense_rows


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


def _radii(model: Model, x: Tensor, runs: Sequence[Options]) -> list[RadiusResult]:
    """One result for each of `runs`, which differ in their temperature only."""
    from ..attacks import run as attacks  # which builds on what is here

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
