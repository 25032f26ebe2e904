"""From the bytes that a client sent to a tensor that the model takes."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..datasets import Preprocessing
from ..datasets.preprocessing import pixels_of, require_torchvision

_FORMATS = ("PNG", "JPEG", "WEBP")
_CHANNELS = (1, 3, 4)
"""That an image can have: grey, RGB, RGBA."""
_NPY = b"\x93NUMPY"
_IN_JSON_NUMBERS = b"0123456789+-.eE,[] \t\r\n"
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class InputError(ValueError):
    """What a client sent cannot be used; `status` is the HTTP status that tells it."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status

    def alone(self) -> InputError:
        """The same without its traceback, whose frames hold what was decoded: asyncio ties errors
        into cycles, which are freed much later."""
        return InputError(str(self), self.status)


@dataclass(frozen=True)
class Decoder:
    """Makes one input of a model from a file: an image, a .npy array or nested lists in JSON.

    The kind of the file is told by its first bytes, not by what the client says that it is. The
    pixels of an image are those that data sets with the same `preprocessing` give to evaluation.

    Raises:
        ValueError: the preprocessing is for another shape.
        ImportError: images are to be resized, and torchvision is not installed.
    """

    shape: tuple[int, ...]
    """Of an input, without the batch dimension: (C, H, W) for images."""
    dtype: torch.dtype = torch.float32
    bounds: tuple[float, float] = (0.0, 1.0)
    """Of the model's inputs. The darkest pixel of an image becomes the lower one."""
    resize: bool = False
    """Bring an image of another size to that of the model, instead of refusing it."""
    max_pixels: int = 2**24
    """Of an image as it is sent, and of what it is resized to before its middle is taken."""
    preprocessing: Preprocessing | None = None
    """Of images; default: as much of the middle as fits in, resized by bilinear interpolation."""

    def __post_init__(self) -> None:
        if self.preprocessing is not None and self.preprocessing.size != self.shape:
            raise ValueError(
                f"the preprocessing is for images of shape {self.preprocessing.size}, the model "
                f"takes {self.shape}"
            )
        if self.resize:
            require_torchvision()

    def __call__(self, data: bytes | NDArray[Any]) -> Tensor:
        """The input, of `shape` and `dtype`.

        Args:
            data: a file, or one of the `rows`.

        Raises:
            InputError: it is none; says why.
        """
        if isinstance(data, np.ndarray):
            return self._checked(data)
        if not data:
            raise InputError("the body is empty; send an image, a .npy array or a JSON list", 400)
        if data.startswith(_NPY):
            return self._checked(self._npy(data))
        if data[:64].lstrip().startswith(b"["):
            return self._checked(self._json(data))
        return self._image(data)

    def rows(self, data: bytes, most: int) -> list[NDArray[Any] | InputError]:
        """The inputs in one file: a .npy array (N, ...), or a JSON list of N of them.

        They are not checked yet: each may still be none that the model takes. A row of JSON that is
        no array is the error that says so.

        Raises:
            InputError: it is no such file, or has more than `most` inputs.
        """
        if data.startswith(_NPY):
            return list(self._npy(data, most))
        if data[:64].lstrip().startswith(b"["):
            return self._json_rows(data, most)
        raise InputError(
            "this is no .npy array and no JSON list of inputs; send images in a form "
            "(multipart/form-data) with a file for each",
            415 if data else 400,
        )

    def _npy(self, data: bytes, most: int | None = None) -> NDArray[Any]:
        """The array in a file: an input, or at most so many."""
        file = io.BytesIO(data)
        try:
            read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
            shape, columns_first, dtype = read_header(file)
        except Exception as error:  # a header is Python code, whose parser raises many kinds
            raise InputError(f"this is no .npy file that numpy.load reads: {error}") from error
        # Before memory is allocated for what the header claims.
        if most is None:
            self._check_array(shape, dtype)
        else:
            _check_kind(dtype)
            if (
                len(shape) != len(self.shape) + 1
                or shape[1:] != self.shape
                or bool in map(type, shape)
            ):
                raise InputError(
                    f"the array has shape {shape}; expected (N, {str(self.shape)[1:-1]}), an input "
                    "of the model in each row"
                )
            _check_count(shape[0], most)
        try:
            array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        except ValueError as error:
            raise InputError(f"the .npy file is damaged: {error}") from error
        return array.reshape(shape, order="F" if columns_first else "C")

    def _check_array(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        _check_kind(dtype)
        if shape != self.shape or bool in map(type, shape):  # True == 1
            raise InputError(f"the tensor has shape {shape}; the model takes one {self.shape}")

    def _checked(self, array: NDArray[Any]) -> Tensor:
        self._check_array(array.shape, array.dtype)
        with np.errstate(invalid="ignore"):  # a signalling nan is refused below like any other
            values = array.astype(np.float64, order="C")
        x = torch.from_numpy(values).to(self.dtype)
        if not x.isfinite().all():
            name = str(self.dtype).removeprefix("torch.")
            raise InputError(f"the tensor has values that are not finite in {name}")
        low, high = self.bounds
        if (x < low).any() or (x > high).any():
            raise InputError(
                f"the tensor has values from {x.min().item():.4g} to {x.max().item():.4g}, outside "
                f"the model's bounds ({low:g}, {high:g}). Send it as it is before any "
                "normalisation, which the model does itself; divide 8-bit pixels by 255"
            )
        return x

    def _json(self, data: bytes) -> NDArray[np.float64]:
        return _array(self._parsed(data, inputs=1))

    def _json_rows(self, data: bytes, most: int) -> list[NDArray[Any] | InputError]:
        rows: list[NDArray[Any] | InputError] = []
        parsed = self._parsed(data, inputs=most, around=1)
        _check_count(len(parsed), most)
        for row in parsed:
            try:
                rows.append(_array(row))
            except InputError as error:
                rows.append(error.alone())
        return rows

    def _parsed(self, data: bytes, inputs: int, around: int = 0) -> Any:
        """The lists in a JSON text of so many inputs, with so many lists around them all."""
        # Before it is parsed: a list of numbers takes up to 16 times the memory of its text, and
        # one of strings more than there is. No more than the inputs have is let through.
        if other := data.translate(None, _IN_JSON_NUMBERS):
            raise InputError(f"the JSON list holds {other[:1]!r}; expected numbers, and no words")
        numbers, lists = data.count(b",") + 1, data.count(b"[")
        most = inputs * math.prod(self.shape)
        of_an_input = 1 + sum(math.prod(self.shape[:i]) for i in range(1, len(self.shape)))
        most_lists = around + inputs * of_an_input
        if numbers > most or lists > most_lists:
            what = "an input" if inputs == 1 else f"at most {inputs} inputs"
            raise InputError(
                f"the JSON has {numbers} numbers in {lists} lists; the model takes {what} of "
                f"shape {self.shape}: {most} numbers in {most_lists} lists"
            )
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _no_list(error) from error

    def _image(self, data: bytes) -> Tensor:
        if len(self.shape) != 3 or self.shape[0] not in _CHANNELS:
            raise InputError(
                f"the model takes inputs of shape {self.shape}, which no image has; send a .npy "
                "array or a JSON list",
                415,
            )
        channels, height, width = self.shape
        preprocessing = self.preprocessing or Preprocessing((channels, height, width))
        x = preprocessing(self._pixels(data, preprocessing)).to(self.dtype)
        low, high = self.bounds
        return x if (low, high) == (0, 1) else (low + (high - low) * x).clamp_(low, high)

    def _pixels(self, data: bytes, preprocessing: Preprocessing) -> Tensor:
        """Of an image, in its own size; Pillow's own copy is freed on return."""
        channels, height, width = preprocessing.size
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(f"the image has too many pixels: {error}", 413) from error
        except Exception as error:  # Pillow lets many kinds through where a header is damaged
            raise InputError(
                "this is none of a PNG, JPEG or WebP image, a .npy array and a JSON list", 415
            ) from error
        # All checks come before the pixels are decoded.
        if image.width * image.height > self.max_pixels:
            raise InputError(
                f"the image has {image.width} x {image.height} pixels; the most is "
                f"{self.max_pixels}",
                413,
            )
        if image.size != (width, height):
            self._check_size(image.height, image.width, preprocessing)
        if image.mode[0] in "IF":
            raise InputError(
                f"the image has more than 8 bits a channel (mode {image.mode}); send a tensor"
            )
        try:
            return pixels_of(image, alpha=channels == 4)
        except Exception as error:  # as above
            raise InputError(f"the image cannot be decoded: {error}") from error

    def _check_size(self, height: int, width: int, preprocessing: Preprocessing) -> None:
        """Raise if an image of another size than the model's is not to be resized."""
        if not self.resize:
            raise InputError(
                f"the image is {width} wide and {height} high, the model takes "
                f"{self.shape[2]} x {self.shape[1]}; resize it, or start the server with --resize"
            )
        resized = preprocessing.resized(height, width)  # a thin image becomes a very long one
        if math.prod(resized) > self.max_pixels:
            raise InputError(
                f"the image is {width} wide and {height} high, which would have to become "
                f"{resized[1]} x {resized[0]} pixels; the most is {self.max_pixels}",
                413,
            )


def _check_kind(dtype: np.dtype) -> None:
    if dtype.kind not in "fiu":
        raise InputError(f"the tensor holds {dtype}; expected numbers")


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise InputError(f"there are {count} inputs; send at most {most} at a time", 413)


def _array(lists: Any) -> NDArray[np.float64]:
    try:
        return np.array(lists, np.float64)
    except OverflowError as error:
        raise InputError("the tensor has values that are not finite in float64") from error
    except (TypeError, ValueError) as error:  # also for rows of unequal lengths
        raise _no_list(error) from error


def _no_list(error: Exception) -> InputError:
    return InputError(f"this is no JSON list of numbers, all rows equally long: {error}")
