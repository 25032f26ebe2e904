"""Training, evaluation and the detector on a GPU. Needs neither hypothesis nor any data."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_helpers import NEEDS_GPU
from helpers import RowExact, uniform
from torch import nn

from rat_ext import Cascade, Detector, datasets, evaluation, models, training

pytestmark = NEEDS_GPU


def images(count: int = 300) -> datasets.Images:
    """Noise whose class is that of the brightest of ten columns of pixels."""
    pixels = uniform(count, 1, 8, 8, dtype=torch.float32)
    return datasets.Images(
        pixels, pixels[:, 0, :5].flatten(1)[:, ::4].argmax(1), tuple("abcdefghij")
    )


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.create("digits-cnn")


@pytest.mark.parametrize("loss", ["ce", "rat"])
def test_training(loss, tmp_path):
    recipe = training.Recipe(loss=loss, epochs=2, batch_size=50, lr=0.01, eps=0.01)
    data = images()
    expected = training.train(network(), data, recipe, progress=False)
    result = training.train(network().cuda(), data, recipe, out=tmp_path, progress=False)
    for row, other in zip(result.history, expected.history, strict=True):
        assert row == pytest.approx(other, rel=0.02, abs=0.01)
    for parameter, other in zip(
        result.model.parameters(), expected.model.parameters(), strict=True
    ):
        assert parameter.is_cuda
        torch.testing.assert_close(parameter.cpu(), other, rtol=0.02, atol=2e-3)
    again = training.train(network().cuda(), data, recipe, out=tmp_path, progress=False)
    assert again.history == result.history  # from the checkpoint


def test_all_options_of_training():
    recipe = training.Recipe(
        epochs=2, batch_size=50, lr=0.01, eps=0.01, steps=2, warmup=1, augment="crop-flip",
        mixup=0.4, bf16=True, ema=0.9,
    )  # fmt: skip
    gpu_state = torch.cuda.get_rng_state()
    history = training.train(network().cuda(), images(), recipe, progress=False).history
    assert all(math.isfinite(row["loss"]) for row in history)
    assert torch.equal(torch.cuda.get_rng_state(), gpu_state)


def test_evaluation(tmp_path):
    settings = evaluation.Settings(("msr", "odin", "rr-fast", "rr-bs"), splits=2, batch_size=64)
    runs = {
        device: evaluation.evaluate(
            network().to(device), images(), settings, tmp_path / device, progress=False
        )
        for device in ("cpu", "cuda")
    }
    assert torch.equal(runs["cuda"].correct, runs["cpu"].correct)
    for result, other in zip(runs["cuda"].results, runs["cpu"].results, strict=True):
        for row, other_row in zip(result.splits, other.splits, strict=True):
            assert row == pytest.approx(other_row, abs=0.02), result.name


@pytest.mark.parametrize("score", ["msr", "rr-bs", Cascade("msr", "rr-bs")], ids=str)
def test_detector(score):
    x = uniform(400, 12)
    target = RowExact()(x).argmax(1)
    target[::5] = (target[::5] + 1) % 4
    decisions = []
    for device in ("cpu", "cuda"):
        loader = [
            (part, t) for part, t in zip(x.to(device).split(64), target.split(64), strict=True)
        ]
        model = RowExact().to(device)
        detector = Detector.fit(model, loader, score, coverage=0.8, calibrate=True)
        decisions.append(detector(x.to(device)))
    cpu, gpu = decisions
    assert torch.equal(gpu.prediction.cpu(), cpu.prediction)
    torch.testing.assert_close(gpu.confidence.cpu(), cpu.confidence, rtol=0.02, atol=1e-6)
    assert (gpu.accepted.cpu() == cpu.accepted).double().mean() > 0.97
    for field in ("prediction", "confidence", "accepted", "probability"):
        assert getattr(gpu, field).is_cuda
