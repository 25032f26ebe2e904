"""Radii of the batches of a Ray Dataset."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import RowExact, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rat_ext
from rat_ext.ray import RadiusMapper, mapper
from rat_ext.ray.mapper import COLUMNS

ROWS = 60


def batches(x: Tensor, sizes: list[int]) -> list[dict[str, np.ndarray]]:
    """Consecutive rows as Ray hands them out: numbered, and not to be written to."""
    made = []
    for part in torch.arange(len(x)).split(sizes):
        batch = {"id": part.numpy(), "image": x[part].numpy()}
        for column in batch.values():
            column.flags.writeable = False
        made.append(batch)
    return made


def assert_columns(rows: dict[str, Any], x: Tensor, **options: Any) -> None:
    """Each row once, with what `robust_radius` gives, to the bit."""
    assert set(rows) == {"id", "image", *COLUMNS}
    order = np.argsort(rows["id"])
    assert rows["id"][order].tolist() == list(range(len(x)))
    assert np.array_equal(rows["image"][order], x.numpy())
    expected = rat_ext.robust_radius(RowExact(), x, full=True, **options)
    for name in COLUMNS:
        np.testing.assert_array_equal(rows[name][order], getattr(expected, name), name)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rtol=st.sampled_from([1e-2, 1e-4]),
)
def test_batches_of_any_size(sizes: list[int], rtol: float) -> None:
    x = uniform(sum(sizes), 3, 4)
    add = RadiusMapper(RowExact, "image", rtol=rtol)
    parts = [add(batch) for batch in batches(x, sizes)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert_columns(whole, x, rtol=rtol)


def test_one_model_and_an_estimator_for_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    models, sizes = [], []

    class Spied(rat_ext.RadiusEstimator):
        def __init__(self, model: Any, example_x: Tensor, **options: Any) -> None:
            sizes.append(len(example_x))
            super().__init__(model, example_x, **options)

    def make_model() -> nn.Module:
        models.append(mlp())
        return models[-1]

    monkeypatch.setattr(mapper, "RadiusEstimator", Spied)
    add = RadiusMapper(make_model, "image")
    assert not models
    for batch in batches(uniform(31, 12), [3, 8, 8, 4, 8]):
        add(batch)
    assert len(models) == 1
    assert sizes == [3, 8]


def test_inputs_are_made_of_the_column() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    x = torch.tensor(pixels).double() / 255
    add = RadiusMapper(RowExact, "image", prepare=lambda a: torch.tensor(a).double() / 255)
    rows = add({"image": pixels})
    assert rows["image"] is pixels
    assert torch.equal(torch.tensor(rows["radius"]), rat_ext.robust_radius(RowExact(), x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 2.0}, "rtol is 2.0"),
        ({"bounds": (1.0, 0.0)}, "low must be below high"),
        ({"bounds": (torch.zeros(3, 4), torch.zeros(3, 1))}, "no element can move"),
        ({"attack": "pgd"}, "for attack pgd use rat_ext.robust_radius"),
        ({"target": torch.zeros(1, dtype=torch.int64)}, "target is a tensor"),
        ({"batch_size": 4}, "the batch size of a RadiusEstimator"),
        ({"epsilon": 1.0}, "unexpected keyword argument 'epsilon'"),
    ],
)
def test_options_are_checked_before_there_is_a_model(options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        RadiusMapper(lambda: pytest.fail("there is no need of a model"), **options)


def test_bounds_of_each_feature() -> None:
    bounds = (torch.zeros(3, 1), torch.linspace(1, 2, 4))
    x = uniform(4, 3, 4)
    (batch,) = batches(x, [4])
    assert_columns(RadiusMapper(RowExact, "image", bounds=bounds)(batch), x, bounds=bounds)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": np.zeros((2, 12))}, "there is no column 'image' of inputs; there are x"),
        (
            {"image": np.zeros((2, 12)), "prediction": np.zeros(2)},
            "a column 'prediction' already, which is to be added; rename it",
        ),
        ({"image": np.array([np.zeros(2), np.zeros(3)], object)}, "not all of one shape"),
        ({"image": np.zeros((2, 12), np.uint8)}, "x is torch.uint8; expected a floating-point"),
        ({"image": np.full((2, 12), 7.0)}, "out of bounds|outside"),
    ],
)
def test_bad_batches_are_told_why(batch: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        RadiusMapper(RowExact, "image")(batch)


class Mortal(RowExact):
    """Kills its process at the last of the inputs, once: it takes the marker with it."""

    def __init__(self, marker: Path, last: Tensor) -> None:
        super().__init__()
        self.marker, self.last = marker, last

    def forward(self, x: Tensor) -> Tensor:
        if (x == self.last).flatten(1).all(1).any() and self.marker.exists():
            self.marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.fixture
def workers(ray: None) -> Iterator[None]:
    """Ray's, which get the classes of this file by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("workers")
def test_nothing_is_lost_or_twice_when_an_actor_is_killed(tmp_path: Path) -> None:
    import ray

    x, marker = uniform(ROWS, 3, 4), tmp_path / "to be killed"
    marker.touch()
    items = [{"id": i, "image": row} for i, row in enumerate(x.numpy())]
    dataset = ray.data.from_items(items, override_num_blocks=4)  # 15 rows: batches of 10 and 5
    make_model = functools.partial(Mortal, marker, x[-1])
    two = ray.data.ActorPoolStrategy(size=2)
    radii = RadiusMapper(make_model, "image").over(dataset, batch_size=10, compute=two)
    rows = radii.take_batch(ROWS + 1, batch_format="numpy")
    assert not marker.exists()
    assert_columns(rows, x)


@pytest.mark.usefixtures("ray")
def test_columns_are_checked_before_anything_runs() -> None:
    import ray

    def make_model() -> nn.Module:
        raise RuntimeError("there is no need of a model")

    dataset = ray.data.from_items([{"pixels": 0.0, "radius": 0.0}])
    with pytest.raises(ValueError, match=re.escape("there is no column 'image' of inputs; there")):
        RadiusMapper(make_model, "image").over(dataset)
    with pytest.raises(ValueError, match="a column 'radius' already"):
        RadiusMapper(make_model, "pixels").over(dataset)
