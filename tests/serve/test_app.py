"""The HTTP service, in process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from files import BAD, GREY, image_file
from helpers import RowExact, mlp, uniform
from in_process import HeldModel, client, get, post, service, soon
from service import Brightness, Fragile, metrics_in, npy
from torch import Tensor, nn

import rat_ext
from rat_ext.serve.batching import Batcher
from rat_ext.serve.body import file_in
from rat_ext.serve.decoding import InputError


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


CONTENT = b"\r\n--a\r\n"
FORM = "multipart/form-data; boundary=b"
FIELD = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nvalue\r\n'
FILE = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\nX: y\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("image/png", CONTENT),
        (FORM, FILE + CONTENT + b"\r\n--b--\r\n"),
        ('Multipart/Form-Data; Boundary="b"; charset=idna', FILE + CONTENT + b"\r\n--b--"),
        (FORM, b"preamble\r\n" + FIELD + FILE + CONTENT + b"\r\n" + FIELD + b"--b--"),
    ],
    ids=["no form", "form", "quoted", "between others"],
)
def test_the_file_of_a_form(kind: str, body: bytes) -> None:
    assert file_in(kind, body) == CONTENT


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("multipart/form-data", b"x", "names no boundary"),
        (FORM, b"", "the form has no file"),
        (FORM, b"--b--\r\n", "the form has no file"),
        (FORM, FIELD + b"--b--\r\n", "the form has no file"),
        (FORM, FIELD * 17 + FILE + b"x\r\n--b--\r\n", "the form has no file"),
        (FORM, FILE + b"x", "a part of it has no end"),
        (FORM, b"--b\r\nContent-Disposition: form-data", "a part of it has no end"),
        (FORM, b"--b\r\n" + b"x" * 10_000 + b"\r\n\r\nx\r\n--b--", "a part of it has no end"),
    ],
)
def test_forms_without_a_file_are_told_why(kind: str, body: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        file_in(kind, body)
    assert caught.value.status == 400
    with service(RowExact()) as app:
        (response,) = post(app, body, headers={"Content-Type": kind})
    assert response.status_code == 400
    assert message in response.json()["detail"]


def test_a_detector_gives_verdicts() -> None:
    model = RowExact()
    dark, bright = torch.full((12,), 0.25).double(), torch.full((12,), 0.75).double()
    with service(model, detector=Brightness(model)) as app:
        files = [npy(dark), npy(bright), npy(bright)]
        answers = [response.json() for response in post(app, *files)]
        counts = metrics_in(get(app, "/metrics").text)
        assert get(app, "/info").json()["detector"] is True
    assert [answer["accepted"] for answer in answers] == [False, True, True]
    assert [answer["confidence"] for answer in answers] == [0.25, 0.75, 0.75]
    assert [answer["probability"] for answer in answers] == [0.125, 0.375, 0.375]
    assert counts['rat_ext_predictions_total{verdict="accepted"}'] == 2
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


def test_bad_inputs_are_4xx_and_the_service_lives_on() -> None:
    names = ["text", "wrong shape", "not finite", "out of bounds", "bomb"]
    with service(mlp(30), (1, 5, 6)) as app:
        *refused, good = post(app, *(BAD[name][0] for name in names), image_file(GREY))
    for name, response in zip(names, refused, strict=True):
        _, status, message = BAD[name]
        assert response.status_code == status
        assert message.replace("float32", "float64") in response.json()["detail"]
    assert good.status_code == 200


def test_no_more_of_a_body_is_read_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rat_ext.serve.body.LINGER", 0.0)
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 100
            await asyncio.sleep(0)

    with service(mlp(), max_body=1000) as app:
        responses = post(app, b"x" * 1001, endless(), b"x" * 1000)
    assert [response.status_code for response in responses] == [413, 413, 415]
    for response in responses[:2]:
        assert response.json()["detail"] == "the request has more than 1000 bytes"
        assert response.headers["connection"] == "close"
    assert taken <= 12


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
