"""Tensors on their way into and out of the core: inputs, logits, points."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._common.user_model import Model, logits_of
from .._core import core
from .options import WIDE, Options, bounds_error


def differentiable_logits(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf that shares x's memory, and the logits that depend on it through autograd."""
    leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model(leaf), len(leaf))
    if not logits.requires_grad:
        raise RuntimeError(
            "the logits do not depend on the input through autograd, so there is no direction "
            "to search in. Is the model's forward under no_grad, or does it detach?"
        )
    if logits.device != x.device:
        raise ValueError(f"x is on {x.device} but the model returned logits on {logits.device}")
    return leaf, logits


def checked_input(x: Tensor, options: Options) -> Tensor:
    """(N,) bool: the row is finite. Raises if an element of a finite row is out of bounds."""
    flags = input_flags(x, options)
    outside = flags == core.INPUT_OUTSIDE
    if outside.any():
        raise bounds_error(x[outside], len(x), options)
    return flags.ne(core.INPUT_NOT_FINITE)


def input_flags(x: Tensor, options: Options) -> Tensor:
    """(N,) uint8: 0 where the row is finite and in bounds, else one of core.INPUT_*."""
    flags = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    core.inspect(x, options.low, options.high, flags, **launch_arguments(x))
    return flags


def for_core(logits: Tensor, x: Tensor) -> Tensor:
    """Detached logits in a dtype whose wide type is that of the search state."""
    state = WIDE[x.dtype]
    logits = logits.detach()
    return logits if WIDE.get(logits.dtype) == state else logits.to(state)


def with_dense_rows(x: Tensor) -> Tensor:
    """x itself if each row is one dense block in any order (channels_last is), else a copy."""
    inner = sorted((s, n) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True) if n != 1)
    expected = 1
    for stride, size in inner:
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def empty_rows_like(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, ...) with the memory order of x's rows, one row after the other."""
    elements = math.prod(x.shape[1:])
    return torch.empty_strided(
        (rows, *x.shape[1:]), (elements, *x.stride()[1:]), dtype=dtype, device=x.device
    )


def launch_arguments(x: Tensor) -> dict[str, Any]:
    """How the core runs on x's device: on torch's current stream, or with its threads."""
    if x.device.type == "cuda":
        return {"stream": torch.cuda.current_stream(x.device).cuda_stream}
    return {"threads": torch.get_num_threads()}
