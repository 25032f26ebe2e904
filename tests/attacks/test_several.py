"""Several attacks at once: the smallest radius wins."""

from __future__ import annotations

import math

import pytest
import torch
from attack_helpers import blob
from helpers import FIELDS, mlp, uniform

from rat_ext import RadiusResult, robust_radius
from rat_ext.search.result import smallest


def test_an_empty_batch_knows_its_norm():
    result = robust_radius(mlp(), torch.empty(0, 12), attack=["fgsm_l2", "pgd_l2"], full=True)
    assert (len(result), result.norm, result.attacks) == (0, "l2", ("fgsm_l2", "pgd_l2"))


def test_the_smallest_radius_wins_and_says_so():
    model, x = mlp(seed=5), uniform(40, 12, seed=5)
    names = ["fgsm", blob, "pgd"]
    each = [robust_radius(model, x, attack=name, full=True) for name in names]
    best = robust_radius(model, x, attack=names, full=True)
    assert best.attacks == ("fgsm", "blob", "pgd")
    assert torch.equal(best.radius, torch.stack([one.radius for one in each]).min(0).values)
    assert best.won.unique().numel() > 1
    for i, one in enumerate(each):
        mine = best.won == i
        for name in FIELDS:
            assert torch.equal(getattr(best, name)[mine], getattr(one, name)[mine])
    assert torch.equal(best.forward_rows, sum(one.forward_rows for one in each) + 2)
    assert torch.equal(best.backward_rows, sum(one.backward_rows for one in each) + 2)
    assert best.worst_case_rows == sum(one.worst_case_rows for one in each) + 2
    assert torch.equal(best[:3].won, best.won[:3])


def test_a_radius_wins_over_none_and_none_over_nan():
    def result(*radii: float) -> RadiusResult:
        radius = torch.tensor(radii)
        found, whole = radius.isfinite(), torch.zeros(len(radii), dtype=torch.int64)
        return RadiusResult(*[radius] * 3, *[found] * 2, *[whole] * 6)

    nan, inf = math.nan, math.inf
    both = smallest([result(nan, inf, inf, 0.2, 0.3), result(inf, 0.1, nan, nan, 0.3)])
    assert both.won.tolist() == [1, 1, 0, 0, 0]
    assert both.radius.tolist() == pytest.approx([inf, 0.1, inf, 0.2, 0.3])
