"""Robust radii as confidence scores, under the protocol of `rat_ext.scores`.

A larger radius means a prediction more likely to be right. An infinite one (no change of the
prediction was found) is the largest confidence; such samples are tied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from .._common.user_model import Model
from ..radius.robust_radius import robust_radius, temperature_sweep
from ..search.options import SearchOptions
from .base import Setting
from .registry import register
from .tuned import TEMPERATURES, TunedScore

if TYPE_CHECKING:
    from typing_extensions import Self


RTOL = 0.05
"""The tolerance of radii that only rank: finer ones rank the same, and cost more rows
(benchmarks/coarse_radii.py)."""
_RTOL_BEFORE = 1e-2  # of detectors saved before this default was another than robust_radius's


class RadiusScore(TunedScore):
    """A robust radius, with the temperature of its ray chosen by fit().

    Args:
        temperature: one, or several for fit() to choose from; each > 0.
        options: of `rat_ext.robust_radius` (all but ``method``, ``temperature`` and ``full``), with
            its defaults, but for ``rtol``: 0.05, which ranks as finer ones do for fewer rows.
    """

    method: ClassVar[Literal["bs", "fast"]]

    def __init__(self, temperature: float | Sequence[float] = TEMPERATURES, **options: Any) -> None:
        if taken := {"method", "full"} & options.keys():
            raise TypeError(f"{type(self).__name__} sets {' and '.join(sorted(taken))} itself")
        super().__init__(temperature)
        self.options = cast(SearchOptions, {"rtol": RTOL, **options})
        self._forget_rows()

    @property
    def forward_rows(self) -> float:  # type: ignore[override]
        """Measured: the mean over the samples scored since fit(), with the ray's; nan before."""
        return self._forwards / self._samples if self._samples else math.nan

    @property
    def backward_rows(self) -> float:  # type: ignore[override]
        """Measured, as the forward rows."""
        return self._backwards / self._samples if self._samples else math.nan

    def copy(self) -> Self:
        score = super().copy()
        score._forget_rows()
        return score

    def choose(self, confidences: Tensor, correct: Tensor) -> None:
        super().choose(confidences, correct)
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._samples = self._forwards = self._backwards = 0

    def state(self) -> dict[str, Any]:
        return {"temperature": self.temperature, **self.options}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        return cls(**{"rtol": _RTOL_BEFORE, **state})

    def score(self, model: Model, x: Tensor) -> Tensor:
        """(N,) radii; inf where no change was found, nan where a row is not finite."""
        return self.score_and_predict(model, x)[0]

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        options: SearchOptions = {
            **self.options,
            "method": self.method,
            "temperature": self.temperature,
        }
        result = robust_radius(model, x, full=True, **options)
        self._samples += len(result)
        self._forwards += len(result) + int(result.forward_rows.sum())
        self._backwards += len(result) + int(result.backward_rows.sum())
        return result.radius, result.prediction

    def score_settings(
        self, model: Model, x: Tensor, settings: Sequence[Setting]
    ) -> tuple[Tensor, Tensor]:
        temperatures = [setting.temperature for setting in settings]
        options: SearchOptions = {**self.options, "method": self.method}
        results = temperature_sweep(model, x, temperatures, **options)
        return torch.stack([result.radius for result in results]), results[0].prediction


@register("rr-bs")
class RRBS(RadiusScore):
    """RR-BS: the radius from a bracket around the change of prediction (arXiv 2503.14783)."""

    method = "bs"


@register("rr-fast")
class RRFast(RadiusScore):
    """RR-Fast: the radius from logits extrapolated along the ray (arXiv 2503.14783)."""

    method = "fast"
