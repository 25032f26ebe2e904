"""What `CudaGraphs` asks of torch.cuda, with mocks for the device; and how often is polled."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from unittest import mock

import pytest
import torch
from helpers import RowExact, uniform

from rat_ext import RadiusEstimator, reference, robust_radius
from rat_ext.radius import graphs


class Device:
    """Stands in for torch.cuda. `log` is what was done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.mode = 0

        class Graph:
            def replay(_) -> None:
                self.log.append("replay")

            def begin_capture_to_while_node(_, again: torch.Tensor) -> None:
                self.log.append("loop")
                self.predicate = weakref.ref(again)

            def set_conditional_handle_for_current_node(_, again: torch.Tensor) -> None:
                assert again is self.predicate()

            def end_capture_to_conditional_node(_) -> None:
                self.log.append("end of loop")

        @contextlib.contextmanager
        def capture(graph, **_):
            self.log.append("capture")
            yield

        for name in ("Stream", "graph_pool_handle", "current_stream", "device", "stream"):
            monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)

    def set_mode(self, mode: int | str) -> None:
        self.mode = mode
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self.log.append(f"host waits: {mode}")


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


WARM_UP = ["work", "host waits: error", "work", "host waits: 0"]


def test_a_loop_is_recorded_after_its_work_was(device):
    recorder = graphs.CudaGraphs(torch.device("cpu"))
    recorder.capture_while(torch.tensor([2]), 1, lambda: device.log.append("work"))
    plain = [*WARM_UP, "capture", "work"]
    assert device.log == [*plain, *WARM_UP, "capture", "loop", "work", "end of loop"]


def test_the_predicate_lives_as_long_as_its_graph(device):
    """The graph writes to its address: freed, that would be somebody else's memory."""
    recorder = graphs.CudaGraphs(torch.device("cpu"))
    replay = recorder.capture_while(torch.tensor([2]), 1, lambda: None)
    gc.collect()
    assert device.predicate() is not None
    replay()
    assert device.log[-1] == "replay"
    del replay
    gc.collect()
    assert device.predicate() is None


def test_work_that_waits_for_the_device_is_not_recorded(device):
    def work() -> None:
        if device.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        graphs.CudaGraphs(torch.device("cpu")).capture_while(torch.tensor([2]), 1, work)
    assert device.mode == 0
    assert "capture" not in device.log


def test_after_a_failed_capture_an_empty_one_succeeds(device, monkeypatch):
    ended = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: ended.append(a), False)
    calls = iter([None, None])

    def work() -> None:
        device.log.append("work")
        if next(calls, "capturing") == "capturing":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.CudaGraphs(torch.device("cpu")).capture_while(torch.tensor([2]), 1, work)
    assert device.log == [*WARM_UP, "capture", "work", "capture"]
    assert "loop" not in device.log
    assert len(ended) == 1


def test_an_error_of_the_caller_is_not_the_cause(monkeypatch):
    class Failing:
        def capture(self, work):
            try:
                raise RuntimeError("it reads the device")
            except RuntimeError:
                raise RuntimeError("the capture was invalidated")  # noqa: B904

        capture_while = capture

    monkeypatch.setattr(graphs, "graphs_for", lambda device: Failing())
    try:
        raise KeyError("something of the caller's")
    except KeyError:
        with pytest.warns(RuntimeWarning, match="eagerly: RuntimeError: it reads the device"):
            RadiusEstimator(RowExact(), uniform(3, 12))


@pytest.mark.parametrize(
    ("rows", "steps", "polls"),
    [([3], 3, 2), ([2], 2, 1), ([3, 4, 5, 3], 5, 4), ([2, 2, 9], 9, 8)],
    ids=str,
)
def test_replays_poll_after_each_step_once_rows_may_settle(rows, steps, polls, monkeypatch):
    """`rows` is how many steps each row takes; none takes fewer than two."""
    left, count = list(rows), torch.tensor([len(rows)], dtype=torch.int32)
    done = {"steps": 0, "polls": 0}

    def step(_: int) -> None:
        done["steps"] += 1
        count.fill_(sum(each > done["steps"] for each in left))

    class Recorder:
        def capture(self, work):
            return work

    class Polls(graphs.ActiveCount):
        def __call__(self, count):
            done["polls"] += 1
            return super().__call__(count)

    monkeypatch.setattr(graphs, "ActiveCount", Polls)
    graphs.ReplayLoop(Recorder(), [1, 2, 3, 4], sure_steps=2).loop(step, count)(len(rows))
    assert done == {"steps": steps, "polls": polls}


# --- Full float32 ---------------------------------------------------------------------------------


def settings() -> list:
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        return [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision]
    return [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("kind", ["robust_radius", "reference", "estimator"])
def test_tf32_is_off_around_the_model_alone(kind, failing):
    before, seen, exact = settings(), [], RowExact()

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(settings())
        if failing and len(seen) == 3:
            raise RuntimeError("the model fails")
        return exact(x)

    x = uniform(5, 12, dtype=torch.float32)

    def run() -> torch.Tensor:
        if kind == "estimator":
            return RadiusEstimator(model, x, tf32=False)(x).radius
        measure = robust_radius if kind == "robust_radius" else reference.robust_radius
        return measure(model, x, tf32=False)

    with pytest.raises(RuntimeError, match="fails") if failing else contextlib.nullcontext():
        assert torch.equal(run(), robust_radius(exact, x)) or kind == "reference"
    assert len(seen) >= 3
    assert all(each in (["ieee", "ieee"], [False, False]) for each in seen)
    assert settings() == before
    with pytest.raises(ValueError, match="tf32 is True; it must be None"):
        robust_radius(exact, x, tf32=True)


def test_parameters_that_were_reassigned_are_captured_anew(monkeypatch):
    class Recorder:
        captures = 0

        def capture(self, work):
            self.captures += 1
            return work

        def capture_while(self, count, above, work):
            raise RuntimeError("no loops")

    recorder = Recorder()
    monkeypatch.setattr(graphs, "graphs_for", lambda device: recorder)
    model, x = RowExact(), uniform(5, 12)
    estimator = RadiusEstimator(model, x)
    captures = recorder.captures
    estimator(x)
    with torch.no_grad():
        model.weight.mul_(1.1)
    estimator(x)
    assert recorder.captures == captures
    model.load_state_dict(RowExact(seed=1).state_dict(), assign=True)
    result = estimator(x).radius
    assert recorder.captures > captures
    assert torch.equal(result, robust_radius(RowExact(seed=1), x))
