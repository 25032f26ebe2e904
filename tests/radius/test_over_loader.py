"""Radii of whole loaders."""

from __future__ import annotations

import pytest
import torch
from helpers import RowExact, uniform

from rat_ext import robust_radii, robust_radius


def test_robust_radii_runs_over_a_loader(capsys):
    model, x = RowExact(), uniform(25, 12)
    t = torch.arange(25) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, t), batch_size=8)
    radii = robust_radii(model, loader)
    assert "robust radius" in capsys.readouterr().err
    assert torch.equal(radii.target, t)
    assert torch.equal(radii.radius, robust_radius(model, x))
    assert torch.equal(radii.prediction, model(x).argmax(1))
    alone = robust_radii(model, x.split(10), progress=False, method="fast")
    assert capsys.readouterr().err == ""
    assert alone.target is None
    assert torch.equal(alone.radius, robust_radius(model, x, method="fast"))
    with pytest.raises(ValueError, match="the loader gave no batch"):
        robust_radii(model, [], progress=False)
