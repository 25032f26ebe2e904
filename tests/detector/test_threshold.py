"""Thresholds: the guarantee by simulation, the others by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rat_ext.detector.threshold import Rule, upper_bound

GRID = (np.arange(20_000) + 0.5) / 20_000
CURVES = {
    "steep": lambda u: 0.5 * (1 - u) ** 4,
    "flat and good": lambda u: np.full_like(u, 0.03),
    "flat and bad": lambda u: np.full_like(u, 0.052),
    "not monotone": lambda u: 0.06 + 0.05 * np.sin(12 * u),
}
"""The probability of an error at each confidence, which is uniform on (0, 1)."""


def plug_in(confidence: np.ndarray, correct: np.ndarray, target: float) -> float:
    """The laxest threshold whose risk on the same samples is low enough: no guarantee."""
    order = np.argsort(-confidence)
    risk = np.cumsum(~correct[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(risk <= target)
    return confidence[order[good[-1]]] if len(good) else math.inf


@pytest.mark.parametrize("levels", [None, 16], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", CURVES)
def test_the_risk_exceeds_the_target_with_probability_delta_at_most(
    name: str, levels: int | None
) -> None:
    target, delta, runs, n = 0.05, 0.1, 300, 1000
    error = CURVES[name]
    true_risk = np.cumsum(error(GRID)[::-1]) / np.arange(1, len(GRID) + 1)
    rng = np.random.default_rng(0)
    rule = Rule("target_risk", target, delta)

    def exceeds(threshold: float) -> bool:
        accepted = round((1 - threshold) * len(GRID))
        return accepted > 0 and true_risk[accepted - 1] > target

    coverage, exceeded, naive = [], 0, 0
    for _ in range(runs):
        exact = rng.random(n)
        correct = rng.random(n) >= error(exact)
        confidence = np.floor(exact * levels) / levels if levels else exact
        naive += exceeds(min(plug_in(confidence, correct, target), 1))
        try:
            threshold = rule.choose(confidence, correct)
        except ValueError:
            coverage.append(0.0)
            continue
        assert threshold.risk_bound <= target
        exceeded += exceeds(threshold.value)
        coverage.append(1 - threshold.value)
    most = stats.binom.ppf(0.999, runs, delta)
    assert exceeded <= most
    if name == "flat and good":
        assert np.mean(coverage) > 0.8  # of 1
    if name == "steep":
        assert np.mean(coverage) > 0.65  # of 0.84
        assert naive > most or levels  # without a bound it would not hold


def sgr(confidence: np.ndarray, correct: np.ndarray, target: float, delta: float) -> int:
    """How many samples the binary search of SGR accepts (NeurIPS 2017, algorithm 1)."""
    errors = np.cumsum(~correct[np.argsort(-confidence)])
    tests = math.ceil(math.log2(len(errors)))
    low, high, accepted = 1, len(errors), 0
    for _ in range(tests):
        middle = math.ceil((low + high) / 2)
        if upper_bound(errors[middle - 1], middle, delta / tests) <= target:
            low = accepted = middle
        else:
            high = middle
    return accepted


def test_accepts_no_fewer_than_sgr() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = {}, {}
    for name in ("steep", "flat and good"):
        pairs = []
        for _ in range(100):
            confidence = rng.random(1500)
            correct = rng.random(1500) >= CURVES[name](confidence)
            try:
                accepted = Rule("target_risk", 0.05, 0.01).choose(confidence, correct).accepted
            except ValueError:
                accepted = 0
            pairs.append((accepted, sgr(confidence, correct, 0.05, 0.01)))
        ours[name], theirs[name] = np.mean(pairs, axis=0)
    assert ours["steep"] > 0.98 * theirs["steep"]
    # Binary search looks for stricter thresholds where there are too few samples.
    assert ours["flat and good"] > 1.5 * theirs["flat and good"]


def fallback(confidence: np.ndarray, correct: np.ndarray, target: float, delta: float) -> int:
    """How many samples are accepted, one test after the other; with one sample at each value."""
    errors = np.cumsum(~correct[np.argsort(-confidence)])
    starts = math.ceil(math.log2(len(errors)))
    least = math.log(delta / starts) / math.log(1 - target)
    begins = [math.ceil(each - 1e-9) for each in np.linspace(least, len(errors), starts)]
    chances = stats.binom.cdf(errors, np.arange(1, len(errors) + 1), target)
    left, last = 0.0, 0
    for accepted, chance in enumerate(chances, start=1):
        level = left + delta / starts * begins.count(accepted)
        left, last = (level, accepted) if chance <= level else (0.0, last)
    return last


@pytest.mark.parametrize("name", CURVES)
def test_a_start_adds_to_the_level_of_those_that_have_passed(name: str) -> None:
    rng = np.random.default_rng(3)
    thresholds = []
    for n in [60, 100, 1000] + 200 * [300]:
        confidence = rng.random(n)
        correct = rng.random(n) >= CURVES[name](confidence)
        accepted = fallback(confidence, correct, 0.1, 0.1)
        if accepted:
            thresholds.append(Rule("target_risk", 0.1, 0.1).choose(confidence, correct))
            assert thresholds[-1].accepted == accepted
    assert thresholds


def test_where_all_pass_the_bound_is_that_of_delta() -> None:
    confidence, correct = np.random.default_rng(4).random(1000), np.ones(1000, bool)
    threshold = Rule("target_risk", 0.05, 0.01).choose(confidence, correct)
    assert (threshold.accepted, threshold.errors) == (1000, 0)
    assert threshold.risk_bound == pytest.approx(1 - 0.01 ** (1 / 1000), rel=1e-9)


@pytest.mark.parametrize(("errors", "samples"), [(0, 10), (3, 200), (200, 200)])
def test_the_bound_is_clopper_pearsons(errors: int, samples: int) -> None:
    bound = float(upper_bound(errors, samples, 0.02))
    expected = stats.binomtest(errors, samples).proportion_ci(0.96, method="exact").high
    assert bound == pytest.approx(expected)


CONFIDENCES = st.lists(
    st.tuples(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf, math.nan]), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(samples=CONFIDENCES, share=st.sampled_from([0.07, 0.3, 0.5, 0.9, 1.0]))
@pytest.mark.parametrize("criterion", ["coverage", "tpr"])
def test_the_threshold_is_the_strictest(
    criterion: str, samples: list[tuple[float, bool]], share: float
) -> None:
    confidence = np.array([value for value, _ in samples])
    correct = np.array([right for _, right in samples]) & ~np.isnan(confidence)
    counted = correct if criterion == "tpr" else np.ones_like(correct)
    rates = {
        value: (counted & (confidence >= value)).sum() / max(counted.sum(), 1)
        for value in confidence
        if not math.isnan(value)
    }
    good = [value for value, rate in rates.items() if rate >= share - 1e-12]
    rule = Rule(criterion, share, 0.1)
    if not good or not counted.any():
        with pytest.raises(ValueError, match=r"nan|no prediction .* is right"):
            rule.choose(confidence, correct)
        return
    threshold = rule.choose(confidence, correct)
    assert threshold.value == max(good)
    accepted = confidence >= threshold.value
    assert threshold.accepted == accepted.sum()
    assert threshold.errors == (accepted & ~correct).sum()
