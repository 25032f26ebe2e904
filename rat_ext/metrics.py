"""How well a confidence tells right predictions from wrong ones: risk-coverage and ROC metrics.

Every metric is ``f(confidence, correct)`` on torch tensors or numpy arrays of shape (N,): a larger
confidence means a prediction more likely to be right, and ``correct`` tells (bool or 0/1) which
ones are. Results are fractions, not percent. Only the order of the confidences counts, so infinite
ones are allowed; nan is an error.

Every metric also takes ``n_boot=0``, ``level=0.95`` and ``seed=0``, by keyword. With ``n_boot > 0``
it returns an `Estimate`: its value, and the percentile bootstrap interval of confidence ``level``
over that many resamples of the N samples. The same ``seed`` gives every metric the same resamples.

`rat_ext.torchmetrics` has the same metrics as classes that accumulate over batches and processes.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, Protocol, cast, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ._common.extras import install

__all__ = [
    "Estimate",
    "RiskCoverage",
    "accuracy_at_coverage",
    "aupr_error",
    "aupr_success",
    "aurc",
    "auroc",
    "e_aurc",
    "fpr_at_tpr",
    "risk_coverage_curve",
    "summary",
]

Values = torch.Tensor | ArrayLike
Confidence = NDArray[np.intp]  # as ranks
Correct = NDArray[np.bool_]
_P = ParamSpec("_P")


class RiskCoverage(NamedTuple):
    """The risk-coverage curve of N samples: float64 arrays of shape (N,)."""

    coverage: NDArray[np.float64]
    """1/N, 2/N, ..., 1: the share of the samples that is accepted, most confident first."""
    risk: NDArray[np.float64]
    """The error rate of the accepted samples."""


class Estimate(NamedTuple):
    """A metric and its bootstrap confidence interval."""

    value: float
    low: float
    high: float


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
    rank, right = _ranked(confidence, correct)
    return RiskCoverage(np.arange(1, len(rank) + 1) / len(rank), _risk(rank, right))


class _Metric(Protocol[_P]):
    """A function as `_metric` makes it, of any values and with an interval if asked."""

    @overload
    def __call__(
        self, confidence: Values, correct: Values, *args: _P.args, **options: _P.kwargs
    ) -> float: ...

    # Python has no type for a function's own arguments and more keywords: here they are any.
    @overload
    def __call__(
        self,
        confidence: Values,
        correct: Values,
        *args: Any,
        n_boot: int,
        level: float = 0.95,
        seed: int = 0,
        **options: Any,
    ) -> float | Estimate: ...


_BOOTSTRAP = """Bootstrap: with ``n_boot`` resamples (0: none) the result is an `Estimate`, whose
interval has the confidence ``level``; ``seed`` is that of the resamples."""


def _metric(statistic: Callable[Concatenate[Confidence, Correct, _P], float]) -> _Metric[_P]:
    """Makes a metric of a statistic: checks the input, and adds the bootstrap.

    The statistic is given the ranks of the confidences in their place, and correct as bool. It
    returns nan where it is undefined for want of right or of wrong predictions.
    """

    def measure(
        confidence: Values,
        correct: Values,
        *args: Any,
        n_boot: int = 0,
        level: float = 0.95,
        seed: int = 0,
        **options: Any,
    ) -> float | Estimate:
        if n_boot < 0:
            raise ValueError(f"n_boot is {n_boot}; it must be 0 (no interval) or more")
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; it must be between 0 and 1")
        rank, right = _ranked(confidence, correct)
        value = float(statistic(rank, right, *args, **options))
        if math.isnan(value):
            warnings.warn(
                f"{statistic.__name__} is undefined and set to nan: it needs both right and wrong "
                "predictions",
                RuntimeWarning,
                stacklevel=2,
            )
        if not n_boot:
            return value
        rng = np.random.default_rng(seed)
        samples = (rng.integers(len(rank), size=len(rank)) for _ in range(n_boot))
        draws = np.array([statistic(rank[i], right[i], *args, **options) for i in samples])
        defined = draws[~np.isnan(draws)]  # a resample of few errors may have none
        if not len(defined):
            return Estimate(value, math.nan, math.nan)
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        return Estimate(value, float(low), float(high))

    # For `help`: the statistic's options stand where `measure` has *args and **options.
    inputs = [*inspect.signature(measure).parameters.values()]
    own = [*inspect.signature(statistic).parameters.values()][2:]
    made: Any = functools.update_wrapper(measure, statistic)
    made.__signature__ = inspect.Signature(
        [*inputs[:2], *own, *inputs[3:-1]], return_annotation="float | Estimate"
    )
    made.__doc__ = f"{inspect.cleandoc(statistic.__doc__ or '')}\n\n{_BOOTSTRAP}"
    return cast(_Metric[_P], made)


@_metric
def aurc(
    confidence: Confidence, correct: Correct, *, variant: Literal["mean", "trapezoid"] = "mean"
) -> float:
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
    variants = {"mean": _mean_risk, "trapezoid": _trapezoid_risk}
    if variant not in variants:
        raise ValueError(f"variant is {variant!r}; expected 'mean' or 'trapezoid'")
    return variants[variant](confidence, correct)


@_metric
def e_aurc(confidence: Confidence, correct: Correct) -> float:
    """Excess AURC (Geifman et al., ICLR 2019): AURC minus that of the best ordering.

    The best ordering accepts every right prediction before any wrong one; its AURC is computed
    exactly rather than by the approximation ``r + (1 - r) log(1 - r)`` for error rate r. Arguments
    and errors as `aurc`.
    """
    return _mean_risk(confidence, correct) - _mean_risk(correct.astype(np.intp), correct)


@_metric
def auroc(confidence: Confidence, correct: Correct) -> float:
    """Area under the ROC curve: P(a right prediction has more confidence than a wrong one).

    A tie counts one half. Where all predictions are right, or all are wrong, the metric is
    undefined: nan, with a RuntimeWarning. Resamples of the bootstrap where it is undefined are left
    out. Arguments and errors as `aurc`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    metrics = _sklearn_metrics()
    return metrics.roc_auc_score(correct, confidence) if _both(correct) else math.nan


