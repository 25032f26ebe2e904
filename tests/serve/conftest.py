"""The model that is served, its detector, and a server, for all tests of the service."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import uniform
from service import CLASSES, PATIENCE, SERVED, Program, npy, program, served_model

import rat_ext
from rat_ext import Detector


def pytest_pycollect_makemodule() -> None:
    """Skip the tests of the service where what it needs is not installed."""
    for name in ("fastapi", "httpx", "PIL"):
        pytest.importorskip(name)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "served.py").write_text(SERVED)
    checkpoint = {"state_dict": served_model(folder).state_dict(), "classes": CLASSES}
    torch.save({**checkpoint, "model": "served:build"}, folder / "model.pt")
    return folder


@pytest.fixture(scope="session")
def detector(served: Path) -> Path:
    """The file of a detector for the model that is served."""
    model, x = served_model(served), uniform(200, 1, 8, 8, seed=1, dtype=torch.float32)
    target = torch.arange(200) % len(CLASSES)
    held_out = [(x, target)]
    score = rat_ext.scores.get("rr-bs", temperature=2.0)
    Detector.fit(model, held_out, score, coverage=0.5, calibrate=True, progress=False).save(
        served / "detector.safetensors"
    )
    return served / "detector.safetensors"


@pytest.fixture(scope="session")
def server(served: Path) -> Iterator[Program]:
    """A server with low limits, for the tests that it must survive.

    Not so low that a client which a busy machine holds up for a while is cut off.
    """
    with program(served, "--body-timeout", "5", "--max-body", "100000") as it:
        yield it
        assert it.post(npy(np.zeros((1, 8, 8)))).status_code == 200
        it.process.send_signal(signal.SIGINT)
        assert it.process.wait(PATIENCE) == 0
        log = it.process.stderr.read().splitlines()
        assert set(log) <= {"WARNING:  Invalid HTTP request received."}
