"""Every Python snippet of the README and the documentation runs, on a tiny model."""

from __future__ import annotations

import copy
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from rat_ext import datasets, export, models, training
from rat_ext.scores import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pytestmark = pytest.mark.usefixtures("one_thread")
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """What a reader would have: a trained model, some inputs and a loader."""
    data = datasets.digits(train_size=300, test_size=200)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.create("digits-cnn")
    recipe = training.Recipe(loss="ce", epochs=6, batch_size=50, optimizer="adamw", lr=3e-3)
    training.train(model, data.train, recipe, progress=False)
    x, t = data.test[:]
    return {
        "model": model,
        "x": x,
        "example_x": x[:32],
        "t": t,
        "target": t,
        "prediction": model(x).argmax(1),
        "loader": DataLoader(TensorDataset(x, t), batch_size=50),
        "validation_loader": DataLoader(TensorDataset(*data.validation[:]), batch_size=50),
    }


@pytest.fixture(autouse=True)
def own_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def test_pages_are_found() -> None:
    assert {"README.md", "index.md", "score.md", "train.md", "large-runs.md", "misd.md"} <= {
        page.name for page in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page: Path, reader: dict[str, Any], request: pytest.FixtureRequest) -> None:
    text = page.read_text(encoding="utf-8")
    if "import ray\n" in text:
        request.getfixturevalue("ray")
    if "export_onnx" in text and not export.ONNX_EXPORTS_PROGRAMS:
        pytest.skip("torch.onnx of this torch is older than what the page shows")
    names = {"__name__": "__main__", **copy.deepcopy(reader)}
    for match in SNIPPET.finditer(text):
        # Blank lines in front, so that an error names the line of the page.
        line = text.count("\n", 0, match.start(1))
        code = compile("\n" * line + match[1], str(page), "exec")
        exec(code, names)


def test_api_pages_name_functions_by_their_file() -> None:
    """Where a function is named like its file, mkdocstrings would show the file instead."""
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = [pkgutil.resolve_name(name) for name in named]
    for package in list(public):
        public += [getattr(package, name) for name in getattr(package, "__all__", [])]
    for each in public:
        module = str(getattr(each, "__module__", ""))
        if module.endswith(f".{getattr(each, '__name__', None)}"):
            assert f"{module}.{each.__name__}" in named
