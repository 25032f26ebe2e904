"""``rat-ext serve`` refuses what it cannot serve."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch

import rat_ext
from rat_ext import cli, models


def test_errors_of_serve(
    served: Path,
    detector: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(served)
    torch.save(models.create("digits-cnn").state_dict(), tmp_path / "bare.pt")
    (tmp_path / "names.txt").write_text("a\nb\n")
    good = ["--checkpoint", str(served / "model.pt")]
    gate = str(detector)
    bare = ["--checkpoint", str(tmp_path / "bare.pt")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in [
            ([], "give the --checkpoint of the model, or --pretrained"),
            (["--model", "resnet20"], "give the --checkpoint of the model, or --pretrained"),
            (good, "give the --input-size of served:build, for example 3x224x224"),
            ([*good, "--input-size", "8x"], "--input-size is '8x'; expected sizes such as"),
            ([*good, "--input-size", "1x9x9"], "the model fails on an input of shape (1, 9, 9)"),
            (bare, "the checkpoint does not name its model: give --model"),
            ([*bare, "--model", "digits-cnn"], "the model does not name its classes"),
            ([*good, "--num-classes", "4"], "give the --input-size"),
            (
                [*good, "--input-size", "1x8x8", "--num-classes", "4"],
                "--num-classes is 4, but there are 3 names of classes",
            ),
            (
                [*good, "--input-size", "1x8x8", "--classes", str(tmp_path / "names.txt")],
                f"{served / 'model.pt'} does not fit the model",
            ),
            ([*good, "--max-batch", "0"], "--max-batch is 0"),
            ([*good, "--input-size", "1x8x8", "--rtol", "2"], "--rtol is 2.0"),
            ([*good, "--input-size", "1x8x8", "--bounds", "1", "0"], "--bounds is (1.0, 0.0)"),
            ([*good, "--input-size", "1x8x8", "--no-radius"], "there is neither a detector nor"),
            (
                [*good, "--input-size", "1x8x8", "--bounds", "0", "inf"],
                "--bounds is (0.0, inf); to serve they must be finite",
            ),
            (
                [*good, "--input-size", "1x8x8", "--bounds", "-1", "1", "--detector", gate],
                "the detector does not take all inputs within bounds = (-1, 1)",
            ),
            ([*good, "--input-size", "1x8x8", "--port", "70000"], "--port is 70000; it must be"),
            ([*good, "--input-size", "1x8x8", "--port", "-1"], "--port is -1; it must be from 0"),
            (
                [*good, "--input-size", "1x8x8", "--port", str(taken.getsockname()[1])],
                "cannot listen on 127.0.0.1, port",
            ),
            (
                [*good, "--input-size", "1x8x8", "--host", "no.such.host.invalid"],
                "cannot listen on no.such.host.invalid, port 8000",
            ),
        ]:
            assert cli.main(["serve", "--device", "cpu", *arguments]) == 2
            assert capsys.readouterr().err.startswith(f"rat-ext serve: error: {message}"), arguments


def test_a_missing_extra_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(rat_ext.serve, "app")
    monkeypatch.delitem(sys.modules, "rat_ext.serve.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", "--checkpoint", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rat-ext serve: error: serving needs fastapi: pip install ")
    assert error.endswith("pip install '.[serve]' in a clone of rat_ext)\n")
