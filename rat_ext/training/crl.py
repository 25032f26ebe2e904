"""Correctness ranking (Moon et al., ICML 2020): confidence follows how often a sample was right."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.user_model import at_least_float32


class CorrectnessHistory:
    """How often each of N training samples was seen, and predicted right then."""

    def __init__(self, samples: int) -> None:
        self.counts = torch.zeros(2, samples)
        """(2, N): seen, and right."""
        self._epoch = torch.zeros_like(self.counts)

    def shares(self, index: Tensor) -> Tensor:
        """(n,) the share of right predictions of these samples until this epoch; 0 if unseen."""
        seen, right = self.counts[:, index]
        share: Tensor = right / seen.clamp(min=1)
        return share

    def see(self, index: Tensor, right: Tensor) -> None:
        """Take note of predictions in this epoch."""
        self._epoch[:, index] += torch.stack([torch.ones_like(right.float()), right.float()]).cpu()

    def end_epoch(self) -> Tensor:
        """(2, N) what was seen in it: for all processes to add, by `add`."""
        seen, self._epoch = self._epoch, torch.zeros_like(self._epoch)
        return seen

    def add(self, seen: Tensor) -> None:
        self.counts += seen


def correctness_ranking(logits: Tensor, shares: Tensor) -> Tensor:
    """The mean over neighbours in the batch of ``max(0, -g (k_i - k_j) + |c_i - c_j|)``.

    Equation 2 of the paper: k is the largest softmax probability, c the share of right predictions,
    and g the sign of ``c_i - c_j``. The neighbour of the last sample is the first.

    Args:
        logits: (N, C).
        shares: (N,) in [0, 1].
    """
    confidence = at_least_float32(logits).softmax(1).amax(1)
    difference = shares - shares.roll(-1)
    lead = confidence - confidence.roll(-1)
    return (difference.abs() - difference.sign() * lead).clamp(min=0).mean()
