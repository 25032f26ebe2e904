"""Inputs without bounds, with bounds of each feature, and of every size; options at their ends."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import RowExact, mlp, uniform
from torch import Tensor, nn

from rat_ext import RadiusEstimator, reference, robust_radius
from rat_ext.search.options import MAX_PROBES

FEATURES = 20
X = torch.randn(60, FEATURES, generator=torch.Generator().manual_seed(0))
WIDE_BOUNDS = [(-1e5, 1e5), (-1e6, 1e6), (-1e7, 1e7), (-3e38, 3e38), (-math.inf, 1e4), None]


def tabular(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A net of standardised features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 5))
    return net.to(dtype)


def exact(attack: str = "fgsm", **options) -> Tensor:
    """Radii in float64 at a tolerance that no float32 search has."""
    model = tabular(torch.float64)
    found = reference.robust_radius(
        model, X.double(), bounds=(-50, 50), rtol=2.0**-20, attack=attack, **options
    )
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("attack", ["fgsm", "fgsm_l2", "pgd", "pgd_l2"])
@pytest.mark.parametrize("bounds", WIDE_BOUNDS)
def test_wide_bounds_change_no_radius(bounds, attack):
    narrow = robust_radius(tabular(), X, bounds=(-50, 50), attack=attack, full=True)
    result = robust_radius(tabular(), X, bounds=bounds, attack=attack, full=True)
    assert result.found.all()
    assert result.resolved.all()
    assert (result.upper - result.lower <= 1e-2 * result.upper).all()
    torch.testing.assert_close(result.radius, narrow.radius, rtol=1e-2, atol=0)
    if attack.startswith("fgsm"):
        torch.testing.assert_close(result.radius.double(), exact(attack), rtol=6e-3, atol=0)


@pytest.mark.parametrize("bounds", WIDE_BOUNDS)
@pytest.mark.parametrize("attack", ["fgsm", "fgsm_l2"])
def test_wide_bounds_in_float64_and_in_the_reference(bounds, attack):
    options = {"bounds": bounds, "attack": attack, "rtol": 2.0**-20, "eps_max": 1e3}
    for measure in (robust_radius, reference.robust_radius):
        radius = measure(tabular(torch.float64), X.double(), **options)
        torch.testing.assert_close(radius, exact(attack), rtol=2.0**-19, atol=0)


FEATURE_BOUNDS = (
    torch.tensor([0.0, 0, 0, 0.5, *[0] * 8]),
    torch.tensor([1.0, 1, 1, 0.5, 0.6, *[1] * 7]),  # one feature is held
)


@pytest.mark.parametrize("attack", ["fgsm", "fgsm_l2", "pgd", "pgd_l2"])
def test_bounds_of_each_feature(attack):
    model, x = RowExact(), uniform(40, 12).clamp(*FEATURE_BOUNDS)
    options = {"bounds": FEATURE_BOUNDS, "attack": attack, "rtol": 1e-4, "full": True}
    result = robust_radius(model, x, **options)
    expected = reference.robust_radius(model, x, **options)
    assert torch.equal(result.found, expected.found)
    close = 1e-3 if attack.startswith("fgsm") else 1e-2  # PGD is not quite monotone
    torch.testing.assert_close(result.radius, expected.radius, rtol=close, atol=0)
    one_range = robust_radius(model, x, **{**options, "bounds": (0, 1)})
    assert not torch.allclose(result.radius, one_range.radius)
    same = robust_radius(model, x, **{**options, "bounds": (torch.zeros(12), 1.0)})
    assert torch.equal(same.radius, one_range.radius)


@pytest.mark.parametrize("method", ["bs", "fast"])
def test_an_estimator_takes_bounds_of_each_feature(method):
    model, x = RowExact(), uniform(40, 12).clamp(*FEATURE_BOUNDS)
    options = {"bounds": FEATURE_BOUNDS, "method": method}
    estimator = RadiusEstimator(model, x[:16], **options)
    assert torch.equal(estimator(x).radius, robust_radius(model, x, **options))
    expected = reference.robust_radius(model, x, **options)
    torch.testing.assert_close(estimator(x).radius, expected, rtol=2e-2, atol=0)


def test_a_feature_without_a_bound():
    model, x = RowExact(), uniform(30, 12)
    low = torch.zeros(12)
    low[0] = -math.inf
    x[:, 0] -= 3
    result = robust_radius(model, x, bounds=(low, None), full=True)
    expected = reference.robust_radius(model, x, bounds=(low, None), full=True)
    assert torch.equal(result.found, expected.found)
    torch.testing.assert_close(result.radius, expected.radius, rtol=2e-2, atol=0)
    x[7, 5] = -1
    with pytest.raises(ValueError, match=r"outside bounds of its features, in 1 of 30 rows"):
        robust_radius(model, x, bounds=(low, None))


@pytest.mark.parametrize(
    "bounds",
    [(0, math.nan), (1, 0), (0, 0), (0,), 3, "ab", (torch.zeros(5), 1), (torch.ones(12), 0.5)],
)
def test_bounds_that_are_none(bounds):
    with pytest.raises(ValueError, match="bounds"):
        robust_radius(mlp(), uniform(4, 12), bounds=bounds)


def test_libraries_need_bounds():
    pytest.importorskip("foolbox")
    with pytest.raises(ValueError, match="'deepfool' needs finite bounds"):
        robust_radius(mlp(), uniform(4, 12), bounds=None, attack="deepfool")


# --- Rounding at the bounds -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rounding_at_a_bound_is_no_violation(dtype):
    low, high = -2.1179, 2.64
    x = (torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) * 6 - 3).to(dtype)
    x = x.clamp(low, high)  # rounded outward in half precision
    x[0, 0] = torch.nextafter(torch.tensor(high), torch.tensor(9.0)).to(dtype)
    net = mlp().to(dtype)
    options = {"bounds": (low, high), "rtol": 0.15, "full": True}
    for measure in (robust_radius, reference.robust_radius):
        assert not measure(net, x, **options).radius.isnan().any()
    assert not RadiusEstimator(net, x, bounds=(low, high), rtol=0.15)(x).radius.isnan().any()


def test_interpolated_images_are_in_bounds():
    image = torch.rand(1, 1, 4, 3, generator=torch.Generator().manual_seed(1))
    image[..., :2] = 1
    x = nn.functional.interpolate(image, scale_factor=3.7, mode="bicubic", align_corners=True)
    x = torch.where(x > 0.999, 1 + 1.2e-7, x.clamp(0, 1)).flatten(1)[:, :12]
    assert x.max() > 1
    assert robust_radius(mlp().float(), x).isfinite().all()


def test_a_violation_is_told_with_enough_digits():
    x = uniform(4, 12)
    x[2, 5] = 1.00001
    with pytest.raises(ValueError, match=r"to 1\.00001, outside bounds \(0, 1\), in 1 of 4 rows"):
        robust_radius(mlp(), x)


# --- Options at their ends ------------------------------------------------------------------------


@pytest.mark.parametrize("eps_max", [1e302, 1.7e308, 1e39, math.inf])
@pytest.mark.parametrize("search", ["interpolate", "bisect"])
def test_a_limit_beyond_the_dtype_is_none(eps_max, search):
    options = {"bounds": None, "eps_max": eps_max, "search": search, "full": True}
    result = robust_radius(tabular(), X, **options)
    assert result.found.all()
    assert result.lower.isfinite().all()
    assert 0 < result.worst_case_rows < 500
    torch.testing.assert_close(result.radius.double(), exact(), rtol=6e-3, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"probes": MAX_PROBES}, {"batch_size": 1}, {"rtol": 64 * torch.finfo(torch.float32).eps}],
)
def test_the_last_values_that_are_allowed(options):
    result = robust_radius(tabular(), X, bounds=None, full=True, **options)
    assert result.resolved.all()
    torch.testing.assert_close(result.radius.double(), exact(), rtol=6e-3, atol=0)


@pytest.mark.parametrize("eps_max", [1e-9, 1e-30, 1e-44])
def test_nothing_is_found_beyond_a_tiny_limit(eps_max):
    result = robust_radius(tabular(), X, bounds=None, eps_max=eps_max, full=True)
    assert not result.found.any()
    assert result.radius.isinf().all()
    assert result.resolved.all()
    assert result.worst_case_rows >= 1
    assert (result.forward_rows <= result.worst_case_rows).all()


class Flickering(nn.Module):
    """Predicts at random: no bracket of it means anything, and no estimate comes true."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(len(x), 3, generator=self.generator, dtype=x.dtype)
        return noise + 1e-3 * x[:, :3]


