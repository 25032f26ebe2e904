"""How well a confidence tells right predictions from wrong ones, and how honest probabilities are.

Risk-coverage and ROC metrics are ``f(confidence, correct)`` on torch tensors or numpy arrays of
shape (N,): a larger confidence means a prediction more likely to be right, and ``correct`` tells
(bool or 0/1) which ones are. Only the order of the confidences counts, so infinite ones are
allowed. Calibration metrics are ``f(probabilities, target)``, of shapes (N, C) and (N,). Results
are fractions, not percent; nan in the input is an error; the order of the samples never counts.

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
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, cast, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Estimate",
    "RiskCoverage",
    "accuracy_at_coverage",
    "augrc",
    "aupr_error",
    "aupr_success",
    "aurc",
    "auroc",
    "brier_score",
    "coverage_at_risk",
    "e_aurc",
    "ece",
    "fpr_at_tpr",
    "nll",
    "risk_at_coverage",
    "risk_coverage_curve",
    "summary",
]

Values = torch.Tensor | ArrayLike
_Floats = NDArray[np.float64]
_Rows = NDArray[np.intp] | slice
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


class _Statistic(NamedTuple):
    """A function of N samples whose input is checked and prepared, so that resamples are cheap."""

    size: int
    """N."""
    of: Callable[[_Rows], Any]
    """Its value on these rows of the samples, some of which may be repeated, others missing."""


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
    size, risk = _by_level(_risk, confidence, correct)
    return RiskCoverage(np.arange(1, size + 1) / size, risk(slice(None)))


class _Metric(Protocol[_P]):
    """A function as `_metric` makes it, with an interval if asked."""

    @overload
    def __call__(self, *args: _P.args, **options: _P.kwargs) -> float: ...

    # Python has no type for a function's own arguments and more keywords: here they are any.
    @overload
    def __call__(
        self, *args: Any, n_boot: int, level: float = 0.95, seed: int = 0, **options: Any
    ) -> float | Estimate: ...


_BOOTSTRAP = """Bootstrap: with ``n_boot`` resamples (0: none) the result is an `Estimate`, whose
interval has the confidence ``level``; ``seed`` is that of the resamples."""


def _metric(prepare: Callable[_P, _Statistic]) -> _Metric[_P]:
    """Makes a metric of a function that prepares its statistic: evaluates it, and its bootstrap."""

    def measure(
        *args: Any, n_boot: int = 0, level: float = 0.95, seed: int = 0, **options: Any
    ) -> float | Estimate:
        statistic = prepare(*args, **options)
        return _estimates([prepare.__name__], statistic, n_boot, level, seed)[0]

    # For `help`: the function's own arguments stand where `measure` has *args and **options.
    own = inspect.signature(prepare).parameters.values()
    boot = [*inspect.signature(measure).parameters.values()][1:-1]
    made: Any = functools.update_wrapper(measure, prepare)
    made.__signature__ = inspect.Signature([*own, *boot], return_annotation="float | Estimate")
    made.__doc__ = f"{inspect.cleandoc(prepare.__doc__ or '')}\n\n{_BOOTSTRAP}"
    return cast(_Metric[_P], made)


def _estimates(
    names: Sequence[str], statistic: _Statistic, n_boot: int, level: float, seed: int
) -> list[float | Estimate]:
    """The values of a statistic that gives one for each name, all on the same resamples.

    A value is nan where it is undefined for want of right or of wrong predictions.
    """
    if n_boot < 0:
        raise ValueError(f"n_boot is {n_boot}; it must be 0 (no interval) or more")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1")
    values: list[float] = np.atleast_1d(statistic.of(slice(None))).tolist()
    for name, value in zip(names, values, strict=True):
        if math.isnan(value):
            warnings.warn(
                f"{name} is undefined and set to nan: it needs both right and wrong predictions",
                RuntimeWarning,
                stacklevel=3,
            )
    if not n_boot:
        return [*values]
    rng, size = np.random.default_rng(seed), statistic.size
    draws = np.array([statistic.of(rng.integers(size, size=size)) for _ in range(n_boot)])
    columns = draws.reshape(n_boot, -1).T
    return [
        Estimate(v, *_interval(column, level)) for v, column in zip(values, columns, strict=True)
    ]


def _interval(draws: _Floats, level: float) -> tuple[float, float]:
    defined = draws[~np.isnan(draws)]  # a resample of few errors may have none
    if not len(defined):
        return math.nan, math.nan
    # There is no middle between a finite draw and an infinite one.
    method: Any = "linear" if np.isfinite(defined).all() else "inverted_cdf"
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2], method=method)
    return float(low), float(high)


# --- Risk and coverage ----------------------------------------------------------------------------


@_metric
def aurc(
    confidence: Values, correct: Values, *, variant: Literal["mean", "trapezoid"] = "mean"
) -> _Statistic:
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
    variants = {"mean": _aurc, "trapezoid": _trapezoid_aurc}
    if variant not in variants:
        raise ValueError(f"variant is {variant!r}; expected 'mean' or 'trapezoid'")
    return _by_level(variants[variant], confidence, correct)


@_metric
def e_aurc(confidence: Values, correct: Values) -> _Statistic:
    """Excess AURC (Geifman et al., ICLR 2019): AURC minus that of the best ordering.

    The best ordering accepts every right prediction before any wrong one; its AURC is computed
    exactly rather than by the approximation ``r + (1 - r) log(1 - r)`` for error rate r. Arguments
    and errors as `aurc`.
    """
    return _by_level(_e_aurc, confidence, correct)


@_metric
def augrc(confidence: Values, correct: Values) -> _Statistic:
    """Area under the generalized risk-coverage curve (Traub et al., NeurIPS 2024); 0 is best.

    The generalized risk at a coverage is the share of all samples that are accepted and wrong. Its
    area is the risk that a prediction is wrong and not caught, averaged over the coverages from 0
    to 1. It is the integral of straight lines between the coverages that a threshold can reach, 0
    among them, which is also its mean over all orders of tied samples. With the error rate r it
    equals ``(1 - AUROC) r (1 - r) + r^2 / 2``: a constant confidence has r / 2. Arguments and
    errors as `aurc`.
    """
    return _by_level(_augrc, confidence, correct)


@_metric
def risk_at_coverage(confidence: Values, correct: Values, coverage: float) -> _Statistic:
    """Selective risk at a coverage: the error rate of as few as make up ``coverage`` of all.

    The most confident samples are accepted. Ties are broken at random and the expectation is exact,
    as in `risk_coverage_curve`. Other arguments and errors as `aurc`.

    Args:
        confidence: (N,) larger means more likely right; infinite values are allowed.
        correct: (N,) bool or 0/1.
        coverage: in (0, 1]; ``ceil(coverage * N)`` samples are accepted.
    """
    return _by_level(_risk_at(coverage), confidence, correct)


@_metric
def accuracy_at_coverage(confidence: Values, correct: Values, coverage: float) -> _Statistic:
    """Accuracy of the most confident samples, as few as make up ``coverage`` of all.

    It is one minus `risk_at_coverage`, with the same arguments.
    """
    risk = _risk_at(coverage)
    return _by_level(lambda levels: 1 - risk(levels), confidence, correct)


@_metric
def coverage_at_risk(confidence: Values, correct: Values, risk: float) -> _Statistic:
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

    def coverage(levels: _Levels) -> float:
        # A sum of rates may be a rounding above the risk that it stands for.
        accepted = np.flatnonzero(_risk(levels) <= risk + 1e-9)
        return float(accepted[-1] + 1) / levels.samples if len(accepted) else 0.0

    return _by_level(coverage, confidence, correct)


# --- Detection of errors --------------------------------------------------------------------------


@_metric
def auroc(confidence: Values, correct: Values) -> _Statistic:
    """Area under the ROC curve: P(a right prediction has more confidence than a wrong one).

    A tie counts one half. Where all predictions are right, or all are wrong, the metric is
    undefined: nan, with a RuntimeWarning. Resamples of the bootstrap where it is undefined are left
    out. Arguments and errors as `aurc`.
    """
    return _by_level(_auroc, confidence, correct)


@_metric
def aupr_success(confidence: Values, correct: Values) -> _Statistic:
    """Average precision of the confidence at detecting right predictions.

    The mean over the right predictions of the precision at their confidence: a threshold takes tied
    samples together. Arguments, errors and the undefined case as `auroc`.
    """
    return _by_level(_average_precision, confidence, correct)


@_metric
def aupr_error(confidence: Values, correct: Values) -> _Statistic:
    """Average precision of the negated confidence at detecting wrong predictions.

    Otherwise as `aupr_success`.
    """
    return _by_level(lambda levels: _average_precision(levels.of_errors()), confidence, correct)


@_metric
def fpr_at_tpr(
    confidence: Values,
    correct: Values,
    tpr: float = 0.95,
    *,
    positive: Literal["correct", "error"] = "correct",
) -> _Statistic:
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
    if positive == "correct":
        return _by_level(lambda levels: _fpr(levels, tpr), confidence, correct)
    return _by_level(lambda levels: _fpr(levels.of_errors(), tpr), confidence, correct)


def summary(
    confidence: Values, correct: Values, *, n_boot: int = 0, level: float = 0.95, seed: int = 0
) -> dict[str, float | Estimate]:
    """The columns of the usual misclassification-detection table.

    Arguments, errors and undefined cases as `auroc`.

    Returns:
        accuracy, aurc, e_aurc, augrc, auroc, aupr_success, aupr_error and fpr95, in this order;
        fractions, or an `Estimate` of each if ``n_boot > 0``.
    """
    columns: dict[str, Callable[[_Levels], float]] = {
        "accuracy": lambda levels: float(levels.right.sum()) / levels.samples,
        "aurc": _aurc,
        "e_aurc": _e_aurc,
        "augrc": _augrc,
        "auroc": _auroc,
        "aupr_success": _average_precision,
        "aupr_error": lambda levels: _average_precision(levels.of_errors()),
        "fpr95": lambda levels: _fpr(levels, 0.95),
    }
    every = _by_level(lambda levels: [f(levels) for f in columns.values()], confidence, correct)
    names = [*columns]
    return dict(zip(names, _estimates(names, every, n_boot, level, seed), strict=True))


# --- Calibration ----------------------------------------------------------------------------------


@_metric
def ece(probabilities: Values, target: Values, *, n_bins: int = 15) -> _Statistic:
    """Expected calibration error (Naeini et al., AAAI 2015; Guo et al., ICML 2017); 0 is best.

    The confidence is the largest probability of a sample, and the prediction its class (the first
    of them, if several are largest). The bins have equal width on [0, 1]. The result is the
    distance between the accuracy and the mean confidence of a bin, averaged over the samples.

    Args:
        probabilities: (N, C) of C >= 2 classes; each row sums to 1.
        target: (N,) the right classes, from 0 to C - 1.
        n_bins: the number of bins M. Bin m is ``((m - 1) / M, m / M]``: a confidence on an edge is
            in the bin below it.

    Raises:
        ValueError: an input is empty or of another shape, probabilities has nan or negative values
            or rows whose sum is off by more than 0.01, target has other values than 0 to C - 1, or
            n_bins is below 1.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; it must be at least 1")
    p, classes = _classified(probabilities, target)
    confidence = p.max(1)
    gap = (p.argmax(1) == classes) - confidence
    bins = np.searchsorted(np.arange(1, n_bins) / n_bins, confidence)
    size = len(p)
    return _Statistic(size, lambda i: np.abs(np.bincount(bins[i], gap[i])).sum() / size)


