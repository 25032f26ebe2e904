"""Data sets by name: the registry of their loaders, and `load`, which looks there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .images import Labelled


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
    name: str, split: str, root: str | Path = "data", *, seed: int = 0, download: bool = False
) -> Labelled:
    """A data set by name, with pixels in [0, 1] and the names of its ``classes``.

        digits                          `digits`; split "test" has all the images not trained on
        cifar10, cifar100, svhn         read by torchvision from ``root``
        imagenet                        ``root``/train or ``root``/val, a folder for each class;
                                        256 pixels, the middle 224 (to train: a random part)
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
            return loader(Request(kind, detail, split == "train", Path(root), seed, download))
    raise ValueError(f"no data set is named {name!r}; there are {', '.join(forms())}")
