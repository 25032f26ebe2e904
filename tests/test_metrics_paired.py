"""Differences between confidences on the same samples, and reliability diagrams."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rat_ext import metrics
from rat_ext.metrics.levels import area_under_risk, by_level
from rat_ext.metrics.paired import over_parts


def scored(seed: int, size: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two confidences with most of their noise in common, the second with less; and correct."""
    rng = np.random.default_rng(seed)
    correct = rng.random(size) < 0.8
    common = correct + rng.normal(size=size)
    return common + rng.normal(size=size), common + 0.5 * rng.normal(size=size), correct


def test_a_difference_is_that_of_the_metrics():
    worse, better, correct = scored(0)
    others = {"better": better, "same": worse, "tensor": torch.tensor(better)}
    found = metrics.differences(metrics.aurc, others, worse, correct, n_boot=100)
    expected = metrics.aurc(better, correct) - metrics.aurc(worse, correct)
    assert list(found) == list(others)
    assert found["better"].value == pytest.approx(expected)
    assert found["better"].low < expected < found["better"].high < 0
    assert found["same"] == (0, 0, 0)
    assert found["tensor"] == found["better"]
    again = metrics.differences(metrics.aurc, others, worse, correct, n_boot=100)
    assert again == found
    assert metrics.differences(metrics.aurc, others, worse, correct, n_boot=100, seed=1) != found
    trapezoid = metrics.differences(metrics.aurc, others, worse, correct, variant="trapezoid")
    assert trapezoid["better"].value != found["better"].value


def test_pairing_makes_the_interval_narrower():
    worse, better, correct = scored(1)
    (paired,) = metrics.differences(metrics.auroc, {"": better}, worse, correct).values()
    alone = [metrics.auroc(each, correct, n_boot=1000) for each in (worse, better)]
    apart = np.hypot(*(each.high - each.low for each in alone))
    assert paired.high - paired.low < 0.8 * apart


def test_intervals_hold_all_differences_as_often_as_they_say():
    # With u uniform and P(right) = u, AURC is 1/4 by u, and 1/2 by a number drawn without it.
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        u = rng.random(200)
        correct = rng.random(200) < u
        others = {"1": rng.random(200), "2": rng.random(200), "3": rng.random(200), "u": 2 * u}
        found = metrics.differences(
            metrics.aurc, others, u, correct, n_boot=100, level=0.8, seed=trial
        )
        truth = {"1": 0.25, "2": 0.25, "3": 0.25, "u": 0}
        held += all(e.low <= truth[name] <= e.high for name, e in found.items())
    assert 0.72 <= held / 200 <= 0.88


def test_resamples_where_the_metric_is_undefined_are_left_out():
    correct = np.arange(20) > 0
    worse = np.roll(np.arange(20), 3)
    (found,) = metrics.differences(metrics.auroc, {"": np.arange(20)}, worse, correct).values()
    assert np.isfinite(found).all()
    (none,) = metrics.differences(metrics.auroc, {"": worse}, worse, np.ones(20), n_boot=5).values()
    assert np.isnan(none).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_boot": 1}, ValueError, "n_boot is 1; differences need at least 2"),
        ({"level": 95}, ValueError, "level is 95; it must be between 0 and 1"),
        ({"metric": functools.partial(metrics.aurc)}, TypeError, "one of rat_ext.metrics"),
        ({"confidences": {"a": [1]}}, ValueError, "confidence has 1 samples and correct has 3"),
    ],
)
def test_errors_of_differences(options, error, message):
    arguments = {"metric": metrics.aurc, "confidences": {"a": [1, 2, 3]}} | options
    metric, confidences = arguments.pop("metric"), arguments.pop("confidences")
    with pytest.raises(error, match=message):
        metrics.differences(metric, confidences, [1, 2, 2], [1, 0, 1], **arguments)


def test_parts_are_resampled_together():
    rng = np.random.default_rng(3)
    confidence, correct = rng.random(30), rng.random(30) < 0.5
    index = [np.array([0, 3, 3, 7, 20]), np.arange(5, 30)]
    parts = [(i, by_level(area_under_risk, confidence[i], correct[i])) for i in index]
    rows = rng.integers(30, size=30)
    taken = [np.concatenate([i[i == row] for row in rows]) for i in index]
    for every, some in ((slice(None), index), (rows, taken)):
        expected = [metrics.aurc(confidence[i], correct[i]) for i in some]
        assert over_parts(30, parts).of(every) == pytest.approx(np.mean(expected))


@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1), st.integers(1, 20))
def test_reliability_is_what_ece_sums(samples, n_bins):
    confidence, correct = map(np.array, zip(*samples, strict=True))
    found = metrics.reliability(confidence, correct, n_bins=n_bins)
    # Of two classes the first is predicted, and right or not.
    probabilities = np.stack([confidence, 1 - confidence], 1)
    assert found.ece == pytest.approx(metrics.ece(probabilities, ~correct, n_bins=n_bins))
    assert found.samples.sum() == len(correct)
    assert (found.samples * found.accuracy).sum() == pytest.approx(correct.sum())
    assert (found.samples * found.confidence).sum() == pytest.approx(confidence.sum())
    assert (np.diff(found.confidence) > 0).all()


def test_errors_of_reliability():
    with pytest.raises(ValueError, match="confidence must be a probability"):
        metrics.reliability([1.5], [1])
    with pytest.raises(ValueError, match="confidence must be a probability"):
        metrics.reliability([np.nan], [1])
    with pytest.raises(ValueError, match="n_bins is 0"):
        metrics.reliability([0.5], [1], n_bins=0)
    with pytest.raises(ValueError, match=r"expected \(N,\) each"):
        metrics.reliability([[0.5]], [1])
