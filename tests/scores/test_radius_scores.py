"""Robust radii as confidences."""

import math

import pytest
import torch
from score_helpers import Counting, inputs

from rat_ext import metrics, robust_radius, scores


@pytest.mark.parametrize("method", ["bs", "fast"])
def test_radius_scores_are_radii(method):
    model, x = Counting(), inputs()
    score = scores.get(f"rr-{method}", temperature=0.7, rtol=1e-3)
    result = robust_radius(model, x, method=method, temperature=0.7, rtol=1e-3, full=True)
    assert math.isnan(score.forward_rows)
    assert torch.equal(score.score(model, x), result.radius)
    assert score.forward_rows == 1 + result.forward_rows.double().mean()


def test_an_infinite_radius_is_the_largest_confidence_and_a_tie():
    model, x = Counting(), inputs()
    confidence = scores.get("rr-bs", temperature=1.0, eps_max=0.05).score(model, x)
    assert 0 < confidence.isinf().sum() < len(x)
    share = confidence.isinf().double().mean().item()
    assert metrics.accuracy_at_coverage(confidence, confidence.isinf(), share) == 1
    first = torch.arange(len(x)) == confidence.isinf().nonzero()[0]
    at_first = metrics.accuracy_at_coverage(confidence, first, 1 / len(x))
    assert at_first == pytest.approx(1 / confidence.isinf().sum().item())


@pytest.mark.parametrize("method", ["bs", "fast"])
def test_radii_that_only_rank_are_coarse(method):
    model, x = Counting(), inputs()
    score = scores.get(f"rr-{method}", temperature=1.0)
    expected = robust_radius(model, x, method=method, rtol=0.05)
    assert torch.equal(score.score(model, x), expected)
    assert type(score).from_state(score.state()).options == score.options
    # What was saved without a tolerance had that of robust_radius.
    old = type(score).from_state({"temperature": 1.0})
    assert torch.equal(old.score(model, x), robust_radius(model, x, method=method))
