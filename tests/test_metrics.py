"""The metrics against brute force, scikit-learn and values worked out by hand."""

import functools
import inspect
import itertools
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import multiclass_calibration_error

from rat_ext import metrics
from rat_ext import torchmetrics as classes

TIED = [-math.inf, -1.0, 0.0, 0.5, math.inf]
FROM_TIED = st.sampled_from(TIED)


@st.composite
def samples(draw, confidences=FROM_TIED, max_size=5, both=False):
    """(confidence, correct), with ties; with both right and wrong predictions if asked."""
    n = draw(st.integers(2 if both else 1, max_size))
    confidence = draw(st.lists(confidences, min_size=n, max_size=n))
    correct = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    if both:
        correct[:2] = True, False
    return np.array(confidence), np.array(correct)


@st.composite
def predictions(draw, max_size=12):
    """(probabilities, target) of 2 to 4 classes, with ties, zeros and ones."""
    n, classes = draw(st.integers(1, max_size)), draw(st.integers(2, 4))
    weights = st.lists(st.integers(0, 3), min_size=classes, max_size=classes).filter(any)
    rows = np.array(draw(st.lists(weights, min_size=n, max_size=n)), float)
    target = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return rows / rows.sum(1, keepdims=True), np.array(target)


def risks_of_all_tie_breaks(confidence, correct):
    """(n!, n) selective risks: each permutation of the samples, stably sorted by confidence."""
    n = len(correct)
    orders = []
    for permutation in itertools.permutations(range(n)):
        order = sorted(permutation, key=lambda i: -confidence[i])
        orders.append(np.cumsum(~correct[order]) / np.arange(1, n + 1))
    return np.array(orders)


@settings(deadline=None)
@given(samples())
def test_ties_are_the_mean_over_all_tie_breaks(data):
    confidence, correct = data
    n = len(correct)
    risk = risks_of_all_tie_breaks(confidence, correct).mean(0)
    curve = metrics.risk_coverage_curve(confidence, correct)
    np.testing.assert_allclose(curve.risk, risk)
    np.testing.assert_allclose(curve.coverage, np.arange(1, n + 1) / n)
    assert metrics.aurc(confidence, correct) == pytest.approx(risk.mean())
    for k in range(1, n + 1):
        accuracy = metrics.accuracy_at_coverage(confidence, correct, k / n)
        assert accuracy == pytest.approx(1 - risk[k - 1])
        assert metrics.risk_at_coverage(confidence, correct, k / n) == pytest.approx(risk[k - 1])
    # The generalized risk starts at 0, and its lines are between the coverages 0, 1/N, ..., 1.
    generalized = np.concatenate([[0], risk * curve.coverage])
    area = sum(generalized[1:] + generalized[:-1]) / 2 / n
    assert metrics.augrc(confidence, correct) == pytest.approx(area)
    for allowed in (0, 0.3, 0.5, *risk.clip(0, 1)):
        reached = [k / n for k in range(1, n + 1) if risk[k - 1] <= allowed + 1e-9]
        assert metrics.coverage_at_risk(confidence, correct, allowed) == max(reached, default=0)


@settings(deadline=None)
@given(samples(max_size=12, both=True))
def test_augrc_is_what_its_paper_says_of_auroc_and_accuracy(data):
    confidence, correct = data
    accuracy, auroc = correct.mean(), metrics.auroc(confidence, correct)
    expected = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert metrics.augrc(confidence, correct) == pytest.approx(expected)


@settings(deadline=None)
@given(samples())
def test_e_aurc_is_the_excess_over_the_best_of_all_orderings(data):
    confidence, correct = data
    best = risks_of_all_tie_breaks(np.zeros(len(correct)), correct).mean(1).min()
    excess = metrics.aurc(confidence, correct) - best
    assert metrics.e_aurc(confidence, correct) == pytest.approx(excess, abs=1e-12)


@settings(deadline=None)
@given(samples(max_size=12, both=True))
def test_auroc_counts_a_tie_one_half(data):
    confidence, correct = data
    right, wrong = confidence[correct][:, None], confidence[~correct][None]
    wins = np.where(right == wrong, 0.5, right > wrong)
    assert metrics.auroc(confidence, correct) == pytest.approx(wins.mean())


