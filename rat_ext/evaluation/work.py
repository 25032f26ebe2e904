"""Scoring a data set, in parts that are shared among processes and kept in a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import scores
from ..datasets import Labelled, batches
from .cache import Cache
from .settings import Settings

CHUNK = 1000
"""Images whose confidences are written to disk together."""
TIMED = 256
"""Images that the run time of a score is measured on."""


class Work:
    """Scoring a data set: shared among processes, and kept in the cache.

    Args:
        model: on its device.
        data: gives (pixels, class) pairs.
        images: how many there are of them.
        settings: of the evaluation.
        cache: keeps what is computed by name; a dict where it is not to outlive the process.
        workers: processes that load data.
        progress: show a tqdm bar on standard error.
        rank: of this process.
        world: how many processes share the work, and the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Labelled,
        images: int,
        settings: Settings,
        cache: Cache | dict[str, list[Tensor]],
        workers: int,
        progress: bool,
        rank: int,
        world: int,
    ) -> None:
        self.model, self.data, self.images, self.settings = model, data, images, settings
        self.cache, self.workers, self.progress = cache, workers, progress
        self.rank, self.world = rank, world
        self.device = next(model.parameters()).device

    def scored(
        self,
        name: str,
        splits: Sequence[Sequence[Tensor]],
        logits: Tensor,
        target: Tensor,
    ) -> tuple[list[scores.Score], list[Tensor]]:
        """For each split the score fitted on its validation part, and its (N,) confidences."""
        score = self.settings.create(name)
        if score.logits_only:
            known = nn.Identity()  # is the model of logits
            fitted = [
                score.copy().fit(known, [(logits[part], target[part])], progress=False)
                for part, _ in splits
            ]
            return fitted, [one.score(known, logits) for one in fitted]
        if score.fit_does == "nothing":
            return [score] * len(splits), self.over_data(name, score.score)[:1] * len(splits)
        if score.fit_does == "choose":
            tasks = [
                (f"{name}-fit{number}", lambda part=part: [self.choice(score, part)])
                for number, (part, _) in enumerate(splits)
            ]
            chosen = [scores.Setting(*c.tolist()) for (c,) in self.shared(f"fit {name}", tasks)]
            fitted = [score.limited_to([setting]) for setting in chosen]
            keys = [f"{name}-{setting}" for setting in chosen]
        else:
            fitted = [
                score.copy().fit(self.model, self.loader(part), progress=False)
                for part, _ in splits
            ]
            keys = [f"{name}-split{number}" for number in range(len(splits))]
        confidences = [self.over_data(k, s.score)[0] for k, s in zip(keys, fitted, strict=True)]
        return fitted, confidences

    def choice(self, score: scores.Score, part: Tensor) -> Tensor:
        """The setting that a score chooses on a part of the data."""
        fitted = score.copy().fit(self.model, self.loader(part), progress=False)
        return torch.tensor(fitted.setting, dtype=torch.float64)

    def over_data(self, name: str, compute: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        """compute(model, x) of all images, and their targets, on the CPU."""

        def chunk(index: Tensor) -> list[Tensor]:
            values, targets = [], []
            for x, target in self.loader(index):
                values.append(compute(self.model, x.to(self.device)).cpu())
                targets.append(target)
            return [torch.cat(values), torch.cat(targets)]

        chunks = torch.split(torch.arange(self.images), CHUNK)
        tasks = [(f"{name}-{i}", lambda c=c: chunk(c)) for i, c in enumerate(chunks)]
        return [torch.cat(parts) for parts in zip(*self.shared(name, tasks), strict=True)]

    def loader(self, index: Tensor) -> Any:
        """The batches of the images of these indices."""
        parts = [part.tolist() for part in torch.split(index, self.settings.batch_size)]
        return batches(self.data, parts, self.workers, self.device)

    def shared(
        self, what: str, tasks: Sequence[tuple[str, Callable[[], list[Tensor]]]]
    ) -> list[list[Tensor]]:
        """The results of all tasks; each process computes its share of those not in the cache."""
        from tqdm.auto import tqdm

        mine = [task for task in tasks[self.rank :: self.world] if task[0] not in self.cache]
        hidden = not self.progress or self.rank > 0 or not mine
        for key, compute in tqdm(mine, desc=what, unit="part", leave=False, disable=hidden):
            self.cache[key] = compute()
        if self.world > 1:
            dist.barrier()
        return [self.cache[key] for key, _ in tasks]

    def cost(self, score: scores.Score) -> tuple[float, float, float]:
        """Milliseconds, forward rows and backward rows per image, on the first images."""
        count = min(TIMED, self.images)
        ((x, _),) = batches(self.data, [list(range(count))], 0, self.device)
        x = x.to(self.device)
        score.copy().score(self.model, x[:8])
        counted = score.copy()
        self._synchronize()
        start = time.perf_counter()
        counted.score(self.model, x)
        self._synchronize()
        seconds = time.perf_counter() - start
        return 1000 * seconds / len(x), float(counted.forward_rows), float(counted.backward_rows)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
