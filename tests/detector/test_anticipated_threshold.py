"""The threshold to expect of more samples, and rules at the ends of their ranges."""

from __future__ import annotations

import numpy as np
import pytest

from rat_ext.detector.threshold import Rule, upper_bound

rng = np.random.default_rng(0)
CONFIDENCE = rng.integers(0, 40, 200) / 40
CORRECT = rng.random(200) > 0.3 * (1 - CONFIDENCE) ** 2


@pytest.mark.parametrize("ratio", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("target", [0.05, 0.2])
def test_a_guarantee_is_anticipated_from_the_bounds_of_as_many_samples(
    target: float, ratio: float
) -> None:
    bounds = {}
    for value in np.unique(CONFIDENCE):
        accepted = value <= CONFIDENCE
        errors = (accepted & ~CORRECT).sum()
        bounds[value] = float(upper_bound(ratio * errors, ratio * accepted.sum(), 0.1))

    def anticipated(target: float) -> float:
        return Rule("target_risk", target, 0.1).anticipate(CONFIDENCE, CORRECT, ratio)

    enough = [value for value, bound in bounds.items() if bound <= target]
    assert anticipated(target) == min(enough, default=min(bounds, key=bounds.__getitem__))
    laxest = min(bounds)
    assert anticipated(bounds[laxest]) == laxest  # the bound itself will do


@pytest.mark.parametrize("criterion", ["coverage", "tpr"])
def test_what_is_not_guaranteed_is_the_same_of_more_samples(criterion: str) -> None:
    rule = Rule(criterion, 0.7, 0.1)
    assert rule.anticipate(CONFIDENCE, CORRECT, 10) == rule.choose(CONFIDENCE, CORRECT).value


def test_one_sample_guarantees_nothing() -> None:
    with pytest.raises(ValueError, match=r"\(at least 29 must be accepted"):
        Rule("target_risk", 0.1, 0.05).choose(np.array([0.5]), np.array([True]))


@pytest.mark.parametrize("delta", [0, 1])
def test_delta_is_inside_its_range(delta: float) -> None:
    with pytest.raises(ValueError, match=f"delta is {delta}; it must be between 0 and 1"):
        Rule.checked(None, 0.9, None, delta)
