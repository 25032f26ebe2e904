"""The server as a program: slow, malformed and vanishing clients, and how it stops."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from helpers import uniform
from service import CLASSES, PATIENCE, Program, npy, program, served_model, until

import rat_ext
from rat_ext import Detector
from rat_ext.scores.radius import RTOL
from rat_ext.serve.server import listen


def test_answers_are_not_held_back() -> None:
    with listen("127.0.0.1", 0) as listener, socket.socket() as other:
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
    assert b"the request was not complete after 5 s" in answer


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
    expected = rat_ext.robust_radius(served_model(it.folder), x, temperature=2.0, rtol=RTOL)
    torch.testing.assert_close(radii, expected, rtol=1e-3, atol=0)
