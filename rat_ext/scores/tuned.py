"""Scores with a temperature and an input perturbation, chosen from a grid."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import metrics
from .._common.bounds import Bounds
from .._common.loaders import labelled_batches
from .._common.user_model import Model, left_alone, logits_of, wide
from .base import LogitScore, Score, Setting, no_prediction

if TYPE_CHECKING:
    from typing_extensions import Self


# The grids of the evaluation code of RAT (arXiv 2503.14783).
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, 2.5, 3.0, 100.0, 1000.0)
PERTURBATIONS = (0.0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4, 3.5e-4, 4e-4, 6e-4, 8e-4, 1e-3)


class TunedScore(Score):
    """A score with a temperature and an input perturbation; fit() chooses them from a grid.

    The choice is the setting with the smallest AURC on the held-out data, the first of equals. A
    grid of one setting leaves nothing to choose: fit() does nothing and is not needed.

    Args:
        temperature: one, or several for fit() to choose from; each > 0.
        perturbation: likewise; each >= 0, in the units of x.

    Raises:
        ValueError: a value out of its range, or none at all.
    """

    fit_does = "choose"
    validation_aurc: dict[Setting, float]
    """After a fit() with several settings: the AURC of each."""

    def __init__(
        self, temperature: float | Sequence[float], perturbation: float | Sequence[float] = 0.0
    ) -> None:
        temperatures = _grid("temperature", temperature, lambda value: value > 0)
        perturbations = _grid("perturbation", perturbation, lambda value: value >= 0)
        self.grid = [Setting(t, p) for t in temperatures for p in perturbations]
        self.validation_aurc = {}
        self._setting = self.grid[0] if len(self.grid) == 1 else None

    @property
    def needs_fit(self) -> bool:
        return self._setting is None

    @property
    def setting(self) -> Setting:  # type: ignore[override]
        """The temperature and perturbation in use.

        Raises:
            RuntimeError: there are several, and fit() has not chosen yet.
        """
        if self._setting is None:
            raise RuntimeError(
                f"{type(self).__name__} has {len(self.grid)} settings to choose from: call "
                "fit(model, loader) with held-out data first, or construct it with one temperature "
                "and one perturbation"
            )
        return self._setting

    @property
    def temperature(self) -> float:
        """The temperature in use."""
        return self.setting.temperature

    @property
    def perturbation(self) -> float:
        """The perturbation in use."""
        return self.setting.perturbation

    @abstractmethod
    def score_settings(
        self, model: Model, x: Tensor, settings: Sequence[Setting]
    ) -> tuple[Tensor, Tensor]:
        """(settings, N) confidences at each setting, and the (N,) predictions."""

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Choose the setting with the smallest AURC on (x, target, ...) batches held out."""
        if len(self.grid) == 1:
            return self
        confidences, correct = [], []
        for bound, x, target in labelled_batches(
            model, loader, progress, f"fit {type(self).__name__}"
        ):
            confidence, prediction = self.score_settings(bound, x, self.grid)
            confidences.append(confidence.cpu())
            correct.append((prediction == target).cpu())
        self.choose(torch.cat(confidences, 1), torch.cat(correct))
        return self

    def choose(self, confidences: Tensor, correct: Tensor) -> None:
        """Take the setting with the smallest AURC.

        Args:
            confidences: (settings, N), in the order of the grid.
            correct: (N,) bool, whether the predictions are right.
        """
        aurcs = [metrics.aurc(confidence, correct) for confidence in confidences]
        self.validation_aurc = dict(zip(self.grid, aurcs, strict=True))
        self._setting = min(self.grid, key=self.validation_aurc.__getitem__)

    def limited_to(self, grid: Sequence[Setting]) -> Self:
        score = self.copy()
        score.grid = list(grid)
        score._setting = score.grid[0] if len(score.grid) == 1 else None
        return score

    def at(self, setting: Setting) -> Self:
        """This score with one setting, which needs no fit() to choose it."""
        return self.limited_to([setting])


