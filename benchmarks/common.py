"""What the benchmarks share: the CIFAR-10 images and nets, where at hand, and paired intervals."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from rat_ext import datasets, models
from rat_ext.metrics.bootstrap import Floats, bootstrap
from rat_ext.metrics.paired import stacked


def shared_folder(path: str | None = None) -> Path:
    """The folder with data/ and models/: `path`, or $RAT_EXT_SHARED, or ../shared."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(path or os.environ.get("RAT_EXT_SHARED") or default)
    if path and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    return folder


def load_model(shared: Path, name: str) -> nn.Module:
    """The trained CIFAR ResNet `name` ("resnet20" or "resnet56"), in eval mode."""
    model = models.create(name)
    models.load_weights(model, shared / "models" / f"cifar10-jpeg-{name}.pt")
    return model.eval()


def load_checkpoints(named: Iterable[str]) -> dict[str, nn.Module]:
    """The ResNet-20 of each checkpoint, given as NAME=FILE or as FILE, in eval mode."""
    nets = {}
    for each in named:
        name, _, path = each.rpartition("=")
        model = models.create("resnet20")
        models.load_weights(model, path)
        nets[name or Path(path).stem] = model.eval()
    return nets


def load_test_images(shared: Path, count: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) float32 pixels in [0, 1] and (N,) targets of the first test images."""
    return datasets.jpeg_archive(shared / "data" / "cifar10-jpeg-test.npz", count)[:]


def resampled(measured: Iterable[tuple], resamples: int) -> Floats:
    """(K, resamples): K metrics of samples, all on the same resamples of them.

    Args:
        measured: (metric, confidence, correct) each, as `rat_ext.metrics` takes them.
    """
    every = stacked([metric.__wrapped__(*of) for metric, *of in measured])
    return bootstrap(every, resamples, seed=0).T


def interval(draws: Floats) -> list[float]:
    """The 95 % percentile interval; resamples where the metric is undefined are left out."""
    return [float(v) for v in np.nanquantile(draws, [0.025, 0.975])]
