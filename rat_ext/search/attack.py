"""The table of attacks: the ways to find the nearest change of a prediction, by name.

The search of an attack registers itself, beside its code:

    @register("fgsm_l2", norm="l2", by_gradient=True)
    class VectorRay(BracketSearch): ...
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from .._common.user_model import Model

Norm = Literal["linf", "l2"]

AttackFunction = Callable[[Any, Tensor, Tensor], Tensor]
"""From (model, x, y) to inputs near x that the model should not classify as y."""


class Searching(Protocol):
    """The search of an attack; `bracket_search.BracketSearch` says what its methods do."""

    def aim(
        self, leaf: Tensor, logits: Tensor, begin: int = 0, retain_graph: bool = False
    ) -> None: ...
    def exclude(self, rows: Tensor) -> None: ...
    def run(self) -> None: ...
    def result(self) -> Any: ...


SearchFactory = Callable[[Model, Tensor, int, Any], Searching]
"""From (model, x, classes, options) to a search."""

_Factory = TypeVar("_Factory", bound=SearchFactory)


@dataclass(frozen=True)
class Attack:
    """A way to find the nearest change of the prediction."""

    name: str
    norm: Norm = "linf"
    search: SearchFactory | None = None
    """None for a function of the user's, which `rat_ext.attacks.borrowed` searches with."""
    library: str | None = None
    """The package that has it; None where it is ours, or the user's."""
    by_gradient: bool = False
    """It follows the gradient of the log-odds: it has a temperature, and can be aimed at a
    class."""
    iterative: bool = False
    """It takes steps."""
    one_probe: bool = False
    """It probes one radius at a time."""
    function: AttackFunction | None = None
    """The user's."""


ATTACKS: dict[str, Attack] = {}
"""The attacks with a name."""

BEST = {
    "best": ("pgd", "deepfool", "fmn"),  # pgd starts from the radius of fgsm
    # foolbox's fmn_l2 finds no more (docs/measurements/attacks.md)
    "best_l2": ("pgd_l2", "deepfool_l2"),
}
"""Names for several attacks, of which the smallest radius counts."""


def register(name: str, norm: Norm = "linf", **traits: Any) -> Callable[[_Factory], _Factory]:
    """Class decorator that makes a search available as the attack `name`.

    Args:
        name: what ``attack=`` takes; that of an L2 attack ends in "_l2".
        norm: of the radii.
        traits: further fields of `Attack`.
    """

    def add(search: _Factory) -> _Factory:
        if name in ATTACKS:
            raise ValueError(f"there is an attack {name!r} already; choose another name")
        ATTACKS[name] = Attack(name, norm, search, **traits)
        return search

    return add


def names() -> list[str]:
    """The names that ``attack`` takes."""
    return [*ATTACKS, *BEST]


def resolve(attack: Any, norm: Norm | None) -> tuple[Attack, ...]:
    """The attacks that the options `attack` and `norm` mean.

    Raises:
        ValueError: a name that is none, radii of two norms, or of another one than asked for.
        TypeError: neither a name nor a function, nor a sequence of them.
        ImportError: the library of an attack is not installed.
    """
    if norm is not None:
        require_choice("norm", norm, ("linf", "l2"))
    attacks = tuple(_named(attack, norm))
    if not attacks:
        raise ValueError("attack is empty; give at least one")
    norms = {each.norm for each in attacks}
    if len(norms) > 1:
        listed = ", ".join(f"{each.name!r} ({each.norm})" for each in attacks)
        raise ValueError(
            f"attack has radii of two norms, which cannot be compared: {listed}. Names that end in "
            "_l2 measure L2, and norm='l2' says that a function does"
        )
    if norm is not None and norms != {norm}:
        other = attacks[0].name.removesuffix("_l2") + ("_l2" if norm == "l2" else "")
        raise ValueError(
            f"norm is {norm!r} but attack {attacks[0].name!r} measures {attacks[0].norm!r}; use "
            f"attack={other!r}"
        )
    for each in attacks:
        if each.library and importlib.util.find_spec(each.library) is None:
            raise ImportError(
                f"attack {each.name!r} needs {each.library}: pip install {each.library}"
            )
    return attacks


def _named(attack: Any, norm: Norm | None) -> Iterator[Attack]:
    if isinstance(attack, str):
        for name in BEST.get(attack, (attack,)):
            require_choice("attack", name, names())
            yield ATTACKS[name]
    elif callable(attack):
        name = getattr(attack, "__name__", type(attack).__name__)
        yield Attack(name, norm or "linf", function=attack)
    elif isinstance(attack, Sequence):
        for each in attack:
            yield from _named(each, norm)
    else:
        raise TypeError(
            f"attack is a {type(attack).__name__}; expected a name, a function (model, x, y) -> "
            "x_adv, or a sequence of them"
        )


def require_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError that says what the option may be, unless it is one of these."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, choices))}")
