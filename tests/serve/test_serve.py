"""The service: batching, decoding, the gate, HTTP in process, and the server as a program."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chromium
import numpy as np
import pytest
import torch
from helpers import RowExact, cnn, mlp, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rat_ext
from rat_ext import Detector, cli, models
from rat_ext.serve import Settings
from rat_ext.serve.batching import Batcher, ClosedError, QueueFullError

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
Image = pytest.importorskip("PIL.Image")

from rat_ext.serve import server as server_module  # noqa: E402
from rat_ext.serve.app import create_app  # noqa: E402
from rat_ext.serve.decoding import Decoder, InputError  # noqa: E402
from rat_ext.serve.gate import Gate  # noqa: E402

PATIENCE = 60
"""Seconds after which a test that waits for an event gives up. No test passes by waiting."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_batch", 0, "max_batch is 0; it must be at least 1"),
        ("max_body", 0, "max_body is 0"),
        ("timeout", 0.0, "timeout is 0.0; it must be positive and finite"),
        ("body_timeout", float("nan"), "body_timeout is nan"),
        ("max_wait_ms", -1.0, "max_wait_ms is -1.0"),
        ("queue", 8, "queue is 8, which never fills a batch of max_batch = 32"),
    ],
)
def test_settings_are_checked(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**{name: value})


# --- Batching -------------------------------------------------------------------------------------


