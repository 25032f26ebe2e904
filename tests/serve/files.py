"""Images and arrays as clients send them, good ones and bad ones."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image
from service import npy


def image_file(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


GREY = np.arange(30, dtype=np.uint8).reshape(5, 6) * 8
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that claims to be large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def npy_header(shape: tuple[int, ...]) -> bytes:
    """A .npy file without the numbers."""
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


BAD = {
    "empty": (b"", 400, "the body is empty"),
    "text": (b"hello", 415, "none of a PNG, JPEG or WebP image"),
    "another kind": (image_file(GREY, "GIF"), 415, "none of a PNG, JPEG or WebP image"),
    "truncated image": (image_file(GREY)[:50], 422, "the image cannot be decoded"),
    "broken header": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, 415, "none of a PNG"),
    "another size": (image_file(GREY[:4]), 422, "the image is 6 wide and 4 high"),
    "16 bits": (image_file(GREY.astype(np.uint16)), 422, "more than 8 bits a channel (mode I;16)"),
    "many pixels": (bomb(5000, 5000), 413, "5000 x 5000 pixels; the most is 16777216"),
    "bomb": (bomb(10_000, 10_000), 413, "too many pixels"),
    "larger bomb": (bomb(60_000, 60_000), 413, "too many pixels"),
    "wrong shape": (npy(np.zeros((5, 6))), 422, "has shape (5, 6); the model takes one (1, 5, 6)"),
    "not finite": (npy(np.full((1, 5, 6), np.nan)), 422, "not finite in float32"),
    "too large": (npy(np.full((1, 5, 6), 1e39)), 422, "not finite in float32"),
    "out of bounds": (npy([GREY]), 422, "from 0 to 232, outside the model's bounds (0, 1)"),
    "strings": (b'[["1", "2"]]', 422, "the JSON list holds b'\"'; expected numbers"),
    "booleans": (b"[[true]]", 422, "the JSON list holds b't'; expected numbers"),
    "objects": (b'[{"a": 1}]', 422, "the JSON list holds b'{'; expected numbers"),
    "complex": (npy(np.zeros((1, 5, 6), complex)), 422, "the tensor holds complex128"),
    "ragged": (b"[[1, 2], [3]]", 422, "all rows equally long"),
    "cut off": (b"[[1, 2", 422, "this is no JSON list of numbers"),
    "not UTF-8": (b"[\xff\xfe]", 422, "the JSON list holds b'\\xff'"),
    "nested": (b"[" * 100_000, 422, "1 numbers in 100000 lists; the model takes"),
    "many numbers": (b"[" + b"0," * 30 + b"0]", 422, "31 numbers in 1 lists; the model takes an"),
    "large integer": (b"[" + b"9" * 400 + b"]", 422, "not finite in float64"),
    "a word": (b"[NaN]", 422, "the JSON list holds b'N'; expected numbers"),
    "many digits": (b"[" + b"9" * 10_000 + b"]", 422, "this is no JSON list of numbers"),
    "JSON infinity": (b"[[[1e999]]]", 422, "has shape (1, 1, 1)"),
    "pickled": (npy(np.array([{}], object), allow_pickle=True), 422, "the tensor holds object"),
    "truncated array": (npy(np.zeros((1, 5, 6)))[:-8], 422, "the .npy file is damaged"),
    "broken array": (b"\x93NUMPY\1\0v\0{'descr", 422, "no .npy file that numpy.load reads"),
    "unknown version": (b"\x93NUMPY\7\0v\0", 422, "no .npy file that numpy.load reads"),
    "a size of true": (npy_header((True, 5, 6)) + bytes(240), 422, "has shape (True, 5, 6)"),
    "huge array": (npy_header((10**9, 10**6)), 422, "has shape (1000000000, 1000000)"),
}
