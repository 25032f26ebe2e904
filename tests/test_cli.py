"""The command line, in process and as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rat_ext
from rat_ext import cli

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


def test_usage_errors() -> None:
    for arguments, message in ((["demo", "--seeds"], "--seeds"), ([], "COMMAND"), (["x"], "x")):
        result = run_program(*arguments)
        assert result.returncode == 2
        assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-size", "5000"], "train_size is 5000"),
        (["--eps", "-1"], "eps is -1.0; it must be finite"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
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
    assert result.stderr == (
        "rat-ext demo: error: the digits need scikit-learn: pip install 'rat-ext[demo]'\n"
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from rat_ext.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'pandas', 'torchvision', 'tqdm', 'PIL'}\n"
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
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") == 24
    assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_demo_is_reproducible(tmp_path: Path) -> None:
    for name in "ab":
        assert (
            cli.main(["demo", "--out", str(tmp_path / name), "--seeds", "3", "--epochs", "1"]) == 0
        )
    first, second = (json.loads((tmp_path / n / "results.json").read_text())["runs"] for n in "ab")
    assert first == second
