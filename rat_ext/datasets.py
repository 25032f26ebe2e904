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
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset


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


class _Part(Dataset):
    """A part of a mixture of data sets, with int targets: -1 for all of an outlier part."""

    def __init__(self, data: Dataset, outliers: bool) -> None:
        self.data, self.outliers = data, outliers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, target = self.data[index]
        return x, -1 if self.outliers else int(target)


def with_outliers(data: Dataset, outliers: Dataset) -> Dataset:
    """The data set followed by images of another one, which count as errors (target -1).

    Raises:
        ValueError: their images have different shapes.
    """
    shapes = [tuple(each[0][0].shape) for each in (data, outliers)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the outliers have shape {shapes[1]}, the images {shapes[0]}; they must be equal"
        )
    if isinstance(data, Images) and isinstance(outliers, Images):
        pixels = torch.cat([data[:][0], outliers[:][0]])
        targets = torch.cat([data.targets, torch.full_like(outliers.targets, -1)])
        return Images(pixels, targets, data.classes)
    mixture = ConcatDataset([_Part(data, False), _Part(outliers, True)])
    mixture.classes = data.classes
    return mixture


def first(data: Dataset, count: int, skip: int = 0) -> Dataset:
    """The first images of a data set, after some to leave out."""
    if isinstance(data, Images):
        return data.subset(slice(skip, skip + count))
    part = Subset(data, range(skip, min(skip + count, len(data))))
    part.classes = data.classes
    return part


NAMES = (
    "digits",
    "cifar10",
    "cifar100",
    "svhn",
    "imagenet",
    "cifar10-c:CORRUPTION:SEVERITY",
    "cifar100-c:CORRUPTION:SEVERITY",
    "imagenet-c:CORRUPTION:SEVERITY",
    "folder:PATH",
    "npz:PATH",
)