@_metric
def brier_score(probabilities: Values, target: Values) -> _Statistic:
    """Brier score (Brier 1950): mean squared distance to the one-hot target; 0 is best, 2 worst.

    The squares are summed over the classes. For two classes it is twice the mean of
    ``(p - y)^2`` of one class, which is also called by this name. Arguments and errors as `ece`.
    """
    p, classes = _classified(probabilities, target)
    return _mean(np.square(p - np.eye(p.shape[1])[classes]).sum(1))


@_metric
def nll(probabilities: Values, target: Values) -> _Statistic:
    """Negative log-likelihood: the mean of -log of the target's probability, in nats; 0 is best.

    It is the cross-entropy, and infinite where a target has probability 0. Arguments and errors as
    `ece`.
    """
    p, classes = _classified(probabilities, target)
    with np.errstate(divide="ignore"):
        return _mean(0 - np.log(p[np.arange(len(p)), classes]))


# --- Statistics of levels -------------------------------------------------------------------------


class _Levels(NamedTuple):
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

    def of_errors(self) -> _Levels:
        """The same for the detection of wrong predictions: the least confident first."""
        return _Levels(self.wrong[::-1], self.right[::-1])


def _by_level(
    statistic: Callable[[_Levels], Any], confidence: Values, correct: Values
) -> _Statistic:
    """A statistic of levels as one of samples. Sorts once; a resample only has other counts."""
    values, right = _array(confidence), _array(correct)
    for name, array in (("confidence", values), ("correct", right)):
        if array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}; expected (N,), one value per sample")
    _check_lengths("confidence", values, "correct", right)
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

    def of(rows: _Rows) -> Any:
        wrong, right = np.bincount(cell[rows], minlength=2 * levels).reshape(2, levels)
        present = wrong + right > 0
        return statistic(_Levels(right[present], wrong[present]))

    return _Statistic(len(values), of)


