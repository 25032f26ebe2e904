"""Going on from a checkpoint: of what it must be, and what becomes of files that are damaged."""

from __future__ import annotations

import dataclasses
import io
import pickle
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rat_ext import datasets, models
from rat_ext._common.storage import locked
from rat_ext.training import Recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(loss="ce", epochs=1, batch_size=20, lr=0.01)
CLASSES = tuple("0123456789")


def network(name: str = "digits-cnn", classes: int = 10) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.create(name, classes)


def images(count: int = 60, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> datasets.Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 8, 8, generator=generator)
    return datasets.Images(pixels, torch.arange(count) % 10, classes)


def run(out: Path, data: Any, model: nn.Module | None = None, **options: Any) -> None:
    train(model or network(), data, RECIPE, out=out, progress=False, **options)


class Files(Dataset[tuple[Tensor, int]]):
    """A data set that is no `Images`, with a transform."""

    classes = CLASSES

    def __init__(self, seed: int = 0, transform: Any = lambda x: x) -> None:
        self.images, self.transform = images(seed=seed), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, target = self.images[index]
        return self.transform(x), int(target)


def relabelled(data: datasets.Images) -> datasets.Images:
    targets = data.targets.clone()
    targets[7] += 1
    return dataclasses.replace(data, targets=targets)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images(59), r"of other data \(samples was 60, is 59\); use the same, or another output"),
        (images(classes=tuple("abcdefghij")), r"other data \(class 0 was '0', is 'a'\)"),
        (images(classes=tuple("0123456798")), r"other data \(class 8 was '8', is '9'\)"),
        (images(classes=(*CLASSES, "ten")), r"other data \(it had 10 classes, has 11\)"),
        (relabelled(images()), r"of other data \(its labels are others\)"),
        (images(seed=1), r"of other data \(its pixels are others\)"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(
    data: datasets.Images, message: str, tmp_path: Path
) -> None:
    run(tmp_path, images())
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, data)
    assert (tmp_path / "last.pt").read_bytes() == before
    run(tmp_path, images())


def test_a_checkpoint_of_other_files_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Files())
    run(tmp_path, Files())
    with pytest.raises(ValueError, match="its pixels are others"):
        run(tmp_path, Files(seed=1))


TRANSFORMS = {
    "of torch": lambda x: x + 0.1 * torch.rand(()),
    "of python": lambda x: x + 0.1 * random.random(),
    "of numpy": lambda x: x + 0.1 * np.random.rand(),  # noqa: NPY002
}


@pytest.mark.parametrize("how", TRANSFORMS)
def test_random_transforms_are_seeded_to_tell_data_apart(how: str, tmp_path: Path) -> None:
    def states() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()[1]  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), numpy_state.tolist()

    run(tmp_path, Files(transform=TRANSFORMS[how]))
    before = states()
    run(tmp_path, Files(transform=TRANSFORMS[how]))  # nothing to do but look
    assert states() == before
    with pytest.raises(ValueError, match="its pixels are others"):
        run(tmp_path, Files(seed=1, transform=TRANSFORMS[how]))


