"""The command line, in process and as a program."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import rat_ext
from rat_ext import cli, datasets, demo, evaluation, models
from rat_ext.cli import inputs, radii
from rat_ext.cli.detector import Apply, Fit
from rat_ext.cli.evaluate import SettingsOptions
from rat_ext.cli.main import COMMANDS as ALL_COMMANDS
from rat_ext.cli.serve import SettingsOptions as Limits
from rat_ext.cli.train import RecipeOptions
from rat_ext.search.options import OPTIONS
from rat_ext.serve import Settings
from rat_ext.training import Recipe

PROGRAM = "import sys; from rat_ext.cli import main; sys.exit(main())"


def run_program(*arguments: str, code: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )


def test_info() -> None:
    result = run_program("info")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"rat_ext     {rat_ext.__version__}\n")
    assert result.stderr == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rat-ext {rat_ext.__version__}\n"


COMMANDS = ["demo", "train", "evaluate", "radii", "detector fit", "detector apply", "serve"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_an_option_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: [])" not in shown
    assert "(default: None)" not in shown
    assert "(default: False)" not in shown
    assert "(default: all) (default" not in shown
    if command not in ("demo", "serve"):
        assert re.search(r"--workers INT [^-]*\(default: 0\)", shown)
    assert "--no-no-" not in shown
    assert "`" not in shown


def options_of(kind: type) -> dict[str, Any]:
    """The options of a command and their defaults; MISSING for those that are required."""
    found = {}
    for each in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[each.name]
        default = each.default
        if each.default_factory is not dataclasses.MISSING or dataclasses.is_dataclass(hint):
            found |= options_of(each.default_factory if hint is Any else hint)
        else:
            found[each.name] = default
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    metavar = r"(?:[A-Z|.]+ |CxHxW |\{\S+ |\[\S+ |\.{3}\S+ )*"
    options = re.findall(rf"(--[a-z0-9][a-z0-9-]*)(?:, --no-\S+)? {metavar}(.)", shown)
    names = [flag for flag, _ in options]
    kind = {"detector fit": Fit, "detector apply": Apply}.get(command) or ALL_COMMANDS[command]
    for name in options_of(kind):
        flag = {"start": "--from", "preset": "--recipe"}.get(name, f"--{name.replace('_', '-')}")
        texts = [text for each, text in options if each == flag]
        assert texts, (flag, names)
        assert texts[0] not in "(-╭", flag  # the default, the next option


@pytest.mark.parametrize(
    ("options", "defaults"),
    [(RecipeOptions, Recipe()), (SettingsOptions, evaluation.Settings()), (Limits, Settings())],
)
def test_defaults_are_those_of_the_api(options: type, defaults: Any) -> None:
    assert dataclasses.asdict(options()) == dataclasses.asdict(defaults)


def test_defaults_of_the_search_are_those_of_the_api() -> None:
    given = inputs.searched(radii.Search())
    assert given == {name: OPTIONS[name].default for name in OPTIONS if name != "batch_size"}


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("go on with resume=True, or", "go on with --resume, or"),
        ("batch_size is 0; it", "--batch-size is 0; it"),
        ("use batch_size=4 or fewer", "use --batch-size 4 or fewer"),
        ("the resume is", "the resume is"),
        ("strict=False loads it", "strict=False loads it"),
    ],
)
def test_errors_name_options_as_they_are_typed(
    message: str, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(message)

    monkeypatch.setattr("rat_ext.datasets.load", fail)
    model = ["--model", "digits-cnn", "--pretrained"]
    assert cli.main(["radii", "--data", "digits", *model, "--out", "out"]) == 2
    assert capsys.readouterr().err == f"rat-ext radii: error: {typed}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--seeds", "x"], "--seeds"),
        ([], "train, evaluate"),
        (["x"], "Unrecognized options: x"),
        (["radii", "--out", "x"], "--data"),
        (["detector", "fit", "--data", "x", "--out", "x"], "--target-risk"),
        (
            ["detector", "fit", "--data", "x", "--out", "x", "--tpr", "1", "--coverage", "1"],
            "--tpr",
        ),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-size", "5000"], "--train-size is 5000"),
        (["--eps", "-1"], "--eps is -1.0; it must be finite"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert lines[-1].startswith(f"rat-ext demo: error: {message}")
    assert "Traceback" not in output.err
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    without = "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None; "
    result = run_program("demo", "--out", str(tmp_path / "out"), code=without + PROGRAM)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "rat-ext demo: error: the digits need scikit-learn: pip install"
    )
    assert result.stderr.endswith("pip install '.[demo]' in a clone of rat_ext)\n")


@pytest.mark.parametrize("library", ["matplotlib", "PIL"])
@pytest.mark.parametrize(
    "command", [["demo"], ["evaluate", "--data", "digits", "--checkpoint", "absent.pt"]]
)
def test_what_the_report_needs_is_asked_for_before_the_work(
    tmp_path: Path, library: str, command: list[str]
) -> None:
    without = f"import sys; sys.modules['{library}'] = None; "
    result = run_program(*command, "--out", str(tmp_path / "out"), code=without + PROGRAM)
    assert result.returncode == 2
    assert f"rat-ext {command[0]}: error: a report needs matplotlib and pillow" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from rat_ext.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'pandas', 'torchvision', 'tqdm', 'PIL'}\n"
        "heavy |= {'fastapi', 'uvicorn', 'prometheus_client'}\n"
        "print('loaded', sorted(heavy & (sys.modules.keys() - before)))"
    )
    assert run_program(code=code).stdout.splitlines()[-1] == "loaded []"


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    assert cli.main(["demo", "--out", str(out), "--seeds", "7", "8", "--epochs", "4"]) == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads

    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["seeds"] == [7, 8]
    runs = {(run["training"], run["seed"], run["score"]): run for run in results["runs"]}
    assert len(runs) == 2 * 2 * 3
    assert all(run["accuracy"] > 0.7 for run in runs.values())
    assert all(run["auroc"] > 0.7 for run in runs.values())  # far from a guess
    assert {run["forward_rows"] for run in runs.values() if run["score"] == "rr-fast"} == {2}

    # The table, the report and the numbers beside it are the same.
    printed = capsys.readouterr().out
    page = (out / "index.html").read_text()
    pair = [1000 * runs["rat", seed, "rr-bs"]["aurc"] for seed in (7, 8)]
    mean, std = sum(pair) / 2, abs(pair[0] - pair[1]) / 2**0.5
    assert f"{mean:.2f} ± {std:.2f}" in printed
    assert f'{mean:.2f} <span class="spread">± {std:.2f}</span>' in page
    assert page.count("<svg") == 4
    assert 18 < page.count("data:image/png;base64,") <= 36
    assert f"<dd>rat-ext demo --out {out} --seeds 7 8 --epochs 4</dd>" in page
    assert results["verdict"][0] in page
    assert "\n".join(results["verdict"]) in printed
    assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_demo_is_reproducible() -> None:
    experiment = demo.Experiment(seeds=(3,), epochs=2)
    first, second = (demo.run(experiment, progress=False) for _ in range(2))
    for score in demo.SCORES:
        values = [[network.metrics(score) for network in run] for run in (first, second)]
        assert values[0] == values[1]


# --- Training and evaluating ----------------------------------------------------------------------

TRAIN = [
    "train", "--data", "digits", "--model", "digits-cnn", "--optimizer", "adamw", "--lr", "3e-3",
    "--batch-size", "50", "--eps", "0.05", "--mixup", "0.2", "--threads", "1",
]  # fmt: skip
EVALUATE = [
    "evaluate", "--data", "digits", "--scores", "msr", "odin", "rr-fast", "rr-bs", "--splits", "2",
    "--tune", "temperature", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training run."""
    out = tmp_path_factory.mktemp("trained")
    assert cli.main([*TRAIN, "--out", str(out), "--epochs", "12"]) == 0
    return out