class Held:
    """A function for a batcher, which the test holds up."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Semaphore(0), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.release()
        assert self.release.wait(PATIENCE)
        return [10 * item for item in items]

    def wait(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)


@contextlib.contextmanager
def batcher(run: Callable, **options: Any) -> Iterator[Batcher]:
    it: Batcher = Batcher(run, **{"max_batch": 4, "max_wait": 0.0, "queue": 8, **options})
    try:
        yield it
    finally:
        it.close()
        assert it.join(PATIENCE)


def test_batches_hold_what_came_while_the_last_one_ran() -> None:
    held = Held()
    with batcher(held) as it:
        futures = [it.submit(0)]
        held.wait()
        futures += [it.submit(item) for item in range(1, 7)]
        assert it.waiting == 6
        held.release.set()
        assert [future.result(PATIENCE) for future in futures] == [0, 10, 20, 30, 40, 50, 60]
    assert held.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_full_batch_waits_for_no_more() -> None:
    with batcher(lambda items: [len(items)] * len(items), max_wait=1e6) as it:
        futures = [it.submit(item) for item in range(4)]
        assert [future.result(PATIENCE) for future in futures] == [4] * 4


def test_a_full_queue_refuses_and_a_cancelled_item_is_not_run() -> None:
    held = Held()
    with batcher(held, max_batch=1, queue=2) as it:
        futures = [it.submit(0)]
        held.wait()
        futures += [it.submit(1), it.submit(2)]
        with pytest.raises(QueueFullError, match="2 items wait already"):
            it.submit(3)
        assert futures[1].cancel()
        held.release.set()
        assert futures[2].result(PATIENCE) == 20
        with pytest.raises(CancelledError):
            futures[1].result(0)
    assert held.batches == [[0], [2]]


def test_closing_runs_what_was_taken_and_takes_no_more() -> None:
    held = Held()
    with batcher(held, max_wait=1e6, max_batch=2) as it:
        futures = [it.submit(0), it.submit(1)]
        held.wait()
        futures.append(it.submit(2))
        it.close()
        with pytest.raises(ClosedError):
            it.submit(3)
        assert it.alive
        held.release.set()
        assert it.join(PATIENCE)
        assert [future.result(0) for future in futures] == [0, 10, 20]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["good", "raises", "is an exception"]), min_size=1, max_size=9))
def test_no_item_fails_for_another(kinds: list[str]) -> None:
    def run(items: list[int]) -> list[Any]:
        for item in items:
            if kinds[item] == "raises":
                raise ValueError(f"{items}")
        return [KeyError(i) if kinds[i] == "is an exception" else -i for i in items]

    with batcher(run, max_batch=len(kinds), max_wait=1e6, queue=9) as it:
        futures = [it.submit(item) for item in range(len(kinds))]
        for item, (kind, future) in enumerate(zip(kinds, futures, strict=True)):
            if kind == "good":
                assert future.result(PATIENCE) == -item
            else:
                error = future.exception(PATIENCE)
                expected = [str([item])] if kind == "raises" else [item]
                assert list(error.args) == expected


def test_too_few_results_are_an_error() -> None:
    with batcher(lambda items: []) as it:
        assert "0 results for 1 items" in str(it.submit(0).exception(PATIENCE))


# --- Decoding -------------------------------------------------------------------------------------


def image_file(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), **options)
    return file.getvalue()


GREY = np.arange(30, dtype=np.uint8).reshape(5, 6) * 8
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})]
)
def test_decodes_images_like_the_data_sets(kind: str, options: dict) -> None:
    data = image_file(COLOUR, kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    x = Decoder((3, 5, 6))(data)
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.tensor(expected).permute(2, 0, 1).float() / 255)
    if kind != "JPEG":
        assert (expected == COLOUR).all()


def test_converts_channels_and_sizes_and_bounds() -> None:
    grey = Decoder((1, 5, 6))(image_file(GREY))
    assert torch.equal(grey, torch.tensor(GREY)[None].float() / 255)
    assert torch.equal(Decoder((3, 5, 6))(image_file(GREY)), grey.expand(3, 5, 6))
    palette = io.BytesIO()
    Image.fromarray(GREY).convert("P").save(palette, "PNG")
    assert torch.equal(Decoder((3, 5, 6))(palette.getvalue()), grey.expand(3, 5, 6))
    luma = Decoder((1, 5, 6))(image_file(COLOUR))
    assert torch.equal(luma[0], torch.tensor(np.array(Image.fromarray(COLOUR).convert("L"))) / 255)
    assert Decoder((4, 5, 6))(image_file(COLOUR))[3].eq(1).all()
    assert Decoder((3, 9, 2), resize=True)(image_file(COLOUR)).shape == (3, 9, 2)
    centred = Decoder((1, 5, 6), torch.float64, (-1.0, 1.0))(image_file(GREY))
    torch.testing.assert_close(centred, 2 * grey.double() - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decodes_tensors(dtype: torch.dtype) -> None:
    x = uniform(2, 3, dtype=dtype)
    decode = Decoder((2, 3), dtype)
    for array in (x.double().numpy(), np.asfortranarray(x.double()), x.double().numpy()[::1]):
        assert torch.equal(decode(npy(array)), x)
    assert torch.equal(decode(npy(x.double().numpy().astype(">f8"))), x)
    assert torch.equal(decode(b"\n " + json.dumps(x.tolist()).encode()), x)
    assert torch.equal(decode(npy(np.eye(2, 3, dtype=np.uint8))), torch.eye(2, 3, dtype=dtype))


def test_a_bound_in_float32_is_in_bounds() -> None:
    high = 0.1  # which float32 rounds upwards
    x = Decoder((1, 2), torch.float32, (0.0, high))(npy(np.float32([[0, high]])))
    assert torch.isfinite(rat_ext.robust_radius(nn.Identity(), x, bounds=(0.0, high))).any()


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that claims to be large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def huge_npy() -> bytes:
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**6)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


BAD = {
    "empty": (b"", 400, "the body is empty"),
    "text": (b"hello", 415, "none of a PNG, JPEG or WebP image"),
    "another kind": (image_file(GREY, "GIF"), 415, "none of a PNG, JPEG or WebP image"),
    "truncated image": (image_file(GREY)[:50], 422, "the image cannot be decoded"),
    "broken header": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, 415, "none of a PNG"),
    "another size": (image_file(GREY[:4]), 422, "the image is 6 wide and 4 high"),
    "16 bits": (image_file(GREY.astype(np.uint16)), 422, "more than 8 bits a channel (mode I;16)"),
    "many pixels": (bomb(5000, 5000), 413, "5000 x 5000 pixels; the most is 16777216"),
    "bomb": (bomb(10_000, 10_000), 413, "too many pixels"),
    "larger bomb": (bomb(60_000, 60_000), 413, "too many pixels"),
    "wrong shape": (npy(np.zeros((5, 6))), 422, "has shape (5, 6); the model takes one (1, 5, 6)"),
    "not finite": (npy(np.full((1, 5, 6), np.nan)), 422, "not finite in float32"),
    "too large": (npy(np.full((1, 5, 6), 1e39)), 422, "not finite in float32"),
    "out of bounds": (npy([GREY]), 422, "from 0 to 232, outside the model's bounds (0, 1)"),
    "strings": (b'[["1", "2"]]', 422, "the tensor holds <U1; expected numbers"),
    "booleans": (b"[[true]]", 422, "the tensor holds bool"),
    "objects": (b'[{"a": 1}]', 422, "the tensor holds object"),
    "complex": (npy(np.zeros((1, 5, 6), complex)), 422, "the tensor holds complex128"),
    "ragged": (b"[[1, 2], [3]]", 422, "all rows equally long"),
    "cut off": (b"[[1, 2", 422, "this is no JSON list of numbers"),
    "not UTF-8": (b"[\xff\xfe]", 422, "this is no JSON list of numbers"),
    "nested": (b"[" * 100_000, 422, "nested too deeply"),
    "many digits": (b"[" + b"9" * 10_000 + b"]", 422, "this is no JSON list of numbers"),
    "JSON infinity": (b"[[[1e999]]]", 422, "has shape (1, 1, 1)"),
    "pickled": (npy(np.array([{}], object), allow_pickle=True), 422, "the tensor holds object"),
    "truncated array": (npy(np.zeros((1, 5, 6)))[:-8], 422, "the .npy file is damaged"),
    "broken array": (b"\x93NUMPY\1\0v\0{'descr", 422, "no .npy file that numpy.load reads"),
    "unknown version": (b"\x93NUMPY\7\0v\0", 422, "no .npy file that numpy.load reads"),
    "huge array": (huge_npy(), 422, "has shape (1000000000, 1000000)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_told_why(name: str) -> None:
    data, status, message = BAD[name]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Decoder((1, 5, 6))(data)
    assert caught.value.status == status


def test_a_model_of_no_images_takes_none() -> None:
    with pytest.raises(InputError, match="which no image has") as caught:
        Decoder((12,))(image_file(GREY))
    assert caught.value.status == 415


SEEDS = [
    image_file(GREY), image_file(GREY, "JPEG"), image_file(GREY, "WEBP"), npy([GREY / 255]),
    json.dumps([(GREY / 255).tolist()]).encode(),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_else(data: st.DataObject) -> None:
    file = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    del file[data.draw(st.integers(0, len(file))) :]
    with contextlib.suppress(InputError):
        x = Decoder((1, 5, 6), resize=True)(bytes(file))
        assert x.shape == (1, 5, 6)
        assert ((x >= 0) & (x <= 1)).all()


# --- The gate -------------------------------------------------------------------------------------


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


def test_gate_tells_what_the_library_does() -> None:
    model, x = cnn(), uniform(5, 3, 8, 8, dtype=torch.float32)
    expected = rat_ext.robust_radius(model, x, rtol=1e-3, full=True)
    answers = Gate(model, Brightness(model), options={"rtol": 1e-3})(list(x))
    assert [answer.radius for answer in answers] == expected.radius.tolist()
    assert [answer.prediction for answer in answers] == expected.prediction.tolist()
    confidence = x.flatten(1).mean(1)
    assert [answer.confidence for answer in answers] == confidence.tolist()
    assert [answer.accepted for answer in answers] == (confidence > 0.5).tolist()
    assert [answer.probability for answer in answers] == (confidence / 2).tolist()
    (answer,) = Gate(model, Brightness(model), radius=False)([x[0]])
    assert answer.radius is None
    assert answer.confidence == confidence[0]
    assert model.training
    with pytest.raises(ValueError, match="neither a detector nor a radius"):
        Gate(model, radius=False)


def test_gate_warms_up_or_says_why_not() -> None:
    Gate(cnn()).warm_up((3, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"the model fails on an input of shape \(1, 8, 8\)"):
        Gate(cnn()).warm_up((1, 8, 8), torch.float32)
    with pytest.raises(ValueError, match="logits or their gradient are not finite"):
        Gate(Fragile()).warm_up((12,), torch.float64)


@pytest.fixture(scope="module")
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


def test_gate_takes_the_radius_of_a_detector_that_measures_one(
    served: Path, detector: Path
) -> None:
    model, x = served_model(served), uniform(5, 1, 8, 8, dtype=torch.float32)
    judge = Detector.load(detector, model)
    expected = judge(x)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    judge(x)
    alone = sum(rows)
    answers = Gate(model, judge)(list(x))
    assert sum(rows) == 2 * alone  # measured once
    for name in ("prediction", "confidence", "probability", "accepted"):
        assert [getattr(answer, name) for answer in answers] == getattr(expected, name).tolist()
    assert [answer.radius for answer in answers] == expected.confidence.tolist()
    assert {answer.accepted for answer in answers} == {True, False}


# --- HTTP in process ------------------------------------------------------------------------------


@contextlib.contextmanager
def service(
    model: nn.Module,
    shape: tuple[int, ...] = (12,),
    dtype: torch.dtype = torch.float64,
    detector: Callable | None = None,
    classes: list[str] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """The ASGI application."""
    app = create_app(
        Gate(model, detector),
        Decoder(shape, dtype),
        Settings(**{"max_wait_ms": 0.0, **options}),
        name="a model",
        classes=classes,
    )
    try:
        yield app
    finally:
        app.state.batcher.close()
        assert app.state.batcher.join(PATIENCE)


def client(app: Any) -> Any:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
        base_url="http://service",
        timeout=None,
    )


def post(app: Any, *bodies: Any, **options: Any) -> list[Any]:
    """The answers to requests that are made together."""

    async def together() -> list[Any]:
        async with client(app) as http:
            posts = (http.post("/predict", content=body, **options) for body in bodies)
            return await asyncio.gather(*posts)

    return asyncio.run(together())


def get(app: Any, path: str) -> Any:
    async def one() -> Any:
        async with client(app) as http:
            return await http.get(path)

    return asyncio.run(one())


def metrics_in(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_a_radius_does_not_depend_on_its_batch(max_batch: int) -> None:
    model, x = RowExact(), uniform(8, 12)
    expected = rat_ext.robust_radius(model, x, full=True)
    with service(model, classes=list("abcd"), max_batch=max_batch) as app:
        answers = [response.json() for response in post(app, *map(npy, x))]
        counts = metrics_in(get(app, "/metrics").text)
    for i, answer in enumerate(answers):
        alone = rat_ext.robust_radius(model, x[i : i + 1])
        assert answer["radius"] == expected.radius[i].item() == alone.item()
        assert answer["prediction"] == expected.prediction[i].item()
        assert answer["class_name"] == "abcd"[answer["prediction"]]
        assert answer["found"] is True
        assert answer["accepted"] is answer["confidence"] is answer["probability"] is None
    assert counts["rat_ext_batch_size_sum"] == 8
    assert counts["rat_ext_batch_size_count"] >= 8 / max_batch


def test_requests_share_a_batch() -> None:
    model, x = RowExact(), uniform(4, 12)
    with service(model, max_batch=4, max_wait_ms=1e9) as app:
        responses = post(app, *map(npy, x))
        counts = metrics_in(get(app, "/metrics").text)
    assert [response.status_code for response in responses] == [200] * 4
    assert counts["rat_ext_batch_size_count"] == 1
    assert counts['rat_ext_batch_size_bucket{le="2.0"}'] == 0
    radii = [response.json()["radius"] for response in responses]
    assert radii == rat_ext.robust_radius(model, x).tolist()


def test_bodies_and_forms_are_equal() -> None:
    x = uniform(12)
    with service(RowExact(), dtype=torch.float64) as app:
        (plain,) = post(app, npy(x))
        (text,) = post(app, json.dumps(x.tolist()), headers={"Content-Type": "application/json"})

        async def form() -> Any:
            async with client(app) as http:
                return await http.post("/predict", files={"file": ("x.npy", npy(x))})

        assert plain.json() == text.json() == asyncio.run(form()).json()
        for head, body, message in [
            ("multipart/form-data; boundary=b", "--b--\r\n", "the form has no file"),
            ("multipart/form-data", "x", "Missing boundary"),
        ]:
            (response,) = post(app, body, headers={"Content-Type": head})
            assert response.status_code == 400, message
            assert message in response.json()["detail"]


def test_a_detector_gives_verdicts() -> None:
    model = RowExact()
    dark, bright = torch.full((12,), 0.25).double(), torch.full((12,), 0.75).double()
    with service(model, detector=Brightness(model)) as app:
        answers = [response.json() for response in post(app, npy(dark), npy(bright))]
        counts = metrics_in(get(app, "/metrics").text)
        assert get(app, "/info").json()["detector"] is True
    assert [answer["accepted"] for answer in answers] == [False, True]
    assert [answer["confidence"] for answer in answers] == [0.25, 0.75]
    assert [answer["probability"] for answer in answers] == [0.125, 0.375]
    assert counts['rat_ext_predictions_total{verdict="accepted"}'] == 1
    assert counts['rat_ext_predictions_total{verdict="rejected"}'] == 1
    assert counts['rat_ext_predictions_total{verdict="ungated"}'] == 0


class Constant(nn.Module):
    """Always predicts class 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0 * x.sum(1), 1 + 0 * x.sum(1)], 1)


