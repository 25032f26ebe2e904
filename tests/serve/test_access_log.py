"""One line for each request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import RowExact, uniform
from in_process import HeldModel, client, get, post, service, soon
from service import PATIENCE, Fragile, npy, program

from rat_ext.serve.access_log import AccessLog, Style


def entries(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [r.message for r in caplog.records if r.name == "rat_ext.serve.access_log"]
    assert not any("\n" in line for line in lines)
    return list(map(json.loads, lines))


def logged(app: Any, style: Style = "json") -> None:
    app.add_middleware(AccessLog, style=style)


@pytest.fixture(autouse=True)
def every_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rat_ext.serve.access_log")


def test_tells_what_came_and_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    body = npy(uniform(12))
    with service(RowExact()) as app:
        logged(app)
        (answer,) = post(app, body)
        get(app, "/info?a=b")
        post(app, b"hello")
        get(app, "/no%20such%0Apath")
    one, info, bad, missing = entries(caplog)
    datetime.fromisoformat(one.pop("time"))
    assert one.pop("ms") >= one.pop("model_ms") > 0
    assert one.pop("queue_ms") >= 0
    assert one == {
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "bytes_in": len(body),
        "bytes_out": len(answer.content),
        "inputs": 1,
        "batch": 1,
    }
    assert (info["method"], info["path"], info["status"]) == ("GET", "/info", 200)
    assert "inputs" not in info
    assert (bad["status"], bad["bytes_in"]) == (415, 5)
    assert missing["status"] == 404
    assert missing["path"] == "/no%20such%0Apath"


def test_a_batch_is_told_from_the_wait_for_it(caplog: pytest.LogCaptureFixture) -> None:
    model, x = HeldModel(), uniform(4, 12)
    with service(model, max_batch=4) as app:
        logged(app)

        async def run() -> None:
            async with client(app) as http:
                tasks = [asyncio.create_task(http.post("/predict", content=npy(x[0])))]
                await soon(lambda: model.entered.acquire(blocking=False))
                tasks += [asyncio.create_task(http.post("/predict-batch", content=npy(x[1:])))]
                await soon(lambda: app.state.batcher.waiting == 3)
                await asyncio.sleep(0.05)
                model.release.set()
                await asyncio.gather(*tasks)

        asyncio.run(run())
    by_path = {entry["path"]: entry for entry in entries(caplog)}
    one, several = by_path["/predict"], by_path["/predict-batch"]
    assert (one["inputs"], one["batch"]) == (1, 1)
    assert (several["inputs"], several["batch"]) == (3, 3)
    assert one["model_ms"] > 50
    assert several["queue_ms"] > 50
    assert several["ms"] >= several["queue_ms"] + several["model_ms"] - 0.02  # as they are rounded


def test_failures_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with service(Fragile()) as app:
        logged(app)
        post(app, npy(np.ones(12)))

        @app.get("/broken")
        async def broken() -> None:
            raise RuntimeError("broken")

        get(app, "/broken")
    failed, broken_entry = entries(caplog)
    assert (failed["status"], failed["inputs"], failed["batch"]) == (500, 1, 1)
    assert broken_entry["status"] == 500


def test_nothing_was_run_in_time(caplog: pytest.LogCaptureFixture) -> None:
    model = HeldModel()
    with service(model, timeout=0.05) as app:
        logged(app)
        post(app, npy(uniform(12)))
        model.release.set()
    (late,) = entries(caplog)
    assert late["status"] == 504
    assert "inputs" not in late


def test_the_command_prints_lines(served: Path) -> None:
    with program(served, "--access-log", "text") as it:
        assert it.post(npy(np.zeros((1, 8, 8)))).status_code == 200
        assert it.get("/healthz").status_code == 200
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(PATIENCE) == 0
        assert it.process.stderr.read() == ""
        predict, healthz = it.process.stdout.read().splitlines()
    assert re.fullmatch(
        r"time=\S+ client=127\.0\.0\.1 method=POST path=/predict status=200 ms=[\d.]+ "
        r"bytes_in=\d+ bytes_out=\d+ inputs=1 queue_ms=[\d.]+ model_ms=[\d.]+ batch=1",
        predict,
    )
    assert "method=GET path=/healthz status=200" in healthz