def load(
    name: str, split: str, root: str | Path = "data", *, seed: int = 0, download: bool = False
) -> Dataset:
    """A data set by name, with pixels in [0, 1] and the names of its ``classes``.

        digits                          `digits`; split "test" has all the images not trained on
        cifar10, cifar100, svhn         read by torchvision from ``root``
        imagenet                        ``root``/train or ``root``/val, a folder for each class;
                                        256 pixels, the middle 224 (to train: a random part)
        cifar10-c:fog:3, cifar100-c:..  ``root``/CIFAR-10-C/fog.npy and labels.npy, severity 1 to 5
        imagenet-c:fog:3                ``root``/ImageNet-C/fog/3, a folder for each class
        folder:PATH                     PATH/train, PATH/test or PATH/val, a folder for each class
        npz:PATH                        `jpeg_archive`; "{split}" in PATH is replaced

    Args:
        name: one of the above.
        split: "train" or "test".
        root: the folder of data sets.
        seed: of the split of the digits.
        download: let torchvision download cifar10, cifar100 and svhn.

    Raises:
        ValueError: there is no such data set, or it has no such part.
        FileNotFoundError: it is not there; says where to put it, and what was found.
        ImportError: a library that reads it is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    kind, _, detail = name.partition(":")
    root = Path(root)
    if kind == "digits" and not detail:
        parts = digits(seed=seed)
        if split == "train":
            return parts.train
        pixels = torch.cat([parts.validation.pixels, parts.test.pixels])
        targets = torch.cat([parts.validation.targets, parts.test.targets])
        return Images(pixels, targets, parts.train.classes)
    if kind in _TORCHVISION and not detail:
        return _torchvision(kind, split, root, download)
    if kind in ("cifar10-c", "cifar100-c", "imagenet-c") and detail:
        corruption, _, severity = detail.partition(":")
        if split == "train":
            raise ValueError(f"{kind} is for testing; it has no images to train on")
        if severity not in ("1", "2", "3", "4", "5"):
            raise ValueError(f"the severity of {name} must be from 1 to 5: {kind}:{corruption}:3")
        if kind == "imagenet-c":
            return _folder([root / "ImageNet-C" / corruption / severity], crop=False)
        return _corrupted_cifar(kind, root, corruption, int(severity))
    if kind == "imagenet" and not detail:
        return _folder([root / "train"] if split == "train" else [root / "val"], split == "train")
    if kind == "folder" and detail:
        parts = ["train"] if split == "train" else ["test", "val"]
        return _folder([Path(detail) / part for part in parts], split == "train")
    if kind == "npz" and detail:
        return jpeg_archive(detail.replace("{split}", split))
    raise ValueError(f"no data set is named {name!r}; there are {', '.join(NAMES)}")


_TORCHVISION = {
    "cifar10": ("CIFAR10", "the folder cifar-10-batches-py of cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "the folder cifar-100-python of cifar-100-python.tar.gz"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}


def _torchvision(kind: str, split: str, root: Path, download: bool) -> Images:
    torchvision = _import_torchvision()
    name, files = _TORCHVISION[kind]
    which = {"split": split} if kind == "svhn" else {"train": split == "train"}
    try:
        data = getattr(torchvision.datasets, name)(root, download=download, **which)
    except RuntimeError as error:  # "Dataset not found or corrupted."
        raise FileNotFoundError(
            f"{name} is not in {root}, or damaged: put {files} there, or allow the download; "
            f"{_contents(root)}"
        ) from error
    pixels = torch.as_tensor(data.data)
    if kind == "svhn":
        return Images(pixels, torch.as_tensor(data.labels).long(), tuple("0123456789"))
    return Images(
        pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), tuple(data.classes)
    )


def _corrupted_cifar(kind: str, root: Path, corruption: str, severity: int) -> Images:
    import numpy as np

    folder = root / {"cifar10-c": "CIFAR-10-C", "cifar100-c": "CIFAR-100-C"}[kind]
    paths = [folder / f"{corruption}.npy", folder / "labels.npy"]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; {_contents(folder)}")
    pixels, labels = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    if pixels.ndim != 4 or len(pixels) != len(labels) or len(labels) % 5:
        raise ValueError(
            f"{paths[0]} has shape {pixels.shape} and {paths[1]} {labels.shape}; expected "
            "(5 N, height, width, 3) images, N for each severity, and (5 N,) labels"
        )
    count = len(labels) // 5
    part = slice((severity - 1) * count, severity * count)
    targets = torch.from_numpy(labels[part].astype(np.int64))
    classes = tuple(map(str, range(10 if kind == "cifar10-c" else 100)))
    return Images(torch.from_numpy(pixels[part].transpose(0, 3, 1, 2).copy()), targets, classes)


def _folder(candidates: Sequence[Path], train: bool = False, crop: bool = True) -> Dataset:
    path = next((path for path in candidates if path.is_dir()), None)
    if path is None:
        where = " or ".join(map(str, candidates))
        raise FileNotFoundError(
            f"there is no folder {where}, with a folder of images for each class; "
            f"{_contents(candidates[0].parent)}"
        )
    transforms = _import_torchvision().transforms
    if train:
        steps = [transforms.RandomResizedCrop(224)]
    else:
        steps = [transforms.Resize(256), transforms.CenterCrop(224)] if crop else []
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(path, transforms.Compose([*steps, transforms.ToTensor()]))
    except FileNotFoundError as error:  # no class, or a class without an image
        raise FileNotFoundError(
            f"{path} has no folder of images for each class ({error}); {_contents(path)}"
        ) from error


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(path.name for path in folder.iterdir())
    more = ", ..." if len(names) > 5 else ""
    return f"found in {folder}: {', '.join(names[:5]) or 'nothing'}{more}"


def _import_torchvision() -> Any:
    try:
        import torchvision
    except ImportError as error:
        raise ImportError("this data set needs torchvision: pip install torchvision") from error
    return torchvision


def batches(
    data: Dataset,
    index: Sequence[Sequence[int]],
    workers: int,
    device: torch.device,
    seed: int = 0,
) -> DataLoader:
    """Loads the batches of these indices, in this order, for a model on the device.

    The seed is that of the transforms which the workers may apply; the global random state is not
    used.
    """
    common: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator().manual_seed(seed),
    }
    if isinstance(data, Images):  # takes a list of indices: no collating of single samples
        return DataLoader(data, sampler=index, batch_size=None, **common)
    return DataLoader(data, batch_sampler=index, **common)
