"""Gathers single items into batches, for a function that runs in one thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(RuntimeError):
    """As many items wait as may wait."""


class ClosedError(RuntimeError):
    """No new items are taken."""


class Pending(Future[Result]):
    """The result of an item, and once it is there, what it took."""

    waited = 0.0
    """Seconds until its batch began."""
    ran = 0.0
    """Seconds that its batch took."""
    together = 0
    """Items in its batch."""


@dataclass
class _Job(Generic[Item, Result]):
    item: Item
    future: Pending[Result] = field(default_factory=Pending)
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Result]):
    """Calls ``run(items)`` in its thread, with the items that were submitted meanwhile.

    A batch starts when it is full, or when its first item has waited long enough; items that came
    while the last one ran have waited already. It is run by `run_apart`.

    Args:
        run: from a list of items to as many results. A result that is an exception is raised to
            whoever waits for it.
        max_batch: most items in a call.
        max_wait: seconds that the first item of a batch waits for others.
        queue: most items that wait for a batch.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result | Exception]],
        *,
        max_batch: int,
        max_wait: float,
        queue: int,
    ) -> None:
        self._run, self._max_batch, self._max_wait, self._queue = run, max_batch, max_wait, queue
        self._jobs: deque[_Job[Item, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a call which never returns cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="rat-ext-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that wait for a batch."""
        return len(self._jobs)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    def check(self) -> None:
        """Raise what `submit` would raise now.

        Raises:
            ClosedError: no new items are taken.
            QueueFullError: too many items wait.
        """
        if self._closed:
            raise ClosedError("no new work is taken")
        if len(self._jobs) >= self._queue:
            raise QueueFullError(f"{self._queue} items wait already")

    def submit(self, item: Item) -> Pending[Result]:
        """The result of an item, once it is there. Cancelled in time, the item is not run.

        Raises:
            ClosedError: no new items are taken.
            QueueFullError: too many items wait.
        """
        with self._changed:
            self.check()
            job: _Job[Item, Result] = _Job(item)
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take no more items. Those that were taken are still run, without waiting for others."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until a closed batcher has run all its items; False if it takes too long."""
        self._thread.join(timeout)
        return not self.alive

    def _work(self) -> None:
        while jobs := self._take():
            wanted = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if wanted:
                self._settle(wanted)

    def _take(self) -> list[_Job[Item, Result]]:
        """Wait for the jobs of the next batch; none once closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._jobs:
                left = self._jobs[0].since + self._max_wait - time.monotonic()
                self._changed.wait_for(
                    lambda: len(self._jobs) >= self._max_batch or self._closed, max(0.0, left)
                )
            return [self._jobs.popleft() for _ in range(min(self._max_batch, len(self._jobs)))]

    def _settle(self, jobs: list[_Job[Item, Result]]) -> None:
        begin = time.monotonic()
        results = run_apart(self._run, [job.item for job in jobs])
        ran = time.monotonic() - begin
        for job, result in zip(jobs, results, strict=True):
            job.future.waited, job.future.ran = begin - job.since, ran
            job.future.together = len(jobs)
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)


def run_apart(
    run: Callable[[list[Item]], Sequence[Result | Exception]], items: list[Item]
) -> list[Result | Exception]:
    """Run items together; where that raises, in halves, so that none fails for another's sake.

    Returns:
        A result for each item. One that `run` fails on even alone has the exception.
    """
    try:
        results = run(items)
        if len(results) != len(items):
            raise RuntimeError(f"{len(results)} results for {len(items)} items")
        return list(results)
    except Exception as error:
        if len(items) == 1:
            return [error]
        middle = len(items) // 2
        return run_apart(run, items[:middle]) + run_apart(run, items[middle:])
