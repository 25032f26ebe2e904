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
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics import MetricCollection

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
def test_ranks_give_what_scikit_learn_gives_on_the_confidences(data):
    confidence, correct = data
    assert metrics.auroc(confidence, correct) == roc_auc_score(correct, confidence)
    success = average_precision_score(correct, confidence)
    assert metrics.aupr_success(confidence, correct) == success
    error = average_precision_score(~correct, -confidence)
    assert metrics.aupr_error(confidence, correct) == error


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
    functools.partial(metrics.accuracy_at_coverage, coverage=0.7),
    metrics.auroc,
    metrics.aupr_success,
    metrics.aupr_error,
    metrics.fpr_at_tpr,
]


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
    """On ties, too, of which a resample may lack some."""
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
@pytest.mark.parametrize("metric", EVERY[4:])
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
    ],
)
def test_bad_options(metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric([1, 2], [0, 1], **options)


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert metrics.aurc([1, 2], [0, 1]) == pytest.approx(0.25)
    with pytest.raises(ImportError, match=r"pip install '\.\[metrics\]'"):
        metrics.auroc([1, 2], [0, 1])


def test_importing_the_metrics_imports_no_optional_package():
    code = (
        "import sys, rat_ext.metrics\n"
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
    }
    for name, value in collection.compute().items():
        assert value.item() == pytest.approx(expected[name], rel=1e-6), name
    collection.reset()
    collection.update(confidence[:20], correct[:20])
    again = metrics.aurc(confidence[:20], correct[:20])
    assert collection.compute()["aurc"].item() == pytest.approx(again, rel=1e-6)


def test_the_classes_refuse_what_is_not_one_value_per_sample():
    with pytest.raises(ValueError, match=r"both must be \(N,\)"):
        classes.AURC().update(torch.ones(3, 2), torch.ones(3))


def _process(rank, world, folder):
    """One of `world` processes; a share of unequal batches, then the metric of all samples."""
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    confidence, correct = torch.load(f"{folder}/data.pt")
    metric = classes.AURC()
    share = slice(0, 13) if rank == 0 else slice(13, None)
    for batch in zip(confidence[share].split(5), correct[share].split(5), strict=True):
        metric.update(*batch)
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may meet the end of the interpreter, and hang or abort


def test_the_classes_are_synchronised_across_processes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(40, generator=generator)
    correct = torch.rand(40, generator=generator) < confidence
    torch.save((confidence, correct), tmp_path / "data.pt")
    torch.multiprocessing.spawn(_process, (2, str(tmp_path)), nprocs=2)
    expected = metrics.aurc(confidence, correct)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True).item() == pytest.approx(
            expected, rel=1e-6
        )
