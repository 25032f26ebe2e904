"""Batches of single items, for a function in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service import PATIENCE

from rat_ext.serve.batching import Batcher, ClosedError, QueueFullError


class Held:
    """A function for a batcher, which the test holds up."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Semaphore(0), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.release()
        assert self.release.wait(PATIENCE)
        return [10 * item for item in items]

    def wait(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)


@contextlib.contextmanager
def batcher(run: Callable, **options: Any) -> Iterator[Batcher]:
    it: Batcher = Batcher(run, **{"max_batch": 4, "max_wait": 0.0, "queue": 8, **options})
    try:
        yield it
    finally:
        it.close()
        assert it.join(PATIENCE)


def test_batches_hold_what_came_while_the_last_one_ran() -> None:
    held = Held()
    with batcher(held) as it:
        futures = [it.submit(0)]
        held.wait()
        futures += [it.submit(item) for item in range(1, 7)]
        assert it.waiting == 6
        held.release.set()
        assert [future.result(PATIENCE) for future in futures] == [0, 10, 20, 30, 40, 50, 60]
    assert held.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_full_batch_waits_for_no_more() -> None:
    with batcher(lambda items: [len(items)] * len(items), max_wait=1e6) as it:
        futures = [it.submit(item) for item in range(4)]
        assert [future.result(PATIENCE) for future in futures] == [4] * 4


def test_a_full_queue_refuses_and_a_cancelled_item_is_not_run() -> None:
    held = Held()
    with batcher(held, max_batch=1, queue=2) as it:
        futures = [it.submit(0)]
        held.wait()
        futures += [it.submit(1), it.submit(2)]
        with pytest.raises(QueueFullError, match="2 items wait already"):
            it.submit(3)
        assert futures[1].cancel()
        held.release.set()
        assert futures[2].result(PATIENCE) == 20
        with pytest.raises(CancelledError):
            futures[1].result(0)
    assert held.batches == [[0], [2]]


def test_closing_runs_what_was_taken_and_takes_no_more() -> None:
    held = Held()
    with batcher(held, max_wait=1e6, max_batch=2) as it:
        futures = [it.submit(0), it.submit(1)]
        held.wait()
        futures.append(it.submit(2))
        it.close()
        with pytest.raises(ClosedError):
            it.submit(3)
        assert it.alive
        held.release.set()
        assert it.join(PATIENCE)
        assert [future.result(0) for future in futures] == [0, 10, 20]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["good", "raises", "is an exception"]), min_size=1, max_size=9))
def test_no_item_fails_for_another(kinds: list[str]) -> None:
    def run(items: list[int]) -> list[Any]:
        for item in items:
            if kinds[item] == "raises":
                raise ValueError(f"{items}")
        return [KeyError(i) if kinds[i] == "is an exception" else -i for i in items]

    with batcher(run, max_batch=len(kinds), max_wait=1e6, queue=9) as it:
        futures = [it.submit(item) for item in range(len(kinds))]
        for item, (kind, future) in enumerate(zip(kinds, futures, strict=True)):
            if kind == "good":
                assert future.result(PATIENCE) == -item
            else:
                error = future.exception(PATIENCE)
                expected = [str([item])] if kind == "raises" else [item]
                assert list(error.args) == expected


def test_too_few_results_are_an_error() -> None:
    with batcher(lambda items: []) as it:
        assert "0 results for 1 items" in str(it.submit(0).exception(PATIENCE))
