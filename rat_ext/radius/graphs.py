"""Three ways to run a search: on a loop of the device, on replayed steps, or step by step.

Each turns work on the first so many rows into a callable that does it (`piece`), and a step into
one that repeats it until no row is active (`loop`).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..search.bracket_search import ActiveCount

Piece = Callable[[int], None]  # works on the first so many rows
Replay = Callable[[], None]

_WARM_UPS = 2  # lazy initialisation and the choice of algorithms cannot be captured
_CAPTURE_LOCK = threading.Lock()  # CUDA allows one capture at a time in a process


class Graphs(Protocol):
    """Records work on a device, to be replayed without the host code that launched it."""

    def capture(self, work: Callable[[], None]) -> Replay: ...
    def capture_while(self, count: Tensor, above: int, work: Callable[[], None]) -> Replay:
        """Repeats `work`, which changes the (1,) tensor `count`, while it exceeds `above`."""
        ...


def graphs_for(device: torch.device) -> Graphs | None:
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """CUDA graphs that share their memory, so only one of them may be replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Replay:
        return self._capture(work, lambda graph: work())

    def capture_while(self, count: Tensor, above: int, work: Callable[[], None]) -> Replay:
        if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"):
            raise RuntimeError(f"torch {torch.__version__} cannot capture a loop on the device")
        # Work that cannot be captured fails here, where torch knows how to clean up after it, and
        # not in the body of the loop, where it does not.
        self._capture(work, lambda graph: work())
        again = torch.zeros((), dtype=torch.bool, device=self.device)

        def loop(graph: Any) -> None:
            torch.gt(count[0], above, out=again)
            graph.begin_capture_to_while_node(again)
            try:
                work()
                torch.gt(count[0], above, out=again)
                graph.set_conditional_handle_for_current_node(again)
            finally:
                graph.end_capture_to_conditional_node()

        replay = self._capture(work, loop)

        def replay_loop(keep: Tensor = again) -> None:
            # The graph writes to the address of `again`, which nobody else owns.
            replay()

        return replay_loop

    def _capture(self, warm_up: Callable[[], None], record: Callable[[Any], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE_LOCK, torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            # torch.cuda.graph alone does not put the current stream back when a capture fails.
            with torch.cuda.stream(self.stream):
                for number in range(_WARM_UPS):
                    with _no_host_waits() if number else contextlib.nullcontext():
                        warm_up()
                # A workspace of cuBLAS belongs to a stream. Drop those there are, so that the
                # capture takes one from the pool of these graphs, which nothing else uses.
                torch._C._cuda_clearCublasWorkspaces()
                try:
                    # Other threads may allocate memory meanwhile: only this one is watched.
                    with torch.cuda.graph(
                        graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                    ):
                        record(graph)
                except Exception:
                    self._forget_capture()
                    raise
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay

    def _forget_capture(self) -> None:
        """After a capture that failed: torch up to 2.11 believes that it is still under way.

        Its allocator goes on giving out memory of the pool, and its random generator refuses to
        draw. A capture that succeeds, of next to nothing, puts both right.
        """
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
            with contextlib.suppress(Exception):  # torch has one of them, and may have done it
                getattr(torch._C, name)(self.device.index or 0, self.pool)
        with contextlib.suppress(Exception), torch.cuda.stream(torch.cuda.Stream(self.device)):
            nothing = torch.zeros(1, device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                nothing.zero_()


@contextlib.contextmanager
def _no_host_waits() -> Iterator[None]:
    """Raise where the host would wait for the device, which a graph cannot record.

    It spares captures that fail, and what they leave behind.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # that it is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Driver(Protocol):
    """How the work of a search is run; see the classes below."""

    name: str
    runs_model: bool  # calls run the model's Python code

    def piece(self, work: Piece) -> Piece: ...
    def loop(self, step: Piece, count: Tensor) -> Piece: ...


class Eager:
    """Runs everything as it comes, on exactly the rows that are active."""

    name = "eager"
    runs_model = True

    def piece(self, work: Piece) -> Piece:
        return work

    def loop(self, step: Piece, count: Tensor) -> Piece:
        active = ActiveCount(count.device)

        def run(_: int) -> None:
            while rows := active(count):
                step(rows)

        return run


class ReplayLoop:
    """Replays captured steps for batches of set sizes, and polls how many rows are active.

    It does so after `sure_steps`, in which no row can settle, and then after each step.
    """

    name = "replay loop"
    runs_model = False

    def __init__(self, graphs: Graphs, sizes: Sequence[int], sure_steps: int) -> None:
        self.graphs, self.sizes, self.sure_steps = graphs, sizes, sure_steps

    def size_for(self, rows: int) -> int:
        return self.sizes[bisect_left(self.sizes, rows)]

    def piece(self, work: Piece) -> Piece:
        replays = {size: self.graphs.capture(partial(work, size)) for size in self.sizes}
        return lambda rows: replays[self.size_for(rows)]()

    def loop(self, step: Piece, count: Tensor) -> Piece:
        replay_step = self.piece(step)
        active = ActiveCount(count.device)

        def run(rows: int) -> None:
            for _ in range(self.sure_steps):
                replay_step(rows)
            while left := active(count):
                replay_step(left)

        return run


class DeviceLoop(ReplayLoop):
    """Replays captured loops over ever smaller sizes; the host never learns the active count."""

    name = "device loop"

    def loop(self, step: Piece, count: Tensor) -> Piece:
        below = [0, *self.sizes]
        loops = {
            size: self.graphs.capture_while(count, below[i], partial(step, size))
            for i, size in enumerate(self.sizes)
        }

        def run(rows: int) -> None:
            for size in reversed(self.sizes[: self.sizes.index(self.size_for(rows)) + 1]):
                loops[size]()

        return run
