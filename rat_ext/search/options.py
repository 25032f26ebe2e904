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
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_args, get_type_hints

from torch import Tensor

from .attack import AttackFunction, Norm

End = float | Tensor | None

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
