"""The choice among several scores, on the samples that tune them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import metrics
from .._common.loaders import labelled_batches
from .._common.user_model import Model
from ..scores.base import Score
from ..scores.registry import as_score, name_of

AUTO = ("msr", "margin", "energy", "rr-bs")
"""What "auto" chooses among."""


def candidates(score: str | Score | Sequence[str | Score]) -> list[Score]:
    """New scores by these names, or copies of these."""
    if score == "auto":
        score = AUTO
    given = score if isinstance(score, Sequence) and not isinstance(score, str) else [score]
    scores = [as_score(each) for each in given]
    if not scores:
        raise ValueError("score is empty; give at least one")
    return scores


def aurc_of_each(
    model: Model, scores: Sequence[Score], loader: Iterable[Any], progress: bool
) -> list[float]:
    """The AURC of fitted scores on (x, target) batches; nan counts as the least confidence."""
    confidences, rights = [], []
    for bound, x, target in labelled_batches(model, loader, progress, "choose the score"):
        pairs = [score.score_and_predict(bound, x) for score in scores]
        confidences.append(torch.stack([values.double().cpu() for values, _ in pairs]))
        rights.append(torch.stack([prediction.eq(target).cpu() for _, prediction in pairs]))
    confidence = torch.cat(confidences, 1).nan_to_num(-math.inf, math.inf, -math.inf)
    return list(map(metrics.aurc, confidence, torch.cat(rights, 1)))


def label(score: Score) -> str:
    """The name of a score, for a report."""
    return name_of(score) or type(score).__name__