@settings(deadline=None)
@given(samples(st.floats(-1e3, 1e3), max_size=20, both=True))
def test_gives_what_scikit_learn_gives(data):
    confidence, correct = data
    auroc = roc_auc_score(correct, confidence)
    assert metrics.auroc(confidence, correct) == pytest.approx(auroc)
    success = average_precision_score(correct, confidence)
    assert metrics.aupr_success(confidence, correct) == pytest.approx(success)
    error = average_precision_score(~correct, -confidence)
    assert metrics.aupr_error(confidence, correct) == pytest.approx(error)


@settings(deadline=None)
@given(samples(max_size=12, both=True), st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]))
def test_fpr_is_that_of_the_strictest_threshold_that_reaches_the_tpr(data, tpr):
    confidence, correct = data
    for positive, score, label in (
        ("correct", confidence, correct),
        ("error", -confidence, ~correct),
    ):
        for threshold in sorted(set(score), reverse=True):
            if (score[label] >= threshold).mean() >= tpr:
                break
        fpr = (score[~label] >= threshold).mean()
        assert metrics.fpr_at_tpr(confidence, correct, tpr, positive=positive) == fpr


@settings(deadline=None)
@given(samples(max_size=12, both=True), st.randoms(use_true_random=False))
def test_only_the_order_of_the_confidences_counts(data, random):
    confidence, correct = data
    shuffled = list(range(len(correct)))
    random.shuffle(shuffled)
    stretched = np.searchsorted(TIED, confidence) ** 3
    same = metrics.summary(stretched[shuffled], correct[shuffled])
    assert metrics.summary(confidence, correct) == pytest.approx(same)
    trapezoid = metrics.aurc(stretched[shuffled], correct[shuffled], variant="trapezoid")
    assert metrics.aurc(confidence, correct, variant="trapezoid") == pytest.approx(trapezoid)


def test_a_constant_confidence_knows_nothing():
    correct = np.arange(10) >= 3
    for constant in (0.0, math.inf, -math.inf):
        confidence = np.full(10, constant)
        assert metrics.aurc(confidence, correct) == pytest.approx(0.3)
        assert metrics.aurc(confidence, correct, variant="trapezoid") == pytest.approx(0.27)
        assert metrics.auroc(confidence, correct) == 0.5
        assert metrics.fpr_at_tpr(confidence, correct) == 1.0
        assert metrics.accuracy_at_coverage(confidence, correct, 0.1) == pytest.approx(0.7)


def test_fpr_at_a_threshold_on_a_straight_part_of_the_roc_curve():
    confidence, correct = [2, 2, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]
    assert metrics.fpr_at_tpr(confidence, correct, 0.5) == pytest.approx(2 / 3)


def test_a_perfect_and_the_worst_ordering():
    correct = np.array([True, True, True, False])
    perfect, worst = np.array([4, 3, 2, 1]), np.array([1, 2, 3, 4])
    assert metrics.aurc(perfect, correct) == 1 / 16
    assert metrics.e_aurc(perfect, correct) == 0
    assert metrics.fpr_at_tpr(perfect, correct) == 0
    assert metrics.auroc(perfect, correct) == metrics.aupr_error(perfect, correct) == 1
    assert metrics.auroc(worst, correct) == 0
    assert metrics.aurc(worst, correct) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


@settings(deadline=None)
@given(samples(max_size=12))
def test_without_ties_the_trapezoid_is_the_integral_of_the_whole_curve(data):
    _, correct = data
    coverage, risk = metrics.risk_coverage_curve(range(len(correct)), correct)
    integral = sum(np.diff(coverage) * (risk[1:] + risk[:-1]) / 2)
    value = metrics.aurc(range(len(correct)), correct, variant="trapezoid")
    assert value == pytest.approx(integral)


def test_the_trapezoid_steps_over_ties():
    confidence, correct = [2, 2, 1, 0, 0], [1, 0, 0, 1, 1]
    # Thresholds reach coverages 2/5, 3/5 and 1 with risks 1/2, 2/3 and 2/5.
    expected = 1 / 5 * 1 / 2 + 1 / 5 * (1 / 2 + 2 / 3) / 2 + 2 / 5 * (2 / 3 + 2 / 5) / 2
    assert metrics.aurc(confidence, correct, variant="trapezoid") == pytest.approx(expected)


