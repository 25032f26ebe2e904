"""CUDA graphs without a GPU: their replay runs the recorded work again."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

from rat_ext import RadiusEstimator
from rat_ext.radius import graphs as graphs_module

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


def estimator_in(mode: str, model, example: Tensor, **options) -> RadiusEstimator:
    graphs = None if mode == "eager" else RecordedGraphs(loops=mode == "device loop")
    with mock.patch.object(graphs_module, "graphs_for", return_value=graphs):
        estimator = RadiusEstimator(model, example, **options)
    assert estimator.mode == mode
    return estimator
