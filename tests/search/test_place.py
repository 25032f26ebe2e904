"""A search whose state is on the host gives what the core gives, and batches of few sizes do."""

from __future__ import annotations

import pytest
import torch
from helpers import RowExact, assert_identical, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import RadiusEstimator, RadiusResult, robust_radius
from rat_ext._build_info import build_info
from rat_ext.search import place
from rat_ext.search.bracket_search import batch_sizes


@pytest.fixture
def host_only(monkeypatch):
    monkeypatch.setattr(place, "host_only", True)


def assert_same(a: RadiusResult, b: RadiusResult) -> None:
    """Equal but for the last bits of the slope, whose sum torch rounds otherwise than the core.

    These bits may decide which way a search takes: then it ends elsewhere in its tolerance.
    """
    for name in ("found", "resolved", "prediction", "flipped_to"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    same = (a.forward_rows == b.forward_rows) & (a.fallbacks == b.fallbacks)
    assert same.float().mean() > 0.7
    tolerance = 1e-5 if a.radius.dtype == torch.float32 else 1e-12
    for name in ("radius", "lower", "upper"):
        ours, theirs = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(ours[same], theirs[same], rtol=tolerance, atol=0, equal_nan=True)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0, equal_nan=True)


OPTIONS = [
    {},
    {"probes": 3},
    {"search": "bisect"},
    {"method": "fast"},
    {"target": "runner-up"},
    {"rtol": 2.0**-12},
    {"batch_size": 4},
    {"attack": "fgsm_l2"},
    {"attack": "pgd"},
    {"attack": "pgd_l2"},
    {"attack": lambda model, x, y: x + 0.1 * torch.sign(0.5 - x)},
    {"attack": ["fgsm", "pgd"]},
]


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_on_the_host_changes_nothing(options, seed, dtype):
    model, x = RowExact(seed=seed), uniform(11, 12, seed=seed, dtype=dtype)
    expected = robust_radius(model, x, full=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "host_only", True)
        result = robust_radius(model, x, full=True, **options)
    assert_same(result, expected)
    assert result.padded_rows == expected.padded_rows == 0


@pytest.mark.parametrize("method", ["bs", "fast"])
def test_an_estimator_keeps_its_state_on_the_host(method, host_only, monkeypatch):
    model, x = RowExact(), uniform(11, 12)
    estimator = RadiusEstimator(model, x[:4], method=method)
    assert estimator.mode == "eager"
    result = estimator(x)
    monkeypatch.setattr(place, "host_only", False)
    assert_same(result, robust_radius(model, x, method=method, full=True))


def test_promises_hold_on_the_host(host_only):
    x = uniform(6, 12)
    x[2, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 6 rows"):
        result = robust_radius(RowExact(), x, full=True)
    assert result.radius.isnan().tolist() == [i == 2 for i in range(6)]
    x[2, 3] = 2
    with pytest.raises(ValueError, match=r"outside bounds \(0, 1\), in 1 of 6 rows"):
        robust_radius(RowExact(), x)


def test_a_gpu_without_kernels_is_told_once(monkeypatch):
    place._cuda_problem.cache_clear()
    info = build_info()
    monkeypatch.setattr(place, "build_info", lambda: info)
    device = torch.device("cuda", 0)
    if info.cuda_usable:
        pytest.skip("the kernels can run here")
    with pytest.warns(RuntimeWarning, match="no kernels for this GPU"):
        assert place.state_device(device) == torch.device("cpu")
    assert place.state_device(device) == torch.device("cpu")  # a warning would be an error here
    assert place.state_device(torch.device("mps")) == torch.device("cpu")
    assert place.state_device(torch.device("cpu")) == torch.device("cpu")
    place._cuda_problem.cache_clear()


# --- Batches of few sizes -------------------------------------------------------------------------


def test_batch_sizes():
    assert batch_sizes(1) == [1]
    assert batch_sizes(12) == [1, 2, 3, 4, 6, 8, 12]
    assert batch_sizes(13) == [1, 2, 3, 4, 6, 8, 12, 13]


class Sizes(nn.Module):
    """Remembers the sizes of the batches that it gets."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.net, self.seen = RowExact(), []
        if compiled:
            self._orig_mod = None  # as torch.compile marks a module

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("options", [{}, {"probes": 2}, {"batch_size": 9}], ids=str)
def test_a_compiled_model_gets_batches_of_few_sizes(options):
    x = uniform(37, 12)
    plain, compiled = Sizes(False), Sizes(True)
    expected = robust_radius(plain, x, full=True, **options)
    result = robust_radius(compiled, x, full=True, **options)
    assert_identical(result, expected)
    probes = options.get("probes", 1)
    most = min(options.get("batch_size", 37), 37) // probes
    assert set(compiled.seen) <= {37, 9, 1, *(probes * size for size in batch_sizes(most))}
    in_vain = sum(compiled.seen) - sum(plain.seen)
    assert result.padded_rows == in_vain
    assert in_vain > 0 or options
    assert expected.padded_rows == 0
