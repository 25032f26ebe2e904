"""Fitting and testing scores over random splits, and what comes of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import metrics, scores
from .._common.storage import locked
from .._common.user_model import logits_of, undisturbed
from ..datasets import Labelled
from .cache import Cache, identity_of
from .settings import Settings
from .work import Work


@dataclass(frozen=True)
class Result:
    """What one score did."""

    name: str
    splits: list[dict[str, float]]
    """For each split the metrics of `metrics.summary`; nan where undefined."""
    chosen: list[str]
    """For each split what was chosen on the validation part."""
    confidences: list[Tensor]
    """For each split (N,), of all images."""
    milliseconds: float
    """Run time per image."""
    forward_rows: float
    backward_rows: float


@dataclass(frozen=True)
class Evaluation:
    """A classifier's predictions on N images, and what the scores make of them."""

    settings: Settings
    logits: Tensor
    """(N, C)"""
    target: Tensor
    """(N,)"""
    tests: list[Tensor]
    """For each split the indices of the images that it is tested on."""
    results: list[Result]

    @cached_property
    def prediction(self) -> Tensor:
        """(N,) class indices."""
        return self.logits.argmax(1)

    @cached_property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.prediction == self.target

    def of(self, name: str) -> Result:
        """The result of a score."""
        return next(result for result in self.results if result.name == name)

    def curves(self, name: str) -> list[metrics.RiskCoverage]:
        """The risk-coverage curve of a score in each split."""
        return [
            metrics.risk_coverage_curve(trust(confidence[test]), self.correct[test])
            for confidence, test in zip(self.of(name).confidences, self.tests, strict=True)
        ]


def evaluate(
    model: nn.Module,
    data: Labelled,
    settings: Settings,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation | None:
    """Fit the scores on one part of the images and test them on the rest, for random splits.

    What is computed is kept in ``out``/cache, in files of a thousand images; the processes of
    torch.distributed share the files among them, and a run that was interrupted can go on.

    Args:
        model: from pixels in [0, 1] to logits, on its device; run in eval mode, left as it was.
        data: gives (pixels, class) pairs, and has a length. Targets of -1 (outliers) are never
            predicted right.
        settings: which scores, and how.
        out: folder of the cache; the same for all processes. None: nothing is kept, for a single
            process.
        resume: go on with the cache of the same model, data and settings.
        workers: processes that load data.
        progress: show a tqdm bar on standard error.

    Returns:
        The evaluation; None in the processes of torch.distributed other than the first.

    Raises:
        ValueError: the cache is of something else, or missing; there are too few images.
        OSError: another evaluation is writing to ``out``.
    """
    images = len(cast(Sized, data))
    validation = round(settings.validation_share * images)
    if validation >= images or (settings.validation_share and not validation):
        raise ValueError(f"{images} images are too few to split; use more")
    rank = dist.get_rank() if dist.is_initialized() else 0
    lock = locked(Path(out) / "cache", "an evaluation") if out and not rank else nullcontext()
    with lock:
        return _evaluated(model, data, images, validation, settings, out, resume, workers, progress)


def _evaluated(
    model: nn.Module,
    data: Labelled,
    images: int,
    validation: int,
    settings: Settings,
    out: str | Path | None,
    resume: bool,
    workers: int,
    progress: bool,
) -> Evaluation | None:
    """`evaluate`, with the cache to itself."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cache: Cache | dict[str, list[Tensor]] = {}
    if out is not None:
        cache = Cache(Path(out) / "cache")
        if rank == 0:
            cache.open(identity_of(model, data, images, settings), resume)
        if world > 1:
            dist.barrier()
    elif resume or world > 1:
        raise ValueError("to resume, or to share the work among processes, give the folder out")
    generator = torch.Generator().manual_seed(settings.seed)
    orders = [torch.randperm(images, generator=generator) for _ in range(settings.splits)]
    splits = [order.tensor_split([validation]) for order in orders]
    work = Work(model, data, images, settings, cache, workers, progress, rank, world)
    logits, target = work.over_data("logits", _logits)
    correct = logits.argmax(1) == target
    results = []
    for name in settings.scores or scores.names():
        fitted, confidences = work.scored(name, splits, logits, target)
        if rank:
            continue
        rows = [
            _summary(confidence[test], correct[test])
            for confidence, (_, test) in zip(confidences, splits, strict=True)
        ]
        chosen = [str(score.setting or "") for score in fitted]
        results.append(Result(name, rows, chosen, confidences, *work.cost(fitted[0])))
    if rank:
        return None
    return Evaluation(settings, logits, target, [test for _, test in splits], results)


def trust(confidence: Tensor) -> Tensor:
    """An image whose confidence is not a number is trusted least."""
    return confidence.nan_to_num(-math.inf, math.inf, -math.inf)


def _summary(confidence: Tensor, correct: Tensor) -> dict[str, float]:
    with warnings.catch_warnings():  # shown as undefined in the table
        warnings.filterwarnings("ignore", ".* is undefined and set to nan")
        return cast("dict[str, float]", metrics.summary(trust(confidence), correct))


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), undisturbed(model, x.device):
        return logits_of(model(x), len(x))
