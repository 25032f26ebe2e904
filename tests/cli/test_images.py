"""Every command gives the model the same pixels of the same file, as training wrote them down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rat_ext import cli, models
from rat_ext.datasets import Preprocessing
from rat_ext.datasets.preprocessing import IMAGENET

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytestmark = pytest.mark.usefixtures("one_thread")

RECORDING = """
import torch
from torch import nn

SEEN = []

class Net(nn.Sequential):
    def forward(self, x):
        SEEN.extend(x.detach().clone())
        return super().forward(x)

def build(classes):
    return Net(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))
"""
TRAIN = ["--loss", "ce", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the model recording:build has been given, image by image."""
    (tmp_path / "recording.py").write_text(RECORDING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "recording", raising=False)
    return __import__("recording").SEEN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of JPEG files of several sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 60)):
        for number in range(count):
            path = tmp_path / f"pictures/{split}/{'ab'[number % 2]}/{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (*rng.integers(20, 40, 2), 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return tmp_path / "pictures"


def archive(path: Path, size: int, count: int = 20) -> str:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    np.savez(path, x=x, y=np.arange(count) % 2)
    return f"npz:{path}"


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The application that a command would serve."""
    server = pytest.importorskip("rat_ext.serve.server")
    apps: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda app, *_, **__: apps.append(app))
    assert cli.main(["serve", "--device", "cpu", *arguments]) == 0
    return apps[0]


def test_all_commands_see_the_same_pixels(
    folder: Path, seen: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessing = Preprocessing((3, 16, 12), 0.8, "bicubic")
    data = ["--data", f"folder:{folder}", "--device", "cpu"]
    how = ["--size", "3x16x12", "--crop", "0.8", "--interpolation", "bicubic"]
    out = tmp_path / "run"
    assert cli.main(["train", *TRAIN, *data[:2], *how, "--model", "recording:build",
                     "--out", str(out)]) == 0  # fmt: skip
    assert models.preprocessing_in(out / "model.pt") == preprocessing
    assert models.preprocessing_in(out / "last.pt") == preprocessing

    files = sorted((folder / "test").rglob("*.jpeg"))
    expected = [preprocessing(Image.open(file)) for file in files]

    def given() -> int:
        """How many of the images the model was given, to the bit, since the last time."""
        rows = {x.numpy().tobytes() for x in seen}
        seen.clear()
        return sum(x.numpy().tobytes() in rows for x in expected)

    assert given() == 60  # to report the accuracy
    model = ["--checkpoint", str(out / "model.pt")]
    gate = str(tmp_path / "gate.safetensors")
    msr = ["--scores", "msr", "--splits", "1", "--tune", "none"]
    for command in (
        ["evaluate", *msr, "--out", str(tmp_path / "evaluated")],
        ["radii", "--out", str(tmp_path / "radii")],
        ["detector", "fit", "--score", "msr", "--coverage", "0.5", "--out", gate],
        ["detector", "apply", "--detector", gate, "--out", str(tmp_path / "decided.csv")],
    ):
        assert cli.main([*command, *data, *model]) == 0
        assert given() == 60, command

    client = pytest.importorskip("fastapi.testclient").TestClient(
        served(monkeypatch, *model, "--resize")
    )
    assert client.get("/info").json()["input_size"] == [3, 16, 12]
    assert client.get("/info").json()["classes"] == ["a", "b"]
    for file in files:
        assert client.post("/predict", content=file.read_bytes()).status_code == 200
    assert given() == 60
    client.app.state.batcher.close()


def test_another_size_is_asked_for(
    folder: Path, seen: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", *TRAIN, "--data", f"folder:{folder}", "--model", "recording:build"]
    out = str(tmp_path / "run")
    assert cli.main([*train, "--size", "16", "--out", out]) == 0
    assert models.preprocessing_in(tmp_path / "run/last.pt") == Preprocessing((3, 16, 16))
    assert cli.main([*train, "--size", "20", "--out", out]) == 2
    assert "is of another preprocessing (size was [3, 16, 16], is [3, 20, 20]); use the same" in (
        capsys.readouterr().err
    )
    seen.clear()
    radii = ["radii", "--data", f"folder:{folder}", "--checkpoint", f"{out}/model.pt"]
    changed = ["--size", "10", "--crop", "0.9", "--limit", "2", "--out", str(tmp_path / "radii")]
    assert cli.main([*radii, *changed]) == 0
    assert {x.shape for x in seen} == {(3, 10, 10)}
    # What a fine-tuned model goes on with.
    assert cli.main([*train, "--from", f"{out}/model.pt", "--out", str(tmp_path / "tuned")]) == 0
    assert models.preprocessing_in(tmp_path / "tuned/model.pt") == Preprocessing((3, 16, 16))


def test_a_user_function_takes_images_as_they_are(
    folder: Path, seen: list[Tensor], tmp_path: Path
) -> None:
    train = ["train", *TRAIN, "--model", "recording:build"]
    data = archive(tmp_path / "x.npz", 9)
    assert cli.main([*train, "--data", data, "--out", str(tmp_path / "a")]) == 0
    assert models.preprocessing_in(tmp_path / "a/model.pt") == Preprocessing((3, 9, 9))
    assert {x.shape for x in seen} == {(3, 9, 9)}
    seen.clear()
    assert cli.main([*train, "--data", f"folder:{folder}", "--out", str(tmp_path / "b")]) == 0
    assert models.preprocessing_in(tmp_path / "b/model.pt") == IMAGENET
    assert {x.shape for x in seen} == {(3, 224, 224)}


def test_outliers_of_another_size(seen: list[Tensor], tmp_path: Path) -> None:
    train = ["train", *TRAIN, "--model", "recording:build"]
    data, outliers = archive(tmp_path / "x.npz", 9, 400), archive(tmp_path / "y.npz", 12, 100)
    assert cli.main([*train, "--data", data, "--out", str(tmp_path / "run")]) == 0
    seen.clear()
    command = ["evaluate", "--data", data, "--ood", outliers, "--scores", "msr", "--splits", "1"]
    model = ["--checkpoint", str(tmp_path / "run/model.pt"), "--device", "cpu"]
    assert cli.main([*command, *model, "--out", str(tmp_path / "out")]) == 0
    assert len(seen) >= 80 + 20
    assert {x.shape for x in seen} == {(3, 9, 9)}


def test_images_in_memory_for_a_timm_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    data = archive(tmp_path / "x.npz", 20)
    name = "timm:test_resnet"
    command = ["train", *TRAIN, "--data", data, "--model", name, "--size", "32"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "The train images are resized from 3x20x20 to 3x32x32.\n" in capsys.readouterr().err
    known = models.preprocessing(name)
    assert known.size == (3, 160, 160)
    written = models.preprocessing_in(tmp_path / "run/model.pt")
    assert written == Preprocessing((3, 32, 32), known.crop, known.interpolation)


def test_checkpoints_of_older_versions(
    seen: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = archive(tmp_path / "x.npz", 9)
    out = tmp_path / "run"
    train = ["train", *TRAIN, "--data", data, "--model", "recording:build", "--out", str(out)]
    assert cli.main(train) == 0
    for name in ("model.pt", "last.pt"):
        state = torch.load(out / name, weights_only=True)
        del state["preprocessing"]
        torch.save(state, out / name)
        radii = ["radii", "--data", data, "--checkpoint", str(out / name), "--device", "cpu"]
        assert cli.main([*radii, "--out", str(tmp_path / name.replace(".", "-"))]) == 0
    assert cli.main(train) == 0  # goes on, which writes it down
    assert {x.shape for x in seen} == {(3, 9, 9)}
    app = served(monkeypatch, "--checkpoint", str(out / "last.pt"), "--input-size", "3x9x9")
    app.state.batcher.close()


def test_pretrained_weights_name_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("fastapi.testclient").TestClient

    def create(name: str, num_classes: int, **_: object) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))

    monkeypatch.setattr(models, "create", create)
    model = ["--model", "torchvision:efficientnet_b1", "--pretrained", "--resize"]
    app = served(monkeypatch, *model)
    info = client(app).get("/info").json()
    assert info["input_size"] == [3, 240, 240]
    assert len(info["classes"]) == 1000
    assert info["classes"][0] == "tench"
    app.state.batcher.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "3x"], "--size is '3x'; expected sizes such as 3x224x224"),
        (["--size", "8x8"], "--size is (8, 8); expected channels, height and width"),
        (["--size", "0"], "--size is '0'; expected"),
        (["--size", "8", "--crop", "2"], "--crop is 2.0; it must be above 0, and at most 1"),
        (["--size", "8", "--interpolation", "cubic"], "--interpolation is 'cubic'; expected"),
        (["--crop", "0.9"], "the model does not say of which size its images are: give --size"),
    ],
)
def test_errors(
    arguments: list[str],
    message: str,
    seen: list[Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = [
        "train",
        "--data",
        "digits",
        "--model",
        "recording:build",
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main([*train, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"rat-ext train: error: {message}")


def test_what_a_checkpoint_holds_is_plain(tmp_path: Path) -> None:
    command = ["train", *TRAIN, "--data", "digits", "--model", "digits-cnn", "--limit", "20"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    values = torch.load(tmp_path / "model.pt", weights_only=True)["preprocessing"]
    assert json.loads(json.dumps(values)) == values
    assert values == {"size": [1, 8, 8], "crop": 1.0, "interpolation": "bilinear"}