class TunedLogitScore(TunedScore, LogitScore):
    """A `LogitScore` with a temperature, taken at an input that may be perturbed.

    The input of perturbation eps is ``clip(x + step_sign * eps * sign(grad_x score), *bounds)``. A
    score that is perturbed must not saturate, or the sign is lost in rounding: the log-odds of a
    probability have the gradient's sign, the probability itself has it only in exact arithmetic.

    Args:
        temperature: one, or several for fit() to choose from; each > 0.
        perturbation: likewise; each >= 0, in the units of x. fit() takes a backward per temperature
            and a forward per temperature and perturbation other than 0.
        bounds: smallest and largest value of an input element, for perturbed inputs.
    """

    step_sign: ClassVar[int] = 1
    """+1: the perturbation raises the confidence; -1: it lowers it."""

    def __init__(
        self,
        temperature: float | Sequence[float] = TEMPERATURES,
        perturbation: float | Sequence[float] = 0.0,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(temperature, perturbation)
        self.bounds = bounds
        self._range = Bounds.parse(bounds, torch.empty(1, 1))

    @property
    def logits_only(self) -> bool:  # type: ignore[override]
        """No input is perturbed, whichever setting fit() chooses if it has to."""
        settings = self.grid if self._setting is None else [self._setting]
        return not any(setting.perturbation for setting in settings)

    @property
    def forward_rows(self) -> float:  # type: ignore[override]
        return 1.0 if self.logits_only else 2.0

    @property
    def backward_rows(self) -> float:  # type: ignore[override]
        return 0.0 if self.logits_only else 1.0

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_empty(0), no_prediction(x)
        confidences, prediction = self.score_settings(model, x, [self.setting])
        return confidences[0], prediction

    def state(self) -> dict[str, Any]:
        return {**self.setting._asdict(), "bounds": list(self.bounds)}

    def score_settings(
        self, model: Model, x: Tensor, settings: Sequence[Setting]
    ) -> tuple[Tensor, Tensor]:
        perturbed = any(setting.perturbation for setting in settings)
        if perturbed:
            outside = self._range.outside(x)
            if outside.any():
                raise self._range.error(x[outside], len(x))
        with left_alone(model, x):
            # A tensor made in inference mode cannot enter a graph.
            leaf = x.clone() if x.is_inference() else x.detach()
            with torch.set_grad_enabled(perturbed):
                logits = logits_of(model(leaf.requires_grad_(perturbed)), len(x))
            x, confidences, directions = leaf.detach(), [], {}
            for setting in settings:
                score = self.at(setting)
                at = logits.detach()
                if setting.perturbation:
                    if setting.temperature not in directions:
                        directions[setting.temperature] = score._direction(logits, leaf)
                    step = self.step_sign * setting.perturbation
                    point = x + step * directions[setting.temperature]
                    at = logits_of(model(self._range.clip(point)), len(x))
                confidences.append(score.score_logits(at))
        return torch.stack(confidences), logits.detach().argmax(1)

    def _direction(self, logits: Tensor, leaf: Tensor) -> Tensor:
        """The sign of the gradient of the score with respect to the input."""
        if not logits.requires_grad:
            raise RuntimeError(
                "the logits do not depend on the input through autograd, so there is no direction "
                "to perturb it in. Is the model's forward under no_grad, or does it detach? With "
                "perturbation=0.0 no gradient is needed"
            )
        with torch.enable_grad():
            values = wide(logits.detach()).requires_grad_()
            (seed,) = torch.autograd.grad(self.score_logits(values).sum(), values)
        (gradient,) = torch.autograd.grad(logits, leaf, seed.to(logits.dtype), retain_graph=True)
        return gradient.sign()


def _grid(
    name: str, values: float | Sequence[float], allowed: Callable[[float], bool]
) -> list[float]:
    grid = [float(value) for value in (values if isinstance(values, Iterable) else [values])]
    if not grid:
        raise ValueError(f"{name} is empty; give one value, or several to choose from")
    for value in grid:
        if not (math.isfinite(value) and allowed(value)):
            raise ValueError(f"{name} {value} is out of range")
    return grid
