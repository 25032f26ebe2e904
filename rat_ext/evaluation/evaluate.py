"""How well confidence scores find a classifier's wrong predictions, over random splits."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import metrics, scores
from .._common.user_model import logits_of, undisturbed
from .settings import Settings
from .work import _Cache, _chosen, _fingerprint, _Work


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
    prediction: Tensor
    target: Tensor
    tests: list[Tensor]
    """For each split the indices of the images that it is tested on."""
    results: list[Result]

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.prediction == self.target


def evaluate(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    out: str | Path,
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
        data: gives (pixels, class) pairs. Targets of -1 (outliers) are never predicted right.
        settings: which scores, and how.
        out: folder of the cache; the same for all processes.
        resume: go on with the cache of the same model, data and settings.
        workers: processes that load data.
        progress: show a tqdm bar on standard error.

    Returns:
        The evaluation; None in the processes of torch.distributed other than the first.

    Raises:
        ValueError: the cache is of something else, or there are too few images.
    """
    validation = round(settings.validation_share * len(data))
    if not 0 < validation < len(data):
        raise ValueError(f"{len(data)} images are too few to split; use more")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cache = _Cache(Path(out) / "cache")
    if rank == 0:
        cache.open(_fingerprint(model, data, settings), resume)
    if world > 1:
        dist.barrier()
    generator = torch.Generator().manual_seed(settings.seed)
    orders = [torch.randperm(len(data), generator=generator) for _ in range(settings.splits)]
    splits = [order.tensor_split([validation]) for order in orders]
    work = _Work(model, data, settings, cache, workers, progress, rank, world)
    logits, target = work.over_data("logits", _logits)
    prediction = logits.argmax(1)
    correct = prediction == target
    results = []
    for name in settings.scores or scores.names():
        fitted, confidences = work.scored(name, splits, logits, target)
        if rank:
            continue
        rows = [
            _summary(confidence[test], correct[test])
            for confidence, (_, test) in zip(confidences, splits, strict=True)
        ]
        chosen = [_chosen(score) for score in fitted]
        results.append(Result(name, rows, chosen, confidences, *work.cost(name, fitted[0])))
    if rank:
        return None
    return Evaluation(settings, prediction, target, [test for _, test in splits], results)


def _summary(confidence: Tensor, correct: Tensor) -> dict[str, float]:
    with warnings.catch_warnings():  # shown as undefined in the table
        warnings.filterwarnings("ignore", ".* is undefined and set to nan")
        # An image whose confidence is not a number is trusted least.
        confidence = confidence.nan_to_num(-math.inf, math.inf, -math.inf)
        return metrics.summary(confidence, correct)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), undisturbed(model, x.device):
        return logits_of(model(x), len(x))
