"""Which images --limit and --skip take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rat_ext import datasets
from rat_ext.cli.main import parse
from rat_ext.detector.threshold import Rule


def test_what_fit_takes_and_apply_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sorted:  # an ImageFolder, but for the images
        def __init__(self) -> None:
            self.targets = [i // 100 for i in range(1000)]
            self.classes = list("abcdefghij")

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return torch.full((1, 2, 2), i), self.targets[i]

    monkeypatch.setattr(datasets, "load", lambda *_, **__: Sorted())
    taken = {}
    commands = {"fit": ["--limit", "200", "--tpr", "0.9"], "apply": ["--skip", "200"]}
    commands["apply"] += ["--detector", "file"]
    for action, arguments in commands.items():
        command = ["detector", action, "--data", "folder:x", "--out", "file", *arguments]
        for seed in ("0", "0", "1"):
            options = parse([*command, "--sample-seed", seed]).action
            data, index = options.images.load("test", options.skip)
            assert [int(x[0, 0, 0]) for x, _ in map(data.__getitem__, range(len(data)))] == index
            assert index == sorted(index)
            counts = torch.tensor([data[i][1] for i in range(len(data))]).bincount(minlength=10)
            share = len(index) // 10
            assert ((counts - share).abs() <= 1).all()
            assert taken.setdefault((action, seed), index) == index
    for seed in ("0", "1"):
        assert sorted(taken["fit", seed] + taken["apply", seed]) == list(range(1000))
    assert taken["fit", "0"] != taken["fit", "1"]
    options = parse([*command, "--skip", "0", "--limit", "2000"]).action
    assert options.images.load("test", options.skip)[1] == list(range(1000))


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--model", "digits-cnn"],
        ["evaluate"],
        ["radii"],
        ["detector", "fit", "--tpr", "0.9"],
    ],
)
def test_limit_is_a_sample_of_all_classes(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = torch.arange(10).repeat_interleave(50)
    images = datasets.Images(torch.rand(500, 1, 2, 2), target, tuple("abcdefghij"))
    monkeypatch.setattr(datasets, "load", lambda *_, **__: images)
    options = parse([*command, "--data", "x", "--out", "x", "--limit", "40"])
    options = getattr(options, "action", options)
    assert options.images.load("test")[0].targets.bincount().tolist() == [4] * 10


def test_an_order_without_targets() -> None:
    class Unlabelled:
        def __len__(self) -> int:
            return 50

    orders = [datasets.shuffled(Unlabelled(), seed).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_each_image_is_as_likely_to_be_taken() -> None:
    target = torch.tensor([0] * 6 + [1] * 3 + [2])
    images = datasets.Images(torch.rand(10, 1, 1, 1), target, ("a", "b", "c"))
    taken = torch.cat([datasets.shuffled(images, seed)[:4] for seed in range(2000)])
    shares = taken.bincount(minlength=10) / 2000
    torch.testing.assert_close(shares, torch.full((10,), 0.4), atol=0.05, rtol=0)


def test_the_guarantee_on_sorted_data() -> None:
    """The error rates of the classes differ, the first being the easiest."""
    target_risk, delta, runs = 0.05, 0.1, 200
    rule, rng = Rule("target_risk", target_risk, delta), np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 400)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        confidence = rng.random(len(labels))
        return confidence, rng.random(len(labels)) < (0.06 + 0.03 * labels) * (1 - confidence)

    population = [
        np.concatenate(parts) for parts in zip(*(drawn() for _ in range(100)), strict=True)
    ]
    order = np.argsort(-population[0])
    rates = np.cumsum(population[1][order]) / np.arange(1, len(order) + 1)
    exceeded = {"sample": 0, "first": 0}
    classes = tuple("abcdefghij")
    images = datasets.Images(torch.rand(4000, 1, 1, 1), torch.from_numpy(labels), classes)
    for seed in range(runs):
        confidence, wrong = drawn()
        parts = {"sample": datasets.shuffled(images, seed)[:1000].numpy(), "first": np.arange(1000)}
        for name, part in parts.items():
            try:
                threshold = rule.choose(confidence[part], ~wrong[part])
            except ValueError:
                continue
            accepted = np.searchsorted(-population[0][order], -threshold.value, side="right")
            exceeded[name] += rates[accepted - 1] > target_risk
    assert exceeded["sample"] <= stats.binom.ppf(0.999, runs, delta)
    assert exceeded["first"] > 0.5 * runs
