"""Choosing the threshold of a confidence: by the risk, coverage or true-positive rate it has."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Threshold(NamedTuple):
    """A threshold, and what it does on the samples that it was chosen on."""

    value: float
    """The least confidence that is accepted."""
    accepted: int
    errors: int
    risk_bound: float


class Candidates(NamedTuple):
    """The thresholds that tell samples apart, strictest first: arrays of the same length."""

    value: NDArray[np.float64]
    accepted: NDArray[np.int64]
    """Samples that reach the threshold: ties are accepted together."""
    errors: NDArray[np.int64]
    """Of these, the wrong predictions."""
    samples: int
    """All of them, also those whose confidence is nan."""
    right: int
    """Of all samples with a confidence, the right predictions."""

    @classmethod
    def of(cls, confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> Candidates:
        known = ~np.isnan(confidence)
        if not known.any():
            raise ValueError(f"the confidence of all {len(confidence)} held-out samples is nan")
        negated, rank = np.unique(-confidence[known], return_inverse=True)
        accepted = np.bincount(rank).cumsum()
        right = np.bincount(rank, weights=correct[known]).cumsum().astype(np.int64)
        return cls(-negated, accepted, accepted - right, len(confidence), int(right[-1]))

    def at(self, index: int, risk_bound: float) -> Threshold:
        return Threshold(
            float(self.value[index]),
            int(self.accepted[index]),
            int(self.errors[index]),
            float(risk_bound),
        )


@dataclass(frozen=True)
class Rule:
    """What a threshold is to do."""

    criterion: str
    """"target_risk", "coverage" or "tpr"."""
    value: float
    delta: float

    @classmethod
    def checked(
        cls, target_risk: float | None, coverage: float | None, tpr: float | None, delta: float
    ) -> Rule:
        asked = {"target_risk": target_risk, "coverage": coverage, "tpr": tpr}
        given = {name: value for name, value in asked.items() if value is not None}
        if len(given) != 1:
            which = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of target_risk, coverage and tpr, not {which}")
        ((criterion, value),) = given.items()
        if not 0 < value <= 1 or (criterion == "target_risk" and value == 1):
            end = "below 1" if criterion == "target_risk" else "at most 1"
            raise ValueError(f"{criterion} is {value}; it must be above 0 and {end}")
        if not 0 < delta < 1:
            raise ValueError(f"delta is {delta}; it must be between 0 and 1")
        return cls(criterion, float(value), float(delta))

    def choose(self, confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> Threshold:
        """The threshold for (N,) confidences, which may be infinite or nan, and their truth.

        Raises:
            ValueError: there is none.
        """
        candidates = Candidates.of(confidence, correct)
        if self.criterion == "target_risk":
            return self._guaranteed(candidates)
        return self._reaching(candidates)

    def anticipate(
        self, confidence: NDArray[np.float64], correct: NDArray[np.bool_], ratio: float
    ) -> float:
        """The threshold to expect of `ratio` times as many samples like these, or the nearest."""
        candidates = Candidates.of(confidence, correct)
        if self.criterion != "target_risk":
            return self._reaching(candidates).value
        bounds = upper_bound(ratio * candidates.errors, ratio * candidates.accepted, self.delta)
        enough = np.flatnonzero(bounds <= self.value)
        return float(candidates.value[enough[-1] if len(enough) else np.argmin(bounds)])

    def _reaching(self, candidates: Candidates) -> Threshold:
        """The strictest threshold with the coverage or the true-positive rate."""
        counts, total = candidates.accepted, candidates.samples
        if self.criterion == "tpr":
            counts, total = candidates.accepted - candidates.errors, candidates.right
            if not total:
                raise ValueError("no prediction on the held-out samples is right: there is no tpr")
        # Rounded first: 0.07 * 100 is just above 7 in floating point, and its ceil would be 8.
        index = int(np.searchsorted(counts, math.ceil(round(self.value * total, 9))))
        if index == len(counts):
            raise ValueError(
                f"no threshold has a coverage of {self.value:g}: the confidence of "
                f"{total - counts[-1]} of {total} held-out samples is nan"
            )
        bound = upper_bound(candidates.errors[index], candidates.accepted[index], self.delta)
        return candidates.at(index, float(bound))

    def _guaranteed(self, candidates: Candidates) -> Threshold:
        """The laxest threshold that is certified to have the target risk.

        The fallback procedure of multiple testing: each start has its share of delta to test the
        thresholds from there on, to the first that fails, and hands it on where none has.
        """
        from scipy.special import bdtr

        # What binary search takes: SGR shares delta among as many tests.
        starts = max(1, math.ceil(math.log2(candidates.samples)))
        share = self.delta / starts
        # With fewer accepted samples, not even the absence of errors would do.
        least, most = math.log(share) / math.log1p(-self.value), candidates.accepted[-1]
        begins = np.arange(0)
        if least <= most:
            begins = np.searchsorted(candidates.accepted, np.linspace(least, most, starts))
        # The chance of so few errors, if the risk were the target.
        chance = bdtr(candidates.errors, candidates.accepted, self.value)
        level, found = 0.0, None
        for begin, end in itertools.pairwise([*begins, len(chance)]):
            level += share
            passes = np.append(chance[begin:end] <= level, False)
            count = int(np.argmin(passes))
            if count:
                found = begin + count - 1, level
            if begin + count < end:
                level = 0.0
        if found:
            index, level = found
            bound = upper_bound(candidates.errors[index], candidates.accepted[index], level)
            return candidates.at(index, float(bound))
        tested = slice(None) if not len(begins) else begins
        bounds = upper_bound(candidates.errors[tested], candidates.accepted[tested], share)
        raise ValueError(
            f"no threshold guarantees a risk of at most {self.value:g} with probability "
            f"{1 - self.delta:g}: the best bound that {candidates.samples:,} held-out samples give "
            f"is {bounds.min():.4g}. Hold out more of them (at least {math.ceil(least):,} must be "
            "accepted, even if none of them is wrong), or raise target_risk or delta"
        )


def upper_bound(errors: Any, samples: Any, delta: float) -> NDArray[np.float64]:
    """One-sided Clopper-Pearson bound: a larger error rate is rejected at level delta."""
    from scipy.special import betaincinv

    errors = np.asarray(errors, np.float64)
    right = samples - errors
    quantile = betaincinv(errors + 1, np.where(right > 0, right, 1), 1 - delta)
    return np.where(right > 0, quantile, 1.0)
