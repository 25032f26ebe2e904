"""scripts/gpu_check.sh with the GPU parts switched off, and benchmarks/gpu.py on a toy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gpu_helpers
import pytest

import rat_ext

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


STEPS = ["needs", "build", "device", "tests", "planted", "memcheck", "racecheck", "benchmark"]
SANITIZED = STEPS[4:7]


def check(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OUT": str(out),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(Path(rat_ext.__file__).parents[1]),
        "RAT_EXT_GPU_CHECK_DRY": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "CUDA_HOME": "/nowhere",
        **variables,
    }
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def program(path: Path, *lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.fixture
def python(tmp_path) -> Path:
    """A Python that runs no tests, and whose benchmark fails after it read its report."""
    return program(
        tmp_path / "bin" / "python",
        'case "$*" in',
        "*benchmarks/gpu.py*)",
        '  cp "$OUT"/gpu_check*.json "$OUT/before"; echo "broken: $*"; exit 3 ;;',
        '*"-m pytest"*) echo "estimator modes: eager 2 times"; exit 0 ;;',
        "esac",
        f'exec {sys.executable} "$@"',
    )


def steps(report: Path) -> dict[str, str]:
    return {step["name"]: step["status"] for step in json.loads(report.read_text())["steps"]}


def test_dry_run(tmp_path):
    done = check(tmp_path, "--skip-build")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = dict.fromkeys(["build", *SANITIZED], "skipped")
    assert steps(tmp_path / "gpu_check.json") == {**dict.fromkeys(STEPS, "passed"), **skipped}
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {step["reason"] for step in report["steps"] if step["name"] in SANITIZED} == {
        "no compute-sanitizer"
    }
    assert report["dry"] is True
    assert report["machine"]["rat_ext"]["version"] == rat_ext.__version__
    assert {"torch", "cuda", "gpus", "device_loop"} <= report["machine"].keys()
    assert "=== tests" in (tmp_path / "gpu_check.log").read_text()
    *_, last, note = done.stdout.splitlines()
    assert last.split()[:2] == ["benchmark", "passed"]
    assert "nothing of this ran on a GPU" in note

    benchmark = json.loads((tmp_path / "gpu_benchmark.json").read_text())
    assert benchmark["skipped"] == benchmark["failed"] == []
    assert benchmark["perturb"]["ratio"] > 0
    assert [case["batch"] for case in benchmark["cases"]] == [1, 4]
    for case in benchmark["cases"]:
        assert case["case"] in done.stdout
        contenders = case["contenders"]
        for name in ("floor graph", "model graph", "replay loop", "device loop"):
            assert contenders.pop(name)["error"].endswith("no CUDA graphs on cpu")
        assert contenders.keys() == {"floor", "model", "robust_radius", "bisection", "textbook"}
        assert all(contender["ms"] > 0 for contender in contenders.values())
        assert contenders["robust_radius"]["agrees"] == 1


def test_the_sanitizer_sees_the_kernels_here_alone(tmp_path, python):
    """Its two tools run after a planted error, and a planted error that it misses is a failure."""
    calls = tmp_path / "calls"
    sanitizer = program(
        tmp_path / "bin" / "compute-sanitizer",
        f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>{calls}',
        'case "$*" in *out_of_bounds.py) exit "$PLANTED" ;; esac',
    )
    variables = {"PYTHON": str(python), "PATH": f"{sanitizer.parent}:{os.environ['PATH']}"}
    for planted, status in (("86", "passed"), ("0", "failed (1)")):
        out = tmp_path / planted
        check(out, "--skip-build", PLANTED=planted, **variables)
        found = steps(out / "gpu_check.json")
        expected = {"planted": status, "memcheck": "passed", "racecheck": "passed"}
        assert {name: found[name] for name in SANITIZED} == expected
    first, *others = calls.read_text().splitlines()[:3]
    for call, tool in zip([first, *others], ["memcheck", "memcheck", "racecheck"], strict=True):
        assert call.startswith("1 --error-exitcode 86 ")
        assert f"--report-api-errors no --kernel-name kns=3rat4cuda --tool {tool} " in call
    assert all(call.endswith("-k short") for call in others)


def test_a_failing_step_fails_the_check_and_is_named(tmp_path, python):
    done = check(tmp_path, "--skip-build", PYTHON=str(python))
    assert done.returncode == 1
    found = steps(tmp_path / "gpu_check.json")
    assert found["tests"] == "passed"
    assert found["benchmark"] == "failed (3)"
    assert "broken" in done.stdout
    assert "\nestimator modes: eager 2 times\n" in done.stdout
    # What a run that is cut off in its last step leaves behind:
    del found["benchmark"]
    assert steps(tmp_path / "before") == found


def test_more(tmp_path, python):
    done = check(tmp_path, "--more", "--skip-build", PYTHON=str(python))
    assert list(steps(tmp_path / "gpu_check_more.json")) == [
        "needs",
        "build",
        "device",
        "benchmark",
    ]
    assert "--more" in done.stdout.partition("broken: ")[2]
    assert "gpu_benchmark_more.json" in done.stdout


def test_what_is_missing_is_named(tmp_path):
    done = check(tmp_path, RAT_EXT_GPU_CHECK_DRY="0", PATH="/usr/bin:/bin")
    assert done.returncode == 1
    assert steps(tmp_path / "gpu_check.json") == {"needs": "failed (1)"}
    assert "nvcc" in done.stdout.partition("missing here: ")[2]


def test_unknown_arguments(tmp_path):
    done = check(tmp_path, "--fast")
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_nine_minutes_are_enough_for_all_steps():
    limits = [int(limit) for limit in re.findall(r"^ *step \S+ (\d+)", SCRIPT.read_text(), re.M)]
    assert len(limits) == len(STEPS) - 2  # one line for both tools; the benchmark gets the rest
    assert sum(limits) + limits[-1] <= 540 - 120


def test_modes_that_are_absent_are_told(monkeypatch):
    monkeypatch.setattr(gpu_helpers, "NO_DEVICE_LOOP", "torch 2.11.0 cannot")
    monkeypatch.setattr(gpu_helpers, "ran", Counter({"eager": 2, "replay loop": 5}))
    expected = "replay loop 5 times, eager 2 times, device loop absent: torch 2.11.0 cannot"
    assert gpu_helpers.modes_line() == f"estimator modes: {expected}"
