"""RATLoss where a gradient is 0, and on targets just outside the classes."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp, uniform
from torch import Tensor, nn

from rat_ext import RATLoss


@pytest.mark.parametrize("steps", [1, 3])
def test_what_has_no_gradient_stays(steps: int) -> None:
    """The model looks at the first half of the elements only."""

    class Blinkered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp(features=6)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.detach().clone())
            logits: Tensor = self.model(x[:, :6])
            return logits

    model, x = Blinkered(), uniform(9, 12) * 0.8 + 0.1
    RATLoss(eps=0.05, steps=steps)(model, x, torch.arange(9) % 4)
    moved = model.seen[-1] - x
    assert torch.equal(moved[:, 6:], torch.zeros(9, 6, dtype=torch.float64))
    assert (moved[:, :6] != 0).any()


@pytest.mark.parametrize("target", [-1, 4])
def test_targets_next_to_the_classes(target: int) -> None:
    t = torch.tensor([0, target, 3])
    with pytest.raises(ValueError, match=r"t has classes from .* but the model has 4 classes"):
        RATLoss()(mlp(), uniform(3, 12), t)


def test_the_default_step_reaches_the_edge_from_anywhere_in_the_ball() -> None:
    sizes = [RATLoss(eps=0.1, steps=steps).step_size for steps in (1, 2, 5)]
    assert sizes == pytest.approx([0.1, 0.125, 0.05])
