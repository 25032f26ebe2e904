"""Attacks of other libraries, and functions of the user's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from attack_helpers import LIBRARY, Recorder, blob
from helpers import RowExact, mlp, uniform

from rat_ext import robust_radius


@pytest.mark.parametrize("attack", LIBRARY)
def test_libraries_find_about_what_pgd_does(attack):
    model, x = mlp(seed=3), uniform(40, 12, seed=3, dtype=torch.float32)
    model = model.float()
    ours = robust_radius(model, x, attack="pgd_l2" if attack.endswith("_l2") else "pgd")
    theirs = robust_radius(model, x, attack=attack)
    both = ours.isfinite() & theirs.isfinite()
    assert both.float().mean() > 0.8
    assert 0.7 < (theirs / ours)[both].median() < 1.3


@pytest.mark.parametrize("attack", LIBRARY)
def test_chunks_change_the_libraries_radii_by_rounding_only(attack):
    model, x = mlp(seed=6), uniform(12, 12, seed=6)
    whole = robust_radius(model, x, attack=attack)
    parts = robust_radius(model, x, attack=attack, batch_size=5)
    # FMN may converge onto the boundary from within; whether it ever crosses is rounding, too.
    both = parts.isfinite() & whole.isfinite()
    assert both.sum() >= (11 if attack.startswith("fmn") else 12)
    torch.testing.assert_close(parts[both], whole[both], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("attack", LIBRARY)
def test_libraries_take_the_number_of_steps(attack):
    model, x = RowExact(), uniform(10, 12)
    few, more = (robust_radius(model, x, attack=attack, steps=n, full=True) for n in (1, 3))
    assert (few.backward_rows < more.backward_rows).all()


def test_a_function_chooses_the_ray_that_is_searched():
    model, x = RowExact(), uniform(20, 12)
    expected = robust_radius(model, x, full=True)
    result = robust_radius(model, x, attack=blob, full=True)
    assert result.attacks == ("blob",)
    # One step of FGSM that overshoots far: what counts is where its ray first changes.
    both = expected.found & result.found
    assert both.float().mean() > 0.6
    assert (result.radius <= 0.5).logical_or(~result.found).all()
    assert (result.backward_rows == 1).all()
    in_l2 = robust_radius(model, x, attack=blob, norm="l2", full=True)
    assert in_l2.norm == "l2"
    assert (in_l2.radius >= result.radius * 0.98)[both & in_l2.found].all()
    nothing = robust_radius(model, x, attack=lambda model, x, y: x, full=True)
    assert not nothing.found.any()


def test_the_first_probes_divide_the_way_to_the_point_that_was_found():
    recorder, x = Recorder(RowExact()), uniform(1, 12)
    robust_radius(recorder, x, attack=blob, probes=4)
    shares = torch.arange(1, 5, dtype=x.dtype)[:, None] / 4
    way = blob(recorder.model, x, recorder.model(x).argmax(1)) - x
    torch.testing.assert_close(recorder.inputs[2], x + shares * way)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attack, library in (("fmn", "foolbox"), ("best", "foolbox"), ("fab_l2", "torchattacks")):
        with pytest.raises(ImportError, match=f"needs {library}: pip install {library}$"):
            robust_radius(RowExact(), uniform(4, 12), attack=attack)


@pytest.mark.parametrize("returned", [lambda x: x[:2], lambda x: x.tolist()])
def test_a_function_must_return_inputs(returned):
    with pytest.raises(ValueError, match=r"attack '<lambda>' returned .*; expected .* \(4, 12\)"):
        robust_radius(RowExact(), uniform(4, 12), attack=lambda model, x, y: returned(x))
