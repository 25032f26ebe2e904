"""The operations of the compiled core, one by one, against plain PyTorch.

The tests take the build that they are for as the fixture `core`.
"""

from __future__ import annotations

import math
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat_ext import _core
from rat_ext.reference import log_odds
from rat_ext.search.checked import WIDE
from rat_ext.search.options import MAX_PROBES
from rat_ext.search.tensors import ray_room

pytestmark = pytest.mark.core

COLUMN = {name: i for i, name in enumerate(_core.core.BRACKET_FIELDS)}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def new_state(
    core: ModuleType,
    n: int,
    classes: int,
    dtype: torch.dtype = torch.float64,
    probes: int = 1,
    **options: float,
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A state with its (brackets, gaps, probes) tensors."""
    brackets = torch.zeros(n, len(COLUMN), dtype=dtype)
    gaps = torch.zeros(n, core.KNOTS * classes, dtype=dtype)
    radii = torch.zeros(n, probes, dtype=dtype)
    defaults = {"rtol": 1e-2, "eps_max": 1.0, "temperature": 1.0, "bisect_from": 0.0}
    state = core.State(brackets, gaps, radii, **{**defaults, **options})
    return state, brackets, gaps, radii


def seeds(
    core: ModuleType, logits: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    state, brackets, *_ = new_state(core, *logits.shape, dtype=dtype, temperature=temperature)
    seed = torch.full_like(logits, math.nan)
    core.start(logits, seed, state, 0)
    return seed, brackets


# --- Logits ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 5),
    classes=st.integers(2, 70),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    temperature=st.sampled_from([0.2, 1.0, 5.0]),
    transposed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_seed_is_the_gradient_of_the_log_odds(
    core, n, classes, scale, temperature, transposed, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    if transposed:
        logits = logits.T.contiguous().T
    seed_, brackets = seeds(core, logits, temperature, torch.float64)

    leaf = logits.clone().requires_grad_()
    y = logits.argmax(1)
    (expected,) = torch.autograd.grad(-log_odds(leaf / temperature, y).sum(), leaf)
    torch.testing.assert_close(seed_, expected * temperature, rtol=1e-12, atol=1e-300)
    assert torch.equal(brackets[:, COLUMN["prediction"]].long(), y)
    top = logits.topk(2).values
    torch.testing.assert_close(
        brackets[:, COLUMN["margin"]], (top[:, 0] - top[:, 1]) / temperature, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_seed_keeps_its_precision_where_the_model_is_confident(core, dtype):
    logits = torch.tensor([[50.0, 1.0, 2.0, -3.0]], dtype=dtype)
    seed, _ = seeds(core, logits, 0.5, WIDE[dtype])
    others = (logits.double()[0, 1:] / 0.5).softmax(0)
    expected = torch.cat([torch.tensor([-1.0]), others])[None]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(seed.double(), expected.double(), rtol=4 * eps, atol=0)


def test_ties_go_to_the_smallest_class(core):
    _, brackets = seeds(core, torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]]), 1.0, torch.float32)
    assert brackets[:, COLUMN["prediction"]].tolist() == [1, 0]
    assert brackets[:, COLUMN["margin"]].tolist() == [0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_fail_their_row_only(core, value):
    logits = torch.randn(3, 4)
    logits[1, 2] = value
    _, brackets = seeds(core, logits, 1.0, torch.float32)
    status = brackets[:, COLUMN["status"]].tolist()
    assert status == [core.ACTIVE, core.NOT_FINITE, core.ACTIVE]


# --- Elements -------------------------------------------------------------------------------------


def layouts(x: Tensor) -> list[Tensor]:
    """x as contiguous and channels_last tensors, and as a slice of a larger batch."""
    wide = torch.cat([x, x], 1)
    return [
        x.contiguous(),
        x.contiguous(memory_format=torch.channels_last),
        wide[:, : x.shape[1]],
    ]


@pytest.mark.parametrize("layout", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_gathers_moves_and_clips(core, dtype, layout):
    x = layouts(uniform(6, 3, 5, 7, dtype=dtype))[layout]
    shape = (len(x), *x.shape[1:])
    direction = torch.randint(-1, 2, shape, dtype=torch.int8)
    direction = torch.empty_strided(shape, x.stride(), dtype=torch.int8).copy_(direction)
    probes = uniform(6, 2, seed=1, dtype=WIDE[dtype])
    index = torch.tensor([4, 0, 4, 5], dtype=torch.int32)
    elements = math.prod(shape[1:])
    out = torch.empty_strided((8, *shape[1:]), (elements, *x.stride()[1:]), dtype=dtype)
    core.perturb(x, direction, index, probes, 0.1, 0.9, out)

    rows = index.long().repeat_interleave(2)
    eps = probes[index.long()].flatten().view(-1, 1, 1, 1)
    expected = (x[rows].to(eps.dtype) + eps * direction[rows]).clamp(0.1, 0.9).to(dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_rounded_as_torch_does(core, dtype):
    """Every bit pattern, and every rounding between neighbours that a shift by a third makes."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    x = bits.view(dtype)[None]
    ones = torch.ones(x.shape, dtype=torch.int8)
    index = torch.zeros(1, dtype=torch.int32)
    for eps in (0.0, 1 / 3, 2.0**-16 / 3, 2.0**-24, 1000 / 3):
        probe = torch.tensor([[eps]], dtype=torch.float32)
        out = torch.empty_like(x)
        core.perturb(x, ones, index, probe, -math.inf, math.inf, out)
        expected = (x.float() + probe).to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert torch.equal(out[finite], expected[finite])


@pytest.mark.parametrize("dtype", DTYPES)
def test_aim_takes_signs_and_the_slope_of_what_can_move(core, dtype):
    x = uniform(4, 3, 50, dtype=dtype)
    gradient = torch.randn(4, 3, 50).to(dtype)
    gradient[0, 0, :9] = 0
    gradient[3] = 0
    direction = torch.empty(gradient.shape, dtype=torch.int8)
    state, brackets, *_ = new_state(core, 4, 3, dtype=WIDE[dtype])
    logits = torch.tensor([[1.0, 0.0, 0.5]] * 4, dtype=WIDE[dtype])
    core.start(logits, torch.empty_like(logits), state, 0)
    core.aim(gradient, x, direction, 0.0, 1.0, state, 0, ray_room(x))
    assert torch.equal(direction, gradient.sign().to(torch.int8))
    stuck = ((x == 0) & (gradient < 0)) | ((x == 1) & (gradient > 0))
    slope = gradient.double().abs().masked_fill(stuck, 0).flatten(1).sum(1)
    torch.testing.assert_close(
        brackets[:, COLUMN["slope"]].double(), slope, rtol=1e-5, atol=0, check_dtype=False
    )
    # A ray on which nothing moves is settled without a probe.
    assert brackets[3, COLUMN["status"]] == core.NOT_FOUND
    assert (brackets[:3, COLUMN["status"]] == core.ACTIVE).all()


@pytest.mark.parametrize("probes", [1, 2, 5])
def test_the_first_probes_are_around_the_linear_estimate_and_a_little_beyond(core, probes):
    state, _, _, radii = new_state(core, 1, 3, probes=probes)
    logits = torch.tensor([[1.0, 0.0, -50.0]], dtype=torch.float64)
    core.start(logits, torch.empty_like(logits), state, 0)
    gradient, x = torch.full((1, 4), 2.0).double(), torch.full((1, 4), 0.5).double()
    core.aim(gradient, x, torch.empty(1, 4, dtype=torch.int8), 0.0, 1.0, state, 0, ray_room(x))
    power = torch.arange(probes, dtype=torch.float64) - (probes - 1) / 2
    torch.testing.assert_close(radii[0], 1.15 * (1 / 8) * 1.25**power)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_least_step_is_that_of_the_row(core, dtype):
    """What moves no element, by the tensors' own arithmetic; bounds have no part in it."""
    x = torch.tensor([[0.7, 3.0, 300.0], [0.0, 40.0, 5.0], [2.0, 1.0, 7.0]], dtype=dtype)
    gradient = torch.tensor([[1.0, -2.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]], dtype=dtype)
    state, brackets, *_ = new_state(core, 3, 3, dtype=WIDE[dtype], eps_max=1e4)
    logits = torch.tensor([[1.0, 0.0, 0.5]] * 3, dtype=WIDE[dtype])
    core.start(logits, torch.empty_like(logits), state, 0)
    direction = torch.empty(3, 3, dtype=torch.int8)
    core.aim(gradient, x, direction, 2.0, math.inf, state, 0, ray_room(x))
    least = brackets[:, COLUMN["least_step"]]
    share = torch.finfo(dtype).eps / 4
    # In the last row the element at the bound of 2 cannot move down, and the next one is nearest.
    expected = torch.tensor([0.7, 40 * share, 1.0]).double() * share
    torch.testing.assert_close(least.double(), expected.double(), rtol=2e-2, atol=0)
    moved = x.to(WIDE[dtype]) + least[:, None] * gradient.sign().to(WIDE[dtype])
    assert torch.equal(moved[::2].to(dtype), x[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inspect_flags_each_row(core, dtype):
    x = uniform(6, 130, dtype=dtype)
    x[1, 129] = math.nan
    x[2, 0] = -math.inf
    x[3, 64] = 1.5
    x[4, 3] = -0.5
    x[5, 3], x[5, 4] = -0.5, math.nan  # not finite counts more
    flags = torch.full((6, 1), 7, dtype=torch.uint8)
    core.inspect(x, 0.0, 1.0, flags)
    infinite, outside = core.INPUT_NOT_FINITE, core.INPUT_OUTSIDE
    assert flags.flatten().tolist() == [0, infinite, infinite, outside, outside, infinite]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inspect_flags_each_tile_of_a_long_row(core, dtype):
    tile = core.TILE_ELEMENTS
    x = uniform(3, 2 * tile + 5, dtype=dtype)
    x[0, tile - 1], x[0, 2 * tile] = math.nan, 2
    x[1, tile], x[1, tile + 1], x[1, -1] = 2, math.inf, -1
    flags = torch.full((3, 3), 7, dtype=torch.uint8)
    core.inspect(x, 0.0, 1.0, flags)
    infinite, outside = core.INPUT_NOT_FINITE, core.INPUT_OUTSIDE
    assert flags.tolist() == [[infinite, 0, outside], [0, infinite, outside], [0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [8191, 8192, 8193, 3 * 8192 + 40])
def test_aim_sums_up_the_tiles_of_long_rows(core, dtype, elements):
    x, gradient = uniform(2, elements, dtype=dtype), torch.randn(2, elements).to(dtype)
    x[0, -1], x[1, 0] = 5, 3  # the largest of a row, in its last or first tile
    direction = torch.zeros(x.shape, dtype=torch.int8)
    state, brackets, *_ = new_state(core, 2, 3, dtype=WIDE[dtype])
    logits = torch.tensor([[1.0, 0.0, 0.5]] * 2, dtype=WIDE[dtype])
    core.start(logits, torch.empty_like(logits), state, 0)
    core.aim(gradient, x, direction, -9.0, 9.0, state, 0, ray_room(x))
    assert torch.equal(direction, gradient.sign().to(torch.int8))
    slope = gradient.double().abs().sum(1)
    torch.testing.assert_close(brackets[:, COLUMN["slope"]].double(), slope, rtol=1e-5, atol=0)
    share = torch.finfo(dtype).eps / 4
    least = x.double().abs().amin(1).maximum(x.double().amax(1) * share) * share
    torch.testing.assert_close(brackets[:, COLUMN["least_step"]].double(), least, rtol=1e-5, atol=0)


def test_compact_keeps_active_rows_in_order(core):
    state, brackets, *_ = new_state(core, 7, 2)
    brackets[:, COLUMN["status"]] = torch.tensor([0, 1, 0, 2, 3, 0, 0], dtype=torch.float64)
    index = torch.tensor([6, 5, 4, 2, 1], dtype=torch.int32)
    active, count = torch.full((7,), -1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    core.compact(index, state, active, count)
    assert count.item() == 3
    assert active.tolist() == [6, 5, 2, -1, -1, -1, -1]
    core.compact(index, state, index, count)  # in place
    assert index[:3].tolist() == [6, 5, 2]


# --- The worst case -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rtol", [0.3, 1e-2, 2.0**-12])
@pytest.mark.parametrize("eps_max", [2.0**-95, 1.0, 3e30])
@pytest.mark.parametrize("probes", [1, 3])
def test_the_worst_case_counts_every_round_of_the_rule(core, dtype, rtol, eps_max, probes):
    """Four rounds without a flip, then steps by 2, 4, 8, ... from the smallest normal number on.

    Then the bracket, at its widest the whole ray. It may take four rounds more than halving its
    logarithm does, which gets from `octaves` down to that of 1 / (1 - rtol).
    """
    octaves = math.log2(eps_max) - math.log2(torch.finfo(dtype).tiny)
    steps = next(n for n in range(100) if sum(range(n + 1)) >= octaves)
    halvings = math.log2(octaves / -math.log2(1 - rtol))
    state, *_ = new_state(core, 2, 3, dtype, probes, rtol=rtol, eps_max=eps_max)
    assert state.max_rows() == (4 + steps + 1 + math.ceil(halvings + 4)) * probes
    # Plain doubling reaches eps_max, and halving rtol times the smallest radius; three to round up.
    plain = {"rtol": rtol, "eps_max": eps_max, "bisect_from": 1e-6 * eps_max}
    state, *_ = new_state(core, 2, 3, dtype, probes, **plain)
    assert state.max_rows() == (3 + math.ceil(octaves - math.log2(rtol))) * probes


# --- Threads --------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_nothing(core):
    x = uniform(300, 3, 32, 32, dtype=torch.float32)
    direction = torch.randint(-1, 2, x.shape, dtype=torch.int8)
    probes = uniform(300, 1, dtype=torch.float32)
    index = torch.arange(300, dtype=torch.int32)
    results = []
    for threads in (1, 2, 7):
        out = torch.empty_like(x)
        core.perturb(x, direction, index, probes, 0.0, 1.0, out, threads=threads)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_gil_is_released(core):
    x = uniform(64, 1 << 18, dtype=torch.float32)
    out, direction = torch.empty_like(x), torch.ones(x.shape, dtype=torch.int8)
    probes, index = torch.ones(64, 1), torch.arange(64, dtype=torch.int32)
    state = {"running": False, "done": False}

    def work() -> None:
        state["running"] = True
        core.perturb(x, direction, index, probes, 0.0, 1.0, out)
        state["done"] = True

    thread = threading.Thread(target=work)
    steps = 0
    thread.start()
    while not state["done"]:
        steps += state["running"]
    thread.join()
    assert steps > 100


# --- What the bindings check ----------------------------------------------------------------------


def test_the_bindings_check_what_they_are_given(core):
    x = uniform(2, 3, 4, 4, dtype=torch.float32)
    direction = torch.ones(x.shape, dtype=torch.int8)
    probes, index = torch.ones(2, 1), torch.arange(2, dtype=torch.int32)

    def perturb(**changed: Tensor) -> None:
        tensors = {"x": x, "direction": direction, "index": index, "probes": probes}
        tensors = {**tensors, "out": torch.empty_like(x), **changed}
        core.perturb(**tensors, low=0.0, high=1.0)

    perturb()
    with pytest.raises(ValueError, match="direction must be int8"):
        perturb(direction=direction.float())
    with pytest.raises(ValueError, match="direction must have the memory layout of x"):
        perturb(direction=direction.contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="x must have dense rows"):
        perturb(x=x[..., ::2], direction=direction[..., ::2], out=torch.empty_like(x)[..., ::2])
    with pytest.raises(ValueError, match="index must be a contiguous int32 vector"):
        perturb(index=index.long().int()[:, None])
    with pytest.raises(ValueError, match="out must have the dtype of x and one row per probe"):
        perturb(out=torch.empty(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"dtype .*complex64, which the core"):
        perturb(x=x.to(torch.complex64))
    with pytest.raises(ValueError, match="gaps must have the dtype of brackets"):
        core.State(
            torch.zeros(2, len(COLUMN)),
            torch.zeros(2, core.KNOTS * 3).double(),
            probes,
            rtol=1e-2,
            eps_max=1.0,
            temperature=1.0,
            bisect_from=0.0,
        )


def test_constants_agree(core):
    assert core.MAX_PROBES == MAX_PROBES