def test_coverage_is_reached_with_as_few_samples_as_possible():
    confidence, correct = -np.arange(100), np.arange(100) < 7
    assert metrics.accuracy_at_coverage(confidence, correct, 0.07) == 1
    assert metrics.accuracy_at_coverage(confidence, correct, 0.0701) == pytest.approx(7 / 8)
    assert metrics.accuracy_at_coverage(confidence, correct, 1e-12) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_give_what_arrays_give(dtype):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randn(200, generator=generator).to(dtype)
    correct = torch.rand(200, generator=generator) < 0.8
    expected = metrics.summary(confidence.double().numpy(), correct.numpy())
    assert list(expected) == [
        "accuracy",
        "aurc",
        "e_aurc",
        "augrc",
        "auroc",
        "aupr_success",
        "aupr_error",
        "fpr95",
    ]
    assert metrics.summary(confidence.requires_grad_(), correct.int()) == expected
    assert expected["accuracy"] == pytest.approx(correct.double().mean().item())
    assert expected["fpr95"] == metrics.fpr_at_tpr(confidence, correct)
    assert all(type(value) is float for value in expected.values())


EVERY = [
    metrics.aurc,
    functools.partial(metrics.aurc, variant="trapezoid"),
    metrics.e_aurc,
    metrics.augrc,
    functools.partial(metrics.accuracy_at_coverage, coverage=0.7),
    functools.partial(metrics.risk_at_coverage, coverage=0.7),
    functools.partial(metrics.coverage_at_risk, risk=0.15),
    metrics.auroc,
    metrics.aupr_success,
    metrics.aupr_error,
    metrics.fpr_at_tpr,
]
CALIBRATION = [metrics.ece, metrics.brier_score, metrics.nll]


def exactly(values):
    return pytest.approx(values, rel=0, abs=0, nan_ok=True)


@settings(deadline=None)
@given(samples(max_size=12), predictions(), st.integers(0, 99))
def test_a_draw_is_the_metric_on_the_repeated_rows(ranking, probabilistic, seed):
    """On ties, too, of which a resample may lack some."""
    for cases, data in ((EVERY, ranking), (CALIBRATION, probabilistic)):
        n = len(data[0])
        rows = np.random.default_rng(seed).integers(n, size=n)
        repeated = [each[rows] for each in data]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is undefined and set to nan")
            for metric in cases:
                expected = metric(*repeated)
                _, *interval = metric(*data, n_boot=1, seed=seed)
                assert interval == exactly([expected, expected]), metric
            summary = metrics.summary(*ranking, n_boot=1, seed=seed) if cases is EVERY else {}
            for name, expected in metrics.summary(*repeated).items() if summary else ():
                assert summary[name].low == exactly(expected), name


