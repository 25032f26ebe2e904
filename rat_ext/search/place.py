"""Where a search runs: in the core on the input's own device, or with its state on the host.

The core has loops for the CPU and kernels for CUDA. On any other device (MPS, XPU, ROCm, or CUDA
for which it was built without kernels) the state of a search lives in host memory: logits come over
once a round, and the points that are probed are made by torch on the device.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from .._build_info import build_info

host_only = False
"""For tests and benchmarks: as if the core knew no device but the host's."""


def runs_core(device: torch.device) -> bool:
    """The core can work on tensors of this device."""
    if host_only:
        return False
    return device.type == "cpu" or (device.type == "cuda" and _cuda_problem(device.index) is None)


def state_device(device: torch.device) -> torch.device:
    """Where the state of a search on inputs of this device is kept."""
    return device if runs_core(device) else torch.device("cpu")


def launch_arguments(device: torch.device) -> dict[str, Any]:
    """How the core runs on a device: on torch's current stream, or with its threads."""
    if device.type == "cuda":
        return {"stream": torch.cuda.current_stream(device).cuda_stream}
    return {"threads": torch.get_num_threads()}


@functools.cache
def _cuda_problem(index: int | None) -> str | None:
    """Why the kernels cannot run on a CUDA device; None if they can. Said once."""
    info = build_info()
    number = torch.cuda.current_device() if index is None else index
    problem = info.device_problems[number] if info.device_problems else info.cuda_problem
    if problem is not None:
        warnings.warn(
            f"rat_ext has no kernels for this GPU ({problem}); searches keep their state on the "
            "CPU, which costs one copy of the logits a round. `rat-ext info` says more",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem
