"""What is known about the inputs of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import cnn, uniform
from service import Brightness, Fragile, served_model

import rat_ext
from rat_ext import Detector
from rat_ext.scores import Cascade
from rat_ext.serve.gate import Gate


def test_gate_tells_what_the_library_does() -> None:
    model, x = cnn(), uniform(5, 3, 8, 8, dtype=torch.float32)
    expected = rat_ext.robust_radius(model, x, rtol=1e-3, full=True)
    answers = Gate(model, Brightness(model), options={"rtol": 1e-3})(list(x))
    assert [answer.radius for answer in answers] == expected.radius.tolist()
    assert [answer.prediction for answer in answers] == expected.prediction.tolist()
    confidence = x.flatten(1).mean(1)
    assert [answer.confidence for answer in answers] == confidence.tolist()
    assert [answer.accepted for answer in answers] == (confidence > 0.5).tolist()
    assert [answer.probability for answer in answers] == (confidence / 2).tolist()
    (answer,) = Gate(model, Brightness(model), radius=False)([x[0]])
    assert answer.radius is None
    assert answer.confidence == confidence[0]
    assert model.training
    with pytest.raises(ValueError, match="neither a detector nor a radius"):
        Gate(model, radius=False)


def test_gate_warms_up_or_says_why_not() -> None:
    Gate(cnn()).warm_up((3, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"the model fails on an input of shape \(1, 8, 8\)"):
        Gate(cnn()).warm_up((1, 8, 8), torch.float32)
    with pytest.raises(ValueError, match="logits or their gradient are not finite"):
        Gate(Fragile()).warm_up((12,), torch.float64)


@pytest.mark.parametrize("score", ["rr-bs", "odin", "cascade"])
def test_gate_refuses_bounds_that_the_detector_does_not_take(served: Path, score: str) -> None:
    model, x = served_model(served), uniform(40, 1, 8, 8, dtype=torch.float32)
    held_out = [(x, torch.arange(40) % 3)]
    made = {
        "rr-bs": rat_ext.scores.get("rr-bs", temperature=1.0),
        "odin": rat_ext.scores.get("odin", temperature=1.0, perturbation=0.01),
        "cascade": Cascade("msr", rat_ext.scores.get("rr-bs", temperature=1.0)),
    }[score]
    judge = Detector.fit(model, held_out, made, coverage=0.5, progress=False)
    Gate(model, judge).warm_up((1, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"not take all inputs within bounds = \(-1, 1\); serve"):
        Gate(model, judge, options={"bounds": (-1.0, 1.0)}).warm_up((1, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"the model fails on an input of shape \(1, 9, 9\)"):
        Gate(model, judge).warm_up((1, 9, 9), torch.float32)


def test_gate_takes_the_radius_of_a_detector_that_measures_one(
    served: Path, detector: Path
) -> None:
    model, x = served_model(served), uniform(5, 1, 8, 8, dtype=torch.float32)
    judge = Detector.load(detector, model)
    expected = judge(x)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    judge(x)
    alone = sum(rows)
    answers = Gate(model, judge)(list(x))
    assert sum(rows) == 2 * alone  # measured once
    for name in ("prediction", "confidence", "probability", "accepted"):
        assert [getattr(answer, name) for answer in answers] == getattr(expected, name).tolist()
    assert [answer.radius for answer in answers] == expected.confidence.tolist()
    assert {answer.accepted for answer in answers} == {True, False}
