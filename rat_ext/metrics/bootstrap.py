"""What every metric has: checked input, a value, and an interval by the bootstrap."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, cast, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Values = torch.Tensor | ArrayLike
Floats = NDArray[np.float64]
Rows = NDArray[np.intp] | slice
_P = ParamSpec("_P")


class Estimate(NamedTuple):
    """A metric and its bootstrap confidence interval."""

    value: float
    low: float
    high: float


class Statistic(NamedTuple):
    """A function of N samples whose input is checked and prepared, so that resamples are cheap."""

    size: int
    """N."""
    of: Callable[[Rows], Any]
    """Its value on these rows of the samples, some of which may be repeated, others missing."""


class Metric(Protocol[_P]):
    """A function as `metric` makes it, with an interval if asked."""

    @overload
    def __call__(self, *args: _P.args, **options: _P.kwargs) -> float: ...

    # Python has no type for a function's own arguments and more keywords: here they are any.
    @overload
    def __call__(
        self, *args: Any, n_boot: int, level: float = 0.95, seed: int = 0, **options: Any
    ) -> float | Estimate: ...


_BOOTSTRAP = """Bootstrap: with ``n_boot`` resamples (0: none) the result is an `Estimate`, whose
interval has the confidence ``level``; ``seed`` is that of the resamples."""


def metric(prepare: Callable[_P, Statistic]) -> Metric[_P]:
    """Makes a metric of a function that prepares its statistic: evaluates it, and its bootstrap."""

    def measure(
        *args: Any, n_boot: int = 0, level: float = 0.95, seed: int = 0, **options: Any
    ) -> float | Estimate:
        statistic = prepare(*args, **options)
        return estimates([prepare.__name__], statistic, n_boot, level, seed)[0]

    # For `help`: the function's own arguments stand where `measure` has *args and **options.
    own = inspect.signature(prepare).parameters.values()
    boot = [*inspect.signature(measure).parameters.values()][1:-1]
    made: Any = functools.update_wrapper(measure, prepare)
    made.__signature__ = inspect.Signature([*own, *boot], return_annotation="float | Estimate")
    made.__doc__ = f"{inspect.cleandoc(prepare.__doc__ or '')}\n\n{_BOOTSTRAP}"
    return cast(Metric[_P], made)


def estimates(
    names: Sequence[str], statistic: Statistic, n_boot: int, level: float, seed: int
) -> list[float | Estimate]:
    """The values of a statistic that gives one for each name, all on the same resamples.

    A value is nan where it is undefined for want of right or of wrong predictions.
    """
    if n_boot < 0:
        raise ValueError(f"n_boot is {n_boot}; it must be 0 (no interval) or more")
    check_level(level)
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
    columns = bootstrap(statistic, n_boot, seed).T
    return [
        Estimate(v, *_interval(column, level)) for v, column in zip(values, columns, strict=True)
    ]


def bootstrap(statistic: Statistic, n_boot: int, seed: int) -> Floats:
    """(n_boot, K): the statistic's K values on each of that many resamples of its samples."""
    rng, size = np.random.default_rng(seed), statistic.size
    draws = np.array([statistic.of(rng.integers(size, size=size)) for _ in range(n_boot)])
    return draws.reshape(n_boot, -1)


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1")


def _interval(draws: Floats, level: float) -> tuple[float, float]:
    defined = draws[~np.isnan(draws)]  # a resample of few errors may have none
    if not len(defined):
        return math.nan, math.nan
    # There is no middle between a finite draw and an infinite one.
    method: Any = "linear" if np.isfinite(defined).all() else "inverted_cdf"
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2], method=method)
    return float(low), float(high)


def check_lengths(a: str, first: NDArray[Any], b: str, second: NDArray[Any]) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"{a} has {len(first)} samples and {b} has {len(second)}; they must be equal"
        )
    if not len(first):
        raise ValueError(f"{a} and {b} are empty; a metric needs at least one sample")


def as_array(values: Values) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        # numpy has no bfloat16.
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values)
