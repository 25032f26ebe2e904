"""Labelled images with pixels in [0, 1]."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Images(Dataset):
    """A data set in memory. An index, a list of them or a slice gives (float32 pixels, targets)."""

    pixels: Tensor
    """(N, C, H, W), float32 in [0, 1] or uint8 in 0..255."""
    targets: Tensor
    """(N,) int64 class indices."""
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        x = self.pixels[index]
        return x if x.is_floating_point() else x.float() / 255, self.targets[index]

    def subset(self, index: slice | Sequence[int] | Tensor) -> Images:
        """Some of the images, not copied for a slice."""
        return Images(self.pixels[index], self.targets[index], self.classes)


class Splits(NamedTuple):
    """Three disjoint parts of a data set."""

    train: Images
    validation: Images
    test: Images


def digits(train_size: int = 500, seed: int = 0, *, test_size: int = 1000) -> Splits:
    """Scikit-learn's 1,797 handwritten digits, (N, 1, 8, 8), split at random.

    Args:
        train_size: images to train on; few, so that there are errors to detect.
        seed: of the split.
        test_size: images to test on; the rest is for validation.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: fewer than 1 image is left for validation.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'rat-ext[demo]'") from error
    data = load_digits()
    total = len(data.target)
    if train_size < 1 or test_size < 1 or train_size + test_size >= total:
        raise ValueError(
            f"train_size is {train_size} and test_size {test_size}; both must be at least 1, and "
            f"together leave some of the {total} images for validation"
        )
    pixels = torch.tensor(data.images, dtype=torch.float32).div_(16).unsqueeze(1)
    targets = torch.tensor(data.target, dtype=torch.int64)
    everything = Images(pixels, targets, tuple(map(str, data.target_names)))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    sizes = [train_size, total - train_size - test_size, test_size]
    return Splits(*(everything.subset(index) for index in order.split(sizes)))


def jpeg_archive(path: str | Path, limit: int | None = None) -> Images:
    """Images kept as JPEG files in one .npz archive.

    It has the arrays ``bytes`` (uint8), ``offsets`` (N + 1), ``labels`` (N) and ``classes``: image
    i is the file ``bytes[offsets[i]:offsets[i + 1]]``. All have the same size.

    Args:
        path: of the archive.
        limit: how many images to decode, from the first; default all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such an archive.
        ImportError: Pillow is not installed.
    """
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading JPEG images needs Pillow: pip install pillow") from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image archive {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        data, offsets, labels, classes = (
            archive[key] for key in ("bytes", "offsets", "labels", "classes")
        )
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not an image archive with bytes, offsets, labels and classes: {error}"
        ) from error
    count = len(labels) if limit is None else min(limit, len(labels))
    images = [
        np.asarray(Image.open(io.BytesIO(data[begin:end])).convert("RGB"))
        for begin, end in itertools.pairwise(offsets[: count + 1])
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    targets = torch.from_numpy(labels[:count].astype(np.int64))
    return Images(pixels, targets, tuple(map(str, classes)))


def batches(
    data: Dataset, index: Sequence[Sequence[int]], workers: int, device: torch.device
) -> DataLoader:
    """Loads the batches of these indices, in this order, for a model on the device."""
    common: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if isinstance(data, Images):  # takes a list of indices: no collating of single samples
        return DataLoader(data, sampler=index, batch_size=None, **common)
    return DataLoader(data, batch_sampler=index, **common)