def _risk(levels: _Levels) -> _Floats:
    """(N,) selective risk, most confident sample first.

    The n-th accepted sample is a random one of its tie, so it is wrong with the tie's error rate;
    by linearity the expected number of errors is the running sum of these rates.
    """
    size = levels.right + levels.wrong
    errors = np.cumsum(np.repeat(levels.wrong / size, size))
    return errors / np.arange(1, len(errors) + 1)


def _risk_at(coverage: float) -> Callable[[_Levels], float]:
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}; it must be above 0 and at most 1")

    def risk(levels: _Levels) -> float:
        # Rounded first: 0.07 * 100 is just above 7 in floating point, and its ceil would be 8.
        accepted = math.ceil(round(coverage * levels.samples, 9))
        return float(_risk(levels)[max(accepted, 1) - 1])

    return risk


def _aurc(levels: _Levels) -> float:
    return float(_risk(levels).mean())


def _trapezoid_aurc(levels: _Levels) -> float:
    accepted = np.cumsum(levels.right + levels.wrong)
    risk = np.cumsum(levels.wrong) / accepted
    inner = (np.diff(accepted) * (risk[1:] + risk[:-1]) / 2).sum()
    return float(inner + (accepted[0] - 1) * risk[0]) / levels.samples


def _e_aurc(levels: _Levels) -> float:
    """The best ordering has risk 0 while it accepts right predictions, then a wrong one a step."""
    right, samples = levels.right.sum(), levels.samples
    best = np.arange(1, samples - right + 1) / np.arange(right + 1, samples + 1)
    return _aurc(levels) - float(best.sum()) / samples


