"""Projected gradient descent at each radius that the search probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._common.per_sample import of_rows
from .._common.user_model import Model, logits_of
from .._core import core
from ..search.attack import register
from ..search.bracket_search import BracketSearch, target_seed
from ..search.checked import Options
from ..search.result import RadiusResult, smallest
from ..search.tensors import differentiable_logits, for_core, like_rows
from .rays import VectorRay, fgsm, length, steepest

PGD_STEPS = 10
PGD_STEP_SIZE = 2.5
"""Of all steps together, in radii: Madry et al. take 2.5 * eps / steps, to reach the ball's edge
from anywhere in it."""


@register("pgd_l2", norm="l2", by_gradient=True, iterative=True, one_probe=True)
@register("pgd", by_gradient=True, iterative=True, one_probe=True)
class PGD:
    """The ray of the gradient, then balls from the ray's radius on; the smaller radius counts."""

    def __init__(self, model: Model, x: Tensor, classes: int, options: Options) -> None:
        kind = fgsm if options.norm == "linf" else VectorRay
        self.ray = kind(model, x, classes, options)
        self.aim, self.exclude = self.ray.aim, self.ray.exclude

    def run(self) -> None:
        start = [tensor.clone() for tensor in self.ray.tensors]
        self.ray.run()
        self.balls = BallSearch(self.ray, start)
        self.balls.run()

    def result(self) -> RadiusResult:
        result = smallest([self.ray.result(), self.balls.result()])
        return replace(result, won=torch.zeros_like(result.won))  # both are this attack's


class BallSearch(BracketSearch):
    """Searches whose probe of a radius is PGD in the ball of that radius, on all rows of `ray`.

    Gradients are those of the log-odds, as for the FGSM ray: right where the model is confident. A
    row starts in the direction in which its last probe ended, at first that of the ray, and leaves
    as soon as its prediction has changed. Only in its first probe, at the radius that the ray gave,
    it takes all the steps: how deep they lead into another class tells how much too far that is.
    """

    least_rounds = 0  # a round is dear: none is spent on a row that is settled or not finite

    def __init__(self, ray: BracketSearch, start: Sequence[Tensor]) -> None:
        classes = ray.gaps.shape[1] // core.KNOTS
        super().__init__(ray.model, ray.x, classes, ray.options)
        for now, then in zip(self.tensors, start, strict=True):
            now.copy_(then)
        self.at_x = ray.at_x
        gaps = self.gaps[:, :classes].to(self.x.device)
        self.runner_up = gaps.scatter(1, self.predicted(slice(None))[:, None], math.inf).argmin(1)
        found = ray.column("status") == core.FOUND
        self.probes[:, 0] = ray.column("upper").where(found, self.probes[:, 0])
        self.direction = ray.direction.to(self.probes.dtype)
        self.steps = ray.options.steps or PGD_STEPS
        self.kept = ray.x.clone() if ray.options.keep_points else None
        self.forwards, self.backwards = torch.zeros(
            2, len(ray.x), dtype=torch.int64, device=ray.x.device
        )

    def logits_at(self, index: Tensor, radii: Tensor, points: Tensor, count: Tensor) -> Tensor:
        clip, norm = self.options.bounds.clip, self.options.norm
        at_home = index.long()
        rows = at_home.to(self.x.device)
        x, y = self.x[rows].to(radii.dtype), self.predicted(at_home)
        eps = like_rows(radii[at_home, 0].to(x.device), x)
        first = (self.column("rows")[at_home] == 0).to(x.device)
        # A direction that a smaller ball gave may be a little too long, by that ball's rounding.
        point = clip(x + project(eps * self.direction[rows], eps, norm))
        best, best_margin = point.clone(), x.new_full((len(rows),), math.inf)
        best_logits = x.new_empty(len(rows), self.gaps.shape[1] // core.KNOTS)
        left = torch.arange(len(rows), device=rows.device)  # the rows that go on, and their points
        for step in range(self.steps + 1):
            self.forwards[rows[left]] += 1
            leaf, logits = self._forward(point, rows[left], with_graph=step < self.steps)
            full = for_core(logits, self.x).to(radii.dtype)
            z = self.shown(full, rows[left])
            margin = margin_of(z, y[left])
            deeper = ~(margin >= best_margin[left])  # also where it is not finite
            best_margin[left] = margin.where(deeper, best_margin[left])
            best_logits[left] = z.where(deeper[:, None], best_logits[left])
            best[left] = point.where(like_rows(deeper, point), best[left])
            if step == self.steps:
                break
            self.backwards[rows[left]] += 1
            seed = self._seed(full, y[left], rows[left])
            (gradient,) = torch.autograd.grad(logits, leaf, seed.to(logits.dtype))
            going = (z.argmax(1) == y[left]) | first[left]
            going &= margin.isfinite()
            on = going.nonzero().squeeze(1)  # the one wait for the device in a step
            left, point, gradient = left[on], point[on], gradient[on].to(point.dtype)
            if not len(left):
                break
            size = eps[left] * (PGD_STEP_SIZE / self.steps)
            moved = point + size * steepest(gradient, norm) - x[left]
            point = clip(x[left] + project(moved, eps[left], norm))
        self.direction[rows] = (best - x) / eps
        if self.kept is not None:
            flipped = like_rows(best_logits.argmax(1) != y, best)
            self.kept[rows] = best.to(self.kept.dtype).where(flipped, self.kept[rows])
        return best_logits

    def changed_points(self) -> Tensor:
        assert self.kept is not None  # asked for where points are kept
        return self.kept

    def _forward(self, point: Tensor, rows: Tensor, with_graph: bool) -> tuple[Tensor, Tensor]:
        point, model = point.to(self.x.dtype), of_rows(self.model, rows)
        if with_graph:
            return differentiable_logits(model, point)
        return point, logits_of(model(point), len(point))

    def _seed(self, logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Gradient in the logits of what the attack lets rise: another class against y."""
        if self.target is not None:
            return target_seed(logits, self.target[rows], self.options.temperature)
        if self.options.target is not None:
            seed = torch.zeros_like(logits).scatter_(1, self.runner_up[rows][:, None], 1)
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


def margin_of(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) z_y minus the largest other logit; nan where a logit is not finite."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    margin = logits.gather(1, y[:, None]).squeeze(1) - others
    return margin.where(logits.isfinite().all(1), math.nan)


def project(steps: Tensor, eps: Tensor, norm: str) -> Tensor:
    """The nearest steps (N, ...) of norm eps or less."""
    if norm == "linf":
        return steps.clamp(-eps, eps)
    tiny = torch.finfo(steps.dtype).tiny
    return steps * (eps / like_rows(length(steps, norm), steps).clamp_min(tiny)).clamp_max(1)
