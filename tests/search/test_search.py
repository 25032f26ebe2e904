"""The bracket rule on adversarial functions: the worst case, the brackets and the invariances."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from helpers import RowExact, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import RadiusResult, reference, robust_radius

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_thread")]

EPS_MIN = 2.0**-24


class OnRay(nn.Module):
    """Logits that are a given function of the position on the ray.

    A row is [0, flip]: the first element moves, and e is how far it has. At e = 0 the margin is 1
    and falls with slope `slope`; beyond, the margin is `shape(e / flip)`, whose sign decides.
    """

    def __init__(self, shape, slope: float = 1.0, classes: int = 2) -> None:
        super().__init__()
        self.shape, self.slope = shape, slope
        # Of the runner-up, and of classes that are never near.
        self.others = -torch.arange(classes - 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        e, flip = x[:, 0], x[:, 1].detach()
        beyond = self.shape(e.detach() / flip).to(x.dtype)
        # The value is that of `beyond`; the derivative is -slope.
        margin = beyond - self.slope * (e - e.detach())
        return torch.cat([margin[:, None], self.others.to(x.dtype).expand(len(x), -1)], 1)


def rows(flips: list[float]) -> Tensor:
    return torch.tensor([[0.0, flip] for flip in flips], dtype=torch.float64)


SHAPES = {
    "line": lambda u: 1 - u,
    "step": lambda u: torch.where(u < 1, 1.0, -1.0),
    "cliff": lambda u: torch.where(u < 1, 1.0, -1e6),
    "feather": lambda u: torch.where(u < 1, 1.0, -1e-6),
    "plateau": lambda u: torch.where(u < 0.01, 1 - 99 * u, torch.where(u < 1, 0.01, -1e-6)),
    "kink": lambda u: torch.where(u < 0.5, 1 - u / 50, 0.99 - 1.98 * (u - 0.5)),
    "steep, then flat": lambda u: 1e-3 * (1 - u) / (1e-3 + u),
    "flat, then steep": lambda u: 1 - u**40,
    "humps": lambda u: torch.where(u < 1, 1.0, -1.0) * (0.51 + 0.5 * torch.cos(40 * u)),
    "back and forth": lambda u: torch.where(u < 1, 1.0, torch.cos(3 * math.pi * u).sign()),
}
# Shapes that cross once.
MONOTONE = [name for name in SHAPES if name != "back and forth"]


def assert_bracketed(model: nn.Module, x: Tensor, result: RadiusResult, rtol: float) -> None:
    y = model(x).argmax(1)
    found = result.found

    def prediction(eps: Tensor) -> Tensor:
        return model(torch.stack([eps, x[:, 1]], 1)).argmax(1)

    assert torch.equal(prediction(result.lower), y)
    assert (prediction(result.upper.where(found, 0)) != y)[found].all()
    width = result.upper - result.lower.clamp_min(EPS_MIN)
    assert (width <= rtol * result.upper)[found].all()
    assert (result.lower[~found] == 1).all()


@settings(deadline=None, max_examples=150)
@given(
    shape=st.sampled_from(list(SHAPES)),
    flips=st.lists(st.floats(-24, -0.1).map(lambda power: 2.0**power), min_size=1, max_size=8),
    slope=st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e20]),
    classes=st.sampled_from([2, 3, 10, 1000]),
    rtol=st.sampled_from([0.3, 1e-2, 2.0**-12, 1e-9]),
    temperature=st.sampled_from([0.05, 1.0, 20.0]),
    probes=st.integers(1, 8),
)
def test_worst_case_and_brackets(shape, flips, slope, classes, rtol, temperature, probes):
    model, x = OnRay(SHAPES[shape], slope, classes), rows(flips)
    options = {"rtol": rtol, "temperature": temperature, "probes": probes}
    result = robust_radius(model, x, full=True, **options)
    assert result.forward_rows.max() <= result.worst_case_rows
    assert_bracketed(model, x, result, rtol)
    if shape in MONOTONE:
        assert result.found.all()
        flip = x[:, 1]  # but for the rounding of e / flip
        assert (result.lower <= flip * (1 + 1e-12)).all()
        assert (result.upper >= flip * (1 - 1e-12)).all()


@pytest.mark.parametrize(
    ("shape", "slope", "most"),
    [
        (lambda u: 1 - u, 1, 3),
        (lambda u: (1 - u) / (1 + 9 * u), 10, 4),  # straight, but for the common factor
        (lambda u: 1 - u / 2 - u**4 / 2, 0.5, 6),
        (lambda u: torch.exp(-2 * u) - math.exp(-2), 2, 6),
        (lambda u: torch.exp(-5 * u) - math.exp(-5), 5, 10),
        (lambda u: torch.where(u < 1, 1 - u, 30 * (1 - u)), 1, 10),
        # Of these one end of the bracket creeps, and would until the budget is spent: 22 rows.
        (lambda u: (1 - u) * (1 - u).abs().sqrt(), 1.5, 12),
        (lambda u: math.tanh(3) - torch.tanh(3 * u), 3, 14),
    ],
)
@pytest.mark.parametrize("flip", [0.3, 0.05, 0.005])
def test_few_rows_where_the_slope_is_that_of_the_ray(shape, slope, most, flip):
    model, x = OnRay(lambda u: flip * shape(u), slope), rows([flip])
    result = robust_radius(model, x, rtol=2.0**-12, full=True)
    assert_bracketed(model, x, result, 2.0**-12)
    assert result.forward_rows.max() <= most


@pytest.mark.parametrize("probes", [1, 2, 8])
@pytest.mark.parametrize("slope", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("value", ["constant", "rising"])
def test_no_flip_is_settled_within_the_worst_case(value, slope, probes):
    shape = torch.ones_like if value == "constant" else lambda u: 1 + u
    result = robust_radius(OnRay(shape, slope), rows([0.5, 1.0]), probes=probes, full=True)
    assert not result.found.any()
    assert (result.radius == math.inf).all()
    assert (result.lower == 1).all()
    assert result.forward_rows.max() <= result.worst_case_rows


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("scale", [1e-8, 1e-4])
def test_the_end_of_the_ray_is_reached_where_every_estimate_is_near(scale, probes):
    """The margin falls steeply and never to 0: it always seems to do so just ahead."""
    model = OnRay(lambda u: (1 + u) ** -30, slope=30 / scale)
    options = {"probes": probes, "eps_max": 0.5, "full": True}
    result = robust_radius(model, rows([scale]), **options)
    assert not result.found.any()
    assert result.resolved.all()
    assert (result.lower == 0.5).all()
    assert result.forward_rows.max() <= 13 * probes


@pytest.mark.parametrize("bend", [0.1, 0.01, 1e-4])
def test_gaps_that_rise_are_passed_as_fast_as_constant_ones(bend):
    """Straightened, they are lines that fall, but reach 0 beyond a pole only."""
    constant, rising = (
        robust_radius(OnRay(shape, slope=1e3), rows([1e-3]), full=True)
        for shape in (torch.ones_like, lambda u: 1 + (bend * u) ** 2)
    )
    assert not rising.found.any()
    assert rising.forward_rows == constant.forward_rows


@pytest.mark.parametrize("shape", ["step", "feather"])
@pytest.mark.parametrize("flip", [1e-36, 1e-30, 1.0])
@pytest.mark.parametrize("first", [100, 1e36])
def test_a_bracket_whose_ends_have_no_float32_ratio(first, flip, shape):
    """It reaches from the first probe down to the least step, and is closed within its budget."""
    model, x = OnRay(SHAPES[shape], slope=1 / first), rows([flip]).float()
    result = robust_radius(model, x, bounds=None, eps_max=math.inf, full=True)
    assert result.resolved.all()
    assert result.lower < x[0, 1] <= result.upper
    octaves = math.log2(1.15 * first) - math.log2(torch.finfo(torch.float32).tiny)
    halvings = math.log2(octaves / -math.log2(1 - 1e-2))
    assert result.forward_rows <= 1 + math.ceil(halvings) + 4


def test_an_adversary_that_answers_at_the_last_moment():
    """The flip is wherever the search has not looked yet: below each probe but the last ones."""

    class Adversary(nn.Module):
        def __init__(self, answers: list[bool]) -> None:
            super().__init__()
            self.answers, self.asked, self.low, self.high = answers, 0, 0.0, math.inf

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                return torch.stack([1 - x[:, 0], 0 * x[:, 0]], 1)
            e = float(x[0, 0])
            if self.low < e < self.high:
                flip = self.answers[self.asked % len(self.answers)]
                self.asked += 1
            else:
                flip = e >= self.high
            if flip:
                self.high = min(self.high, e)
            else:
                self.low = max(self.low, e)
            value = -1e-9 if flip else 1.0
            return torch.tensor([[value, 0.0]], dtype=x.dtype)

    x = rows([1.0])
    longest = 0
    for pattern in range(1, 2**8):
        answers = [bool(pattern >> bit & 1) for bit in range(8)]
        with warnings.catch_warnings():  # where it flips all the way down to x
            warnings.filterwarnings("ignore", ".*wider than rtol asks for")
            result = robust_radius(Adversary(answers), x, rtol=2.0**-12, full=True)
        assert result.resolved or result.upper < 1e-20
        longest = max(longest, int(result.forward_rows))
        assert longest <= result.worst_case_rows
    assert longest > 8  # the adversary does bite


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    batch_size=st.integers(1, 9),
    probes=st.integers(1, 4),
    rtol=st.sampled_from([1e-2, 2.0**-12]),
)
def test_order_and_batch_size_change_nothing(seed, batch_size, probes, rtol):
    model, x = RowExact(seed=seed), uniform(9, 12, seed=seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    options = {"probes": probes, "rtol": rtol, "full": True}
    one = robust_radius(model, x, **options)[order]
    other = robust_radius(model, x[order], batch_size=max(batch_size, probes), **options)
    for name in ("lower", "upper", "found", "flipped_to", "forward_rows", "fallbacks"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_logits_and_temperature_scale_together(seed, power):
    """By a power of two, which rounds nothing, not even a bit changes."""
    model, x = RowExact(seed=seed), uniform(6, 12, seed=seed)
    scale = 2.0**power
    one = robust_radius(model, x, full=True)
    other = robust_radius(lambda v: scale * model(v), x, temperature=scale, full=True)
    for name in ("lower", "upper", "forward_rows", "flipped_to"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from(list(SHAPES)),
    flip=st.floats(-18, -0.1).map(lambda power: 2.0**power),
    rtol=st.sampled_from([1e-2, 2.0**-12]),
)
def test_plain_bisection_is_the_reference_to_the_bit(shape, flip, rtol):
    model, x = OnRay(SHAPES[shape]), rows([flip])
    ours = robust_radius(model, x, search="bisect", rtol=rtol, full=True)
    theirs = reference.robust_radius(model, x, rtol=rtol, full=True)
    for name in ("lower", "upper", "flipped_to", "forward_rows"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.forward_rows.max() <= ours.worst_case_rows


@pytest.mark.parametrize("flip", [EPS_MIN / 2, EPS_MIN, 2 * EPS_MIN, 0.999999, 1.0])
def test_flips_at_the_ends_of_the_ray(flip):
    model, x = OnRay(SHAPES["step"]), rows([flip])
    result = robust_radius(model, x, full=True)
    assert result.found.all()
    assert result.upper >= flip
    assert result.lower < max(flip, EPS_MIN)
    assert result.forward_rows.max() <= result.worst_case_rows


@pytest.mark.parametrize("rtol", [1e-2, 2.0**-12])
@pytest.mark.parametrize(("c", "most"), [(0.05, 3), (0.3, 4)])
def test_hyperbolas_cost_few_rows(c, most, rtol):
    """What the rule models exactly: margins (1 - u) / (1 + c u)."""
    model = OnRay(lambda u: (1 - u) / (1 + c * u))
    for flip in (1e-4, 1e-2, 0.3):
        model.slope = (1 + c) / flip
        for temperature in (0.1, 1.0, 10.0):
            options = {"rtol": rtol, "temperature": temperature}
            result = robust_radius(model, rows([flip]), full=True, **options)
            assert result.forward_rows <= most
            assert result.fallbacks == 0