@pytest.fixture(autouse=True)
def same_threads() -> None:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results_of(out: Path) -> dict:
    """The results of an evaluation without its run times, and how they were made."""
    results = json.loads((out / "results.json").read_text())
    assert results.pop("made")["model"] == "digits-cnn"
    for score in results["scores"].values():
        assert score.pop("milliseconds") > 0
    return results


def test_train_then_evaluate(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (trained / "history.csv").read_text().count("\n") == 13
    checkpoint = ["--checkpoint", str(trained / "model.pt")]
    assert cli.main([*EVALUATE, *checkpoint, "--out", str(tmp_path)]) == 0
    results = results_of(tmp_path)
    assert results["images"] == 1297
    assert results["accuracy"] > 0.85
    assert results["title"] == "Misclassification detection: digits-cnn on digits"
    page = (tmp_path / "index.html").read_text()
    typed = shlex.join(["rat-ext", *EVALUATE, *checkpoint, "--out", str(tmp_path)])
    assert f"<dd>{typed}</dd>" in page
    assert "<dt>data set</dt><dd>digits</dd>" in page
    assert page.count("data:image/png;base64,") > 18
    printed = capsys.readouterr().out
    assert results["verdict"][0] in printed
    for name in ("msr", "odin", "rr-fast", "rr-bs"):
        auroc = [split["auroc"] for split in results["scores"][name]["splits"]]
        assert min(auroc) > 0.7
        assert f"{50 * sum(auroc):.2f} ±" in printed


def test_detector_fit_then_apply(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--data", "digits", "--threads", "1", "--checkpoint", str(trained / "model.pt")]
    shared += ["--sample-seed", "5"]
    path, out = tmp_path / "detector.safetensors", tmp_path / "decisions.csv"
    fit = ["detector", "fit", *shared, "--out", str(path), "--limit", "800", "--score", "rr-fast"]
    assert cli.main([*fit, "--cascade", "msr", "--target-risk", "0.1", "--calibrate"]) == 0
    printed = capsys.readouterr().out
    assert "target_risk 0.1: accept a confidence of" in printed
    assert "of the decisions changed" in printed
    apply = ["detector", "apply", *shared, "--detector", str(path), "--out", str(out)]
    assert cli.main([*apply, "--skip", "800"]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    # What fit took, and apply left out: the first 800 of the same order.
    images = datasets.load("digits", "test")
    index = sorted(datasets.shuffled(images, 5)[800:].tolist())
    assert [int(row["index"]) for row in rows] == index
    assert [int(row["target"]) for row in rows] == images.targets[index].tolist()
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)

    model = models.create("digits-cnn")
    models.load_weights(model, trained / "model.pt")
    decision = rat_ext.Detector.load(path, model)(images[index][0])
    assert [int(row["prediction"]) for row in rows] == decision.prediction.tolist()
    assert [row["accepted"] == "1" for row in rows] == decision.accepted.tolist()
    accepted = int(decision.accepted.sum())
    assert accepted > 0
    assert f"Accepted {accepted} of 497 images" in capsys.readouterr().out


def test_views(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--data", "digits", "--threads", "1", "--checkpoint", str(trained / "model.pt")]
    views = ["--views", "shift:0:1", "shift:0:-1"]
    command = ["radii", *shared, "--limit", "40", "--out", str(tmp_path / "radii"), *views]
    assert cli.main(command) == 0
    model = models.create("digits-cnn")
    models.load_weights(model, trained / "model.pt")
    averaged = models.ViewAveraged(model.eval(), ["shift:0:1", "shift:0:-1"])
    data = datasets.load("digits", "test")
    x = data[datasets.shuffled(data)[:40].sort().values][0]
    expected = rat_ext.robust_radius(averaged, x)
    torch.testing.assert_close(rat_ext.RadiusShards(tmp_path / "radii").load().radius, expected)

    path, out = tmp_path / "detector.safetensors", tmp_path / "decisions.csv"
    fit = ["detector", "fit", *shared, *views, "--out", str(path), "--score", "msr"]
    assert cli.main([*fit, "--coverage", "0.9"]) == 0
    apply = ["detector", "apply", *shared, "--detector", str(path), "--out", str(out)]
    assert cli.main([*apply, "--limit", "20", *views]) == 0
    assert cli.main([*apply, "--limit", "20"]) == 2
    assert "was fitted on a model with other weights" in capsys.readouterr().err
    # Other views of the same net are another model, too.
    assert cli.main([*apply, "--limit", "20", "--views", "mirrored"]) == 2
    assert cli.main([*command, "--views", "mirror"]) == 2
    assert "no view is named 'mirror'; there are 'mirrored' and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coverage", "2"], "--coverage is 2.0"),
        (["--coverage", "0.9", "--skip", "1297"], "--skip is 1297; it must be from 0 to 1296"),
        (["--tpr", "0.9", "--batch-size", "0"], "--batch-size is 0"),
        (["--tpr", "0.9", "--cascade", "mrs"], "no score is named 'mrs'"),
    ],
)
def test_errors_of_detector(
    arguments: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = ["--data", "digits", "--checkpoint", str(trained / "model.pt")]
    out = tmp_path / "detector.safetensors"
    assert cli.main(["detector", "fit", *shared, "--out", str(out), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"rat-ext detector: error: {message}")
    assert not out.exists()


def test_two_processes_evaluate_like_one(trained: Path, tmp_path: Path) -> None:
    shared = [*EVALUATE, "--scores", "msr", "rr-fast", "--device", "cpu"]
    shared += ["--checkpoint", str(trained / "model.pt"), "--out"]
    assert cli.main([*shared, str(tmp_path / "one")]) == 0
    run = "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "-m", "rat_ext"
    run = [sys.executable, "-m", *run, *shared, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Report: ") == 1
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")


def test_radii(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["radii", "--data", "digits", "--checkpoint", str(trained / "model.pt")]
    command += ["--threads", "1", "--device", "cpu", "--batch-size", "100", "--out", str(tmp_path)]
    assert cli.main([*command, "--batches-per-shard", "3", "--rtol", "0.1"]) == 0
    printed = capsys.readouterr()
    assert "robust radius: 100%" in printed.err
    assert "of 1,297 images." in printed.out
    assert f"Radii: {tmp_path}, 5 npz file(s)" in printed.out
    radii = rat_ext.RadiusShards(tmp_path).load()
    data = datasets.load("digits", "test")
    model = models.create("digits-cnn")
    models.load_weights(model, trained / "model.pt")
    assert torch.equal(radii.target, data.targets)
    expected = rat_ext.robust_radius(model, data[:][0], rtol=0.1)
    torch.testing.assert_close(radii.radius, expected, rtol=0.1, atol=0)

    assert cli.main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "batches_per_shard was 3, is 16, rtol was 0.1, is 0.01. Use the same" in error


@pytest.mark.parametrize(
    "arguments",
    [
        {"attack": "pgd", "steps": 3, "target": "runner-up"},
        {"attack": "fgsm_l2", "norm": "l2"},
        {"eps_max": 0.01},
        {"bounds": (-1.0, 2.0)},
        {"method": "fast", "h": 0.01, "temperature": 2.0},
        {"search": "bisect", "rtol": 0.1},
        {"probes": 4, "tf32": False},
    ],
    ids=str,
)
def test_options_of_the_search(arguments: dict, trained: Path, tmp_path: Path) -> None:
    command = ["radii", "--data", "digits", "--checkpoint", str(trained / "model.pt")]
    command += ["--threads", "1", "--device", "cpu", "--limit", "40", "--out", str(tmp_path)]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            command.append(f"--no-{name}")
        else:
            values = value if isinstance(value, tuple) else [value]
            command += [flag, *map(str, values)]
    assert cli.main(command) == 0
    model = models.create("digits-cnn")
    models.load_weights(model, trained / "model.pt")
    data = datasets.load("digits", "test")
    x = data[datasets.shuffled(data)[:40].sort().values][0]
    expected = rat_ext.robust_radius(model, x, **arguments)
    torch.testing.assert_close(rat_ext.RadiusShards(tmp_path).load().radius, expected)


def test_train_goes_on_after_a_kill(tmp_path: Path) -> None:
    options = [*TRAIN, "--epochs", "20", "--out"]
    program = [sys.executable, "-m", "rat_ext", *options, str(tmp_path / "killed")]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed/history.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len((tmp_path / "killed/history.csv").read_text().splitlines()) - 1
    assert 1 <= done < 20

    for name in ("killed", "whole"):
        assert cli.main([*options, str(tmp_path / name)]) == 0
    killed, whole = (
        torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("killed", "whole")
    )
    assert killed.keys() == whole.keys()
    for key, value in whole["state_dict"].items():
        assert torch.equal(killed["state_dict"][key], value), key
    histories = [(tmp_path / name / "history.csv").read_text() for name in ("killed", "whole")]
    assert histories[0] == histories[1]


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rat_ext.cli.train.train", interrupt)
    assert cli.main([*TRAIN, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("; the same command goes on from the last epoch\n")


def test_fine_tuning_starts_from_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    start = ["--from", str(trained / "model.pt"), "--out", str(tmp_path)]
    assert cli.main([*TRAIN, *start, "--epochs", "1", "--lr", "1e-9"]) == 0
    first, last = (
        torch.load(folder / "model.pt", weights_only=True)["state_dict"]
        for folder in (trained, tmp_path)
    )
    for key, value in first.items():
        torch.testing.assert_close(last[key], value, rtol=0, atol=1e-6)


def test_logs_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert cli.main([*TRAIN, "--out", str(tmp_path), "--epochs", "1", "--tensorboard"]) == 0
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--model", "resnet21"], "no model is named 'resnet21'"),
        ("train", ["--data", "mnist"], "no data set is named 'mnist'"),
        ("train", ["--loss", "mse"], "--loss is 'mse'"),
        ("train", ["--from", "absent.pt"], "there is no checkpoint absent.pt"),
        ("train", ["--limit", "0"], "--limit is 0"),
        ("train", ["--device", "abacus"], "--device is 'abacus'"),
        ("evaluate", [], "give the --checkpoint of the model, or --pretrained"),
        ("evaluate", ["--checkpoint", "absent.pt"], "there is no checkpoint absent.pt"),
        ("evaluate", ["--scores", "mrs"], "no score is named 'mrs'"),
        ("radii", [], "give the --checkpoint of the model, or --pretrained"),
    ],
)
def test_errors_of_train_and_evaluate(
    command: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    radii = ["radii", "--data", "digits"]
    common = {"train": TRAIN, "evaluate": EVALUATE, "radii": radii}[command]
    assert cli.main([*common, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"rat-ext {command}: error: {message}")
    assert not (tmp_path / "out").exists()


def test_radii_come_in_batches(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", str(trained / "model.pt"), "--batch-size", "0"]
    assert cli.main(["radii", "--data", "digits", *options, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("rat-ext radii: error: --batch-size is 0")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_name_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(models.create("digits-cnn").state_dict(), path)
    arguments = [*EVALUATE, "--checkpoint", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert "does not name its model: give --model" in capsys.readouterr().err