def _augrc(levels: _Levels) -> float:
    """Each accepted sample has the wrong ones above it before it, and half of those tied."""
    above = np.cumsum(levels.wrong) - levels.wrong / 2
    return float(((levels.right + levels.wrong) * above).sum()) / levels.samples**2


def _auroc(levels: _Levels) -> float:
    above = np.cumsum(levels.right) - levels.right / 2
    pairs = levels.right.sum() * levels.wrong.sum()
    return float((levels.wrong * above).sum() / pairs) if pairs else math.nan


def _average_precision(levels: _Levels) -> float:
    accepted = np.cumsum(levels.right + levels.wrong)
    precision = np.cumsum(levels.right) / accepted
    if not _both(levels):
        return math.nan
    return float((levels.right * precision).sum() / levels.right.sum())


def _fpr(levels: _Levels, tpr: float) -> float:
    if not _both(levels):
        return math.nan
    accepted = np.cumsum(levels.right)
    threshold = np.argmax(accepted / accepted[-1] >= tpr)
    return float(levels.wrong[: threshold + 1].sum() / levels.wrong.sum())


def _both(levels: _Levels) -> bool:
    """There are right and wrong predictions, without which a metric of two classes is undefined."""
    return bool(levels.right.any() and levels.wrong.any())


# --- Inputs ---------------------------------------------------------------------------------------


def _classified(probabilities: Values, target: Values) -> tuple[_Floats, NDArray[np.intp]]:
    """Checked inputs: (N, C) probabilities in float64, and (N,) classes."""
    p, classes = _array(probabilities).astype(float), _array(target)
    if p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"probabilities has shape {p.shape}; expected (N, C) of C >= 2 classes")
    if classes.ndim != 1:
        raise ValueError(f"target has shape {classes.shape}; expected (N,), one class per sample")
    _check_lengths("probabilities", p, "target", classes)
    if nans := int(np.isnan(p).any(1).sum()):
        raise ValueError(f"probabilities is nan for {nans} of {len(p)} samples; drop them")
    if p.min() < 0 or np.abs(p.sum(1) - 1).max() > 0.01:
        raise ValueError(
            "probabilities must be at least 0, and each row must sum to 1; of logits, give "
            "logits.softmax(1)"
        )
    if not np.isin(classes, np.arange(p.shape[1])).all():
        raise ValueError(
            f"target must be the right classes, whole numbers from 0 to {p.shape[1] - 1}; drop "
            "samples of other classes"
        )
    return p, classes.astype(np.intp)


def _check_lengths(a: str, first: NDArray[Any], b: str, second: NDArray[Any]) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"{a} has {len(first)} samples and {b} has {len(second)}; they must be equal"
        )
    if not len(first):
        raise ValueError(f"{a} and {b} are empty; a metric needs at least one sample")


def _array(values: Values) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        # numpy has no bfloat16.
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values)


def _mean(values: _Floats) -> _Statistic:
    """The mean of (N,) values."""
    return _Statistic(len(values), lambda rows: values[rows].mean())
