"""The CIFAR-10 images and nets that the benchmarks run on, where they are at hand."""

import argparse
import os
from pathlib import Path

from torch import Tensor, nn

from rat_ext import datasets, models


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


def load_test_images(shared: Path, count: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) float32 pixels in [0, 1] and (N,) targets of the first test images."""
    return datasets.jpeg_archive(shared / "data" / "cifar10-jpeg-test.npz", count)[:]