@pytest.mark.parametrize("bounds", [(0, 1), (-3e38, 3e38), None])
def test_every_search_ends(bounds):
    result = robust_radius(Flickering(), X.abs().clamp_max(1), bounds=bounds, full=True)
    assert (result.forward_rows <= result.worst_case_rows).all()


def test_a_row_that_is_given_up_says_so():
    """A flip at the least step that moves the input: no bracket around it can be narrow."""

    class Edge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            far = (x[:, 0] != 0).to(x.dtype)
            return torch.stack([0 * x[:, 0], 2 * far - 1 + 1e-3 * (x.sum(1) - 6)], 1)

    x = torch.full((3, 12), 0.5)
    x[:, 0] = 0  # moves by far less than anything else
    with pytest.warns(RuntimeWarning, match="3 of 3 rows have a bracket that is wider than rtol"):
        result = robust_radius(Edge(), x, full=True)
    assert result.found.all()
    assert not result.resolved.any()
    assert (result.upper < 1e-7).all()
    with pytest.warns(RuntimeWarning, match="wider than rtol"):
        assert not reference.robust_radius(Edge(), x, full=True).resolved.any()


# --- Half precision, and logits of other kinds ----------------------------------------------------


def test_bfloat16_inputs_say_that_they_have_no_such_steps():
    model, x = mlp().bfloat16(), uniform(20, 12, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="of 20 rows have a bracket that is wider than rtol"):
        result = robust_radius(model, x, full=True)
    assert result.found.sum() > 5
    assert (result.upper - result.lower)[result.found].max() > 1e-2
    assert torch.equal(
        result.resolved, (result.upper - result.lower <= 1e-2 * result.upper) | ~result.found
    )
    coarse = robust_radius(model, x, rtol=0.15, full=True)
    assert coarse.resolved.all()


