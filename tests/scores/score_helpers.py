"""What the tests of scores share: a model, inputs, held-out data, and the softmax."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rat_ext import scores

BUILT_IN = [
    "msr",
    "max-logit",
    "margin",
    "negative-entropy",
    "energy",
    "odin",
    "doctor-alpha",
    "doctor-beta",
    "rel-u",
    "rr-bs",
    "rr-fast",
]
PERTURBED = ("odin", "doctor-alpha", "doctor-beta")
CLASSES, FEATURES = 4, 6


class Counting(nn.Module):
    """A small classifier in train mode, with buffers and randomness that a score must not touch."""

    def __init__(self, scale=1.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 16),
            nn.BatchNorm1d(16),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(16, CLASSES),
        ).to(dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.scale = scale
        self.rows = 0
        self.seen = []

    def forward(self, x):
        self.rows += len(x)
        self.seen.append(x.detach())
        return self.scale * self.layers(x)


def inputs(n=40, dtype=torch.float64):
    return torch.rand(n, FEATURES, dtype=dtype, generator=torch.Generator().manual_seed(7))


def held_out(n=60, batch_size=25, dtype=torch.float64):
    """A loader of inputs whose targets are the predictions of `Counting`, a third of them wrong."""
    x = inputs(n, dtype)
    target = Counting(dtype=dtype).eval()(x).argmax(1)
    target[::3] = (target[::3] + 1) % CLASSES
    return DataLoader(TensorDataset(x, target), batch_size=batch_size)


def make(name, **options):
    """A score at a single setting, fitted if it must be."""
    if name in PERTURBED:
        options = {"temperature": 1.5, "perturbation": 0.01, **options}
    if name in ("rel-u", "rr-bs", "rr-fast"):
        options = {"temperature": 1.5, **options}
    score = scores.get(name, **options)
    return score.fit(Counting(), held_out(), progress=False) if name == "rel-u" else score


def softmax(logits, temperature=1.0):
    return torch.from_numpy(
        np.stack([np.exp(row) / np.exp(row).sum() for row in logits.numpy() / temperature])
    )
