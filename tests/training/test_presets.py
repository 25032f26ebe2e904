"""Recipes by name and from files, and the authors' way with mixup."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rat_ext import cli, datasets, models
from rat_ext.training import PRESETS, RATLoss, Recipe, recipe, train
from rat_ext.training.augmentation import Mixup

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_recipe_of_the_paper() -> None:
    paper = recipe("rat-paper")
    expected = {
        "loss": "rat", "epochs": 500, "optimizer": "sgd", "nesterov": False, "lr": 0.2,
        "weight_decay": 1e-4, "warmup": 5, "mixup_off": 10, "rat_on": "unmixed", "clip": False,
    }  # fmt: skip
    assert {name: getattr(paper, name) for name in expected} == expected
    assert paper.mixup > 0
    assert paper.criterion().bounds is None
    assert recipe("plain") == Recipe(loss="ce")
    assert recipe("fmfp").sam > 0 < recipe("fmfp").swa
    assert recipe("rat-fmfp") == dataclasses.replace(recipe("fmfp"), loss="rat")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_the_clean_term_is_mixed_and_the_perturbed_one_is_not(seed: int, bounds: Any) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x, t = torch.rand(10, 6, dtype=torch.float64), torch.randint(4, (10,))
    mix = Mixup(0.6, torch.randperm(10))
    out = RATLoss(0.1, 0.7, bounds=bounds)(model, x, t, mix=(mix.images, mix.targets(t, 4)))
    out.loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]

    leaf = x.clone().requires_grad_()
    mixed = mix.weight * leaf + (1 - mix.weight) * leaf[mix.order]
    onehot = F.one_hot(t, 4).double()
    target = mix.weight * onehot + (1 - mix.weight) * onehot[mix.order]
    clean = -(target * model(mixed).log_softmax(1)).sum(1).mean()
    (g,) = torch.autograd.grad(clean, leaf, retain_graph=True)  # through the mixing
    sign = torch.where(model(x).argmax(1) == t, 1.0, -1.0).double()[:, None]
    moved = x + 0.1 * sign * g.sign()
    moved = moved if bounds is None else moved.clamp(0, 1)
    perturbed = F.cross_entropy(model(moved), t)
    expected = torch.autograd.grad(clean + 0.7 * perturbed, list(model.parameters()))
    torch.testing.assert_close(out.clean, clean.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.perturbed, perturbed.detach(), rtol=1e-6, atol=0)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)
    assert torch.equal(out.logits, model(x).detach())
    # Where x' goes tells it from the loss that is all on mixed images.
    other = RATLoss(0.1, 0.7, bounds=bounds)(model, mix.images(x), mix.targets(t, 4).double())
    assert abs(float(other.perturbed - out.perturbed)) > 1e-3


def test_training_by_it_goes_through_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.digits(100).train
    seen = []
    inner = RATLoss.__call__

    def watched(self: RATLoss, model: nn.Module, x: Any, t: Any, **options: Any) -> Any:
        seen.append((options["mix"] is not None, t.ndim, float(x.max())))
        return inner(self, model, x, t, **options)

    monkeypatch.setattr(RATLoss, "__call__", watched)
    paper = dataclasses.replace(
        recipe("rat-paper"), epochs=3, warmup=1, mixup_off=1, batch_size=50, eps=0.05
    )
    train(models.create("digits-cnn"), data, paper, progress=False)
    assert [mixed for mixed, _, _ in seen] == [True] * 4 + [False] * 2
    assert {ndim for _, ndim, _ in seen} == {1}  # own labels
    seen.clear()
    on_mixed = dataclasses.replace(paper, rat_on="mixed")
    train(models.create("digits-cnn"), data, on_mixed, progress=False)
    assert [(mixed, ndim) for mixed, ndim, _ in seen] == [(False, 2)] * 4 + [(False, 1)] * 2


def test_a_file_changes_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "rat-paper"\nepochs = 30\nlr = 1\nbf16 = true\naugment = "crop"\n')
    assert recipe(path) == dataclasses.replace(
        PRESETS["rat-paper"], epochs=30, lr=1, bf16=True, augment="crop"
    )
    path.write_text("")
    assert recipe(str(path)) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "has the key epoch, which no recipe has; do you mean epochs"),
        ("zzz = 3", "which no recipe has; known are loss, eps"),
        ('epochs = "3"', "epochs in .* is '3'; expected int"),
        ("epochs = true", "expected int"),
        ("lr = 0", "lr is 0; it must be positive"),
        ("lr", "is not a TOML file"),
        ('recipe = "x"', "no recipe is named 'x'; there are plain, rat, rat-paper"),
    ],
)
def test_errors_of_a_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe(path)
    with pytest.raises(FileNotFoundError):
        recipe(tmp_path / "absent.toml")


def test_the_command_line_overrides_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "rat-paper"\nepochs = 9\nbatch_size = 50\nlr = 0.05\nbf16 = true\n')
    command = ["train", "--data", "digits", "--limit", "100", "--model", "digits-cnn"]
    command += ["--threads", "1", "--out", str(tmp_path / "run"), "--recipe", str(path)]
    changes = ["--epochs", "1", "--warmup", "0", "--mixup-off", "0", "--no-bf16", "--nesterov"]
    assert cli.main([*command, *changes]) == 0
    was = torch.load(tmp_path / "run/last.pt", weights_only=True)["recipe"]
    expected = dataclasses.replace(
        recipe(path), epochs=1, warmup=0, mixup_off=0, bf16=False, nesterov=True
    )
    assert was == dataclasses.asdict(expected)
    capsys.readouterr()
    assert cli.main([*command[:-1], "papr"]) == 2
    assert capsys.readouterr().err.startswith(
        "rat-ext train: error: no recipe is named 'papr'; there are plain, rat,"
    )


def test_a_file_of_weights_says_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = models.create("digits-cnn")
    path = tmp_path / "net.safetensors"
    preprocessing = models.preprocessing("digits-cnn")
    models.save_weights(
        model,
        path,
        name="digits-cnn",
        classes=[str(i) for i in range(10)],
        preprocessing=preprocessing,
        recipe=dataclasses.asdict(recipe("rat-paper")),
    )
    assert models.name_in(path) == "digits-cnn"
    assert models.classes_in(path) == tuple("0123456789")
    assert models.preprocessing_in(path) == preprocessing
    loaded = models.create("digits-cnn")
    models.load_weights(loaded, path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    out = tmp_path / "report"
    command = ["evaluate", "--data", "digits", "--checkpoint", str(path), "--out", str(out)]
    assert cli.main([*command, "--scores", "msr", "--splits", "1", "--limit", "100"]) == 0
    assert json.loads((out / "results.json").read_text())["images"] == 100
    with pytest.raises(ValueError, match=r"it must end in .safetensors"):
        models.save_weights(model, tmp_path / "net.pt", name="x", classes=[])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is damaged, or no .safetensors file"):
        models.name_in(path)
