"""The training loop: what it learns, that it resumes exactly, and on several processes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rat_ext import datasets, models
from rat_ext.training import Recipe, train
from rat_ext.training.augmentation import AUGMENTATIONS, Mixup, crop_flip
from rat_ext.training.run import Run

FAST = Recipe(epochs=8, batch_size=50, optimizer="adamw", lr=3e-3, eps=0.05)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> datasets.Splits:
    return datasets.digits(400, seed=1)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.create("digits-cnn")


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("loss", ["ce", "rat"])
def test_learns_and_leaves_the_random_state(digits: datasets.Splits, loss: str) -> None:
    state = torch.random.get_rng_state()
    recipe = dataclasses.replace(FAST, loss=loss)
    model = network()
    result = train(model, digits.train, recipe, validation=digits.validation, progress=False)
    assert result.model is model
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [row["epoch"] for row in result.history] == list(range(1, 9))
    assert result.history[-1]["validation_accuracy"] > 0.85
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_pgd_and_bfloat16(digits: datasets.Splits) -> None:
    recipe = dataclasses.replace(FAST, steps=3, bf16=True)
    history = train(network(), digits.train, recipe, validation=digits.test, progress=False).history
    assert history[-1]["validation_accuracy"] > 0.8


EVERYTHING = Recipe(
    epochs=4, batch_size=64, lr=0.05, eps=0.05, warmup=1, augment="crop-flip", mixup=0.4,
    mixup_off=1, ema=0.9, seed=3,
)  # fmt: skip


RIVALS = Recipe(
    epochs=4, batch_size=64, lr=0.05, eps=0.05, swa=4, swa_lr=0.01, sam=0.05, crl=1.0,
    label_smoothing=0.1, logit_norm=0.1,
)  # fmt: skip


class Killed(Exception):
    pass


class Killer(datasets.Images):
    """Images that stop the run at a batch."""

    def __getitem__(self, index):
        self.__dict__["served"] = self.__dict__.get("served", 0) + 1
        if self.served > 8:  # in the second of the epochs, of 6 batches each
            raise Killed
        return super().__getitem__(index)


@pytest.mark.parametrize("recipe", [EVERYTHING, RIVALS], ids=["everything", "rivals"])
def test_resumes_bit_for_bit_after_a_kill(
    digits: datasets.Splits, tmp_path: Path, recipe: Recipe
) -> None:
    data = digits.train
    whole = train(network(), data, recipe, validation=digits.test, progress=False)

    killer = Killer(data.pixels, data.targets, data.classes)
    with pytest.raises(Killed):
        train(network(), killer, recipe, validation=digits.test, out=tmp_path, progress=False)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 2
    model = network(seed=9)  # its weights come from the checkpoint
    resumed = train(model, data, recipe, validation=digits.test, out=tmp_path, progress=False)
    assert resumed.history == whole.history
    assert_same(resumed.model, whole.model)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 5

    again = train(network(), data, recipe, out=tmp_path, progress=False)  # nothing to do
    assert_same(again.model, whole.model)


def test_a_checkpoint_of_another_recipe_is_refused(digits: datasets.Splits, tmp_path: Path) -> None:
    recipe = dataclasses.replace(FAST, epochs=1)
    train(network(), digits.train, recipe, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another recipe \(epochs was 1, is 8\); use the same"):
        train(network(), digits.train, FAST, out=tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(digits: datasets.Splits, tmp_path: Path) -> None:
    recipe = dataclasses.replace(FAST, lr=1e30, loss="ce", optimizer="sgd")
    with pytest.raises(FloatingPointError, match="in epoch 1; lower lr"):
        train(network(), digits.train, recipe, out=tmp_path, progress=False)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "mse"}, "loss is 'mse'; expected 'ce' or 'rat'"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"augment": "flip"}, "augment is 'flip'; expected 'none' or 'crop' or 'crop-flip'"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_errors_of_a_recipe(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_learning_rate_warms_up_and_falls(digits: datasets.Splits) -> None:
    recipe = Recipe(epochs=10, warmup=2, lr=1.0, batch_size=100)
    run = Run(network(), digits.train, recipe, torch.device("cpu"), 0, 1)
    rates = [run.learning_rate(step) for step in range(40)]
    assert rates[:8] == pytest.approx([step / 9 for step in range(1, 9)])
    assert rates[8] == 1
    assert rates[24] == pytest.approx(0.5)
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_every_epoch_and_every_seed_has_random_numbers_of_its_own(
    digits: datasets.Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []  # of the samples
    drawn: list[float] = []  # by what draws from the global state, as transforms do
    seeds: list[int] = []  # of augmentation

    class Watched(datasets.Images):
        def __getitem__(self, index):
            order.extend(index)
            drawn.append(float(torch.rand(())))
            return super().__getitem__(index)

    def watched(x: torch.Tensor, generator: torch.Generator, *_: object) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return x

    monkeypatch.setitem(AUGMENTATIONS, "none", watched)
    part = digits.train.subset(slice(0, 100))
    data = Watched(part.pixels, part.targets, part.classes)
    for seed in (0, 1, 0):
        train(network(), data, Recipe(epochs=3, batch_size=50, seed=seed), progress=False)
    runs = [
        [(order[i : i + 100], drawn[i // 50 : i // 50 + 2], seeds[i // 50]) for i in begins]
        for begins in (range(0, 300, 100), range(300, 600, 100), range(600, 900, 100))
    ]
    assert runs[0] == runs[2]
    epochs = [*runs[0], *runs[1]]
    assert all(sorted(samples) == list(range(100)) for samples, _, _ in epochs)
    for kind in zip(*epochs, strict=True):
        assert all(a != b for i, a in enumerate(kind) for b in kind[:i])


def test_what_cannot_be_trained_is_refused(digits: datasets.Splits) -> None:
    data = digits.train.subset(slice(0, 50))
    recipe = Recipe(epochs=1, batch_size=10)

    class Detaching(nn.Module):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.net, self.where = network(), where

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.where == "input":
                return self.net(x.detach())
            return self.net(x).detach()

    for model, message in [
        (nn.Flatten(), "has no parameters that require a gradient, so there is nothing to train"),
        (network().requires_grad_(False), r"Is it frozen\? Give model.requires_grad_\(\)"),
        (Detaching("input"), "the logits do not depend on the input through autograd"),
        (Detaching("logits"), "the logits do not depend on the input through autograd"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(model, data, recipe, progress=False)
    plainly = dataclasses.replace(recipe, loss="ce")
    train(Detaching("input"), data, plainly, progress=False)
    with pytest.raises(ValueError, match="does not depend on the model's parameters"):
        train(Detaching("logits"), data, plainly, progress=False)
    with pytest.raises(TypeError, match=r"model is a function; only an nn.Module can be trained"):
        train(lambda x: x, data, recipe, progress=False)
    empty = data.subset(slice(0, 0))
    with pytest.raises(ValueError, match="the data has no samples"):
        train(network(), empty, recipe, progress=False)
    with pytest.raises(ValueError, match="the validation data has no samples"):
        train(network(), data, recipe, validation=empty, progress=False)
    with pytest.raises(ValueError, match=r"50 samples cannot be shared by 64 process\(es\)"):
        Run(network(), data, recipe, torch.device("cpu"), 0, 64)


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_augmented_images_are_shifted_parts_of_the_padded_ones(augment: str) -> None:
    x = torch.rand(40, 2, 16, 16)
    generator = torch.Generator().manual_seed(0)
    moved = AUGMENTATIONS[augment](x, generator, 1, slice(None))
    found = set()
    for image, result in zip(x, moved, strict=True):
        padded = nn.functional.pad(image, [2] * 4)
        candidates = {
            (top, left, flip): padded[:, top : top + 16, left : left + 16].flip([2] * flip)
            for top in range(5)
            for left in range(5)
            for flip in range(2 if augment == "crop-flip" else 1)
        }
        same = [key for key, value in candidates.items() if torch.equal(value, result)]
        assert len(same) == 1
        found.update(same)
    assert {flip for _, _, flip in found} == ({0, 1} if augment == "crop-flip" else {0})
    assert len({top for top, _, _ in found}) == len({left for _, left, _ in found}) == 5


def test_augmentation_does_not_depend_on_the_number_of_processes() -> None:
    x = torch.rand(8, 1, 16, 16)
    alone = crop_flip(x, torch.Generator().manual_seed(1), 1, slice(None))
    for rank in range(2):
        share = slice(rank, None, 2)
        part = crop_flip(x[share], torch.Generator().manual_seed(1), 2, share)
        assert torch.equal(part, alone[share])


def test_mixup_mixes_images_and_targets_alike() -> None:
    t = torch.arange(4)
    x = torch.eye(4).view(4, 1, 1, 4)  # the image of a class is its one-hot code
    torch.manual_seed(0)
    mix = Mixup.drawn(x, 1.0)
    mixed, target = mix.images(x), mix.targets(t, 4)
    assert torch.allclose(mixed.view(4, 4), target)
    assert torch.allclose(target.sum(1), torch.ones(4))
    assert ((target > 0) & (target < 1)).any()


TWO_PROCESSES = """
import os, sys, torch, torch.distributed as dist
from rat_ext import datasets, models, training
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
initial = torch.load(f"{folder}/initial.pt", weights_only=True)
model = models.create("digits-cnn").double()
model.load_state_dict(initial["model"])
data = datasets.Images(initial["pixels"], initial["targets"], tuple("0123456789"))
recipe = training.Recipe(**initial["recipe"])
result = training.train(model, data, recipe, validation=data, out=f"{folder}/run", progress=False)
if rank == 0:
    torch.save({"model": model.state_dict(), "history": result.history}, f"{folder}/final.pt")
