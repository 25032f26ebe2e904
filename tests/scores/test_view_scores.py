"""The confidence over views of an input."""

from __future__ import annotations

import pytest
import torch
from helpers import uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from score_helpers import Counting, inputs
from torch import nn

from rat_ext import Detector, models, scores
from rat_ext._common.views import Shifted, name_of_view, view_named


@settings(deadline=None)
@given(
    shifts=st.lists(st.integers(0, 3), max_size=3),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_it_is_the_mean_probability_of_the_own_prediction(shifts, scale):
    model, x = Counting(scale).eval(), inputs()
    views = [lambda x, by=by: x.roll(by, 1) for by in shifts]
    prediction = model(x).argmax(1)
    probabilities = torch.stack([model(each).softmax(1) for each in (x, *(v(x) for v in views))])
    expected = probabilities.mean(0).gather(1, prediction[:, None])[:, 0]
    score = scores.MSRViews(views)
    confidence, predicted = score.score_and_predict(model, x)
    torch.testing.assert_close(confidence, expected.detach())
    assert torch.equal(predicted, prediction)
    assert score.forward_rows == 1 + len(shifts)
    if not shifts:
        torch.testing.assert_close(confidence, scores.get("msr").score(model, x))


def test_a_prediction_that_another_view_denies_is_doubted():
    x = uniform(4, 3, 8, 8)
    sure, unsure = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])

    def model(x):
        mirrored = (x[:, 0, 0, 0] == flipped).view(-1, 1)
        return torch.where(mirrored, unsure, sure)

    flipped = x[0, 0, 0, 7]
    confidence, prediction = scores.get("msr-views").score_and_predict(model, x)
    assert prediction.tolist() == [0, 0, 0, 0]
    assert confidence[0] == pytest.approx(0.5)
    assert (confidence[1:] > 0.99).all()


@pytest.mark.parametrize("name", ["mirrored", "shift:1:-2", "shift:-3:0"])
def test_views_have_names(name):
    assert name_of_view(view_named(name)) == name


@given(down=st.integers(-3, 3), right=st.integers(-3, 3))
def test_a_shifted_image_has_its_pixels_elsewhere(down, right):
    x = uniform(2, 3, 6, 5)
    moved = Shifted(down, right)(x)
    assert moved.shape == x.shape
    for row in range(6):
        for column in range(5):
            source = min(max(row - down, 0), 5), min(max(column - right, 0), 4)
            assert torch.equal(moved[..., row, column], x[..., source[0], source[1]])


@pytest.mark.parametrize("name", ["mirror", "shift", "shift:1", "shift:a:b", "shift:1:2:3"])
def test_a_view_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"no view is named '{name}'; there are 'mirrored' and"):
        scores.get("msr-views", views=[name])


def test_a_detector_keeps_the_views(tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    x = torch.rand(60, 3, 8, 8)
    prediction = model(x).argmax(1)
    loader = [(x, torch.where(torch.arange(60) % 3 > 0, prediction, (prediction + 1) % 3))]
    score = scores.get("msr-views", views=["mirrored", "shift:0:1"])
    detector = Detector.fit(model, loader, score, coverage=0.5, progress=False)
    detector.save(tmp_path / "d.safetensors")
    loaded = Detector.load(tmp_path / "d.safetensors", model)
    assert torch.equal(loaded(x).confidence, score.score(model, x))
    with pytest.raises(ValueError, match="was fitted on a model with other weights"):
        Detector.load(tmp_path / "d.safetensors", models.ViewAveraged(model))
    unnamed = Detector.fit(
        model, loader, scores.MSRViews([torch.clone]), coverage=0.5, progress=False
    )
    with pytest.raises(ValueError, match="has no name; only those that are given by name"):
        unnamed.save(tmp_path / "e.safetensors")


def test_it_is_not_among_the_scores_for_any_input():
    assert "msr-views" not in scores.names()
    with pytest.raises(ValueError, match="'msr-views'"):
        scores.get("mrs")
