"""SWA, SAM, CRL, label smoothing and logit normalisation, against their papers' equations."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rat_ext import datasets, models
from rat_ext.training import RATLoss, Recipe, train
from rat_ext.training.augmentation import smoothed
from rat_ext.training.crl import CorrectnessHistory, correctness_ranking
from rat_ext.training.run import Run
from rat_ext.training.sam import at_worst_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("a", "b", "c")


def data(count: int = 24) -> datasets.Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return datasets.Images(pixels, torch.arange(count) % 3, CLASSES)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)
        return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), linear).double()


def plain(**changes: Any) -> Recipe:
    """Gradient descent: the steps are the gradients."""
    recipe = {"loss": "ce", "epochs": 1, "batch_size": 24, "lr": 0.1, "momentum": 0.0}
    return Recipe(**{**recipe, "weight_decay": 0.0, **changes})


def started(recipe: Recipe, model: nn.Module | None = None) -> Run:
    return Run(model or network(), data(), recipe, torch.device("cpu"), 0, 1)


def epochs(run: Run, count: int) -> list[dict[str, Tensor]]:
    """The weights at the end of each epoch."""
    weights = []
    for _ in range(count):
        run.train_epoch(0, _NoBar())
        weights.append(copy.deepcopy(run.model.state_dict()))
    return weights


class _NoBar:
    def update(self) -> None:
        pass


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_sam_descends_along_the_gradient_at_the_worst_weights_nearby(rho: float) -> None:
    expected, (x, t) = network(), data()[:]
    expected.train()
    g = gradients(F.cross_entropy(expected(x), t), expected)
    once = {name: value.clone() for name, value in expected.named_buffers()}
    length = sum(float((each**2).sum()) for each in g) ** 0.5
    there = copy.deepcopy(expected)
    with torch.no_grad():
        for parameter, each in zip(there.parameters(), g, strict=True):
            parameter += rho * each / length
    worst = gradients(F.cross_entropy(there(x), t), there)
    with torch.no_grad():
        for parameter, each in zip(expected.parameters(), worst, strict=True):
            parameter -= 0.1 * each
    (trained,) = epochs(started(plain(sam=rho, lr=0.1, epochs=1, warmup=0)), 1)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-9, atol=1e-12)
    for name, value in once.items():  # the second pass leaves no trace in them
        torch.testing.assert_close(trained[name], value)


def test_sam_puts_the_weights_back_after_an_error_and_where_there_is_no_gradient() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    where = []

    def fail() -> None:
        with at_worst_weights(model, 0.5):
            where.append(copy.deepcopy(model.state_dict()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in where[0].items())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KeyError):
        fail()
    assert not torch.equal(where[1]["0.weight"], before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_swa_is_the_mean_of_the_last_epochs_with_its_own_statistics() -> None:
    run = started(plain(epochs=5, swa=3, batch_size=8))
    ends = epochs(run, 5)
    mean = {name: sum(end[name] for end in ends[2:]) / 3 for name in ends[0]}
    result = run.result
    assert result is not run.model
    for name, value in result.named_parameters():
        torch.testing.assert_close(value.detach(), mean[name])
        assert not torch.equal(value, ends[-1][name])
    x, _ = data()[:]
    with torch.no_grad():
        y = result[0](x)
        batches = [result[0](part).transpose(0, 1).flatten(1) for part in x.split(8)]
    torch.testing.assert_close(result[1].running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(
        result[1].running_var, torch.stack([each.var(1) for each in batches]).mean(0)
    )


def test_statistics_of_averaged_weights_are_of_images_as_they_were_trained_on() -> None:
    white = datasets.Images(torch.ones(32, 3, 16, 16), torch.arange(32) % 2, ("a", "b"))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(768, 2))
    recipe = plain(epochs=1, warmup=0, swa=1, batch_size=16, augment="crop")
    run = Run(model, white, recipe, torch.device("cpu"), 0, 1)
    epochs(run, 1)
    # Shifts of 0 to 2 pixels take 1.2 of 16 on the average, in both directions.
    assert run.result[0].running_mean.mean().item() == pytest.approx((1 - 1.2 / 16) ** 2, abs=0.03)


def test_swa_falls_to_its_learning_rate_and_stays_there() -> None:
    run = started(plain(epochs=6, swa=2, swa_lr=0.02, lr=0.5, batch_size=8))
    rates = [run.learning_rate(step) for step in range(18)]
    expected = [0.02 + 0.48 * (1 + np.cos(np.pi * step / 12)) / 2 for step in range(12)]
    assert rates == pytest.approx([*expected, *[0.02] * 6])


def test_swa_gives_the_checkpoint_and_the_caller_the_same_net(tmp_path: Path) -> None:
    images = datasets.digits(60).train
    recipe = Recipe(loss="ce", epochs=3, swa=2, batch_size=20)
    model = models.create("digits-cnn")
    train(model, images, recipe, out=tmp_path, name="digits-cnn", progress=False)
    loaded = models.create("digits-cnn")
    models.load_weights(loaded, tmp_path / "last.pt")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    # Before the first average, the net is that of the last step.
    run = Run(model, images, recipe, torch.device("cpu"), 0, 1)
    run.train_epoch(0, _NoBar())
    assert run.result is run.model


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(0, 99))
def test_the_ranking_loss_is_the_papers(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, 4)) * 3
    shares = generator.integers(0, 4, count) / 3
    exponents = np.exp(logits)
    k = (exponents / exponents.sum(1, keepdims=True)).max(1)
    terms = []
    for i in range(count):
        j = (i + 1) % count
        g = 1 if shares[i] > shares[j] else -1 if shares[i] < shares[j] else 0
        terms.append(max(0.0, -g * (k[i] - k[j]) + abs(shares[i] - shares[j])))
    loss = correctness_ranking(torch.tensor(logits), torch.tensor(shares))
    assert float(loss) == pytest.approx(np.mean(terms), abs=1e-12)


def test_the_history_counts_what_each_epoch_predicted() -> None:
    run = started(plain(epochs=3, crl=1.0, batch_size=10))  # 4 samples are left out each epoch
    assert isinstance(run.correctness, CorrectnessHistory)
    seen, right = np.zeros(24), np.zeros(24)
    inner = run._loss

    def watched(x: Tensor, t: Tensor, index: Tensor, mix: None) -> tuple[Tensor, Tensor]:
        shares = run.correctness.shares(index)
        expected = [right[i] / seen[i] if seen[i] else 0 for i in index]
        assert shares.tolist() == pytest.approx(expected)
        assert torch.equal(t, data().targets[index])
        loss, logits = inner(x, t, index)
        waiting.extend(zip(index.tolist(), (logits.argmax(1) == t).tolist(), strict=True))
        return loss, logits

    run._loss = watched
    for _ in range(3):
        waiting: list[tuple[int, bool]] = []
        run.train_epoch(0, _NoBar())
        for sample, correct in waiting:
            seen[sample] += 1
            right[sample] += correct
    assert run.correctness.counts.tolist() == [seen.tolist(), right.tolist()]
    assert seen.sum() == 60
    assert 0 < right.sum() < 60


@pytest.mark.parametrize("loss", ["ce", "rat"])
def test_the_ranking_loss_is_added_to_the_others(loss: str) -> None:
    recipe = plain(loss=loss, crl=0.7, eps=0.05, lam=2.0)
    run = started(recipe)
    run.correctness.counts = torch.stack([torch.full((24,), 4.0), torch.arange(24) % 5.0])
    images, index = data(), torch.randperm(24)
    x, t = images[index]
    model = run.model.train()
    total, _ = run._loss(x, t, index)
    total.backward()
    found = [parameter.grad for parameter in model.parameters()]

    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    clean = F.cross_entropy(logits, t)
    (g,) = torch.autograd.grad(clean, leaf, retain_graph=True)  # not of the ranking loss
    sign = torch.where(logits.argmax(1) == t, 1.0, -1.0).double().view(-1, 1, 1, 1)
    moved = (x + sign * 0.05 * g.sign()).clamp(0, 1)
    ranking = correctness_ranking(logits, (torch.arange(24) % 5.0 / 4)[index])
    expected = clean + 0.7 * ranking
    if loss == "rat":
        expected = expected + 2.0 * F.cross_entropy(model(moved), t)
    assert float(total.detach()) == pytest.approx(float(expected.detach()))
    for mine, theirs in zip(found, gradients(expected, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


def test_an_extra_loss_may_leave_parameters_alone() -> None:
    model, (x, t) = network().train(), data()[:]
    RATLoss(0.01)(model, x, t, extra=lambda logits: 0 * logits.sum()).loss.backward()
    with_zero = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    RATLoss(0.01)(model, x, t).loss.backward()
    for parameter, other in zip(model.parameters(), with_zero, strict=True):
        torch.testing.assert_close(parameter.grad, other)


def test_label_smoothing_is_torchs() -> None:
    logits, t = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    mine = F.cross_entropy(logits, smoothed(t, 0.2, 3).double())
    assert float(mine) == pytest.approx(float(F.cross_entropy(logits, t, label_smoothing=0.2)))
    probabilities = torch.rand(6, 3).softmax(1)
    both = smoothed(probabilities, 0.2, 3)
    torch.testing.assert_close(both, 0.8 * probabilities + 0.2 / 3)
    run = started(plain(label_smoothing=0.2))
    x, t = data()[:]
    loss, _ = run._loss(x, t, torch.arange(24))
    expected = F.cross_entropy(run.model(x), t, label_smoothing=0.2)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize("loss", ["ce", "rat"])
def test_logit_normalisation_is_the_papers(loss: str) -> None:
    run = started(plain(loss=loss, logit_norm=0.1, eps=0.05, lam=1.0))
    x, t = data()[:]
    model = run.model.train()

    def normalised(x: Tensor) -> Tensor:
        z = model(x)
        return z / (0.1 * (z**2).sum(1, keepdim=True).sqrt())

    leaf = x.clone().requires_grad_()
    logits = normalised(leaf)
    expected = F.cross_entropy(logits, t)
    (g,) = torch.autograd.grad(expected, leaf, retain_graph=True)
    sign = torch.where(logits.argmax(1) == t, 1.0, -1.0).double().view(-1, 1, 1, 1)
    if loss == "rat":
        moved = (x + sign * 0.05 * g.sign()).clamp(0, 1)
        expected = expected + F.cross_entropy(normalised(moved), t)
    found, _ = run._loss(x, t, torch.arange(24))
    assert float(found.detach()) == pytest.approx(float(expected.detach()))
    assert run.result is model  # which gives its logits as they are


def test_a_checkpoint_that_knows_fewer_settings_goes_on(tmp_path: Path) -> None:
    images = datasets.digits(60).train
    recipe = Recipe(loss="ce", epochs=2, batch_size=20)
    path = tmp_path / "last.pt"
    train(models.create("digits-cnn"), images, recipe, out=tmp_path, progress=False)
    state = torch.load(path, weights_only=True)
    for name in ("swa", "swa_lr", "sam", "crl", "label_smoothing", "logit_norm"):
        del state["recipe"][name]
    del state["correctness"]
    torch.save(state, path)
    train(models.create("digits-cnn"), images, recipe, out=tmp_path, progress=False)
    other = dataclasses.replace(recipe, sam=0.05)
    with pytest.raises(ValueError, match=r"of another recipe \(sam was 0.0, is 0.05\)"):
        train(models.create("digits-cnn"), images, other, out=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swa": -1}, "swa is -1; it must be at least 0"),
        ({"swa": 4, "epochs": 4, "warmup": 1}, "swa is 4; there are 4 epochs, 1 of warm-up"),
        ({"swa": 1, "ema": 0.9}, "ema and swa are both given; only one of them can be"),
        ({"crl": 1.0, "mixup": 1.0}, "crl and mixup are both given"),
        ({"swa_lr": 0.0}, "swa_lr is 0.0; it must be positive"),
        ({"sam": -0.1}, "sam is -0.1; it must not be negative"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be from 0 to below 1"),
        ({"logit_norm": float("nan")}, "logit_norm is nan; it must not be negative"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)
