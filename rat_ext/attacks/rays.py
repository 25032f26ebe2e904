"""Rays of any direction, and vectors of a norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._common.resolution import least_step
from .._common.user_model import Model
from .._core import core
from ..search.attack import register
from ..search.bracket_search import BracketSearch
from ..search.checked import WIDE, Options
from ..search.place import runs_core
from ..search.tensors import empty_rows_like, like_rows, ray_room


def length(vectors: Tensor, norm: str) -> Tensor:
    """(N,) L-inf or L2 norm of each row, without over- or underflow on the way."""
    largest = vectors.abs().flatten(1).amax(1)
    if norm == "linf":
        return largest
    scale = largest.clamp_min(torch.finfo(vectors.dtype).tiny)
    scaled = (vectors / like_rows(scale, vectors)).flatten(1)
    return scale.mul(scaled.norm(dim=1))


def unit(vectors: Tensor, norm: str) -> Tensor:
    """Each row scaled to norm 1; rows of zeros stay."""
    for each in dict.fromkeys(("linf", norm)):  # by the largest first: squares may underflow
        scale = length(vectors, each).clamp_min(torch.finfo(vectors.dtype).tiny)
        vectors = vectors / like_rows(scale, vectors)
    return vectors


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of norm 1 in which a function with this gradient rises fastest."""
    return gradient.sign() if norm == "linf" else unit(gradient, norm)


@register("fgsm", by_gradient=True)
def fgsm(model: Model, x: Tensor, classes: int, options: Options) -> BracketSearch:
    """The ray of the gradient's sign: in the core where it can be, else in plain torch."""
    in_core = options.bounds.uniform and runs_core(x.device)
    return (BracketSearch if in_core else SignRay)(model, x, classes, options)


@register("fgsm_l2", norm="l2", by_gradient=True)
class VectorRay(BracketSearch):
    """Searches on the rays ``clip(x + e * d)`` of any directions d; here, those of the gradient.

    A step on such a ray is plain torch, which costs 1 to 2 % of a search
    (docs/measurements/attacks.md); int8 directions keep the FGSM search as small as it is.
    """

    def __init__(self, model: Model, x: Tensor, classes: int, options: Options) -> None:
        super().__init__(model, x, classes, options)
        self.direction = empty_rows_like(x, len(x), WIDE[x.dtype])

    def head(self, gradient: Tensor, begin: int) -> None:
        rows = slice(begin, begin + len(gradient))
        gradient = gradient.to(WIDE[self.x.dtype])
        self.direction[rows] = steepest(gradient, self.options.norm).to(self.direction.dtype)
        self.start(self.slope(gradient, rows), begin)

    def slope(self, gradient: Tensor, rows: slice) -> Tensor:
        """(N,) derivative along the ray at its start, of the elements that can move."""
        x, direction = self.x[rows], self.direction[rows]
        low, high = self.options.low, self.options.high
        held = ((direction > 0) & (x >= high)) | ((direction < 0) & (x <= low))
        return (gradient * direction).masked_fill_(held, 0).flatten(1).sum(1)

    def start(self, slope: Tensor, begin: int) -> None:
        """Plan the first probes of rows begin, begin + 1, ... from their slopes."""
        # The core sums |gradient| over the elements that can move, and looks at their size: here
        # it is shown one, of such a gradient and size.
        rows = slice(begin, begin + len(slope))
        one = slope[:, None].clamp_min(0)
        least = least_step(self.x[rows], self.direction[rows]).to(one.dtype)
        x = (least * (4 / torch.finfo(one.dtype).eps))[:, None]
        one, x = one.to(self.home), x.to(self.home)
        direction = torch.empty_like(one, dtype=torch.int8)
        ends, room = (-math.inf, math.inf), ray_room(x)
        core.aim(one, x, direction, *ends, self.state, begin, room, **self.launch)

    def points_at(self, index: Tensor, radii: Tensor, points: Tensor, count: Tensor) -> None:
        rows = index.long()
        e = radii[rows].flatten().to(self.x.device)
        rows = rows.repeat_interleave(radii.shape[1]).to(self.x.device)
        x, direction = self.x[rows].to(e.dtype), self.direction[rows].to(e.dtype)
        moved = torch.addcmul(x, direction, like_rows(e, self.x))
        points.copy_(self.options.bounds.clip(moved))


class SignRay(VectorRay):
    """The FGSM ray in plain torch, where the core does not know the bounds or the device."""

    def __init__(self, model: Model, x: Tensor, classes: int, options: Options) -> None:
        super().__init__(model, x, classes, options)
        self.direction = empty_rows_like(x, len(x), torch.int8)
