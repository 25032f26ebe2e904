"""RadiusEstimator on a GPU, captured and not. Needs neither hypothesis nor any data."""

from __future__ import annotations

import math
import threading
import warnings

import pytest
import torch
from gpu_helpers import MODES, NEEDS_GPU, Waves, assert_same_search, estimator_in, sync_debug_mode
from helpers import RowExact, cnn, uniform
from torch import Tensor, nn

from rat_ext import RadiusEstimator, RadiusResult, robust_radius

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("options", [{}, {"probes": 3}, {"search": "bisect"}, {"method": "fast"}])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, options):
    model, x = RowExact().cuda(), uniform(300, 12).cuda()
    estimator = estimator_in(mode, model, x[:48], **options)
    expected = robust_radius(model, x, full=True, **options)
    for rows in (300, 1, 2, 3, 47, 48, 49, 300):
        assert_same_search(estimator(x[:rows]), expected[slice(rows)])


def test_the_model_and_the_rng_are_left_as_they_were():
    model, x = cnn().cuda(), uniform(6, 3, 8, 8, dtype=torch.float32).cuda()
    state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    estimator = RadiusEstimator(model, x[:4])
    assert_same_search(estimator(x), robust_radius(model, x, full=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cuda.get_rng_state(), gpu_state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_finite(mode):
    model, x = RowExact().cuda(), uniform(20, 12).cuda()
    estimator = estimator_in(mode, model, x)
    expected = robust_radius(model, x, full=True)
    x[3, 2], x[19, 0] = math.nan, math.inf
    with pytest.warns(RuntimeWarning, match="2 of 20 rows"):
        result = estimator(x)
    rest = torch.tensor([i for i in range(20) if i not in (3, 19)], device="cuda")
    assert result.radius[[3, 19]].isnan().all()
    assert_same_search(result[rest], expected[rest])
    assert_same_search(estimator(x[:3]), expected[:3])


@pytest.mark.parametrize("mode", MODES[:2])
def test_no_host_synchronisation_in_a_captured_search(mode):
    """But for the event that the replay loop waits for, which torch does not count."""
    model, x = RowExact().cuda(), uniform(32, 12).cuda()
    estimator = estimator_in(mode, model, x, check_input=False)
    expected = robust_radius(model, x, full=True)
    with sync_debug_mode("error"):
        results = [estimator(x), estimator(x[:5])]
    assert_same_search(results[0], expected)
    assert_same_search(results[1], expected[:5])


def test_a_model_with_data_dependent_control_flow_falls_back():
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return exact(x) if x.sum() > 0 else -exact(x)

    exact, x = RowExact().cuda(), uniform(20, 12).cuda()
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="cannot be captured") as caught:
        estimator = RadiusEstimator(Branching(), x)
    assert len(caught) == 1
    assert torch.cuda.current_stream() == stream
    assert estimator.mode == "eager"
    expected = robust_radius(exact, x, full=True)
    assert_same_search(estimator(x), expected)
    torch.rand(3, device="cuda")
    after = RadiusEstimator(exact, x)  # the capture that failed broke nothing
    assert after.mode != "eager"
    assert_same_search(after(x), expected)


def test_a_model_that_draws_random_numbers_is_not_captured():
    exact, x = RowExact().cuda(), uniform(20, 12).cuda()
    with pytest.warns(RuntimeWarning, match="random numbers"):
        estimator = RadiusEstimator(lambda x: exact(x) + 0 * torch.rand_like(x[:, :4]), x)
    assert_same_search(estimator(x), robust_radius(exact, x, full=True))


@pytest.mark.parametrize("mode", MODES[:2])
def test_sees_parameters_that_changed_in_place(mode):
    model, x = RowExact().cuda(), uniform(20, 12).cuda()
    estimator = estimator_in(mode, model, x)
    model.load_state_dict(RowExact(seed=1).state_dict())
    assert_same_search(estimator(x), robust_radius(RowExact(seed=1).cuda(), x, full=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_channels_last(dtype):
    model = cnn().cuda().to(memory_format=torch.channels_last)
    x = uniform(40, 3, 8, 8, dtype=torch.float32).cuda().to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype):
        estimator = RadiusEstimator(model, x[:16])
        expected = robust_radius(model, x, full=True)
    assert estimator.mode != "eager"
    result = estimator(x)
    assert (result.prediction == expected.prediction).float().mean() > 0.9
    same = result.found & expected.found
    ratio = (result.radius / expected.radius)[same].log().abs()
    assert ratio.median() < 0.05  # half-precision logits are coarse


def test_compiled_models():
    model, x = Waves(12, 10).float().cuda(), uniform(20, 12, dtype=torch.float32).cuda()
    with warnings.catch_warnings():  # of torch's own
        warnings.simplefilter("ignore")
        compiled = torch.compile(model)
        estimator = RadiusEstimator(compiled, x[:8])
        result = estimator(x)
    assert estimator.mode != "eager"
    assert_same_search(result, robust_radius(model, x, full=True), rtol=2e-2)


def test_two_estimators_on_two_streams():
    models = [RowExact(seed=seed).cuda() for seed in range(2)]
    x = uniform(64, 12).cuda()
    expected = [robust_radius(model, x, full=True) for model in models]
    estimators = [RadiusEstimator(model, x, check_input=False) for model in models]
    streams = [torch.cuda.Stream() for _ in models]
    results: list[list[RadiusResult]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(estimators[i](x))
    torch.cuda.synchronize()
    for i in range(2):
        for result in results[i]:
            assert_same_search(result, expected[i])


def test_one_estimator_on_two_streams_and_in_threads():
    model = RowExact().cuda().eval()
    batches = [uniform(40, 12, seed=seed).cuda() for seed in range(8)]
    expected = [robust_radius(model, x, full=True) for x in batches]
    estimator = RadiusEstimator(model, batches[0])
    results: dict[int, RadiusResult] = {}
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[i] = estimator(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for i, result in enumerate(expected):
        assert_same_search(results[i], result)
