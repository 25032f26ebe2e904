"""From what a client sent to a tensor."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from files import BAD, COLOUR, GREY, image_file
from helpers import uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from service import npy
from torch import nn

import rat_ext
from rat_ext import datasets
from rat_ext.serve.decoding import Decoder, InputError


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})]
)
def test_decodes_images_like_the_data_sets(kind: str, options: dict) -> None:
    data = image_file(COLOUR, kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    x = Decoder((3, 5, 6))(data)
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.tensor(expected).permute(2, 0, 1).float() / 255)
    if kind != "JPEG":
        assert (expected == COLOUR).all()


def test_converts_channels_and_sizes_and_bounds() -> None:
    grey = Decoder((1, 5, 6))(image_file(GREY))
    assert torch.equal(grey, torch.tensor(GREY)[None].float() / 255)
    assert torch.equal(Decoder((3, 5, 6))(image_file(GREY)), grey.expand(3, 5, 6))
    palette = io.BytesIO()
    Image.fromarray(GREY).convert("P").save(palette, "PNG")
    assert torch.equal(Decoder((3, 5, 6))(palette.getvalue()), grey.expand(3, 5, 6))
    luma = Decoder((1, 5, 6))(image_file(COLOUR))
    assert torch.equal(luma[0], torch.tensor(np.array(Image.fromarray(COLOUR).convert("L"))) / 255)
    assert Decoder((4, 5, 6))(image_file(COLOUR))[3].eq(1).all()
    centred = Decoder((1, 5, 6), torch.float64, (-1.0, 1.0))(image_file(GREY))
    torch.testing.assert_close(centred, 2 * grey.double() - 1)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 80})]),
    st.sampled_from([GREY, COLOUR, np.repeat(COLOUR, 9, 1)]),
    st.sampled_from([1, 3]),
    st.sampled_from([(5, 6), (4, 4), (9, 2), (16, 16)]),
    st.floats(0.5, 1.0),
    st.sampled_from(["bilinear", "bicubic"]),
)
def test_resizes_images_like_the_data_sets(
    kind: tuple, pixels: np.ndarray, channels: int, size: tuple, crop: float, how: str
) -> None:
    pytest.importorskip("torchvision")
    data = image_file(pixels, kind[0], **kind[1])
    preprocessing = datasets.Preprocessing((channels, *size), crop, how)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test/a").mkdir(parents=True)
        (Path(folder) / f"test/a/0.{kind[0].lower()}").write_bytes(data)
        images = datasets.load(f"folder:{folder}", "test", preprocessing=preprocessing)
        expected, _ = images[0]
    decode = Decoder(preprocessing.size, resize=True, preprocessing=preprocessing)
    assert torch.equal(decode(data), expected)


def test_without_a_preprocessing_the_middle_is_taken() -> None:
    pytest.importorskip("torchvision")
    wide = np.concatenate([GREY * 0, GREY, GREY * 0], axis=1)
    x = Decoder((1, 5, 6), resize=True)(image_file(np.repeat(np.repeat(wide, 2, 0), 2, 1)))
    assert (x - Decoder((1, 5, 6))(image_file(GREY))).abs()[..., 1:-1].max() < 16 / 255


def test_thin_images_are_refused_that_would_become_large() -> None:
    pytest.importorskip("torchvision")
    decode = Decoder((1, 64, 64), resize=True, max_pixels=10_000)
    assert decode(image_file(np.zeros((2, 4), np.uint8))).shape == (1, 64, 64)
    for shape, became in [((1, 10_000), "640000 x 64"), ((157, 1), "64 x 10048")]:
        with pytest.raises(InputError, match=f"would have to become {became} pixels") as caught:
            decode(image_file(np.zeros(shape, np.uint8)))
        assert caught.value.status == 413


def test_errors_of_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is for images of shape \(1, 5, 5\), the model takes"):
        Decoder((1, 5, 6), preprocessing=datasets.Preprocessing((1, 5, 5)))
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    assert Decoder((1, 5, 6))(image_file(GREY)).shape == (1, 5, 6)
    with pytest.raises(ImportError, match="resizing images needs torchvision: pip install"):
        Decoder((1, 5, 6), resize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decodes_tensors(dtype: torch.dtype) -> None:
    x = uniform(2, 3, dtype=dtype)
    decode = Decoder((2, 3), dtype)
    for array in (x.double().numpy(), np.asfortranarray(x.double())):
        assert torch.equal(decode(npy(array)), x)
    assert torch.equal(decode(npy(x.double().numpy().astype(">f8"))), x)
    assert torch.equal(decode(b"\n " + json.dumps(x.tolist()).encode()), x)
    assert torch.equal(decode(npy(np.eye(2, 3, dtype=np.uint8))), torch.eye(2, 3, dtype=dtype))


def test_a_bound_in_float32_is_in_bounds() -> None:
    high = 0.1  # which float32 rounds upwards
    x = Decoder((1, 2), torch.float32, (0.0, high))(npy(np.float32([[0, high]])))
    assert torch.isfinite(rat_ext.robust_radius(nn.Identity(), x, bounds=(0.0, high))).any()


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_told_why(name: str) -> None:
    data, status, message = BAD[name]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Decoder((1, 5, 6))(data)
    assert caught.value.status == status


def test_a_model_of_no_images_takes_none() -> None:
    with pytest.raises(InputError, match="which no image has") as caught:
        Decoder((12,))(image_file(GREY))
    assert caught.value.status == 415


SEEDS = [
    image_file(GREY), image_file(GREY, "JPEG"), image_file(GREY, "WEBP"), npy([GREY / 255]),
    json.dumps([(GREY / 255).tolist()]).encode(),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_else(data: st.DataObject) -> None:
    pytest.importorskip("torchvision")
    file = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    del file[data.draw(st.integers(0, len(file))) :]
    with contextlib.suppress(InputError):
        x = Decoder((1, 5, 6), resize=True)(bytes(file))
        assert x.shape == (1, 5, 6)
        assert ((x >= 0) & (x <= 1)).all()
