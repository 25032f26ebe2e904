"""What fit() chooses from a grid."""

import pytest
import torch
from helpers import mlp, uniform
from score_helpers import BUILT_IN, Counting, held_out, make

from rat_ext import metrics, scores


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("energy", {}),
        ("odin", {"perturbation": [0.0, 0.05, 0.1]}),
        ("doctor-alpha", {"perturbation": [0.1, 0.0]}),
        ("rr-bs", {}),
        ("rr-fast", {"h": 1e-2}),
    ],
)
def test_fit_chooses_the_setting_with_the_smallest_aurc(name, options):
    model, loader = Counting(scale=0.2), held_out()
    temperatures = [0.1, 1.0, 10.0]
    fitted = scores.get(name, temperature=temperatures, **options)
    assert fitted.fit(model, loader, progress=False) is fitted
    x, target = loader.dataset.tensors
    correct = Counting().eval()(x).argmax(1) == target
    aurcs = {}
    perturbations = options.pop("perturbation", [0.0])
    for temperature in temperatures:
        for perturbation in perturbations:
            single = {"temperature": temperature, **options}
            if perturbations != [0.0]:
                single["perturbation"] = perturbation
            confidence = scores.get(name, **single).score(model, x)
            aurcs[temperature, perturbation] = metrics.aurc(confidence, correct)
    assert len(set(aurcs.values())) > 1
    assert fitted.validation_aurc == pytest.approx(aurcs)
    assert fitted.setting == min(aurcs, key=aurcs.get)
    assert (fitted.temperature, fitted.perturbation) == fitted.setting


def test_fit_shares_forwards_among_the_settings():
    model = Counting()
    score = scores.get("odin", temperature=[0.5, 1.0, 2.0], perturbation=[0.0, 0.1, 0.2])
    score.fit(model, held_out(60), progress=False)
    assert model.rows == 60 * (1 + 3 * 2)


def test_default_grids_and_single_settings():
    assert len(scores.get("odin").grid) == 15 * 12
    assert len(scores.get("doctor-alpha").grid) == 15
    assert len(scores.get("rr-bs").grid) == 15

    def untouched():
        raise AssertionError("there is nothing to choose")
        yield

    for name in BUILT_IN:
        if name != "rel-u":
            score = make(name)
            assert score.fit(Counting(), untouched()) is score


@pytest.mark.parametrize("name", ["odin", "doctor-alpha", "doctor-beta"])
def test_a_perturbed_input_may_leave_its_bounds_by_rounding(name):
    low, high = -2.1179, 2.64
    x = (uniform(6, 12, dtype=torch.float32) * 6 - 3).clamp(low, high)
    assert x.max().double() > high  # clamp rounds the bound to float32
    score = scores.get(name, temperature=1.0, perturbation=1e-3, bounds=(low, high))
    model = mlp().float()
    assert score.score(model, x).isfinite().all()
    with pytest.raises(ValueError, match=r"to 2\.65\d*, outside bounds \(-2\.1179, 2\.64\)"):
        score.score(model, x + 0.01)
