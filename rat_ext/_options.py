"""The options of a search, checked before work starts."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The dtype of radii and of the search's arithmetic, for each dtype of the input."""

MAX_PROBES = 32  # kMaxProbes of csrc/search_rule.h


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


@dataclass(frozen=True)
class Options:
    """The options of `rat_ext.robust_radius`, with their defaults filled in."""

    method: str
    rtol: float
    low: float
    high: float
    temperature: float
    eps_max: float
    batch_size: int | None
    h: float
    bisect: bool
    probes: int
    attacks: tuple[Attack, ...]
    target: str | None
    steps: int | None

    @property
    def norm(self) -> str:
        """Of all the attacks."""
        return self.attacks[0].norm

    def only(self, attack: Attack) -> Options:
        """These options for one of the attacks."""
        return replace(self, attacks=(attack,))

    @property
    def eps_min(self) -> float:
        # Half the spacing of float32 numbers below 1, in units of the bounds: smaller steps are
        # rounded away. Inputs in half precision are coarser still, but not near their low end.
        return (self.high - self.low) * 2.0**-24

    @property
    def least_rounds(self) -> int:
        """No row settles in fewer rounds, unless it is not finite or cannot move."""
        if any(attack.kind == "pgd" for attack in self.attacks):
            return 0  # its rounds are dear: none is spent on a row that is settled or not finite
        # One probe a round shows one side of the flip only.
        return 2 if self.method == "bs" and self.probes == 1 else 1

    @classmethod
    def checked(
        cls,
        x: Tensor,
        method: str = "bs",
        rtol: float = 1e-2,
        bounds: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        eps_max: float | None = None,
        attack: str | AttackFunction | Sequence[str | AttackFunction] = "fgsm",
        batch_size: int | None = None,
        h: float = 1e-3,
        search: str = "interpolate",
        probes: int = 1,
        *,
        norm: str | None = None,
        target: str | None = None,
        steps: int | None = None,
    ) -> Options:
        _require_choice("method", method, ("bs", "fast"))
        attacks = _checked_attacks(attack, norm)
        names = ", ".join(repr(each.name) for each in attacks)
        if method == "fast" and names != "'fgsm'":
            raise ValueError(
                f"method 'fast' extrapolates along the FGSM ray and takes attack 'fgsm' alone, not "
                f"{names}; use method='bs'"
            )
        _require_choice("search", search, ("interpolate", "bisect"))
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor")
        if x.dtype not in WIDE:
            raise TypeError(
                f"x is {x.dtype}; expected a floating-point tensor. Scale integer images first, "
                "for example x.float() / 255"
            )
        if x.ndim < 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected a batch (N, ...). Use x[None] for one "
                "sample"
            )
        if len(bounds) != 2 or not (math.isfinite(bounds[0]) and math.isfinite(bounds[1])):
            raise ValueError(f"bounds is {bounds}; expected two finite numbers (low, high)")
        low, high = map(float, bounds)
        if not low < high:
            raise ValueError(f"bounds is {bounds}; low must be below high")
        finest = 64 * torch.finfo(WIDE[x.dtype]).eps
        if not finest <= rtol < 1:
            raise ValueError(
                f"rtol is {rtol}; for {x.dtype} inputs it must be at least {finest:.1e} and below "
                "1. For a finer one use float64 inputs and a float64 model"
            )
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; it must be positive and finite")
        if eps_max is None:  # the largest distance of two points in the bounds
            eps_max = high - low
            if attacks[0].norm == "l2":
                eps_max *= math.sqrt(math.prod(x.shape[1:]))
        if not (eps_max > 0 and math.isfinite(eps_max)):
            raise ValueError(f"eps_max is {eps_max}; it must be positive and finite")
        if not (h > 0 and math.isfinite(h)):
            raise ValueError(f"h is {h}; it must be positive and finite")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None")
        if not 1 <= probes <= MAX_PROBES:
            raise ValueError(f"probes is {probes}; it must be from 1 to {MAX_PROBES}")
        if probes > 1 and any(each.kind == "pgd" for each in attacks):
            raise ValueError(f"probes is {probes}; attack 'pgd' takes one at a time: use probes=1")
        if target is not None:
            _require_choice("target", target, ("runner-up",))
            if not any(each.kind in TARGETED for each in attacks):
                raise ValueError(f"target is for the attacks {_either(TARGETED)}; got {names}")
        if steps is not None:
            if steps < 1:
                raise ValueError(f"steps is {steps}; it must be at least 1, or None")
            if not any(each.library or each.kind == "pgd" for each in attacks):
                raise ValueError(f"steps is for iterative attacks with a name; got {names}")
        if method == "fast":
            probes = 1
        return cls(
            method=method,
            rtol=rtol,
            low=low,
            high=high,
            temperature=temperature,
            eps_max=eps_max,
            batch_size=batch_size,
            h=h,
            bisect=search == "bisect",
            probes=probes,
            attacks=attacks,
            target=target,
            steps=steps,
        )


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


def bounds_error(outside: Tensor, rows: int, options: Options) -> ValueError:
    """The error for an input of `rows` rows of which those in `outside` leave the bounds."""
    return ValueError(
        f"x has values from {outside.min().item():.4g} to {outside.max().item():.4g}, outside "
        f"bounds ({options.low:g}, {options.high:g}), in {len(outside)} of {rows} rows. The usual "
        "cause is normalising before the model: put the normalisation inside the model, as its "
        "first layer, and pass x unnormalised. If x has another range, pass bounds=(low, high)"
    )
