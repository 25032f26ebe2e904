"""Warnings of held-out data that are a part of sorted data, and none of others."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from rat_ext import Detector
from rat_ext.detector.sorted_part import chance_of_runs, warn_of_a_part

CLASSES = 10


def drawn(n: int, classes: int = CLASSES, accuracy: float = 0.88, seed: int = 0) -> np.ndarray:
    """(n, 2) targets and predictions in random order."""
    rng = np.random.default_rng(seed)
    target = rng.integers(classes, size=n)
    guess = rng.integers(classes, size=n)
    return np.stack([target, np.where(rng.random(n) < accuracy, target, guess)], 1)


def by_class(pairs: np.ndarray) -> np.ndarray:
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_prefix_of_sorted_data(shuffle: bool) -> None:
    pairs = torch.from_numpy(by_class(drawn(10_000))[:2000])
    logits = torch.nn.functional.one_hot(pairs[:, 1], CLASSES).double()
    data = TensorDataset(logits, pairs[:, 0])
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=100, shuffle=shuffle, generator=generator)
    with pytest.warns(RuntimeWarning, match=r"a part of data sorted by class\?.*random sample"):
        Detector.fit(lambda x: x, loader, "msr", coverage=0.5, progress=False)


@pytest.mark.parametrize(
    ("classes", "part", "message"),
    [
        (2, slice(0, 500), "no held-out target is 1, which the model predicts"),
        (2, slice(9500, None), "no held-out target is 0"),
        (1000, slice(0, 1000), "in the order of their classes, and none is"),
        (1000, slice(5000, 5050), "in the order of their classes"),
    ],
)
def test_parts(classes: int, part: slice, message: str) -> None:
    pairs = by_class(drawn(10_000, classes))[part]
    with pytest.warns(RuntimeWarning, match=message):
        warn_of_a_part(pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize("accuracy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_no_false_alarm(classes: int, accuracy: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, n in itertools.product(range(20), (5, 40, 300, 3000)):
            pairs = drawn(n, classes, accuracy, seed)
            warn_of_a_part(pairs[:, 0], pairs[:, 1])
        whole = by_class(drawn(20 * classes, classes, accuracy))
        warn_of_a_part(whole[:, 0], whole[:, 1])  # all of sorted data
        few = whole[np.isin(whole, np.arange(classes // 2)).all(1)]
        warn_of_a_part(few[:, 0], few[:, 1])  # no other class comes up


@pytest.mark.parametrize("values", ["aaabbb", "aaaaab", "aabbcc", "aaabbc", "abcdef", "aaaaaa"])
def test_the_chance_of_runs_is_a_bound(values: str) -> None:
    orders = np.array(list(itertools.permutations(map(ord, values))))
    runs = 1 + (np.diff(orders) != 0).sum(1)
    for count in np.unique(runs):
        bound = chance_of_runs(orders[np.argmax(runs == count)])
        assert np.mean(runs <= count) <= bound * (1 + 1e-9)


def test_the_chance_of_runs_is_near_the_truth() -> None:
    exact = 2 / math.comb(20, 10)  # two of the orders have two runs
    assert exact < chance_of_runs(np.repeat([0, 1], 10)) < 25 * exact
    assert chance_of_runs(np.zeros(9, np.int64)) == 1