def test_no_change_of_the_prediction_is_no_infinity_in_json() -> None:
    with service(Constant()) as app:
        (response,) = post(app, npy(uniform(12)))
    assert response.json()["radius"] is None
    assert response.json()["found"] is False


class Fragile(RowExact):
    """Raises on a batch with a row of ones; its logits of a row of one half are not finite."""

    def forward(self, x: Tensor) -> Tensor:
        if x.eq(1).all(1).any():
            raise RuntimeError("a row of ones")
        return super().forward(x) / (~x.eq(0.5).all(1, keepdim=True)).to(x.dtype)


def test_a_failing_row_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Fragile(), uniform(8, 12)
    x[2], x[5] = 1, 0.5
    with service(model, max_batch=8, max_wait_ms=1e9) as app:
        responses = post(app, *map(npy, x))
        counts = metrics_in(get(app, "/metrics").text)
    assert [response.status_code for response in responses] == [200, 200, 500, 200, 200, 500] + [
        200
    ] * 2
    assert responses[2].json()["detail"] == "the model failed on this input; see the server's log"
    assert "a row of ones" in caplog.text
    assert "not finite" in responses[5].json()["detail"]
    good = [i for i in range(8) if i not in (2, 5)]
    radii = [responses[i].json()["radius"] for i in good]
    assert radii == rat_ext.robust_radius(model, x[good]).tolist()
    assert counts['rat_ext_requests_total{status="500"}'] == 2
    assert counts["rat_ext_request_seconds_count"] == 8


