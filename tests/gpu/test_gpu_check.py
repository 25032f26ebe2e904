"""scripts/gpu_check.sh with the GPU parts switched off, and benchmarks/gpu.py on a toy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import rat_ext

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def check(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OUT": str(out),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(Path(rat_ext.__file__).parents[1]),
        "RAT_EXT_GPU_CHECK_DRY": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def steps(out: Path) -> dict[str, str]:
    report = json.loads((out / "gpu_check.json").read_text())
    return {step["name"]: step["status"] for step in report["steps"]}


def test_dry_run(tmp_path):
    done = check(tmp_path, "--skip-build")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = dict.fromkeys(["needs", "device", "tests", "memcheck", "racecheck", "benchmark"])
    assert steps(tmp_path) == {**dict.fromkeys(passed, "passed"), "build": "skipped"}
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["dry"] is True
    assert report["rat_ext"]["version"] == rat_ext.__version__
    assert {"torch", "cuda", "gpus"} <= report.keys()
    assert "=== racecheck" in (tmp_path / "gpu_check.log").read_text()
    *_, last, note = done.stdout.splitlines()
    assert last.split()[:2] == ["benchmark", "passed"]
    assert "nothing of this ran on a GPU" in note

    benchmark = json.loads((tmp_path / "gpu_benchmark.json").read_text())
    assert benchmark["skipped"] == []
    assert benchmark["perturb"]["ratio"] > 0
    assert [case["batch"] for case in benchmark["cases"]] == [1, 4]
    for case in benchmark["cases"]:
        contenders = case["contenders"]
        assert contenders.pop("bisection compiled")["error"].startswith("NotImplementedError")
        assert all(contender["ms"] > 0 for contender in contenders.values())
        assert {"rat_ext", "estimator", "bisection", "textbook", "forward", "ray"} <= set(
            contenders
        )
        assert case["estimator_agrees"] == 1


def test_a_failing_step_fails_the_check_and_is_named(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in\n*benchmarks/gpu.py*) echo broken; exit 3 ;;\n'
        f'*"-m pytest"*) exit 0 ;;\nesac\nexec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    done = check(tmp_path / "out", "--skip-build", PYTHON=str(fake))
    assert done.returncode == 1
    assert steps(tmp_path / "out")["tests"] == "passed"
    assert steps(tmp_path / "out")["benchmark"] == "failed (3)"
    assert "broken" in done.stdout


def test_what_is_missing_is_named(tmp_path):
    done = check(tmp_path, RAT_EXT_GPU_CHECK_DRY="0", PATH="/usr/bin:/bin", CUDA_HOME="/nowhere")
    assert done.returncode == 1
    assert steps(tmp_path) == {"needs": "failed (1)"}
    assert "compute-sanitizer" in done.stdout.partition("missing here: ")[2]


def test_unknown_arguments(tmp_path):
    done = check(tmp_path, "--fast")
    assert done.returncode == 2
    assert "usage" in done.stderr
