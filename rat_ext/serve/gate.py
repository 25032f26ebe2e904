"""Runs a classifier and what tells whether to trust it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..radius import robust_radius
from ..scores.base import Score
from ..scores.radius import RadiusScore
from ..search.options import SearchOptions


@dataclass(frozen=True)
class Answer:
    """What is known about one input."""

    prediction: int
    radius: float | None = None
    """Robust radius, in the units of the input; inf where no change was found. None: not asked."""
    confidence: float | None = None
    """The detector's; None without one."""
    probability: float | None = None
    """That the prediction is right, if the detector tells it."""
    accepted: bool | None = None
    """The detector's verdict; None without one."""


class NotFiniteError(FloatingPointError):
    """The model's logits of an input are not finite."""


@dataclass(frozen=True)
class Gate:
    """From inputs to predictions with their radius, and the verdict of a detector.

    Args:
        model: (N, ...) inputs to (N, classes) logits.
        detector: called with (N, ...) inputs, returns an object with (N,) tensors ``prediction``,
            ``confidence``, ``accepted`` and perhaps ``probability``; none: no verdict.
        radius: measure radii; without them, a detector is needed. The confidence of a detector that
            goes by a radius is that radius, and is not measured twice.
        device: where the inputs are moved to.
        options: of `rat_ext.robust_radius`.
    """

    model: nn.Module
    detector: Callable[[Tensor], Any] | None = None
    radius: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        if self.detector is None and not self.radius:
            raise ValueError("there is neither a detector nor a radius to judge predictions by")

    @property
    def _confidence_is_radius(self) -> bool:
        return isinstance(getattr(self.detector, "score", None), RadiusScore)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Answer | NotFiniteError]:
        """For each of the inputs, all of one shape, what is known about it."""
        x = torch.stack(list(inputs)).to(self.device)
        columns: dict[str, Tensor] = {}
        with warnings.catch_warnings():
            # Told to whoever sent the row.
            warnings.filterwarnings("ignore", ".*are not finite", RuntimeWarning)
            if self.radius and not self._confidence_is_radius:
                result = robust_radius(self.model, x, full=True, **self.options)
                columns = {"prediction": result.prediction, "radius": result.radius}
            if self.detector is not None:
                verdict = self.detector(x)
                for name in ("prediction", "confidence", "probability", "accepted"):
                    if (value := getattr(verdict, name, None)) is not None:
                        columns[name] = value
                if self._confidence_is_radius:
                    columns["radius"] = verdict.confidence
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [_answer(dict(zip(columns, row, strict=True))) for row in rows]

    def warm_up(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Run one input in the middle of the bounds.

        Raises:
            ValueError: the model does not take such inputs, or the detector's score none at the
                ends of the bounds.
        """
        low, high = cast("tuple[float, float]", self.options.get("bounds", (0.0, 1.0)))
        ends = torch.stack([torch.full(shape, end, dtype=dtype) for end in (low, high)])
        for score in _scores_in(getattr(self.detector, "score", None)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # rows that are not finite
                    score.score(self.model, ends.to(self.device))
            except ValueError as error:
                raise ValueError(
                    f"the detector does not take all inputs within bounds = ({low:g}, {high:g}); "
                    f"serve the bounds that it was fitted with, or fit one with these: {error}"
                ) from error
            except Exception:
                break  # the model's own, told below
        try:
            (answer,) = self([torch.full(shape, (low + high) / 2, dtype=dtype)])
        except Exception as error:
            raise ValueError(f"the model fails on an input of shape {shape}: {error}") from error
        if isinstance(answer, NotFiniteError):
            raise ValueError(f"on an input of shape {shape}, {answer}")


def _scores_in(score: Any) -> list[Score]:
    """A detector's score, and those that it is made of: a cascade runs one of its own seldom."""
    if not isinstance(score, Score):
        return []
    return [score, *(part for each in vars(score).values() for part in _scores_in(each))]


def _answer(values: dict[str, Any]) -> Answer | NotFiniteError:
    if values["prediction"] < 0 or math.isnan(values.get("radius", 0.0)):
        return NotFiniteError("the model's logits or their gradient are not finite")
    return Answer(**values)
