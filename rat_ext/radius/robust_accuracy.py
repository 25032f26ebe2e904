"""Accuracy under perturbations, from radii."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from numpy.typing import ArrayLike
from torch import Tensor


@overload
def robust_accuracy(
    radius: Tensor | ArrayLike, correct: Tensor | ArrayLike, eps: float
) -> float: ...
@overload
def robust_accuracy(
    radius: Tensor | ArrayLike, correct: Tensor | ArrayLike, eps: Sequence[float] | Tensor
) -> Tensor: ...
def robust_accuracy(
    radius: Tensor | ArrayLike, correct: Tensor | ArrayLike, eps: float | Sequence[float] | Tensor
) -> float | Tensor:
    """Share of the samples that are predicted right and whose radius is larger than eps.

    It is the accuracy that is left where an attack may move each input by eps: the attack that
    measured the radii. Radii are upper bounds of the true robust radius, so this is an upper bound
    of the true robust accuracy, and no lower one: a stronger attack may find less. A certificate
    needs another method.

    A radius that equals eps is not larger. inf, where no change was found, is larger than any
    finite eps; beyond the ``eps_max`` of the search that says nothing, as no larger eps was tried.
    nan counts as not robust.

    Args:
        radius: (N,) radii of `robust_radius`, in the units of x and the norm of the attack.
        correct: (N,) bool, or 0 and 1: which predictions are right.
        eps: 0 or more, in the same units: one, or a sequence of them for the curve.

    Returns:
        A float in [0, 1] for one eps, and a float64 tensor for a sequence, with a value for each.

    Raises:
        ValueError: no samples, shapes that do not fit, values of ``correct`` other than 0 and 1, a
            negative or nan eps.
    """
    radius, correct = torch.as_tensor(radius), torch.as_tensor(correct)
    if radius.ndim != 1 or radius.shape != correct.shape or not len(radius):
        raise ValueError(
            f"radius has shape {tuple(radius.shape)} and correct {tuple(correct.shape)}; expected "
            "(N,) for both, N >= 1"
        )
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("correct has other values than 0 and 1; pass prediction == target")
    at = torch.as_tensor(eps, dtype=torch.float64)
    if at.ndim > 1 or not (at >= 0).all():
        raise ValueError(f"eps is {eps}; expected a number of 0 or more, or a sequence of them")
    # Sorted, so that a long curve takes no (N, eps) comparisons; nan as 0 is larger than no eps.
    wide = radius.detach().cpu().double().nan_to_num(nan=0.0, posinf=torch.inf)
    robust = wide[correct.cpu() == 1].sort().values
    larger = len(robust) - torch.searchsorted(robust, at.detach().cpu(), right=True)
    share = larger.double() / len(radius)
    return share if at.ndim else float(share)
