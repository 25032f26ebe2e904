"""Rays of any direction: against the reference and against distances worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from attack_helpers import Recorder, distance
from helpers import mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import reference, robust_radius
from rat_ext.attacks import pgd, rays


def test_a_targeted_fgsm_is_the_reference():
    model, x = mlp(seed=9), uniform(20, 12, seed=9)
    options = {"target": "runner-up", "full": True}
    for method in ("bs", "fast"):
        result = robust_radius(model, x, method=method, search="bisect", **options)
        expected = reference.robust_radius(model, x, method=method, **options)
        torch.testing.assert_close(result.radius, expected.radius, rtol=1e-7, atol=0)
    assert not torch.equal(robust_radius(model, x), robust_radius(model, x, target="runner-up"))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), shift=st.floats(-3, 3), scale=st.floats(0.1, 10))
def test_an_affine_model_has_its_exact_distances(seed, shift, scale):
    """Where no bound is near, all of ours find |margin| / (dual norm of the weights)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, generator=generator, dtype=torch.float64) * scale
    x = 0.5 + 0.01 * torch.randn(8, 6, generator=generator, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        z = (x - 0.5) @ weight + shift * scale / 100
        return torch.stack([z, -z], 1) / 2

    margin = (model(x)[:, 0] - model(x)[:, 1]).abs()
    for attack, dual in (("fgsm", 1), ("pgd", 1), ("fgsm_l2", 2), ("pgd_l2", 2)):
        expected = margin / weight.norm(p=dual)
        near = expected < 0.3
        result = robust_radius(model, x, attack=attack, rtol=1e-5)
        torch.testing.assert_close(result[near], expected[near], rtol=1e-5, atol=2.0**-24)


@pytest.mark.parametrize(("attack", "expected"), [("fgsm", 0.25), ("fgsm_l2", 0.5)])
@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_a_ray_from_a_corner_leads_inside_or_nowhere(corner, attack, expected):
    x = torch.full((1, 4), corner, dtype=torch.float64)

    def falling(slope: float):
        """A margin of 1 in the corner, which falls with the sum of the elements, or rises."""
        return lambda x: torch.stack([1 - slope * (x - corner).sum(1), 0 * x[:, 0]], 1)

    inside = 1 - 2 * corner
    radius = robust_radius(falling(inside), x, attack=attack, rtol=1e-6)
    assert radius.item() == pytest.approx(expected, rel=1e-6)
    nowhere = robust_radius(falling(-inside), x, attack=attack, full=True)
    assert nowhere.radius.item() == math.inf
    assert nowhere.forward_rows.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bounds_of_each_feature_in_half_precision(dtype):
    model, x = mlp(seed=2), uniform(20, 12, seed=2).to(dtype)
    bounds = (torch.tensor([-1.0, *[0] * 11]), 1.0)
    expected = robust_radius(model, x.double(), bounds=bounds, rtol=0.15)
    result = robust_radius(model.to(dtype), x, bounds=bounds, rtol=0.15)
    both = result.isfinite() & expected.isfinite()
    assert both.float().mean() > 0.8
    assert (result[both].double() / expected[both]).log().abs().median() < 0.2


def test_l2_radii_know_of_clipping_and_rotation():
    """A clipped step counts in full, so the radius bounds the distance; a rotation changes none."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        z = (x - 0.5) @ weight + 2
        return torch.stack([z, torch.zeros_like(z)], 1)

    x = torch.tensor([[0.0, 0.9]], dtype=torch.float64)  # the first element cannot go down
    recorder = Recorder(model=_Module(model))
    result = robust_radius(recorder, x, attack="fgsm_l2", rtol=1e-6, full=True)
    # Only the second moves, by 0.8 of the radius: z = 2.1 - 4 * 0.8 e.
    assert result.radius.item() == pytest.approx(2.1 / 3.2, rel=1e-6)
    assert distance(recorder.inputs[-1], x, "l2").item() <= result.upper.item()

    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    inner, points = mlp(seed=4), 0.3 * (uniform(20, 12, seed=4) - 0.5)
    wide = {"bounds": (-100, 100), "eps_max": 1.0, "rtol": 1e-4}
    for attack in ("fgsm_l2", "pgd_l2"):
        plain = robust_radius(inner, points, attack=attack, **wide)
        turned = robust_radius(
            lambda x: inner(x @ rotation), points @ rotation.T, attack=attack, **wide
        )
        torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-4)


class _Module(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_projections_stay_in_the_ball():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(50, 3, 4, generator=generator, dtype=torch.float64)
    eps = torch.rand(50, 1, 1, generator=generator, dtype=torch.float64) * 4
    for norm in ("linf", "l2"):
        projected = pgd.project(steps, eps, norm)
        assert (distance(projected, torch.zeros(()), norm) <= eps.flatten() * (1 + 1e-12)).all()
        inside = distance(steps, torch.zeros(()), norm) <= eps.flatten()
        assert 0 < inside.sum() < 50
        torch.testing.assert_close(projected[inside], steps[inside])
    for scale in (1e-200, 1e200):  # whose squares under- and overflow
        units = rays.unit(steps * scale, "l2")
        torch.testing.assert_close(units.flatten(1).norm(dim=1), torch.ones(50).double())
        torch.testing.assert_close(
            rays.length(steps * scale, "l2") / scale, steps.flatten(1).norm(dim=1)
        )
