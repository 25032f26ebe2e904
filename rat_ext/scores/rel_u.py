"""Rel-U: a score with a matrix learned from held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._common.loaders import labelled_batches
from .._common.user_model import Model, left_alone, logits_of, wide
from .registry import register
from .tuned import TEMPERATURES, TunedLogitScore

if TYPE_CHECKING:
    from typing_extensions import Self


@register("rel-u")
class RelU(TunedLogitScore):
    """Rel-U: ``-p D p^T`` with p the softmax of ``z / T`` and D learned from held-out data.

    Dadalto et al., ICLR 2024 (arXiv 2306.01710), sections 2 and 3: off the diagonal ``D =
    relu(weight * E[p p^T | wrong] - (1 - weight) * E[p p^T | right])``, on it 0. D is scaled to
    norm 1; where it is all zero it is replaced by ones (Gini), as in the authors' code.

    Of several temperatures, fit() chooses by AURC on every second sample with D learned from the
    others, then learns D from all samples.

    Args:
        temperature: one, or several for fit() to choose from; each > 0.
        weight: the paper's lambda, in [0, 1]: how much wrong predictions count.
    """

    def __init__(
        self, temperature: float | Sequence[float] = TEMPERATURES, weight: float = 0.5
    ) -> None:
        super().__init__(temperature)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}; it must be from 0 to 1")
        self.weight = weight
        self.matrix: Tensor | None = None
        """(C, C) float64: D, after fit()."""

    @property
    def needs_fit(self) -> bool:
        return self.matrix is None

    def state(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "weight": self.weight, "matrix": self.matrix}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        options = dict(state)
        matrix = options.pop("matrix")
        score = cls(**options)
        score.matrix = matrix
        return score

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Learn D, and choose the temperature, on (x, target, ...) batches held out.

        Raises:
            ValueError: the predictions there are all right, or all wrong.
        """
        logits, correct = [], []
        for bound, x, target in labelled_batches(model, loader, progress, "fit RelU"):
            with left_alone(bound, x):
                batch = logits_of(bound(x), len(x))
            logits.append(batch.cpu())
            correct.append((batch.argmax(1) == target).cpu())
        all_logits, all_correct = torch.cat(logits), torch.cat(correct)
        if len(self.grid) > 1:
            candidates = [self.at(setting) for setting in self.grid]
            for candidate in candidates:
                candidate._learn(all_logits[::2], all_correct[::2])
            confidences = [candidate.score_logits(all_logits[1::2]) for candidate in candidates]
            self.choose(torch.stack(confidences), all_correct[1::2])
        self._learn(all_logits, all_correct)
        return self

    def _learn(self, logits: Tensor, correct: Tensor) -> None:
        if correct.all() or not correct.any():
            raise ValueError(
                f"RelU learns from right and wrong predictions, but all {len(correct)} held out to "
                f"learn from are {'right' if correct.all() else 'wrong'}; use more data"
            )
        p = (wide(logits) / self.temperature).softmax(1)
        right, wrong = p[correct], p[~correct]
        matrix = self.weight * (wrong.T @ wrong) / len(wrong)
        matrix -= (1 - self.weight) * (right.T @ right) / len(right)
        matrix = matrix.relu().fill_diagonal_(0)
        if not matrix.any():
            matrix = torch.ones_like(matrix).fill_diagonal_(0)
        self.matrix = matrix / matrix.norm()

    def score_logits(self, logits: Tensor) -> Tensor:
        if self.matrix is None:
            raise RuntimeError("RelU is not fitted: call fit(model, loader) with held-out data")
        p = (wide(logits) / self.temperature).softmax(1)
        return -((p @ self.matrix.to(p)) * p).sum(1)
