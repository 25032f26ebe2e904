"""The service on Ray Serve answers as `rat-ext serve` does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import uniform

import rat_ext
from rat_ext import Detector, models
from rat_ext.ray import deployment

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

CLASSES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model with random weights, and a detector for it."""
    folder = tmp_path_factory.mktemp("served")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.create("digits-cnn").eval()
    checkpoint = {"state_dict": model.state_dict(), "model": "digits-cnn", "classes": CLASSES}
    torch.save(checkpoint, folder / "model.pt")
    x = uniform(200, 1, 8, 8, seed=1, dtype=torch.float32)
    held_out = [(x, torch.arange(200) % 10)]
    score = rat_ext.scores.get("rr-bs", temperature=2.0)
    fitted = Detector.fit(model, held_out, score, coverage=0.5, calibrate=True, progress=False)
    fitted.save(folder / "detector.safetensors")
    return folder


@pytest.fixture(scope="module")
def url(ray: None, folder: Path) -> Iterator[str]:
    """The address of a deployment with two replicas."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = deployment(
        folder / "model.pt",
        detector=folder / "detector.safetensors",
        settings=rat_ext.serve.Settings(max_batch=4, max_wait_ms=20.0, max_body=20_000),
    )
    one = {"num_cpus": 0.5}
    serve.run(app.options(num_replicas=2, ray_actor_options=one).bind(), route_prefix="/rat")
    yield f"http://127.0.0.1:{port}/rat"
    serve.shutdown()


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Any]:
    """The service of this process, for the same model."""
    from starlette.testclient import TestClient

    from rat_ext.serve.app import create_app
    from rat_ext.serve.loading import make_gate

    model = models.create("digits-cnn").eval()
    models.load_weights(model, folder / "model.pt")
    gate, decoder = make_gate(
        model,
        (1, 8, 8),
        detector=folder / "detector.safetensors",
        radius=True,
        device=torch.device("cpu"),
        resize=False,
        max_pixels=2**24,
        preprocessing=models.preprocessing("digits-cnn"),
        options={},
    )
    app = create_app(gate, decoder, rat_ext.serve.Settings(max_body=20_000), classes=CLASSES)
    yield TestClient(app)
    app.state.batcher.close()


def npy(array: Any) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def same(a: Any, b: Any) -> bool:
    """Equal, but for the rounding of float32 in another batch."""
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-3)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_the_same_requests_get_the_same_answers(url: str, alone: Any) -> None:
    x = uniform(12, 1, 8, 8, dtype=torch.float32)
    bad = [b"", b"hello", npy(np.zeros((8, 8))), npy(np.full((1, 8, 8), 7.0)), b"x" * 20_001]
    bodies = [*map(npy, x), json.dumps(x[0].tolist()).encode(), *bad]

    def post(body: bytes) -> Any:
        return httpx.post(f"{url}/predict", content=body, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, bodies))
    for body, answer in zip(bodies, answers, strict=True):
        expected = alone.post("/predict", content=body)
        assert answer.status_code == expected.status_code
        assert same(answer.json(), expected.json()), (answer.text, expected.text)
    assert {answer.status_code for answer in answers} == {200, 400, 413, 415, 422}
    accepted = {answer.json()["accepted"] for answer in answers[:12]}
    assert accepted == {True, False}


def test_batches_and_what_is_served(url: str, alone: Any) -> None:
    x = uniform(9, 1, 8, 8, dtype=torch.float32)
    x[4] *= 300
    answer = httpx.post(f"{url}/predict-batch", content=npy(x), timeout=60)
    expected = alone.post("/predict-batch", content=npy(x))
    assert [each["status"] for each in answer.json()["results"]] == [200] * 4 + [422] + [200] * 4
    assert same(answer.json(), expected.json())
    info = httpx.get(f"{url}/info").json()
    assert info == {**alone.get("/info").json(), "model": "digits-cnn"}
    assert "Is this prediction to be trusted?" in httpx.get(f"{url}/").text


def replicas() -> set[int]:
    """The processes of Ray Serve's replicas."""
    titles = {
        int(entry.name): (entry / "cmdline").read_bytes()
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and (entry / "cmdline").exists()
    }
    return {pid for pid, title in titles.items() if title.startswith(b"ray::ServeReplica")}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the replicas in /proc")
def test_nothing_is_lost_or_wrong_when_a_replica_is_killed(url: str, alone: Any) -> None:
    x = uniform(8, 1, 8, 8, seed=3, dtype=torch.float32)
    bodies = [npy(each) for each in x]
    expected = [alone.post("/predict", content=body).json() for body in bodies]
    before = replicas()
    assert len(before) == 2

    def post(i: int) -> tuple[int, Any]:
        """Status and answer, as a client gets them that tries again."""
        for _ in range(30):
            answer = httpx.post(f"{url}/predict", content=bodies[i % 8], timeout=60)
            if answer.status_code < 500:
                break
            time.sleep(0.2)
        return answer.status_code, answer.json()

    with ThreadPoolExecutor(8) as pool:
        answers = []
        for i, answer in enumerate(pool.map(post, range(400))):
            answers.append(answer)
            if i == 40:
                os.kill(min(before), signal.SIGKILL)
    for i, (status, answer) in enumerate(answers):
        assert status == 200
        assert same(answer, expected[i % 8])
    end = time.monotonic() + 60
    while len(now := replicas()) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    assert len(now) == 2
    assert min(before) not in now


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": 2.0}, ValueError, "rtol is 2.0"),
        ({"bounds": (0.0, np.inf)}, ValueError, "to serve they must be finite"),
        ({"detector": "no such file"}, FileNotFoundError, "there is no detector no such file"),
        ({"model": "served:build"}, ValueError, "give the input_size of served:build"),
        ({"checkpoint": "no such file"}, FileNotFoundError, "no such file"),
        ({"checkpoint": "bare.pt"}, ValueError, "does not name its model: give model="),
        (
            {"checkpoint": "bare.pt", "model": "digits-cnn"},
            ValueError,
            "does not name its classes: give classes=",
        ),
    ],
)
def test_errors_come_before_anything_is_started(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    pytest.importorskip("ray.serve")
    torch.save(models.create("digits-cnn").state_dict(), "bare.pt")
    with pytest.raises(error, match=re.escape(message)):
        deployment(**{"checkpoint": folder / "model.pt", **options})
