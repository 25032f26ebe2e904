"""Tensors on their way into and out of the core: inputs, logits, points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._common.user_model import Model, logits_of
from .._core import core
from .checked import WIDE, Options
from .place import launch_arguments, runs_core


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
        raise options.bounds.error(x[outside], len(x))
    return flags.ne(core.INPUT_NOT_FINITE)


def input_flags(x: Tensor, options: Options) -> Tensor:
    """(N,) uint8: 0 where the row is finite and in bounds, else one of core.INPUT_*.

    What rounding moves out of the bounds counts as inside: points of the ray are clipped anyway.
    """
    bounds = options.bounds
    if not bounds.uniform or not runs_core(x.device):
        flags = bounds.outside(x).to(torch.uint8).mul_(core.INPUT_OUTSIDE)
        return flags.masked_fill_(~x.flatten(1).isfinite().all(1), core.INPUT_NOT_FINITE)
    flags = torch.empty(len(x), tiles_of(x), dtype=torch.uint8, device=x.device)
    slack = bounds.slack(x.dtype)
    core.inspect(x, bounds.low - slack, bounds.high + slack, flags, **launch_arguments(x.device))
    return flags.amax(1)


def ray_room(x: Tensor) -> Tensor:
    """What `core.aim` needs to sum up the rays of x's rows."""
    return torch.empty(len(x), tiles_of(x), 3, dtype=torch.float64, device=x.device)


def tiles_of(x: Tensor) -> int:
    """Into how many tiles (csrc/ops.h) the core cuts a row of x."""
    size: int = core.TILE_ELEMENTS
    return max(1, math.ceil(math.prod(x.shape[1:]) / size))


def for_core(logits: Tensor, x: Tensor) -> Tensor:
    """Detached logits as the core reads them, in a dtype whose wide type is that of the state."""
    state = WIDE[x.dtype]
    logits = plain(logits.detach())
    if WIDE.get(logits.dtype) == state:
        return logits
    if logits.dtype == torch.float64:  # what differs in float64 alone must not become a tie
        logits = logits - logits.amax(1, keepdim=True)
    return logits.to(state)


def plain(x: Tensor) -> Tensor:
    """x in memory as it is: nothing left to be negated or conjugated, and no other layout."""
    if x.layout is not torch.strided:
        x = x.to_dense()
    resolved: Tensor = x.resolve_neg().resolve_conj()
    return resolved


def with_dense_rows(x: Tensor) -> Tensor:
    """x itself if each row is one dense block in any order (channels_last is), else a copy."""
    x = plain(x)
    inner = sorted((s, n) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True) if n != 1)
    expected = 1
    for stride, size in inner:
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def like_rows(values: Tensor, x: Tensor) -> Tensor:
    """(N,) values in a shape that broadcasts over the rows of x."""
    return values.view(-1, *[1] * (x.ndim - 1))


def empty_rows_like(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, ...) with the memory order of x's rows, one row after the other."""
    elements = math.prod(x.shape[1:])
    return torch.empty_strided(
        (rows, *x.shape[1:]), (elements, *x.stride()[1:]), dtype=dtype, device=x.device
    )
