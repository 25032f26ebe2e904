"""Every ```sh block of the README and the documentation can be typed as it stands.

The commands of rat-ext run: their own parser and code, in a folder of their own, one block after
the other, so that what a block reads must have been written by one before it. The README is a
sequence by itself; the guides are another, in the order of the site's menu. The rest (make, pip,
curl, the benchmarks) is not run, but what it names must exist.

`Shrunk` is what keeps this fast: the data sets and networks behind the names are tiny ones, and the
options of `LESS` are added to a command. torchrun's options are parsed, but one process runs.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.run import get_args_parser

from rat_ext import cli, datasets, models
from rat_ext.datasets import by_name
from rat_ext.models.built_in import BUILT_IN

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"cifar": (3, 32, 32, 10), "imagenet": (3, 224, 224, 1000)}
"""Channels, height, width and classes by the beginning of a data set's name."""
LESS = {
    "train": ["--epochs", "4", "--batch-size", "50"],
    "evaluate": ["--splits", "1", "--limit", "600", "--tune", "none"],
    "radii": ["--limit", "12", "--workers", "0"],
}
"""Added to the commands, but to those on the digits, which are small as they are."""


MENU = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
SEQUENCES = {
    "README": [ROOT / "README.md"],
    "site": [
        ROOT / "docs" / page for page in re.findall(r"^ +- [^:]+: (\S+\.md)$", MENU, re.MULTILINE)
    ],
}
PAGES = [*(ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md"))]
PAGES += [page for pages in SEQUENCES.values() for page in pages]


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Where each command of a page is, and its words without those that set a variable."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        # Lines that end with a backslash go on.
        for line in re.finditer(r"(?:.*\\\n)*.+", match[1]):
            where = f"{page.name}:{text.count(chr(10), 0, match.start(1) + line.start()) + 1}"
            words = shlex.split(line[0].replace("\\\n", " "), comments=True)
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words:
                yield where, words


# --- The commands of rat-ext ----------------------------------------------------------------------


class Shrunk:
    """Tiny data sets and networks behind the names of large ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for form in by_name.forms():
            if form.startswith(tuple(SHAPES)):
                monkeypatch.setitem(by_name._loaders, form, self.images)
        for name, known in BUILT_IN.items():
            if known.size == (3, 32, 32):
                small = dataclasses.replace(known, build=self.network)
                monkeypatch.setitem(BUILT_IN, name, small)
        torchvision_models = pytest.importorskip("torchvision.models")
        monkeypatch.setattr(torchvision_models, "get_model", self.pretrained)

    @staticmethod
    def images(request: by_name.Request) -> datasets.Images:
        """Images of four bands, in colours that tell the class; every 59th is labelled wrongly."""
        name = next(name for name in SHAPES if request.kind.startswith(name))
        channels, height, width, classes = SHAPES[name]
        count = 12 if name == "imagenet" else 500 if request.train else 2400
        generator = torch.Generator().manual_seed(1 + request.train)
        bands = torch.randint(
            0, 200, (classes, channels, 4, 1), generator=torch.Generator().manual_seed(0)
        )
        targets = torch.arange(count) % classes
        pixels = bands[targets].repeat_interleave(height // 4, 2).expand(-1, -1, -1, width)
        noise = torch.randint(0, 56, pixels.shape, generator=generator)
        targets[::59] = (targets[::59] + 1) % classes
        names = tuple(f"class {i}" for i in range(classes))
        return datasets.Images((pixels + noise).byte(), targets, names)

    @classmethod
    def pretrained(cls, name: str, weights: object, num_classes: int = 1000) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls.network(num_classes)

    @staticmethod
    def network(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(12, num_classes))


def run(words: list[str]) -> int:
    """The exit status of a command of rat-ext, or of torchrun with one."""
    if words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        assert options.module
        assert options.training_script == "rat_ext"
        arguments = options.training_script_args
    else:
        arguments = words[1:]
    if arguments[0] == "serve":
        return serve(arguments)
    if arguments[0] != "info":
        less = [] if "digits" in arguments else LESS.get(arguments[0], [])
        arguments = [*arguments, *less, "--device", "cpu", "--threads", "1"]
    return cli.main(arguments)


def serve(arguments: list[str]) -> int:
    """Start the service, ask it once, and stop it as Ctrl-C does."""
    httpx = pytest.importorskip("httpx")
    answers, info, ended = [], {}, threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ask() -> None:
        while not ended.is_set():
            try:
                httpx.get(f"http://127.0.0.1:{port}/readyz").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.01)
                continue
            info.update(httpx.get(f"http://127.0.0.1:{port}/info").json())
            array = io.BytesIO()
            np.save(array, np.full(info["input_size"], 0.5, np.float32))
            url = f"http://127.0.0.1:{port}/predict"
            answers.append(httpx.post(url, content=array.getvalue()))
            os.kill(os.getpid(), signal.SIGINT)
            return

    client = threading.Thread(target=ask)
    client.start()
    try:
        status = cli.main([*arguments, "--port", str(port), "--device", "cpu", "--threads", "1"])
    finally:
        ended.set()
        client.join()
    if status == 0:
        (answer,) = answers
        assert answer.status_code == 200, answer.text
        assert answer.json()["class_name"] in info["classes"]
        assert (answer.json()["accepted"] is None) == ("--detector" not in arguments)
    return status


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_commands_run_one_after_the_other(
    sequence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ("fastapi", "safetensors", "sklearn", "matplotlib"):
        pytest.importorskip(extra)
    Shrunk(monkeypatch)
    done = set()
    for page in SEQUENCES[sequence]:
        for where, words in commands(page):
            if words[0] in ("rat-ext", "torchrun"):
                assert run(words) == 0, f"{where}: {shlex.join(words)}\n{capsys.readouterr().err}"
                done.add(words[words.index("rat_ext") + 1 if "rat_ext" in words else 1])
    assert {"train", "evaluate", "detector", "serve"} <= done


def test_a_file_that_nothing_wrote_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Shrunk(monkeypatch)
    page = tmp_path / "page.md"
    page.write_text("```sh\nrat-ext serve \\\n  --checkpoint runs/rat/last.pt  # starts\n```\n")
    ((where, words),) = commands(page)
    assert where == "page.md:2"
    assert run(words) == 2
    assert "there is no checkpoint runs/rat/last.pt" in capsys.readouterr().err


# --- What is not run ------------------------------------------------------------------------------


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words) <= targets


def extras_in(text: str) -> set[str]:
    """The extras of this package that a text asks for."""
    named = re.findall(r"(?:rat-ext|pip install ['\"]?\.)\[([\w,]+)\]", text)
    return {extra for each in named for extra in each.split(",")}


def known_extras() -> set[str]:
    section = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    assert extras_in(f"pip install {words[1]}") <= known_extras()
    assert re.sub(r"\[.*\]", "", words[1]) == "."  # the package is not on PyPI


def check_curl(words: list[str]) -> None:
    from rat_ext.serve import Settings
    from rat_ext.serve.app import create_app
    from rat_ext.serve.decoding import Decoder
    from rat_ext.serve.gate import Gate

    gate = Gate(models.create("digits-cnn"))
    app = create_app(gate, Decoder(shape=(1, 8, 8)), Settings())
    app.state.batcher.close()
    (url,) = (word for word in words if word.startswith("http"))
    assert urlsplit(url).path in app.openapi()["paths"]


def check_python(words: list[str]) -> None:
    """A script of the repository and its options, or pytest and what it is given."""
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in words[2:])
        return
    script, *arguments = words
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    declared = {
        argument.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    declared |= {  # by tyro
        f"--{argument.arg.replace('_', '-')}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "main"
        for argument in node.args.args
    }
    options = {word for word in arguments if word.startswith("--")} - {"--help"}
    assert script == "setup.py" or options <= declared


def check_script(name: str) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(word in text for word in words)

    return check


def check_profiler(words: list[str]) -> None:
    check_python(words[words.index("python") + 1 :])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "curl": check_curl,
    "python": check_python,
    "perf": check_profiler,
    "nsys": check_profiler,
    ".ci/run": check_script(".ci/run"),
    "scripts/gpu_check.sh": check_script("scripts/gpu_check.sh"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_not_run_exists(page: Path) -> None:
    for where, words in commands(page):
        if words[0] not in ("rat-ext", "torchrun"):
            try:
                CHECKS[words[0]](words[1:])
            except (AssertionError, KeyError, OSError) as error:
                pytest.fail(f"{where}: {shlex.join(words)}\n{error!r}")


def test_every_extra_that_is_named_exists() -> None:
    assert known_extras() >= {"serve", "demo", "bench"}
    files = [*PAGES, *(ROOT / "rat_ext").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        named = extras_in(text) | set(re.findall(r"\binstall\('(\w+)'\)", text))
        assert named <= known_extras(), path
        assert "rat-ext[" not in text, f"{path} names an extra of a package that is not on PyPI"
    listed = (ROOT / "README.md").read_text().partition("\nExtras: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`\[(\w+)\]`", listed)) == known_extras()
