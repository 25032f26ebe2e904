"""`x_adv`: the points at which the searches saw the prediction change."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attack_helpers import ALL, OURS, SEARCHES, Recorder, blob, distance
from helpers import RowExact, assert_identical, cnn, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from rat_ext import RadiusResult, reference, robust_radius, temperature_sweep
from rat_ext.search import place
from rat_ext.search.result import concatenate


def assert_points_are_right(model, x, result, bounds=(0.0, 1.0), rounding=1e-12):
    """Within `upper` of x and the bounds, and of the class `flipped_to`."""
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == x.dtype
    assert torch.equal(result.is_adv, result.found)
    found = result.found
    away = distance(result.x_adv.double(), x.double(), result.norm)
    assert (away <= result.upper * (1 + rounding) + rounding)[found].all()
    assert (result.x_adv >= bounds[0]).all()
    assert (result.x_adv <= bounds[1]).all()
    assert torch.equal(model(result.x_adv).argmax(1)[found], result.flipped_to[found])
    assert torch.equal(result.x_adv[~found], x[~found])


@pytest.mark.parametrize("attack", [*ALL, pytest.param(blob, id="function")])
@settings(deadline=None, max_examples=8)
@given(**SEARCHES)
def test_points_are_within_upper_and_of_the_class(attack, n, classes, rtol, batch_size, seed):
    model, x = RowExact(classes=classes, seed=seed), uniform(n, 12, seed=seed)
    options = {"attack": attack, "rtol": rtol, "batch_size": batch_size}
    result = robust_radius(model, x, full="points", **options)
    assert_points_are_right(model, x, result)
    # Nothing else changes, but for the forward that verifies.
    without = robust_radius(model, x, full=True, **options)
    assert without.x_adv is without.is_adv is None
    assert_identical(result, without, rows_too=False)
    assert torch.equal(result.forward_rows, without.forward_rows + 1)


@pytest.mark.parametrize("attack", OURS)
@settings(deadline=None, max_examples=8)
@given(n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_reference_keeps_the_same_points(attack, n, seed):
    model, x = RowExact(seed=seed), uniform(n, 12, seed=seed)
    options = {"attack": attack, "rtol": 1e-3, "steps": 3 if "pgd" in attack else None}
    expected = reference.robust_radius(model, x, full="points", **options)
    assert_points_are_right(model, x, expected)
    result = robust_radius(model, x, full="points", search="bisect", **options)
    same = (result.upper / expected.upper - 1).abs() < 1e-9
    torch.testing.assert_close(result.x_adv[same], expected.x_adv[same], rtol=0, atol=1e-6)


@pytest.mark.parametrize("attack", OURS)
def test_points_of_another_range_and_of_bounds_of_each_feature(attack):
    model, x = mlp(seed=7), uniform(20, 12, seed=7) * 4 - 1

    def shifted(x):
        return model((x + 1) / 4)

    bounds = (torch.full((12,), -1.0), torch.linspace(3, 4, 12))
    for ends in [(-1, 3), bounds]:
        result = robust_radius(shifted, x, bounds=ends, attack=attack, full="points")
        assert_points_are_right(shifted, x, result, bounds=ends)
        assert result.found.any()


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_points_where_the_state_is_on_the_host(attack, monkeypatch):
    monkeypatch.setattr(place, "host_only", True)
    model, x = RowExact(seed=3), uniform(20, 12, seed=3)
    assert_points_are_right(model, x, robust_radius(model, x, attack=attack, full="points"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attack", OURS)
def test_points_of_lower_precisions(attack, dtype):
    """They are rounded to the dtype of x, and those that the model denies are told apart."""
    model, x = RowExact(seed=4), uniform(64, 12, seed=4).to(dtype)
    rtol = 0.15 if dtype == torch.bfloat16 else 0.05
    result = robust_radius(model, x, attack=attack, rtol=rtol, full="points")
    # Half a spacing at 1, in each element.
    rounding = torch.finfo(dtype).eps / 2 * (1 if result.norm == "linf" else math.sqrt(12))
    assert_points_are_right(model, x, result, rounding=2 * rounding)


def test_images_keep_their_memory_format():
    model, x = cnn().eval(), uniform(6, 3, 8, 8, dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    result = robust_radius(model, x, full="points", batch_size=4)
    assert result.x_adv.is_contiguous(memory_format=torch.channels_last)
    assert_points_are_right(model, x, result, rounding=1e-6)


def test_a_point_that_the_model_denies_is_told():
    """The model changes its mind: what it says in the last forward is what counts."""
    model, x = RowExact(), uniform(8, 12)
    recorder = Recorder(model)
    robust_radius(recorder, x, full=True)
    searched = len(recorder.inputs)
    calls = iter(range(searched + 1))
    fickle = Recorder(lambda x: model(x) * (1 if next(calls) < searched else -1))
    result = robust_radius(fickle, x, full="points")
    assert result.found.all()
    last = (-model(fickle.inputs[-1])).argmax(1)
    assert torch.equal(fickle.inputs[-1], result.x_adv)
    assert torch.equal(result.is_adv, last == result.flipped_to)
    assert not result.is_adv.all()


def test_rows_that_are_not_found_or_not_finite_have_x_itself():
    model, x = RowExact(), uniform(8, 12)
    x[3, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 8 rows"):
        result = robust_radius(model, x, eps_max=0.05, attack=["fgsm", "pgd"], full="points")
    assert 0 < result.found.sum() < 7
    assert torch.equal(result.is_adv, result.found)
    torch.testing.assert_close(result.x_adv[~result.found], x[~result.found], equal_nan=True)


def test_points_are_carried_by_slices_and_several_attacks():
    model, x = RowExact(), uniform(10, 12)
    parts = [robust_radius(model, part, full="points", attack="pgd") for part in x.split(4)]
    whole = robust_radius(model, x, full="points", attack="pgd")
    assert torch.equal(concatenate(parts).x_adv, whole.x_adv)
    assert torch.equal(whole[2:5].x_adv, whole.x_adv[2:5])
    assert torch.equal(whole[whole.found].is_adv, whole.is_adv[whole.found])
    several = robust_radius(model, x, full="points", attack=["fgsm", "pgd"])
    alone = [robust_radius(model, x, full="points", attack=name) for name in several.attacks]
    for row, won in enumerate(several.won):
        assert torch.equal(several.x_adv[row], alone[won].x_adv[row])


def test_no_rows_have_no_points():
    result = robust_radius(RowExact(), torch.empty(0, 12), full="points")
    assert result.x_adv.shape == (0, 12)
    assert result.is_adv.shape == (0,)


def test_points_that_cannot_be():
    recorder, x = Recorder(RowExact()), uniform(2, 12)
    with pytest.raises(ValueError, match="full='points' needs method 'bs'; 'fast' extrapolates"):
        robust_radius(recorder, x, full="points", method="fast")
    with pytest.raises(ValueError, match="full is 'point'; expected False, True or 'points'"):
        robust_radius(recorder, x, full="point")
    assert not recorder.inputs


def test_nothing_is_kept_that_was_not_asked_for():
    for result in temperature_sweep(RowExact(), uniform(4, 12), [1.0], attack="pgd"):
        kept = [getattr(result, field.name) for field in dataclasses.fields(RadiusResult)]
        assert all(each.ndim == 1 for each in kept if isinstance(each, torch.Tensor))
