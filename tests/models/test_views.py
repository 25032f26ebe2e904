"""Classifiers averaged over views of their input."""

from __future__ import annotations

import pytest
import torch
from helpers import RowExact, WithLogits, cnn, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from rat_ext import robust_radius, scores
from rat_ext._common.storage import fingerprint
from rat_ext.models import ViewAveraged, mirrored


@settings(deadline=None)
@given(
    shifts=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    scale=st.sampled_from([1.0, 100.0]),
)
def test_it_gives_the_mean_of_the_softmax_over_the_views(shifts, scale):
    model, x = RowExact(), uniform(9, 12)

    def scaled(x):
        return scale * model(x)

    views = [lambda x, by=by: x.roll(by, 1) for by in shifts]
    mean = torch.stack([scaled(view(x)).softmax(1) for view in (lambda x: x, *views)]).mean(0)
    torch.testing.assert_close(ViewAveraged(scaled, views)(x).exp(), mean, rtol=1e-12, atol=1e-300)


def test_views_that_show_the_same_change_nothing():
    model, x = RowExact(), uniform(20, 12)
    averaged = ViewAveraged(WithLogits(model), [torch.clone, torch.clone])
    torch.testing.assert_close(averaged(x), model(x).log_softmax(1))
    torch.testing.assert_close(
        robust_radius(averaged, x), robust_radius(model, x), rtol=1e-2, atol=0
    )
    assert torch.equal(ViewAveraged(model, [])(x), model(x).log_softmax(1))


@pytest.mark.parametrize("name", ["msr", "rr-bs"])
def test_mirrored_images_have_the_same_confidence(name):
    model, x = ViewAveraged(cnn()), uniform(10, 3, 8, 8, dtype=torch.float32)
    score = scores.get(name, **({"temperature": 1.0} if name == "rr-bs" else {}))
    confidence = score.score(model, x)
    torch.testing.assert_close(score.score(model, mirrored(x)), confidence, rtol=2e-2, atol=0)


def test_confident_predictions_do_not_saturate_in_float32():
    logits = torch.tensor([[60.0, 0.0], [50.0, 0.0]])
    confidence = scores.get("odin", temperature=1.0, perturbation=0.0).score(
        ViewAveraged(lambda x: x, [torch.clone]), logits
    )
    torch.testing.assert_close(confidence, torch.tensor([60.0, 50.0]), check_dtype=False)


def test_the_state_tells_which_views_they_are():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    one, same, other = (ViewAveraged(model, [v]) for v in ("mirrored", mirrored, "shift:0:1"))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(ViewAveraged(model, [])) != fingerprint(one)
    assert fingerprint(ViewAveraged(model, [torch.clone])) != fingerprint(other)
    same.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="average over the views mirrored, not shift:0:1"):
        other.load_state_dict(one.state_dict())
