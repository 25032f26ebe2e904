"""The evaluation of scores over splits: its protocol, its cache, and what it writes."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rat_ext import datasets, evaluation, metrics, models, scores, training
from rat_ext._common.storage import locked
from rat_ext.evaluation import Settings, evaluate, work
from rat_ext.evaluation.cache import Cache
from rat_ext.scores import registry

FEW = ("msr", "odin", "rel-u", "rr-fast", "rr-bs")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> datasets.Images:
    return datasets.digits(200).test.subset(slice(400))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.create("digits-cnn")
    recipe = training.Recipe(loss="ce", epochs=20, batch_size=50, optimizer="adamw", lr=3e-3)
    return training.train(net, datasets.digits(200).train, recipe, progress=False).model


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "CHUNK", 150)


def test_is_the_protocol_of_the_scores(
    model: nn.Module, data: datasets.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    # In float64, so that other batches do not round radii into another order.
    model = copy.deepcopy(model).double()
    data = datasets.Images(data.pixels.double(), data.targets, data.classes)
    # Without rel-u, which depends on the order of the samples that it is fitted on.
    names = ("msr", "odin", "rr-fast", "rr-bs")
    settings = Settings(names, splits=2, validation_share=0.5, tune="temperature", batch_size=70)
    result = evaluate(model, data, settings, tmp_path, progress=False)
    x, target = data[:]
    with torch.no_grad():
        correct = model(x).argmax(1) == target
    assert torch.equal(result.correct, correct)
    for split, test in enumerate(result.tests):
        held_out = sorted(set(range(400)) - set(test.tolist()))
        assert len(held_out) == len(test) == 200
        for name, own in zip(names, result.results, strict=True):
            options = {"odin": {"perturbation": 0.0}}.get(name, {})
            score = scores.get(name, **options).fit(model, [data[held_out]], progress=False)
            expected = metrics.summary(score.score(model, x[test]), correct[test])
            assert own.splits[split] == pytest.approx(expected, rel=1e-6), name
            if isinstance(score, scores.TunedScore):
                assert own.chosen[split] == f"T={score.temperature:g}"
    assert not torch.equal(*result.tests)


def test_counts_rows_and_leaves_the_model(
    model: nn.Module, data: datasets.Images, tmp_path: Path
) -> None:
    model.train()
    state = torch.random.get_rng_state()
    settings = Settings(FEW, splits=1, tune="none")
    result = evaluate(model, data, settings, tmp_path, progress=False)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    model.eval()
    assert result.of("odin").chosen == ["T=1"]
    forward = {one.name: one.forward_rows for one in result.results}
    assert [forward[name] for name in FEW[:4]] == [1, 1, 1, 2]
    assert 3 < forward["rr-bs"] < 10
    assert [one.backward_rows for one in result.results] == [0, 0, 0, 1, 1]
    assert all(one.milliseconds > 0 for one in result.results)


class Interrupted(Exception):
    pass


def test_resumes_where_it_was_interrupted(
    model: nn.Module, data: datasets.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    settings = Settings(FEW, splits=2, validation_share=0.1)
    whole = evaluate(model, data, settings, tmp_path / "whole", progress=False)
    total = len(list((tmp_path / "whole/cache").glob("*.pt")))

    written = []
    write = Cache.__setitem__

    def counted(self: Cache, key: str, tensors: list[torch.Tensor]) -> None:
        if len(written) == limit:
            raise Interrupted
        written.append(key)
        write(self, key, tensors)

    monkeypatch.setattr(Cache, "__setitem__", counted)
    limit = total // 2
    with pytest.raises(Interrupted):
        evaluate(model, data, settings, tmp_path / "half", progress=False)
    limit = None
    resumed = evaluate(model, data, settings, tmp_path / "half", resume=True, progress=False)
    assert len(written) == len(set(written)) == total  # nothing twice
    assert [one.splits for one in resumed.results] == [one.splits for one in whole.results]

    other = Settings(FEW, splits=3)
    with pytest.raises(ValueError, match="is of another model, data set or settings"):
        evaluate(model, data, other, tmp_path / "half", resume=True, progress=False)
    evaluate(model, data, settings, tmp_path / "half", progress=False)  # starts anew
    assert len(written) == 2 * total


def test_scores_of_ones_own(
    model: nn.Module, data: datasets.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @scores.register("own-learnt")
    class Learnt(scores.Score):
        def fit(self, model, loader, *, progress=True):
            self.shift = sum(len(x) for x, _ in loader)
            return self

        def score(self, model, x):
            return x.mean((1, 2, 3)) + self.shift

    @scores.register("own-fixed")
    class Fixed(scores.Score):
        def score(self, model, x):
            return torch.full((len(x),), math.nan)

    @scores.register("own-shifted")
    class Shifted(scores.LogitScore):
        def fit(self, model, loader, *, progress=True):
            self.shift = sum(len(x) for x, _ in loader)
            return self

        def score_logits(self, logits):
            return logits.amax(1) + self.shift

    @scores.register("own-radius")  # a tuned score that does more than to choose
    class Weighted(scores.RRFast):
        def fit(self, model, loader, *, progress=True):
            super().fit(model, loader, progress=progress)
            self.weight = 1000.0
            return self

        def score(self, model, x):
            return self.weight + super().score(model, x)

    names = ("own-learnt", "own-fixed", "own-shifted", "own-radius")
    settings = Settings(names, splits=2, validation_share=0.25, tune="temperature")
    result = evaluate(model, data, settings, progress=False)
    learnt, fixed, shifted, weighted = result.results
    assert all(confidence.min() > 90 for confidence in shifted.confidences)
    assert all(confidence.min() >= 1000 for confidence in weighted.confidences)
    assert weighted.chosen[0].startswith("T=")
    assert learnt.chosen == ["", ""]
    assert all(confidence.min() > 100 for confidence in learnt.confidences)
    error = 1 - fixed.splits[0]["accuracy"]
    assert fixed.splits[0]["aurc"] == pytest.approx(error)  # nan: no information


def test_without_a_folder(model: nn.Module, data: datasets.Images, tmp_path: Path) -> None:
    settings = Settings(FEW, splits=2)
    kept = evaluate(model, data, settings, tmp_path / "kept", progress=False)
    found = evaluate(model, data, settings, progress=False)
    assert [one.splits for one in found.results] == [one.splits for one in kept.results]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(ValueError, match=r"to resume, .* give the folder"):
        evaluate(model, data, settings, resume=True, progress=False)


def test_without_held_out_images_all_are_tested_on(model: nn.Module, data: datasets.Images) -> None:
    settings = Settings(("msr", "rr-fast"), splits=1, validation_share=0, tune="none")
    result = evaluate(model, data, settings, progress=False)
    assert result.tests[0].sort().values.equal(torch.arange(400))
    for name, score in (("msr", scores.MSR()), ("rr-fast", scores.RRFast(1.0))):
        confidence = score.score(model, data[:][0])
        expected = metrics.summary(confidence, result.correct)
        assert result.of(name).splits[0] == pytest.approx(expected, rel=1e-6)
    curve = metrics.risk_coverage_curve(scores.MSR().score(model, data[:][0]), result.correct)
    assert result.curves("msr")[0].risk == pytest.approx(curve.risk)


def test_outliers_are_errors(model: nn.Module, data: datasets.Images, tmp_path: Path) -> None:
    mixture = datasets.with_outliers(data, data)
    result = evaluate(model, mixture, Settings(("msr",), splits=1), tmp_path, progress=False)
    assert not result.correct[400:].any()
    assert result.correct[:400].double().mean() > 0.7


def test_a_model_with_batch_normalisation(data: datasets.Images, tmp_path: Path) -> None:
    # Its state dict has a tensor without dimensions, num_batches_tracked.
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    settings = Settings(("msr",), splits=1)
    evaluate(net, data, settings, tmp_path, progress=False)
    evaluate(net, data, settings, tmp_path, resume=True, progress=False)
    net[0].num_batches_tracked += 1
    with pytest.raises(ValueError, match="is of another model"):
        evaluate(net, data, settings, tmp_path, resume=True, progress=False)


def test_what_is_written(model: nn.Module, data: datasets.Images, tmp_path: Path) -> None:
    settings = Settings(("msr", "rr-bs"), splits=2, tune="none")
    result = evaluate(model, data, settings, tmp_path, progress=False)
    evaluation.write(result, "Title <&>", tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["score"], row["split"]) for row in rows] == [
        ("msr", "0"), ("msr", "1"), ("rr-bs", "0"), ("rr-bs", "1"),
    ]  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    aurcs = [split["aurc"] for split in results["scores"]["rr-bs"]["splits"]]
    assert aurcs == [float(row["aurc"]) for row in rows[2:]]
    mean, std = 500 * sum(aurcs), 1000 * abs(aurcs[0] - aurcs[1]) / 2**0.5
    page = (tmp_path / "index.html").read_text()
    assert f'{mean:.2f} <span class="spread">± {std:.2f}</span>' in page
    assert f"{mean:.2f} ± {std:.2f}" in evaluation.table(result).text()
    area = 500 * sum(split["augrc"] for split in results["scores"]["rr-bs"]["splits"])
    assert "AUGRC x1000" in evaluation.table(result).columns
    assert f'{area:.2f} <span class="spread">' in page
    assert "<title>Title &lt;&amp;&gt;</title>" in page
    best = min(result.results, key=lambda one: sum(row["aurc"] for row in one.splits)).name
    histograms = 1 if best == "rr-bs" else 2
    assert page.count("<svg") == 2 + histograms  # with risk and coverage, and reliability


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": ("mrs",)}, "no score is named 'mrs'"),
        ({"splits": 0}, "splits is 0; it must be at least 1"),
        ({"scores": ("cascade",)}, "'cascade' is fitted to the threshold of a detector"),
        ({"validation_share": 1.0}, "validation_share is 1.0"),
        ({"validation_share": 0, "tune": "none"}, "leaves no images to fit 'rel-u' on"),
        ({"validation_share": 0, "scores": ("rr-bs",)}, "leaves no images to fit 'rr-bs' on"),
        ({"tune": "some"}, "tune is 'some'"),
    ],
)
def test_errors_of_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_too_few_images(model: nn.Module, data: datasets.Images, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 images are too few to split"):
        evaluate(model, data.subset(slice(2)), Settings(), tmp_path, progress=False)
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_one_line_and_computed_again(tmp_path):
    model, data = models.create("digits-cnn").eval(), datasets.digits(train_size=100).validation
    chosen = Settings(scores=("msr",), splits=1)
    first = evaluate(model, data, chosen, tmp_path, progress=False)
    (damaged,) = (tmp_path / "cache").glob("logits-*.pt")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"logits-0\.pt is damaged; delete it, and resume"):
        evaluate(model, data, chosen, tmp_path, resume=True, progress=False)
    damaged.unlink()
    again = evaluate(model, data, chosen, tmp_path, resume=True, progress=False)
    assert torch.equal(again.prediction, first.prediction)


def test_one_evaluation_a_folder(tmp_path):
    model, data = models.create("digits-cnn").eval(), datasets.digits(train_size=100).validation
    with (
        locked(tmp_path / "cache", "another one"),
        pytest.raises(BlockingIOError, match="is in use by another one, process"),
    ):
        evaluate(model, data, Settings(scores=("msr",)), tmp_path, progress=False)
