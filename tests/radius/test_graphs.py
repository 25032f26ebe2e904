"""RadiusEstimator as CUDA graphs: capture, replay, and falling back from it."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from graph_helpers import MODES, RecordedGraphs, estimator_in
from helpers import RowExact, assert_identical, uniform
from torch import Tensor

from rat_ext import RadiusEstimator, robust_radius
from rat_ext.radius import graphs as graphs_module


@pytest.fixture
def use_graphs(monkeypatch):
    """Lets the estimators made from now on use these graphs."""

    def use(graphs: RecordedGraphs | None) -> RecordedGraphs | None:
        monkeypatch.setattr(graphs_module, "graphs_for", lambda device: graphs)
        return graphs

    return use


def test_the_device_loop_never_asks_the_host(use_graphs, monkeypatch):
    model, x = RowExact(), uniform(8, 12)
    expected = robust_radius(model, x, full=True)
    graphs = use_graphs(RecordedGraphs())
    estimator = RadiusEstimator(model, x)
    captures = 3 * 6  # ray, loop and results, for 1, 2, 3, 4, 6 and 8 rows
    assert graphs.captures == captures
    monkeypatch.setattr(graphs_module.ActiveCount, "__call__", None)
    assert_identical(estimator(x), expected)
    assert graphs.replays == 1 + 6 + 1
    assert_identical(estimator(x[:3]), expected[:3])
    assert graphs.replays == 8 + 1 + 3 + 1  # from 3 rows on
    assert graphs.captures == captures


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
    assert set(sizes) <= {1, 2, 3, 4, 6, 8, 12}
    assert sizes == sorted(sizes, reverse=True)
    active = [int((rows > step).sum()) for step in range(int(rows.max()))]
    assert len(sizes) - 1 == len(active)
    assert all(size >= count for size, count in zip(sizes[1:], active, strict=False))
    smallest = [min(s for s in (1, 2, 3, 4, 6, 8, 12) if s >= count) for count in active]
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


@pytest.mark.skipif(
    not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"),
    reason="this torch has no conditional nodes, whose calls are compared",
)
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
    monkeypatch.setattr(graphs_module, "_no_host_waits", contextlib.nullcontext)
    count = torch.tensor([2])

    def work() -> None:
        calls.work()
        count.sub_(1)

    graphs = graphs_module.CudaGraphs(torch.device("cpu"))
    replay = graphs.capture_while(count, 1, work)
    predicate = graph.begin_capture_to_while_node.call_args.args[0]
    warm_up = [*["work"] * graphs_module._WARM_UPS, "clear"]
    assert [call[0] for call in calls.mock_calls] == [
        *warm_up,
        "work",
        "clear",
        *warm_up,
        "graph.begin_capture_to_while_node",
        "work",
        "graph.set_conditional_handle_for_current_node",
        "graph.end_capture_to_conditional_node",
        "clear",
    ]
    assert predicate.dtype == torch.bool
    assert predicate.shape == ()
    assert graph.set_conditional_handle_for_current_node.call_args.args[0] is predicate
    options = {"pool": graphs.pool, "stream": graphs.stream, "capture_error_mode": "thread_local"}
    assert contexts["graph"].call_args_list == [mock.call(graph, **options)] * 2
    replay()
    graph.replay.assert_called_once_with()

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
