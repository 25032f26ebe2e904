"""How small a step can move an input at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def least_step(x: Tensor, direction: Tensor) -> Tensor:
    """(N,) e below which no element of x + e * direction differs from x, in x's arithmetic.

    Numbers of size v are at least v * eps / 2 apart, and half of that rounds away. Zeros can move
    by far less than anything else in a row, but steps so small mean nothing: an element counts for
    at least eps / 4 of the largest.

    Args:
        x: (N, ...) inputs.
        direction: likewise.
    """
    share = torch.finfo(x.dtype).eps / 4
    size = x.abs().flatten(1).to(direction.dtype if direction.is_floating_point() else x.dtype)
    size = size.clamp_min(size.amax(1, keepdim=True) * share)
    along = direction.abs().flatten(1).to(size.dtype)
    step = (size * share / along).where(along > 0, math.inf).amin(1)
    return step.clamp_min(tiny(size.dtype))


def tiny(dtype: torch.dtype) -> float:
    """The least step that a search in this dtype looks at."""
    return torch.finfo(dtype).tiny
