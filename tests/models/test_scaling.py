"""Temperature and vector scaling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from rat_ext import metrics, robust_radius, scores
from rat_ext.models import TemperatureScaling, VectorScaling


def data(scale: float, seed: int = 0, count: int = 400):
    """Logits that are `scale` times those that drew the targets."""
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    return scale * honest, target


@settings(max_examples=15, deadline=None)
@given(scale=st.sampled_from([0.3, 1.0, 5.0]), seed=st.integers(0, 20))
def test_the_temperature_makes_the_targets_most_likely(scale, seed):
    logits, target = data(scale, seed)
    model = TemperatureScaling(nn.Identity()).fit([(logits, target)], progress=False)

    def nll(log_t):
        z = logits.numpy() / np.exp(log_t)
        return float(np.mean(np.logaddexp.reduce(z, 1) - z[np.arange(len(z)), target.numpy()]))

    best = minimize(lambda p: nll(p[0]), [0.0], method="Nelder-Mead", options={"xatol": 1e-9})
    assert model.temperature == pytest.approx(np.exp(best.x[0]), rel=1e-4)
    assert model.temperature == pytest.approx(scale, rel=0.4)
    assert torch.equal(model(logits).argmax(1), logits.argmax(1))
    assert F.cross_entropy(model(logits), target) <= F.cross_entropy(logits, target) + 1e-12


def test_an_over_confident_model_becomes_calibrated():
    logits, target = data(5.0)
    model = TemperatureScaling(nn.Identity()).fit(
        [(logits[:200], target[:200]), (logits[200:], target[200:])], progress=False
    )
    fresh, answers = data(5.0, seed=1)
    before, after = (metrics.ece(z.softmax(1), answers) for z in (fresh, model(fresh)))
    assert after < before / 2


def test_vector_scaling_finds_what_each_class_needs():
    honest, target = data(1.0, count=4000)
    weight, bias = torch.tensor([0.5, 1.0, 2.0, 1.5]), torch.tensor([1.0, 0.0, -1.0, 0.0])
    logits = ((honest - bias) / weight).double()
    model = VectorScaling(nn.Identity(), 4).fit([(logits, target)], progress=False)
    scaled = model(logits)
    assert F.cross_entropy(scaled, target) <= F.cross_entropy(honest, target)
    assert F.cross_entropy(scaled, target) < F.cross_entropy(logits, target) - 0.05
    torch.testing.assert_close(model.weight, weight, rtol=0.2, atol=0.1)
    with pytest.raises(ValueError, match="num_classes is 3, but the model has 4 logits"):
        VectorScaling(nn.Identity(), 3).fit([(logits, target)], progress=False)


def test_it_is_a_model_like_any_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    x, target = torch.rand(60, 6), torch.arange(60) % 4
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scaling = TemperatureScaling(model).fit([{"pixel_values": x, "labels": target}], progress=False)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(scaling(x), model(x) / scaling.temperature)
    again = TemperatureScaling(model)
    again.load_state_dict(scaling.state_dict())
    assert torch.equal(again(x), scaling(x))
    # The boundary is where it was.
    radius = robust_radius(scaling, x, temperature=1 / scaling.temperature, rtol=1e-3)
    torch.testing.assert_close(radius, robust_radius(model, x, rtol=1e-3), rtol=2e-3, atol=0)
    assert scores.get("msr").score(scaling, x).shape == (60,)
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        TemperatureScaling(model, 0)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        TemperatureScaling(model).fit([], progress=False)
