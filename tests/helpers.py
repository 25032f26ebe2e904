"""Small models, and comparisons of results, that the tests share."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from rat_ext import RadiusResult

FIELDS = ["radius", "lower", "upper", "found", "prediction", "flipped_to"]


class RowExact(nn.Module):
    """A smooth classifier whose result for a row does not depend on the rest of the batch.

    Not even to the bit, unlike matrix products, whose rounding may depend on the batch size.
    """

    def __init__(self, features: int = 12, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (classes, features)
        self.weight = nn.Parameter(3 * torch.randn(shape, generator=generator).double())
        self.shift = nn.Parameter(torch.randn(shape, generator=generator).double())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, None, :]
        return torch.sin(x * self.weight.to(x.dtype) + self.shift.to(x.dtype)).sum(-1)


def mlp(features: int = 12, classes: int = 4, seed: int = 0) -> nn.Module:
    """A float64 multi-layer perceptron with random weights, large enough that radii are small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, classes)
        ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    return model.eval()


def cnn(classes: int = 5, seed: int = 0) -> nn.Module:
    """A float32 convolutional net with batch normalisation and dropout, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, classes),
        ).train()


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs in [0, 1], some elements exactly at the bounds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    return x.clamp(0, 1).to(dtype)


class WithLogits(nn.Module):
    """Returns an object with ``.logits``, as transformers' models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(x))


def assert_identical(a: RadiusResult, b: RadiusResult, rows_too: bool = True) -> None:
    """To the bit, and with `rows_too` what they cost as well."""
    costs = ["forward_rows", "fallbacks", "worst_case_rows"] if rows_too else []
    for name in FIELDS + costs:
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True, msg=name
        )
