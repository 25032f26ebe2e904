"""The attacks: against the reference, and what each of them promises."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import FIELDS, RowExact, assert_identical, cnn, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import (
    RadiusEstimator,
    RadiusResult,
    attacks,
    reference,
    robust_radius,
    scores,
    temperature_sweep,
)
from rat_ext.attacks import pgd, rays
from rat_ext.search.attack import ATTACKS, BEST
from rat_ext.search.result import smallest

OURS = ["fgsm", "fgsm_l2", "pgd", "pgd_l2"]


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


# --- Against the reference ------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    attack=st.sampled_from(OURS[1:]),
    target=st.sampled_from([None, "runner-up"]),
    n=st.integers(1, 5),
    classes=st.integers(2, 7),
    smooth=st.booleans(),
    steps=st.integers(1, 6),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_plain_bisection_is_the_reference(
    attack, target, n, classes, smooth, steps, temperature, seed
):
    """In float64 the same probes and PGD steps are made, so even the number of rows agrees."""
    model = RowExact(classes=classes, seed=seed) if smooth else mlp(classes=classes, seed=seed)
    x = uniform(n, 12, seed=seed)
    options = {"attack": attack, "target": target, "temperature": temperature, "full": True}
    if attack.startswith("pgd"):
        options["steps"] = steps
    result = robust_radius(model, x, search="bisect", **options)
    expected = reference.robust_radius(model, x, **options)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-9, atol=0, msg=name
        )
    moved = result.forward_rows > 0  # the reference also probes the rays on which nothing moves
    for name in ("forward_rows", "backward_rows"):
        assert torch.equal(getattr(result, name)[moved], getattr(expected, name)[moved])
    assert result.norm == expected.norm
    assert result.attacks == expected.attacks == (attack,)


def test_a_targeted_fgsm_is_the_reference():
    model, x = mlp(seed=9), uniform(20, 12, seed=9)
    options = {"target": "runner-up", "full": True}
    for method in ("bs", "fast"):
        result = robust_radius(model, x, method=method, search="bisect", **options)
        expected = reference.robust_radius(model, x, method=method, **options)
        torch.testing.assert_close(result.radius, expected.radius, rtol=1e-7, atol=0)
    assert not torch.equal(robust_radius(model, x), robust_radius(model, x, target="runner-up"))


# --- What a radius says ---------------------------------------------------------------------------


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


@settings(deadline=None, max_examples=15)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    classes=st.integers(2, 6),
    target=st.sampled_from([None, "runner-up"]),
    seed=st.integers(0, 1000),
)
def test_pgd_is_never_above_fgsm(norm, classes, target, seed):
    model, x = mlp(classes=classes, seed=seed), uniform(12, 12, seed=seed)
    suffix = "" if norm == "linf" else "_l2"
    options = {"target": target, "full": True}
    fgsm = robust_radius(model, x, attack="fgsm" + suffix, **options)
    pgd = robust_radius(model, x, attack="pgd" + suffix, **options)
    assert (pgd.radius <= fgsm.radius).all()
    assert (pgd.upper <= fgsm.upper).all()
    assert (pgd.forward_rows >= fgsm.forward_rows).all()
    assert (pgd.forward_rows <= pgd.worst_case_rows).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), shift=st.floats(-3, 3), scale=st.floats(0.1, 10))
def test_an_affine_model_has_its_exact_distances(seed, shift, scale):
    """Where no bound is near, all of ours find |margin| / (dual norm of the weights)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, generator=generator, dtype=torch.float64) * scale
    x = 0.5 + 0.01 * torch.randn(8, 6, generator=generator, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        z = (x - 0.5) @ weight + shift * scale / 100
        return torch.stack([z, -z], 1) / 2

    margin = (model(x)[:, 0] - model(x)[:, 1]).abs()
    for attack, dual in (("fgsm", 1), ("pgd", 1), ("fgsm_l2", 2), ("pgd_l2", 2)):
        expected = margin / weight.norm(p=dual)
        near = expected < 0.3
        result = robust_radius(model, x, attack=attack, rtol=1e-5)
        torch.testing.assert_close(result[near], expected[near], rtol=1e-5, atol=2.0**-24)


def test_l2_radii_know_of_clipping_and_rotation():
    """A clipped step counts in full, so the radius bounds the distance; a rotation changes none."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        z = (x - 0.5) @ weight + 2
        return torch.stack([z, torch.zeros_like(z)], 1)

    x = torch.tensor([[0.0, 0.9]], dtype=torch.float64)  # the first element cannot go down
    recorder = Recorder(model=_Module(model))
    result = robust_radius(recorder, x, attack="fgsm_l2", rtol=1e-6, full=True)
    # Only the second moves, by 0.8 of the radius: z = 2.1 - 4 * 0.8 e.
    assert result.radius.item() == pytest.approx(2.1 / 3.2, rel=1e-6)
    assert distance(recorder.inputs[-1], x, "l2").item() <= result.upper.item()

    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    inner, points = mlp(seed=4), 0.3 * (uniform(20, 12, seed=4) - 0.5)
    wide = {"bounds": (-100, 100), "eps_max": 1.0, "rtol": 1e-4}
    for attack in ("fgsm_l2", "pgd_l2"):
        plain = robust_radius(inner, points, attack=attack, **wide)
        turned = robust_radius(
            lambda x: inner(x @ rotation), points @ rotation.T, attack=attack, **wide
        )
        torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-4)


class _Module(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("attack", LIBRARY)
def test_libraries_find_about_what_pgd_does(attack):
    model, x = mlp(seed=3), uniform(40, 12, seed=3, dtype=torch.float32)
    model = model.float()
    ours = robust_radius(model, x, attack="pgd_l2" if attack.endswith("_l2") else "pgd")
    theirs = robust_radius(model, x, attack=attack)
    both = ours.isfinite() & theirs.isfinite()
    assert both.float().mean() > 0.8
    assert 0.7 < (theirs / ours)[both].median() < 1.3


def test_projections_stay_in_the_ball():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(50, 3, 4, generator=generator, dtype=torch.float64)
    eps = torch.rand(50, 1, 1, generator=generator, dtype=torch.float64) * 4
    for norm in ("linf", "l2"):
        projected = pgd.project(steps, eps, norm)
        assert (distance(projected, torch.zeros(()), norm) <= eps.flatten() * (1 + 1e-12)).all()
        inside = distance(steps, torch.zeros(()), norm) <= eps.flatten()
        assert 0 < inside.sum() < 50
        torch.testing.assert_close(projected[inside], steps[inside])
    for scale in (1e-200, 1e200):  # whose squares under- and overflow
        units = rays.unit(steps * scale, "l2")
        torch.testing.assert_close(units.flatten(1).norm(dim=1), torch.ones(50).double())
        torch.testing.assert_close(
            rays.length(steps * scale, "l2") / scale, steps.flatten(1).norm(dim=1)
        )


# --- Promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", OURS)
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


@pytest.mark.parametrize("attack", LIBRARY)
def test_chunks_change_the_libraries_radii_by_rounding_only(attack):
    model, x = mlp(seed=6), uniform(12, 12, seed=6)
    whole = robust_radius(model, x, attack=attack)
    parts = robust_radius(model, x, attack=attack, batch_size=5)
    # FMN may converge onto the boundary from within; whether it ever crosses is rounding, too.
    both = parts.isfinite() & whole.isfinite()
    assert both.sum() >= (11 if attack.startswith("fmn") else 12)
    torch.testing.assert_close(parts[both], whole[both], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("attack", [*ALL, pytest.param(blob, id="function")])
def test_rows_are_those_that_the_model_sees(attack):
    recorder, x = Recorder(mlp()), uniform(20, 12)
    result = robust_radius(recorder, x, attack=attack, full=True)
    assert recorder.forward_rows == 20 + int(result.forward_rows.sum())
    assert recorder.backward_rows == 20 + int(result.backward_rows.sum())


def test_rows_that_are_done_leave_a_pgd():
    recorder, x = Recorder(RowExact()), uniform(30, 12)
    result = robust_radius(recorder, x, attack="pgd", batch_size=16, full=True)
    sizes = [len(rows) for rows in recorder.inputs]
    assert max(sizes) == 16
    assert min(sizes) == 1
    assert result.forward_rows.unique().numel() > 5


@pytest.mark.parametrize("attack", [*ALL, pytest.param(blob, id="function")])
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


@pytest.mark.parametrize("attack", [*ALL, pytest.param(blob, id="function")])
def test_a_row_that_is_not_finite_leaves_the_others_alone(attack):
    model, x = RowExact(), uniform(8, 12)
    clean = robust_radius(model, x, attack=attack)
    x[3, 2] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 8 rows"):
        result = robust_radius(model, x, attack=attack)
    others = torch.arange(8) != 3
    assert result[3].isnan()
    torch.testing.assert_close(result[others], clean[others], rtol=1e-2, atol=0)


def test_logits_that_turn_nan_in_a_pgd_fail_their_row_only():
    class Fragile(RowExact):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits.where((x[:, :1] == 0.25) | (x[:, :1] < 2), math.nan)

    class Armed(Fragile):
        def forward(self, x: Tensor) -> Tensor:
            bad = (x[:, 1:2] == 0.5) & (x[:, :1] != 0.25)  # the marked row, away from its start
            return super().forward(x).masked_fill(bad, math.nan)

    x = uniform(10, 12)
    x[4, 0], x[4, 1] = 0.25, 0.5
    hold = torch.ones(12, dtype=torch.float64)
    hold[1] = 0  # the mark does not move

    def through(model):
        return lambda x: model(x * hold + (x * (1 - hold)).detach())

    clean = robust_radius(through(RowExact()), x, attack="pgd")
    with pytest.warns(RuntimeWarning, match="1 of 10 rows"):
        result = robust_radius(through(Armed()), x, attack="pgd")
    others = torch.arange(10) != 4
    assert result[4].isnan()
    assert torch.equal(result[others], clean[others])


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


@pytest.mark.parametrize("attack", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precisions(attack, dtype):
    model, x = mlp(seed=3), uniform(60, 12, seed=3).to(dtype)
    rtol = 0.05 if dtype == torch.bfloat16 else 0.01  # it has no finer steps
    expected = robust_radius(model, x.double(), attack=attack, rtol=rtol)
    result = robust_radius(model.to(dtype), x, attack=attack, rtol=rtol)
    assert result.dtype == torch.float32
    both = result.isfinite() & expected.isfinite()
    assert both.float().mean() > 0.8
    error = (result[both].double() / expected[both]).log().abs().median()
    assert error < (0.2 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("attack", OURS)
def test_a_constant_model_has_no_boundary(attack):
    def constant(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * torch.tensor([0.0, 0.0]) + torch.tensor([1.0, 0.0])

    result = robust_radius(constant, torch.rand(3, 4), attack=attack, full=True)
    assert (result.radius == math.inf).all()
    assert not result.found.any()


@pytest.mark.parametrize("attack", ["pgd", "fgsm_l2", blob])
def test_temperature_sweep_equals_single_calls(attack):
    model, x = RowExact(), uniform(10, 12)
    temperatures = [0.2, 3.0]
    results = temperature_sweep(model, x, temperatures, attack=attack)
    for temperature, result in zip(temperatures, results, strict=True):
        single = robust_radius(model, x, attack=attack, temperature=temperature)
        torch.testing.assert_close(result.radius, single, rtol=1e-2, atol=0)


def test_an_empty_batch_knows_its_norm():
    result = robust_radius(mlp(), torch.empty(0, 12), attack=["fgsm_l2", "pgd_l2"], full=True)
    assert (len(result), result.norm, result.attacks) == (0, "l2", ("fgsm_l2", "pgd_l2"))


# --- Functions and several attacks ----------------------------------------------------------------


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


def test_the_smallest_radius_wins_and_says_so():
    model, x = mlp(seed=5), uniform(40, 12, seed=5)
    names = ["fgsm", blob, "pgd"]
    each = [robust_radius(model, x, attack=name, full=True) for name in names]
    best = robust_radius(model, x, attack=names, full=True)
    assert best.attacks == ("fgsm", "blob", "pgd")
    assert torch.equal(best.radius, torch.stack([one.radius for one in each]).min(0).values)
    assert best.won.unique().numel() > 1
    for i, one in enumerate(each):
        mine = best.won == i
        for name in FIELDS:
            assert torch.equal(getattr(best, name)[mine], getattr(one, name)[mine])
    assert torch.equal(best.forward_rows, sum(one.forward_rows for one in each) + 2)
    assert torch.equal(best.backward_rows, sum(one.backward_rows for one in each) + 2)
    assert torch.equal(best[:3].won, best.won[:3])


def test_a_radius_wins_over_none_and_none_over_nan():
    def result(*radii: float) -> RadiusResult:
        radius = torch.tensor(radii)
        found, whole = radius.isfinite(), torch.zeros(len(radii), dtype=torch.int64)
        return RadiusResult(*[radius] * 3, *[found] * 2, *[whole] * 6)

    nan, inf = math.nan, math.inf
    both = smallest([result(nan, inf, inf, 0.2, 0.3), result(inf, 0.1, nan, nan, 0.3)])
    assert both.won.tolist() == [1, 1, 0, 0, 0]
    assert both.radius.tolist() == pytest.approx([inf, 0.1, inf, 0.2, 0.3])


# --- Scores ---------------------------------------------------------------------------------------


def test_scores_take_attacks():
    recorder, x = Recorder(mlp()), uniform(20, 12)
    score = scores.get("rr-bs", attack="pgd", steps=5, temperature=1.0)
    assert math.isnan(score.backward_rows)
    expected = robust_radius(recorder.model, x, attack="pgd", steps=5)
    assert torch.equal(score.score(recorder, x), expected)
    assert score.forward_rows * 20 == pytest.approx(recorder.forward_rows)
    assert score.backward_rows * 20 == pytest.approx(recorder.backward_rows)
    loader = [(x, torch.arange(20) % 4)]
    tuned = scores.get("rr-bs", attack="pgd", steps=2, temperature=[0.5, 2.0])
    assert tuned.fit(recorder.model, loader, progress=False).temperature in (0.5, 2.0)
    with pytest.raises(ValueError, match=r"method 'fast' .* not 'pgd'; use method='bs'"):
        scores.get("rr-fast", attack="pgd", temperature=1.0).score(recorder.model, x)


# --- Errors ---------------------------------------------------------------------------------------

X = uniform(4, 12)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "attack is 'magic'; expected 'fgsm' or .* or 'best_l2'", {"attack": "magic"}),
        (ValueError, "attack is empty; give at least one", {"attack": []}),
        (TypeError, "attack is a int; expected a name, a function", {"attack": 3}),
        (
            ValueError,
            r"two norms.*'pgd' \(linf\), 'fgsm_l2' \(l2\)",
            {"attack": ["pgd", "fgsm_l2"]},
        ),
        (ValueError, "norm is 'l2' but .* use attack='pgd_l2'", {"attack": "pgd", "norm": "l2"}),
        (ValueError, "norm is 'l1'; expected 'linf' or 'l2'", {"attack": blob, "norm": "l1"}),
        (ValueError, "target is 'cat'; expected 'runner-up'", {"attack": "pgd", "target": "cat"}),
        (ValueError, "target is for .*; got 'blob'", {"attack": blob, "target": "runner-up"}),
        (ValueError, "steps is 0; it must be at least 1", {"attack": "pgd", "steps": 0}),
        (ValueError, "steps is for iterative attacks .*; got 'fgsm'", {"steps": 5}),
        (ValueError, "probes is 3; attack 'pgd' takes one", {"attack": "pgd", "probes": 3}),
        (ValueError, "takes attack 'fgsm' alone", {"attack": "fgsm_l2", "method": "fast"}),
    ],
)
def test_bad_options(error, message, options):
    recorder = Recorder(RowExact())
    with pytest.raises(error, match=message):
        robust_radius(recorder, X, **options)
    assert not recorder.inputs  # raised before work starts


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attack, library in (("fmn", "foolbox"), ("best", "foolbox"), ("fab_l2", "torchattacks")):
        with pytest.raises(
            ImportError, match=rf"needs {library}: pip install 'rat-ext\[attacks\]'"
        ):
            robust_radius(RowExact(), X, attack=attack)


@pytest.mark.parametrize("attack", ["fgsm_l2", "pgd", ["fgsm", "pgd"]])
def test_the_estimator_has_fgsm_rays_alone(attack):
    recorder = Recorder(RowExact())
    with pytest.raises(
        ValueError, match=r"searches FGSM rays; for attack .* rat_ext.robust_radius"
    ):
        RadiusEstimator(recorder, X, attack=attack)
    assert not recorder.inputs
    target = {"target": "runner-up"}
    estimator = RadiusEstimator(recorder, X, **target)
    assert torch.equal(estimator(X).radius, robust_radius(recorder, X, **target))


def test_the_reference_has_fgsm_and_pgd():
    with pytest.raises(
        ValueError, match=r"the reference has one of fgsm, .* pgd_l2 at a time, not blob"
    ):
        reference.robust_radius(RowExact(), X, attack=blob)
    with pytest.raises(ValueError, match=r"regrad=True is a variant of .* attack 'fgsm_l2'"):
        reference.robust_radius(RowExact(), X, attack="fgsm_l2", regrad=True)


@pytest.mark.parametrize("returned", [lambda x: x[:2], lambda x: x.tolist()])
def test_a_function_must_return_inputs(returned):
    with pytest.raises(ValueError, match=r"attack '<lambda>' returned .*; expected .* \(4, 12\)"):
        robust_radius(RowExact(), X, attack=lambda model, x, y: returned(x))


# --- The benchmark --------------------------------------------------------------------------------


def test_the_benchmark_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "attacks_benchmark", Path(__file__).resolve().parents[2] / "benchmarks" / "attacks.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    model, x = mlp().float(), uniform(6, 12, dtype=torch.float32)
    monkeypatch.setattr(benchmark, "load_model", lambda shared, name: model)
    monkeypatch.setattr(
        benchmark, "load_test_images", lambda shared, n: (x[:n], torch.arange(n) % 4)
    )
    threads = str(torch.get_num_threads())
    out = tmp_path / "attacks.json"
    common = ["--images", "6", "--batch", "4", "--threads", threads, "--out", str(out)]
    benchmark.main([*common, "--attacks", "fgsm"])
    first = json.loads(out.read_text())["attacks"]["fgsm"]
    benchmark.main([*common, "--attacks", "fgsm", "pgd", "--resume"])
    results = json.loads(out.read_text())["attacks"]
    assert results["fgsm"] == first  # kept, seconds and all
    assert results["pgd"]["radius"] == pytest.approx(robust_radius(model, x, attack="pgd").tolist())
    assert "| all L-inf |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.main([*common, "--images", "5", "--resume"])
