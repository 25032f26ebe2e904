"""Detectors: the guarantee by simulation, thresholds and bands by brute force, files, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import RowExact, WithLogits, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rat_ext import Cascade, Detector, scores
from rat_ext._common.storage import fingerprint
from rat_ext.detector.held_out import Split
from rat_ext.detector.threshold import Rule, upper_bound
from rat_ext.scores import registry
from rat_ext.scores.band import narrowest_band

FAST = {"temperature": 1.0}
"""Options for a score that is to have nothing to fit."""


class Counting(RowExact):
    """Counts the rows that go through it, and drops some out in training."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.norm = nn.BatchNorm1d(4).double()  # a state dict with integers without dimensions
        self.dropout = nn.Dropout(0.5)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.dropout(super().forward(x))


def labelled(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, and targets that differ from the predictions where these are close to a tie."""
    x = uniform(n, 12, seed=seed)
    with torch.no_grad():
        logits = RowExact()(x)
    first, second = logits.topk(2).values.unbind(1)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(n, generator=generator) < 0.6 * (second - first).exp()
    target = logits.argmax(1)
    return x, torch.where(wrong, (target + 1) % 4, target)


def loader(n: int = 400, seed: int = 0, **options: object) -> DataLoader:
    return DataLoader(TensorDataset(*labelled(n, seed)), **{"batch_size": 64, **options})


def fit(score: str | scores.Score = "msr", model: nn.Module | None = None, **options) -> Detector:
    criterion = {} if {"target_risk", "tpr"} & options.keys() else {"coverage": 0.7}
    options = {**criterion, **options, "progress": False}
    return Detector.fit(model or Counting(), loader(), score, **options)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Equal to the bit, nan included."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))


# --- The guarantee --------------------------------------------------------------------------------

GRID = (np.arange(20_000) + 0.5) / 20_000
CURVES = {
    "steep": lambda u: 0.5 * (1 - u) ** 4,
    "flat and good": lambda u: np.full_like(u, 0.03),
    "flat and bad": lambda u: np.full_like(u, 0.052),
    "not monotone": lambda u: 0.06 + 0.05 * np.sin(12 * u),
}
"""The probability of an error at each confidence, which is uniform on (0, 1)."""


def plug_in(confidence: np.ndarray, correct: np.ndarray, target: float) -> float:
    """The laxest threshold whose risk on the same samples is low enough: no guarantee."""
    order = np.argsort(-confidence)
    risk = np.cumsum(~correct[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(risk <= target)
    return confidence[order[good[-1]]] if len(good) else math.inf


@pytest.mark.parametrize("levels", [None, 16], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", CURVES)
def test_the_risk_exceeds_the_target_with_probability_delta_at_most(
    name: str, levels: int | None
) -> None:
    target, delta, runs, n = 0.05, 0.1, 300, 1000
    error = CURVES[name]
    true_risk = np.cumsum(error(GRID)[::-1]) / np.arange(1, len(GRID) + 1)
    rng = np.random.default_rng(0)
    rule = Rule("target_risk", target, delta)

    def exceeds(threshold: float) -> bool:
        accepted = round((1 - threshold) * len(GRID))
        return accepted > 0 and true_risk[accepted - 1] > target

    coverage, exceeded, naive = [], 0, 0
    for _ in range(runs):
        exact = rng.random(n)
        correct = rng.random(n) >= error(exact)
        confidence = np.floor(exact * levels) / levels if levels else exact
        naive += exceeds(min(plug_in(confidence, correct, target), 1))
        try:
            threshold = rule.choose(confidence, correct)
        except ValueError:
            coverage.append(0.0)
            continue
        assert threshold.risk_bound <= target
        exceeded += exceeds(threshold.value)
        coverage.append(1 - threshold.value)
    most = stats.binom.ppf(0.999, runs, delta)
    assert exceeded <= most
    if name == "flat and good":
        assert np.mean(coverage) > 0.8  # of 1
    if name == "steep":
        assert np.mean(coverage) > 0.65  # of 0.84
        assert naive > most or levels  # without a bound it would not hold


def sgr(confidence: np.ndarray, correct: np.ndarray, target: float, delta: float) -> int:
    """How many samples the binary search of SGR accepts (NeurIPS 2017, algorithm 1)."""
    errors = np.cumsum(~correct[np.argsort(-confidence)])
    tests = math.ceil(math.log2(len(errors)))
    low, high, accepted = 1, len(errors), 0
    for _ in range(tests):
        middle = math.ceil((low + high) / 2)
        if upper_bound(errors[middle - 1], middle, delta / tests) <= target:
            low = accepted = middle
        else:
            high = middle
    return accepted


def test_accepts_no_fewer_than_sgr() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = {}, {}
    for name in ("steep", "flat and good"):
        pairs = []
        for _ in range(100):
            confidence = rng.random(1500)
            correct = rng.random(1500) >= CURVES[name](confidence)
            try:
                accepted = Rule("target_risk", 0.05, 0.01).choose(confidence, correct).accepted
            except ValueError:
                accepted = 0
            pairs.append((accepted, sgr(confidence, correct, 0.05, 0.01)))
        ours[name], theirs[name] = np.mean(pairs, axis=0)
    assert ours["steep"] > 0.98 * theirs["steep"]
    # Binary search looks for stricter thresholds where there are too few samples.
    assert ours["flat and good"] > 1.5 * theirs["flat and good"]


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


@pytest.mark.parametrize(("errors", "samples"), [(0, 10), (3, 200), (200, 200)])
def test_the_bound_is_clopper_pearsons(errors: int, samples: int) -> None:
    bound = float(upper_bound(errors, samples, 0.02))
    expected = stats.binomtest(errors, samples).proportion_ci(0.96, method="exact").high
    assert bound == pytest.approx(expected)


# --- Thresholds and bands by brute force ----------------------------------------------------------

CONFIDENCES = st.lists(
    st.tuples(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf, math.nan]), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(samples=CONFIDENCES, share=st.sampled_from([0.07, 0.3, 0.5, 0.9, 1.0]))
@pytest.mark.parametrize("criterion", ["coverage", "tpr"])
def test_the_threshold_is_the_strictest(
    criterion: str, samples: list[tuple[float, bool]], share: float
) -> None:
    confidence = np.array([value for value, _ in samples])
    correct = np.array([right for _, right in samples]) & ~np.isnan(confidence)
    counted = correct if criterion == "tpr" else np.ones_like(correct)
    rates = {
        value: (counted & (confidence >= value)).sum() / max(counted.sum(), 1)
        for value in confidence
        if not math.isnan(value)
    }
    good = [value for value, rate in rates.items() if rate >= share - 1e-12]
    rule = Rule(criterion, share, 0.1)
    if not good or not counted.any():
        with pytest.raises(ValueError, match=r"nan|no prediction .* is right"):
            rule.choose(confidence, correct)
        return
    threshold = rule.choose(confidence, correct)
    assert threshold.value == max(good)
    accepted = confidence >= threshold.value
    assert threshold.accepted == accepted.sum()
    assert threshold.errors == (accepted & ~correct).sum()


@settings(deadline=None)
@given(
    samples=st.lists(
        st.tuples(
            st.sampled_from([-1.0, 0.0, 1.0, 2.0, 3.0, math.inf]), st.booleans(), st.booleans()
        ),
        min_size=1,
        max_size=10,
    ),
    budget=st.integers(0, 3),
)
def test_the_band_is_the_narrowest(samples: list[tuple[float, bool, bool]], budget: int) -> None:
    cheap, rejected, accepted = map(np.array, zip(*samples, strict=True))
    budget = min(budget, len(cheap) - 1)

    def outcome(low: float, high: float) -> tuple[int, int]:
        above = cheap > high
        below = (cheap < low) & ~above
        changed = (above & rejected).sum() + (below & accepted).sum()
        return int(changed), int((~above & ~below).sum())

    share = (budget + 0.5) / len(cheap)
    band = narrowest_band(cheap, rejected=rejected, accepted=accepted, max_changed=share)
    changed, examined = outcome(*band)
    assert changed <= budget
    if math.inf in cheap:
        return  # no number is above it, so that there is no band below it
    ends = [-math.inf, *np.unique(cheap), math.inf]
    outcomes = [outcome(low, high) for low in ends for high in ends]
    assert examined == min(size for wrong, size in outcomes if wrong <= budget)


# --- Deciding -------------------------------------------------------------------------------------


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
    level = 0.05 / math.ceil(math.log2(400))
    assert report.risk_bound == float(upper_bound(report.errors, report.accepted, level))


# --- Held-out data --------------------------------------------------------------------------------


def test_a_score_is_fitted_on_other_samples_than_the_threshold() -> None:
    seen: dict[str, list[float]] = {"fit": [], "score": []}

    class Spy(scores.LogitScore):
        def fit(self, model, loader, *, progress=True):
            for x, _ in loader:
                seen["fit"] += x[:, 0].tolist()
            return self

        def score(self, model, x):
            return self.score_and_predict(model, x)[0]

        def score_and_predict(self, model, x):
            seen["score"] += x[:, 0].tolist()
            return super().score_and_predict(model, x)

        def score_logits(self, logits):
            return logits.amax(1)

    x = torch.arange(400.0).div(400)[:, None].expand(400, 12).double()
    target = torch.zeros(400, dtype=torch.int64)
    data = DataLoader(TensorDataset(x, target), batch_size=30)
    report = Detector.fit(
        RowExact(), data, Spy(), coverage=0.5, tune_share=0.3, progress=False
    ).report
    assert sorted(seen["fit"] + seen["score"]) == x[:, 0].tolist()
    assert (len(seen["fit"]), len(seen["score"])) == (report.tuned_on, report.samples)
    assert 80 < report.tuned_on < 160  # of 400, each with probability 0.3


def test_all_samples_choose_the_threshold_of_a_fitted_score() -> None:
    score = scores.get("rr-fast").fit(RowExact(), loader(seed=3), progress=False)
    for fitted in (score, scores.get("rr-fast", **FAST), "msr"):
        assert fit(fitted).report.samples == 400
    unfitted = scores.get("rr-fast")
    detector = fit(unfitted)
    assert detector.report.samples + detector.report.tuned_on == 400
    assert detector.report.tuned_on > 40
    assert unfitted.needs_fit  # it was copied
    assert not detector.score.needs_fit


class Augmented(Dataset):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(12, dtype=torch.float64), 0


def test_loaders_whose_passes_differ() -> None:
    shuffled = loader(shuffle=True)
    for data, message in [
        (shuffled, "the loader shuffles"),
        (iter(loader()), "the loader is an iterator"),
        (DataLoader(Augmented(), batch_size=20), "the loader's passes differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            Detector.fit(RowExact(), data, "rr-fast", coverage=0.5, progress=False)
        if data is not shuffled:
            continue
        assert Detector.fit(RowExact(), data, "msr", coverage=0.5, progress=False)

    class Shorter(list):
        def __iter__(self):
            self.pop()
            return super().__iter__()

    with pytest.raises(ValueError, match="the loader's passes differ"):
        list(map(list, [(split := Split(Shorter(loader()), 0.5, 0)).tune, split.rest]))


# --- Cascades -------------------------------------------------------------------------------------


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


# --- Files ----------------------------------------------------------------------------------------

SAVED = {
    **{name: name for name in scores.names()},
    "odin, one setting": scores.get("odin", temperature=2.0, perturbation=0.1 / 3, bounds=(-1, 2)),
    "radius, options": scores.get("rr-bs", rtol=0.1, bounds=(-0.5, 1.5), search="bisect", **FAST),
    "cascade": Cascade("rel-u", "rr-bs", max_changed=0.1),
    "cascade, no band": Cascade("msr", "margin", max_changed=0.9),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_is_equal_to_the_bit(name: str, tmp_path: Path) -> None:
    model, path = Counting(), tmp_path / "detector.safetensors"
    detector = fit(SAVED[name], model, tpr=0.8, calibrate=name != "msr")
    detector.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = Detector.load(path, model)
    assert loaded.report == detector.report
    x, _ = labelled(60, seed=1)
    one, other = detector(x), loaded(x)
    for field in ("prediction", "confidence", "accepted", "probability"):
        assert same(getattr(one, field), getattr(other, field)), field
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_detector_is_for_one_model(tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    model = Counting()
    fit("msr", model).save(path)
    assert Detector.load(path, nn.ModuleDict({"module": model})) is not None  # as DDP wraps it
    other = Counting()
    other.norm.num_batches_tracked += 1
    with pytest.raises(ValueError, match=r"other weights than this Counting.*strict=False"):
        Detector.load(path, other)
    assert Detector.load(path, other, strict=False)(labelled(3)[0]).prediction.shape == (3,)
    with pytest.raises(ValueError, match=r"callable that is no nn.Module.*strict=False"):
        Detector.load(path, lambda x: model(x))
    fit("msr", lambda x: RowExact()(x)).save(path)
    with pytest.raises(ValueError, match="cannot be checked"):
        Detector.load(path, model)


def test_fingerprints_are_of_names_types_and_values() -> None:
    model = nn.Linear(2, 3)
    same_weights = nn.Linear(2, 3)
    same_weights.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(same_weights)
    assert fingerprint(nn.Sequential(model)) != fingerprint(model)
    assert fingerprint(model.double()) != fingerprint(same_weights)
    assert len(fingerprint(nn.Linear(2, 3).bfloat16())) == 64


def test_scores_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"

    class Scaled(scores.LogitScore):
        def __init__(self, scale: float = 1.0) -> None:
            self.scale = scale

        def score_logits(self, logits: Tensor) -> Tensor:
            return self.scale * logits.amax(1)

    class Saved(Scaled):
        def state(self) -> dict:
            return {"scale": self.scale}

    class Plain(scores.Score):
        def score(self, model: nn.Module, x: Tensor) -> Tensor:
            return x.sum(1)

    class Inherits(scores.Energy):
        def __init__(self, shift: float = 0.0) -> None:
            super().__init__()
            self.shift = shift

    with pytest.raises(ValueError, match="a Plain cannot be saved: its class is not registered"):
        fit(Plain()).save(path)
    own = {"own-scaled": Scaled, "own-saved": Saved, "own-plain": Plain, "own-inherits": Inherits}
    try:
        for name, cls in own.items():
            scores.register(name)(cls)
        for score in (Scaled(2.0), Inherits(1.0)):
            with pytest.raises(ValueError, match=r"defines __init__\(\), but not state\(\)"):
                fit(score).save(path)
        with pytest.raises(ValueError, match="JSON"):
            fit(Saved(math.inf)).save(path)
        assert not path.exists()
        for score in (Saved(2.0), Plain()):
            detector = fit(score)
            detector.save(path)
            x, _ = labelled(20, seed=1)
            out = Detector.load(path, Counting())(x)
            assert same(out.confidence, detector(x).confidence)
            assert torch.equal(out.prediction, RowExact()(x).argmax(1))
    finally:
        for name in own:
            registry._registry.pop(name, None)
    with pytest.raises(ValueError, match="'own-plain'; import the module that registers it"):
        Detector.load(path, Counting())


def test_what_is_not_a_detector(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="there is no detector"):
        Detector.load(path, RowExact())
    path.write_bytes(b"not tensors, whatever they say")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Detector.load(path, RowExact())
    safetensors.torch.save_file(RowExact().state_dict(), path)
    with pytest.raises(ValueError, match=r"is not a detector; Detector.save writes them"):
        Detector.load(path, RowExact())
    header = {"rat_ext.detector": json.dumps({"version": 99})}
    safetensors.torch.save_file({}, path, header)
    with pytest.raises(ValueError, match="version 99 of the format"):
        Detector.load(path, RowExact())


# --- Errors ---------------------------------------------------------------------------------------


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
        with pytest.raises(ImportError, match=r"pip install 'rat-ext\[detector\]'"):
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
