"""PGD, and what it shares with the L2 ray: against the reference and against FGSM."""

from __future__ import annotations

import math

import pytest
import torch
from attack_helpers import OURS, Recorder
from helpers import FIELDS, RowExact, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat_ext import reference, robust_radius


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


@pytest.mark.parametrize("attack", OURS)
def test_what_all_logits_of_a_row_have_in_common_counts_for_nothing(attack):
    """Also where that makes a logit 0."""
    model, x = RowExact(seed=1), uniform(20, 12, seed=1)
    result = robust_radius(lambda x: model(x) - model(x)[:, :1], x, attack=attack)
    torch.testing.assert_close(result, robust_radius(model, x, attack=attack), rtol=1e-2, atol=0)


def test_rows_that_are_done_leave_a_pgd():
    recorder, x = Recorder(RowExact()), uniform(30, 12)
    result = robust_radius(recorder, x, attack="pgd", batch_size=16, full=True)
    sizes = [len(rows) for rows in recorder.inputs]
    assert max(sizes) == 16
    assert min(sizes) == 1
    assert result.forward_rows.unique().numel() > 5


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
