"""Signs that the held-out samples are a part of data sorted by class, and unlike the rest of them.

Sorted data as a whole do no harm, nor do classes that do not come up at all. What is a sign of a
part is a class that the model knows and the targets lack, where chance would not have it so.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import NDArray

CHANCE = 1e-7
"""Of each sign to be seen in a random sample."""


def warn_of_a_part(target: NDArray[np.int64], prediction: NDArray[np.int64]) -> None:
    """Warn if samples in this order seem to be a part of data sorted by class.

    Args:
        target: (N,) in the order in which the loader gave them.
        prediction: (M,) those that are known, in any order.
    """
    predicted, times = np.unique(prediction, return_counts=True)
    missing = ~np.isin(predicted, target)
    if not missing.any():
        return
    most = np.argmax(times * missing)
    what = f"{predicted[most]}, which the model predicts"
    # A class that is right in half of its predictions at least has, of m, no target by a chance of
    # 2^-m at most; and it is one of several classes.
    if len(predicted) * 0.5 ** float(times[most]) <= CHANCE:
        sign = f"no held-out target is {what} {times[most]:,} times"
    elif chance_of_runs(target) <= CHANCE:
        sign = f"the held-out targets are in the order of their classes, and none is {what}"
    else:
        return
    warnings.warn(
        f"{sign}: are they a part of data sorted by class? Then no bound holds for the rest. Hold "
        "out a random sample (torch.utils.data.random_split; --limit of the command line draws "
        "one). If new data have no such targets either, nothing is wrong",
        RuntimeWarning,
        stacklevel=3,
    )


def chance_of_runs(values: NDArray[np.int64]) -> float:
    """A bound on the chance that values in random order make as few runs of equal ones as these.

    As in the test of Wald and Wolfowitz, given how often each value occurs; but no approximation,
    which would be far off for chances so small.
    """
    from scipy.special import gammaln, logsumexp

    n, (_, counts) = len(values), np.unique(values, return_counts=True)
    if len(counts) < 2:
        return 1.0
    # r runs begin at r - 1 of the other n - 1 places, and each has another value than the last.
    others = np.arange(1 + np.count_nonzero(np.diff(values)))
    places = gammaln(n) - gammaln(others + 1) - gammaln(n - others)
    orders = logsumexp(places + others * math.log(len(counts) - 1)) + math.log(len(counts))
    log_chance = orders - (gammaln(n + 1) - gammaln(counts + 1).sum())
    return float(np.exp(min(log_chance, 0.0)))
