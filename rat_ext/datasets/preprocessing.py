"""From an image of any size to the pixels that a model takes: the same for every command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

INTERPOLATIONS = ("bilinear", "bicubic")

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name of images with so many channels."""
_LUMA = (19595, 38470, 7471)
"""Weights of red, green and blue in grey, times 2^16 (ITU-R 601-2), as Pillow has them."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model: an object to call.

    The image is resized, with antialiasing, until it covers `size` / `crop`; for a square, that is
    its shorter side. Of that the middle, of `size`, is kept. An image that is as high and wide as
    `size` already is taken as it is, whatever `crop` says, so that 32-pixel images for a 32-pixel
    model are not blurred. Grey becomes RGB with three equal channels, RGB becomes grey as in Pillow
    (ITU-R 601-2 luma), and alpha is dropped. Pillow's images become tensors before they are
    resized, so that the pixels of a file and of an image in memory are the same.

    Raises:
        ValueError: a value is out of its range.
    """

    size: tuple[int, int, int]
    """(C, H, W) of the model's input."""
    crop: float = 1.0
    """The share of the resized image's height (and width, if it is a square) that is kept, as
    ``crop_pct`` in timm; 1 keeps as much as fits in."""
    interpolation: str = "bilinear"
    """"bilinear" or "bicubic"."""

    def __post_init__(self) -> None:
        if len(self.size) != 3 or not all(type(n) is int and n > 0 for n in self.size):
            raise ValueError(
                f"size is {self.size}; expected channels, height and width, such as (3, 224, 224)"
            )
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; it must be above 0, and at most 1")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}; expected {' or '.join(INTERPOLATIONS)}"
            )

    def __call__(self, image: Any) -> Tensor:
        """The pixels for evaluation.

        Args:
            image: of Pillow, or (..., C, H, W) pixels of images of one size, uint8 in 0..255 or
                floating-point numbers in [0, 1].

        Returns:
            (..., C, H, W) pixels in [0, 1], C, H and W being those of `size`: float32, but of
            floating-point numbers their own type.

        Raises:
            ValueError: it has channels that cannot be converted.
            ImportError: it must be resized, and torchvision is not installed.
        """
        x = self._tensor(image)
        if x.shape[-2:] != self.size[1:]:
            transforms = require_torchvision().transforms.v2.functional
            size = self.resized(int(x.shape[-2]), int(x.shape[-1]))
            x = transforms.resize(x, size, self._mode, antialias=True)
            x = transforms.center_crop(x, self.size[1:])
        return self._finished(x)

    def random_crop(self, image: Any) -> Tensor:
        """Pixels to train on: those of a random part of the image, resized.

        As in Szegedy et al., CVPR 2015: a part of 8 to 100 % of its area, drawn from torch's global
        generator. An image of the model's height and width is taken as it is here, too.

        Args:
            image: as for a call.

        Returns:
            As a call does.

        Raises:
            ValueError: it has channels that cannot be converted.
            ImportError: torchvision is not installed.
        """
        x = self._tensor(image)
        if x.shape[-2:] != self.size[1:]:
            crop = require_torchvision().transforms.v2.RandomResizedCrop
            x = crop(self.size[1:], interpolation=self._mode, antialias=True)(x)
        return self._finished(x)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image has before the middle is taken, unless it fits as it is.

        Rounded as by timm and torchvision.
        """
        # The sum is for a crop that is itself rounded: 224 / (224 / 232) may be below 232.
        least_height, least_width = (int(side / self.crop + 1e-6) for side in self.size[1:])
        if least_height * width >= least_width * height:
            return least_height, least_height * width // height
        return least_width * height // width, least_width

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {**asdict(self), "size": list(self.size)}

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """What `to_dict` has made.

        Raises:
            ValueError: it is none.
        """
        names = {field.name for field in fields(cls)}
        try:
            if not isinstance(values, Mapping) or values.keys() != names:
                raise ValueError(f"expected {', '.join(sorted(names))}")
            return cls(tuple(values["size"]), float(values["crop"]), values["interpolation"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{values} is no preprocessing: {error}") from error

    @property
    def _mode(self) -> Any:
        return require_torchvision().transforms.InterpolationMode(self.interpolation)

    def _tensor(self, image: Any) -> Tensor:
        if isinstance(image, Tensor):
            return image
        return pixels_of(image, alpha=self.size[0] == 4)

    def _finished(self, x: Tensor) -> Tensor:
        """With the model's channels, as floating-point numbers."""
        x = _with_channels(x, self.size[0]).contiguous()
        if not x.is_floating_point():
            return x.float().div_(255)
        return x.clamp(0, 1)  # bicubic interpolation may leave the interval


IMAGENET = Preprocessing((3, 224, 224), 224 / 256)
"""The usual one for ImageNet, and that of folders where no other is asked for."""


def pixels_of(image: Any, alpha: bool = False) -> Tensor:
    """(C, H, W) uint8 pixels of an image of Pillow, grey if it is, else RGB; with alpha: RGBA.

    Raises:
        ValueError: it has more than 8 bits a channel.
    """
    if image.mode[0] in "IF":
        name = getattr(image, "filename", "") or "the image"
        raise ValueError(f"{name} has more than 8 bits a channel (mode {image.mode}); convert it")
    grey = image.mode in ("1", "L", "LA", "La")
    mode = _MODES[4 if alpha else 1 if grey else 3]
    pixels = np.array(image if image.mode == mode else image.convert(mode))  # which would copy it
    return torch.from_numpy(pixels).view(image.height, image.width, -1).permute(2, 0, 1)


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """(..., C, H, W) images with another number of channels."""
    given = x.shape[-3]
    if given == channels:
        return x
    if not {given, channels} <= _MODES.keys():
        raise ValueError(f"images of {given} channels cannot be made ones of {channels}")
    colour = x[..., :3, :, :]
    if channels == 1:
        return _grey(colour)
    colour = colour.expand(*x.shape[:-3], 3, *x.shape[-2:])
    if channels == 3:
        return colour
    opaque = torch.full_like(colour[..., :1, :, :], 1 if x.is_floating_point() else 255)
    return torch.cat([colour, opaque], -3)


def _grey(colour: Tensor) -> Tensor:
    total = (colour * torch.tensor(_LUMA, device=colour.device).view(3, 1, 1)).sum(-3, True)
    return total / 2**16 if colour.is_floating_point() else ((total + 2**15) >> 16).byte()


def require_torchvision(what: str = "resizing images") -> Any:
    """torchvision.

    Raises:
        ImportError: it is not installed; says what to do.
    """
    try:
        import torchvision.transforms.v2
    except ImportError as error:
        raise ImportError(f"{what} needs torchvision: pip install torchvision") from error
    return torchvision