def test_logits_that_differ_in_float64_alone_are_no_tie():
    class Close(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x.double().sum(1)
            return torch.stack([1000 - 1e-9 * z, 1000 + 1e-7 - 1e-7 * z], 1)

    x = uniform(30, 12, dtype=torch.float32)
    result = robust_radius(Close(), x, full=True)
    expected = reference.robust_radius(Close(), x.double(), full=True)
    assert torch.equal(result.prediction, Close()(x).argmax(1))
    assert torch.equal(result.found, expected.found)
    assert result.found.any()
    torch.testing.assert_close(result.radius.double(), expected.radius, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("attack", ["fgsm", "fgsm_l2", "pgd"])
def test_lazily_negated_tensors_are_read_with_their_sign(attack):
    class Negated(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            logits = torch.complex(x.new_zeros(()), -self.net(x)).conj().imag
            assert logits.is_neg()
            return logits

    model, x = RowExact(), uniform(10, 12)
    expected = robust_radius(model, x, attack=attack, full=True)
    result = robust_radius(Negated(model), x, attack=attack, full=True)
    assert torch.equal(result.prediction, expected.prediction)
    assert torch.equal(result.radius, expected.radius)
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    assert torch.equal(robust_radius(model, lazy, attack=attack), expected.radius)


def test_sparse_logits_are_read():
    model, x = RowExact(), uniform(6, 12)
    result = robust_radius(lambda x: model(x).to_sparse(), x)
    assert torch.equal(result, robust_radius(model, x))
