"""The options of a search. Each is defined once, in `SearchOptions`: name, type, default, help.

The signatures of `robust_radius` and its relatives, their documentation and the command line are
made from these definitions.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypedDict,
    TypeVar,
    get_args,
    get_type_hints,
)

import torch
from torch import Tensor

from .._common.bounds import Bounds, Value
from .attack import Attack, AttackFunction, Norm, require_choice, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack

End = float | Tensor | None

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

MAX_PROBES = 32  # kMaxProbes of csrc/rule/bracket.h


@dataclass(frozen=True)
class Option:
    """What an option is, beside its name: the metadata of a key of `SearchOptions`."""

    default: Any
    help: str
    complaint: Callable[[Any], str | None] = lambda value: None
    """What is wrong with a value, for an error; None if nothing is."""
    flag_help: str | None = None
    """The help on the command line, where it can give less than Python."""
    type: Any = None
    """Filled in from the annotation."""


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    expected = " or ".join(map(repr, choices))
    return lambda value: None if value in choices else f"expected {expected}"


def _positive(value: Any) -> str | None:
    fine = value is None or (value > 0 and math.isfinite(value))
    return None if fine else "it must be positive and finite"


def _distance(value: Any) -> str | None:
    return None if value is None or value > 0 else "it must be positive"


def _count(value: Any) -> str | None:
    return None if value is None or value >= 1 else "it must be at least 1, or None"


def _tf32(value: Any) -> str | None:
    return None if value in (None, False) else "it must be None (as torch is set) or False"


def _probes(value: Any) -> str | None:
    return None if 1 <= value <= MAX_PROBES else f"it must be from 1 to {MAX_PROBES}"


class SearchOptions(TypedDict, total=False):
    """The options of `rat_ext.robust_radius`, which may all be left out."""

    method: Annotated[
        Literal["bs", "fast"],
        Option(
            "bs",
            '"bs" narrows a bracket around the flip; "fast" extrapolates the logits linearly from '
            "one extra forward at radius ``h`` (radius = lower = upper; may exceed eps_max).",
            _one_of("bs", "fast"),
        ),
    ]
    rtol: Annotated[
        float, Option(1e-2, "a bracket is narrow enough when upper - lower <= rtol * upper.")
    ]
    bounds: Annotated[
        tuple[End, End] | None,
        Option(
            (0.0, 1.0),
            "smallest and largest value of an input element: two numbers, or tensors that "
            "broadcast to a row of x, for bounds of each feature. An end that is None or infinite "
            "is none, and so is ``bounds=None``: there the ray is not clipped.",
            flag_help="smallest and largest value of an input element",
        ),
    ]
    temperature: Annotated[
        float,
        Option(
            1.0, "softmax temperature of the cross-entropy that directs the ray; > 0.", _positive
        ),
    ]
    eps_max: Annotated[
        float | None,
        Option(
            None,
            "how far to search; default the largest distance of two points in the bounds (their "
            "width, times the square root of the elements for L2), or 1e6 where that is infinite. "
            "math.inf for as far as the dtype goes.",
            _distance,
        ),
    ]
    attack: Annotated[
        str | AttackFunction | Sequence[str | AttackFunction],
        Option(
            "fgsm",
            "how the change of prediction is looked for; see `rat_ext.attacks`. "
            '"fgsm" is the ray of the sign of the gradient, "fgsm_l2" that of the gradient scaled '
            'to L2 norm 1. "pgd" and "pgd_l2" attack anew at each radius. "deepfool", "fmn" and '
            '"fab", each also with "_l2", and functions ``(model, x, y) -> x_adv`` choose the ray '
            'that is searched. "best", "best_l2" or a sequence of attacks of one norm: the '
            "smallest radius counts.",
        ),
    ]
    batch_size: Annotated[
        int | None,
        Option(
            None,
            "most rows in one forward; default all of x. Does not change the results beyond "
            "rounding.",
            _count,
        ),
    ]
    h: Annotated[float, Option(1e-3, 'step of method "fast", in the units of x.', _positive)]
    search: Annotated[
        Literal["interpolate", "bisect"],
        Option(
            "interpolate",
            '"interpolate", or "bisect" for plain doubling from 1e-6 and bisection (slower).',
            _one_of("interpolate", "bisect"),
        ),
    ]
    probes: Annotated[
        int,
        Option(
            1,
            "points probed per sample and forward. More than one spends rows to save rounds, for "
            "small batches on a device that they leave idle. Not for PGD.",
            _probes,
        ),
    ]
    norm: Annotated[
        Norm | None,
        Option(
            None,
            'that of the distance, "linf" (default) or "l2", where ``attack`` is a function; named '
            "attacks have theirs.",
        ),
    ]
    target: Annotated[
        Literal["runner-up"] | Tensor | None,
        Option(
            None,
            "where fgsm and pgd are directed, instead of away from the prediction. "
            '"runner-up": at the second most likely class at x; any change of the prediction still '
            "counts. An integer tensor (N,): at a class for each sample, and nothing but a "
            "prediction of that class counts; radius 0 where it is predicted already.",
            flag_help="direct fgsm and pgd at the second most likely class instead of away from "
            "the prediction; any change of the prediction still counts",
        ),
    ]
    tf32: Annotated[
        bool | None,
        Option(
            None,
            "False multiplies float32 numbers in float32 on a GPU, around the model alone. By "
            "default radii are those of the model as torch is set to run it, which on NVIDIA's "
            "Ampere and later is TF32 for convolutions: coarser (docs/measurements/precision.md).",
            _tf32,
            "multiply float32 numbers in float32 on a GPU, where torch's default is the coarser "
            "TF32 for convolutions",
        ),
    ]
    steps: Annotated[
        int | None,
        Option(
            None,
            "iterations of PGD (default 10) and of the libraries' attacks (default theirs).",
            _count,
        ),
    ]


OPTIONS: dict[str, Option] = {
    name: replace(hint.__metadata__[0], type=get_args(hint)[0])
    for name, hint in get_type_hints(SearchOptions, include_extras=True).items()
}
"""The definitions by name."""

_Documented = TypeVar("_Documented", bound=Callable[..., Any])


def shows_options(without: Collection[str] = ()) -> Callable[[_Documented], _Documented]:
    """Decorator for a function or class that takes ``**options: Unpack[SearchOptions]``.

    Gives it a signature that lists them, with their defaults, and puts their help in place of
    ``{options}`` in its docstring.
    """

    def decorate(target: _Documented) -> _Documented:
        signature = inspect.signature(target)
        shown = {name: option for name, option in OPTIONS.items() if name not in without}
        listed = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=option.type,
            )
            for name, option in shown.items()
        ]
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        target.__signature__ = signature.replace(parameters=[*own, *listed])  # type: ignore[attr-defined]
        if target.__doc__ and "{options}" in target.__doc__:  # no docstring under python -OO
            target.__doc__ = _with_help(target.__doc__, shown)
        return target

    return decorate


def _with_help(doc: str, options: dict[str, Option]) -> str:
    before, _, after = doc.partition("{options}")
    indent = before[before.rindex("\n") + 1 :]
    paragraphs = (
        textwrap.fill(
            f"{name}: {option.help}",
            100,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, option in options.items()
    )
    return before[: -len(indent)] + "\n".join(paragraphs) + after


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
