"""Options of attacks that are wrong, or that do not go together."""

from __future__ import annotations

import pytest
import torch
from attack_helpers import Recorder, blob
from helpers import RowExact, uniform

from rat_ext import RadiusEstimator, reference, robust_radius

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
