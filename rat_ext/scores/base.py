"""The base of all scores, and the table of them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .._common.user_model import Model, left_alone, logits_of

if TYPE_CHECKING:
    from typing_extensions import Self


_registry: dict[str, type[Score]] = {}


_ScoreType = TypeVar("_ScoreType", bound="type[Score]")


def register(name: str) -> Callable[[_ScoreType], _ScoreType]:
    """Class decorator that makes a `Score` available as ``get(name)``.

    Raises:
        ValueError: another class has this name.
        TypeError: the class is not a Score.
    """

    def add(cls: _ScoreType) -> _ScoreType:
        if not issubclass(cls, Score):
            raise TypeError(f"{cls.__name__} is not a rat_ext.scores.Score; derive it from one")
        if name in _registry:
            raise ValueError(f"{name!r} is already {_registry[name].__qualname__}; choose another")
        _registry[name] = cls
        return cls

    return add


def names() -> list[str]:
    """The registered names, in the order of registration."""
    return list(_registry)


def get(name: str, **options: Any) -> Score:
    """A new score by its registered name; options go to its constructor.

    Raises:
        ValueError: no score has this name.
    """
    if name not in _registry:
        raise ValueError(f"no score is named {name!r}; there are {', '.join(map(repr, names()))}")
    return _registry[name](**options)


def name_of(score: Score) -> str | None:
    """The name under which a score's class is registered; None if it is not."""
    return next((name for name, cls in _registry.items() if cls is type(score)), None)


class Score(ABC):
    """What all scores have in common."""

    forward_rows: float = 1.0
    """Rows through the model forward, per sample, that score() takes."""
    backward_rows: float = 0.0
    """Rows through the model backward, per sample, that score() takes."""
    logits_only: bool = False
    """The score needs the logits of x alone: ``score_logits(model(x))`` equals ``score(model, x)``,
    so that one forward can serve many scores."""

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Choose from held-out data what the score leaves open; here nothing.

        Args:
            model: as in `score`.
            loader: yields (x, target, ...): (N, ...) inputs and (N,) class indices that the model
                was not trained on.
            progress: show a tqdm bar on standard error.
        """
        return self

    @property
    def needs_fit(self) -> bool:
        """fit() has to be called before score().

        A score with a fit() of its own tells when that is done; until it does, it always needs it.
        """
        return type(self).fit is not Score.fit

    @abstractmethod
    def score(self, model: Model, x: Tensor) -> Tensor:
        """Confidences in the model's predictions.

        The model is run in eval mode and left as it was: parameters, their ``.grad``, train/eval
        flags and random state.

        Args:
            model: callable from (N, ...) inputs to (N, C) logits, C >= 2, or to an object with
                ``.logits``.
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
            return confidence, _no_prediction(x)
        with left_alone(model, x):
            return confidence, logits_of(model(x), len(x)).argmax(1)

    def state(self) -> dict[str, Any]:
        """What `from_state` makes this score from: tensors, and values that JSON has.

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
            return x.new_empty(0), _no_prediction(x)
        with left_alone(model, x):
            logits = logits_of(model(x), len(x))
            return self.score_logits(logits), logits.argmax(1)


def _no_prediction(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device)
