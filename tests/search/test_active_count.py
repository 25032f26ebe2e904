"""How the search loop learns on a GPU how many rows are active."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from helpers import RowExact, assert_identical, uniform
from torch import Tensor

from rat_ext import robust_radius
from rat_ext.search import bracket_search


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("options", [{}, {"probes": 3}, {"method": "fast"}])
def test_rounds_launched_before_the_count_is_known_change_nothing(monkeypatch, chunk, options):
    launched = []

    def model(x: Tensor) -> Tensor:
        launched.append(len(x))
        return exact(x)

    class Unhurried(bracket_search.ActiveCount):
        """Returns the total in the first rounds, as on a GPU."""

        def __call__(self, count: Tensor) -> int:
            self.sure -= 1
            return self.total if self.sure >= 0 else super().__call__(count)

    exact, x = RowExact(), uniform(10, 12)
    x[[0, 3]] = math.nan
    x[9] = x[8]
    call = {"full": True, "batch_size": chunk, **options}
    with pytest.warns(RuntimeWarning, match="2 of 10 rows"):
        expected = robust_radius(model, x, **call)
    exactly = sum(launched)
    launched.clear()
    monkeypatch.setattr(bracket_search, "ActiveCount", Unhurried)
    with pytest.warns(RuntimeWarning, match="2 of 10 rows"):
        result = robust_radius(model, x, **call)
    assert_identical(result, expected)
    settled_rows = 2 * (2 if not options else 1) * options.get("probes", 1)
    assert sum(launched) == exactly + settled_rows


def test_the_count_is_awaited_by_an_event_of_its_own(monkeypatch):
    """The calls of ActiveCount to torch.cuda; the device is stood in for by mocks."""
    calls = mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: calls.stream)
    active = bracket_search.ActiveCount(torch.device("cpu"), total=9, sure=2)
    active.on_gpu, active.event = True, calls.event
    active.host = torch.empty(1, dtype=torch.int32)
    count = torch.tensor([5], dtype=torch.int32)
    assert [active(count), active(count)] == [9, 9]
    assert calls.mock_calls == []
    assert active(count) == 5
    assert calls.mock_calls == [
        mock.call.event.record(calls.stream),
        mock.call.event.synchronize(),
    ]
