"""robust_radius against the reference, and the brackets that it finds against the model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import FIELDS, RowExact, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import RadiusResult, reference, robust_radius
from rat_ext.search.checked import Options

METHODS = ["bs", "fast"]
SEARCHES = {
    "n": st.integers(1, 20),
    "classes": st.integers(2, 9),
    "smooth": st.booleans(),
    "rtol": st.sampled_from([0.1, 1e-2, 2.0**-12, 1e-6]),
    "temperature": st.sampled_from([0.2, 1.0, 3.0]),
    "seed": st.integers(0, 1000),
}


def assert_brackets_hold(
    model: nn.Module, x: Tensor, result: RadiusResult, rtol: float, temperature: float = 1.0
) -> None:
    """The prediction is kept at `lower` and changed at `upper`, and the bracket is narrow."""
    direction, _, y = reference.fgsm_direction(model, x, temperature)
    options = Options.checked(x)
    found = result.found
    upper = result.upper.where(found, 0)
    ends = (result.lower.clamp_max(1), upper)
    at_lower, at_upper = (model(reference.on_ray(x, direction, end, options)) for end in ends)
    # A batch of another size may round differently, which decides where two logits are equal.
    tied_lower, tied_upper = (
        z.topk(2).values.diff().abs().squeeze(1) < 1e-12 for z in (at_lower, at_upper)
    )
    assert ((at_lower.argmax(1) == y) | tied_lower).all()
    assert ((at_upper.argmax(1) != y) | tied_upper)[found].all()
    assert ((at_upper.argmax(1) == result.flipped_to) | tied_upper)[found].all()
    width = result.upper - result.lower.clamp_min(2.0**-24)
    assert (width <= rtol * result.upper)[found].all()
    assert ((result.radius >= result.lower) & (result.radius <= result.upper)).all()
    assert (result.radius[~found] == math.inf).all()
    assert (result.lower[~found] == 1).all()


@settings(deadline=None, max_examples=25)
@given(**SEARCHES)
def test_plain_bisection_is_the_reference(n, classes, smooth, rtol, temperature, seed):
    """In float64 the same probes are made, so even the number of rows agrees."""
    model = RowExact(classes=classes, seed=seed) if smooth else mlp(classes=classes, seed=seed)
    x = uniform(n, 12, seed=seed)
    options = {"rtol": rtol, "temperature": temperature, "full": True}
    result = robust_radius(model, x, search="bisect", **options)
    expected = reference.robust_radius(model, x, **options)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-12, atol=0, msg=name
        )
    moved = result.forward_rows > 0  # the reference also probes the rays on which nothing moves
    assert torch.equal(result.forward_rows[moved], expected.forward_rows[moved])


@settings(deadline=None, max_examples=25)
@given(probes=st.integers(1, 4), **SEARCHES)
def test_brackets_hold_the_flip(n, classes, smooth, rtol, temperature, probes, seed):
    model = RowExact(classes=classes, seed=seed) if smooth else mlp(classes=classes, seed=seed)
    x = uniform(n, 12, seed=seed)
    options = {"rtol": rtol, "temperature": temperature, "full": True}
    result = robust_radius(model, x, probes=probes, **options)
    assert_brackets_hold(model, x, result, rtol, temperature)
    assert (result.forward_rows <= result.worst_case_rows).all()


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 20),
    classes=st.integers(2, 9),
    h=st.sampled_from([1e-5, 1e-3, 0.1]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_rr_fast_is_the_reference(n, classes, h, temperature, seed):
    model, x = mlp(classes=classes, seed=seed), uniform(n, 12, seed=seed)
    options = {"method": "fast", "h": h, "temperature": temperature, "full": True}
    result = robust_radius(model, x, **options)
    expected = reference.robust_radius(model, x, **options)
    # A gap that hardly falls is the difference of nearly equal numbers.
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-7, atol=0, msg=name
        )


@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_with_float64(method):
    model, x = mlp(seed=3), uniform(200, 12, seed=3, dtype=torch.float32)
    options = {"method": method, "rtol": 2.0**-10, "h": 1e-2}
    result = robust_radius(copy.deepcopy(model).float(), x, **options)
    expected = reference.robust_radius(model, x.double(), **options)
    assert result.dtype == torch.float32
    finite = expected.isfinite()
    assert torch.equal(result.isfinite(), finite)
    error = (result[finite] / expected[finite] - 1).abs()
    assert (error > 1e-2).sum() <= 2  # a ray may cross the boundary more than once
    assert error.median() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_inputs(dtype, method):
    model, x = mlp(seed=4), uniform(64, 12, seed=4).to(dtype)
    options = {"method": method, "h": 0.05, "rtol": 0.15}  # bfloat16 has no finer steps
    result = robust_radius(copy.deepcopy(model).to(dtype), x, **options, full=True)
    assert result.radius.dtype == torch.float32
    expected = reference.robust_radius(model, x.double(), **options)
    both = result.found & expected.isfinite()
    assert both.float().mean() > 0.8
    assert (result.radius[both].double() / expected[both]).log().abs().median() < 0.2


def test_regrad_finds_the_same_radii_and_costs_48_forward_rows():
    model, x = mlp(seed=5), uniform(50, 12, seed=5)
    fixed = reference.robust_radius(model, x, rtol=2.0**-8, full=True)
    textbook = reference.robust_radius(model, x, regrad=True, full=True)
    assert (textbook.forward_rows == 48).all()
    assert torch.equal(textbook.found, fixed.found)
    found = fixed.found
    # Large radii take most of the 24 probes to reach, which leaves few to narrow the bracket.
    torch.testing.assert_close(textbook.radius[found], fixed.radius[found], rtol=1 / 16, atol=0)
    with pytest.raises(ValueError, match="regrad=True is a variant of method 'bs'"):
        reference.robust_radius(model, x, regrad=True, method="fast")
