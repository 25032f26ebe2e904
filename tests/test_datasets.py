"""Data sets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from rat_ext import datasets
from rat_ext.datasets import by_name


def test_digits_are_split_into_disjoint_parts() -> None:
    splits = datasets.digits(train_size=500, seed=3)
    assert [len(part) for part in splits] == [500, 297, 1000]
    x, target = splits.train[:]
    assert x.shape == (500, 1, 8, 8)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert target.dtype == torch.int64
    assert splits.train.classes == tuple("0123456789")
    # The same images again, in whatever order: nothing is lost or in two parts.
    other = datasets.digits(train_size=100, seed=4)
    sums = [
        torch.cat([part.pixels.double().sum((1, 2, 3)) * 100 + part.targets for part in parts])
        for parts in (splits, other)
    ]
    assert torch.equal(*(values.sort().values for values in sums))


def test_digits_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (datasets.digits(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.test.pixels, again.test.pixels)
    assert not torch.equal(first.test.pixels, other.test.pixels)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_digits_too_many_to_train_on() -> None:
    with pytest.raises(ValueError, match="leave some of the 1797 images for validation"):
        datasets.digits(train_size=797)


def test_images_are_floats_in_the_unit_interval() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    images = datasets.Images(pixels, torch.tensor([0, 1, 0]), ("a", "b"))
    x, target = images[[1, 2]]
    assert torch.equal(x.flatten(), torch.tensor([0.2, 1.0]))
    assert target.tolist() == [1, 0]
    assert images[1][0].shape == (1, 1, 1)
    assert len(images.subset(slice(1, 3))) == 2


def write_archive(path: Path, **changes: np.ndarray | None) -> Path:
    image = pytest.importorskip("PIL.Image")
    files = []
    for value in (0, 128, 255):
        file = io.BytesIO()
        image.new("RGB", (4, 2), (value, value, value)).save(file, "JPEG")
        files.append(file.getvalue())
    arrays = {
        "bytes": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array([2, 0, 1], np.uint8),
        "classes": np.array(["x", "y", "z"]),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_jpeg_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "images.npz")
    images = datasets.jpeg_archive(path)
    assert images.pixels.shape == (3, 3, 2, 4)
    assert images.pixels.float().mean((1, 2, 3)).tolist() == pytest.approx([0, 128, 255], abs=2)
    assert images.targets.tolist() == [2, 0, 1]
    assert images.classes == ("x", "y", "z")
    assert len(datasets.jpeg_archive(path, limit=2)) == 2


def test_errors_of_jpeg_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no image archive"):
        datasets.jpeg_archive(tmp_path / "images.npz")
    with pytest.raises(ValueError, match="not an image archive with bytes, offsets"):
        datasets.jpeg_archive(write_archive(tmp_path / "images.npz", offsets=None))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="not an image archive with bytes, offsets"):
        datasets.jpeg_archive(tmp_path / "text.npz")


# --- By name --------------------------------------------------------------------------------------


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), size: int = 300) -> Path:
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        value = 50 * (number + 1)
        image.new("RGB", (size, size), (value, value, value)).save(folder / name / "0.png")
    return folder


def write_cifar(folder: Path) -> Path:
    folder.mkdir(parents=True)
    images = np.arange(10, dtype=np.uint8).repeat(4 * 4 * 3).reshape(10, 4, 4, 3)
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", np.arange(10) % 2)
    return folder


def test_a_new_data_set_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_name, "_loaders", dict(by_name._loaders))

    @by_name.known_as("grey:LEVEL")
    def grey(request: by_name.Request) -> datasets.Images:
        pixels = torch.full((3, 1, 2, 2), float(request.detail))
        return datasets.Images(pixels, torch.zeros(3).long(), ("grey",))

    assert datasets.load("grey:0.5", "test")[:][0].mean() == 0.5
    with pytest.raises(ValueError, match=r"no data set is named 'grey'; there are .*, grey:LEVEL"):
        datasets.load("grey", "test")
    assert datasets.NAMES[0] == "digits"


def test_digits_by_name() -> None:
    train, test = datasets.load("digits", "train"), datasets.load("digits", "test")
    assert (len(train), len(test)) == (500, 1297)
    assert torch.equal(train.pixels, datasets.digits().train.pixels)


def test_corrupted_cifar_by_name(tmp_path: Path) -> None:
    write_cifar(tmp_path / "CIFAR-10-C")
    images = datasets.load("cifar10-c:fog:3", "test", tmp_path)
    assert images.pixels.shape == (2, 3, 4, 4)
    assert images.pixels[:, 0, 0, 0].tolist() == [4, 5]
    assert images.targets.tolist() == [0, 1]


def test_image_folders_by_name(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write_images(tmp_path / "val")
    for name, root in ((f"folder:{tmp_path}", "elsewhere"), ("imagenet", tmp_path)):
        data = datasets.load(name, "test", root)
        x, target = data[1]
        assert x.shape == (3, 224, 224)
        assert x.mean() == pytest.approx(100 / 255)
        assert target == 1
        assert list(data.classes) == ["cat", "dog"]
        loader = datasets.batches(data, [[1, 0]], 0, torch.device("cpu"))
        assert [t.tolist() for _, t in loader] == [[1, 0]]


def test_archives_by_name(tmp_path: Path) -> None:
    write_archive(tmp_path / "images-test.npz")
    assert len(datasets.load(f"npz:{tmp_path}/images-{{split}}.npz", "test")) == 3


def test_one_archive_is_split_into_disjoint_parts(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    x = np.arange(100, dtype=np.uint8)[:, None, None].repeat(4, 1)
    np.savez(path, x=x, y=np.arange(100) % 5)
    train, test, again = (datasets.load(f"npz:{path}", s) for s in ("train", "test", "test"))
    numbers = [part.pixels[:, 0, 0, 0].tolist() for part in (train, test, again)]
    assert numbers[1] == numbers[2]
    assert sorted(numbers[0] + numbers[1]) == list(range(100))
    assert test.targets.bincount().tolist() == [4] * 5
    path.rename(tmp_path / "test.npz")
    assert len(datasets.load(f"npz:{tmp_path}/{{split}}.npz", "test")) == 100


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("data", "targets")])
@pytest.mark.parametrize("layout", ["grey", "last", "first"])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_archives_of_arrays(tmp_path: Path, names: tuple, layout: str, kind: str) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (6, 1 if layout == "grey" else 3, 5, 7))
    images = whole.astype(np.uint8) if kind == "uint8" else (whole / 255).astype(kind)
    stored = {"grey": images[:, 0], "last": images.transpose(0, 2, 3, 1), "first": images}[layout]
    path = tmp_path / "images.npz"
    np.savez(path, **dict(zip(names, (stored, [0, 1, 2, 0, 1, 2]), strict=True)))
    data = datasets.array_archive(path)
    x, target = data[:]
    torch.testing.assert_close(x, torch.from_numpy(whole).float() / 255)
    assert target.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": [1]}, "has the arrays z; expected x and y"),
        ({"x": np.zeros((2, 4, 4)), "y": [0]}, "expected one class index for each image"),
        ({"x": np.zeros((2, 4, 4)), "y": [0, -1]}, "from -1 to 0; expected indices of 1 classes"),
        ({"x": np.full((2, 4, 4), 255.0), "y": [0, 1]}, "float64 from 255.0 to 255.0; expected"),
        ({"x": np.full((2, 4, 4), 2), "y": [0, 1]}, "int64 from 2 to 2; expected uint8"),
        ({"x": np.full((2, 4, 4), np.nan), "y": [0, 1]}, "from nan to nan; expected"),
        ({"x": np.zeros((2, 3, 4, 3)), "y": [0, 1]}, "channels on just one of these axes"),
        ({"x": np.zeros((2, 5, 4, 5)), "y": [0, 1]}, "channels on just one of these axes"),
    ],
)
def test_errors_of_array_archive(tmp_path: Path, arrays: dict, message: str) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        datasets.load(f"npz:{path}", "test")
    path.write_text("no archive")
    with pytest.raises(ValueError, match=r"is not an \.npz archive of arrays"):
        datasets.load(f"npz:{path}", "test")
    with pytest.raises(FileNotFoundError, match="there is no image archive"):
        datasets.load(f"npz:{path}.npz", "test")


def test_torchvision_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_datasets = pytest.importorskip("torchvision.datasets")

    class CIFAR10:
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert (root, train, download) == (tmp_path, True, False)
            self.data = np.full((2, 32, 32, 3), 255, np.uint8)
            self.targets, self.classes = [3, 4], list("abcde")

    monkeypatch.setattr(torchvision_datasets, "CIFAR10", CIFAR10)
    x, target = datasets.load("cifar10", "train", tmp_path)[:]
    assert torch.equal(x, torch.ones(2, 3, 32, 32))
    assert target.tolist() == [3, 4]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_missing_data_set_says_where_to_put_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    if name == "svhn":
        pytest.importorskip("scipy")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is not in .*put .* there.*found in .*: other$"):
        datasets.load(name, "train", tmp_path)


def test_a_wrong_folder_says_what_was_found(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*test or .*val.*: pictures$"):
        datasets.load(f"folder:{tmp_path}", "test")
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder of images for each class.*: nothing$"):
        datasets.load(f"folder:{tmp_path}", "test")
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10-C does not exist$"):
        datasets.load("cifar10-c:fog:1", "test", tmp_path)
    write_cifar(tmp_path / "CIFAR-10-C")
    with pytest.raises(FileNotFoundError, match=r"no .*snow.npy; found in .*: fog.npy, labels.npy"):
        datasets.load("cifar10-c:snow:1", "test", tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnist", "test", "no data set is named 'mnist'; there are digits"),
        ("digits:1", "test", "no data set is named 'digits:1'"),
        ("digits", "validation", "split is 'validation'"),
        ("cifar10-c:fog:3", "train", "is for testing"),
        ("cifar10-c:fog", "test", "must be from 1 to 5"),
    ],
)
def test_errors_of_load(name: str, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(name, split)


def test_outliers_count_as_errors(tmp_path: Path) -> None:
    pixels = torch.rand(3, 1, 2, 2)
    images = datasets.Images(pixels, torch.tensor([0, 1, 0]), ("a", "b"))
    others = datasets.Images((pixels * 255).byte(), torch.tensor([1, 1, 1]), ("c", "d"))
    x, target = datasets.with_outliers(images, others)[:]
    assert target.tolist() == [0, 1, 0, -1, -1, -1]
    assert torch.allclose(x[:3], x[3:], atol=1 / 255)
    mixture = datasets.with_outliers(images, datasets.first(torch_data(), 2))
    (batch,) = datasets.batches(mixture, [range(5)], 0, torch.device("cpu"))
    assert batch[1].tolist() == [0, 1, 0, -1, -1]
    assert mixture.classes == ("a", "b")
    with pytest.raises(ValueError, match=r"the outliers have shape \(1, 8, 8\)"):
        datasets.with_outliers(images, datasets.digits().test)


def torch_data() -> torch.utils.data.Dataset:
    data = torch.utils.data.TensorDataset(torch.rand(5, 1, 2, 2), torch.arange(5))
    data.classes = list("abcde")
    return data
