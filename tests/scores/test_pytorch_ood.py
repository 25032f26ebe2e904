"""The detectors of pytorch-ood as scores."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from score_helpers import Counting, held_out, inputs

from rat_ext import Detector, datasets, evaluation, scores
from rat_ext.scores import PytorchOOD

pytest.importorskip("pytorch_ood")


def fitted(name, **options):
    model = Counting()
    score = scores.get(f"pytorch-ood:{name}", **options)
    assert score.needs_fit
    assert score.fit(model, held_out(), progress=False) is score
    assert not score.needs_fit
    return model, score


def test_softmax_and_energy_are_those_of_ours():
    x = inputs()
    for theirs, ours in (("MaxSoftmax", "msr"), ("EnergyBased", "energy"), ("MaxLogit", None)):
        model, score = fitted(theirs)
        confidence, prediction = score.score_and_predict(model, x)
        expected = scores.get(ours or "max-logit").score(model, x)
        torch.testing.assert_close(confidence, expected, rtol=1e-6, atol=1e-9)
        assert torch.equal(prediction, model.eval()(x).argmax(1))


def features(model, x):
    return model.eval().layers[:-1](x).detach().numpy()


def test_knn_is_the_distance_to_the_features_of_the_held_out_data():
    model, score = fitted("KNN", k=3, normalize=False)
    known = features(model, torch.cat([x for x, _ in held_out()]))
    new = features(model, inputs(10))
    distances = np.sort(np.linalg.norm(new[:, None] - known, axis=2), axis=1)
    confidence = score.score(model, inputs(10)).numpy()
    order = np.argsort(-distances[:, 2])
    assert (np.diff(confidence[order]) >= -1e-9).all()
    assert len(set(confidence)) == 10


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViM", {"d": 4}), ("Mahalanobis", {}), ("ReAct", {}), ("DICE", {"p": 0.5}),
        ("GEN", {}), ("Entropy", {}), ("KLMatching", {}), ("NNGuide", {"k": 3}), ("fDBD", {}),
        ("ODIN", {}), ("RMD", {}), ("NCI", {}),
    ],
)  # fmt: skip
def test_detectors_of_logits_and_of_features(name, options):
    model = Counting(dtype=torch.float32)
    score = scores.get(f"pytorch-ood:{name}", **options)
    model.train()
    loader = list(held_out(dtype=torch.float32))
    state = torch.get_rng_state()
    score.fit(model, loader, progress=False)
    x = inputs(dtype=torch.float32)
    confidence = score.score(model, x)
    assert confidence.shape == (len(x),)
    assert confidence.isfinite().all()
    assert len(confidence.unique()) > 10
    assert not confidence.requires_grad
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    far = score.score(model, 50 + x)
    if name in ("ViM", "Mahalanobis"):
        assert far.max() < confidence.min()  # inputs unlike the others are not trusted
    assert score.score(model, x[:0]).shape == (0,)


def test_it_takes_part_in_an_evaluation():
    images = datasets.digits().validation
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Linear(8, 10))
    settings = evaluation.Settings(scores=("msr", "pytorch-ood:Mahalanobis"), splits=2)
    result = evaluation.evaluate(model, images, settings, progress=False)
    assert [each.name for each in result.results] == ["msr", "pytorch-ood:Mahalanobis"]
    assert all(0 <= row["aurc"] <= 1 for row in result.of("pytorch-ood:Mahalanobis").splits)


def test_errors_say_what_to_do(monkeypatch):
    model, x = Counting(), inputs()
    with pytest.raises(ValueError, match="pytorch-ood has no detector 'VIM'; there are ASH,"):
        scores.get("pytorch-ood:VIM")
    with pytest.raises(ValueError, match=r"ViM of pytorch-ood needs d: scores.get\('pytorch-ood:"):
        scores.get("pytorch-ood:ViM").fit(model, held_out(), progress=False)
    with pytest.raises(
        ValueError, match=r"layer is 'x'; the model's linear layers are layers.0, l"
    ):
        scores.get("pytorch-ood:KNN", layer="x").fit(model, held_out(), progress=False)
    with pytest.raises(ValueError, match=r"call fit\(model, loader\) first"):
        scores.get("pytorch-ood:KNN").score(model, x)
    _, score = fitted("Entropy")
    with pytest.raises(ValueError, match="for that model alone"):
        score.score(model, x)
    with pytest.raises(TypeError, match="model is a function"):
        scores.get("pytorch-ood:KNN").fit(lambda x: x, held_out(), progress=False)
    with pytest.raises(ValueError, match=r"no score is named 'other:ViM'; .*pytorch-ood:NAME"):
        scores.get("other:ViM")
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    with pytest.raises(ImportError, match="pytorch-ood:KNN needs pytorch-ood: pip install"):
        scores.get("pytorch-ood:KNN")


def test_a_detector_of_ours_can_use_it_and_says_that_it_cannot_be_saved(tmp_path):
    model = Counting()
    score = scores.get("pytorch-ood:Mahalanobis")
    detector = Detector.fit(model, held_out(), score, coverage=0.5, progress=False)
    assert 0 < detector(inputs()).accepted.double().mean() < 1
    with pytest.raises(ValueError, match="cannot be saved"):
        detector.save(tmp_path / "d.safetensors")


def test_the_layer_can_be_named():
    model, score = fitted("KNN", layer="layers.0", k=3)
    assert isinstance(score, PytorchOOD)
    expected = score.score(model, inputs())
    with torch.no_grad():
        model.layers[4].weight.zero_()  # beyond the layer
    assert torch.equal(score.score(model, inputs()), expected)
