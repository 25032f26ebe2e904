"""The options of one search, checked, as the search uses them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .._common.bounds import Bounds, Value
from .attack import Attack, Norm, require_choice, resolve
from .options import OPTIONS, SearchOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The dtype of radii and of the search's arithmetic, for each dtype of the input."""

HALF_STEPS = 16
"""Spacings of an input in half precision that a bracket is wide at least."""

FIRST_STEP = 1e-6
"""The first radius that plain doubling probes, as a share of eps_max or of 1, if that is less."""


@dataclass(frozen=True)
class Options:
    """The options of one search, checked and with their defaults filled in."""

    method: str
    rtol: float
    """As asked for."""
    narrowest: float
    """The relative width at which a bracket is closed: rtol, but no less than inputs in half
    precision have steps for."""
    bounds: Bounds
    temperature: float
    eps_max: float
    batch_size: int | None
    h: float
    first_step: float
    """Where plain doubling and bisection begin."""
    bisect: bool
    probes: int
    attacks: tuple[Attack, ...]
    target: Literal["runner-up"] | Tensor | None
    steps: int | None
    tf32: bool | None
    keep_points: bool = False
    """The result is to have the points at which the prediction has changed."""

    @property
    def norm(self) -> Norm:
        """Of all the attacks."""
        return self.attacks[0].norm

    def keeping(self, full: Any) -> Options:
        """These options, with the points kept where the argument ``full`` asks for them."""
        if full not in (False, True, "points"):
            raise ValueError(f"full is {full!r}; expected False, True or 'points'")
        if full == "points" and self.method == "fast":
            raise ValueError(
                "full='points' needs method 'bs'; 'fast' extrapolates, and sees no point at which "
                "the prediction has changed"
            )
        return replace(self, keep_points=full == "points")

    def of_rows(self, rows: Tensor) -> Options:
        """These options for some of the rows."""
        return self if self.classes is None else replace(self, target=self.classes[rows])

    def only(self, attack: Attack) -> Options:
        """These options for one of the attacks."""
        return replace(self, attacks=(attack,))

    @property
    def classes(self) -> Tensor | None:
        """(N,) int64: the one class that counts for each sample; None where every change does."""
        return self.target if isinstance(self.target, Tensor) else None

    @property
    def low(self) -> Value:
        """The smallest value of an input element, or of each."""
        return self.bounds.low

    @property
    def high(self) -> Value:
        """The largest value of an input element, or of each."""
        return self.bounds.high

    @classmethod
    def checked(cls, x: Tensor, **given: Unpack[SearchOptions]) -> Options:
        """The options for inputs x, of which only the type and shape are looked at."""
        if unknown := given.keys() - OPTIONS:
            raise TypeError(
                f"got an unexpected keyword argument {min(unknown)!r}; the options of a search are "
                f"{', '.join(OPTIONS)}"
            )
        value: dict[str, Any] = {name: option.default for name, option in OPTIONS.items()}
        value.update(given)
        for name, option in OPTIONS.items():
            if complaint := option.complaint(value[name]):
                raise ValueError(f"{name} is {value[name]!r}; {complaint}")
        attacks = resolve(value["attack"], value["norm"])
        _check_input_type(x)
        bounds = Bounds.parse(value["bounds"], x)
        finest = 64 * torch.finfo(WIDE[x.dtype]).eps
        if not finest <= value["rtol"] < 1:
            raise ValueError(
                f"rtol is {value['rtol']}; for {x.dtype} inputs it must be at least {finest:.1e} "
                "and below 1. For a finer one use float64 inputs and a float64 model"
            )
        _check_together(value, attacks, bounds)
        if isinstance(value["target"], Tensor):
            value["target"] = _class_of_each(value["target"], x)
        eps_max = value["eps_max"]
        if eps_max is None:
            eps_max = bounds.reach(attacks[0].norm, x)
        first_step = FIRST_STEP * min(eps_max, 1.0)
        # Further out, sums of two radii or of a radius and an input overflow.
        eps_max = min(eps_max, torch.finfo(WIDE[x.dtype]).max / 4)
        return cls(
            method=value["method"],
            rtol=value["rtol"],
            narrowest=max(value["rtol"], HALF_STEPS * torch.finfo(x.dtype).eps),
            bounds=bounds,
            temperature=value["temperature"],
            eps_max=eps_max,
            batch_size=value["batch_size"],
            h=value["h"],
            first_step=first_step,
            bisect=value["search"] == "bisect",
            probes=1 if value["method"] == "fast" else value["probes"],
            attacks=attacks,
            target=value["target"],
            steps=value["steps"],
            tf32=value["tf32"],
        )


def _check_input_type(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor")
    if x.dtype not in WIDE:
        raise TypeError(
            f"x is {x.dtype}; expected a floating-point tensor. Scale integer images first, "
            "for example x.float() / 255"
        )
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected a batch (N, ...). Use x[None] for one sample"
        )


def check_classes(target: Tensor, count: int) -> None:
    """Raise a ValueError if a target is none of so many classes."""
    if (target >= count).any():
        raise ValueError(
            f"target has a class {int(target.max())}, but the model has {count}: 0 to {count - 1}"
        )


def _class_of_each(target: Tensor, x: Tensor) -> Tensor:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target is a tensor of {target.dtype}; expected integers, the classes")
    if target.shape != x.shape[:1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} for {len(x)} inputs; expected a class for "
            f"each, ({len(x)},)"
        )
    if (target < 0).any():
        raise ValueError(f"target has a class {int(target.min())}; classes are numbered from 0")
    return target.to(x.device, torch.int64)


def _check_together(value: dict[str, Any], attacks: tuple[Attack, ...], bounds: Bounds) -> None:
    """Raise if options that are each fine do not go together."""
    names = ", ".join(repr(each.name) for each in attacks)
    if value["method"] == "fast" and names != "'fgsm'":
        raise ValueError(
            f"method 'fast' extrapolates along the FGSM ray and takes attack 'fgsm' alone, not "
            f"{names}; use method='bs'"
        )
    if value["probes"] > 1 and (slow := [each.name for each in attacks if each.one_probe]):
        raise ValueError(
            f"probes is {value['probes']}; attack {slow[0]!r} takes one at a time: use probes=1"
        )
    if value["method"] != "fast" and value["probes"] > (value["batch_size"] or math.inf):
        raise ValueError(
            f"batch_size is {value['batch_size']}, too few rows for {value['probes']} probes of "
            f"one sample; use probes={value['batch_size']} or fewer, or a larger batch_size"
        )
    borrowed = [each.name for each in attacks if each.library]
    if borrowed and not bounds.finite:
        raise ValueError(
            f"attack {borrowed[0]!r} needs finite bounds; give them, or use 'fgsm' or 'pgd'"
        )
    if value["target"] is not None:
        classes = isinstance(value["target"], Tensor)
        if not classes:
            require_choice("target", value["target"], ("runner-up",))
        if not (all if classes else any)(each.by_gradient for each in attacks):
            raise ValueError(f"target is for the attacks 'fgsm' or 'pgd'; got {names}")
    if value["steps"] is not None and not any(each.iterative for each in attacks):
        raise ValueError(f"steps is for iterative attacks with a name; got {names}")
