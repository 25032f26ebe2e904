"""The files of `rat-ext train`, and the commands that take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rat_ext import cli, datasets, models, training

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = [
    "train", "--data", "digits", "--model", "digits-cnn", "--loss", "ce", "--optimizer", "adamw",
    "--lr", "3e-3", "--batch-size", "50", "--epochs", "3", "--ema", "0.98",
]  # fmt: skip
EVALUATE = ["evaluate", "--data", "digits", "--scores", "msr", "--splits", "1", "--tune", "none"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert cli.main([*TRAIN, "--out", str(out)]) == 0
    return out


def test_both_files_are_of_one_model(trained: Path, tmp_path: Path) -> None:
    accuracy = {}
    for name in ("last", "model"):
        out = tmp_path / name
        files = ["--checkpoint", str(trained / f"{name}.pt"), "--out", str(out)]
        assert cli.main([*EVALUATE, *files]) == 0
        accuracy[name] = json.loads((out / "results.json").read_text())["accuracy"]
    reported = (trained / "history.csv").read_text().split(",")[-1]
    assert accuracy["last"] == accuracy["model"] == pytest.approx(float(reported))
    assert models.classes_in(trained / "last.pt") == models.classes_in(trained / "model.pt")
    weights = torch.load(trained / "last.pt", weights_only=True)["model"]
    averaged = torch.load(trained / "model.pt", weights_only=True)["state_dict"]
    assert not torch.equal(weights["m.9.weight"], averaged["m.9.weight"])


def test_other_data_in_the_folder_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "model.pt").read_bytes()
    assert cli.main([*TRAIN, "--out", str(trained), "--limit", "450"]) == 2
    assert "last.pt is of other data (samples was 500, is 450)" in capsys.readouterr().err
    assert (trained / "model.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (trained / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert cli.main([*TRAIN, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rat-ext train: error: {tmp_path / 'last.pt'} is damaged (")
    assert error.count("\n") == 1


def test_a_run_that_had_no_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = training.Recipe(loss="ce", epochs=1, batch_size=50)
    model, data = models.create("digits-cnn"), datasets.load("digits", "train")
    training.train(model, data, recipe, out=tmp_path, progress=False)
    options = ["--data", "digits", "--model", "digits-cnn", "--loss", "ce", "--epochs", "1"]
    assert cli.main(["train", *options, "--batch-size", "50", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"Model: {tmp_path / 'model.pt'}\n"
