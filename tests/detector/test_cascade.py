"""Cascades in a detector: the guarantee by simulation, and what the band spares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detector_helpers import FAST, Counting, fit, labelled
from helpers import RowExact
from scipy import stats
from torch import Tensor, nn

from rat_ext import Cascade, Detector, scores


class Column(scores.Score):
    """A confidence that is drawn, not computed."""

    def __init__(self, number: int) -> None:
        self.number = number

    def score(self, model: nn.Module, x: Tensor) -> Tensor:
        return x[:, self.number]


def test_the_guarantee_of_a_cascade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rat_ext.scores.band.RESAMPLES", 20)
    target_risk, delta, runs = 0.1, 0.1, 100
    generator = torch.Generator().manual_seed(2)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        difficulty = torch.rand(n, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        x = -difficulty[:, None] + noise * torch.tensor([0.2, 0.05])
        wrong = torch.rand(n, generator=generator) < 0.6 * difficulty**2
        return x, wrong.long()

    def model(x: Tensor) -> Tensor:  # always predicts class 0
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    x, target = draw(100_000)
    exceeded, coverage, reports = 0, [], []
    for seed in range(runs):
        held_out, score = [draw(1500)], Cascade(Column(0), Column(1))
        options = {"target_risk": target_risk, "delta": delta, "seed": seed, "progress": False}
        try:
            detector = Detector.fit(model, held_out, score, **options)
        except ValueError:  # none is good enough, which is rare
            coverage.append(0.0)
            continue
        accepted = detector(x).accepted
        exceeded += float(target[accepted].double().mean()) > target_risk
        coverage.append(float(accepted.double().mean()))
        reports.append(detector.report)
    assert exceeded <= stats.binom.ppf(0.999, runs, delta)
    assert np.mean(coverage) > 0.5
    assert np.mean([report.cascade.examined for report in reports]) < 0.9
    assert np.mean([report.cascade.changed for report in reports]) < 0.02


def test_a_cascade_examines_its_band_alone() -> None:
    model = Counting()
    radius = scores.get("rr-bs", **FAST)
    detector = fit(Cascade("msr", radius, max_changed=0.02), model, coverage=0.6)
    cascade = detector.score
    low, high = cascade.band
    assert -math.inf < low < high < math.inf
    x, _ = labelled(300, seed=1)
    out = detector(x)
    cheap = scores.get("msr").score(model, x)
    within = (cheap >= low) & (cheap <= high)
    assert 0 < within.sum() < 300
    assert (out.confidence[cheap > high] == math.inf).all()
    assert out.accepted[cheap > high].all()
    assert (out.confidence[cheap < low] == -math.inf).all()
    assert not out.accepted[cheap < low].any()
    alone = radius.score(model, x)
    assert torch.equal(out.confidence[within], alone[within])

    counted = scores.get("rr-bs", **FAST)
    counted.score(model, x[within])
    model.rows = 0
    detector(x)
    assert model.rows == 300 + round(counted.forward_rows * int(within.sum()))

    saved = detector.report.cascade
    assert saved.forward_rows < saved.expensive_forward_rows
    assert saved.backward_rows == saved.examined < saved.expensive_backward_rows == 1
    assert saved.changed < 0.06
    assert f"{100 * saved.changed:.2f} % of the decisions changed" in str(detector.report)


def test_the_ends_of_the_band_are_in_it() -> None:
    cascade = Cascade(Column(0), Column(1))
    cascade.band = (0.2, 0.6)
    x = torch.tensor([[cheap, 7.0] for cheap in (0.1, 0.2, 0.4, 0.6, 0.7)], dtype=torch.float64)
    assert cascade.score(lambda x: x, x).tolist() == [-math.inf, 7.0, 7.0, 7.0, math.inf]
    assert cascade.examined == 0.6


def test_the_report_counts_the_decisions_that_a_cascade_changes() -> None:
    cascade = Cascade(Column(0), Column(1))
    cascade.band = (0.5, math.inf)  # what is below is rejected unseen
    x = torch.tensor([[0.1, 0.1], [0.2, 0.9], [0.6, 0.9], [0.7, 0.1]])
    model = lambda x: x  # noqa: E731
    audit = cascade.audit()
    parts = []
    for part in x.split(2):
        parts.append(cascade.score(model, part))
        audit.see(model, part)
    report = audit.report(torch.cat(parts).numpy(), 0.5)
    assert (report.changed, report.examined) == (0.25, 0.5)
    assert (report.forward_rows, report.expensive_forward_rows) == (1.5, 1)


def test_a_cascade_fits_its_scores_and_can_be_used_again() -> None:
    cascade = Cascade("energy", "rr-fast")
    with pytest.raises(RuntimeError, match="no band yet"):
        cascade.score(RowExact(), labelled(3)[0])
    detector = fit(cascade)
    assert cascade.needs_fit
    again = fit(detector.score)
    assert again.score.band == detector.score.band
    assert (again.report.tuned_on, again.report.samples) == (0, 400)
    with pytest.raises(ValueError, match=r"max_changed is 1.0"):
        Cascade(max_changed=1.0)


def test_a_cascade_by_name() -> None:
    detector = fit("cascade")
    assert type(detector.score.cheap) is scores.MSR
    assert type(detector.score.expensive) is scores.RRBS
    assert detector.report.cascade is not None
    assert fit("msr").report.cascade is None


class MeanInput(scores.Score):
    """A score that only scores."""

    def score(self, model: nn.Module, x: Tensor) -> Tensor:
        return x.mean(1)


class Shifted(scores.LogitScore):
    """A score of the logits, with a fit() of its own."""

    shift: float | None = None

    def fit(self, model, loader, *, progress=True):
        self.shift = float(sum(len(x) for x, _ in loader))
        return self

    def score_logits(self, logits: Tensor) -> Tensor:
        return logits.amax(1) + self.shift


@pytest.mark.parametrize("cls", [MeanInput, Shifted])
def test_scores_of_ones_own_decide_alone_and_in_a_cascade(cls: type[scores.Score]) -> None:
    x, _ = labelled(50, seed=1)
    alone = fit(cls())
    expected = alone.score.score(Counting(), x)
    if cls is Shifted:
        assert alone.score.shift == alone.report.tuned_on > 40
        assert (expected > 40).all()
    out = alone(x)
    assert torch.equal(out.confidence, expected)
    assert torch.equal(out.prediction, RowExact()(x).argmax(1))
    for cascade in (Cascade(cls(), "margin"), Cascade("margin", cls())):
        detector = fit(cascade)
        low, high = detector.score.band
        cheap = detector.score.cheap.score(Counting(), x)
        within = (cheap >= low) & (cheap <= high)
        expected = detector.score.expensive.score(Counting(), x)
        assert torch.equal(detector(x).confidence[within], expected[within])
        assert detector.report.cascade.expensive_forward_rows == 1
