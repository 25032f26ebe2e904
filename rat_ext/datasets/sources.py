"""The data sets that `load` knows, each with its loader."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from .._common.extras import install
from .by_name import Request, known_as
from .images import Images, Labelled, shuffled
from .preprocessing import IMAGENET, require_torchvision


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
        raise ImportError(f"the digits need scikit-learn: {install('demo')}") from error
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
    return Splits(*(everything.subset(index) for index in torch.split(order, sizes)))


@known_as("digits")
def _digits(request: Request) -> Images:
    parts = digits(seed=request.seed)
    if request.train:
        return parts.train
    pixels = torch.cat([parts.validation.pixels, parts.test.pixels])
    targets = torch.cat([parts.validation.targets, parts.test.targets])
    return Images(pixels, targets, parts.train.classes)


_ARCHIVES = {
    "cifar10": ("CIFAR10", "the folder cifar-10-batches-py of cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "the folder cifar-100-python of cifar-100-python.tar.gz"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}
"""By kind: torchvision's class, and the files that it reads."""


@known_as(*_ARCHIVES)
def _torchvision(request: Request) -> Images:
    name, files = _ARCHIVES[request.kind]
    which: dict[str, Any] = {"train": request.train}
    if request.kind == "svhn":
        which = {"split": "train" if request.train else "test"}
    read = getattr(require_torchvision("this data set").datasets, name)
    try:
        data = read(request.root, download=request.download, **which)
    except RuntimeError as error:  # "Dataset not found or corrupted."
        raise FileNotFoundError(
            f"{name} is not in {request.root}, or damaged: put {files} there, or allow the "
            f"download; {_contents(request.root)}"
        ) from error
    pixels = torch.as_tensor(data.data)
    if request.kind == "svhn":
        return Images(pixels, torch.as_tensor(data.labels).long(), tuple("0123456789"))
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(data.targets), tuple(data.classes))


@known_as("imagenet")
def _imagenet(request: Request) -> Labelled:
    return _folder(request, request.root / ("train" if request.train else "val"))


@known_as("cifar10-c:CORRUPTION:SEVERITY", "cifar100-c:CORRUPTION:SEVERITY")
def _corrupted_cifar(request: Request) -> Images:
    corruption, severity = _corruption(request)
    number = request.kind.removeprefix("cifar").removesuffix("-c")
    folder = request.root / f"CIFAR-{number}-C"
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
    images = torch.from_numpy(pixels[part].transpose(0, 3, 1, 2).copy())
    return Images(images, targets, tuple(map(str, range(int(number)))))


@known_as("imagenet-c:CORRUPTION:SEVERITY")
def _corrupted_imagenet(request: Request) -> Labelled:
    corruption, severity = _corruption(request)
    return _folder(request, request.root / "ImageNet-C" / corruption / str(severity))


@known_as("folder:PATH")
def _own_folder(request: Request) -> Labelled:
    parts = ["train"] if request.train else ["test", "val"]
    return _folder(request, *(Path(request.detail) / part for part in parts))


def jpeg_archive(path: str | Path, limit: int | None = None) -> Images:
    """Images kept as JPEG files in one .npz archive, in its order.

    It has the arrays ``bytes`` (uint8), ``offsets`` (N + 1), ``labels`` (N, class indices) and
    ``classes`` (their names): image i is the file ``bytes[offsets[i]:offsets[i + 1]]``. All images
    have the same size, and are read as RGB.

    Args:
        path: of the archive.
        limit: how many images to decode, from the first; default all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such an archive.
        ImportError: Pillow is not installed.
    """
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


