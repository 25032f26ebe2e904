"""Logit normalisation (Wei et al., ICML 2022), as a model around the one that is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._common.user_model import at_least_float32, logits_of


class LogitNormalized(nn.Module):
    """``z / (temperature * |z|)`` of a classifier's logits z: equation 7 of the paper.

    The order of the logits is kept, and their size can no longer grow to make the loss small.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, x: Tensor) -> Tensor:
        """(N, classes) normalised logits."""
        values = at_least_float32(logits_of(self.model(x), len(x)))
        length = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        normalised: Tensor = values / (self.temperature * length.clamp(min=1e-7))
        return normalised