@_metric
def aupr_success(confidence: Confidence, correct: Correct) -> float:
    """Average precision of the confidence at detecting right predictions.

    Arguments, errors and the undefined case as `auroc`.
    """
    metrics = _sklearn_metrics()
    return metrics.average_precision_score(correct, confidence) if _both(correct) else math.nan


@_metric
def aupr_error(confidence: Confidence, correct: Correct) -> float:
    """Average precision of the negated confidence at detecting wrong predictions.

    Arguments, errors and the undefined case as `auroc`.
    """
    metrics = _sklearn_metrics()
    return metrics.average_precision_score(~correct, -confidence) if _both(correct) else math.nan


@_metric
def fpr_at_tpr(
    confidence: Confidence,
    correct: Correct,
    tpr: float = 0.95,
    *,
    positive: Literal["correct", "error"] = "correct",
) -> float:
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
    metrics = _sklearn_metrics()
    if not _both(correct):
        return math.nan
    label, score = (correct, confidence) if positive == "correct" else (~correct, -confidence)
    fprs, tprs, _ = metrics.roc_curve(label, score, drop_intermediate=False)
    return float(fprs[np.argmax(tprs >= tpr)])


@_metric
def accuracy_at_coverage(confidence: Confidence, correct: Correct, coverage: float) -> float:
    """Accuracy of the most confident samples, as few as make up ``coverage`` of all.

    Ties are broken at random and the expectation is exact, as in `risk_coverage_curve`. Other
    arguments and errors as `aurc`.

    Args:
        confidence: (N,) larger means more likely right; infinite values are allowed.
        correct: (N,) bool or 0/1.
        coverage: in (0, 1]; ``ceil(coverage * N)`` samples are accepted.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}; it must be above 0 and at most 1")
    # Rounded first: 0.07 * 100 is just above 7 in floating point, and its ceil would be 8.
    accepted = math.ceil(round(coverage * len(confidence), 9))
    return float(1 - _risk(confidence, correct)[max(accepted, 1) - 1])


def summary(
    confidence: Values, correct: Values, *, n_boot: int = 0, level: float = 0.95, seed: int = 0
) -> dict[str, float | Estimate]:
    """The columns of the usual misclassification-detection table.

    Arguments, errors and undefined cases as `auroc`.

    Returns:
        accuracy, aurc, e_aurc, auroc, aupr_success, aupr_error and fpr95, in this order; fractions,
        or an `Estimate` of each if ``n_boot > 0``.
    """
    rank, right = _ranked(confidence, correct)  # once: ranks have the order of the confidences
    boot: dict[str, Any] = {"n_boot": n_boot, "level": level, "seed": seed}
    return {
        "accuracy": accuracy_at_coverage(rank, right, 1.0, **boot),
        "aurc": aurc(rank, right, **boot),
        "e_aurc": e_aurc(rank, right, **boot),
        "auroc": auroc(rank, right, **boot),
        "aupr_success": aupr_success(rank, right, **boot),
        "aupr_error": aupr_error(rank, right, **boot),
        "fpr95": fpr_at_tpr(rank, right, **boot),
    }


def _ranked(confidence: Values, correct: Values) -> tuple[Confidence, Correct]:
    """Checked inputs: dense ranks of the confidences (ties share one, 0 is least), and correct."""
    values, right = _array(confidence), _array(correct)
    for name, array in (("confidence", values), ("correct", right)):
        if array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}; expected (N,), one value per sample")
    if len(values) != len(right):
        raise ValueError(
            f"confidence has {len(values)} samples and correct has {len(right)}; they must be equal"
        )
    if not len(values):
        raise ValueError("confidence and correct are empty; a metric needs at least one sample")
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
    _, rank = np.unique(values, return_inverse=True)
    return rank, right.astype(bool)


def _array(values: Values) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        # numpy has no bfloat16.
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values)


def _risk(rank: Confidence, right: Correct) -> NDArray[np.float64]:
    """(N,) selective risk, most confident sample first.

    The n-th accepted sample is a random one of its tie, so it is wrong with the tie's error rate;
    by linearity the expected number of errors is the running sum of these rates.
    """
    size = np.bincount(rank)[::-1]
    wrong = np.bincount(rank, weights=~right)[::-1]
    rate = np.divide(wrong, size, out=np.zeros_like(wrong), where=size > 0)
    return np.cumsum(np.repeat(rate, size)) / np.arange(1, len(rank) + 1)


def _mean_risk(rank: Confidence, right: Correct) -> float:
    return float(_risk(rank, right).mean())


def _trapezoid_risk(rank: Confidence, right: Correct) -> float:
    size = np.bincount(rank)[::-1]
    accepted = np.cumsum(size)[size > 0]
    risk = _risk(rank, right)[accepted - 1]
    inner = np.diff(accepted) @ (risk[1:] + risk[:-1]) / 2
    return float(inner + (accepted[0] - 1) * risk[0]) / len(rank)


def _both(correct: Correct) -> bool:
    """There are right and wrong predictions, without which a metric of two classes is undefined."""
    return bool(correct.any() and not correct.all())


def _sklearn_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(f"AUROC, AUPR and FPR need scikit-learn: {install('metrics')}") from error
    return metrics
