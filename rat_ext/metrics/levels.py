"""Statistics of how many predictions are right and wrong at each level of confidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bootstrap import Floats, Rows, Statistic, Values, as_array, check_lengths


class Levels(NamedTuple):
    """How many predictions are right and wrong at each level of confidence, the highest first.

    Tied samples share a level, and no level is empty. Every metric of (confidence, correct) is a
    function of these counts.
    """

    right: NDArray[np.intp]
    """(K,)"""
    wrong: NDArray[np.intp]
    """(K,)"""

    @property
    def samples(self) -> int:
        return int(self.right.sum() + self.wrong.sum())

    def of_errors(self) -> Levels:
        """The same for the detection of wrong predictions: the least confident first."""
        return Levels(self.wrong[::-1], self.right[::-1])


def by_level(statistic: Callable[[Levels], Any], confidence: Values, correct: Values) -> Statistic:
    """A statistic of levels as one of samples. Sorts once; a resample only has other counts."""
    values, right = as_array(confidence), as_array(correct)
    for name, array in (("confidence", values), ("correct", right)):
        if array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}; expected (N,), one value per sample")
    check_lengths("confidence", values, "correct", right)
    if nans := int(np.isnan(values).sum()):
        raise ValueError(
            f"confidence is nan for {nans} of {len(values)} samples; drop them, or rank them last "
            "with confidence.nan_to_num(nan=-math.inf, posinf=math.inf)"
        )
    if not np.isin(right, (0, 1)).all():
        raise ValueError(
            "correct must be bool or 0/1; compare predictions with targets first: "
            "prediction == target"
        )
    distinct, rank = np.unique(values, return_inverse=True)
    levels = len(distinct)
    cell = levels - 1 - rank + levels * right.astype(bool)

    def of(rows: Rows) -> Any:
        wrong, right = np.bincount(cell[rows], minlength=2 * levels).reshape(2, levels)
        present = wrong + right > 0
        return statistic(Levels(right[present], wrong[present]))

    return Statistic(len(values), of)


def selective_risk(levels: Levels) -> Floats:
    """(N,) selective risk, most confident sample first.

    The n-th accepted sample is a random one of its tie, so it is wrong with the tie's error rate;
    by linearity the expected number of errors is the running sum of these rates.
    """
    size = levels.right + levels.wrong
    errors = np.cumsum(np.repeat(levels.wrong / size, size))
    return errors / np.arange(1, len(errors) + 1)


def risk_at(coverage: float) -> Callable[[Levels], float]:
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}; it must be above 0 and at most 1")

    def risk(levels: Levels) -> float:
        # Rounded first: 0.07 * 100 is just above 7 in floating point, and its ceil would be 8.
        accepted = math.ceil(round(coverage * levels.samples, 9))
        return float(selective_risk(levels)[max(accepted, 1) - 1])

    return risk


def area_under_risk(levels: Levels) -> float:
    return float(selective_risk(levels).mean())


def trapezoid_area(levels: Levels) -> float:
    accepted = np.cumsum(levels.right + levels.wrong)
    risk = np.cumsum(levels.wrong) / accepted
    inner = (np.diff(accepted) * (risk[1:] + risk[:-1]) / 2).sum()
    return float(inner + (accepted[0] - 1) * risk[0]) / levels.samples


def excess_area(levels: Levels) -> float:
    """The best ordering has risk 0 while it accepts right predictions, then a wrong one a step."""
    right, samples = levels.right.sum(), levels.samples
    best = np.arange(1, samples - right + 1) / np.arange(right + 1, samples + 1)
    return area_under_risk(levels) - float(best.sum()) / samples


def area_under_generalized_risk(levels: Levels) -> float:
    """Each accepted sample has the wrong ones above it before it, and half of those tied."""
    above = np.cumsum(levels.wrong) - levels.wrong / 2
    return float(((levels.right + levels.wrong) * above).sum()) / levels.samples**2


def area_under_roc(levels: Levels) -> float:
    above = np.cumsum(levels.right) - levels.right / 2
    pairs = levels.right.sum() * levels.wrong.sum()
    return float((levels.wrong * above).sum() / pairs) if pairs else math.nan


def average_precision(levels: Levels) -> float:
    accepted = np.cumsum(levels.right + levels.wrong)
    precision = np.cumsum(levels.right) / accepted
    if not _both(levels):
        return math.nan
    return float((levels.right * precision).sum() / levels.right.sum())


def false_positive_rate(levels: Levels, tpr: float) -> float:
    if not _both(levels):
        return math.nan
    accepted = np.cumsum(levels.right)
    threshold = np.argmax(accepted / accepted[-1] >= tpr)
    return float(levels.wrong[: threshold + 1].sum() / levels.wrong.sum())


def _both(levels: Levels) -> bool:
    """There are right and wrong predictions, without which a metric of two classes is undefined."""
    return bool(levels.right.any() and levels.wrong.any())
