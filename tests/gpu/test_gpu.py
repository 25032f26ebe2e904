"""What only a GPU can show. Needs neither hypothesis nor any data."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import warnings
from unittest import mock

import pytest
import torch
from helpers import RowExact, cnn, uniform
from torch import Tensor, nn

import rat_ext
from rat_ext import (
    Cascade,
    Detector,
    RadiusEstimator,
    RadiusResult,
    datasets,
    evaluation,
    models,
    reference,
    robust_radius,
    training,
)
from rat_ext.radius import graphs as graphs_module

_problem = rat_ext.build_info().cuda_problem
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_problem is not None, reason=f"no usable GPU: {_problem}"),
]

MODES = ["device loop", "replay loop", "eager"]


class Waves(nn.Module):
    """A smooth classifier of any number of classes."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        weight = 2 * torch.randn((features, classes), generator=generator).double()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1) @ self.weight.to(x.dtype)) * 3


def estimator_in(mode: str, model, example: Tensor, **options) -> RadiusEstimator:
    if mode == "device loop" and not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"):
        pytest.skip(f"torch {torch.__version__} cannot capture a loop on the device")
    without_loop = mock.patch.object(
        graphs_module.CudaGraphs, "capture_while", side_effect=RuntimeError
    )
    with without_loop if mode == "replay loop" else contextlib.nullcontext():
        estimator = RadiusEstimator(model, example, capture=mode != "eager", **options)
    assert estimator.mode == mode
    return estimator


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextlib.contextmanager
def sync_debug_mode(mode: str):
    with warnings.catch_warnings():  # that it is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_search(a: RadiusResult, b: RadiusResult, rtol: float = 1e-2) -> None:
    """Radii within the search's tolerance: rounding may turn a search on another way to it."""
    for name in ("found", "prediction"):
        assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
    radii = (a.radius.double().cpu(), b.radius.double().cpu())
    torch.testing.assert_close(*radii, rtol=1.1 * rtol, atol=0, equal_nan=True)


def test_short_search():
    """Small enough for compute-sanitizer; runs every kernel."""
    model, x = RowExact().cuda(), uniform(9, 12).cuda()
    x[4, 1] = math.nan
    for options in ({}, {"probes": 2}, {"method": "fast"}):
        with pytest.warns(RuntimeWarning, match="1 of 9 rows"):
            radii = robust_radius(model, x, **options)
        assert radii.isnan().nonzero().tolist() == [[4]]


# --- Against the CPU and the reference ------------------------------------------------------------


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
    expected = robust_radius(model, x, full=True)
    on_device = copy.deepcopy(exact).cuda()
    assert_same_search(robust_radius(model, x.cuda(), full=True), expected, rtol=2e-2)
    assert_same_search(RadiusEstimator(model, x.cuda())(x.cuda()), expected, rtol=2e-2)


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


def test_the_model_and_the_rng_are_left_as_they_were():
    model, x = cnn().cuda(), uniform(6, 3, 8, 8, dtype=torch.float32).cuda()
    state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    estimator = RadiusEstimator(model, x[:4])
    assert_same_search(estimator(x), robust_radius(model, x, full=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cuda.get_rng_state(), gpu_state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- RadiusEstimator ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"probes": 3}, {"search": "bisect"}, {"method": "fast"}])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, options):
    model, x = RowExact().cuda(), uniform(300, 12).cuda()
    estimator = estimator_in(mode, model, x[:48], **options)
    expected = robust_radius(model, x, full=True, **options)
    for rows in (300, 1, 2, 3, 47, 48, 49, 300):
        assert_same_search(estimator(x[:rows]), expected[slice(rows)])


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


def test_no_host_synchronisation_in_a_captured_search():
    model, x = RowExact().cuda(), uniform(32, 12).cuda()
    estimator = estimator_in("device loop", model, x, check_input=False)
    expected = robust_radius(model, x, full=True)
    with sync_debug_mode("error"):
        results = [estimator(x), estimator(x[:5])]
    assert_same_search(results[0], expected)
    assert_same_search(results[1], expected[:5])


