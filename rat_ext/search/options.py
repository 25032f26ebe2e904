"""The options of a search, checked before work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attack import TARGETED, Attack, AttackFunction, _checked_attacks, _either, _require_choice

WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The dtype of radii and of the search's arithmetic, for each dtype of the input."""


MAX_PROBES = 32  # kMaxProbes of csrc/search_rule.h


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


def bounds_error(outside: Tensor, rows: int, options: Options) -> ValueError:
    """The error for an input of `rows` rows of which those in `outside` leave the bounds."""
    return ValueError(
        f"x has values from {outside.min().item():.4g} to {outside.max().item():.4g}, outside "
        f"bounds ({options.low:g}, {options.high:g}), in {len(outside)} of {rows} rows. The usual "
        "cause is normalising before the model: put the normalisation inside the model, as its "
        "first layer, and pass x unnormalised. If x has another range, pass bounds=(low, high)"
    )
