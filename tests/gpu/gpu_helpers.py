"""What the tests share that only a GPU can show."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import rat_ext
from rat_ext import RadiusEstimator, RadiusResult
from rat_ext.radius import graphs

_problem = rat_ext.build_info().cuda_problem
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(_problem is not None, reason=f"no usable GPU: {_problem}"),
    # torch says so where the first matrix product of a thread is one of a backward.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

MODES = ["device loop", "replay loop", "eager"]
LOOPS = {"device loop": graphs.DeviceLoop, "replay loop": graphs.ReplayLoop}
NO_DEVICE_LOOP = (
    None
    if hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")
    else f"torch {torch.__version__} cannot capture a loop on the device"
)
ran: Counter[str] = Counter()
"""How often a test ran an estimator in each mode."""


def modes_line() -> str:
    counts = [f"{mode} {ran[mode]} times" for mode in MODES if ran[mode]]
    absent = [f"device loop absent: {NO_DEVICE_LOOP}"] if NO_DEVICE_LOOP else []
    return "estimator modes: " + ", ".join(counts + absent)


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
    """An estimator that can run in this mode only: where it cannot be captured, it warns why."""
    if mode == "device loop" and NO_DEVICE_LOOP:
        pytest.skip(NO_DEVICE_LOOP)
    loop = LOOPS.get(mode, graphs.ReplayLoop)
    with mock.patch.multiple(graphs, DeviceLoop=loop, ReplayLoop=loop):
        estimator = RadiusEstimator(model, example, capture=mode != "eager", **options)
    assert estimator.mode == mode
    ran[mode] += 1
    return estimator


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
