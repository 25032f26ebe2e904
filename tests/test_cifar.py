"""Radii of a trained CIFAR-10 ResNet-20, where it and the images are at hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rat_ext import datasets, models, reference, robust_radius
from rat_ext.search.checked import Options

RTOL = 2.0**-10


@pytest.fixture(scope="module")
def resnet20(shared: Path) -> nn.Module:
    model = models.create("resnet20")
    models.load_weights(model, shared / "models" / "cifar10-jpeg-resnet20.pt")
    return model.eval()


@pytest.fixture(scope="module")
def images(shared: Path) -> Tensor:
    x, _ = datasets.jpeg_archive(shared / "data" / "cifar10-jpeg-test.npz", 1000)[:]
    return x


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_float32_radii_are_those_of_the_float64_reference(resnet20, images, temperature):
    """On 250 images, for the sake of time; benchmarks/agreement.py has 1,000."""
    options = {"rtol": RTOL, "temperature": temperature}
    images = images[:250]
    exact = copy.deepcopy(resnet20).double()
    expected = reference.robust_radius(exact, images.double(), **options)
    for search in ("interpolate", "bisect"):
        radius = robust_radius(resnet20, images, search=search, **options)
        off = ~torch.isclose(radius.double(), expected, rtol=1e-2, atol=0)
        assert off.sum() <= 1, search


@torch.no_grad()
def test_every_bracket_holds(resnet20, images):
    result = robust_radius(resnet20, images, rtol=RTOL, batch_size=250, full=True)
    assert result.found.all()
    assert (result.upper - result.lower <= RTOL * result.upper).all()
    options = Options.checked(images)
    rows = torch.arange(len(images))
    # Ends so near the boundary that float32 cannot tell the classes apart again.
    undecided = torch.zeros(len(images), dtype=torch.bool)
    for i in rows.split(250):
        direction, _, y = reference.fgsm_direction(resnet20, images[i], 1.0)
        assert torch.equal(y, result.prediction[i])
        for end, holds in ((result.lower[i], True), (result.upper[i], False)):
            z = resnet20(reference.on_ray(images[i], direction, end, options))
            top = z.topk(2).values
            near = top[:, 0] - top[:, 1] < 2e-5
            undecided[i] |= near
            assert (((z.argmax(1) == y) == holds) | near).all()
    assert undecided.float().mean() < 0.03
