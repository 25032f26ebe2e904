"""How far confidences are apart on the same samples, by a bootstrap that pairs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bootstrap import (
    Estimate,
    Floats,
    Metric,
    Rows,
    Statistic,
    Values,
    bootstrap,
    check_level,
)


def differences(
    metric: Metric[...],
    confidences: Mapping[str, Values],
    baseline: Values,
    correct: Values,
    *,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> dict[str, Estimate]:
    """A metric of several confidences, less that of a baseline, on the same N samples. ::

        found = differences(metrics.aurc, {"margin": margin}, msr, correct)["margin"]
        better = found.high < 0

    Every resample of the samples measures all the confidences, so what makes a sample hard for all
    of them cancels. The intervals are simultaneous: the probability that all of them hold their
    true difference is ``level``, so that it does no harm to look for the best one. They are the
    sup-t band of Montiel Olea and Plagborg-Møller (J. Applied Econometrics 34, 2019): each
    difference plus and minus so many of its standard errors, equally many for all.

    Args:
        metric: of this module, such as `aurc`. One of calibration takes probabilities for the
            confidences, and the target for ``correct``.
        confidences: (N,) each, by name.
        baseline: (N,).
        correct: (N,) bool or 0/1.
        n_boot: resamples.
        level: probability that all the intervals are right.
        seed: of the resamples.
        options: of the metric.

    Returns:
        For each name its difference from the baseline. Resamples where the metric is undefined are
        left out.

    Raises:
        ValueError: as the metric, or n_boot is less than 2.
        TypeError: metric is not one of this module.
    """
    prepare: Any = getattr(metric, "__wrapped__", None)
    if prepare is None:
        raise TypeError("metric must be one of rat_ext.metrics; its options are given beside it")
    every = stacked([prepare(one, correct, **options) for one in (baseline, *confidences.values())])
    from_first = np.eye(len(confidences) + 1)[1:] - np.eye(len(confidences) + 1)[0]
    found = simultaneous(every, from_first, n_boot, level, seed)
    return dict(zip(confidences, found, strict=True))


def stacked(statistics: Sequence[Statistic]) -> Statistic:
    """The values of K statistics of the same samples, (K,)."""
    return Statistic(
        statistics[0].size, lambda rows: np.array([each.of(rows) for each in statistics])
    )


def simultaneous(
    statistic: Statistic, contrasts: Floats, n_boot: int, level: float, seed: int
) -> list[Estimate]:
    """Intervals of differences that hold together: the sup-t band of `differences`.

    Args:
        statistic: of K values.
        contrasts: (J, K): each difference is a row times the K values.
        n_boot: resamples.
        level: probability that all J intervals are right.
        seed: of the resamples.

    Raises:
        ValueError: n_boot is less than 2, or level not between 0 and 1.
    """
    if n_boot < 2:
        raise ValueError(f"n_boot is {n_boot}; differences need at least 2 resamples")
    check_level(level)
    values = contrasts @ statistic.of(slice(None))
    draws = bootstrap(statistic, n_boot, seed) @ contrasts.T
    draws = draws[~np.isnan(draws).any(1)]
    if not len(values) or len(draws) < 2:
        return [Estimate(value, np.nan, np.nan) for value in values.tolist()]
    error = draws.std(0, ddof=1)
    apart = np.divide(abs(draws - values), error, out=np.zeros_like(draws), where=error > 0)
    margin = np.quantile(apart.max(1), level) * error
    return list(
        map(Estimate, values.tolist(), (values - margin).tolist(), (values + margin).tolist())
    )


def over_parts(size: int, parts: Sequence[tuple[NDArray[np.intp], Statistic]]) -> Statistic:
    """The mean of statistics of parts of N samples, such as the test parts of several splits.

    The N samples are resampled, and with them all the parts, which may overlap.

    Args:
        size: N.
        parts: for each part the indices of its samples among the N, and its statistic.
    """

    def of(rows: Rows) -> Any:
        times = np.bincount(np.arange(size)[rows], minlength=size)
        resampled = [np.repeat(np.arange(len(index)), times[index]) for index, _ in parts]
        return np.mean([one.of(r) for (_, one), r in zip(parts, resampled, strict=True)], axis=0)

    return Statistic(size, of)