def array_archive(path: str | Path) -> Images:
    """Images kept as plain arrays in one .npz archive, in its order.

    It has the images as ``x``, ``images`` or ``data``, their class indices (N,) as ``y``,
    ``labels`` or ``targets``, and, if it likes, the names of the classes as ``classes``. Images are
    uint8 from 0 to 255 or floating-point numbers from 0 to 1, of shape (N, H, W), (N, H, W, C) or
    (N, C, H, W). The axis of the channels is the one of size 1, 3 or 4.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such an archive; says what is wrong.
    """
    path = Path(path)
    arrays = _arrays(path)
    images, labels = (
        next((arrays[name] for name in names if name in arrays), None)
        for names in (("x", "images", "data"), ("y", "labels", "targets"))
    )
    if images is None or labels is None:
        raise ValueError(
            f"{path} has the arrays {', '.join(arrays) or 'none'}; expected x and y (images and "
            "labels), or JPEG files in bytes, offsets, labels and classes"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(
            f"the labels in {path} are {labels.dtype} of shape {labels.shape}, the images of shape "
            f"{images.shape}; expected one class index for each image"
        )
    names = arrays.get("classes", np.arange(int(labels.max()) + 1))
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"the labels in {path} are from {labels.min()} to {labels.max()}; expected indices of "
            f"{len(names)} classes, counted from 0"
        )
    pixels = torch.from_numpy(_channels_first(path, images))
    if images.dtype != np.uint8:
        pixels = pixels.float()
        if not (images.dtype.kind == "f" and ((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(
                f"the images in {path} are {images.dtype} from {images.min()} to {images.max()}; "
                "expected uint8 from 0 to 255, or floating-point numbers from 0 to 1"
            )
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)), tuple(map(str, names)))


def _arrays(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no image archive {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        return {name: archive[name] for name in archive.files}
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not an .npz archive of arrays: {error}") from error


def _channels_first(path: Path, images: Any) -> Any:
    """The images as (N, C, H, W)."""
    if images.ndim == 3:
        return images[:, None]
    axes = [axis for axis in (1, 3) if images.ndim == 4 and images.shape[axis] in (1, 3, 4)]
    if len(axes) != 1:
        raise ValueError(
            f"the images in {path} have shape {images.shape}; expected (N, H, W), (N, H, W, C) or "
            "(N, C, H, W) with 1, 3 or 4 channels on just one of these axes"
        )
    return np.ascontiguousarray(np.moveaxis(images, axes[0], 1))


HELD_OUT_SHARE = 0.2
"""The share of an archive without "{split}" in its name that is its test images."""


@known_as("npz:PATH")
def _own_archive(request: Request) -> Images:
    path = Path(request.detail.replace("{split}", "train" if request.train else "test"))
    images = jpeg_archive(path) if "bytes" in _names(path) else array_archive(path)
    if "{split}" in request.detail:
        return images
    order = shuffled(images, request.seed)
    held_out = max(1, round(HELD_OUT_SHARE * len(images)))
    return images.subset((order[held_out:] if request.train else order[:held_out]).sort().values)


def _names(path: Path) -> list[str]:
    """The names of the arrays of an archive; none for what is no archive."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except (AttributeError, TypeError, ValueError, OSError):
        return []


def _corruption(request: Request) -> tuple[str, int]:
    """Which corruption, and how severe it is."""
    corruption, _, severity = request.detail.partition(":")
    if request.train:
        raise ValueError(f"{request.kind} is for testing; it has no images to train on")
    if severity not in ("1", "2", "3", "4", "5"):
        raise ValueError(
            f"the severity of {request.kind}:{request.detail} must be from 1 to 5: "
            f"{request.kind}:{corruption}:3"
        )
    return corruption, int(severity)


def _folder(request: Request, *candidates: Path) -> Labelled:
    """The first folder that is there, of a folder of images for each class."""
    path = next((path for path in candidates if path.is_dir()), None)
    if path is None:
        where = " or ".join(map(str, candidates))
        raise FileNotFoundError(
            f"there is no folder {where}, with a folder of images for each class; "
            f"{_contents(candidates[0].parent)}"
        )
    folder = require_torchvision("this data set").datasets.ImageFolder
    preprocessing = request.preprocessing or IMAGENET
    transform = preprocessing.random_crop if request.train else preprocessing
    try:
        data = folder(path, transform, loader=_opened)
    except FileNotFoundError as error:  # no class, or a class without an image
        raise FileNotFoundError(
            f"{path} has no folder of images for each class ({error}); {_contents(path)}"
        ) from error
    data.preprocessing = preprocessing
    return cast(Labelled, data)


def _opened(path: str) -> Any:
    """An image of Pillow in its own mode; torchvision's loader would cut 16 bits off at 255."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
    return image


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(path.name for path in folder.iterdir())
    more = ", ..." if len(names) > 5 else ""
    return f"found in {folder}: {', '.join(names[:5]) or 'nothing'}{more}"
