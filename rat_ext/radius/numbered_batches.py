"""A loader whose batches have numbers, so that a run can go on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from .._common.loaders import arguments_of, inputs_and_targets
from .._common.storage import raw_bytes


class NumberedBatches:
    """A loader whose batches have numbers, and need not be loaded to be passed over.

    Attributes:
        length: how many batches, where that is known beforehand.
        samples: how many the data set has, where that is known.
        read: makes of a batch what `inputs_and_targets` takes.
        total: how many there were, after `batches` has come to its end.
    """

    def __init__(self, loader: Any, batch_fn: Callable[[Any], Any] | None = None) -> None:
        self.loader, self.total = loader, 0
        self.read = batch_fn or (lambda batch: batch)
        # Loaders that iterate in their own way, and streams, are read to be passed over.
        self.by_index = (
            isinstance(loader, DataLoader)
            and type(loader).__iter__ is DataLoader.__iter__
            and not isinstance(loader.dataset, IterableDataset)
        )
        if self.by_index and isinstance(loader.sampler, RandomSampler):
            raise ValueError(
                "the loader shuffles, so that a run could not be resumed; make it with "
                "shuffle=False"
            )
        if self.by_index and isinstance(loader.sampler, DistributedSampler):
            raise ValueError(
                "the loader has a DistributedSampler; with out, give every process the same loader "
                "without one: the shards are divided among the processes here"
            )
        try:
            self.length: int | None = len(loader)
        except TypeError:
            self.length = None

    def batches(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
        """The batches whose numbers are wanted, with their numbers."""
        if not self.by_index:
            for number, batch in enumerate(self.loader):
                self.total = number + 1
                if wanted(number):
                    yield number, self.read(batch)
            return
        sampler = _Wanted(self._sampler, wanted)
        # The loader samples ahead of the batches that it gives, so they are counted anew.
        numbers = filter(wanted, itertools.count())
        for batch in self._with(sampler):
            yield next(numbers), self.read(batch)
        self.total = sampler.total

    def first_batch(self) -> str | None:
        """Hex SHA-256 of the inputs of the first batch; None where it cannot be read twice.

        Of those that the model takes beside x, too, where each sample has them.
        """
        if not self.by_index:
            return None
        for batch in self._with(_Wanted(self._sampler, lambda i: i == 0, last=0), num_workers=0):
            read = self.read(batch)
            digest = hashlib.sha256(raw_bytes(inputs_and_targets(read)[0]))
            arguments = arguments_of(read)
            for name, value in sorted(arguments.per_sample.items() if arguments else ()):
                digest.update(name.encode())
                digest.update(raw_bytes(value))
            return digest.hexdigest()
        raise ValueError("the loader gave no batch")

    @property
    def samples(self) -> int | None:
        if not self.by_index:
            return None
        try:
            return len(self.loader.dataset)
        except TypeError:
            return None

    @property
    def _sampler(self) -> Any:
        batched = self.loader.batch_sampler is not None
        return self.loader.batch_sampler if batched else self.loader.sampler

    def _with(self, sampler: _Wanted, **changes: Any) -> DataLoader[Any]:
        """The loader with another sampler of batches."""
        names = "collate_fn num_workers pin_memory timeout worker_init_fn generator"
        settings = {name: getattr(self.loader, name) for name in names.split()} | changes
        if settings["num_workers"]:
            for name in ("multiprocessing_context", "prefetch_factor"):
                settings[name] = getattr(self.loader, name)
        if self.loader.batch_sampler is None:  # the data set takes what the sampler gives as it is
            return DataLoader(self.loader.dataset, sampler=sampler, batch_size=None, **settings)
        return DataLoader(self.loader.dataset, batch_sampler=sampler, **settings)


class _Wanted(Sampler[Any]):
    """The batches of a sampler whose numbers are wanted; counts all of them."""

    def __init__(
        self, sampler: Iterable[Any], wanted: Callable[[int], bool], last: int | None = None
    ) -> None:
        self.sampler, self.wanted, self.last, self.total = sampler, wanted, last, 0

    def __iter__(self) -> Iterator[Any]:
        self.total = 0
        for number, index in enumerate(self.sampler):
            self.total = number + 1
            if self.wanted(number):
                yield index
            if number == self.last:
                return
