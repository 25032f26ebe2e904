"""From an image of any size to the pixels that a model takes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat_ext import datasets
from rat_ext.datasets import Images, Preprocessing
from rat_ext.datasets.preprocessing import IMAGENET, INTERPOLATIONS

Image = pytest.importorskip("PIL.Image")
EXAMPLES = settings(max_examples=60, deadline=None)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).byte()


def image_of(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())


def preprocessings() -> st.SearchStrategy[Preprocessing]:
    sides = st.integers(2, 40)  # torch errs where it resizes bytes to one column
    return st.builds(
        Preprocessing,
        st.tuples(st.sampled_from([1, 3, 4]), sides, sides),
        st.floats(0.3, 1.0),
        st.sampled_from(INTERPOLATIONS),
    )


# --- Without torchvision --------------------------------------------------------------------------


@EXAMPLES
@given(preprocessings(), st.sampled_from([1, 3, 4]), st.integers(0, 99))
def test_an_image_of_the_models_size_is_taken_as_it_is(
    preprocessing: Preprocessing, channels: int, seed: int
) -> None:
    wanted, height, width = preprocessing.size
    pixels = noise(channels, height, width, seed=seed)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[wanted]
    if channels == 4 and wanted < 4:  # alpha is dropped first
        expected = image_of(pixels[:3]).convert(mode)
    else:
        expected = image_of(pixels).convert(mode)
    expected = torch.tensor(np.array(expected)).view(height, width, wanted).permute(2, 0, 1)
    for image in (pixels, image_of(pixels)):
        for way in (preprocessing, preprocessing.random_crop):
            assert torch.equal(way(image), expected.float() / 255)
    x = preprocessing(pixels.double() / 255)
    torch.testing.assert_close(x, expected.double() / 255, rtol=0, atol=0.501 / 255)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "PA", "CMYK", "YCbCr", "RGBA"])
def test_images_of_other_modes(mode: str) -> None:
    image = image_of(noise(3, 5, 6)).convert("RGB").convert("L" if mode == "LA" else "RGB")
    image = image.convert(mode)
    for channels, as_mode in ((1, "L"), (3, "RGB")):
        expected = np.array(image.convert("RGB").convert(as_mode))
        x = Preprocessing((channels, 5, 6))(image)
        assert (x.permute(1, 2, 0).squeeze(2).numpy() == expected / np.float32(255)).all()


@EXAMPLES
@given(preprocessings())
def test_it_is_kept_as_plain_values(preprocessing: Preprocessing) -> None:
    values = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(values) == preprocessing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 32),), r"size is \(3, 32\); expected channels, height and width"),
        (((3, 0, 32),), r"size is \(3, 0, 32\)"),
        (((3, 32, 32.0),), r"size is \(3, 32, 32.0\)"),
        (((3, 32, 32), 0.0), "crop is 0.0; it must be above 0"),
        (((3, 32, 32), float("nan")), "crop is nan"),
        (((3, 32, 32), 1.0, "cubic"), "interpolation is 'cubic'; expected bilinear or bicubic"),
    ],
)
def test_values_out_of_range(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(*arguments)


@pytest.mark.parametrize(
    "values", [{}, [], "224", {"size": 224, "crop": 1.0, "interpolation": "bilinear"}]
)
def test_what_is_no_preprocessing(values: object) -> None:
    with pytest.raises(ValueError, match="is no preprocessing"):
        Preprocessing.from_dict(values)


def test_images_that_cannot_be_converted() -> None:
    with pytest.raises(ValueError, match="images of 2 channels cannot be made ones of 3"):
        Preprocessing((3, 4, 4))(noise(2, 4, 4))
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    with pytest.raises(ValueError, match=r"the image has more than 8 bits a channel \(mode I;16"):
        Preprocessing((3, 4, 4))(deep)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    np.savez(tmp_path / "x.npz", x=noise(10, 8, 8, 3).numpy(), y=np.arange(10) % 2)
    name = f"npz:{tmp_path}/x.npz"
    with pytest.raises(ImportError, match="resizing images needs torchvision: pip install"):
        datasets.load(name, "test", preprocessing=Preprocessing((3, 9, 9)))
    grey = datasets.load(name, "test", preprocessing=Preprocessing((1, 8, 8)))
    assert grey[0][0].shape == (1, 8, 8)


# --- With torchvision -----------------------------------------------------------------------------


@EXAMPLES
@given(preprocessings(), st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_the_middle_of_what_covers_the_models_size(
    preprocessing: Preprocessing, height: int, width: int, seed: int
) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    channels, *size = preprocessing.size
    pixels = noise(channels, height, width, seed=seed)
    resized = preprocessing.resized(height, width)
    # One side is as long as it must be, the other one at least so, and the shape is kept.
    least = [int(side / preprocessing.crop + 1e-6) for side in size]
    assert all(map(int.__ge__, resized, least))
    assert resized[0] == least[0] or resized[1] == least[1]
    scale = max(least[0] / height, least[1] / width)
    assert resized == pytest.approx((scale * height, scale * width), abs=1)
    x = preprocessing(pixels)
    assert x.shape == preprocessing.size
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    if (height, width) != tuple(size):
        mode = preprocessing._mode
        whole = functional.resize(pixels, list(resized), mode, antialias=True)
        assert torch.equal(x, functional.center_crop(whole, size).float() / 255)
    # The same for an image of Pillow, in a batch, and up to rounding for floats.
    assert torch.equal(preprocessing(image_of(pixels)), x)
    assert torch.equal(preprocessing(pixels.expand(2, 1, -1, -1, -1))[1, 0], x)
    floats = preprocessing(pixels.float() / 255)
    # Bicubic values beyond 0 and 255 are cut off after each of the two directions.
    tolerance = 0.2 if preprocessing.interpolation == "bicubic" else 1.01 / 255
    torch.testing.assert_close(floats, x, rtol=0, atol=tolerance)
    assert 0 <= floats.min() <= floats.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 256), (97, 1000)])
@pytest.mark.parametrize("preset", [(224, 256), (224, 232), (299, 342), (384, 384)])
def test_pixels_are_those_of_torchvisions_presets(
    height: int, width: int, preset: tuple[int, int]
) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    crop, resize = preset
    pixels = noise(3, height, width)
    expected = transforms.functional.resize(pixels, [resize], antialias=True)
    expected = transforms.functional.center_crop(expected, [crop]).float() / 255
    assert torch.equal(Preprocessing((3, crop, crop), crop / resize)(pixels), expected)
    # Of Pillow's own resizing, to whose pixels weights are evaluated, to its rounding.
    theirs = transforms.functional.resize(image_of(pixels), [resize], antialias=True)
    theirs = transforms.functional.center_crop(theirs, [crop])
    difference = transforms.functional.pil_to_tensor(theirs).float() / 255 - expected
    assert difference.abs().max() < 2.01 / 255


def test_training_on_random_parts() -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    preprocessing = Preprocessing((3, 16, 20), 0.5, "bicubic")
    pixels = noise(3, 50, 40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = preprocessing.random_crop(pixels), preprocessing.random_crop(pixels)
        torch.manual_seed(0)
        again = preprocessing.random_crop(image_of(pixels))
        torch.manual_seed(0)
        mode = transforms.InterpolationMode.BICUBIC
        expected = transforms.RandomResizedCrop((16, 20), interpolation=mode)(pixels)
    assert torch.equal(first, again)
    assert torch.equal(first, expected.float() / 255)
    assert not torch.equal(first, second)


# --- Data sets ------------------------------------------------------------------------------------


def write_folder(folder: Path, pixels: Tensor, kind: str = "png") -> Path:
    """An image folder of one class for each two images."""
    for number, each in enumerate(pixels):
        path = folder / f"{number // 2:03}" / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_of(each).save(path)
    return folder


@pytest.mark.parametrize("size", [32, 40])
def test_a_folder_gives_the_pixels_of_images_in_memory(tmp_path: Path, size: int) -> None:
    pytest.importorskip("torchvision")
    pixels = noise(6, 3, size, size)
    write_folder(tmp_path / "test", pixels)
    np.savez(tmp_path / "x-test.npz", x=pixels.numpy(), y=np.arange(6) // 2)
    preprocessing = Preprocessing((3, 32, 32), 0.875, "bicubic")
    folder, memory = (
        datasets.load(name, "test", preprocessing=preprocessing)
        for name in (f"folder:{tmp_path}", f"npz:{tmp_path}/x-{{split}}.npz")
    )
    assert [len(folder), len(memory)] == [6, 6]
    x = memory[:][0]
    for i in range(6):
        assert torch.equal(folder[i][0], x[i])
        assert torch.equal(memory[i][0], x[i])
    if size == 32:
        assert torch.equal(x, pixels.float() / 255)
        assert memory.preprocessing is None
    assert datasets.preprocessing_of(folder) == preprocessing
    for part in (datasets.subset(folder, [1, 2]), datasets.first(folder, 3)):
        assert datasets.preprocessing_of(part) == preprocessing


def test_a_folder_to_train_on_gives_random_parts(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    pixels = noise(4, 3, 40, 32)
    write_folder(tmp_path / "train", pixels)
    data = datasets.load(
        f"folder:{tmp_path}", "train", preprocessing=Preprocessing((3, 16, 16), 0.5)
    )
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(data[0][0], data[0][0])
    same = datasets.load(f"folder:{tmp_path}", "train", preprocessing=Preprocessing((3, 40, 32)))
    assert torch.equal(same[0][0], pixels[0].float() / 255)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_grey_files_for_a_model_of_colours(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchvision")
    write_folder(tmp_path / "test", noise(2, 1, 12, 12), kind)
    grey, colour = (
        datasets.load(f"folder:{tmp_path}", "test", preprocessing=Preprocessing((channels, 9, 9)))
        for channels in (1, 3)
    )
    x = grey[1][0]
    assert x.shape == (1, 9, 9)
    assert torch.equal(colour[1][0], x.expand(3, -1, -1))


def test_files_of_16_bits_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / "test/a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "test/a/deep.png")
    data = datasets.load(f"folder:{tmp_path}", "test")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits a channel \(mode I;16"):
        data[0]


def test_without_one_folders_are_as_for_imagenet(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    pixels = noise(2, 3, 300, 400)
    write_folder(tmp_path / "test", pixels)
    data = datasets.load(f"folder:{tmp_path}", "test")
    assert datasets.preprocessing_of(data) == IMAGENET
    assert IMAGENET.resized(300, 400) == (256, 341)
    assert torch.equal(data[0][0], IMAGENET(pixels[0]))


def test_images_in_memory_say_how_they_are_given() -> None:
    images = Images(noise(4, 1, 6, 5), torch.arange(4), tuple("abcd"))
    assert datasets.preprocessing_of(images) == Preprocessing((1, 6, 5))
    assert datasets.preprocessing_of(datasets.first(images, 2)) == Preprocessing((1, 6, 5))
    vectors = Images(torch.rand(4, 7), torch.arange(4), tuple("abcd"))
    assert datasets.preprocessing_of(vectors) is None


@pytest.mark.parametrize("sizes", [(8, 8), (8, 12), (12, 8), (12, 12), (12, 20)])
def test_outliers_go_through_the_same(tmp_path: Path, sizes: tuple[int, int]) -> None:
    pytest.importorskip("torchvision")
    preprocessing = Preprocessing((3, 8, 8))
    parts = []
    for number, size in enumerate(sizes):
        pixels = noise(10, 3, size, size, seed=number)
        np.savez(tmp_path / f"{number}-test.npz", x=pixels.numpy(), y=np.arange(10) % 2)
        name = f"npz:{tmp_path}/{number}-{{split}}.npz"
        parts.append(datasets.load(name, "test", preprocessing=preprocessing))
    mixture = datasets.with_outliers(*parts)
    ((x, target),) = datasets.batches(mixture, [range(20)], 0, torch.device("cpu"))
    assert torch.equal(x, torch.cat([part[:][0] for part in parts]))
    assert target.tolist() == [0, 1] * 5 + [-1] * 10
    assert datasets.preprocessing_of(mixture) == preprocessing


def test_parts_of_images_in_memory_are_brought_to_the_size(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    np.savez(tmp_path / "x.npz", x=noise(20, 3, 8, 8).numpy(), y=np.arange(20) % 2)
    data = datasets.load(f"npz:{tmp_path}/x.npz", "train", preprocessing=Preprocessing((1, 12, 12)))
    index = datasets.shuffled(data)[:5]
    part = datasets.subset(data, index)
    ((x, _),) = datasets.batches(part, [[4, 0]], 0, torch.device("cpu"))
    assert torch.equal(x, data[index][0][[4, 0]])
    assert x.shape == (2, 1, 12, 12)


def test_a_jpeg_file_and_one_in_an_archive_are_alike(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    file = io.BytesIO()
    image_of(noise(3, 30, 40)).save(file, "JPEG")
    data = np.frombuffer(file.getvalue(), np.uint8)
    np.savez(
        tmp_path / "x-test.npz",
        bytes=np.concatenate([data, data]),
        offsets=[0, len(data), 2 * len(data)],
        labels=[0, 0],
        classes=["a"],
    )
    (tmp_path / "test/a").mkdir(parents=True)
    (tmp_path / "test/a/x.jpg").write_bytes(file.getvalue())
    preprocessing = Preprocessing((3, 16, 16), 0.9, "bicubic")
    x, y = (
        datasets.load(name, "test", preprocessing=preprocessing)[0][0]
        for name in (f"folder:{tmp_path}", f"npz:{tmp_path}/x-{{split}}.npz")
    )
    assert torch.equal(x, y)
