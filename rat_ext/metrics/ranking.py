"""How well a confidence tells right predictions from wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bootstrap import Estimate, Statistic, Values, estimates, metric
from .levels import (
    Levels,
    area_under_generalized_risk,
    area_under_risk,
    area_under_roc,
    average_precision,
    by_level,
    excess_area,
    false_positive_rate,
    risk_at,
    selective_risk,
    trapezoid_area,
)


class RiskCoverage(NamedTuple):
    """The risk-coverage curve of N samples: float64 arrays of shape (N,)."""

    coverage: NDArray[np.float64]
    """1/N, 2/N, ..., 1: the share of the samples that is accepted, most confident first."""
    risk: NDArray[np.float64]
    """The error rate of the accepted samples."""


def risk_coverage_curve(confidence: Values, correct: Values) -> RiskCoverage:
    """The selective risk at each coverage (El-Yaniv and Wiener, JMLR 2010).

    Tied samples are accepted in random order, and the risk is the exact expectation over it: it
    does not depend on the order of the input.

    Args:
        confidence: (N,) larger means more likely right; infinite values are allowed.
        correct: (N,) bool or 0/1.

    Raises:
        ValueError: an input is empty or not 1-D, their lengths differ, confidence has nan, or
            correct has other values than 0 and 1.
    """
    size, risk = by_level(selective_risk, confidence, correct)
    return RiskCoverage(np.arange(1, size + 1) / size, risk(slice(None)))


@metric
def aurc(
    confidence: Values, correct: Values, *, variant: Literal["mean", "trapezoid"] = "mean"
) -> Statistic:
    """Area under the risk-coverage curve (Geifman et al., ICLR 2019); 0 is best.

    Args:
        confidence: (N,) larger means more likely right; infinite values are allowed.
        correct: (N,) bool or 0/1.
        variant: "mean" is the mean of the selective risk over the coverages 1/N, ..., 1, exact
            under ties (a constant confidence has the error rate). "trapezoid" is the integral of
            the risk from coverage 1/N to 1, linear between the coverages that a threshold can
            reach and constant below the smallest of them. Without ties, the evaluation code of RAT
            (arXiv 2503.14783) computes just this; with ties that code depends on the input's order.

    Raises:
        ValueError: as `risk_coverage_curve`, or an option out of its range.
    """
    variants = {"mean": area_under_risk, "trapezoid": trapezoid_area}
    if variant not in variants:
        raise ValueError(f"variant is {variant!r}; expected 'mean' or 'trapezoid'")
    return by_level(variants[variant], confidence, correct)


@metric
def e_aurc(confidence: Values, correct: Values) -> Statistic:
    """Excess AURC (Geifman et al., ICLR 2019): AURC minus that of the best ordering.

    The best ordering accepts every right prediction before any wrong one; its AURC is computed
    exactly rather than by the approximation ``r + (1 - r) log(1 - r)`` for error rate r. Arguments
    and errors as `aurc`.
    """
    return by_level(excess_area, confidence, correct)


@metric
def augrc(confidence: Values, correct: Values) -> Statistic:
    """Area under the generalized risk-coverage curve (Traub et al., NeurIPS 2024); 0 is best.

    The generalized risk at a coverage is the share of all samples that are accepted and wrong. Its
    area is the risk that a prediction is wrong and not caught, averaged over the coverages from 0
    to 1. It is the integral of straight lines between the coverages that a threshold can reach, 0
    among them, which is also its mean over all orders of tied samples. With the error rate r it
    equals ``(1 - AUROC) r (1 - r) + r^2 / 2``: a constant confidence has r / 2. Arguments and
    errors as `aurc`.
    """
    return by_level(area_under_generalized_risk, confidence, correct)


@metric
def risk_at_coverage(confidence: Values, correct: Values, coverage: float) -> Statistic:
    """Selective risk at a coverage: the error rate of as few as make up ``coverage`` of all.

    The most confident samples are accepted. Ties are broken at random and the expectation is exact,
    as in `risk_coverage_curve`. Other arguments and errors as `aurc`.

    Args:
        confidence: (N,) larger means more likely right; infinite values are allowed.
        correct: (N,) bool or 0/1.
        coverage: in (0, 1]; ``ceil(coverage * N)`` samples are accepted.
    """
    return by_level(risk_at(coverage), confidence, correct)


@metric
def accuracy_at_coverage(confidence: Values, correct: Values, coverage: float) -> Statistic:
    """Accuracy of the most confident samples, as few as make up ``coverage`` of all.

    It is one minus `risk_at_coverage`, with the same arguments.
    """
    risk = risk_at(coverage)
    return by_level(lambda levels: 1 - risk(levels), confidence, correct)


@metric
def coverage_at_risk(confidence: Values, correct: Values, risk: float) -> Statistic:
    """The largest coverage whose selective risk is at most ``risk``; 0 if there is none.

    It is one of 0, 1/N, ..., 1, found on the curve of `risk_coverage_curve` and so with tied
    samples in random order (Geifman and El-Yaniv, NeurIPS 2017, ask for a guarantee as well: this
    is the coverage on the given samples, and promises nothing of others; `rat_ext.Detector` does).
    Other arguments and errors as `aurc`.

    Args:
        confidence: (N,) larger means more likely right; infinite values are allowed.
        correct: (N,) bool or 0/1.
        risk: the error rate to allow among the accepted samples, in [0, 1].
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk is {risk}; it must be between 0 and 1")

    def coverage(levels: Levels) -> float:
        # A sum of rates may be a rounding above the risk that it stands for.
        accepted = np.flatnonzero(selective_risk(levels) <= risk + 1e-9)
        return float(accepted[-1] + 1) / levels.samples if len(accepted) else 0.0

    return by_level(coverage, confidence, correct)


