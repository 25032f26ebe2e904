"""A cheap confidence score for most samples, and an expensive one for the others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import scores
from .._common.loaders import labelled_batches
from .._common.user_model import Model, wide
from .base import Score
from .tuned import TunedScore

if TYPE_CHECKING:
    from typing_extensions import Self


RESAMPLES = 100
"""Of the bootstrap that tells where the threshold may come to lie."""


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

    def __init__(
        self,
        cheap: str | Score = "msr",
        expensive: str | Score = "rr-bs",
        *,
        max_changed: float = 0.01,
    ) -> None:
        if not 0 <= max_changed < 1:
            raise ValueError(f"max_changed is {max_changed}; it must be at least 0 and below 1")
        self.cheap, self.expensive = own(cheap), own(expensive)
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
    def forward_rows(self) -> float:
        """Measured, on the samples scored since the band was fitted; nan before."""
        return self._rows("forward_rows")

    @property
    def backward_rows(self) -> float:
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

    def fit_band(
        self,
        model: Model,
        loader: Iterable[Any],
        threshold: Callable[[NDArray[np.float64], NDArray[np.bool_]], float],
        *,
        progress: bool = True,
    ) -> Self:
        """Choose the band on (x, target, ...) batches held out.

        Args:
            model: as in `score`.
            loader: as in `fit`; the same samples will do.
            threshold: from (N,) confidences of the expensive score, and whether the predictions are
                right, to the least confidence that is to be accepted.
            progress: show a tqdm bar on standard error.
        """
        batches = []
        for x, target in labelled_batches(model, loader, progress, "fit Cascade"):
            cheap, prediction = self.cheap.score_and_predict(model, x)
            expensive = self.expensive.score(model, x)
            batches.append([value.cpu() for value in (cheap, expensive, prediction == target)])
        cheap, expensive, correct = (torch.cat(values) for values in zip(*batches, strict=True))
        expensive, correct = expensive.double().numpy(), correct.numpy()
        # The threshold to come is not known but for its spread, of which the band has to take care.
        draws = np.random.default_rng(0).integers(len(correct), size=(RESAMPLES, len(correct)))
        thresholds = [threshold(expensive[draw], correct[draw]) for draw in draws]
        laxest, strictest = np.quantile(thresholds, [0.025, 0.975], method="nearest")
        self.band = narrowest_band(
            cheap.double().numpy(),
            rejected=~(expensive >= strictest),
            accepted=expensive >= laxest,
            max_changed=self.max_changed,
        )
        self.expensive = own(self.expensive)  # its count of rows starts anew
        self._samples = self._examined = 0
        return self

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
            confidence[rows] = self.expensive.score(model, x[rows]).to(confidence.dtype)
        self._samples += len(x)
        self._examined += len(rows)
        return confidence, prediction


def narrowest_band(
    cheap: NDArray[np.float64],
    *,
    rejected: NDArray[np.bool_],
    accepted: NDArray[np.bool_],
    max_changed: float,
) -> tuple[float, float]:
    """The band of the cheap confidence with the fewest samples in it.

    Above it samples are accepted and below it rejected. At most the share ``max_changed`` of all
    samples is accepted there although ``rejected``, or rejected although ``accepted``. An end of
    the band that is not needed is infinite.

    Args:
        cheap: (N,) confidences; samples where it is nan are left out.
        rejected: (N,) those that should not be accepted unseen.
        accepted: (N,) those that should not be rejected unseen; a sample may be both.
        max_changed: in [0, 1).
    """
    budget = math.floor(max_changed * len(cheap))
    known = ~np.isnan(cheap)
    cheap, rejected, accepted = cheap[known], rejected[known], accepted[known]
    n, order = len(cheap), np.argsort(-cheap, kind="stable")
    cheap, rejected, accepted = cheap[order], rejected[order], accepted[order]
    # Most confident first: [0, begin) is accepted unseen, [begin, end) is the band, and [end, n) is
    # rejected unseen. Ties stay together.
    cuts = np.concatenate([[0], np.flatnonzero(cheap[1:] != cheap[:-1]) + 1, [n]])
    wrong_above = np.concatenate([[0], np.cumsum(rejected)])[cuts]
    wrong_below = np.concatenate([np.cumsum(accepted[::-1])[::-1], [0]])[cuts]
    allowed = wrong_above <= budget
    begins = cuts[allowed]
    ends = cuts[np.searchsorted(-wrong_below, wrong_above[allowed] - budget)]
    best = int(np.argmin(np.maximum(ends - begins, 0)))
    begin = int(begins[best])
    end = max(int(ends[best]), begin)
    low = -math.inf if end == n else math.inf if end == 0 else float(cheap[end - 1])
    high = math.inf if begin == 0 else -math.inf if begin == n else float(cheap[begin])
    return low, high


def own(score: str | Score) -> Score:
    """The score by this name, or a copy that can be fitted, and counts, apart from the original."""
    if isinstance(score, str):
        return scores.get(score)
    if not isinstance(score, Score):
        raise TypeError(f"score is a {type(score).__name__}; expected a name or a Score")
    if isinstance(score, Cascade):
        cascade = copy.copy(score)
        cascade.cheap, cascade.expensive = own(score.cheap), own(score.expensive)
        cascade._samples = cascade._examined = 0
        return cascade
    if isinstance(score, TunedScore) and not score.needs_fit:
        return score.at(score.setting)
    return copy.copy(score)
