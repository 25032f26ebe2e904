"""Labelled images: what a data set is here, and parts, mixtures and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from .preprocessing import Preprocessing


class Labelled(Protocol):
    """A data set of (pixels, class) pairs with pixels in [0, 1], such as those of torchvision."""

    @property
    def classes(self) -> Sequence[str]:
        """The name of each class."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, Tensor]]):
    """A data set in memory. An index, a list of them or a slice gives (float32 pixels, targets)."""

    pixels: Tensor
    """(N, C, H, W), float32 in [0, 1] or uint8 in 0..255."""
    targets: Tensor
    """(N,) int64 class indices."""
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None = None
    """What images go through when they are taken out; none: they are as they are in `pixels`."""

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        x = self.pixels[index]
        if self.preprocessing is not None:
            return self.preprocessing(x), self.targets[index]
        return x if x.is_floating_point() else x.float() / 255, self.targets[index]

    def subset(self, index: slice | Sequence[int] | Tensor) -> Images:
        """Some of the images, not copied for a slice."""
        return replace(self, pixels=self.pixels[index], targets=self.targets[index])


class _Part(Dataset[tuple[Tensor, int]]):
    """A part of a mixture of data sets, with int targets: -1 for all of an outlier part."""

    def __init__(self, data: Labelled, outliers: bool) -> None:
        self.data, self.outliers = data, outliers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, target = self.data[index]
        return x, -1 if self.outliers else int(target)


def with_outliers(data: Labelled, outliers: Labelled) -> Labelled:
    """The data set followed by images of another one, which count as errors (target -1).

    Raises:
        ValueError: their images have different shapes.
    """
    shapes = [tuple(each[0][0].shape) for each in (data, outliers)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the outliers have shape {shapes[1]}, the images {shapes[0]}; they must be equal"
        )
    if (
        isinstance(data, Images)
        and isinstance(outliers, Images)
        and data.preprocessing is outliers.preprocessing is None
    ):
        pixels = torch.cat([data[:][0], outliers[:][0]])
        targets = torch.cat([data.targets, torch.full_like(outliers.targets, -1)])
        return Images(pixels, targets, data.classes)
    return _like(data, ConcatDataset([_Part(data, False), _Part(outliers, True)]))


def subset(data: Labelled, index: Sequence[int]) -> Labelled:
    """The images of a data set at some indices."""
    if isinstance(data, Images):
        return data.subset(index)
    return _like(data, Subset(cast(Dataset[Any], data), index))


def first(data: Labelled, count: int, skip: int = 0) -> Labelled:
    """The first images of a data set, after some to leave out.

    Of data that are sorted by class these are images of the first classes: see `shuffled`.
    """
    if isinstance(data, Images):
        return data.subset(slice(skip, skip + count))
    return subset(data, range(skip, min(skip + count, len(data))))


def shuffled(data: Labelled, seed: int = 0) -> Tensor:
    """The indices of a data set in a random order, any stretch of which has its share of a class.

    To cut a data set into parts that are like each other: the first of these indices, the next, and
    so on. The shares are kept where the data set has ``targets``, as `Images` and torchvision's
    have; else the order is random and no more.
    """
    total = len(data)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    targets = torch.as_tensor(getattr(data, "targets", ()))
    if targets.shape != (total,):
        return order
    _, of_class, sizes = targets[order].unique(return_inverse=True, return_counts=True)
    # The k-th of n images of a class goes to a random place in the k-th n-th of the new order.
    grouped = of_class.argsort(stable=True)
    rank = torch.empty(total, dtype=torch.float64)
    rank[grouped] = torch.cat([torch.arange(size).double() for size in sizes.tolist()])
    place = rank + torch.rand(total, dtype=torch.float64, generator=generator)
    return order[(place / sizes[of_class]).argsort()]


def preprocessing_of(data: Labelled) -> Preprocessing | None:
    """What brings an image into the form in which a data set gives them; None: it does not say.

    Those of `load` and all `Images` do.
    """
    known: Preprocessing | None = getattr(data, "preprocessing", None)
    if known is None and isinstance(data, Images) and data.pixels.ndim == 4:
        channels, height, width = data.pixels.shape[1:]
        return Preprocessing((channels, height, width))
    return known


def _like(data: Labelled, made: Any) -> Labelled:
    """A data set of torch's made from another, whose classes and preprocessing it has."""
    made.classes, made.preprocessing = data.classes, preprocessing_of(data)
    return cast(Labelled, made)


def batches(
    data: Labelled,
    index: Sequence[Sequence[int]],
    workers: int,
    device: torch.device,
    seed: int = 0,
) -> DataLoader[Any]:
    """Loads the batches of these indices, in this order, for a model on the device.

    The seed is that of the transforms which the workers may apply; the global random state is not
    used.
    """
    there = isinstance(data, Images) and data.pixels.is_cuda
    common: dict[str, Any] = {
        "num_workers": workers,
        # What is on the device already needs no way there.
        "pin_memory": device.type == "cuda" and not there,
        "generator": torch.Generator().manual_seed(seed),
    }
    dataset = cast(Dataset[Any], data)
    if isinstance(data, Images):  # takes a list of indices: no collating of single samples
        return DataLoader(dataset, sampler=index, batch_size=None, **common)
    return DataLoader(dataset, batch_sampler=[list(batch) for batch in index], **common)