def test_pixels_that_are_random_in_other_ways_are_not_compared(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(0)

    def transform(x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand((), generator=own)

    for _ in range(2):
        run(tmp_path, Files(transform=transform))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["data"]["pixels"] is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, images(), name="mine:net")
    with pytest.raises(ValueError, match=r"another model \(name was mine:net, is digits-cnn\)"):
        run(tmp_path, images(), name="digits-cnn")
    run(tmp_path, images())  # without a name there is none to compare
    shapes = (
        r"another model \(m\.\S+ was \(10, 256\), is \(11, 256\), m\.\S+ was \(10,\), is \(11,\)"
    )
    with pytest.raises(ValueError, match=shapes):
        run(tmp_path, images(), network(classes=11))
    with pytest.raises(
        ValueError, match=r"mean was \(1, 1, 1, 1\), is absent, .*, \.\.\.\); use the same"
    ):
        run(tmp_path, images(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def test_a_checkpoint_of_another_preprocessing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    large = datasets.Images(torch.rand(60, 3, 12, 12), torch.arange(60) % 10, CLASSES)
    data = dataclasses.replace(large, preprocessing=datasets.Preprocessing((1, 8, 8), 0.9))
    run(tmp_path, data)
    assert models.preprocessing_in(tmp_path / "last.pt") == data.preprocessing
    run(tmp_path, data)
    other = datasets.Preprocessing((1, 8, 8), 0.8, "bicubic")
    message = (
        r"is of another preprocessing \(crop was 0\.9, is 0\.8, interpolation was bilinear, is "
        r"bicubic\); use the same, or another output folder"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path, dataclasses.replace(large, preprocessing=other))
    with pytest.raises(ValueError, match=r"size was \[1, 8, 8\], is \[3, 12, 12\]"):
        run(tmp_path, large)


def test_a_checkpoint_has_the_size_of_images_in_memory(tmp_path: Path) -> None:
    run(tmp_path, images())
    assert models.preprocessing_in(tmp_path / "last.pt") == datasets.Preprocessing((1, 8, 8))
    run(tmp_path / "own", Files())  # what it does, a data set of the user's own does not say
    assert models.preprocessing_in(tmp_path / "own/last.pt") is None


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path: Path) -> None:
    run(tmp_path, images())
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for key in ("data", "classes", "name", "preprocessing"):
        del state[key]
    torch.save(state, tmp_path / "last.pt")
    model = network()
    run(tmp_path, images(), model, name="digits-cnn")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    models.load_weights(model, tmp_path / "last.pt")
    assert models.name_in(tmp_path / "last.pt") is None
    assert models.preprocessing_in(tmp_path / "last.pt") is None


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("run-by-a-checkpoint"),)


def contents(whole: bytes) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"recipe": Malicious()}, buffer)
    return {
        "cut at the end": whole[:-100],
        "half": whole[: len(whole) // 2],
        "a few bytes": whole[:3],
        "empty": b"",
        "other bytes in the middle": whole[:200] + bytes(400) + whole[600:],
        "text": b"no checkpoint",
        "a pickle": pickle.dumps({"epoch": 1}),
        "malicious": buffer.getvalue(),
        "a malicious pickle": pickle.dumps(Malicious()),
    }


@pytest.mark.parametrize("how", contents(b""))
def test_a_damaged_checkpoint_says_so(how: str, tmp_path: Path) -> None:
    run(tmp_path, images())
    path = tmp_path / "last.pt"
    path.write_bytes(contents(path.read_bytes())[how])
    message = r"last\.pt is (damaged \(.+\); delete it|not a checkpoint of a training run; move it)"
    with pytest.raises(ValueError, match=f"{message},? or use another output folder"):
        run(tmp_path, images())
    assert not Path("run-by-a-checkpoint").exists()


def test_a_checkpoint_with_parts_that_do_not_fit_says_so(tmp_path: Path) -> None:
    run(tmp_path, images())
    path = tmp_path / "last.pt"
    good = torch.load(path, weights_only=True)
    for part, wrong, message in [
        ("optimizer", {"state": {}, "param_groups": []}, r"is damaged \(.*; delete it"),
        ("optimizer", {}, "is damaged"),
        ("epoch", "1", "is not a checkpoint of a training run; move it"),
        ("model", "digits-cnn", "is not a checkpoint of a training run"),
        ("data", [], "is not a checkpoint of a training run"),
    ]:
        torch.save({**good, part: wrong}, path)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, images())
    torch.save(good["model"], path)
    with pytest.raises(ValueError, match="is not a checkpoint of a training run"):
        run(tmp_path, images())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, writing fails beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    data, model = images(), network()

    class Filling(datasets.Images):
        """The disk is full from the second epoch on."""

        def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
            if (tmp_path / "last.pt").exists():
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            return super().__getitem__(index)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe = dataclasses.replace(RECIPE, epochs=2)
    filling = Filling(data.pixels, data.targets, data.classes)
    try:
        with pytest.raises(OSError, match=r"last\.pt cannot be written, and is as it was .*Free"):
            train(model, filling, recipe, out=tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1
    resumed = train(network(), data, recipe, out=tmp_path, progress=False)
    assert len(resumed.history) == 2
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    with (
        files_of_at_most(20_000),
        pytest.raises(OSError, match=r"last\.pt cannot be written \(.*the disk full\? Free"),
    ):
        run(tmp_path, images())
    assert not (tmp_path / "last.pt").exists()


def test_a_validation_may_be_added_later(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=2)

    class Stopping(datasets.Images):
        def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
            if (tmp_path / "last.pt").exists():
                raise KeyboardInterrupt
            return super().__getitem__(index)

    data = images()
    with pytest.raises(KeyboardInterrupt):
        train(network(), Stopping(data.pixels, data.targets, data.classes), recipe,
              out=tmp_path, progress=False)  # fmt: skip
    train(network(), data, recipe, validation=data, out=tmp_path, progress=False)
    header, first, second = (tmp_path / "history.csv").read_text().splitlines()
    assert header.endswith(",validation_accuracy")
    assert first.endswith(",")
    assert not second.endswith(",")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_checkpoint_is_loaded_as_what_training_returns(ema: float, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=2, ema=ema)
    model = network()
    train(model, images(), recipe, out=tmp_path, name="digits-cnn", progress=False)
    path = tmp_path / "last.pt"
    assert models.name_in(path) == "digits-cnn"
    assert models.classes_in(path) == CLASSES
    loaded = models.create("digits-cnn")
    models.load_weights(loaded, path)
    trained = torch.load(path, weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        if ema and name.endswith("weight"):
            assert not torch.equal(trained[name], value), name


def test_one_run_trains_in_a_folder(tmp_path):
    data = datasets.digits(train_size=100).train
    (tmp_path / ".last.pt.tmp-1").write_text("left by a killed run")
    recipe = Recipe(loss="ce", epochs=1, batch_size=50)
    with (
        locked(tmp_path, "another training"),
        pytest.raises(BlockingIOError, match="is in use by another training, process"),
    ):
        train(models.create("digits-cnn"), data, recipe, out=tmp_path, progress=False)
    train(models.create("digits-cnn"), data, recipe, out=tmp_path, progress=False)
    assert (tmp_path / "last.pt").exists()
    assert not list(tmp_path.glob(".*.tmp-*"))
