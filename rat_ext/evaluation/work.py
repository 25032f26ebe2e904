"""Scoring a data set: shared among processes, and kept in a cache on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import scores
from .._common.storage import fingerprint, write_whole
from .._core import __version__
from ..datasets import batches
from ..scores.radius import RadiusScore
from .settings import Settings

CHUNK = 1000
"""Images whose confidences are written to disk together."""


TIMED = 256
"""Images that the run time of a score is measured on."""


def _chosen(score: scores.Score) -> str:
    if not isinstance(score, scores.TunedScore):
        return ""
    setting = score.setting
    return f"T={setting.temperature:g}" + (
        f" eps={setting.perturbation:g}" if setting.perturbation else ""
    )


def _chooses_only(score: scores.Score) -> bool:
    """All that fit() does is to choose a setting."""
    return type(score).fit in (scores.TunedScore.fit, RadiusScore.fit)


class _Work:
    """Scoring a data set: shared among processes, and kept in the cache."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        settings: Settings,
        cache: _Cache,
        workers: int,
        progress: bool,
        rank: int,
        world: int,
    ) -> None:
        self.model, self.data, self.settings, self.cache = model, data, settings, cache
        self.workers, self.progress, self.rank, self.world = workers, progress, rank, world
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
        if isinstance(score, scores.LogitScore) and not _perturbs(score):
            # The logits are known already; of them, the model is the identity.
            model, fitted = nn.Identity(), []
            for part, _ in splits:
                batch = [(logits[part], target[part])]
                fitted.append(self.settings.create(name).fit(model, batch, progress=False))
            return fitted, [one.score(model, logits) for one in fitted]
        if type(score).fit is scores.Score.fit:
            return [score] * len(splits), self.over_data(name, score.score)[:1] * len(splits)
        if not _chooses_only(score):
            fitted = [
                self.settings.create(name).fit(self.model, self.loader(part), progress=False)
                for part, _ in splits
            ]
            keys = [f"{name}-split{number}" for number in range(len(splits))]
        else:
            tasks = [
                (f"{name}-fit{number}", lambda part=part: [self.choice(name, part)])
                for number, (part, _) in enumerate(splits)
            ]
            chosen = [scores.Setting(*c.tolist()) for (c,) in self.shared(f"fit {name}", tasks)]
            fitted = [score.at(setting) for setting in chosen]
            keys = [f"{name}-{_chosen(one)}" for one in fitted]
        confidences = [self.over_data(k, s.score)[0] for k, s in zip(keys, fitted, strict=True)]
        return fitted, confidences

    def choice(self, name: str, part: Tensor) -> Tensor:
        """The setting that a score chooses on a part of the data."""
        score = self.settings.create(name).fit(self.model, self.loader(part), progress=False)
        return torch.tensor(score.setting, dtype=torch.float64)

    def over_data(self, name: str, compute: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        """compute(model, x) of all images, and their targets, on the CPU."""

        def chunk(index: Tensor) -> list[Tensor]:
            values, targets = [], []
            for x, target in self.loader(index):
                values.append(compute(self.model, x.to(self.device)).cpu())
                targets.append(target)
            return [torch.cat(values), torch.cat(targets)]

        chunks = torch.arange(len(self.data)).split(CHUNK)
        tasks = [(f"{name}-{i}", lambda c=c: chunk(c)) for i, c in enumerate(chunks)]
        return [torch.cat(parts) for parts in zip(*self.shared(name, tasks), strict=True)]

    def loader(self, index: Tensor) -> Any:
        parts = [part.tolist() for part in index.split(self.settings.batch_size)]
        return batches(self.data, parts, self.workers, self.device)

    def shared(
        self, what: str, tasks: Sequence[tuple[str, Callable[[], list[Tensor]]]]
    ) -> list[list[Tensor]]:
        """The results of all tasks; each process computes its share of those not in the cache."""
        from tqdm.auto import tqdm

        mine = [task for task in tasks[self.rank :: self.world] if not self.cache.has(task[0])]
        hidden = not self.progress or self.rank > 0 or not mine
        for key, compute in tqdm(mine, desc=what, unit="part", leave=False, disable=hidden):
            self.cache.write(key, compute())
        if self.world > 1:
            dist.barrier()
        return [self.cache.read(key) for key, _ in tasks]

    def cost(self, name: str, fitted: scores.Score) -> tuple[float, float, float]:
        """Milliseconds, forward rows and backward rows per image, on the first images."""
        count = min(TIMED, len(self.data))
        ((x, _),) = batches(self.data, [list(range(count))], 0, self.device)
        x = x.to(self.device)
        score = fitted
        if _chooses_only(fitted):  # a new one, which counts its rows from 0
            score = self.settings.create(name).at(fitted.setting)
        score.score(self.model, x[:8])
        self._synchronize()
        start = time.perf_counter()
        score.score(self.model, x)
        self._synchronize()
        seconds = time.perf_counter() - start
        return 1000 * seconds / len(x), float(score.forward_rows), float(score.backward_rows)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _perturbs(score: scores.Score) -> bool:
    grid = score.grid if isinstance(score, scores.TunedScore) else []
    return any(setting.perturbation for setting in grid)


class _Cache:
    """Named lists of tensors in a folder; a file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, fingerprint: str, resume: bool) -> None:
        """Start empty, or go on with what there is of the same evaluation."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "evaluation"
        if resume and mark.exists():
            if mark.read_text() != fingerprint:
                raise ValueError(
                    f"{self.folder} is of another model, data set or settings; do not resume, or "
                    "use another output folder"
                )
            return
        for path in self.folder.glob("*.pt"):
            path.unlink()
        mark.write_text(fingerprint)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def write(self, key: str, tensors: list[Tensor]) -> None:
        write_whole(self.path(key), lambda temporary: torch.save(tensors, temporary))

    def read(self, key: str) -> list[Tensor]:
        return torch.load(self.path(key), weights_only=True)


def _fingerprint(model: nn.Module, data: Dataset, settings: Settings) -> str:
    digest = hashlib.sha256(fingerprint(model).encode())
    for index in (0, len(data) // 2, len(data) - 1):
        x, target = data[index]
        digest.update(x.numpy().tobytes() + str(int(target)).encode())
    digest.update(repr((len(data), settings, __version__)).encode())
    return digest.hexdigest()