@pytest.mark.parametrize("name", ["text", "wrong shape", "not finite", "out of bounds", "bomb"])
def test_bad_inputs_are_4xx_and_the_service_lives_on(name: str) -> None:
    data, status, message = BAD[name]
    with service(mlp(30), (1, 5, 6)) as app:
        bad, good = post(app, data, image_file(GREY))
    assert bad.status_code == status
    assert message.replace("float32", "float64") in bad.json()["detail"]
    assert good.status_code == 200


async def chunks(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


def test_a_large_body_is_refused_with_and_without_its_length() -> None:
    with service(mlp(), max_body=1000) as app:
        responses = post(app, b"x" * 1001, chunks(100, 100), b"x" * 1000)
    assert [response.status_code for response in responses] == [413, 413, 415]
    for response in responses[:2]:
        assert response.json()["detail"] == "the request has more than 1000 bytes"
        assert response.headers["connection"] == "close"


def test_no_more_of_a_body_is_read_than_is_allowed() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 100
            await asyncio.sleep(0)

    with service(mlp(), max_body=1000) as app, pytest.MonkeyPatch.context() as patch:
        patch.setattr("rat_ext.serve.app.LINGER", 0.0)
        (response,) = post(app, endless())
    assert response.status_code == 413
    assert taken <= 12


def test_a_body_that_does_not_come_is_refused() -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    with service(mlp(), body_timeout=0.05) as app:
        (response,) = post(app, stalled())
    assert response.status_code == 408
    assert response.json()["detail"] == "the request was not complete after 0.05 s"


class HeldModel(RowExact):
    """A model that the test holds up."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.release = threading.Semaphore(0), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.entered.release()
        assert self.release.wait(PATIENCE)
        return super().forward(x)


async def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def test_a_full_queue_is_503_and_the_queued_are_answered() -> None:
    model, x = HeldModel(), uniform(4, 12)

    async def run(app: Any) -> list[Any]:
        async with client(app) as http:
            tasks = [asyncio.create_task(http.post("/predict", content=npy(x[0])))]
            await soon(lambda: model.entered.acquire(blocking=False))
            tasks += [asyncio.create_task(http.post("/predict", content=npy(r))) for r in x[1:3]]
            await soon(lambda: app.state.batcher.waiting == 2)
            refused = await http.post("/predict", content=npy(x[3]))
            queued = metrics_in((await http.get("/metrics")).text)["rat_ext_queue_length"]
            assert queued == 2
            assert (await http.get("/readyz")).status_code == 200
            model.release.set()
            return [*await asyncio.gather(*tasks), refused]

    with service(model, max_batch=1, queue=2) as app:
        responses = asyncio.run(run(app))
        counts = metrics_in(get(app, "/metrics").text)
    assert [response.status_code for response in responses] == [200, 200, 200, 503]
    assert responses[3].headers["retry-after"] == "1"
    assert responses[3].json()["detail"] == "too much work: 2 items wait already; try again"
    radii = [response.json()["radius"] for response in responses[:3]]
    assert radii == rat_ext.robust_radius(model, x[:3]).tolist()
    assert counts['rat_ext_requests_total{status="503"}'] == 1


def test_a_late_answer_is_504_and_what_still_waits_is_not_run() -> None:
    model, x = HeldModel(), uniform(2, 12)

    async def run(app: Any) -> list[Any]:
        async with client(app) as http:
            first = asyncio.create_task(http.post("/predict", content=npy(x[0])))
            await soon(lambda: model.entered.acquire(blocking=False))
            late = [await http.post("/predict", content=npy(x[1])), await first]
            model.release.set()
            return late

    with service(model, max_batch=1, timeout=0.1) as app:
        responses = asyncio.run(run(app))
    assert [response.status_code for response in responses] == [504, 504]
    assert responses[0].json()["detail"] == "there was no answer after 0.1 s"
    counts = metrics_in(get(app, "/metrics").text)  # after all that was queued
    assert counts["rat_ext_batch_size_count"] == 1


def test_a_closed_service_is_not_ready() -> None:
    with service(mlp()) as app:
        assert get(app, "/readyz").text == "ready\n"
        app.state.batcher.close()
        (response,) = post(app, npy(uniform(12)))
        assert response.status_code == 503
        assert "shutting down" in response.json()["detail"]
        assert get(app, "/readyz").status_code == 503
        assert get(app, "/healthz").status_code == 200


def test_a_dead_thread_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with service(mlp()) as app:
        monkeypatch.setattr(Batcher, "alive", False)
        assert get(app, "/healthz").status_code == 503
        assert get(app, "/readyz").status_code == 503
        monkeypatch.undo()


def test_what_else_is_served() -> None:
    with service(mlp(3 * 4 * 5), (3, 4, 5), classes=["a", "b", "c", "d"]) as app:
        page = get(app, "/")
        info = get(app, "/info").json()
        schema = get(app, "/openapi.json").json()
        wrong_method = get(app, "/predict")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page.text)
    assert info["input_size"] == [3, 4, 5]
    assert info["classes"] == ["a", "b", "c", "d"]
    assert info["model"] == "a model"
    assert "image/png" in schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert wrong_method.status_code == 405


# --- The server as a program ----------------------------------------------------------------------

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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "served.py").write_text(SERVED)
    checkpoint = {"state_dict": served_model(folder).state_dict(), "classes": CLASSES}
    torch.save({**checkpoint, "model": "served:build"}, folder / "model.pt")
    return folder


def served_model(folder: Path) -> nn.Module:
    scope = {"__file__": str(folder / "served.py"), "__name__": "served"}
    exec(SERVED, scope)
    return scope["build"](len(CLASSES))


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


@pytest.fixture(scope="module")
def server(served: Path) -> Iterator[Program]:
    """A server with low limits, for the tests that it must survive."""
    with program(served, "--body-timeout", "1", "--max-body", "100000") as it:
        yield it
        assert it.post(npy(np.zeros((1, 8, 8)))).status_code == 200
        it.process.send_signal(signal.SIGINT)
        assert it.process.wait(PATIENCE) == 0
        log = it.process.stderr.read().splitlines()
        assert set(log) <= {"WARNING:  Invalid HTTP request received."}


def test_answers_are_not_held_back() -> None:
    with server_module._listen("127.0.0.1", 0) as listener, socket.socket() as other:
        listener.listen()
        other.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:  # what asyncio asks for before it sets TCP_NODELAY
            assert (accepted.type, accepted.proto) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)


def head(*headers: str) -> bytes:
    return "\r\n".join(["POST /predict HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def reply(connection: socket.socket) -> bytes:
    """All that comes before the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_program_tells_what_the_library_does(server: Program) -> None:
    x = uniform(3, 1, 8, 8, dtype=torch.float32)
    expected = rat_ext.robust_radius(served_model(server.folder), x, full=True)
    for i in range(3):
        answer = server.post(npy(x[i])).json()
        assert answer["prediction"] == expected.prediction[i]
        assert answer["class_name"] == CLASSES[expected.prediction[i]]
        assert answer["radius"] == pytest.approx(expected.radius[i].item(), rel=1e-3)


def test_slow_clients_get_408_and_hold_up_nobody(server: Program) -> None:
    with server.connect() as slow, server.connect() as slower, server.connect() as silent:
        slow.sendall(head("Content-Length: 1000") + b"x")
        slower.sendall(b"POST /predict HTTP/1.1\r\n")  # and never the rest of the head
        assert server.post(npy(np.zeros((1, 8, 8)))).status_code == 200
        answer = reply(slow)
        assert reply(slower) == reply(silent) == b""
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the request was not complete after 1 s" in answer


def test_large_bodies_get_413(server: Program) -> None:
    body = b"x" * 200_000
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    for request in (
        head("Content-Length: 200000") + body,
        head("Transfer-Encoding: chunked") + chunk + b"0\r\n\r\n",
        head("Content-Length: 9999999999", "Expect: 100-continue"),  # refused before it is sent
    ):
        with server.connect() as connection:
            connection.sendall(request)
            answer = reply(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"the request has more than 100000 bytes" in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\1\2\3" * 20 + b"\r\n\r\n",
        head("Content-Length: nonsense"),
        head("Content-Length: -5"),
        head("Transfer-Encoding: chunked") + b"zz\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    ],
    ids=["garbage", "no number", "negative", "bad chunk", "long headers"],
)
def test_malformed_requests_get_400(server: Program, sent: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):  # it reads no more than it needs to
            assert reply(connection).startswith(b"HTTP/1.1 400 ")
    assert server.get("/healthz").status_code == 200


def test_clients_that_go_away_are_forgotten(server: Program) -> None:
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(head("Content-Length: 1000") + b"x" * 500)
    with server.holding() as listener:
        with server.connect() as connection:
            body = npy(np.zeros((1, 8, 8)))
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            batch, _ = listener.accept()
        batch.close()
    assert server.post(npy(np.zeros((1, 8, 8)))).status_code == 200


@pytest.fixture(scope="module")
def restarted(served: Path, detector: Path) -> Iterator[Program]:
    """A server on the port of one that was killed mid-batch."""
    with program(served) as killed, ThreadPoolExecutor() as pool, killed.holding() as listener:
        answer = pool.submit(killed.post, npy(np.zeros((1, 8, 8))))
        batch, _ = listener.accept()
        killed.process.kill()
        batch.close()
        assert killed.process.wait(PATIENCE) == -signal.SIGKILL
        with pytest.raises(httpx.TransportError):
            answer.result(PATIENCE)
    options = ["--port", str(killed.port), "--max-batch", "2", "--max-wait-ms", "0"]
    options += ["--detector", str(detector)]
    with program(served, *options) as it:
        assert it.port == killed.port
        yield it


def test_restarts_after_sigkill_mid_batch(restarted: Program) -> None:
    assert restarted.get("/readyz").status_code == 200
    model, x = served_model(restarted.folder), uniform(4, 1, 8, 8, dtype=torch.float32)
    detector = restarted.folder / "detector.safetensors"
    expected = Detector.load(detector, model)(x)
    answers = [restarted.post(npy(row)).json() for row in x]
    assert [answer["accepted"] for answer in answers] == expected.accepted.tolist()
    for name in ("confidence", "probability"):
        values = torch.tensor([answer[name] for answer in answers])
        torch.testing.assert_close(values, getattr(expected, name).float(), rtol=1e-3, atol=0)


def test_sigterm_mid_batch_answers_what_was_accepted(restarted: Program) -> None:
    it, x = restarted, uniform(5, 1, 8, 8, dtype=torch.float32)
    with ThreadPoolExecutor() as pool, it.holding() as listener, it.connect() as late:
        answers = [pool.submit(it.post, npy(x[0]))]
        batch, _ = listener.accept()  # the model is at work
        with batch:
            answers += [pool.submit(it.post, npy(row)) for row in x[1:]]
            until(lambda: it.waiting() == 4)
            body = npy(x[0])
            late.sendall(head(f"Content-Length: {len(body)}", "Expect: 100-continue"))
            assert late.recv(1000).startswith(b"HTTP/1.1 100 ")  # it reads the body
            it.process.send_signal(signal.SIGTERM)
            until(it.refuses)
            late.sendall(body)
            refused = reply(late)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"shutting down" in refused
            assert it.process.poll() is None
        responses = [answer.result(PATIENCE) for answer in answers]
    assert it.process.wait(PATIENCE) == 0
    assert it.process.stderr.read() == ""
    assert [response.status_code for response in responses] == [200] * 5
    radii = torch.tensor([response.json()["radius"] for response in responses])
    expected = rat_ext.robust_radius(served_model(it.folder), x, temperature=2.0)
    torch.testing.assert_close(radii, expected, rtol=1e-3, atol=0)


# --- The page in a browser ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    program = chromium.find()
    if program is None:
        pytest.skip(f"no {' or '.join(chromium.NAMES)} was found: install one to test the page")
    with chromium.chromium(program, tmp_path_factory.mktemp("profile")) as it:
        yield it


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    path.write_bytes(image_file(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4))
    return path


def text(page: chromium.Page, name: str) -> str | None:
    """What an element shows; None if it is hidden."""
    element = f"document.getElementById({json.dumps(name)})"
    return page.evaluate(f"{element}.checkVisibility() ? {element}.innerText : null")


def shown(page: chromium.Page, name: str) -> None:
    page.until(f"document.getElementById({json.dumps(name)}).checkVisibility()")


def answered(page: chromium.Page) -> None:
    page.until("/^\\S+: /.test(document.getElementById('status').textContent)")


def drop(page: chromium.Page, path: Path) -> None:
    """Drop a file on the page."""
    content = json.dumps(base64.b64encode(path.read_bytes()).decode())
    page.evaluate(
        f"""{{
          const bytes = Uint8Array.from(atob({content}), (c) => c.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          const file = new File([bytes], {json.dumps(path.name)}, {{ type: "image/png" }});
          dataTransfer.items.add(file);
          const options = {{ dataTransfer, bubbles: true, cancelable: true }};
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
        }}"""
    )


def test_shows_what_the_service_answers(
    page: chromium.Page,
    server: Program,
    digit: Path,
    tmp_path: Path,
) -> None:
    expected = server.post(digit.read_bytes()).json()
    page.open(f"http://127.0.0.1:{server.port}/")
    page.until("document.getElementById('about').textContent.includes('8 wide and 8 high, grey')")
    assert text(page, "result") is None
    page.choose_file("#file", digit)
    answered(page)
    assert text(page, "class") == expected["class_name"]
    assert text(page, "class") in CLASSES
    assert text(page, "status") == f"digit.png: {expected['class_name']}"
    radius, _, levels = text(page, "radius").partition(" (")
    assert float(radius) == pytest.approx(expected["radius"], rel=5e-3)
    assert float(levels.split()[0]) == pytest.approx(255 * expected["radius"], rel=5e-3)
    assert text(page, "verdict") == "No detector"
    assert page.evaluate("document.getElementById('preview').naturalWidth") == 8
    page.screenshot(tmp_path / "page.png")

    # What cannot be classified takes its place, and goes once something can.
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(image_file(GREY))
    drop(page, wrong)
    shown(page, "error")
    assert "the image is 6 wide and 5 high, the model takes 8 x 8" in text(page, "error")
    assert text(page, "result") is None
    drop(page, digit)
    shown(page, "result")
    assert text(page, "error") is None
    assert text(page, "class") == expected["class_name"]
    # Only the refusal is in the console: no script failed, and nothing was loaded from elsewhere.
    assert len(page.console) == 1
    assert "422" in page.console[0]


def test_shows_a_verdict(page: chromium.Page, server: Program, digit: Path) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    for answer, verdict, confidence, chance in [
        (
            {"accepted": True, "confidence": 0.25, "probability": 0.875},
            "Accepted",
            "0.25",
            "87.5 %",
        ),
        (
            {"accepted": False, "confidence": None, "probability": None},
            "Rejected",
            "the lowest",
            None,
        ),
    ]:
        whole = {"prediction": 1, "class_name": None, "radius": None, "found": False, **answer}
        page.evaluate(f"show(new File([], 'x.npy'), {json.dumps(whole)})")
        assert text(page, "verdict").endswith(f" {verdict}")
        assert text(page, "class") == "Class 1"
        assert text(page, "radius") == "no change of the prediction found"
        assert text(page, "confidence") == confidence
        assert text(page, "probability") == chance
        assert text(page, "status") == f"x.npy: Class 1, {verdict.lower()}"


def test_can_be_used_with_the_keyboard_and_in_the_dark(
    page: chromium.Page,
    server: Program,
) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    outline = "getComputedStyle(document.getElementById('drop')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    tree = page.command("Accessibility.getFullAXTree")["nodes"]
    names = {node["name"]["value"] for node in tree if "name" in node}
    assert "Choose an image, drop it here, or paste it" in names
    background = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.command("Emulation.setEmulatedMedia", features=features)
        colours.append(page.evaluate(background))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 29)"]


