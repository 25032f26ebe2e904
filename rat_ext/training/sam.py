"""Sharpness-aware minimisation (Foret et al., ICLR 2021): the gradient at the worst weights nearby.

Written out, as it is a dozen lines: the packages that have it bring many optimizers along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def at_worst_weights(model: nn.Module, rho: float) -> Iterator[None]:
    """The model's weights moved by ``rho * g / |g|``, equation 2 of the paper, and put back.

    g is the gradient that lies in ``.grad``. A loss that goes backward inside leaves the gradient
    for the optimizer's step. Buffers are put back as well, so that the statistics of batch
    normalisation stay those of the model itself.
    """
    with torch.no_grad():
        moved: list[Tensor] = [p for p in model.parameters() if p.grad is not None]
        kept = [tensor.clone() for tensor in (*moved, *model.buffers())]
        gradients = [p.grad for p in moved if p.grad is not None]
        length = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        # Nowhere to go where the gradient is 0.
        scale = rho / length.clamp(min=torch.finfo(length.dtype).tiny)
        torch._foreach_add_(moved, [scale * gradient for gradient in gradients])
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip((*moved, *model.buffers()), kept, strict=True):
                tensor.copy_(value)
