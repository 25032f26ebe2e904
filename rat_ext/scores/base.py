"""The base of all scores: what a score does, and what it says of itself."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._common.user_model import Model, left_alone, logits_of

if TYPE_CHECKING:
    from typing_extensions import Self

ThresholdRule = Callable[[NDArray[np.float64], NDArray[np.bool_]], float]
"""From (N,) confidences, and whether the (N,) predictions are right, to the least one accepted."""


class Setting(NamedTuple):
    """What a score's fit() chooses from a grid."""

    temperature: float
    perturbation: float
    """Of the input, in its units."""

    def __str__(self) -> str:
        perturbation = f" eps={self.perturbation:g}" if self.perturbation else ""
        return f"T={self.temperature:g}{perturbation}"


class Audit(Protocol):
    """Watches a score on the samples that choose a detector's threshold: see `Score.audit`."""

    def see(self, model: Model, x: Tensor) -> None:
        """Take note of (N, ...) inputs; the score has just had them."""

    def report(self, confidence: NDArray[np.float64], threshold: float) -> Any:
        """What the detector's report says in addition, of the (N,) confidences of all inputs."""


def comes_with(cls: type, name: str, other: str) -> bool:
    """The class that defines an attribute of `cls` knew of another: has it, or derives from it."""
    first, second = (
        next(base for base in cls.__mro__ if each in vars(base)) for each in (name, other)
    )
    return second in first.__mro__  # issubclass() would not do: ABCMeta may not be through with cls


class Score(ABC):
    """What all scores have in common. A score of one's own defines `score`, and declares the rest.

    One with a constructor or a `fit` of its own also defines `state`, if it is to be saved with a
    detector.
    """

    forward_rows: float = 1.0
    """Rows through the model forward, per sample, that score() takes."""
    backward_rows: float = 0.0
    """Rows through the model backward, per sample, that score() takes; 0: it needs no gradient."""
    logits_only: bool = False
    """The score, and its fit(), need the logits of x alone: ``score_logits(model(x))`` equals
    ``score(model, x)``, so that one forward can serve many scores."""
    fit_does: ClassVar[Literal["nothing", "choose", "learn"]] = "nothing"
    """What fit() takes from the data: nothing; a choice of one setting of the `grid` ("choose"),
    so that ``limited_to([setting])`` is as good as fitted; or more than that ("learn"). A class
    that defines fit() learns, unless it says otherwise."""
    is_probability: ClassVar[bool] = False
    """The confidence claims to be the probability that the prediction is right."""
    listed: ClassVar[bool] = True
    """`names` has it, so that an evaluation of all scores takes it along. False for a score that
    suits some kinds of input only."""
    needs_threshold: ClassVar[bool] = False
    """fit() is not enough: the score is fitted to a threshold, by `fit_to_threshold`."""
    grid: Sequence[Setting] = ()
    """The settings that fit() chooses from; empty for a score that has none."""
    setting: Setting | None = None
    """The one in use; None for a score that has none."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not comes_with(cls, "fit_does", "fit"):
            cls.fit_does = "learn"

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Choose from held-out data what the score leaves open; here nothing.

        Args:
            model: as in `score`.
            loader: yields (x, target, ...), or mappings with "pixel_values" and "labels": (N, ...)
                inputs and (N,) class indices that the model was not trained on. A mapping in the
                third place has more arguments of the model. `rat_ext.map_batches` makes such a
                loader of any other.
            progress: show a tqdm bar on standard error.
        """
        return self

    def fit_to_threshold(
        self,
        model: Model,
        loader: Iterable[Any],
        threshold: ThresholdRule,
        *,
        progress: bool = True,
    ) -> Self:
        """fit(), for a score that is to be compared with a threshold, as `Detector.fit` does.

        Args:
            model: as in `score`.
            loader: as in `fit`.
            threshold: tells the one that confidences like these would be compared with.
            progress: show tqdm bars on standard error.
        """
        return self.fit(model, loader, progress=progress)

    @property
    def needs_fit(self) -> bool:
        """fit() has to be called before score().

        A score with a fit() of its own tells when that is done; until it does, it always needs it.
        """
        return self.fit_does != "nothing"

    @abstractmethod
    def score(self, model: Model, x: Tensor) -> Tensor:
        """Confidences in the model's predictions.

        The model is run in eval mode and left as it was: parameters, their ``.grad``, train/eval
        flags and random state.

        Args:
            model: callable from (N, ...) inputs to (N, C) logits, C >= 2, or to an object with
                ``.logits``. One that takes more arguments goes through `rat_ext.with_arguments`.
            x: (N, ...) inputs on the model's device.

        Returns:
            (N,) confidences on x's device, without a graph; nan where the logits are nan.
        """

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        """The confidences of `score`, and the (N,) int64 predictions that they are of.

        The built-in scores get the predictions on the way; here they cost one more forward.
        """
        confidence = self.score(model, x)
        if not len(x):
            return confidence, no_prediction(x)
        with left_alone(model, x):
            return confidence, logits_of(model(x), len(x)).argmax(1)

    def copy(self) -> Self:
        """A score like this one that is fitted, and counts its rows, apart from it.

        A score whose fit() changes an attribute in place, rather than sets it, overrides this one.
        """
        return copy.copy(self)

    def limited_to(self, grid: Sequence[Setting]) -> Self:
        """A copy that chooses from these settings; of one, it needs no fit() to choose it.

        A score without settings stays as it is.
        """
        return self.copy()

    def audit(self) -> Audit | None:
        """What is to see the samples that choose a detector's threshold, too; here nothing."""
        return None

    def state(self) -> dict[str, Any]:
        """What `from_state` makes this score from: tensors, scores, and values that JSON has.

        A class with a constructor or a fit() of its own defines this one, too.

        Raises:
            TypeError: the score has attributes, and no state() that tells which of them matter.
        """
        if vars(self):
            raise TypeError(f"{type(self).__name__} does not define state()")
        return {}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The score, fitted, whose state() this was; here state() has the constructor's options."""
        return cls(**state)


class LogitScore(Score):
    """A score that is a function of the logits, the one thing that a subclass writes."""

    logits_only = True

    @abstractmethod
    def score_logits(self, logits: Tensor) -> Tensor:
        """(N,) confidences from (N, C) logits, differentiable in the logits."""

    def score(self, model: Model, x: Tensor) -> Tensor:
        return self.score_and_predict(model, x)[0]

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_empty(0), no_prediction(x)
        with left_alone(model, x):
            logits = logits_of(model(x), len(x))
            return self.score_logits(logits), logits.argmax(1)


def no_prediction(x: Tensor) -> Tensor:
    """The predictions of an empty batch."""
    return torch.empty(0, dtype=torch.int64, device=x.device)
