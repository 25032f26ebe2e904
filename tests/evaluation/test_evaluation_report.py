"""What the report of an evaluation says: verdict, calibration, examples, and how it was made."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from html_page import structure_of
from PIL import Image
from torch import Tensor

from rat_ext import datasets, evaluation, metrics, scores
from rat_ext.evaluation import Evaluation, Result, Settings, examples
from rat_ext.evaluation.calibration import reliabilities
from rat_ext.evaluation.verdict import Comparison, compare, differences, verdict
from rat_ext.metrics import Estimate

CLASSES = ("cat", 'do"g', "<b>cow</b>")


def evaluated(
    confidences: dict[str, Tensor], logits: Tensor, target: Tensor, splits: int = 2
) -> Evaluation:
    """As if these confidences had been computed, the same in each split."""
    generator = torch.Generator().manual_seed(0)
    tests = [torch.randperm(len(target), generator=generator)[: len(target) // 2 or 1]] * splits
    tests = [test.roll(split)[: len(test) - split or 1] for split, test in enumerate(tests)]
    correct = logits.argmax(1) == target
    results = []
    for name, confidence in confidences.items():
        known = confidence.nan_to_num(-math.inf, math.inf, -math.inf)
        rows = [metrics.summary(known[test], correct[test]) for test in tests]
        results.append(Result(name, rows, [""] * splits, [confidence] * splits, 1.0, 1.0, 0.0))
    return Evaluation(Settings(tuple(confidences), splits), logits, target, tests, results)


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(600, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target(logits: Tensor) -> Tensor:
    """Drawn from the softmax at temperature 3, so that at 1 it is over-confident."""
    probabilities = (logits / 3).softmax(1)
    return probabilities.multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(1)


@pytest.fixture
def noise() -> Tensor:
    return torch.rand(600, generator=torch.Generator().manual_seed(2))


def test_the_comparison_is_of_the_means_in_the_table(
    logits: Tensor, target: Tensor, noise: Tensor
) -> None:
    correct = logits.argmax(1) == target
    msr = scores.MSR().score_logits(logits)
    found = evaluated({"margin": noise, "msr": msr, "rr-bs": noise + 2 * correct}, logits, target)
    comparison = compare(found)
    assert list(comparison.aurc) == ["msr", "margin", "rr-bs"]
    for result in found.results:
        mean = np.mean([row["aurc"] for row in result.splits])
        assert comparison.aurc[result.name] == pytest.approx(mean)
    for name, difference in comparison.difference.items():
        assert difference.value == pytest.approx(comparison.aurc[name] - comparison.aurc["msr"])
    assert comparison.difference["rr-bs"].high < 0 < comparison.difference["margin"].low
    assert compare(found) == comparison
    other = dataclasses.replace(found.settings, seed=1)
    assert compare(dataclasses.replace(found, settings=other)) != comparison
    (sentence,) = verdict(comparison)
    assert sentence.startswith(
        "rr-bs finds wrong predictions best: it ranks errors better than the softmax baseline msr "
        "(AURC x1000 "
    )
    rows = differences(comparison).rows
    assert [(row[0], row[-1]) for row in rows] == [("rr-bs", "better"), ("margin", "worse")]
    assert rows[0][2].startswith("-")
    assert rows[1][2].startswith("+")


def test_the_baseline_need_not_be_evaluated(logits: Tensor, target: Tensor, noise: Tensor) -> None:
    msr = scores.MSR().score_logits(logits)
    both = compare(evaluated({"msr": msr, "rr-bs": noise}, logits, target))
    alone = compare(evaluated({"rr-bs": noise}, logits, target))
    assert alone == both


def test_verdict_on_the_softmax_as_the_best(logits: Tensor, target: Tensor, noise: Tensor) -> None:
    msr = scores.MSR().score_logits(logits)
    others = {"margin": msr.double() ** 2, "rr-fast": noise, "rr-bs": noise - 1}
    first, second = verdict(compare(evaluated({"msr": msr, **others}, logits, target)))
    assert first.startswith(
        "No score ranks errors better than the softmax baseline msr; next is margin, but no "
        "difference can be told (AURC"
    )
    assert "difference +0.00, 95 % interval +0.00 to +0.00, paired over images" in first
    assert second.startswith("Of the radii, rr-fast ranks errors worse than the softmax baseline")
    only = verdict(compare(evaluated({"msr": msr}, logits, target)))
    assert len(only) == 1
    assert only[0].startswith("Only the softmax baseline msr was evaluated: AURC x1000")


LOWER, HIGHER = Estimate(-2e-3, -3.1e-3, -1e-3), Estimate(2.6e-3, 1.2e-3, 3.7e-3)
NEITHER = Estimate(-1e-4, -2e-3, 1.9e-3)
EVIDENCE = {
    LOWER: "(AURC x1000 19.60 against 21.60; difference -2.00, 95 % interval -3.10 to -1.00, "
    "paired over images).",
    HIGHER: "(AURC x1000 24.20 against 21.60; difference +2.60, 95 % interval +1.20 to +3.70, "
    "paired over images).",
    NEITHER: "(AURC x1000 21.50 against 21.60; difference -0.10, 95 % interval -2.00 to +1.90, "
    "paired over images).",
}


@pytest.mark.parametrize(
    ("differences", "told"),
    [
        ({"odin": LOWER}, ["odin finds wrong predictions best: it ranks errors better than BASE"]),
        ({"odin": NEITHER}, ["odin has the lowest AURC, but no difference from BASE can be told"]),
        (
            {"odin": HIGHER},
            ["No score ranks errors better than BASE; next is odin, which ranks them worse"],
        ),
        (
            {"odin": LOWER, "rr-bs": HIGHER},
            ["odin finds wrong predictions best: it ranks errors better than BASE",
             "Of the radii, rr-bs ranks errors worse than BASE"],
        ),
        (
            {"odin": LOWER, "rr-bs": NEITHER},
            ["odin finds wrong predictions best: it ranks errors better than BASE",
             "Of the radii, no difference between rr-bs and BASE can be told"],
        ),
        (
            {"rr-bs": LOWER},
            ["rr-bs finds wrong predictions best: it ranks errors better than BASE"],
        ),
    ],
)  # fmt: skip
def test_verdicts(differences: dict[str, Estimate], told: list[str]) -> None:
    aurc = {"msr": 0.0216, **{name: 0.0216 + each.value for name, each in differences.items()}}
    evidence = [EVIDENCE[each] for each in differences.values()]
    assert verdict(Comparison(aurc, differences)) == [
        f"{text.replace('BASE', 'the softmax baseline msr')} {own}"
        for text, own in zip(told, evidence, strict=True)
    ]


def test_reliabilities(logits: Tensor, target: Tensor, noise: Tensor) -> None:
    msr = scores.MSR().score_logits(logits)
    target[5] = -1  # an outlier
    logits[7] = math.nan
    views = msr.clone()
    views[9] = math.nan
    found = evaluated({"rr-bs": noise, "msr-views": views}, logits, target)
    diagrams = reliabilities(found)
    (name,) = (name for name in diagrams if "temperature" in name)
    assert list(diagrams) == ["msr", name, "msr-views"]
    assert re.fullmatch(r"msr after temperature scaling \(T=[\d.]+\)", name)
    assert diagrams[name].ece < diagrams["msr"].ece - 0.02
    test = found.tests[0]
    known = test[(test != 7) & (test != 9)]
    expected = metrics.reliability(views[known], found.correct[known])
    assert np.array_equal(diagrams["msr-views"].accuracy, expected.accuracy)
    every = Evaluation(found.settings, logits, target, [torch.arange(600)], found.results)
    assert list(reliabilities(every)) == ["msr", "msr-views"]


class Doubtful:
    """Ten samples, the confidence of which is their number; 3, 5 and 9 are predicted wrong."""

    def __init__(self, pixels: Tensor) -> None:
        target = torch.arange(10) % 3
        prediction = torch.where(torch.tensor([i in (3, 5, 9) for i in range(10)]), 1, target)
        prediction[9] = 2
        logits = 5 * torch.nn.functional.one_hot(prediction, 3).float()
        target[3] = -1
        self.data = datasets.Images(pixels, target, CLASSES)
        every = evaluated({"rr-bs": torch.arange(10.0) / 7}, logits, target, splits=1)
        self.evaluation = Evaluation(
            every.settings, logits, target, [torch.arange(10).flip(0)], every.results
        )


def test_examples_as_pictures() -> None:
    case = Doubtful(torch.rand(10, 3, 8, 8))
    title, note, gallery, other, _, wrong = examples.sections(
        case.evaluation, "rr-bs", "all", case.data
    )
    assert "The most doubtful predictions" in title
    assert "Confident and wrong" in other
    assert "Of all, those of lowest rr-bs." in note
    numbers = re.findall(r"no\. (\d+)", gallery)
    assert numbers == [str(i) for i in range(10)]
    assert re.findall(r"no\. (\d+)", wrong) == ["9", "5", "3"]
    assert gallery.count('<li class="wrong">') == wrong.count('<li class="wrong">') == 3
    assert "rr-bs 0.1429" in gallery
    assert "<b>cow" not in gallery.replace("<b>cat", "")
    assert 'alt="Image 3: predicted do&quot;g, in truth an outlier"' in wrong
    assert 'alt="Image 9: predicted &lt;b&gt;cow&lt;/b&gt;, in truth cat"' in wrong


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (True, [["9", "&lt;b&gt;cow&lt;/b&gt;", "cat"],
                ["5", "do&quot;g", "&lt;b&gt;cow&lt;/b&gt;"], ["3", "do&quot;g", "an outlier"]]),
        (False, [["9", "class 2", "class 0"], ["5", "class 1", "class 2"],
                 ["3", "class 1", "an outlier"]]),
    ],
)  # fmt: skip
def test_examples_of_other_data_are_a_table(known: bool, expected: list[list[str]]) -> None:
    case = Doubtful(torch.rand(10, 30))
    *_, wrong = examples.sections(case.evaluation, "rr-bs", "all", case.data if known else None)
    assert "<img" not in wrong
    cells = re.findall(r'<td class="text">(.*?)</td>', wrong)
    assert [cells[i : i + 3] for i in range(0, len(cells), 4)] == expected
    assert cells[3::4] == ["1.286", "0.7143", "0.4286"]


def test_no_wrong_predictions_no_section() -> None:
    case = Doubtful(torch.rand(10, 1, 8, 8))
    found = case.evaluation
    right = Evaluation(
        found.settings, found.logits, found.logits.argmax(1), found.tests, found.results
    )
    assert len(examples.sections(right, "rr-bs", "all", case.data)) == 3


def test_images_of_a_folder_are_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name, color in (("green", (0, 255, 0)), ("red", (255, 0, 0))):
        (folder / "test" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (224, 224), color).save(folder / "test" / name / f"{i}.png")
    data = datasets.load(f"folder:{folder}", "test")
    model = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)
    )
    settings = Settings(("msr", "rr-fast"), splits=1, validation_share=0.25, tune="none")
    result = evaluation.evaluate(model, data, settings, progress=False)
    evaluation.write(result, "title", tmp_path / "out", data=data)
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    wrong = int((~result.correct[result.tests[0]]).sum())
    assert page.count("<img") == 6 + wrong
    assert re.search(r'alt="Image \d: predicted (green|red), in truth (green|red)"', page)


def test_how_it_was_made(logits: Tensor, target: Tensor, noise: Tensor, tmp_path: Path) -> None:
    found = evaluated({"rr-bs": noise, "msr": noise}, logits, target)
    command = "rat-ext evaluate --data 'a & <b>'"
    about = {"data set": "a & <b>", "model": "some-net"}
    evaluation.write(found, "title", tmp_path, command=command, about=about)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert structure_of(page).texts["h2"] == [
        "Scores", "Differences from msr", "Costs", "Risk and coverage",
        "Right and wrong predictions", "Are the probabilities right?",
        "The most doubtful predictions", "Confident and wrong", "How this report was made",
    ]  # fmt: skip
    record = page[page.index("How this report was made") :]
    assert (
        "<dt>command</dt><dd>rat-ext evaluate --data &#x27;a &amp; &lt;b&gt;&#x27;</dd>" in record
    )
    assert "<dd>some-net</dd>" in record
    assert "<dt>images</dt><dd>600</dd>" in record
    assert "<dt>classes</dt><dd>3</dd>" in record
    assert "scores=rr-bs msr, splits=2, validation_share=0.2, tune=all, seed=0" in record
    assert f"torch {torch.__version__}" in record
    made = json.loads((tmp_path / "results.json").read_text())["made"]
    assert made["command"] == command
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", made["date"])
    evaluation.write(found, "title", tmp_path)
    assert "<dt>command</dt>" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_results_have_the_verdict(
    logits: Tensor, target: Tensor, noise: Tensor, tmp_path: Path
) -> None:
    found = evaluated({"rr-bs": noise}, logits, target)
    told = evaluation.write(found, "title", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["verdict"] == told == verdict(compare(found))
    low = compare(found).difference["rr-bs"].low
    assert results["aurc_less_that_of_msr"]["rr-bs"]["low"] == low
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f'<p class="lead">{results["verdict"][0]}</p>' in page
    assert page.index("lead") < page.index("<h2>")
