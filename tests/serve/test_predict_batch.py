"""Several inputs in one request."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from files import BAD, GREY, image_file, npy_header
from helpers import RowExact, mlp, uniform
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from in_process import HeldModel, client, get, post, service, soon
from service import Brightness, Fragile, metrics_in, npy
from torch import Tensor

import rat_ext
from rat_ext.serve.body import files_in
from rat_ext.serve.decoding import Decoder, InputError


def form(app: Any, *files: bytes) -> Any:
    """The answer to a form of several files."""

    async def one() -> Any:
        async with client(app) as http:
            named = [("file", (f"{i}.bin", file)) for i, file in enumerate(files)]
            return await http.post("/predict-batch", files=named)

    return asyncio.run(one())


def whole(app: Any, body: bytes, **headers: str) -> Any:
    (response,) = post(app, body, path="/predict-batch", headers=headers)
    return response


def array(x: Tensor) -> bytes:
    return npy(x.numpy())


def text(x: Tensor) -> bytes:
    return json.dumps(x.tolist()).encode()


@pytest.mark.parametrize("max_batch", [1, 3, 8])
@pytest.mark.parametrize("kind", [form, array, text])
def test_each_gets_the_answer_that_it_has_alone(kind: Any, max_batch: int) -> None:
    model, x = RowExact(), uniform(8, 12)
    with service(model, detector=Brightness(model), max_batch=max_batch) as app:
        alone = [response.json() for response in post(app, *map(npy, x))]
        response = form(app, *map(npy, x)) if kind is form else whole(app, kind(x))
        counts = metrics_in(get(app, "/metrics").text)
    assert response.status_code == 200
    assert response.json()["results"] == [
        {"status": 200, "prediction": answer, "detail": None} for answer in alone
    ]
    assert [answer["radius"] for answer in alone] == rat_ext.robust_radius(model, x).tolist()
    assert counts["rat_ext_batch_size_sum"] == 16
    assert counts['rat_ext_requests_total{status="200"}'] == 9
    assert sum(counts[f'rat_ext_predictions_total{{verdict="{v}"}}'] for v in VERDICTS) == 16


VERDICTS = ("accepted", "rejected")


def test_they_share_batches_with_each_other_and_other_requests() -> None:
    x = uniform(4, 12)
    with service(RowExact(), max_batch=4, max_wait_ms=1e9) as app:

        async def together() -> list[Any]:
            async with client(app) as http:
                return await asyncio.gather(
                    http.post("/predict", content=npy(x[0])),
                    http.post("/predict-batch", content=npy(x[1:])),
                )

        one, several = asyncio.run(together())
        assert metrics_in(get(app, "/metrics").text)["rat_ext_batch_size_count"] == 1
    answers = [one.json(), *(result["prediction"] for result in several.json()["results"])]
    assert [each["radius"] for each in answers] == rat_ext.robust_radius(RowExact(), x).tolist()


def test_a_bad_file_does_not_lose_the_others() -> None:
    names = ["text", "wrong shape", "not finite", "out of bounds", "bomb", "empty"]
    good = image_file(GREY)
    with service(mlp(30), (1, 5, 6)) as app:
        response = form(app, good, *(BAD[name][0] for name in names), good)
    first, *bad, last = response.json()["results"]
    assert response.status_code == first["status"] == 200
    assert first["prediction"] == last["prediction"]
    for name, result in zip(names, bad, strict=True):
        _, status, message = BAD[name]
        assert result["status"] == status
        assert result["prediction"] is None
        assert message.replace("float32", "float64") in result["detail"]


def test_a_failing_row_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Fragile(), uniform(8, 12)
    x[2], x[5] = 1, 0.5
    with service(model, max_batch=8, max_wait_ms=1e9) as app:
        results = whole(app, array(x)).json()["results"]
    statuses = [result["status"] for result in results]
    assert statuses == [200, 200, 500, 200, 200, 500, 200, 200]
    assert results[2]["detail"] == "the model failed on this input; see the server's log"
    assert "a row of ones" in caplog.text
    assert "not finite" in results[5]["detail"]


def test_rows_of_json_and_arrays_are_refused_one_by_one() -> None:
    x = uniform(4, 12)
    rows = [x[0].tolist(), x[1].tolist()[:-1], [1e999] * 12, [[1.0], [2.0, 3.0]], x[3].tolist()]
    x[2, 1] = 7
    with service(RowExact()) as app:
        listed = whole(app, json.dumps(rows).replace("Infinity", "1e999").encode()).json()
        stacked = whole(app, array(x)).json()
    assert [each["status"] for each in listed["results"]] == [200, 422, 422, 422, 200]
    for result, message in zip(
        listed["results"][1:4], ["has shape (11,)", "not finite", "equally long"], strict=True
    ):
        assert message in result["detail"]
    assert [each["status"] for each in stacked["results"]] == [200, 200, 422, 200]
    assert "outside the model's bounds" in stacked["results"][2]["detail"]


def test_as_many_are_taken_as_may_wait() -> None:
    x = uniform(5, 12)
    with service(RowExact(), max_batch=1, queue=4) as app:
        assert get(app, "/info").json()["max_inputs"] == 4
        assert len(whole(app, array(x[:4])).json()["results"]) == 4
        refused = [whole(app, array(x)), whole(app, text(x)), form(app, *map(npy, x))]
    assert [response.status_code for response in refused] == [413, 422, 413]
    assert refused[0].json()["detail"] == "there are 5 inputs; send at most 4 at a time"
    assert "the model takes at most 4 inputs of shape (12,)" in refused[1].json()["detail"]
    assert refused[2].json()["detail"] == "the form has more than 4 files; send fewer at a time"


def test_a_full_queue_refuses_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = HeldModel(), uniform(4, 12)
    with service(model, max_batch=1, queue=2) as app:
        submit, tried = app.state.batcher.submit, []
        monkeypatch.setattr(app.state.batcher, "submit", lambda x: (tried.append(x), submit(x))[1])

        async def run() -> list[Any]:
            async with client(app) as http:
                tasks = [asyncio.create_task(http.post("/predict", content=npy(x[0])))]
                await soon(lambda: model.entered.acquire(blocking=False))
                tasks += [asyncio.create_task(http.post("/predict", content=npy(x[1])))]
                await soon(lambda: len(tried) == 2)  # one place is left
                tasks += [asyncio.create_task(http.post("/predict-batch", content=npy(x[2:])))]
                await soon(lambda: len(tried) == 4)
                full = await http.post("/predict-batch", content=npy(x[2:]))
                model.release.set()
                return [full, *await asyncio.gather(*tasks)]

        full, *others, several = asyncio.run(run())
    assert [response.status_code for response in others] == [200, 200]
    assert several.status_code == 200
    taken, refused = several.json()["results"]
    assert taken["status"] == 200
    assert refused["status"] == full.status_code == 503
    assert refused["detail"] == "too much work: 2 items wait already; try again"
    assert full.json()["detail"] == refused["detail"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "send images in a form"),
        (image_file(GREY), 415, "send images in a form"),
        (npy(GREY / 255), 422, "has shape (5, 6); expected (N, 1, 5, 6)"),
        (npy(np.zeros((2, 1, 5, 6), complex)), 422, "the tensor holds complex128"),
        (npy_header((2, True, 5, 6)) + bytes(480), 422, "has shape (2, True, 5, 6)"),
        (npy_header((10**9, 1, 5, 6)), 413, "there are 1000000000 inputs"),
        (npy_header((2, 1, 5, 6)), 422, "the .npy file is damaged"),
        (b'["a"]', 422, "expected numbers, and no words"),
        (b"[" + b"[" * 100_000, 422, "in 100001 lists; the model takes"),
        (b"[[[[1, 2", 422, "this is no JSON list of numbers"),
    ],
)
def test_bodies_without_inputs_are_told_why(body: bytes, status: int, message: str) -> None:
    with service(mlp(30), (1, 5, 6)) as app:
        response = whole(app, body)
        assert whole(app, npy(np.zeros((0, 1, 5, 6)))).json() == {"results": []}
    assert response.status_code == status
    assert message in response.json()["detail"]


def test_the_files_of_a_form_are_not_copied() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n%d\r\n'
    field = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nvalue\r\n'
    body = part % 1 + field + part % 2 + b"--b--"
    files = list(files_in("multipart/form-data; boundary=b", body, most=2))
    assert [bytes(file) for file in files] == [b"1", b"2"]
    assert all(file.obj is body for file in files)
    with pytest.raises(InputError, match="more than 1 files") as caught:
        list(files_in("multipart/form-data; boundary=b", body, most=1))
    assert caught.value.status == 413


@pytest.mark.parametrize("number", [b"0", b"999", b"1e1"])
def test_json_takes_no_more_memory_than_the_guide_says(number: bytes) -> None:
    rows, size = 64, 2000
    row = b"[" + b",".join([number] * size) + b"]"
    data = b"[" + b",".join([row] * rows) + b"]"
    tracemalloc.start()
    try:
        assert len(Decoder((size,)).rows(data, rows)) == rows
        assert tracemalloc.get_traced_memory()[1] < 12 * len(data)
    finally:
        tracemalloc.stop()


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_are_those_that_are_decoded_alone(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
    count = data.draw(st.integers(0, 4))
    x = uniform(count, *shape, seed=data.draw(st.integers(0, 9)))
    decode = Decoder(shape, torch.float64)
    for rows, alone in [
        (decode.rows(array(x), 4), map(npy, x)),
        (decode.rows(text(x), 4), map(text, x)),
    ]:
        assert len(rows) == count
        for row, file, expected in zip(rows, alone, x, strict=True):
            assert torch.equal(decode(row), expected)
            assert torch.equal(decode(file), expected)
