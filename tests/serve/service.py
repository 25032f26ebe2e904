"""What the tests of the service share: models, and `rat-ext serve` as a program."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from helpers import RowExact
from torch import Tensor, nn

import rat_ext

with contextlib.suppress(ImportError):  # without it the tests are skipped
    import httpx

PATIENCE = 60
"""Seconds after which a test that waits for an event gives up. No test passes by waiting."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), **options)
    return file.getvalue()


def metrics_in(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


class Brightness:
    """A stand-in for a detector: trusts bright inputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> SimpleNamespace:
        confidence = x.flatten(1).mean(1)
        return SimpleNamespace(
            prediction=rat_ext.robust_radius(self.model, x, full=True).prediction,
            confidence=confidence,
            accepted=confidence > 0.5,
            probability=confidence / 2,
        )


class Fragile(RowExact):
    """Raises on a batch with a row of ones; its logits of a row of one half are not finite."""

    def forward(self, x: Tensor) -> Tensor:
        if x.eq(1).all(1).any():
            raise RuntimeError("a row of ones")
        return super().forward(x) / (~x.eq(0.5).all(1, keepdim=True)).to(x.dtype)


# Before it computes, the model connects to the port in the file "armed", if there is one, and waits
# until that connection is closed.
SERVED = """
import pathlib, socket
import torch
from torch import nn

ARMED = pathlib.Path(__file__).with_name("armed")

class Net(nn.Sequential):
    def forward(self, x):
        if ARMED.exists():
            port = int(ARMED.read_text())
            ARMED.unlink()
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.recv(1)
        return super().forward(x)

def build(classes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))
"""
CLASSES = ["zero", "one", "two"]


def served_model(folder: Path) -> nn.Module:
    scope = {"__file__": str(folder / "served.py"), "__name__": "served"}
    exec(SERVED, scope)
    return scope["build"](len(CLASSES))


@dataclass
class Program:
    """`rat-ext serve` as a process of its own."""

    folder: Path
    process: subprocess.Popen[str]
    port: int

    def post(self, body: bytes) -> Any:
        return httpx.post(f"http://127.0.0.1:{self.port}/predict", content=body, timeout=PATIENCE)

    def get(self, path: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    @contextlib.contextmanager
    def holding(self) -> Iterator[socket.socket]:
        """A listener that gets the connection of the next batch; it runs once that is closed."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(PATIENCE)
            temporary = self.folder / "arming"
            temporary.write_text(str(listener.getsockname()[1]))
            temporary.replace(self.folder / "armed")
            yield listener

    def waiting(self) -> float:
        return metrics_in(self.get("/metrics").text)["rat_ext_queue_length"]

    def refuses(self) -> bool:
        try:
            self.connect().close()
        except OSError:
            return True
        return False


@contextlib.contextmanager
def program(folder: Path, *options: str) -> Iterator[Program]:
    """A server that takes requests. Nothing of it is left afterwards."""
    command = [sys.executable, "-W", "error", "-m", "rat_ext", "serve", "--device", "cpu"]
    command += ["--checkpoint", str(folder / "model.pt"), "--input-size", "1x8x8", "--threads", "1"]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [*command, "--port", "0", *options],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,  # not the sources, whose package has no core
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(r"Serving on http://127\.0\.0\.1:(\d+) \(Ctrl-C stops\)\n", line)
            assert address, (line, process.stderr.read())
            yield Program(folder, process, int(address[1]))
        finally:
            process.kill()
