"""What a search for robust radii returns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common.per_sample import of_rows
from .._common.user_model import Model, logits_of
from .checked import WIDE, Options


@dataclass(frozen=True)
class SearchReport:
    """What a search cost, in forward rows (one sample through the model once)."""

    rows: Tensor
    """(N,) int64: rows spent on each sample."""
    histogram: Tensor
    """(max rows + 1,) int64: how many samples took 0, 1, 2, ... rows."""
    mean: float
    p95: float
    """95th percentile of rows."""
    worst_case: int
    """No sample can take more rows than this, whatever the model (0 where it is not searched)."""
    fallback_share: float
    """Rounds that bisected instead of interpolating, for each forward row."""


@dataclass(frozen=True)
class RadiusResult:
    """Robust radii of N inputs.

    Every tensor is on the input's device and, all but `x_adv`, of shape (N,).
    """

    radius: Tensor
    """Midpoint of the bracket; inf where no flip was found; nan where a row is not finite."""
    lower: Tensor
    """Largest radius probed at which the prediction holds; for PGD, at which the attack fails."""
    upper: Tensor
    """Smallest radius probed at which it has changed; inf where none was found."""
    found: Tensor
    """bool: a change of prediction was found up to eps_max."""
    resolved: Tensor
    """bool: the search came to its end. False where the bracket is wider than rtol asks for, as the
    dtype of the input tells no smaller steps apart; where a search was given up; and for nan."""
    prediction: Tensor
    """int64: the model's prediction; -1 where a row is not finite."""
    flipped_to: Tensor
    """int64: the class at ``upper``; -1 where no flip was found."""
    forward_rows: Tensor
    """int64: forward rows that it took, beside the one forward and backward of the ray."""
    fallbacks: Tensor
    """int64: rounds of the search that fell back to bisection."""
    backward_rows: Tensor
    """int64: backward rows that it took, beside that of the ray; 0 for the attack "fgsm"."""
    won: Tensor
    """int64: which of ``attacks`` found the radius."""
    worst_case_rows: int = 0
    padded_rows: int = 0
    """Forward rows of all samples together that were run in vain, so that batches come in few
    sizes: on a GPU, and for compiled models."""
    norm: str = "linf"
    """Of the radius: "linf" or "l2"."""
    attacks: tuple[str, ...] = ("fgsm",)
    """The attacks of which the smallest radius counts."""
    x_adv: Tensor | None = None
    """(N, ...) like x, with ``full="points"``: the points that the search saw at ``upper``, where
    the prediction has changed, no further from x than that (up to the rounding of x's dtype) and
    within the bounds. Rows that are not found have x itself, as foolbox and torchattacks have it.
    """
    is_adv: Tensor | None = None
    """bool, with ``full="points"``: once more through the model, the row of ``x_adv`` was
    classified as ``flipped_to``. False where no change was found; and where the point is so near to
    the boundary that rounding, which may depend on the batch, decides its class."""

    def __len__(self) -> int:
        return self.radius.shape[0]

    @classmethod
    def empty(cls, x: Tensor, options: Options) -> RadiusResult:
        """The result for an x without rows."""
        real = torch.empty(0, dtype=WIDE[x.dtype], device=x.device)
        integer = torch.empty(0, dtype=torch.int64, device=x.device)
        found = torch.empty(0, dtype=torch.bool, device=x.device)
        return cls(
            radius=real,
            lower=real,
            upper=real,
            found=found,
            resolved=found,
            prediction=integer,
            flipped_to=integer,
            forward_rows=integer,
            fallbacks=integer,
            backward_rows=integer,
            won=integer,
            norm=options.norm,
            attacks=tuple(attack.name for attack in options.attacks),
            x_adv=x if options.keep_points else None,
            is_adv=found if options.keep_points else None,
        )

    @property
    def search_report(self) -> SearchReport:
        """Rows per sample, their histogram, and the share of bisection fallbacks."""
        rows = self.forward_rows
        total = int(rows.sum())
        return SearchReport(
            rows=rows,
            histogram=torch.bincount(rows) if len(self) else rows.new_zeros(1),
            mean=float(rows.double().mean()) if len(self) else math.nan,
            p95=float(rows.double().quantile(0.95)) if len(self) else math.nan,
            worst_case=self.worst_case_rows,
            fallback_share=int(self.fallbacks.sum()) / total if total else 0.0,
        )

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each input, and a column for each field of shape (N,).

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = {name: v for name, v in values.items() if isinstance(v, Tensor) and name != "x_adv"}
        return pandas.DataFrame({name: column.cpu().numpy() for name, column in rows.items()})

    def __getitem__(self, index: Any) -> RadiusResult:
        """The results of some of the rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = {name: v[index] for name, v in values.items() if isinstance(v, Tensor)}
        return RadiusResult(**{**values, **rows})


def concatenate(results: Sequence[RadiusResult]) -> RadiusResult:
    """The results of consecutive chunks as one."""
    first = results[0]
    values = {field.name: getattr(first, field.name) for field in fields(first)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = torch.cat([getattr(result, name) for result in results])
    values["padded_rows"] = sum(result.padded_rows for result in results)
    return RadiusResult(**values)


def verified(model: Model, result: RadiusResult, batch_size: int | None) -> RadiusResult:
    """The result with `is_adv`, for which every row of `x_adv` goes through the model."""
    assert result.x_adv is not None  # checked where points are kept
    predictions, size = [], batch_size or len(result)
    for begin in range(0, len(result), size):
        part = result.x_adv[begin : begin + size]
        run = of_rows(model, slice(begin, begin + size))
        predictions.append(logits_of(run(part), len(part)).argmax(1))
    predicted = torch.cat(predictions)
    return replace(
        result,
        is_adv=result.found & (predicted == result.flipped_to),
        forward_rows=result.forward_rows + 1,
        worst_case_rows=result.worst_case_rows + 1,
    )


class LoaderRadii(NamedTuple):
    """Radii of a whole data set, on the CPU, in the loader's order."""

    radius: Tensor
    prediction: Tensor
    target: Tensor | None


