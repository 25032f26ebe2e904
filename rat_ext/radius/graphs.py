"""Three ways to run a search: on a loop of the device, on replayed steps, or step by step.

Each turns work on the first so many rows into a callable that does it (`piece`), and a step into
one that repeats it until no row is active (`loop`).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
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

        return self._capture(work, loop)

    def _capture(self, warm_up: Callable[[], None], record: Callable[[Any], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE_LOCK, torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            # torch.cuda.graph alone does not put the current stream back when a capture fails.
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UPS):
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
                finally:
                    torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay


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

    It does so every `steps_per_poll` steps: what settles in between is a forward in vain.
    """

    name = "replay loop"
    runs_model = False

    def __init__(self, graphs: Graphs, sizes: Sequence[int], steps_per_poll: int) -> None:
        self.graphs, self.sizes, self.steps_per_poll = graphs, sizes, steps_per_poll

    def size_for(self, rows: int) -> int:
        return self.sizes[bisect_left(self.sizes, rows)]

    def piece(self, work: Piece) -> Piece:
        replays = {size: self.graphs.capture(partial(work, size)) for size in self.sizes}
        return lambda rows: replays[self.size_for(rows)]()

    def loop(self, step: Piece, count: Tensor) -> Piece:
        replay_step = self.piece(step)
        active = ActiveCount(count.device)

        def run(_: int) -> None:
            while rows := active(count):
                for _ in range(self.steps_per_poll):
                    replay_step(rows)

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
