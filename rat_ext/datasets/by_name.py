"""Data sets by name: the registry of their loaders, and `load`, which looks there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .images import Images, Labelled
from .preprocessing import Preprocessing, require_torchvision


@dataclass(frozen=True)
class Request:
    """What `load` was asked for."""

    kind: str
    """The name up to its colon."""
    detail: str
    """What follows the colon."""
    train: bool
    root: Path
    seed: int
    download: bool
    preprocessing: Preprocessing | None = None
    """For loaders that read files one by one; `Images` are brought to a size by `load`."""


Loader = Callable[[Request], Labelled]
_loaders: dict[str, Loader] = {}


def known_as(*forms: str) -> Callable[[Loader], Loader]:
    """Registers a loader under forms of names, such as "svhn" or "folder:PATH"."""

    def register(loader: Loader) -> Loader:
        _loaders.update(dict.fromkeys(forms, loader))
        return loader

    return register


def forms() -> tuple[str, ...]:
    """The forms of the names that `load` knows."""
    return tuple(_loaders)


def load(
    name: str,
    split: str,
    root: str | Path = "data",
    *,
    seed: int = 0,
    download: bool = False,
    preprocessing: Preprocessing | None = None,
) -> Labelled:
    """A data set by name, with pixels in [0, 1] and the names of its ``classes``.

        digits                          `digits`; split "test" has all the images not trained on
        cifar10, cifar100, svhn         read by torchvision from ``root``
        imagenet                        ``root``/train or ``root``/val, a folder for each class
        cifar10-c:fog:3, cifar100-c:..  ``root``/CIFAR-10-C/fog.npy and labels.npy, severity 1 to 5
        imagenet-c:fog:3                ``root``/ImageNet-C/fog/3, a folder for each class
        folder:PATH                     PATH/train, PATH/test or PATH/val, a folder for each class
        npz:PATH                        one file: `array_archive` or `jpeg_archive`. "{split}" in
                                        PATH becomes "train" or "test". Without it, a fifth of the
                                        images, with its share of each class, is for testing

    Args:
        name: one of the above.
        split: "train" or "test".
        root: the folder of data sets.
        seed: of the split of the digits, and of an archive.
        download: let torchvision download cifar10, cifar100 and svhn.
        preprocessing: what the images go through as they are taken out, such as that of a model
            (`models.preprocessing`). Of folders, split "train" gives random parts of the images
            (`Preprocessing.random_crop`). Default: images of folders as for ImageNet (resized to
            256 pixels, of which the middle 224 are kept), others in the size that they have.

    Raises:
        ValueError: there is no such data set, or it has no such part.
        FileNotFoundError: it is not there; says where to put it, and what was found.
        ImportError: a library that reads it is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    kind, _, detail = name.partition(":")
    for form, loader in _loaders.items():
        known, colon, _ = form.partition(":")
        if known == kind and bool(colon) == bool(detail):
            train = split == "train"
            request = Request(kind, detail, train, Path(root), seed, download, preprocessing)
            return _brought_to(preprocessing, loader(request))
    raise ValueError(f"no data set is named {name!r}; there are {', '.join(forms())}")


def _brought_to(preprocessing: Preprocessing | None, data: Labelled) -> Labelled:
    """Images in memory through the preprocessing, where that would change them."""
    if preprocessing is None or not isinstance(data, Images):
        return data
    if tuple(data.pixels.shape[1:]) == preprocessing.size:
        return data
    if data.pixels.shape[2:] != preprocessing.size[1:]:
        require_torchvision()  # rather than at the first image
    return replace(data, preprocessing=preprocessing)