def problems(result: RadiusResult) -> Tensor:
    """(2,) int64: how many rows are not finite, and how many of the others are not resolved."""
    unknown = result.radius.isnan()
    return torch.stack([unknown.sum(), (~result.resolved & ~unknown).sum()])


def warn_about(counts: Sequence[int], rows: int, stacklevel: int) -> None:
    """A warning for each of the `problems` that some of so many rows have.

    `stacklevel` is that of `warnings.warn`, counted from the caller.
    """
    texts = (
        "inputs, logits or gradients that are not finite; their radius is nan",
        "a bracket that is wider than rtol asks for, because the dtype of the input has no finer "
        "steps or the search was given up; `resolved` of the full result tells which. Inputs of a "
        "wider dtype have finer steps",
    )
    for count, text in zip(counts, texts, strict=True):
        if count:
            message = f"{count} of {rows} rows have {text}"
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)


def smallest(results: Sequence[RadiusResult]) -> RadiusResult:
    """For each row the result with the smallest radius, and what all of them took together."""
    # Not found is worse than any radius, and not finite worse than that. The first of equals wins.
    worst = torch.finfo(results[0].radius.dtype).max
    radius = torch.stack([result.radius for result in results])
    won = radius.nan_to_num(nan=math.inf, posinf=worst).argmin(0)

    rows = torch.arange(len(won), device=won.device)

    def of_winner(name: str) -> Tensor:
        return torch.stack([getattr(result, name) for result in results])[won, rows]

    def total(name: str) -> Any:
        return sum(getattr(result, name) for result in results)

    chosen = ["radius", "lower", "upper", "found", "resolved", "prediction", "flipped_to"]
    if results[0].x_adv is not None:
        chosen.append("x_adv")
    summed = ("forward_rows", "backward_rows", "fallbacks", "worst_case_rows", "padded_rows")
    values: dict[str, Any] = {name: of_winner(name) for name in chosen}
    values.update({name: total(name) for name in summed})
    return replace(results[0], won=won, **values)


def best(results: Sequence[RadiusResult]) -> RadiusResult:
    """The smallest of the results of different attacks."""
    if len(results) == 1:
        return results[0]
    found = smallest(results)
    # Each of the other attacks began with a forward and a backward of its own.
    others = len(results) - 1
    return replace(
        found,
        forward_rows=found.forward_rows + others,
        backward_rows=found.backward_rows + others,
        worst_case_rows=found.worst_case_rows + others,
        attacks=tuple(name for result in results for name in result.attacks),
    )
