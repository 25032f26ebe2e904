"""For trials.py: searches whose rays are noted, and the model run again on those rays."""

import math
import warnings
from unittest import mock

import torch
from torch import Tensor, nn
from trial_cases import Case

import rat_ext
from rat_ext import reference
from rat_ext.search.bracket_search import BracketSearch
from rat_ext.search.checked import WIDE


def run(case: Case, x: Tensor, options: dict) -> tuple[rat_ext.RadiusResult, list[Tensor]]:
    """The result, and the directions of the rays that the library searched."""
    directions, original = [], BracketSearch.run

    def noting(search):
        directions.append(search.direction.clone())
        return original(search)

    stop, patch = case.net.stopping(), mock.patch.object(BracketSearch, "run", noting)
    with stop, patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are not finite: their nan is checked
        return rat_ext.robust_radius(case.net, x, full=True, **options), directions


class Ray:
    """The rays of some rows, as the library took them, and the model on them."""

    def __init__(self, nets: tuple[nn.Module, nn.Module], x: Tensor, direction: Tensor, options):
        self.nets, self.x, self.direction, self.options = nets, x, direction, options

    def __getitem__(self, rows: Tensor) -> "Ray":
        return Ray(self.nets, self.x[rows], self.direction[rows], self.options)

    def points(self, eps: Tensor) -> Tensor:
        """Rounded as the library's are."""
        eps = eps.to(WIDE[self.x.dtype])
        return reference.on_ray(self.x, self.direction, eps, self.options)

    def margin(self, y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) float64 logit of class y minus the largest other, and what rounding may add."""
        z, band = self.logits(self.points(eps))[1:]
        others = z.scatter(1, y[:, None], -math.inf).amax(1)
        return z.gather(1, y[:, None])[:, 0] - others, band

    def logits(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C) by the model, (N, C) by the same in float64, and how far their gaps may differ.

        Each logit may be off by four times the error that is seen at the point: the order of the
        model's sums, and so its rounding, may change from run to run.
        """
        model, exact = self.nets
        own = reference.logits_of(model(point), len(point))
        z = reference.logits_of(exact(point.double()), len(point))
        error = 64 * torch.finfo(z.dtype).eps * z.abs().amax(1)
        if own.dtype != z.dtype:
            error += 4 * (own.double() - z).abs().amax(1)
            error += 4 * torch.finfo(own.dtype).eps * z.abs().amax(1)
        return own, z, 2 * error

    def scan(self, result) -> tuple[Tensor, Tensor]:
        """(points, N) radii, ascending, and there +1: kept, -1: changed, 0: rounding decides."""
        end = torch.full_like(result.lower.double(), self.options.eps_max)
        near = result.upper.double().where(result.found, end).minimum(end)
        shares = torch.linspace(0, 1, 97, dtype=torch.float64)[1:, None]
        octaves = 2.0 ** -torch.arange(0, 32, 0.7, dtype=torch.float64)[:, None]
        grid = [shares * end, octaves * end, shares[2::3] * near]
        grid += [result.lower.double()[None].minimum(end), near[None]]
        eps = torch.cat(grid).sort(0).values
        rows, classes = len(near), self.nets[0].body[-1].out_features
        signs = []
        for part in eps.split(max(1, 4_000_000 // (rows * classes))):
            again = torch.arange(rows).repeat(len(part))
            margin, band = self[again].margin(result.prediction[again], part.flatten())
            signs.append(margin.sign().where(margin.abs() > band, 0).view(-1, rows))
        return eps, torch.cat(signs)
