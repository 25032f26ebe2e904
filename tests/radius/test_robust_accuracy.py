"""The accuracy that is left within a distance, and radii as a table."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers import RowExact, uniform
from hypothesis import given
from hypothesis import strategies as st

from rat_ext import robust_accuracy, robust_radius

RADII = st.floats(min_value=0, width=32) | st.just(math.nan)
SAMPLES = st.lists(st.tuples(RADII, st.booleans()), min_size=1, max_size=20)


@given(samples=SAMPLES, eps=st.lists(st.floats(0, 1e6, width=32), max_size=8))
def test_it_is_the_share_that_is_right_and_further_away(samples, eps):
    """Many eps are radii themselves: those do not count as further away."""
    eps = eps + [radius for radius, _ in samples if not math.isnan(radius)]
    radius, correct = (torch.tensor(each) for each in zip(*samples, strict=True))
    curve = robust_accuracy(radius, correct, eps)
    assert curve.dtype == torch.float64
    expected = [sum(c and r > e for r, c in samples) / len(samples) for e in eps]
    assert curve.tolist() == pytest.approx(expected, abs=1e-12)
    for e, value in zip(eps, curve.tolist(), strict=True):
        assert robust_accuracy(radius, correct, e) == value


@given(samples=SAMPLES, eps=st.lists(st.floats(0, 10), min_size=2))
def test_it_falls_from_the_accuracy_on(samples, eps):
    radius, correct = (torch.tensor(each) for each in zip(*samples, strict=True))
    curve = robust_accuracy(radius, correct, sorted(eps))
    assert (curve.diff() <= 0).all()
    accuracy = correct.double().mean()
    assert (curve <= accuracy).all()
    positive = radius.clamp_min(1e-30).nan_to_num(nan=1.0)
    assert robust_accuracy(positive, correct, 0) == accuracy


def test_arrays_and_the_ends():
    radius, correct = [0.5, math.inf, math.nan, 2.0], [1, 1, 1, 0]
    assert robust_accuracy(torch.tensor(radius).numpy(), correct, 0.25) == 0.5
    assert robust_accuracy(radius, correct, 0.5) == 0.25
    assert robust_accuracy(radius, correct, math.inf) == 0
    assert isinstance(robust_accuracy(radius, correct, 0.5), float)
    assert robust_accuracy(radius, correct, []).shape == (0,)


@pytest.mark.parametrize(
    ("message", "radius", "correct", "eps"),
    [
        (r"radius has shape \(2,\) and correct \(3,\)", [1.0, 2.0], [1, 1, 0], 0.1),
        (r"radius has shape \(0,\)", [], [], 0.1),
        ("correct has other values than 0 and 1", [1.0, 2.0], [1, 2], 0.1),
        ("eps is -0.1; expected a number of 0 or more", [1.0], [1], -0.1),
        ("eps is .*nan", [1.0], [1], [0.1, math.nan]),
    ],
)
def test_bad_input(message, radius, correct, eps):
    with pytest.raises(ValueError, match=message):
        robust_accuracy(radius, correct, eps)


def test_a_result_as_a_table():
    pytest.importorskip("pandas")
    result = robust_radius(RowExact(), uniform(5, 12), full="points")
    table = result.to_pandas()
    assert len(table) == 5
    assert "x_adv" not in table
    assert table["radius"].tolist() == result.radius.tolist()
    assert table["flipped_to"].tolist() == result.flipped_to.tolist()
    assert table["is_adv"].tolist() == result.is_adv.tolist()
    assert "is_adv" not in robust_radius(RowExact(), uniform(5, 12), full=True).to_pandas()


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    result = robust_radius(RowExact(), uniform(2, 12), full=True)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        result.to_pandas()