def test_host_synchronisations_of_an_eager_search():
    model, x = RowExact().cuda(), uniform(32, 12).cuda()
    with sync_debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        robust_radius(model, x)
    syncs = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(syncs) == 2, [str(w.message) for w in caught]  # bounds and nan; none in a round


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    model, x = RowExact().to("cuda:1"), uniform(20, 12).to("cuda:1")
    expected = robust_radius(RowExact(), x.cpu(), full=True)
    assert_same_search(robust_radius(model, x, full=True), expected)
    assert_same_search(RadiusEstimator(model, x)(x), expected)
    assert torch.cuda.current_device() == 0


# --- What is built on the search ------------------------------------------------------------------


def images(count: int = 300) -> datasets.Images:
    """Noise whose class is that of the brightest of ten columns of pixels."""
    pixels = uniform(count, 1, 8, 8, dtype=torch.float32)
    return datasets.Images(
        pixels, pixels[:, 0, :5].flatten(1)[:, ::4].argmax(1), tuple("abcdefghij")
    )


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.create("digits-cnn")


@pytest.mark.parametrize("loss", ["ce", "rat"])
def test_training(loss, tmp_path):
    recipe = training.Recipe(loss=loss, epochs=2, batch_size=50, lr=0.01, eps=0.01)
    data = images()
    expected = training.train(network(), data, recipe, progress=False)
    result = training.train(network().cuda(), data, recipe, out=tmp_path, progress=False)
    for row, other in zip(result.history, expected.history, strict=True):
        assert row == pytest.approx(other, rel=0.02, abs=0.01)
    for parameter, other in zip(
        result.model.parameters(), expected.model.parameters(), strict=True
    ):
        assert parameter.is_cuda
        torch.testing.assert_close(parameter.cpu(), other, rtol=0.02, atol=2e-3)
    again = training.train(network().cuda(), data, recipe, out=tmp_path, progress=False)
    assert again.history == result.history  # from the checkpoint


def test_all_options_of_training():
    recipe = training.Recipe(
        epochs=2, batch_size=50, lr=0.01, eps=0.01, steps=2, warmup=1, augment="crop-flip",
        mixup=0.4, bf16=True, ema=0.9,
    )  # fmt: skip
    gpu_state = torch.cuda.get_rng_state()
    history = training.train(network().cuda(), images(), recipe, progress=False).history
    assert all(math.isfinite(row["loss"]) for row in history)
    assert torch.equal(torch.cuda.get_rng_state(), gpu_state)


def test_evaluation(tmp_path):
    settings = evaluation.Settings(("msr", "odin", "rr-fast", "rr-bs"), splits=2, batch_size=64)
    runs = {
        device: evaluation.evaluate(
            network().to(device), images(), settings, tmp_path / device, progress=False
        )
        for device in ("cpu", "cuda")
    }
    assert torch.equal(runs["cuda"].correct, runs["cpu"].correct)
    for result, other in zip(runs["cuda"].results, runs["cpu"].results, strict=True):
        for row, other_row in zip(result.splits, other.splits, strict=True):
            assert row == pytest.approx(other_row, abs=0.02), result.name


@pytest.mark.parametrize("score", ["msr", "rr-bs", Cascade("msr", "rr-bs")], ids=str)
def test_detector(score):
    x = uniform(400, 12)
    target = RowExact()(x).argmax(1)
    target[::5] = (target[::5] + 1) % 4
    decisions = []
    for device in ("cpu", "cuda"):
        loader = [
            (part, t) for part, t in zip(x.to(device).split(64), target.split(64), strict=True)
        ]
        model = RowExact().to(device)
        detector = Detector.fit(model, loader, score, coverage=0.8, calibrate=True)
        decisions.append(detector(x.to(device)))
    cpu, gpu = decisions
    assert torch.equal(gpu.prediction.cpu(), cpu.prediction)
    torch.testing.assert_close(gpu.confidence.cpu(), cpu.confidence, rtol=0.02, atol=1e-6)
    assert (gpu.accepted.cpu() == cpu.accepted).double().mean() > 0.97
    for field in ("prediction", "confidence", "accepted", "probability"):
        assert getattr(gpu, field).is_cuda
