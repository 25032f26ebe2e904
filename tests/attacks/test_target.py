"""``target`` as a tensor: a class for each sample, and nothing but that class counts."""

from __future__ import annotations

import math

import pytest
import torch
from attack_helpers import OURS, SEARCHES, Recorder, blob
from helpers import FIELDS, RowExact, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from test_points import assert_points_are_right

from rat_ext import RadiusEstimator, reference, robust_radii, robust_radius, temperature_sweep
from rat_ext.search import place


def targets(n: int, classes: int, seed: int) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attack", OURS)
@settings(deadline=None, max_examples=15)
@given(**SEARCHES)
def test_only_the_target_counts(attack, n, classes, rtol, batch_size, seed):
    model, x = RowExact(classes=classes, seed=seed), uniform(n, 12, seed=seed)
    target = targets(n, classes, seed)
    options = {"attack": attack, "rtol": rtol, "batch_size": batch_size, "full": "points"}
    result = robust_radius(model, x, target=target, **options)
    assert_points_are_right(model, x, result)
    assert torch.equal(result.prediction, model(x).argmax(1))
    assert torch.equal(result.flipped_to, target.where(result.found, -1))
    assert (result.upper - result.lower <= rtol * result.upper)[result.found].all()
    there = result.prediction == target
    assert torch.equal(result.radius == 0, there)
    assert torch.equal(result.x_adv[there], x[there])
    assert (result.forward_rows[there] == 1).all()  # that of the verification


@pytest.mark.parametrize("attack", OURS)
@pytest.mark.parametrize("on_host", [False, True])
def test_plain_bisection_is_the_reference(attack, on_host, monkeypatch):
    monkeypatch.setattr(place, "host_only", on_host)
    for seed in range(8):
        model, x = RowExact(classes=5, seed=seed), uniform(9, 12, seed=seed)
        steps = 3 if "pgd" in attack else None
        options = {"attack": attack, "steps": steps, "rtol": 1e-3, "temperature": 2.0}
        options |= {"target": targets(9, 5, seed), "full": True, "batch_size": 4}
        result = robust_radius(model, x, search="bisect", **options)
        expected = reference.robust_radius(model, x, **options)
        for name in FIELDS:
            torch.testing.assert_close(
                getattr(result, name), getattr(expected, name), rtol=1e-9, atol=0, msg=name
            )


@settings(deadline=None, max_examples=15)
@given(classes=st.integers(2, 6), seed=st.integers(0, 1000))
def test_rr_fast_is_the_reference(classes, seed):
    model, x = mlp(classes=classes, seed=seed), uniform(9, 12, seed=seed)
    options = {"method": "fast", "target": targets(9, classes, seed), "full": True}
    result = robust_radius(model, x, **options)
    expected = reference.robust_radius(model, x, **options)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-6, atol=0, msg=name
        )


def test_two_classes_are_the_untargeted_radii():
    """The only other class is the target: its direction is that of the log-odds, too."""
    model, x = RowExact(classes=2), uniform(20, 12)
    other = 1 - model(x).argmax(1)
    for attack in OURS:
        result = robust_radius(model, x, attack=attack, target=other, rtol=1e-6)
        torch.testing.assert_close(
            result, robust_radius(model, x, attack=attack, rtol=1e-6), rtol=1e-5, atol=0
        )


def test_a_target_is_no_nearer_than_any_class():
    """Along one ray the first change cannot be further than the change to a class."""
    model, x = RowExact(), uniform(40, 12)
    runner_up = model(x).topk(2).indices[:, 1]
    targeted = robust_radius(model, x, attack="pgd", target=runner_up)
    anything = robust_radius(model, x, attack=["pgd", "pgd"], target="runner-up")
    assert (targeted >= 0.8 * anything).all()  # neither finds the nearest for sure
    assert targeted.isfinite().float().mean() > 0.9


def test_rows_that_are_not_finite_and_sweeps():
    model, x, target = RowExact(), uniform(8, 12), targets(8, 4, 0)
    clean = robust_radius(model, x, target=target)
    x[3, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 8 rows"):
        result = robust_radius(model, x, target=target, full=True)
    assert result.radius[3].isnan()
    assert (result.prediction[3], result.flipped_to[3]) == (-1, -1)
    others = torch.arange(8) != 3
    torch.testing.assert_close(result.radius[others], clean[others], rtol=1e-2, atol=0)
    (swept,) = temperature_sweep(model, x[others], [1.0], target=target[others])
    torch.testing.assert_close(swept.radius, clean[others], rtol=1e-2, atol=0)


def test_where_a_logit_is_infinite_there_is_no_radius():
    model, x = RowExact(), uniform(4, 12)

    def infinite(z):
        return torch.cat([model(z), torch.full((len(z), 1), -math.inf).to(z)], 1)

    target = model(x).argmax(1)  # radius 0, if it were finite
    with pytest.warns(RuntimeWarning, match="4 of 4 rows"):
        result = robust_radius(infinite, x, target=target, full=True)
    assert result.radius.isnan().all()
    assert not result.found.any()


X = uniform(4, 12)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "target is a tensor of torch.float32", {"target": torch.zeros(4)}),
        (ValueError, r"target has shape \(3,\) for 4", {"target": torch.tensor([0, 1, 2])}),
        (ValueError, "target has a class -1", {"target": torch.tensor([0, 1, 2, -1])}),
        (
            ValueError,
            "target is for .* got 'fgsm', 'blob'",
            {"target": torch.zeros(4, dtype=torch.int64), "attack": ["fgsm", blob]},
        ),
    ],
)
def test_targets_that_are_wrong(error, message, options):
    recorder = Recorder(RowExact())
    for call in (robust_radius, reference.robust_radius):
        with pytest.raises(error, match=message):
            call(recorder, X, **options)
    assert not recorder.inputs


def test_a_class_that_the_model_does_not_have():
    target = torch.tensor([0, 1, 2, 4])
    for call in (robust_radius, reference.robust_radius):
        with pytest.raises(ValueError, match="a class 4, but the model has 4: 0 to 3"):
            call(RowExact(), X, target=target)


def test_a_tensor_is_of_one_batch():
    target = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="a RadiusEstimator takes 'runner-up'"):
        RadiusEstimator(RowExact(), X, target=target)
    with pytest.raises(ValueError, match="robust_radii takes 'runner-up'"):
        robust_radii(RowExact(), [X], target=target)
