"""What scores say of themselves, and copies of them."""

import math

import pytest
import torch
from score_helpers import BUILT_IN, PERTURBED, Counting, held_out, inputs, make

from rat_ext import scores
from rat_ext.scores import Setting, registry


class WithFit(scores.LogitScore):
    def fit(self, model, loader, *, progress=True):
        self.shift = sum(len(x) for x, _ in loader)
        return self

    def score_logits(self, logits):
        return logits.amax(1) + self.shift


class Mixin:
    fit = WithFit.fit


class Mixed(Mixin, scores.MSR):
    pass


class OtherTemperatures(scores.RRBS):
    pass


class Learns(scores.RRBS):
    def fit(self, model, loader, *, progress=True):
        return super().fit(model, loader, progress=progress)


class Declared(WithFit):
    fit_does = "choose"

    def fit(self, model, loader, *, progress=True):
        return self


@pytest.mark.parametrize(
    ("cls", "does"),
    [
        (WithFit, "learn"),
        (Mixed, "learn"),
        (OtherTemperatures, "choose"),
        (Learns, "learn"),
        (Declared, "choose"),
        (scores.RelU, "learn"),
        (scores.ODIN, "choose"),
        (scores.Energy, "choose"),
        (scores.RRFast, "choose"),
        (scores.MSR, "nothing"),
        (scores.Cascade, "learn"),
    ],
)
def test_what_fit_does(cls, does):
    assert cls.fit_does == does
    if does == "nothing":
        assert not cls().needs_fit


def test_what_the_built_in_scores_need():
    new = {name: scores.get(name) for name in BUILT_IN}
    assert [name for name in BUILT_IN if new[name].needs_fit] == [
        "odin", "doctor-alpha", "doctor-beta", "rel-u", "rr-bs", "rr-fast",
    ]  # fmt: skip
    # Before fit() the whole grid counts: ODIN's has perturbations.
    assert [name for name in BUILT_IN if not new[name].logits_only] == ["odin", "rr-bs", "rr-fast"]
    assert [name for name in BUILT_IN if not new[name].grid] == [
        "msr", "max-logit", "margin", "negative-entropy",
    ]  # fmt: skip
    assert new["msr"].setting is None
    assert new["energy"].setting == (1.0, 0.0)
    assert str(Setting(1.5, 0.0)) == "T=1.5"
    assert str(Setting(100.0, 2e-4)) == "T=100 eps=0.0002"


@pytest.mark.parametrize("name", [*PERTURBED, "rel-u", "rr-bs"])
def test_choosing_is_all_that_fit_does_or_it_says_so(name):
    options = {"perturbation": [0.0, 0.05]} if name in PERTURBED else {}
    score = scores.get(name, temperature=[0.5, 2.0], **options)
    fitted = score.copy().fit(Counting(), held_out(), progress=False)
    limited = score.limited_to([fitted.setting])
    assert limited.needs_fit == (score.fit_does == "learn")
    if score.fit_does == "choose":
        expected = fitted.score(Counting(), inputs())
        assert torch.equal(limited.score(Counting(), inputs()), expected)


def test_limited_to_some_settings():
    score = scores.get("odin", temperature=[0.5, 1.0, 2.0], perturbation=[0.0, 0.1])
    some = score.limited_to([Setting(0.5, 0.0), Setting(2.0, 0.0)])
    assert some.needs_fit
    assert some.logits_only
    assert len(some.fit(Counting(), held_out(), progress=False).validation_aurc) == 2
    assert len(score.grid) == 6
    assert score.needs_fit
    assert type(scores.MSR().limited_to([Setting(1.0, 0.0)])) is scores.MSR


@pytest.mark.parametrize("perturbation", [0.0, 0.1])
def test_a_chosen_setting_tells_whether_logits_suffice(perturbation):
    score = scores.get("odin", temperature=1.0, perturbation=[0.0, 0.1])
    assert not score.logits_only
    correct = torch.arange(4) > 1
    good, bad = correct.double(), -correct.double()
    score.choose(torch.stack([bad, good] if perturbation else [good, bad]), correct)
    assert score.setting == (1.0, perturbation)
    assert score.logits_only == (perturbation == 0)
    assert (score.forward_rows, score.backward_rows) == ((2, 1) if perturbation else (1, 0))


@pytest.mark.parametrize("name", ["odin", "rel-u", "rr-fast"])
def test_a_copy_is_fitted_apart(name):
    score = scores.get(name, temperature=[1.0, 2.0])
    copied = score.copy()
    assert type(copied) is type(score)
    copied.fit(Counting(), held_out(), progress=False)
    assert score.needs_fit
    assert not copied.needs_fit
    again = copied.copy()  # has what was fitted
    expected = copied.score(Counting(), inputs())
    assert torch.equal(again.score(Counting(), inputs()), expected)
    assert again.setting == copied.setting


def test_a_copy_counts_its_rows_apart():
    score = make("rr-bs")
    score.score(Counting(), inputs())
    rows = score.forward_rows
    copied = score.copy()
    assert math.isnan(copied.forward_rows)
    copied.score(Counting(), inputs(5))
    assert score.forward_rows == rows != copied.forward_rows


def test_a_copy_of_a_cascade_has_scores_of_its_own():
    cascade = scores.Cascade("rel-u", make("rr-bs"))
    cascade.fit(Counting(), held_out(), progress=False)
    cascade.band = (-math.inf, math.inf)
    cascade.score(Counting(), inputs())
    assert cascade.examined == 1
    copied = cascade.copy()
    assert copied.band == cascade.band
    assert math.isnan(copied.examined)
    assert copied.cheap is not cascade.cheap
    assert math.isnan(copied.expensive.forward_rows)
    copied.score(Counting(), inputs(3))
    assert cascade.expensive.forward_rows != copied.expensive.forward_rows


def test_a_name_or_a_score():
    assert type(registry.as_score("margin")) is scores.Margin
    score = scores.get("rr-bs")
    copied = registry.as_score(score)
    assert type(copied) is scores.RRBS
    assert copied is not score


def test_a_cascade_is_not_among_the_scores_that_fit_makes_ready():
    assert "cascade" not in scores.names()
    cascade = scores.get("cascade", cheap="margin")
    assert type(cascade.cheap) is scores.Margin
    assert scores.name_of(cascade) == "cascade"
    assert scores.kind_of("cascade") is scores.Cascade