@settings(deadline=None)
@given(samples(max_size=12), predictions(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_count(ranking, probabilistic, random):
    for cases, data in ((EVERY, ranking), (CALIBRATION, probabilistic)):
        shuffled = list(range(len(data[0])))
        random.shuffle(shuffled)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is undefined and set to nan")
            for metric in cases:
                value = metric(*data)
                same = metric(*(each[shuffled] for each in data))
                # Levels are counted; means over the samples are rounded in their order.
                expected = exactly(value) if cases is EVERY else pytest.approx(value)
                assert same == expected, metric


@pytest.mark.parametrize("metric", EVERY)
def test_bootstrap_interval(metric):
    rng = np.random.default_rng(1)
    correct = rng.random(300) < 0.8
    confidence = rng.normal(size=300) + correct
    value, low, high = estimate = metric(confidence, correct, n_boot=60)
    assert value == metric(confidence, correct)
    assert low < value < high
    assert estimate == metric(confidence, correct, n_boot=60)
    assert estimate != metric(confidence, correct, n_boot=60, seed=1)
    narrow = metric(confidence, correct, n_boot=60, level=0.5)
    assert low < narrow.low < narrow.high < high


@pytest.mark.parametrize("metric", EVERY)
def test_the_interval_is_that_of_the_metric_on_resamples(metric):
    rng = np.random.default_rng(4)
    confidence, correct = rng.integers(0, 12, 25), rng.random(25) < 0.6
    resamples = np.random.default_rng(7)
    draws = [resamples.integers(25, size=25) for _ in range(30)]
    values = [metric(confidence[i], correct[i]) for i in draws]
    _, *interval = metric(confidence, correct, n_boot=30, level=0.8, seed=7)
    assert interval == pytest.approx(np.quantile(values, [0.1, 0.9]))


def test_all_intervals_of_the_summary_are_of_the_same_resamples():
    rng = np.random.default_rng(2)
    confidence, correct = rng.normal(size=50), rng.random(50) < 0.7
    for options in ({}, {"seed": 3}, {"level": 0.5}):
        summary = metrics.summary(confidence, correct, n_boot=20, **options)
        assert summary["aurc"] == metrics.aurc(confidence, correct, n_boot=20, **options)
        assert summary["auroc"] == metrics.auroc(confidence, correct, n_boot=20, **options)


def test_help_tells_the_options_and_those_of_the_bootstrap():
    signature = inspect.signature(metrics.fpr_at_tpr)
    names = ["confidence", "correct", "tpr", "positive", "n_boot", "level", "seed"]
    assert list(signature.parameters) == names
    assert signature.bind([1, 2], [0, 1], 0.9, n_boot=3).args[2] == 0.9
    assert "``n_boot`` resamples" in metrics.fpr_at_tpr.__doc__
    assert metrics.fpr_at_tpr.__name__ == "fpr_at_tpr"


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    # With u uniform and P(right) = u, the risk at coverage c is c / 2, and its mean is 1 / 4.
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        confidence = rng.random(200)
        correct = rng.random(200) < confidence
        _, low, high = metrics.aurc(confidence, correct, n_boot=100, level=0.9, seed=trial)
        held += low <= 0.25 <= high
    assert 0.84 <= held / 200 <= 0.95


def test_resamples_without_errors_are_left_out():
    correct = np.arange(20) > 0  # a third of the resamples have no error
    estimate = metrics.auroc(np.arange(20), correct, n_boot=50)
    assert estimate == (1, 1, 1)


@pytest.mark.parametrize("correct", [[1, 1, 1], [0, 0, 0]])
@pytest.mark.parametrize("metric", EVERY[-4:])
def test_undefined_metrics_are_nan_with_a_warning(metric, correct):
    with pytest.warns(RuntimeWarning, match="undefined") as warned:
        assert math.isnan(metric([3, 1, 2], correct))
    assert warned[0].filename == __file__  # the line of the caller
    with pytest.warns(RuntimeWarning, match="undefined"):
        assert all(map(math.isnan, metric([3, 1, 2], correct, n_boot=3)))


def test_risk_metrics_are_defined_without_errors_and_without_right_ones():
    assert metrics.aurc([1, 2], [True, True]) == metrics.e_aurc([1, 2], [True, True]) == 0
    assert metrics.aurc([1, 2], [False, False]) == 1
    assert metrics.e_aurc([1, 2], [False, False]) == 0
    assert metrics.augrc([1, 2], [True, True]) == 0
    assert metrics.augrc([1, 2], [False, False]) == 0.5
    assert metrics.coverage_at_risk([1, 2], [True, True], 0) == 1
    assert metrics.coverage_at_risk([1, 2], [False, False], 0.99) == 0
    assert metrics.coverage_at_risk([1, 2], [False, False], 1) == 1


@pytest.mark.parametrize("right", [True, False])
def test_one_sample(right):
    assert metrics.aurc([3], [right]) == metrics.risk_at_coverage([3], [right], 0.5) == 1 - right
    assert metrics.augrc([3], [right]) == (1 - right) / 2
    assert metrics.coverage_at_risk([3], [right], 0.5) == right
    probabilities, target = [[0.25, 0.75]], [int(right)]
    probability = 0.75 if right else 0.25
    assert metrics.ece(probabilities, target) == abs(right - 0.75)
    assert metrics.brier_score(probabilities, target) == 2 * (1 - probability) ** 2
    assert metrics.nll(probabilities, target) == pytest.approx(-math.log(probability))


def test_the_largest_coverage_counts_where_the_risk_falls_again():
    correct = [1, 0, 1, 1, 1, 0, 0]  # risks 0, 1/2, 1/3, 1/4, 1/5, 1/3, 3/7
    assert metrics.coverage_at_risk(-np.arange(7), correct, 0.25) == 5 / 7
    assert metrics.coverage_at_risk(-np.arange(7), correct, 1 / 3) == 6 / 7
    # A tie of three, one of them wrong: its risk is 1/3 in floating point, or a rounding more.
    assert metrics.coverage_at_risk(np.zeros(21), np.arange(21) % 3 > 0, 1 / 3) == 1


@settings(deadline=None)
@given(predictions(), st.integers(1, 12))
def test_ece_averages_the_gap_over_bins_closed_above(data, n_bins):
    probabilities, target = data
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == target
    expected = 0.0
    for m in range(1, n_bins + 1):
        inside = ((m - 1) / n_bins < confidence) & (confidence <= m / n_bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert metrics.ece(probabilities, target, n_bins=n_bins) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    # 0.7 and 0.75, and 0.7 and 0.65: with ten bins the first pair is apart, the second together.
    for other, together in ((0.75, False), (0.65, True)):
        probabilities, target = [[0.7, 0.3], [other, 1 - other]], [0, 1]
        gaps = 0.3, -other
        expected = abs(sum(gaps)) / 2 if together else sum(map(abs, gaps)) / 2
        assert metrics.ece(probabilities, target, n_bins=10) == pytest.approx(expected)


@settings(deadline=None)
@given(predictions())
def test_brier_score_and_nll_are_their_formulas_and_scikit_learn_s(data):
    probabilities, target = data
    n, classes = probabilities.shape
    brier = log = 0.0
    for p, y in zip(probabilities, target, strict=True):
        brier += sum((p[c] - (c == y)) ** 2 for c in range(classes)) / n
        log += (math.inf if p[y] == 0 else -math.log(p[y])) / n
    assert metrics.brier_score(probabilities, target) == pytest.approx(brier, abs=1e-12)
    assert metrics.nll(probabilities, target) == pytest.approx(log, abs=1e-12)
    labels = range(classes)
    theirs = brier_score_loss(target, probabilities, labels=labels, scale_by_half=False)
    assert metrics.brier_score(probabilities, target) == pytest.approx(theirs, abs=1e-12)
    if math.isfinite(log):  # scikit-learn bounds the probabilities away from 0
        theirs = log_loss(target, probabilities, labels=labels)
        assert metrics.nll(probabilities, target) == pytest.approx(theirs, abs=1e-12)


def softmax_and_target(n=300, classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.div(2).softmax(1), 1, generator=generator)[:, 0]
    return logits.softmax(1), target


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_ece_gives_what_torchmetrics_gives(n_bins):
    probabilities, target = softmax_and_target()
    theirs = multiclass_calibration_error(probabilities, target, 5, n_bins=n_bins, norm="l1")
    assert metrics.ece(probabilities, target, n_bins=n_bins) == pytest.approx(theirs.item())


@pytest.mark.parametrize("metric", CALIBRATION)
def test_calibration_intervals(metric):
    probabilities, target = softmax_and_target()
    value, low, high = metric(probabilities, target, n_boot=60)
    assert low < value < high
    resamples = np.random.default_rng(0)
    draws = [resamples.integers(300, size=300) for _ in range(60)]
    values = [metric(probabilities[i], target[i]) for i in draws]
    assert (low, high) == pytest.approx(np.quantile(values, [0.025, 0.975]))
    assert metric(probabilities.half(), target.int()) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("right", [True, False])
def test_certain_and_all_right_or_all_wrong(right):
    target = np.array([0, 2, 1, 1])
    probabilities = np.eye(3)[target if right else (target + 1) % 3]
    assert metrics.ece(probabilities, target) == (0 if right else 1)
    assert metrics.brier_score(probabilities, target) == (0 if right else 2)
    assert metrics.nll(probabilities, target) == (0 if right else math.inf)
    assert not math.copysign(1, metrics.nll(probabilities, target)) < 0


def test_an_interval_of_infinite_draws_is_infinite():
    probabilities = np.full((50, 2), 0.5)
    probabilities[0] = 1, 0
    estimate = metrics.nll(probabilities, np.ones(50), n_boot=100)
    assert estimate == (math.inf, pytest.approx(math.log(2)), math.inf)  # a third lack the first


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, math.nan], [1, 0], "nan for 1 of 2 samples"),
        ([0.5, 0.1], [1, 0, 1], "confidence has 2 samples and correct has 3"),
        ([[0.5, 0.1]], [1, 0], r"confidence has shape \(1, 2\)"),
        ([0.5, 0.1], 1, r"correct has shape \(\)"),
        ([], [], "empty"),
        ([0.5, 0.1], [1, 2], "prediction == target"),
        ([0.5, 0.1], [1, 0.5], "prediction == target"),
    ],
)
@pytest.mark.parametrize("metric", [metrics.risk_coverage_curve, metrics.summary, *EVERY])
def test_bad_input(metric, confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        metric(confidence, correct)


@pytest.mark.parametrize(
    ("probabilities", "target", "message"),
    [
        ([[0.5, math.nan], [0.5, 0.5]], [1, 0], "probabilities is nan for 1 of 2 samples"),
        ([0.5, 0.5], [1, 0], r"probabilities has shape \(2,\); expected \(N, C\)"),
        ([[1.0], [1.0]], [0, 0], r"probabilities has shape \(2, 1\)"),
        ([[0.5, 0.5]], [[0]], r"target has shape \(1, 1\)"),
        ([[0.5, 0.5]], [1, 0], "probabilities has 1 samples and target has 2"),
        (np.empty((0, 2)), [], "probabilities and target are empty"),
        ([[2.0, -1.0]], [0], r"logits.softmax\(1\)"),
        ([[0.5, 0.52]], [0], r"logits.softmax\(1\)"),
        ([[0.5, 0.48]], [0], r"logits.softmax\(1\)"),
        ([[0.5, 0.5]], [2], "whole numbers from 0 to 1"),
        ([[0.5, 0.5]], [-1], "whole numbers from 0 to 1"),
        ([[0.5, 0.5]], [0.5], "whole numbers from 0 to 1"),
        ([[0.5, 0.5]], [math.nan], "whole numbers from 0 to 1"),
    ],
)
@pytest.mark.parametrize("metric", CALIBRATION)
def test_bad_probabilities(metric, probabilities, target, message):
    with pytest.raises(ValueError, match=message):
        metric(probabilities, target)
    assert metric([[0.5, 0.505]], [0]) >= 0  # rounded, as half precision is


def test_bad_number_of_bins():
    with pytest.raises(ValueError, match="n_bins is 0; it must be at least 1"):
        metrics.ece([[0.5, 0.5]], [0], n_bins=0)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        (metrics.aurc, {"variant": "median"}, "'mean' or 'trapezoid'"),
        (metrics.aurc, {"n_boot": -1}, "n_boot is -1"),
        (metrics.auroc, {"n_boot": 9, "level": 95}, "level is 95"),
        (metrics.auroc, {"n_boot": 9, "level": 1}, "level is 1; it must be between 0 and 1"),
        (metrics.auroc, {"n_boot": 9, "level": 0}, "level is 0; it must be between 0 and 1"),
        (metrics.fpr_at_tpr, {"tpr": 95}, "tpr is 95"),
        (metrics.fpr_at_tpr, {"positive": "wrong"}, "'correct' or 'error'"),
        (metrics.accuracy_at_coverage, {"coverage": 0}, "coverage is 0"),
        (metrics.risk_at_coverage, {"coverage": 1.1}, "coverage is 1.1"),
        (metrics.coverage_at_risk, {"risk": -0.1}, "risk is -0.1; it must be between 0 and 1"),
        (metrics.coverage_at_risk, {"risk": 5}, "risk is 5"),
    ],
)
def test_bad_options(metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric([1, 2], [0, 1], **options)


def test_importing_and_using_the_metrics_needs_no_optional_package():
    code = (
        "import sys, rat_ext.metrics\n"
        "rat_ext.metrics.summary([1, 2], [0, 1], n_boot=2)\n"
        "print({'sklearn', 'scipy', 'torchmetrics', 'matplotlib'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_the_classes_accumulate_over_batches():
    rng = np.random.default_rng(0)
    correct = torch.from_numpy(rng.random(90) < 0.8)
    confidence = torch.from_numpy(rng.normal(size=90).round(1)) + correct.float()
    collection = MetricCollection(
        {
            "aurc": classes.AURC(),
            "trapezoid": classes.AURC(variant="trapezoid"),
            "e_aurc": classes.EAURC(),
            "augrc": classes.AUGRC(),
            "risk90": classes.RiskAtCoverage(0.9),
            "coverage": classes.CoverageAtRisk(0.1),
            "auroc": classes.AUROC(),
            "aupr_success": classes.AUPRSuccess(),
            "aupr_error": classes.AUPRError(),
            "fpr80": classes.FPRAtTPR(tpr=0.8, positive="error"),
            "accuracy90": classes.AccuracyAtCoverage(0.9),
        }
    )
    for begin, end in ((0, 10), (10, 50), (50, 90)):
        collection.update(confidence[begin:end], correct[begin:end])
    expected = {
        **metrics.summary(confidence, correct),
        "trapezoid": metrics.aurc(confidence, correct, variant="trapezoid"),
        "fpr80": metrics.fpr_at_tpr(confidence, correct, 0.8, positive="error"),
        "accuracy90": metrics.accuracy_at_coverage(confidence, correct, 0.9),
        "risk90": metrics.risk_at_coverage(confidence, correct, 0.9),
        "coverage": metrics.coverage_at_risk(confidence, correct, 0.1),
    }
    for name, value in collection.compute().items():
        assert value.item() == pytest.approx(expected[name], rel=1e-6), name
    collection.reset()
    collection.update(confidence[:20], correct[:20])
    again = metrics.aurc(confidence[:20], correct[:20])
    assert collection.compute()["aurc"].item() == pytest.approx(again, rel=1e-6)


def test_the_classes_take_probabilities_and_targets():
    probabilities, target = softmax_and_target()
    confidence, prediction = probabilities.max(1)
    correct = prediction == target
    collection = MetricCollection(
        [
            classes.AURC(),
            classes.AUROC(),
            classes.CoverageAtRisk(0.2),
            classes.ECE(n_bins=7),
            classes.BrierScore(),
            classes.NLL(),
        ]
    )
    for batch in zip(probabilities.split(70), target.split(70), strict=True):
        collection.update(*batch)
    expected = {
        "AURC": metrics.aurc(confidence, correct),
        "AUROC": metrics.auroc(confidence, correct),
        "CoverageAtRisk": metrics.coverage_at_risk(confidence, correct, 0.2),
        "ECE": metrics.ece(probabilities, target, n_bins=7),
        "BrierScore": metrics.brier_score(probabilities, target),
        "NLL": metrics.nll(probabilities, target),
    }
    found = {name: value.item() for name, value in collection.compute().items()}
    assert found == pytest.approx(expected, rel=1e-6)
    groups = {frozenset(group) for group in collection.compute_groups.values()}
    assert groups == {frozenset([*expected][:3]), frozenset([*expected][3:])}  # stored once each


@pytest.mark.parametrize("metric", [classes.AURC(), classes.NLL()])
def test_the_classes_plot_their_values(metric):
    metric.update(*softmax_and_target())
    for val, points in ((None, 1), ([metric.compute()] * 3, 3)):
        axes = Figure().subplots()
        metric.plot(val, ax=axes)
        (line,) = (line for line in axes.lines if len(line.get_xdata()) == points)
        assert line.get_ydata()[0] == pytest.approx(metric.compute().item())


@pytest.mark.parametrize(
    ("metric", "first", "second", "message"),
    [
        (classes.AURC(), (3, 2, 2), (3,), r"both must be \(N,\)"),
        (classes.AURC(), (3,), (4,), r"both must be \(N,\)"),
        (classes.AURC(), (3, 2), (3, 2), r"both must be \(N,\)"),
        (classes.AURC(), (3, 2), (3,), r"logits.softmax\(1\)"),
        (classes.ECE(), (3,), (3,), r"expected \(N, C\) and \(N,\)"),
        (classes.ECE(), (3, 2), (4,), r"expected \(N, C\) and \(N,\)"),
    ],
)
def test_the_classes_refuse_other_shapes_and_logits(metric, first, second, message):
    with pytest.raises(ValueError, match=message):
        metric.update(torch.ones(first), torch.ones(second))


def _process(rank, world, folder):
    """One of `world` processes; a share of unequal batches, then the metric of all samples."""
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    probabilities, target = torch.load(f"{folder}/data.pt")
    metric = MetricCollection([classes.AURC(), classes.ECE()])
    share = slice(0, 13) if rank == 0 else slice(13, None)
    for batch in zip(probabilities[share].split(5), target[share].split(5), strict=True):
        metric.update(*batch)
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may meet the end of the interpreter, and hang or abort


def test_the_classes_are_synchronised_across_processes(tmp_path):
    probabilities, target = softmax_and_target(40)
    torch.save((probabilities, target), tmp_path / "data.pt")
    torch.multiprocessing.spawn(_process, (2, str(tmp_path)), nprocs=2)
    confidence, prediction = probabilities.max(1)
    aurc = metrics.aurc(confidence, prediction == target)
    expected = {"AURC": aurc, "ECE": metrics.ece(probabilities, target)}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        found = {name: value.item() for name, value in found.items()}
        assert found == pytest.approx(expected, rel=1e-6)
