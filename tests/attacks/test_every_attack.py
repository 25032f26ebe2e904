"""What every attack promises, ours, those of other libraries and functions."""

from __future__ import annotations

import math

import pytest
import torch
from attack_helpers import ALL, OTHERS, OURS, Recorder, blob, needs
from helpers import RowExact, assert_identical, cnn, mlp, uniform
from torch import Tensor

from rat_ext import robust_radius, scores, temperature_sweep


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("model", [mlp(seed=2), RowExact(seed=2)], ids=["mlp", "smooth"])
def test_every_radius_is_an_upper_bound_seen_to_change_the_prediction(attack, model):
    """A point at which the prediction has changed was probed, no further from x than `upper`."""
    x = uniform(15, 12, seed=2)
    recorder = Recorder(model)
    result = robust_radius(recorder, x, attack=attack, rtol=1e-3, full=True)
    assert result.norm == ("l2" if attack.endswith("_l2") else "linf")
    y = model(x).argmax(1)
    assert torch.equal(result.prediction, y)
    assert result.found.float().mean() > 0.7
    seen = torch.cat(recorder.inputs)
    away = (seen[None] - x[:, None]).norm(dim=2, p=math.inf if result.norm == "linf" else 2)
    away = away.masked_fill(model(seen).argmax(1)[None] == y[:, None], math.inf)
    nearest = away.min(1).values
    found = result.found
    assert (nearest <= result.upper + 1e-12)[found].all()
    assert ((result.lower <= result.radius) & (result.radius <= result.upper)).all()
    width = result.upper - result.lower.clamp_min(2.0**-24)
    assert (width <= 1e-3 * result.upper)[found].all()
    assert (result.radius[~found] == math.inf).all()
    assert ((result.flipped_to != y) & (result.flipped_to >= 0))[found].all()


@pytest.mark.parametrize("attack", OURS[1:])
def test_order_and_chunks_of_a_batch_change_nothing(attack):
    model, x = RowExact(), uniform(24, 12)
    options = {"attack": attack, "full": True}
    whole = robust_radius(model, x, **options)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert_identical(robust_radius(model, x[order], **options), whole[order])
    for batch_size in (5, 1000):
        assert_identical(robust_radius(model, x, batch_size=batch_size, **options), whole)
    parts = [robust_radius(model, part, **options) for part in x.split(11)]
    assert torch.equal(torch.cat([part.radius for part in parts]), whole.radius)
    assert torch.equal(torch.cat([part.backward_rows for part in parts]), whole.backward_rows)


@pytest.mark.parametrize("attack", [*ALL, pytest.param(blob, id="function")])
def test_rows_are_those_that_the_model_sees(attack):
    recorder, x = Recorder(mlp()), uniform(20, 12)
    result = robust_radius(recorder, x, attack=attack, full=True)
    assert recorder.forward_rows == 20 + int(result.forward_rows.sum())
    assert recorder.backward_rows == 20 + int(result.backward_rows.sum())


@pytest.mark.parametrize("attack", [*OTHERS, pytest.param(blob, id="function")])
def test_the_model_and_the_rng_are_left_as_they_were(attack):
    model, x = cnn(), uniform(6, 3, 8, 8, dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = robust_radius(model, x, attack=attack)
    with torch.inference_mode():
        again = robust_radius(model, x.clone(), attack=attack)
    assert torch.equal(first, again)  # no random start, and no dropout
    assert not first.requires_grad
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())


@pytest.mark.parametrize("attack", [*OTHERS, pytest.param(blob, id="function")])
def test_a_row_that_is_not_finite_leaves_the_others_alone(attack):
    model, x = RowExact(), uniform(8, 12)
    clean = robust_radius(model, x, attack=attack)
    x[3, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 8 rows"):
        result = robust_radius(model, x, attack=attack)
    others = torch.arange(8) != 3
    assert result[3].isnan()
    torch.testing.assert_close(result[others], clean[others], rtol=1e-2, atol=0)


@pytest.mark.parametrize("attack", ["fgsm_l2", "pgd", *needs("fmn", "fab_l2")])
def test_bounds_scale_the_radii(attack):
    model, x = mlp(seed=7), uniform(20, 12, seed=7)
    expected = robust_radius(model, x, attack=attack)
    result = robust_radius(lambda x: model((x + 1) / 4), x * 4 - 1, bounds=(-1, 3), attack=attack)
    assert torch.equal(result.isfinite(), expected.isfinite())
    found = expected.isfinite()
    torch.testing.assert_close(result[found] / 4, expected[found], rtol=2e-2, atol=0)


@pytest.mark.parametrize("attack", ["fgsm_l2", *needs("deepfool")])
def test_several_probes_a_round_find_the_same(attack):
    model, x = mlp(seed=8), uniform(20, 12, seed=8)
    one = robust_radius(model, x, attack=attack, rtol=1e-3)
    several = robust_radius(model, x, attack=attack, rtol=1e-3, probes=4)
    same = torch.isclose(one, several, rtol=2e-3)
    assert same.float().mean() >= 0.9  # a ray may cross the boundary more than once


@pytest.mark.parametrize("attack", OURS[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precisions(attack, dtype):
    model, x = mlp(seed=3), uniform(60, 12, seed=3).to(dtype)
    rtol = 0.15 if dtype == torch.bfloat16 else 0.01  # it has no finer steps
    expected = robust_radius(model, x.double(), attack=attack, rtol=rtol)
    result = robust_radius(model.to(dtype), x, attack=attack, rtol=rtol)
    assert result.dtype == torch.float32
    both = result.isfinite() & expected.isfinite()
    assert both.float().mean() > 0.8
    error = (result[both].double() / expected[both]).log().abs().median()
    assert error < (0.2 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("attack", OURS[1:])
def test_a_constant_model_has_no_boundary(attack):
    def constant(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * torch.tensor([0.0, 0.0]) + torch.tensor([1.0, 0.0])

    result = robust_radius(constant, torch.rand(3, 4), attack=attack, full=True)
    assert (result.radius == math.inf).all()
    assert not result.found.any()


@pytest.mark.parametrize("attack", ["pgd", "fgsm_l2", blob, ["fgsm", "pgd"]])
def test_temperature_sweep_equals_single_calls(attack):
    model, x = RowExact(), uniform(10, 12)
    temperatures = [0.2, 3.0]
    results = temperature_sweep(model, x, temperatures, attack=attack)
    for temperature, result in zip(temperatures, results, strict=True):
        single = robust_radius(model, x, attack=attack, temperature=temperature)
        torch.testing.assert_close(result.radius, single, rtol=1e-2, atol=0)


def test_scores_take_attacks():
    recorder, x = Recorder(mlp()), uniform(20, 12)
    score = scores.get("rr-bs", attack="pgd", steps=5, temperature=1.0)
    assert math.isnan(score.backward_rows)
    expected = robust_radius(recorder.model, x, attack="pgd", steps=5, rtol=0.05)
    assert torch.equal(score.score(recorder, x), expected)
    assert score.forward_rows * 20 == pytest.approx(recorder.forward_rows)
    assert score.backward_rows * 20 == pytest.approx(recorder.backward_rows)
    loader = [(x, torch.arange(20) % 4)]
    tuned = scores.get("rr-bs", attack="pgd", steps=2, temperature=[0.5, 2.0])
    assert tuned.fit(recorder.model, loader, progress=False).temperature in (0.5, 2.0)
    with pytest.raises(ValueError, match=r"method 'fast' .* not 'pgd'; use method='bs'"):
        scores.get("rr-fast", attack="pgd", temperature=1.0).score(recorder.model, x)
