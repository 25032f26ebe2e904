"""RadiusEstimator: equal to robust_radius in each of its modes, with the same promises.

CUDA graphs are stood in for by `RecordedGraphs`, whose replay runs the recorded work again. What
only a GPU can show is in test_gpu.py.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import warnings
from functools import partial
from unittest import mock

import pytest
import torch
from helpers import RowExact, WithLogits, assert_identical, cnn, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import RadiusEstimator, RadiusResult, robust_radius
from rat_ext.radius import graphs as graphs_module
from rat_ext.search import bracket_search

MODES = ["eager", "device loop", "replay loop"]


class RecordedGraphs:
    """Stands in for CudaGraphs: a replay runs on the CPU what was recorded."""

    def __init__(self, steps: bool = True, loops: bool = True) -> None:
        self.steps, self.loops = steps, loops
        self.captures = 0
        self.replays = 0

    def capture(self, work):
        if not self.steps:
            try:
                raise RuntimeError("the stream is capturing\nand more")
            except RuntimeError:
                raise RuntimeError("the capture was invalidated")  # noqa: B904
        return self._recorded(work, work)

    def capture_while(self, count, above, work):
        if not self.loops:
            raise RuntimeError("no loops")

        def loop() -> None:
            while int(count) > above:
                work()

        return self._recorded(work, loop)

    def _recorded(self, warm_up, work):
        warm_up()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture
def use_graphs(monkeypatch):
    """Lets the estimators made from now on use these graphs."""

    def use(graphs: RecordedGraphs | None) -> RecordedGraphs | None:
        monkeypatch.setattr(graphs_module, "graphs_for", lambda device: graphs)
        return graphs

    return use


def estimator_in(mode: str, model, example: Tensor, **options) -> RadiusEstimator:
    graphs = None if mode == "eager" else RecordedGraphs(loops=mode == "device loop")
    with mock.patch.object(graphs_module, "graphs_for", return_value=graphs):
        estimator = RadiusEstimator(model, example, **options)
    assert estimator.mode == mode
    return estimator


# --- Equality with robust_radius ------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    mode=st.sampled_from(MODES),
    size=st.integers(1, 9),
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    options=st.sampled_from(
        [{}, {"probes": 3}, {"search": "bisect"}, {"method": "fast"}, {"temperature": 0.2}]
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_equals_robust_radius(mode, size, counts, options, dtype, seed):
    model = RowExact(seed=seed)
    estimator = estimator_in(mode, model, uniform(size, 12, dtype=dtype), **options)
    for i, count in enumerate(counts):
        x = uniform(count, 12, dtype=dtype, seed=seed + i)
        expected = robust_radius(model, x, full=True, **options)
        assert_identical(estimator(x), expected, rows_too=count > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_inputs(mode, dtype):
    model, x = RowExact(), uniform(11, 12).to(dtype)
    estimator = estimator_in(mode, model, x[:4], rtol=0.05)
    assert_identical(estimator(x), robust_radius(model, x, rtol=0.05, full=True))


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_finite_fail_alone_and_leave_no_trace(mode):
    model, x = RowExact(), uniform(7, 12)
    estimator = estimator_in(mode, model, x)
    expected = robust_radius(model, x, full=True)
    x[3, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 7 rows") as caught:
        result = estimator(x)
    assert caught[0].filename == __file__
    assert result.radius[3].isnan()
    rest = [0, 1, 2, 4, 5, 6]
    assert_identical(result[rest], expected[rest])
    assert_identical(estimator(x[:3]), expected[:3])  # padded with what is left of row 3


@pytest.mark.parametrize("mode", MODES)
def test_unchecked_bad_rows_get_nan_in_silence(mode):
    model, x = RowExact(), uniform(6, 12)
    expected = robust_radius(model, x, full=True)
    estimator = estimator_in(mode, model, x, check_input=False)
    x[1, 0], x[4, 5] = math.inf, 1.5
    result = estimator(x)
    assert result.radius.isnan().tolist() == [False, True, False, False, True, False]
    assert_identical(result[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_any_strides_and_channels_last():
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return exact(x)

    exact, x = RowExact(), uniform(5, 3, 2, 2).to(memory_format=torch.channels_last)
    expected = robust_radius(exact, x, full=True)
    estimator = RadiusEstimator(model, x)
    assert_identical(estimator(x), expected)
    assert_identical(estimator(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert_identical(estimator(x.contiguous()), expected)
    assert all(seen)


@pytest.mark.parametrize("mode", MODES)
def test_sees_parameters_that_changed_in_place(mode):
    model, x = RowExact(), uniform(6, 12)
    estimator = estimator_in(mode, model, x)
    model.load_state_dict(RowExact(seed=1).state_dict())
    assert_identical(estimator(x), robust_radius(RowExact(seed=1), x, full=True))


def test_compiled_models():
    model, x = mlp(), uniform(6, 12)
    with warnings.catch_warnings():  # of torch's own
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager")
        result = RadiusEstimator(compiled, x)(x)
    torch.testing.assert_close(result.radius, robust_radius(model, x))


def test_objects_with_logits():
    model, x = RowExact(), uniform(6, 12)
    result = RadiusEstimator(WithLogits(model), x)(x)
    assert_identical(result, robust_radius(model, x, full=True))


# --- Capture, and falling back from it ------------------------------------------------------------


def test_the_device_loop_never_asks_the_host(use_graphs, monkeypatch):
    model, x = RowExact(), uniform(8, 12)
    expected = robust_radius(model, x, full=True)
    graphs = use_graphs(RecordedGraphs())
    estimator = RadiusEstimator(model, x)
    assert graphs.captures == 2 * 4  # ray and loop, for 1, 2, 4 and 8 rows
    monkeypatch.setattr(graphs_module.ActiveCount, "__call__", None)
    assert_identical(estimator(x), expected)
    assert graphs.replays == 1 + 4
    assert_identical(estimator(x[:3]), expected[:3])
    assert graphs.replays == 5 + 1 + 3  # from 4 rows on
    assert graphs.captures == 2 * 4


@pytest.mark.parametrize("mode", MODES[1:])
def test_captured_forwards_shrink_as_rows_settle(mode):
    sizes = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return exact(x)

    exact, x = RowExact(), uniform(12, 12)
    estimator = estimator_in(mode, model, x)
    sizes.clear()
    rows = estimator(x).forward_rows
    assert sizes[:2] == [12, 12]
    assert set(sizes) <= {1, 2, 4, 8, 12}
    assert sizes == sorted(sizes, reverse=True)
    active = [int((rows > step).sum()) for step in range(int(rows.max()))]
    assert len(sizes) - 1 - len(active) in ([0] if mode == "device loop" else [0, 1])
    assert all(size >= count for size, count in zip(sizes[1:], active, strict=False))
    if mode == "device loop":
        smallest = [min(s for s in (1, 2, 4, 8, 12) if s >= count) for count in active]
        assert sizes[1:] == smallest


def test_capture_can_be_switched_off(use_graphs):
    graphs = use_graphs(RecordedGraphs())
    assert RadiusEstimator(RowExact(), uniform(4, 12), capture=False).mode == "eager"
    assert graphs.captures == 0


def test_failed_capture_runs_eagerly_and_names_the_first_cause(use_graphs):
    model, x = RowExact(), uniform(6, 12)
    use_graphs(RecordedGraphs(steps=False, loops=False))
    with pytest.warns(
        RuntimeWarning, match=r": RuntimeError: the stream is capturing\. "
    ) as caught:
        estimator = RadiusEstimator(model, x)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert estimator.mode == "eager"
    assert_identical(estimator(x), robust_radius(model, x, full=True))


def test_a_model_that_draws_random_numbers_is_not_captured(use_graphs):
    def model(x: Tensor) -> Tensor:
        return exact(x) + 0 * torch.rand(())

    exact, x = RowExact(), uniform(6, 12)
    graphs = use_graphs(RecordedGraphs())
    with pytest.warns(RuntimeWarning, match="random numbers"):
        estimator = RadiusEstimator(model, x)
    assert graphs.captures == 0
    state = torch.get_rng_state()
    assert_identical(estimator(x), robust_radius(exact, x, full=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_calls_that_record_cuda_graphs(monkeypatch):
    """Order and signatures of the calls to torch.cuda; the device is stood in for by mocks."""
    calls = mock.Mock()
    calls.CUDAGraph.return_value = graph = mock.create_autospec(torch.cuda.CUDAGraph, instance=True)
    calls.attach_mock(graph, "graph")
    contexts = {
        name: mock.create_autospec(getattr(torch.cuda, name)) for name in ("graph", "stream")
    }
    for name in ("Stream", "graph_pool_handle", "current_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    for name, context in contexts.items():
        monkeypatch.setattr(torch.cuda, name, context)
    graph_class = mock.MagicMock(return_value=graph)
    graph_class.begin_capture_to_while_node = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph_class)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", calls.clear)
    count = torch.tensor([2])

    def work() -> None:
        calls.work()
        count.sub_(1)

    graphs = graphs_module.CudaGraphs(torch.device("cpu"))
    replay = graphs.capture_while(count, 1, work)
    predicate = graph.begin_capture_to_while_node.call_args.args[0]
    assert [call[0] for call in calls.mock_calls] == [
        *["work"] * graphs_module._WARM_UPS,
        "clear",
        "graph.begin_capture_to_while_node",
        "work",
        "graph.set_conditional_handle_for_current_node",
        "graph.end_capture_to_conditional_node",
        "clear",
    ]
    assert predicate.dtype == torch.bool
    assert predicate.shape == ()
    assert graph.set_conditional_handle_for_current_node.call_args.args[0] is predicate
    contexts["graph"].assert_called_once_with(
        graph, pool=graphs.pool, stream=graphs.stream, capture_error_mode="thread_local"
    )
    assert replay == graph.replay

    del graph_class.begin_capture_to_while_node
    with pytest.raises(RuntimeError, match="cannot capture a loop"):
        graphs.capture_while(count, 1, work)


@pytest.mark.parametrize("failing", [False, True])
def test_a_stream_waits_for_the_call_before(monkeypatch, failing):
    """The calls that order streams; the device is stood in for by mocks."""
    calls, x = mock.Mock(), uniform(4, 12)
    estimator = RadiusEstimator(RowExact(), x)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: calls.stream)
    monkeypatch.setattr(estimator, "_done", calls.event)
    with pytest.raises(ValueError, match="outside") if failing else contextlib.nullcontext():
        estimator(x + failing)
    assert calls.mock_calls == [
        mock.call.stream.wait_event(calls.event),
        mock.call.event.record(calls.stream),
    ]


# --- Autocast -------------------------------------------------------------------------------------


def test_autocast_is_that_of_the_construction():
    model, x = mlp().float(), uniform(6, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        estimator = RadiusEstimator(model, x)
        expected = robust_radius(model, x, full=True)
    plain = RadiusEstimator(model, x)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=0)
    close(estimator(x).radius, expected.radius)
    with torch.autocast("cpu", torch.bfloat16):
        inside = plain(x)
    close(inside.radius, robust_radius(model, x))
    assert not torch.allclose(inside.radius, expected.radius, rtol=1e-3, atol=0)


# --- Promises and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_model_and_the_rng_are_left_as_they_were(mode):
    model, x = cnn(), uniform(6, 3, 8, 8, dtype=torch.float32)
    model[1].eval()
    model(x).sum().backward()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    estimator = estimator_in(mode, model, x[:4])
    if mode == "eager":  # else a call runs no Python of the model, but for RecordedGraphs
        torch.testing.assert_close(estimator(x).radius, robust_radius(model, x), rtol=0.01, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_every_grad_mode(context):
    model, x = RowExact(), uniform(6, 12)
    expected = robust_radius(model, x, full=True)
    with context():
        estimator = RadiusEstimator(model, x.clone())
        assert_identical(estimator(x.clone()), expected)
    assert_identical(estimator(x.clone().requires_grad_()), expected)
    with torch.inference_mode():
        assert_identical(estimator(x.clone()), expected)


def test_results_outlive_the_next_call():
    model, x = RowExact(), uniform(12, 12)
    estimator = RadiusEstimator(model, x[:6])
    first = estimator(x[:6])
    estimator(x[6:])
    assert_identical(first, robust_radius(model, x[:6], full=True))


def test_a_call_that_fails_leaves_the_estimator_usable():
    class Failing(nn.Module):
        failing = False

        def forward(self, x: Tensor) -> Tensor:
            if self.failing and not x.requires_grad:
                raise KeyError("down")
            return exact(x)

    exact, x = RowExact(), uniform(6, 12)
    model = Failing().train()
    estimator = RadiusEstimator(model, x)
    model.failing = True
    with pytest.raises(KeyError, match="down"):
        estimator(x)
    assert model.training
    model.failing = False
    assert_identical(estimator(x), robust_radius(exact, x, full=True))


@pytest.mark.parametrize("mode", MODES)
def test_threads_take_turns(mode):
    model, batches = RowExact().eval(), [uniform(7, 12, seed=seed) for seed in range(6)]
    estimator = estimator_in(mode, model, batches[0][:5])
    results: dict[int, RadiusResult] = {}

    def work(i: int) -> None:
        results[i] = estimator(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(batches):
        assert_identical(results[i], robust_radius(model, x, full=True))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "that of example_x", {"batch_size": 3}),
        (ValueError, "method is 'fats'", {"method": "fats"}),
        (ValueError, "outside bounds", {"bounds": (0.0, 0.1)}),
        (TypeError, "unexpected keyword", {"epsilon": 3}),
    ],
)
def test_bad_options(error, message, options):
    with pytest.raises(error, match=message):
        RadiusEstimator(RowExact(), uniform(4, 12), **options)


@pytest.mark.parametrize(
    ("error", "message", "x"),
    [
        (TypeError, "is a list", [0.5]),
        (ValueError, "rows of shape", uniform(4, 11)),
        (ValueError, "Convert x", uniform(4, 12, dtype=torch.float32)),
        (ValueError, "outside bounds", uniform(4, 12) + 1),
        (ValueError, "on meta", uniform(4, 12).to("meta")),
    ],
)
def test_bad_inputs(error, message, x):
    estimator = RadiusEstimator(RowExact(), uniform(4, 12))
    with pytest.raises(error, match=message):
        estimator(x)


def test_bad_examples():
    with pytest.raises(ValueError, match="no rows"):
        RadiusEstimator(RowExact(), uniform(0, 12))
    with pytest.raises(ValueError, match="outside bounds"):
        RadiusEstimator(RowExact(), uniform(4, 12) * 2)
    with pytest.raises(RuntimeError, match="do not depend on the input"):
        RadiusEstimator(lambda x: x.detach()[:, :4], uniform(4, 12))


# --- The search loop of robust_radius on a GPU ----------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("options", [{}, {"probes": 3}, {"method": "fast"}])
def test_rounds_launched_before_the_count_is_known_change_nothing(monkeypatch, chunk, options):
    launched = []

    def model(x: Tensor) -> Tensor:
        launched.append(len(x))
        return exact(x)

    class Unhurried(bracket_search.ActiveCount):
        """Returns the total in the first rounds, as on a GPU."""

        def __call__(self, count: Tensor) -> int:
            self.sure -= 1
            return self.total if self.sure >= 0 else super().__call__(count)

    exact, x = RowExact(), uniform(10, 12)
    x[[0, 3]] = math.nan
    x[9] = x[8]
    call = {"full": True, "batch_size": chunk, **options}
    with pytest.warns(RuntimeWarning, match="2 of 10 rows"):
        expected = robust_radius(model, x, **call)
    exactly = sum(launched)
    launched.clear()
    monkeypatch.setattr(bracket_search, "ActiveCount", Unhurried)
    with pytest.warns(RuntimeWarning, match="2 of 10 rows"):
        result = robust_radius(model, x, **call)
    assert_identical(result, expected)
    settled_rows = 2 * (2 if not options else 1) * options.get("probes", 1)
    assert sum(launched) == exactly + settled_rows


def test_the_count_is_awaited_by_an_event_of_its_own(monkeypatch):
    """The calls of ActiveCount to torch.cuda; the device is stood in for by mocks."""
    calls = mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: calls.stream)
    active = bracket_search.ActiveCount(torch.device("cpu"), total=9, sure=2)
    active.on_gpu, active.event = True, calls.event
    active.host = torch.empty(1, dtype=torch.int32)
    count = torch.tensor([5], dtype=torch.int32)
    assert [active(count), active(count)] == [9, 9]
    assert calls.mock_calls == []
    assert active(count) == 5
    assert calls.mock_calls == [
        mock.call.event.record(calls.stream),
        mock.call.event.synchronize(),
    ]
