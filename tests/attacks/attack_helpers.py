"""What the tests of the attacks share."""

from __future__ import annotations

import importlib.util
import math

import pytest
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import attacks
from rat_ext.search.attack import ATTACKS, BEST

OURS = ["fgsm", "fgsm_l2", "pgd", "pgd_l2"]
SEARCHES = {
    "n": st.integers(1, 12),
    "classes": st.integers(2, 6),
    "rtol": st.sampled_from([0.1, 1e-2, 1e-6]),
    "batch_size": st.sampled_from([None, 5]),
    "seed": st.integers(0, 1000),
}
"""Drawn for the properties of any search."""


def needs(*names: str) -> list:
    """Parameters that are skipped where an attack's library is missing."""
    marked = []
    for name in names:
        parts = BEST.get(name, (name,))
        absent = {ATTACKS[part].library for part in parts} - {None}
        absent = [library for library in absent if importlib.util.find_spec(library) is None]
        reason = f"{', '.join(absent)} is not installed"
        marked.append(pytest.param(name, marks=pytest.mark.skipif(bool(absent), reason=reason)))
    return marked


ALL = needs(*attacks.names())
OTHERS = needs(*(name for name in attacks.names() if name != "fgsm"))
"""All but fgsm, of which tests/radius has the same test."""


LIBRARY = needs(*(name for name, attack in ATTACKS.items() if attack.library))


class Recorder(nn.Module):
    """Keeps the inputs that a model gets, and counts rows forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inputs: list[Tensor] = []
        self.backward_rows = 0

    @property
    def forward_rows(self) -> int:
        return sum(map(len, self.inputs))

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient: Tensor) -> None:
        self.backward_rows += len(gradient)


def distance(x: Tensor, y: Tensor, norm: str) -> Tensor:
    return (x - y).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)


def blob(model, x: Tensor, y: Tensor) -> Tensor:
    """An attack of the user's: one large step up the cross-entropy, leaving gradients behind."""
    leaf = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    return (x + 0.5 * leaf.grad.sign()).clamp(0, 1)
