"""The server as a program: clients that read nothing, and the memory of what clients send."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from files import COLOUR, GREY, image_file
from service import PATIENCE, Program, npy, program, until

MIB = 2**20


def unread(it: Program) -> socket.socket:
    """A connection on which answers wait that nobody reads."""
    connection = socket.socket()
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        connection.setsockopt(socket.SOL_SOCKET, buffer, 4096)  # soon full
    connection.connect(("127.0.0.1", it.port))
    connection.settimeout(1)
    requests = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100
    # Until the server reads no more requests, since no more answers fit in; or gives up first.
    with contextlib.suppress(TimeoutError, ConnectionError):
        while True:
            connection.sendall(requests)
    return connection


def status(it: Program) -> int:
    try:
        return it.get("/healthz").status_code
    except httpx.TransportError:  # refused, and closed at once
        return 503


def test_clients_that_read_nothing_are_disconnected(served: Path) -> None:
    with (
        program(served, "--connections", "2", "--body-timeout", "4") as it,
        unread(it),
        unread(it),
    ):
        until(lambda: status(it) == 200)  # there is room for others


def test_sigterm_does_not_wait_for_clients_that_read_nothing(served: Path) -> None:
    with program(served, "--body-timeout", "1000") as it, unread(it):
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(PATIENCE) == 0
        assert it.process.stderr.read() == ""


def test_as_many_connections_as_allowed(served: Path) -> None:
    with program(served, "--connections", "2") as it, it.connect():
        assert status(it) == 200
        with it.connect() as other:
            for _ in range(2):  # those that came first are served on
                other.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"ok\n"):
                    answer += other.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200 ")
                refused = it.get("/healthz")
                assert refused.status_code == 503
                assert refused.json() == {"detail": "too many connections: try again"}
                assert refused.headers["retry-after"] == "1"


def test_work_of_clients_that_went_away_counts_as_a_connection(served: Path) -> None:
    with program(served, "--connections", "1") as it, it.holding() as listener:
        with it.connect() as gone:
            body = npy(np.zeros((1, 8, 8)))
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            gone.sendall(head.encode() + body)
            batch, _ = listener.accept()
        with batch:
            assert status(it) == 503
        until(lambda: status(it) == 200)


def peak(it: Program) -> int:
    """The most memory that a server has had, in bytes."""
    text = Path(f"/proc/{it.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])


def body(kind: str, size: int) -> dict[str, Any]:
    """A request of about so many bytes."""
    if kind == "numbers":
        return {"content": b"[" + b"0," * (size // 2 - 1) + b"]"}
    if kind == "lists":
        return {"content": b"[" + b"[]," * (size // 3 - 1) + b"[]]"}
    if kind == "strings":
        return {"content": b'["' + b"a" * 1000 + b'"' + b',""' * (size // 3 - 400) + b"]"}
    if kind == "digits":
        return {"content": b"[0." + b"1" * (size - 4) + b"]"}
    if kind == "array":
        return {"content": npy(np.zeros((1, 8, size // 64)))[:size]}
    return {"files": {"file": b"\r\n" * (size // 2 - 1000)}}


def test_memory_is_bounded_by_the_bodies(served: Path) -> None:
    connections, size = 6, 4 * MIB
    options = ["--connections", str(connections), "--max-body", str(size)]
    with program(served, *options) as it, ThreadPoolExecutor(connections) as pool:
        url = f"http://127.0.0.1:{it.port}/predict"
        assert [it.post(each).status_code for each in (image_file(GREY), b"x")] == [422, 415]
        before = peak(it)
        for kind in ("numbers", "lists", "strings", "digits", "array", "form"):
            request = body(kind, size)

            def post(_: int, request: dict[str, Any] = request) -> int:
                return httpx.post(url, timeout=PATIENCE, **request).status_code

            statuses = set(pool.map(post, range(2 * connections)))
            assert statuses <= {413, 415, 422, 503}, kind
            assert statuses & {415, 422}, kind
            # As the guide says.
            assert peak(it) - before < (1.5 * connections + 10) * size, kind


def test_memory_of_images_that_are_resized(served: Path) -> None:
    pytest.importorskip("torchvision")
    pixels = np.broadcast_to(COLOUR[:1, :1], (2000, 2000, 3))
    files = [image_file(pixels, kind, progressive=True) for kind in ("PNG", "WEBP", "JPEG")]
    options = ["--resize", "--max-pixels", str(pixels[..., 0].size)]
    with program(served, *options) as it, ThreadPoolExecutor(12) as pool:
        assert it.post(image_file(COLOUR)).status_code == 200
        before = peak(it)
        answers = list(pool.map(it.post, files * 4))
        assert {answer.status_code for answer in answers} == {200}
        assert peak(it) - before < 2 * 48 * pixels[..., 0].size
