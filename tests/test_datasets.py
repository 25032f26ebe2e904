"""Data sets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from rat_ext import datasets


def test_digits_are_split_into_disjoint_parts() -> None:
    splits = datasets.digits(train_size=500, seed=3)
    assert [len(part) for part in splits] == [500, 297, 1000]
    x, target = splits.train[:]
    assert x.shape == (500, 1, 8, 8)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert target.dtype == torch.int64
    assert splits.train.classes == tuple("0123456789")
    # The same images again, in whatever order: nothing is lost or in two parts.
    other = datasets.digits(train_size=100, seed=4)
    sums = [
        torch.cat([part.pixels.double().sum((1, 2, 3)) * 100 + part.targets for part in parts])
        for parts in (splits, other)
    ]
    assert torch.equal(*(values.sort().values for values in sums))


def test_digits_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (datasets.digits(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.test.pixels, again.test.pixels)
    assert not torch.equal(first.test.pixels, other.test.pixels)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_digits_too_many_to_train_on() -> None:
    with pytest.raises(ValueError, match="leave some of the 1797 images for validation"):
        datasets.digits(train_size=797)


def test_images_are_floats_in_the_unit_interval() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    images = datasets.Images(pixels, torch.tensor([0, 1, 0]), ("a", "b"))
    x, target = images[[1, 2]]
    assert torch.equal(x.flatten(), torch.tensor([0.2, 1.0]))
    assert target.tolist() == [1, 0]
    assert images[1][0].shape == (1, 1, 1)
    assert len(images.subset(slice(1, 3))) == 2


def write_archive(path: Path, **changes: np.ndarray | None) -> Path:
    image = pytest.importorskip("PIL.Image")
    files = []
    for value in (0, 128, 255):
        file = io.BytesIO()
        image.new("RGB", (4, 2), (value, value, value)).save(file, "JPEG")
        files.append(file.getvalue())
    arrays = {
        "bytes": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array([2, 0, 1], np.uint8),
        "classes": np.array(["x", "y", "z"]),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_jpeg_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "images.npz")
    images = datasets.jpeg_archive(path)
    assert images.pixels.shape == (3, 3, 2, 4)
    assert images.pixels.float().mean((1, 2, 3)).tolist() == pytest.approx([0, 128, 255], abs=2)
    assert images.targets.tolist() == [2, 0, 1]
    assert images.classes == ("x", "y", "z")
    assert len(datasets.jpeg_archive(path, limit=2)) == 2


def test_errors_of_jpeg_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no image archive"):
        datasets.jpeg_archive(tmp_path / "images.npz")
    with pytest.raises(ValueError, match="not an image archive with bytes, offsets"):
        datasets.jpeg_archive(write_archive(tmp_path / "images.npz", offsets=None))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="not an image archive with bytes, offsets"):
        datasets.jpeg_archive(tmp_path / "text.npz")
