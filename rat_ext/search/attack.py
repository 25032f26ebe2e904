"""The attacks by name. Each registers itself beside its code in `rat_ext.attacks`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

AttackFunction = Callable[[Any, Tensor, Tensor], Tensor]
"""From (model, x, y) to inputs near x that the model should not classify as y."""


@dataclass(frozen=True)
class Attack:
    """A way to find the nearest change of the prediction; `rat_ext.attacks` runs it."""

    name: str
    norm: str = "linf"
    library: str | None = None
    """The package that has it; None where it is ours, or the user's."""
    function: AttackFunction | None = None
    """The user's."""

    @property
    def kind(self) -> str:
        """The name without its norm."""
        return self.name.removesuffix("_l2")


_LIBRARY = {
    "fgsm": None,
    "pgd": None,
    "deepfool": "foolbox",
    "fmn": "foolbox",
    "fab": "torchattacks",
}


ATTACKS = {
    kind + suffix: Attack(kind + suffix, norm, library)
    for kind, library in _LIBRARY.items()
    for suffix, norm in (("", "linf"), ("_l2", "l2"))
}
"""The attacks with a name."""


BEST = {
    "best": ("pgd", "deepfool", "fmn"),  # pgd starts from the radius of fgsm
    "best_l2": ("pgd_l2", "deepfool_l2"),  # foolbox's fmn_l2 finds no more (docs/attacks.md)
}
"""Names for several attacks, of which the smallest radius counts."""


TARGETED = ("fgsm", "pgd")
"""The kinds that can be aimed at a class."""


def _either(choices: Iterable[str]) -> str:
    return " or ".join(repr(choice) for choice in choices)


def _require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected {_either(choices)}")


def _checked_attacks(attack: Any, norm: str | None) -> tuple[Attack, ...]:
    """The attacks that `attack` means, all of one norm and with their libraries at hand."""
    if norm is not None:
        _require_choice("norm", norm, ("linf", "l2"))
    attacks = tuple(_named(attack, norm))
    if not attacks:
        raise ValueError("attack is empty; give at least one")
    norms = {each.norm for each in attacks}
    if len(norms) > 1:
        names = ", ".join(f"{each.name!r} ({each.norm})" for each in attacks)
        raise ValueError(
            f"attack has radii of two norms, which cannot be compared: {names}. Names that end in "
            "_l2 measure L2, and norm='l2' says that a function does"
        )
    if norm is not None and norms != {norm}:
        other = attacks[0].kind + ("_l2" if norm == "l2" else "")
        raise ValueError(
            f"norm is {norm!r} but attack {attacks[0].name!r} measures {attacks[0].norm!r}; use "
            f"attack={other!r}"
        )
    for each in attacks:
        if each.library and importlib.util.find_spec(each.library) is None:
            raise ImportError(
                f"attack {each.name!r} needs {each.library}: pip install 'rat-ext[attacks]'"
            )
    return attacks


def _named(attack: Any, norm: str | None) -> Iterator[Attack]:
    if isinstance(attack, str):
        for name in BEST.get(attack, (attack,)):
            _require_choice("attack", name, (*ATTACKS, *BEST))
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
