"""Detectors that choose among several scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detector_helpers import FAST, fit, loader, same
from helpers import RowExact, uniform
from torch import Tensor

from rat_ext import Cascade, Detector, metrics, scores
from rat_ext.detector.choice import AUTO, aurc_of_each
from rat_ext.detector.held_out import Split


class SignedMargin(scores.LogitScore):
    def __init__(self, sign: int) -> None:
        self.sign = sign

    def score_logits(self, logits: Tensor) -> Tensor:
        first, second = logits.topk(2, dim=1).values.unbind(1)
        return self.sign * (first - second)


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1, 1)])
def test_the_score_with_the_smallest_aurc_on_the_tuning_share_is_taken(signs) -> None:
    detector = fit([SignedMargin(sign) for sign in signs], RowExact(), tune_share=0.3)
    assert detector.score.sign == 1
    report, split = detector.report, Split(loader(), 0.3, seed=0)
    x, target = map(torch.cat, zip(*split.tune, strict=True))
    right = RowExact()(x).argmax(1) == target
    expected = [metrics.aurc(SignedMargin(s).score(RowExact(), x), right) for s in signs]
    assert [aurc for _, aurc in report.compared] == expected
    assert report.tuned_on == len(x)
    assert report.samples == 400 - len(x)
    assert "smallest AURC" in str(report)


def test_the_threshold_is_chosen_as_for_the_score_alone() -> None:
    """On the samples that are left: as if the one score had been fitted on the tuning share."""
    several = fit([SignedMargin(-1), "rr-fast"], RowExact(), target_risk=0.2)
    alone = fit("rr-fast", RowExact(), target_risk=0.2)
    assert several.threshold == alone.threshold
    assert several.score.setting == alone.score.setting
    x = uniform(50, 12, seed=5)
    assert same(several(x).confidence, alone(x).confidence)
    assert alone.report.compared is None


def test_auto_and_what_can_be_chosen(tmp_path: Path) -> None:
    detector = fit("auto", RowExact())
    assert [name for name, _ in detector.report.compared] == list(AUTO)
    detector.save(tmp_path / "gate.safetensors")
    loaded = Detector.load(tmp_path / "gate.safetensors", detector.model)
    assert loaded.report == detector.report
    cascade = Cascade("msr", scores.get("rr-bs", **FAST))
    assert fit([cascade, "msr"], RowExact()).report.compared[0][0] == "cascade"
    with pytest.raises(ValueError, match="score is empty"):
        fit([])
    with pytest.raises(ValueError, match="no score is named 'mrs'"):
        fit(["msr", "mrs"])


def test_rows_that_are_not_finite_count_as_the_least_confidence() -> None:
    x = uniform(4, 12)
    x[0, 0] = torch.nan
    model, target = RowExact(), torch.zeros(4, dtype=torch.int64)
    right = model(x).argmax(1) == 0
    confidence = scores.get("margin").score(model, x)
    confidence[0] = -torch.inf
    (aurc,) = aurc_of_each(model, [scores.get("margin")], [(x, target)], False)
    assert aurc == metrics.aurc(confidence, right)
