"""Other ways to the nearest change of the prediction than the FGSM ray: the ``attack`` option.

    rat_ext.robust_radius(model, x, attack="pgd", steps=20)
    rat_ext.robust_radius(model, x, attack=["pgd_l2", "deepfool_l2"], full=True).won

Every attack has a norm, L-inf or, if its name ends in ``_l2``, L2, and gives an upper bound of the
true distance in it:

- ``fgsm``, ``fgsm_l2``: the ray ``clip(x + e * d)`` with d the gradient's sign, or the gradient
  scaled to L2 norm 1. Where the bounds clip the step, the input has moved by less than e: the
  radius e is never smaller than the distance to the point that was found.
- ``pgd``, ``pgd_l2``: at each radius e that the search probes, projected gradient descent in the
  ball of radius e around x (Madry et al., ICLR 2018). The first e is the radius of FGSM, and the
  result is never larger than that.
- ``deepfool`` (Moosavi-Dezfooli et al., CVPR 2016) and ``fmn`` (Pintor et al., NeurIPS 2021) of
  foolbox, ``fab`` (Croce and Hein, ICML 2020) of torchattacks, each also with ``_l2``, and any
  function ``(model, x, y) -> x_adv``. The library says where to look, the search how far: what is
  searched is the ray from x through x_adv, so that overshooting costs nothing.
- ``best``, ``best_l2``, or a sequence of attacks of one norm: for each sample the smallest radius.

All searches follow the one bracket rule (csrc/search_rule.h), and no named attack starts at random.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._common.user_model import Model
from ..search.attack import ATTACKS, BEST, Attack
from ..search.bracket_search import Search
from ..search.options import Options
from ..search.result import RadiusResult
from ..search.tensors import differentiable_logits
from .borrowed import AttackRay
from .pgd import PGDSearch
from .rays import VectorRay

__all__ = ["names", "radii"]


def names() -> list[str]:
    """The names that ``attack`` takes."""
    return [*ATTACKS, *BEST]


def radii(
    model: Model, x: Tensor, runs: Sequence[Options], finite: Tensor, chunk: int
) -> list[RadiusResult]:
    """The results of each of `runs`, which differ in their temperature only.

    Args:
        finite: (N,) bool: the rows of x that are to be searched.
        chunk: most rows in one forward.
    """
    by_attack = []
    for attack in runs[0].attacks:
        alone = [run.only(attack) for run in runs]
        search = functools.partial(_searched, model, x, finite=finite, chunk=chunk)
        if attack.kind == "fgsm":
            results = [ray.result() for ray, _ in search(alone, _ray_of(attack))]
        elif attack.kind == "pgd":
            results = []
            for ray, start in search(alone, _ray_of(attack)):
                balls = PGDSearch(ray, start)
                balls.run(model, chunk)
                results.append(_smallest([ray.result(), balls.result()]))
        else:  # temperature plays no part
            ((ray, _),) = search(alone[:1], functools.partial(AttackRay, model))
            results = [ray.result() for _ in runs]
        by_attack.append(results)
    return [_best(results) for results in zip(*by_attack, strict=True)]


def _searched(
    model: Model,
    x: Tensor,
    runs: Sequence[Options],
    make: Callable[[Tensor, int, Options], Search],
    *,
    finite: Tensor,
    chunk: int,
) -> list[tuple[Search, Sequence[Tensor]]]:
    """The finished search of each run on its own ray, and the state that it started from."""
    searches: list[Search] = []
    for begin in range(0, len(x), chunk):
        # One forward for all, and a backward for each.
        leaf, logits = differentiable_logits(model, x[begin : begin + chunk])
        if not searches:
            searches = [make(x, logits.shape[1], run) for run in runs]
        for i, search in enumerate(searches):
            search.aim(leaf, logits, begin, retain_graph=i + 1 < len(searches))
    done = []
    for search in searches:
        search.exclude(~finite)
        start = [tensor.clone() for tensor in search.tensors]
        search.run(model, chunk)
        done.append((search, start))
    return done


def _smallest(results: Sequence[RadiusResult]) -> RadiusResult:
    """For each row the result with the smallest radius, and what all of them took together."""
    # Not found is worse than any radius, and not finite worse than that. The first of equals wins.
    worst = torch.finfo(results[0].radius.dtype).max
    radius = torch.stack([result.radius for result in results])
    won = radius.nan_to_num(nan=math.inf, posinf=worst).argmin(0)

    def of_winner(name: str) -> Tensor:
        return torch.stack([getattr(result, name) for result in results]).gather(0, won[None])[0]

    def total(name: str) -> Any:
        return sum(getattr(result, name) for result in results)

    chosen = ("radius", "lower", "upper", "found", "prediction", "flipped_to")
    summed = ("forward_rows", "backward_rows", "fallbacks", "worst_case_rows")
    return replace(
        results[0],
        won=won,
        **{name: of_winner(name) for name in chosen},
        **{name: total(name) for name in summed},
    )


def _best(results: Sequence[RadiusResult]) -> RadiusResult:
    """The smallest of the results of different attacks."""
    if len(results) == 1:
        return replace(results[0], won=torch.zeros_like(results[0].won))
    best = _smallest(results)
    # Each of the other attacks began with a forward and a backward of its own.
    others = len(results) - 1
    return replace(
        best,
        forward_rows=best.forward_rows + others,
        backward_rows=best.backward_rows + others,
        worst_case_rows=best.worst_case_rows + others,
        attacks=tuple(name for result in results for name in result.attacks),
    )


def _ray_of(attack: Attack) -> Callable[[Tensor, int, Options], Search]:
    return Search if attack.norm == "linf" else VectorRay