def test_only_its_own_server_may_be_asked(page: chromium.Page, server: Program) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    for elsewhere in ("http://127.0.0.1:9/", "https://elsewhere.invalid/"):
        code = f"fetch({json.dumps(elsewhere)}).then(() => 'let', () => 'blocked')"
        assert page.evaluate(code) == "blocked"
    assert any("Content Security Policy" in line for line in page.console)
    assert server.post(npy(np.zeros((1, 8, 8)))).status_code == 200


# --- The command line -----------------------------------------------------------------------------


def test_errors_of_serve(
    served: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(served)
    torch.save(models.create("digits-cnn").state_dict(), tmp_path / "bare.pt")
    (tmp_path / "names.txt").write_text("a\nb\n")
    good = ["--checkpoint", str(served / "model.pt")]
    bare = ["--checkpoint", str(tmp_path / "bare.pt")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in [
            ([], "give the --checkpoint of the model, or --pretrained"),
            (["--model", "resnet20"], "give the --checkpoint of the model, or --pretrained"),
            (good, "give the --input-size of served:build, for example 3x224x224"),
            ([*good, "--input-size", "8x"], "input-size is '8x'; expected sizes such as"),
            ([*good, "--input-size", "1x9x9"], "the model fails on an input of shape (1, 9, 9)"),
            (bare, "the checkpoint does not name its model: give --model"),
            ([*bare, "--model", "digits-cnn"], "the checkpoint does not name its classes"),
            ([*good, "--num-classes", "4"], "give the --input-size"),
            (
                [*good, "--input-size", "1x8x8", "--num-classes", "4"],
                "num-classes is 4, but there are 3 names of classes",
            ),
            (
                [*good, "--input-size", "1x8x8", "--classes", str(tmp_path / "names.txt")],
                f"{served / 'model.pt'} does not fit the model",
            ),
            ([*good, "--max-batch", "0"], "max_batch is 0"),
            ([*good, "--input-size", "1x8x8", "--rtol", "2"], "rtol is 2.0"),
            ([*good, "--input-size", "1x8x8", "--bounds", "1", "0"], "bounds is (1.0, 0.0)"),
            ([*good, "--input-size", "1x8x8", "--no-radius"], "there is neither a detector nor"),
            (
                [*good, "--input-size", "1x8x8", "--port", str(taken.getsockname()[1])],
                "cannot listen on 127.0.0.1, port",
            ),
            (
                [*good, "--input-size", "1x8x8", "--host", "no.such.host.invalid"],
                "cannot listen on no.such.host.invalid, port 8000",
            ),
        ]:
            assert cli.main(["serve", "--device", "cpu", *arguments]) == 2
            assert capsys.readouterr().err.startswith(f"rat-ext serve: error: {message}"), arguments


def test_a_missing_extra_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(rat_ext.serve, "app")
    monkeypatch.delitem(sys.modules, "rat_ext.serve.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", "--checkpoint", "x"]) == 2
    assert capsys.readouterr().err == (
        "rat-ext serve: error: serving needs fastapi: pip install 'rat-ext[serve]'\n"
    )
