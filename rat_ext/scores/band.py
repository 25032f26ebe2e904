"""The band of a cascade: which cheap confidences are too close to the threshold to decide by."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .base import ThresholdRule

RESAMPLES = 100
"""Of the bootstrap that tells where the threshold may come to lie."""


def fitted_band(
    cheap: NDArray[np.float64],
    expensive: NDArray[np.float64],
    correct: NDArray[np.bool_],
    threshold: ThresholdRule,
    max_changed: float,
) -> tuple[float, float]:
    """The narrowest band that will do for any threshold which is likely to be chosen.

    Args:
        cheap: (N,) confidences.
        expensive: (N,) confidences of the score that the threshold is compared with.
        correct: (N,) whether the predictions are right.
        threshold: chooses it from confidences of the expensive score.
        max_changed: share of all decisions that the cheap score may change, in [0, 1).
    """
    # The threshold to come is not known but for its spread, of which the band has to take care.
    draws = np.random.default_rng(0).integers(len(correct), size=(RESAMPLES, len(correct)))
    thresholds = [threshold(expensive[draw], correct[draw]) for draw in draws]
    laxest, strictest = np.quantile(thresholds, [0.025, 0.975], method="nearest")
    return narrowest_band(
        cheap,
        rejected=~(expensive >= strictest),
        accepted=expensive >= laxest,
        max_changed=max_changed,
    )


def narrowest_band(
    cheap: NDArray[np.float64],
    *,
    rejected: NDArray[np.bool_],
    accepted: NDArray[np.bool_],
    max_changed: float,
) -> tuple[float, float]:
    """The band of the cheap confidence with the fewest samples in it.

    Above it samples are accepted and below it rejected. At most the share ``max_changed`` of all
    samples is accepted there although ``rejected``, or rejected although ``accepted``. An end of
    the band that is not needed is infinite.

    Args:
        cheap: (N,) confidences; samples where it is nan are left out.
        rejected: (N,) those that should not be accepted unseen.
        accepted: (N,) those that should not be rejected unseen; a sample may be both.
        max_changed: in [0, 1).
    """
    budget = math.floor(max_changed * len(cheap))
    known = ~np.isnan(cheap)
    cheap, rejected, accepted = cheap[known], rejected[known], accepted[known]
    n, order = len(cheap), np.argsort(-cheap, kind="stable")
    cheap, rejected, accepted = cheap[order], rejected[order], accepted[order]
    # Most confident first: [0, begin) is accepted unseen, [begin, end) is the band, and [end, n) is
    # rejected unseen. Ties stay together.
    cuts = np.concatenate([[0], np.flatnonzero(cheap[1:] != cheap[:-1]) + 1, [n]])
    wrong_above = np.concatenate([[0], np.cumsum(rejected)])[cuts]
    wrong_below = np.concatenate([np.cumsum(accepted[::-1])[::-1], [0]])[cuts]
    allowed = wrong_above <= budget
    begins = cuts[allowed]
    ends = cuts[np.searchsorted(-wrong_below, wrong_above[allowed] - budget)]
    best = int(np.argmin(np.maximum(ends - begins, 0)))
    begin = int(begins[best])
    end = max(int(ends[best]), begin)
    low = -math.inf if end == n else math.inf if end == 0 else float(cheap[end - 1])
    high = math.inf if begin == 0 else -math.inf if begin == n else float(cheap[begin])
    return low, high
