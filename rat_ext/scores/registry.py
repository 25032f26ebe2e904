"""The scores by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .base import Score

_registry: dict[str, type[Score]] = {}
_families: dict[str, Callable[[str], type[Score]]] = {}
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


def register_family(
    name: str,
) -> Callable[[Callable[[str], type[Score]]], Callable[[str], type[Score]]]:
    """Decorator of a function from MEMBER to a class of scores, for ``get("NAME:MEMBER")``."""

    def add(family: Callable[[str], type[Score]]) -> Callable[[str], type[Score]]:
        _families[name] = family
        return family

    return add


def names() -> list[str]:
    """The registered names of scores for any input that fit() makes ready, as registered."""
    return [name for name, kind in _registry.items() if kind.listed and not kind.needs_threshold]


def kind_of(name: str) -> type[Score]:
    """The class registered under a name.

    Raises:
        ValueError: no score has this name.
    """
    family, _, member = name.partition(":")
    if member and family in _families:
        return _families[family](member)
    if name not in _registry:
        known = [each for each, kind in _registry.items() if not kind.needs_threshold]
        known += [f"{each}:NAME" for each in _families]
        raise ValueError(f"no score is named {name!r}; there are {', '.join(map(repr, known))}")
    return _registry[name]


def name_of(score: Score) -> str | None:
    """The name under which a score's class is registered; None if it is not."""
    return next((name for name, kind in _registry.items() if kind is type(score)), None)


def get(name: str, **options: Any) -> Score:
    """A new score by its registered name; options go to its constructor.

    Raises:
        ValueError: no score has this name.
    """
    return kind_of(name)(**options)


def as_score(score: str | Score) -> Score:
    """A new score by this name, or a copy of this one."""
    if isinstance(score, str):
        return get(score)
    if not isinstance(score, Score):
        raise TypeError(f"score is a {type(score).__name__}; expected a name or a Score")
    return score.copy()
