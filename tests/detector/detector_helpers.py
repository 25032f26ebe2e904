"""What the tests of detectors share: a model, held-out data, and a detector fitted on them."""

from __future__ import annotations

import torch
from helpers import RowExact, uniform
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rat_ext import Detector, scores

FAST = {"temperature": 1.0}
"""Options for a score that is to have nothing to fit."""


class Counting(RowExact):
    """Counts the rows that go through it, and drops some out in training."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.norm = nn.BatchNorm1d(4).double()  # a state dict with integers without dimensions
        self.dropout = nn.Dropout(0.5)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.dropout(super().forward(x))


def labelled(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, and targets that differ from the predictions where these are close to a tie."""
    x = uniform(n, 12, seed=seed)
    with torch.no_grad():
        logits = RowExact()(x)
    first, second = logits.topk(2).values.unbind(1)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(n, generator=generator) < 0.6 * (second - first).exp()
    target = logits.argmax(1)
    return x, torch.where(wrong, (target + 1) % 4, target)


def loader(n: int = 400, seed: int = 0, **options: object) -> DataLoader:
    return DataLoader(TensorDataset(*labelled(n, seed)), **{"batch_size": 64, **options})


def fit(score: str | scores.Score = "msr", model: nn.Module | None = None, **options) -> Detector:
    criterion = {} if {"target_risk", "tpr"} & options.keys() else {"coverage": 0.7}
    options = {**criterion, **options, "progress": False}
    return Detector.fit(model or Counting(), loader(), score, **options)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Equal to the bit, nan included."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))
