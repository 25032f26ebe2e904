"""A random split of a loader's samples, without holding them in memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sized
from typing import Any, cast

import torch
from torch.utils.data import RandomSampler

from .._common.loaders import arguments_of, labelled
from .._common.storage import raw_bytes

_ADVICE = (
    "The score needs a fit, on samples that have to be kept from those that choose the threshold "
    "in several passes: give a DataLoader with shuffle=False or a list of batches, or fit the "
    "score on other data first"
)


class Split:
    """Two parts, `tune` and `rest`, to be iterated over; a sample stays in its part.

    Args:
        loader: yields (x, target, ...); the same batches in each pass, which is checked.
        tune_share: probability of a sample to be in `tune`.
        seed: of the split.
    """

    def __init__(self, loader: Iterable[Any], tune_share: float, seed: int) -> None:
        if isinstance(getattr(loader, "sampler", None), RandomSampler):
            raise ValueError(f"the loader shuffles. {_ADVICE}")
        if iter(loader) is loader:
            raise ValueError(f"the loader is an iterator, which gives one pass only. {_ADVICE}")
        self.loader, self.tune_share, self.seed = loader, tune_share, seed
        self.checksums: list[int] | None = None
        self.tune, self.rest = _Part(self, tune=True), _Part(self, tune=False)

    def batches(self) -> Iterator[Any]:
        """The loader's batches, each with a random choice of its rows."""
        generator = torch.Generator().manual_seed(self.seed)
        checksums = []
        for batch in self.loader:
            x, target = labelled(batch)
            checksums.append(zlib.crc32(raw_bytes(target), zlib.crc32(raw_bytes(x))))
            if (
                self.checksums
                and self.checksums[len(checksums) - 1 : len(checksums)] != checksums[-1:]
            ):
                break
            tune = torch.rand(len(x), generator=generator) < self.tune_share
            yield x, target, arguments_of(batch), tune
        self.checksums = self.checksums or checksums
        if checksums != self.checksums:
            raise ValueError(f"the loader's passes differ. {_ADVICE}")


class _Part:
    def __init__(self, split: Split, tune: bool) -> None:
        self.split, self.tune = split, tune
        self.samples = 0
        """Counted in the last pass."""

    def __len__(self) -> int:
        return len(cast(Sized, self.split.loader))

    def __iter__(self) -> Iterator[Any]:
        self.samples = 0
        for x, target, arguments, tune in self.split.batches():
            rows = (tune == self.tune).nonzero().squeeze(1)
            if len(rows):
                self.samples += len(rows)
                part = x[rows.to(x.device)], target[rows.to(target.device)]
                yield part if arguments is None else (*part, arguments.of(rows))
        if self.split.checksums and not self.samples:
            raise ValueError(
                f"a tune_share of {self.split.tune_share:g} leaves no sample to "
                f"{'tune the score' if self.tune else 'choose the threshold'} on; hold out more"
            )
