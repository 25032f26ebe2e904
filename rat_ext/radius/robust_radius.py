"""Robust radii: how far each input is from the classifier's decision boundary.

The method is RR-BS and RR-Fast of Yan and Weng, "RAT: Boosting Misclassification Detection Ability
without Extra Data" (arXiv 2503.14783), searched on a ray that is computed once. The loops run in
the compiled core (csrc/rule/search.h tells how a probe is chosen); `rat_ext.reference` is the same
in plain PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .._common.per_sample import of_rows, with_arguments
from .._common.user_model import Model, check_device, full_float32, undisturbed
from ..attacks.borrowed import AttackRay
from ..search.attack import Searching
from ..search.checked import Options, check_classes
from ..search.options import SearchOptions, shows_options
from ..search.result import RadiusResult, best, problems, verified, warn_about
from ..search.tensors import checked_input, differentiable_logits, with_dense_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def robust_radius(
    model: Model,
    x: Tensor,
    *,
    full: Literal[False] = ...,
    model_kwargs: Mapping[str, Any] | None = ...,
    **options: Unpack[SearchOptions],
) -> Tensor: ...
@overload
def robust_radius(
    model: Model,
    x: Tensor,
    *,
    full: Literal[True, "points"],
    model_kwargs: Mapping[str, Any] | None = ...,
    **options: Unpack[SearchOptions],
) -> RadiusResult: ...
@shows_options()
def robust_radius(
    model: Model,
    x: Tensor,
    *,
    full: bool | Literal["points"] = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[SearchOptions],
) -> Tensor | RadiusResult:
    """Distance of each input from the decision boundary: by default on its FGSM ray, in L-inf.

    The ray of x is ``clip(x + eps * d, *bounds)`` with ``d = sign(grad_x CE(f(x) / temperature,
    y))`` and y the model's prediction. The radius is the eps at which the prediction changes, an
    upper bound of the true robust radius, and a confidence: a larger one means that the prediction
    is more likely right (RR-BS and RR-Fast, arXiv 2503.14783).

    The model is run in eval mode and left as it was, also after an error: parameters, their
    ``.grad``, train/eval flags and random state. Works under ``no_grad``, ``inference_mode`` and
    autocast. Any normalisation must be inside the model, so that x is in ``bounds`` and the radius
    is in the units of x.

    Args:
        model: callable from (N, ...) inputs to (N, C) logits, C >= 2, or to an object with
            ``.logits``.
        x: (N, ...) floating-point inputs, every element within ``bounds``.
        full: return a RadiusResult instead of the radii alone. "points" keeps the adversarial
            points too, in ``x_adv``, and runs the model on them once more, for ``is_adv``; it needs
            method "bs".
        model_kwargs: more arguments of the model, ``model(x, **model_kwargs)``. Tensors whose first
            dimension is N have a row for each sample (an attention mask) and follow it through the
            search, which runs the model on some of the rows alone; everything else is the same for
            all. See `rat_ext.with_arguments`. Attacks of other libraries and of your own have to
            run the model on all rows of their batch, in their order: a part of them is an error,
            another order is not noticed.
        {options}

    Returns:
        (N,) radii on x's device, float64 for float64 x and float32 otherwise: inf where the
        prediction does not change up to eps_max, nan (with one RuntimeWarning) where the input or
        the logits are not finite. With ``full`` a `RadiusResult`.

    Raises:
        ValueError: x out of bounds or without a batch dimension, logits that are not (N, C >= 2),
            model and x on different devices, an option out of its range.
        TypeError: x or the logits are not floating-point tensors; model_kwargs is not a mapping, or
            has tensors in a list, tuple or mapping, which would not follow their samples.
        ImportError: the library of an attack is not installed.
    """
    chosen = Options.checked(x, **options).keeping(full)
    model = with_arguments(model, x, model_kwargs)
    if not len(x):
        result = RadiusResult.empty(x, chosen)
    else:
        with _ready(model, x, chosen) as (x, finite):
            found = [_searched(model, x, chosen.only(each), finite) for each in chosen.attacks]
            result = best(found)
            if chosen.keep_points:
                result = verified(model, result, chosen.batch_size)
    warn_about(problems(result).tolist(), len(result), stacklevel=2)
    return result if full else result.radius


@shows_options(without=["temperature"])
def temperature_sweep(
    model: Model,
    x: Tensor,
    temperatures: Sequence[float],
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[SearchOptions],
) -> list[RadiusResult]:
    """Radii at several temperatures, for the price of one forward and a backward for each.

    The forward of the ray and its graph are shared by all temperatures; each has its own direction
    and search. Equals ``[robust_radius(model, x, temperature=t, full=True, **options) for t in
    temperatures]``; all options of `robust_radius` but ``temperature`` and ``full`` are taken.
    """
    if not len(temperatures):
        raise ValueError("temperatures is empty; give at least one")
    if {"temperature", "full"} & options.keys():
        raise TypeError("temperature_sweep takes temperatures, and always returns full results")
    each_at: list[SearchOptions] = [{**options, "temperature": t} for t in temperatures]
    runs = [Options.checked(x, **at) for at in each_at]
    model = with_arguments(model, x, model_kwargs)
    if not len(x):
        return [RadiusResult.empty(x, run) for run in runs]
    with _ready(model, x, runs[0]) as (x, finite):
        by_attack = [
            _swept(model, x, [run.only(each) for run in runs], finite) for each in runs[0].attacks
        ]
    results = [best(results) for results in zip(*by_attack, strict=True)]
    most = torch.stack([problems(result) for result in results]).amax(0)
    warn_about(most.tolist(), len(x), stacklevel=2)
    return results


def _searched(model: Model, x: Tensor, options: Options, finite: Tensor) -> RadiusResult:
    """What the one attack of the options finds."""
    search: Any = None
    for begin, leaf, logits in _forwards(model, x, options):
        search = search or _new_search(model, x, logits.shape[1], options)
        search.aim(leaf, logits, begin)
    search.exclude(~finite)
    search.run()
    result: RadiusResult = search.result()
    return result


def _swept(model: Model, x: Tensor, runs: Sequence[Options], finite: Tensor) -> list[RadiusResult]:
    """As `_searched`, for options that differ in their temperature alone."""
    if not runs[0].attacks[0].by_gradient:  # temperature plays no part
        return [_searched(model, x, runs[0], finite)] * len(runs)
    searches: list[Searching] = []
    for begin, leaf, logits in _forwards(model, x, runs[0]):
        searches = searches or [_new_search(model, x, logits.shape[1], run) for run in runs]
        for i, search in enumerate(searches):
            search.aim(leaf, logits, begin, retain_graph=i + 1 < len(searches))
    for search in searches:
        search.exclude(~finite)
        search.run()
    return [search.result() for search in searches]


def _new_search(model: Model, x: Tensor, classes: int, options: Options) -> Searching:
    if options.classes is not None:
        check_classes(options.classes, classes)
    # A function of the user's has no entry in the table of attacks.
    kind = options.attacks[0].search or AttackRay
    return kind(model, x, classes, options)


def _forwards(model: Model, x: Tensor, options: Options) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The forward at x, chunk by chunk: its first row, the leaf, and logits that have a graph."""
    rows = options.batch_size or len(x)
    for begin in range(0, len(x), rows):
        chunk = slice(begin, begin + rows)
        yield begin, *differentiable_logits(of_rows(model, chunk), x[chunk])


@contextlib.contextmanager
def _ready(model: Model, x: Tensor, options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """The input, checked, and (N,) bool: which rows are finite. The model is in eval mode then."""
    # Tensors made in inference mode cannot enter a graph, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        x = with_dense_rows(x.detach())
        finite = checked_input(x, options)
        check_device(model, x)
        exact = full_float32() if options.tf32 is False else contextlib.nullcontext()
        with undisturbed(model, x.device), exact:
            yield x, finite