# When both are done, an end without Python's own: that may meet threads of gloo, which
# DistributedDataParallel keeps beyond destroy_process_group, and then aborts.
dist.barrier()
sys.stderr.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("loss", "more"), [("ce", {}), ("rat", {}), ("rat", {"sam": 0.05, "swa": 1})]
)
def test_two_processes_make_the_steps_of_one(
    digits: datasets.Splits, tmp_path: Path, loss: str, more: dict[str, float]
) -> None:
    data = datasets.Images(
        digits.train.pixels[:101].double(), digits.train.targets[:101], digits.train.classes
    )
    model = network().double()
    # Plain SGD: the steps are the gradients. In float64, so that a difference is not rounding.
    recipe = Recipe(
        loss=loss, epochs=2, batch_size=20, lr=0.1, momentum=0, weight_decay=0, eps=0.05,
        augment="crop", **more,
    )  # fmt: skip
    initial = {
        "model": model.state_dict(),
        "pixels": data.pixels,
        "targets": data.targets,
        "recipe": dataclasses.asdict(recipe),
    }
    torch.save(initial, tmp_path / "initial.pt")
    command = [sys.executable, "-W", "error", "-c", TWO_PROCESSES]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    alone = train(model, data, recipe, validation=data, progress=False)
    together = torch.load(tmp_path / "final.pt", weights_only=True)
    before = initial["model"]
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(together["model"][name], value, rtol=1e-9, atol=1e-12)
        if value.is_floating_point() and name.startswith("m."):
            assert not torch.equal(value, network().double().state_dict()[name])
    assert before.keys() == together["model"].keys()
    for mine, theirs in zip(alone.history, together["history"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-6)
    assert (tmp_path / "run/last.pt").exists()
