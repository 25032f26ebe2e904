"""A cheap confidence score for most samples, and an expensive one for the others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._common.loaders import labelled_batches
from .._common.per_sample import of_rows
from .._common.user_model import Model, wide
from .band import fitted_band
from .base import Score, ThresholdRule
from .registry import as_score, register

if TYPE_CHECKING:
    from typing_extensions import Self


@register("cascade")
class Cascade(Score):
    """A cheap score for most samples, an expensive one for those near the threshold.

    Where the cheap score is above a band the confidence is inf, below it -inf, and within it (ends
    included) that of the expensive score. So it is a score like any other: what `Detector.fit`
    guarantees for scores holds for the cascade's own decisions, whatever the band.

    `Detector.fit` fits the band on the samples that tune the score: the one with the fewest samples
    in it of those that change at most ``max_changed`` of the decisions there, for any threshold
    between the 2.5 % and the 97.5 % quantile of the thresholds that bootstrap resamples would have.

    Args:
        cheap: a score, or the name of one; best one of the logits alone.
        expensive: likewise.
        max_changed: share of all decisions, in [0, 1).
    """

    needs_threshold = True

    def __init__(
        self,
        cheap: str | Score = "msr",
        expensive: str | Score = "rr-bs",
        *,
        max_changed: float = 0.01,
    ) -> None:
        if not 0 <= max_changed < 1:
            raise ValueError(f"max_changed is {max_changed}; it must be at least 0 and below 1")
        self.cheap, self.expensive = as_score(cheap), as_score(expensive)
        self.max_changed = max_changed
        self.band: tuple[float, float] | None = None
        """The least and the largest cheap confidence that the expensive score is needed for."""
        self._samples = self._examined = 0

    @property
    def needs_fit(self) -> bool:
        return self.band is None

    @property
    def examined(self) -> float:
        """Measured: the share of the samples scored that needed the expensive score."""
        return self._examined / self._samples if self._samples else math.nan

    @property
    def forward_rows(self) -> float:  # type: ignore[override]
        """Measured, on the samples scored since the band was fitted; nan before."""
        return self._rows("forward_rows")

    @property
    def backward_rows(self) -> float:  # type: ignore[override]
        return self._rows("backward_rows")

    def _rows(self, which: str) -> float:
        more = self.examined * getattr(self.expensive, which) if self._examined else 0.0
        return getattr(self.cheap, which) + more if self._samples else math.nan

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Fit the two scores, where they need it; not the band, which `fit_band` does."""
        for score in (self.cheap, self.expensive):
            if score.needs_fit:
                score.fit(model, loader, progress=progress)
        return self

    def fit_to_threshold(
        self,
        model: Model,
        loader: Iterable[Any],
        threshold: ThresholdRule,
        *,
        progress: bool = True,
    ) -> Self:
        """Fit the two scores, where they need it, and the band; all on the same samples."""
        self.fit(model, loader, progress=progress)
        return self.fit_band(model, loader, threshold, progress=progress)

    def fit_band(
        self,
        model: Model,
        loader: Iterable[Any],
        threshold: ThresholdRule,
        *,
        progress: bool = True,
    ) -> Self:
        """Choose the band on (x, target, ...) batches held out.

        Args:
            model: as in `score`.
            loader: as in `fit`; the same samples will do.
            threshold: chooses the threshold of the expensive score.
            progress: show a tqdm bar on standard error.
        """
        batches = []
        for bound, x, target in labelled_batches(model, loader, progress, "fit Cascade"):
            cheap, prediction = self.cheap.score_and_predict(bound, x)
            expensive = self.expensive.score(bound, x)
            batches.append([value.cpu() for value in (cheap, expensive, prediction == target)])
        cheap, expensive, correct = (torch.cat(values) for values in zip(*batches, strict=True))
        self.band = fitted_band(
            cheap.double().numpy(),
            expensive.double().numpy(),
            correct.numpy(),
            threshold,
            self.max_changed,
        )
        self.cheap, self.expensive = self.cheap.copy(), self.expensive.copy()  # count rows anew
        self._samples = self._examined = 0
        return self

    def copy(self) -> Self:
        score = super().copy()
        score.cheap, score.expensive = self.cheap.copy(), self.expensive.copy()
        score._samples = score._examined = 0
        return score

    def audit(self) -> CascadeAudit:
        return CascadeAudit(self)

    def state(self) -> dict[str, Any]:
        return {
            "cheap": self.cheap,
            "expensive": self.expensive,
            "max_changed": self.max_changed,
            # As text: the ends may be infinite, for which JSON has no number.
            "band": None if self.band is None else [str(end) for end in self.band],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        options = dict(state)
        band = options.pop("band")
        score = cls(**options)
        if band is not None:
            low, high = map(float, band)
            score.band = low, high
        return score

    def score(self, model: Model, x: Tensor) -> Tensor:
        return self.score_and_predict(model, x)[0]

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.band is None:
            raise RuntimeError("the cascade has no band yet: Detector.fit fits it on held-out data")
        cheap, prediction = self.cheap.score_and_predict(model, x)
        low, high = self.band
        above = cheap > high
        within = (cheap >= low) & ~above
        # A cheap confidence of nan stays nan: it is neither below the band nor in it.
        confidence = wide(cheap).masked_fill(cheap < low, -math.inf)
        confidence = confidence.masked_fill(above, math.inf)
        rows = within.nonzero().squeeze(1)
        if len(rows):
            confidence[rows] = self.expensive.score(of_rows(model, rows), x[rows]).to(
                confidence.dtype
            )
        self._samples += len(x)
        self._examined += len(rows)
        return confidence, prediction


@dataclass(frozen=True)
class CascadeReport:
    """What a `Cascade` saved on the held-out data, per sample."""

    examined: float
    """Share of the samples that the expensive score was needed for."""
    changed: float
    """Share of the samples decided otherwise than by the expensive score alone, at the same
    threshold."""
    forward_rows: float
    """Rows through the model forward that the cascade takes."""
    backward_rows: float
    expensive_forward_rows: float
    """Rows that the expensive score alone takes."""
    expensive_backward_rows: float


class CascadeAudit:
    """What the expensive score alone decides and costs, beside a cascade on the same samples."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade, self.alone = cascade, cascade.expensive.copy()
        self._confidences: list[Tensor] = []

    def see(self, model: Model, x: Tensor) -> None:
        self._confidences.append(self.alone.score(model, x).cpu())

    def report(self, confidence: NDArray[np.float64], threshold: float) -> CascadeReport:
        alone = torch.cat(self._confidences).double().numpy()
        return CascadeReport(
            examined=self.cascade.examined,
            changed=float(np.mean((confidence >= threshold) != (alone >= threshold))),
            forward_rows=self.cascade.forward_rows,
            backward_rows=self.cascade.backward_rows,
            expensive_forward_rows=self.alone.forward_rows,
            expensive_backward_rows=self.alone.backward_rows,
        )
