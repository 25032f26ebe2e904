"""Perturbs a row that is not there: compute-sanitizer has to see it (scripts/gpu_check.sh)."""

from __future__ import annotations

import torch

from rat_ext._core import core
from rat_ext.search.place import launch_arguments

x = torch.rand(4, 1024, device="cuda")
core.perturb(
    x,
    torch.ones_like(x, dtype=torch.int8),
    torch.full((4,), 1 << 24, dtype=torch.int32, device="cuda"),
    torch.rand(4, 1, device="cuda"),
    0.0,
    1.0,
    torch.empty_like(x),
    **launch_arguments(x.device),
)
torch.cuda.synchronize()
