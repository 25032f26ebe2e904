"""The range of an input: one for all elements, one for each feature, or none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = float | Tensor

UNBOUNDED_REACH = 1e6
"""How far a search goes by default where the distance of two inputs has no limit."""

ROUNDING = 4
"""Spacings of floating-point numbers by which an input may leave its bounds."""

_ADVICE = (
    "The usual cause is normalising before the model: put the normalisation inside the model, as "
    "its first layer, and pass x unnormalised. If x has another range, pass bounds=(low, high), "
    "or bounds=None for none"
)


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest values: two numbers, which may be infinite, or two tensors of a row."""

    low: Value
    high: Value

    @classmethod
    def parse(cls, bounds: Any, x: Tensor) -> Bounds:
        """The bounds that a user gave for inputs x: (low, high), each a number, None, or a tensor.

        Raises:
            ValueError: not two ends, an end that is nan or does not fit a row of x, or a low end
                that is not below the high one.
        """
        ends = (None, None) if bounds is None else bounds
        try:
            low, high = (
                _end(end, infinite, x)
                for end, infinite in zip(ends, (-math.inf, math.inf), strict=True)
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"bounds is {bounds}; expected (low, high), each a number, None, or a tensor that "
                f"broadcasts to a row of x, {tuple(x.shape[1:])}; or None ({error})"
            ) from error
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low, high = (
                torch.as_tensor(end, dtype=torch.float64)
                .broadcast_to(x.shape[1:])
                .to(x.device, torch.float32 if x.device.type == "mps" else torch.float64)
                for end in (low, high)
            )
            if not ((low <= high).all() and (low < high).any()):
                raise ValueError("bounds has a low end above its high end, or no element can move")
            if (low == low.min()).all() and (high == high.max()).all():
                return cls(float(low.min()), float(high.max()))
        elif not low < high:
            raise ValueError(f"bounds is {bounds}; low must be below high")
        return cls(low, high)

    @property
    def uniform(self) -> bool:
        """One range for all elements."""
        return not isinstance(self.low, Tensor)

    @property
    def finite(self) -> bool:
        """No end is infinite."""
        return bool(torch.as_tensor(self.width).isfinite().all())

    @property
    def width(self) -> Value:
        """How far the ends are apart."""
        return self.high - self.low

    def reach(self, norm: str, x: Tensor) -> float:
        """The largest distance of two inputs like a row of x; `UNBOUNDED_REACH` if it is none."""
        width = torch.as_tensor(self.width, dtype=torch.float64).broadcast_to(x.shape[1:])
        reach = float(width.max() if norm == "linf" else width.norm())
        return reach if math.isfinite(reach) else UNBOUNDED_REACH

    def slack(self, dtype: torch.dtype) -> float:
        """How far an input may lie outside, which rounding may do: some spacings of its numbers.

        Inputs in float64 may have come from float32.
        """
        ends = [torch.as_tensor(end, dtype=torch.float64) for end in (self.low, self.high)]
        largest = max(float(end.abs().where(end.isfinite(), 0).max()) for end in ends)
        return ROUNDING * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * largest

    def clip(self, x: Tensor) -> Tensor:
        """x with every element moved to the nearest value that it may have."""
        if isinstance(self.low, Tensor) and isinstance(self.high, Tensor):
            return x.clamp(self.low.to(x), self.high.to(x))
        return x.clamp(float(self.low), float(self.high))

    def outside(self, x: Tensor) -> Tensor:
        """(N,) bool: an element of the row leaves the bounds by more than rounding does."""
        slack = self.slack(x.dtype)
        wide = x if x.dtype == torch.float64 else x.float()
        return ((wide < self.low - slack) | (wide > self.high + slack)).flatten(1).any(1)

    def error(self, outside: Tensor, rows: int) -> ValueError:
        """The error for an input of `rows` rows of which those in `outside` leave the bounds."""
        least, most = (f"{value.item():.9g}" for value in outside.aminmax())
        return ValueError(
            f"x has values from {least} to {most}, outside bounds {self}, in {len(outside)} of "
            f"{rows} rows. {_ADVICE}"
        )

    def __str__(self) -> str:
        if not self.uniform:
            return "of its features"
        return f"({self.low:g}, {self.high:g})"


def _end(end: Any, infinite: float, x: Tensor) -> Value:
    if end is None:
        return infinite
    value = torch.as_tensor(end, dtype=torch.float64)
    if value.isnan().any():
        raise ValueError("an end is nan")
    if value.ndim == 0:
        return float(value)
    value.broadcast_to(x.shape[1:])  # raises if it does not fit
    return value
