"""What the tests share that only a GPU can show."""

from __future__ import annotations

import contextlib
import warnings
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import rat_ext
from rat_ext import RadiusEstimator, RadiusResult
from rat_ext.radius import graphs as graphs_module

_problem = rat_ext.build_info().cuda_problem
NEEDS_GPU = [
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
