"""robust_radius on a GPU. Needs neither hypothesis nor any data."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from gpu_helpers import NEEDS_GPU, Waves, assert_same_search, sync_debug_mode
from helpers import RowExact, uniform
from torch import Tensor

from rat_ext import RadiusEstimator, reference, robust_radius
from rat_ext._common.user_model import full_float32

pytestmark = NEEDS_GPU


def test_short_search():
    """Small enough for compute-sanitizer; runs every kernel."""
    model, x = RowExact().cuda(), uniform(9, 12).cuda()
    x[4, 1] = math.nan
    for options in ({}, {"probes": 2}, {"method": "fast"}):
        with pytest.warns(RuntimeWarning, match="1 of 9 rows"):
            radii = robust_radius(model, x, **options)
        assert radii.isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("options", [{}, {"probes": 4}, {"search": "bisect"}, {"method": "fast"}])
@pytest.mark.parametrize("classes", [2, 10, 1000, 50_000])
def test_classes(classes, options):
    model, x = Waves(12, classes), uniform(16, 12)
    options = {"rtol": 1e-6, "full": True, **options}
    result = robust_radius(copy.deepcopy(model).cuda(), x.cuda(), **options)
    assert_same_search(result, robust_radius(model, x, **options), rtol=1e-6)
    assert result.radius.is_cuda


def test_agrees_with_the_reference_in_float64():
    model, x = Waves(12, 10), uniform(200, 12)
    expected = reference.robust_radius(model, x, rtol=1e-4)
    found = {True: 0, False: 0}
    on_gpu = copy.deepcopy(model).cuda()
    for result in (
        robust_radius(on_gpu, x.cuda(), rtol=1e-4),
        RadiusEstimator(on_gpu, x[:64].cuda(), rtol=1e-4)(x.cuda()).radius,
    ):
        close = torch.isclose(result.cpu(), expected, rtol=2e-4, atol=0)
        found[True] += int(close.sum())
        found[False] += int((~close).sum())
    # A ray may cross the boundary more than once; then two searches may differ and both be right.
    assert found[False] <= 0.1 * found[True], found


@pytest.mark.parametrize("shape", [(7, 3, 8, 8), (7, 3, 5, 7), (7, 1, 1, 3), (7, 33)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype, layout, shape):
    x = uniform(*shape).to(dtype)
    if layout == "channels_last" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    elif layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    exact = RowExact(features=math.prod(shape[1:]))

    def model(x: Tensor) -> Tensor:  # in float64, so that the devices agree on every logit
        return on_device(x.double())

    on_device = exact
    rtol = 0.15 if dtype.itemsize == 2 else 1e-2  # bfloat16 has no finer steps
    expected = robust_radius(model, x, full=True, rtol=rtol)
    on_device = copy.deepcopy(exact).cuda()
    x = x.cuda()
    for result in (
        robust_radius(model, x, full=True, rtol=rtol),
        RadiusEstimator(model, x, rtol=rtol)(x),
    ):
        assert_same_search(result, expected, rtol=2 * rtol)


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 33, 257, 1025, 4096])
@pytest.mark.parametrize("batch_size", [None, 100])
def test_batches(rows, batch_size):
    model, x = Waves(12, 10), uniform(rows, 12, seed=rows)
    result = robust_radius(copy.deepcopy(model).cuda(), x.cuda(), full=True, batch_size=batch_size)
    assert_same_search(result, robust_radius(model, x, full=True))


def test_empty_and_bad_inputs():
    model, x = RowExact().cuda(), uniform(6, 12).cuda()
    assert robust_radius(model, x[:0]).shape == (0,)
    assert len(RadiusEstimator(model, x)(x[:0])) == 0
    with pytest.raises(ValueError, match="outside bounds"):
        robust_radius(model, x + 1)
    with pytest.raises(ValueError, match="move one of them"):
        robust_radius(model, x.cpu())
    with pytest.raises(ValueError, match="on cpu"):
        RadiusEstimator(model, x)(x.cpu())


def test_host_synchronisations_of_an_eager_search():
    model, x = RowExact().cuda(), uniform(32, 12).cuda()
    with sync_debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        robust_radius(model, x)
    syncs = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(syncs) == 2, [str(w.message) for w in caught]  # bounds and nan; none in a round


def estimated(model, x: Tensor, **options) -> Tensor:
    return RadiusEstimator(model, x, **options)(x).radius


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 for matrix products, which is off in the other tests (conftest.py)."""
    products = torch.backends.cuda.matmul
    new = hasattr(products, "fp32_precision")  # torch 2.9 and later
    name, value = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    before = getattr(products, name)
    setattr(products, name, value)
    yield
    setattr(products, name, before)


@pytest.mark.parametrize("measure", [robust_radius, estimated])
def test_radii_are_in_tf32_as_torch_is_set_unless_it_is_off(measure, tf32):
    model, x = Waves(512, 10).cuda(), uniform(64, 512, dtype=torch.float32).cuda()
    with full_float32():
        exact = measure(model, x)
    torch.testing.assert_close(measure(model, x, tf32=False), exact, rtol=1e-5, atol=0)
    coarse = measure(model, x)
    assert (coarse / exact).log().abs().median() < 0.1
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not torch.equal(coarse, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    model, x = RowExact().to("cuda:1"), uniform(20, 12).to("cuda:1")
    expected = robust_radius(RowExact(), x.cpu(), full=True)
    assert_same_search(robust_radius(model, x, full=True), expected)
    assert_same_search(RadiusEstimator(model, x)(x), expected)
    assert torch.cuda.current_device() == 0