@metric
def auroc(confidence: Values, correct: Values) -> Statistic:
    """Area under the ROC curve: P(a right prediction has more confidence than a wrong one).

    A tie counts one half. Where all predictions are right, or all are wrong, the metric is
    undefined: nan, with a RuntimeWarning. Resamples of the bootstrap where it is undefined are left
    out. Arguments and errors as `aurc`.
    """
    return by_level(area_under_roc, confidence, correct)


@metric
def aupr_success(confidence: Values, correct: Values) -> Statistic:
    """Average precision of the confidence at detecting right predictions.

    The mean over the right predictions of the precision at their confidence: a threshold takes tied
    samples together. Arguments, errors and the undefined case as `auroc`.
    """
    return by_level(average_precision, confidence, correct)


@metric
def aupr_error(confidence: Values, correct: Values) -> Statistic:
    """Average precision of the negated confidence at detecting wrong predictions.

    Otherwise as `aupr_success`.
    """
    return by_level(lambda levels: average_precision(levels.of_errors()), confidence, correct)


@metric
def fpr_at_tpr(
    confidence: Values,
    correct: Values,
    tpr: float = 0.95,
    *,
    positive: Literal["correct", "error"] = "correct",
) -> Statistic:
    """False-positive rate at the strictest threshold whose true-positive rate is at least tpr.

    A threshold takes tied samples together, so a constant confidence has rate 1. Other arguments,
    errors and the undefined case as `auroc`.

    Args:
        confidence: (N,) larger means more likely right; infinite values are allowed.
        correct: (N,) bool or 0/1.
        tpr: the true-positive rate to reach, in (0, 1].
        positive: "correct": the share of wrong predictions accepted where ``tpr`` of the right ones
            are accepted (Hendrycks and Gimpel, and most of the literature). "error": the share of
            right predictions rejected where ``tpr`` of the wrong ones are rejected (the evaluation
            code of RAT, arXiv 2503.14783).
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr is {tpr}; it must be above 0 and at most 1")
    if positive not in ("correct", "error"):
        raise ValueError(f"positive is {positive!r}; expected 'correct' or 'error'")

    def rate(levels: Levels) -> float:
        return false_positive_rate(levels if positive == "correct" else levels.of_errors(), tpr)

    return by_level(rate, confidence, correct)


def summary(
    confidence: Values, correct: Values, *, n_boot: int = 0, level: float = 0.95, seed: int = 0
) -> dict[str, float | Estimate]:
    """The columns of the usual misclassification-detection table.

    Arguments, errors and undefined cases as `auroc`.

    Returns:
        accuracy, aurc, e_aurc, augrc, auroc, aupr_success, aupr_error and fpr95, in this order;
        fractions, or an `Estimate` of each if ``n_boot > 0``.
    """
    columns: dict[str, Callable[[Levels], float]] = {
        "accuracy": lambda levels: float(levels.right.sum()) / levels.samples,
        "aurc": area_under_risk,
        "e_aurc": excess_area,
        "augrc": area_under_generalized_risk,
        "auroc": area_under_roc,
        "aupr_success": average_precision,
        "aupr_error": lambda levels: average_precision(levels.of_errors()),
        "fpr95": lambda levels: false_positive_rate(levels, 0.95),
    }
    every = by_level(lambda levels: [f(levels) for f in columns.values()], confidence, correct)
    names = [*columns]
    return dict(zip(names, estimates(names, every, n_boot, level, seed), strict=True))
