"""Every script in examples/ runs from its command line, on tiny data and without a download."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of libraries that the examples use, about themselves.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]
COLOURS = {"green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example as ``python examples/NAME.py ARGUMENTS`` does; gives what it prints."""

    def run(name: str, *arguments: object) -> str:
        path = str(ROOT / "examples" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder for each colour, with twelve images of it that have some noise."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(12):
            noise = torch.randint(0, 56, (40, 48, 3), generator=generator)
            pixels = (torch.tensor(colour) + noise).byte().numpy()
            image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def decide_by_the_nearer(head: nn.Linear, first: torch.Tensor, second: torch.Tensor) -> None:
    """Set a last layer to decide by which of two feature vectors is nearer."""
    with torch.no_grad():
        difference = 20 * (first - second) / (first - second).norm()
        head.weight.copy_(torch.stack([difference, -difference]))
        head.bias.copy_(-head.weight @ (first + second) / 2)


def usable_transformers() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.is_torch_available():
        pytest.skip(f"transformers {transformers.__version__} needs a newer torch")
    return transformers


def plain(colour: str, size: int) -> torch.Tensor:
    return torch.tensor(COLOURS[colour]).div(255).view(1, 3, 1, 1).expand(1, 3, size, size)


def test_timm_folder(run, photos: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2).eval()
    with torch.no_grad():
        features = [
            network.forward_head(network.forward_features(2 * plain(c, 160) - 1), pre_logits=True)
            for c in COLOURS
        ]
    decide_by_the_nearer(network.fc, *(each[0] for each in features))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    printed = run(
        "timm_folder",
        *("--images", photos, "--model", "test_resnet", "--checkpoint", tmp_path / "weights.pt"),
        *("--target-risk", 0.7, "--limit", 20, "--batch-size", 10),
    )
    shown = re.findall(r"^ +([\d.]+)  (red|green)  (\S+)$", printed, re.MULTILINE)
    assert len(shown) == 5
    assert [Path(path).parent.name for _, _, path in shown] == [name for _, name, _ in shown]
    radii = [float(radius) for radius, _, _ in shown]
    assert radii == sorted(radii)
    assert 0 < radii[0] < 255
    assert re.search(r"On 10 new images it accepted [1-9]\d*, and 0 of these are wrong", printed)


def test_hugging_face(run, photos: Path, tmp_path: Path) -> None:
    transformers = usable_transformers()
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "green", 1: "red"},
        label2id={"green": 0, "red": 1},
    )
    network = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        features = [network.vit(2 * plain(c, 16) - 1).last_hidden_state[0, 0] for c in COLOURS]
    decide_by_the_nearer(network.classifier, *features)
    folder = tmp_path / "network"
    network.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)

    printed = run("hugging_face", "--images", photos, "--model", folder)
    curve = [float(share) for share in re.findall(r"^ +[\d.]+  ([\d.]+) %$", printed, re.MULTILINE)]
    assert len(curve) == 6
    assert curve[0] == 100
    assert curve == sorted(curve, reverse=True)
    assert re.search(r"^  green  [\d.]+  red$", printed, re.MULTILINE)

    (photos / "red").rename(photos / "blue")
    with pytest.raises(SystemExit, match=r"no label of .*: blue"):
        run("hugging_face", "--images", photos, "--model", folder)


def test_text(run, tmp_path: Path) -> None:
    transformers = usable_transformers()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "good", "bad", "and"]
    (tmp_path / "vocabulary.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocabulary.txt"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "positive", 1: "negative"},
        label2id={"positive": 0, "negative": 1},
    )
    network = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        features = [
            network.bert(**tokenizer(text, return_tensors="pt")).pooler_output[0]
            for text in ("a good film", "a bad film")
        ]
    decide_by_the_nearer(network.classifier, *features)
    folder = tmp_path / "network"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = ["a good film", "a bad film", "a film and a film and a good film"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))

    def table(*options: object) -> list[list[str]]:
        printed = run("text", "--texts", tmp_path / "texts.txt", "--model", folder, *options)
        return [line.split("  ") for line in printed.splitlines()[1:]]

    rows = table()
    assert [row[-1] for row in rows] == texts
    assert [row[1] for row in rows[:2]] == ["positive", "negative"]
    assert [row[2] for row in rows[:2]] == ["negative", "positive"]
    assert all(float(row[0]) > 0 and row[3] in row[4].split() for row in rows)
    # The longest text decides how much padding the others get, which is not to matter.
    for row, single in zip(rows, table("--batch-size", 1), strict=True):
        assert float(row[0]) == pytest.approx(float(single[0]), rel=0.02)
        assert row[1:] == single[1:]


def test_tabular(run) -> None:
    pytest.importorskip("sklearn")
    printed = run("tabular", "--epochs", 5)
    away = re.search(r"is ([\d.]+) standard deviations away", printed)
    assert 0 < float(away[1]) < 5
    found = re.search(r"(\d+) wrong\.\nThe (\d+) accepted: (\d+) wrong", printed)
    wrong, accepted, of_those = map(int, found.groups())
    assert accepted < 171
    assert of_those / accepted <= wrong / 171


def test_finetune_rat(run) -> None:
    pytest.importorskip("sklearn")
    printed = run("finetune_rat", "--epochs", 2, "--target-risk", 0.2)
    found = re.findall(r"^(\w+): accuracy ([\d.]+), median radius ([\d.]+)$", printed, re.MULTILINE)
    (plain_name, _, plain_radius), (rat_name, _, rat_radius) = found
    assert (plain_name, rat_name) == ("plain", "RAT")
    assert float(rat_radius) > float(plain_radius)  # what RAT training is for
    accepted, wrong = map(int, re.search(r"images (\d+) are accepted; (\d+) of", printed).groups())
    assert 0 < accepted <= 649
    assert wrong <= 0.2 * accepted


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_tested_and_shown(path: Path) -> None:
    assert f"test_{path.stem}" in globals()
    page = ROOT / "docs" / "examples" / f"{path.stem.replace('_', '-')}.md"
    text = page.read_text(encoding="utf-8")
    assert f'--8<-- "examples/{path.name}"' in text
    assert f"examples/{page.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
