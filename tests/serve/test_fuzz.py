"""Made-up requests: each answer is one that the service's own OpenAPI document describes."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import BAD, GREY, image_file
from helpers import mlp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import PATIENCE, npy, program
from starlette.testclient import TestClient

from rat_ext.serve import Settings
from rat_ext.serve.app import create_app
from rat_ext.serve.decoding import Decoder
from rat_ext.serve.gate import Gate

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    pytest.importorskip("torchvision")
    limits = Settings(max_wait_ms=0.0, max_body=20_000)
    # It resizes, so that each input is decoded in another thread.
    it = create_app(Gate(mlp(30).float()), Decoder((1, 5, 6), resize=True), limits)
    yield it
    it.state.batcher.close()
    assert it.state.batcher.join(PATIENCE)


def test_requests_by_the_document(served: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    # Whether bytes are an image, the document cannot say.
    beyond = [schemathesis.checks.positive_data_acceptance]
    tried = set()
    with program(served) as it:
        document = f"http://127.0.0.1:{it.port}/openapi.json"
        for result in schemathesis.openapi.from_url(document).get_all_operations():
            operation = result.ok()

            @EXAMPLES
            @given(operation.as_strategy())
            def answers_as_described(case: Any) -> None:
                case.call_and_validate(excluded_checks=beyond)

            answers_as_described()
            tried.add(operation.label)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(PATIENCE) == 0
        assert it.process.stderr.read() == ""
    paths = ("GET /info", "GET /healthz", "GET /readyz", "GET /metrics")
    assert tried == {"POST /predict", "POST /predict-batch", *paths}


def array_files() -> st.SearchStrategy[bytes]:
    """.npy files with a header of anything."""
    sizes = st.one_of(st.sampled_from([1, 5, 6, True, 1.0, "5", None]), st.integers(-1, 2**70))
    shapes = st.one_of(st.sampled_from([(1, 5, 6), (True, 5, 6)]), st.lists(sizes).map(tuple))
    kinds = st.sampled_from(["<f8", ">f4", "<f2", "|b1", "<U3", "|O", "<M8[s]", "<f16", "|V8", "x"])
    header = st.fixed_dictionaries(
        {"descr": kinds, "fortran_order": st.sampled_from([True, False, 1]), "shape": shapes}
    )

    def file(header: dict[str, Any], data: bytes) -> bytes:
        out = io.BytesIO()
        np.lib.format.write_array_header_2_0(out, header)
        return out.getvalue() + data

    return st.builds(file, header, st.sampled_from([b"", bytes(240), bytes(1000), b"\xff" * 240]))


FILES = [
    *(data for data, _, _ in BAD.values()),
    *(image_file(GREY, kind) for kind in ("PNG", "JPEG", "WEBP")),
    npy([GREY / 255]),
    str([(GREY / 255).tolist()]).encode(),
    npy([[GREY / 255], [GREY]]),
    str([[(GREY / 255).tolist()], 1, []]).encode(),
]
TYPES = [
    "",
    "image/png",
    "application/json",
    "multipart/form-data",
    "Multipart/form-data;boundary=",
]
BOUNDARIES = ['multipart/form-data; boundary="b"', "multipart/form-data; charset=idna; boundary=b"]
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'


@EXAMPLES
@given(st.data())
def test_requests_like_those_of_clients(app: Any, data: st.DataObject) -> None:
    file = bytearray(data.draw(st.one_of(st.sampled_from(FILES), array_files())))
    for _ in range(data.draw(st.integers(0, 3)) if file else 0):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    kind = data.draw(st.sampled_from([*TYPES, *BOUNDARIES]))
    body = bytes(file)
    if kind in BOUNDARIES:
        body = PART + body + data.draw(st.sampled_from([b"\r\n--b--\r\n", b"\r\n--b\r\n", b""]))
    for path in ("/predict", "/predict-batch"):
        response = TestClient(app).post(path, content=body, headers={"Content-Type": kind})
        answer = response.json()
        problems = [{"status": response.status_code, **answer}]
        if response.status_code == 200:
            problems = [each for each in answer.get("results", []) if each["status"] != 200]
        for problem in problems:
            assert problem["status"] in {400, 413, 415, 422}, (path, kind, body, answer)
            assert problem["detail"]
