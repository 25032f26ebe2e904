"""benchmarks/attacks.py on a toy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import mlp, uniform

from rat_ext import robust_radius


def test_the_benchmark_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "attacks_benchmark", Path(__file__).resolve().parents[2] / "benchmarks" / "attacks.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    model, x = mlp().float(), uniform(6, 12, dtype=torch.float32)
    monkeypatch.setattr(benchmark, "load_model", lambda shared, name: model)
    monkeypatch.setattr(
        benchmark, "load_test_images", lambda shared, n: (x[:n], torch.arange(n) % 4)
    )
    threads = str(torch.get_num_threads())
    out = tmp_path / "attacks.json"
    common = ["--images", "6", "--batch", "4", "--threads", threads, "--out", str(out)]
    benchmark.main([*common, "--attacks", "fgsm"])
    first = json.loads(out.read_text())["attacks"]["fgsm"]
    benchmark.main([*common, "--attacks", "fgsm", "pgd", "--resume"])
    results = json.loads(out.read_text())["attacks"]
    assert results["fgsm"] == first  # kept, seconds and all
    assert results["pgd"]["radius"] == pytest.approx(robust_radius(model, x, attack="pgd").tolist())
    assert "| all L-inf |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.main([*common, "--images", "5", "--resume"])
