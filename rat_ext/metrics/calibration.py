"""How honest probabilities are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bootstrap import Floats, Statistic, Values, as_array, check_lengths, metric


class Reliability(NamedTuple):
    """A reliability diagram: arrays of shape (M,), a value for each bin that is not empty."""

    samples: NDArray[np.intp]
    """How many are in the bin."""
    confidence: NDArray[np.float64]
    """Their mean confidence."""
    accuracy: NDArray[np.float64]
    """The share of them that are right."""

    @property
    def ece(self) -> float:
        """The expected calibration error, as `rat_ext.metrics.ece` of the probabilities."""
        gap = abs(self.accuracy - self.confidence)
        return float((self.samples * gap).sum() / self.samples.sum())


def reliability(confidence: Values, correct: Values, *, n_bins: int = 15) -> Reliability:
    """How often predictions of some probability are right (DeGroot and Fienberg 1983).

    Args:
        confidence: (N,) the probability that a prediction is right, such as that of its class.
        correct: (N,) bool or 0/1.
        n_bins: as in `ece`.

    Raises:
        ValueError: an input is empty or not 1-D, their lengths differ, confidence is not between 0
            and 1, or n_bins is below 1.
    """
    values, right = as_array(confidence).astype(float), as_array(correct)
    if values.ndim != 1 or right.ndim != 1:
        raise ValueError(
            f"confidence has shape {values.shape} and correct {right.shape}; expected (N,) each"
        )
    check_lengths("confidence", values, "correct", right)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("confidence must be a probability, between 0 and 1")
    bins = _bins(values, n_bins)
    count = np.bincount(bins)
    sums = [np.bincount(bins, weights)[count > 0] for weights in (values, right)]
    count = count[count > 0]
    return Reliability(count, sums[0] / count, sums[1] / count)


@metric
def ece(probabilities: Values, target: Values, *, n_bins: int = 15) -> Statistic:
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
    p, classes = _classified(probabilities, target)
    confidence = p.max(1)
    gap = (p.argmax(1) == classes) - confidence
    bins = _bins(confidence, n_bins)
    size = len(p)
    return Statistic(size, lambda i: np.abs(np.bincount(bins[i], gap[i])).sum() / size)


@metric
def brier_score(probabilities: Values, target: Values) -> Statistic:
    """Brier score (Brier 1950): mean squared distance to the one-hot target; 0 is best, 2 worst.

    The squares are summed over the classes. For two classes it is twice the mean of
    ``(p - y)^2`` of one class, which is also called by this name. Arguments and errors as `ece`.
    """
    p, classes = _classified(probabilities, target)
    return _mean(np.square(p - np.eye(p.shape[1])[classes]).sum(1))


@metric
def nll(probabilities: Values, target: Values) -> Statistic:
    """Negative log-likelihood: the mean of -log of the target's probability, in nats; 0 is best.

    It is the cross-entropy, and infinite where a target has probability 0. Arguments and errors as
    `ece`.
    """
    p, classes = _classified(probabilities, target)
    with np.errstate(divide="ignore"):
        return _mean(0 - np.log(p[np.arange(len(p)), classes]))


def _bins(confidence: Floats, n_bins: int) -> NDArray[np.intp]:
    """(N,) the bin of each confidence; one on an edge is in the bin below it."""
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; it must be at least 1")
    return np.searchsorted(np.arange(1, n_bins) / n_bins, confidence)


def _classified(probabilities: Values, target: Values) -> tuple[Floats, NDArray[np.intp]]:
    """Checked inputs: (N, C) probabilities in float64, and (N,) classes."""
    p, classes = as_array(probabilities).astype(float), as_array(target)
    if p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"probabilities has shape {p.shape}; expected (N, C) of C >= 2 classes")
    if classes.ndim != 1:
        raise ValueError(f"target has shape {classes.shape}; expected (N,), one class per sample")
    check_lengths("probabilities", p, "target", classes)
    if nans := int(np.isnan(p).any(1).sum()):
        raise ValueError(f"probabilities is nan for {nans} of {len(p)} samples; drop them")
    if p.min() < 0 or np.abs(p.sum(1) - 1).max() > 0.01:
        raise ValueError(
            "probabilities must be at least 0, and each row must sum to 1; for logits, pass "
            "logits.softmax(1)"
        )
    if not np.isin(classes, np.arange(p.shape[1])).all():
        raise ValueError(
            f"target must be the right classes, whole numbers from 0 to {p.shape[1] - 1}; drop "
            "samples of other classes"
        )
    return p, classes.astype(np.intp)


def _mean(values: Floats) -> Statistic:
    """The mean of (N,) values."""
    return Statistic(len(values), lambda rows: values[rows].mean())
