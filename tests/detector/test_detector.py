"""Detectors: how they decide, what they report, and errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_helpers import FAST, Counting, fit, labelled, loader, same
from helpers import RowExact, WithLogits
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from rat_ext import Cascade, Detector, scores
from rat_ext.detector.threshold import upper_bound


@pytest.mark.parametrize("name", ["msr", "energy", "rel-u", "odin", "rr-fast", "rr-bs"])
def test_a_decision_takes_no_more_forward_rows_than_its_score(name: str) -> None:
    model = Counting().train()
    options = {"odin": {**FAST, "perturbation": 0.01}, "energy": FAST, "rel-u": FAST}
    score = scores.get(name, **options.get(name, {} if name == "msr" else FAST))
    detector = fit(score, model, tpr=0.9)
    x, _ = labelled(50, seed=1)
    random_state = torch.random.get_rng_state()
    model.rows = 0
    expected = detector.score.score(model, x)
    rows, model.rows = model.rows, 0
    out = detector(x)
    assert model.rows == rows
    assert rows == {"odin": 100, "rr-fast": 100}.get(name, 50) or name == "rr-bs"
    assert same(out.confidence, expected)
    assert torch.equal(out.prediction, model.eval()(x).argmax(1))
    assert torch.equal(out.accepted, expected >= detector.threshold)
    assert 0 < out.accepted.sum() < 50
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_leaves_the_modes_and_takes_any_mode() -> None:
    model = WithLogits(Counting()).train()
    detector = fit(Cascade("msr", scores.get("rr-bs", **FAST)), model)
    expected = detector(labelled(80, seed=1)[0])
    with torch.inference_mode():
        out = detector(labelled(80, seed=1)[0])
    assert same(out.confidence, expected.confidence)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("score", ["msr", "rr-bs", Cascade("msr", "rr-fast")], ids=str)
def test_an_empty_batch(score: str | scores.Score) -> None:
    detector = fit(score, calibrate=True)
    out = detector(torch.empty(0, 12, dtype=torch.float64))
    assert len(out) == 0
    for values in (out.prediction, out.confidence, out.accepted, out.probability):
        assert values.shape == (0,)
    assert (out.prediction.dtype, out.accepted.dtype) == (torch.int64, torch.bool)


def test_what_is_not_a_number_is_not_accepted() -> None:
    x, _ = labelled(6, seed=1)
    x[2, 3] = math.nan
    for score in ("msr", "rr-bs", Cascade("msr", "rr-bs")):
        detector = fit(score, calibrate=True)
        if score == "rr-bs":
            with pytest.warns(RuntimeWarning, match="1 of 6 rows"):
                out = detector(x)
        else:
            out = detector(x)
        assert out.confidence.isnan().tolist() == [False, False, True, False, False, False]
        assert out.prediction[2] == -1
        assert not out.accepted[2]
        assert out.probability[2].isnan()


def test_held_out_samples_that_are_not_numbers() -> None:
    x, target = labelled(400)
    x[:100] = math.nan
    target[:100] = -1
    report = Detector.fit(RowExact(), [(x, target)], "msr", coverage=0.7, progress=False).report
    assert report.coverage == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"coverage of 0.8: the confidence of 100 of 400"):
        Detector.fit(RowExact(), [(x, target)], "msr", coverage=0.8, progress=False)
    with pytest.raises(ValueError, match="the confidence of all 100 held-out samples is nan"):
        Detector.fit(RowExact(), [(x[:100], target[:100])], "msr", tpr=0.8, progress=False)


def test_a_confidence_that_is_not_a_number_is_never_right() -> None:
    x, _ = labelled(400)
    x[:100] = math.nan
    model = RowExact()
    target = model(x).argmax(1)  # also of the logits that are nan
    report = Detector.fit(model, [(x, target)], "msr", tpr=0.5, progress=False).report
    assert (report.right, report.accepted, report.samples) == (300, 150, 400)


def test_infinite_confidences_are_accepted_and_tied() -> None:
    score = scores.get("rr-bs", eps_max=1e-5, **FAST)  # hardly a prediction changes so near
    detector = fit(score, coverage=0.2, calibrate=True)
    assert detector.threshold == math.inf
    assert detector.report.coverage > 0.9
    out = detector(labelled(40, seed=1)[0])
    assert torch.equal(out.accepted, out.confidence == math.inf)
    assert out.probability.isfinite().all()


def test_the_probability_is_that_of_isotonic_regression() -> None:
    x, target = labelled(400)
    model = RowExact()
    detector = fit("margin", model, calibrate=True)
    out = detector(x)
    right = (out.prediction == target).double()
    expected = IsotonicRegression().fit_transform(out.confidence, right)
    np.testing.assert_allclose(out.probability, expected)
    assert 3 < len(out.probability.unique()) < 50
    assert fit("margin", model)(x).probability is None


def test_the_report() -> None:
    x, target = labelled(400)
    detector = fit("msr", coverage=0.7, delta=0.05)
    out, report = detector(x), detector.report
    wrong = out.prediction != target
    assert (report.samples, report.tuned_on, report.accepted) == (400, 0, 280)
    assert report.errors == int((wrong & out.accepted).sum())
    assert report.right == int((~wrong).sum())
    assert report.risk == report.errors / 280
    assert report.tpr == (280 - report.errors) / report.right
    interval = stats.binomtest(280, 400).proportion_ci(0.9, method="exact")
    assert report.coverage_bound == pytest.approx(interval.low)
    interval = stats.binomtest(report.errors, 280).proportion_ci(0.9, method="exact")
    assert report.risk_bound == pytest.approx(interval.high)
    assert "coverage 0.7000 (at least 0.66" in str(report)
    assert str(report) in repr(detector)


def test_target_risk_reports_the_bound_that_it_guarantees() -> None:
    report = fit("msr", target_risk=0.15, delta=0.05).report
    assert report.risk < report.risk_bound <= 0.15
    starts = math.ceil(math.log2(400))
    levels = 0.05 / starts * np.arange(1, starts + 1)
    possible = upper_bound(report.errors, report.accepted, levels)
    assert np.isclose(report.risk_bound, possible, rtol=1e-9).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of target_risk, coverage and tpr, not none"),
        ({"coverage": 0.5, "tpr": 0.9}, "not coverage and tpr"),
        ({"target_risk": 1.0}, "target_risk is 1.0; it must be above 0 and below 1"),
        ({"coverage": 1.5}, "coverage is 1.5; it must be above 0 and at most 1"),
        ({"tpr": 0.0}, "tpr is 0.0"),
        ({"tpr": math.nan}, "tpr is nan"),
        ({"coverage": 0.5, "delta": 1.0}, "delta is 1.0"),
        ({"coverage": 0.5, "tune_share": 1.0}, "tune_share is 1.0"),
        ({"coverage": 0.5, "score": "mrs"}, "no score is named 'mrs'"),
        ({"coverage": 0.5, "score": "rr-fast", "tune_share": 1e-9}, "leaves no sample to tune"),
        ({"coverage": 0.5, "loader": []}, "the loader gave no batch"),
        ({"coverage": 0.5, "loader": [torch.rand(3, 12)]}, r"must yield \(x, target"),
        (
            {"coverage": 0.5, "loader": [torch.rand(3, 12)], "score": "rr-bs"},
            r"must yield \(x, target",
        ),
    ],
)
def test_errors(options: dict, message: str) -> None:
    options = {"loader": loader(), "score": "msr", "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        Detector.fit(RowExact(), **options)


def test_a_score_that_is_none() -> None:
    with pytest.raises(TypeError, match="score is a function; expected a name or a Score"):
        fit(fit)


def test_no_threshold_that_guarantees_the_risk() -> None:
    with pytest.raises(ValueError, match=r"no threshold guarantees a risk of at most 0.01") as few:
        fit("msr", target_risk=0.01)
    level = 0.001 / 9
    needed = math.ceil(math.log(level) / math.log(0.99))
    assert f"at least {needed:,} must be accepted" in str(few.value)
    assert "400 held-out samples" in str(few.value)
    with pytest.raises(ValueError, match=r"best bound that 400 .* give is 0\.0[89]|0\.[1-9]"):
        fit("msr", target_risk=0.05)


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    detector = fit("msr")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    for action in (lambda: detector.save(tmp_path / "file"), lambda: fit("msr")):
        with pytest.raises(ImportError, match=r"pip install '\.\[detector\]'"):
            action()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("score", ["msr", "rr-bs", Cascade("msr", "rr-bs")], ids=str)
def test_on_a_gpu(score: str | scores.Score, tmp_path: Path) -> None:
    model = RowExact().cuda()
    detector = fit(score, model, calibrate=True)
    x = labelled(50, seed=1)[0].cuda()
    detector.save(tmp_path / "file")
    one, other = detector(x), Detector.load(tmp_path / "file", model)(x)
    for field in ("prediction", "confidence", "accepted", "probability"):
        values = getattr(one, field)
        assert values.device == x.device
        assert same(values, getattr(other, field))
