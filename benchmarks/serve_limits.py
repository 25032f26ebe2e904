"""What `rat-ext serve` does beyond its capacity, and how much memory clients can make it take.

    python benchmarks/serve_limits.py

First requests come at twice the rate that it answers, whether it answers or not. Then as many
clients as it has connections send the largest bodies that it takes, three times each, of every kind
that could become more than its bytes. Meanwhile /healthz is asked ten times a second.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import re
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serve import RESULTS, load, png, server, train

from rat_ext import datasets

MIB = 2**20


class Watch:
    """While it is entered, asks a server's /healthz; then tells how that went."""

    def __init__(self, port: int, process: int) -> None:
        self.url, self.process = f"http://127.0.0.1:{port}/healthz", process
        self.health: list[float] = []
        self.failures = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Watch:
        self.before = self._peak()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.after = self._peak()

    def _ask(self) -> None:
        while not self._ends.wait(0.1):
            start = time.perf_counter()
            try:
                urllib.request.urlopen(self.url, timeout=60).close()
            except OSError:
                self.failures += 1
            self.health.append(time.perf_counter() - start)

    def _peak(self) -> float:
        status = Path(f"/proc/{self.process}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    def told(self) -> dict[str, float]:
        return {
            "healthz_slowest_ms": 1000 * max(self.health, default=0.0),
            "healthz_failures": self.failures,
            "peak_mib_before": self.before,
            "peak_mib": self.after,
        }


async def offered(
    port: int, files: Sequence[bytes], rate: float, seconds: float, connections: int
) -> dict[str, float]:
    """Send requests at a fixed rate, each on a connection that is free; none waits for another."""
    took: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    tasks: set[asyncio.Task[None]] = set()

    async def send(file: bytes) -> None:
        start = time.perf_counter()
        try:
            reader, writer = (
                free.pop() if free else await asyncio.open_connection("127.0.0.1", port)
            )
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(file)}\r\n\r\n"
            writer.write(head.encode() + file)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer)[1]))
        except (OSError, EOFError) as error:
            counts[type(error).__name__] += 1
            return
        status = answer[9:12].decode()
        took.setdefault(status, []).append(time.perf_counter() - start)
        if b"connection: close" in answer:
            writer.close()
        else:
            free.append((reader, writer))

    start = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - start) < seconds:
        due = int(now * rate) - sent - counts["not sent"]
        for _ in range(due):
            if len(tasks) >= connections:  # the client's own limit
                counts["not sent"] += 1
                continue
            task = asyncio.create_task(send(files[sent % len(files)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    for _, writer in free:
        writer.close()
    good = 1000 * np.asarray(took.get("200", [np.nan]))
    refused = 1000 * np.asarray(took.get("503", [np.nan]))
    return {
        "seconds": seconds,
        "sent_per_second": sent / seconds,
        "answered_per_second": len(good) / seconds,
        "p50_ms": float(np.percentile(good, 50)),
        "p99_ms": float(np.percentile(good, 99)),
        "refused_per_second": len(took.get("503", [])) / seconds,
        "refused_p99_ms": float(np.percentile(refused, 99)),
        "errors": sum(counts.values()) - counts["not sent"],
        "not_sent": counts["not sent"],
        **{f"status_{status}": len(times) for status, times in took.items()},
    }


def largest(size: int) -> dict[str, bytes]:
    """Bodies of so many bytes."""
    image = io.BytesIO()
    Image.fromarray(np.zeros((4096, 4096, 3), np.uint8)).save(image, "JPEG", progressive=True)
    words = b'"' + b"a" * 1000 + b'"'
    head = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
    array = io.BytesIO()
    np.save(array, np.zeros(size // 8 - 100))
    return {
        "JSON, numbers": b"[" + b"0," * (size // 2 - 1) + b"]",
        "JSON, lists": b"[" + b"[]," * (size // 3 - 1) + b"]",
        "JSON, words": b"[" + words + b',""' * ((size - len(words)) // 3 - 1) + b"]",
        "JSON, one number": b"[0." + b"1" * (size - 4) + b"]",
        ".npy": array.getvalue(),
        "form of line breaks": head + b"\r\n" * (size // 2 - 50) + b"\r\n--b--",
        "image of 4096 x 4096": image.getvalue(),
    }


async def flood(port: int, body: bytes, kind: str, clients: int, times: int) -> Counter[str]:
    """Send a body from all clients at once; the statuses that came."""
    statuses: Counter[str] = Counter()

    async def client() -> None:
        for _ in range(times):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
            head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            try:
                writer.write(head.encode() + body)
                await writer.drain()
                statuses[(await reader.read())[9:12].decode()] += 1
            except OSError as error:
                statuses[type(error).__name__] += 1
            writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return statuses


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload")
    parser.add_argument("--factor", type=float, default=2.0, help="of the capacity")
    parser.add_argument("--clients", type=int, default=2000, help="most requests under way")
    parser.add_argument("--connections", type=int, nargs="+", default=[6, 24], help="of the bodies")
    parser.add_argument("--max-body", type=int, default=10 * MIB, help="bytes")
    parser.add_argument("--epochs", type=int, default=10, help="of training")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_limits.json")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"memory": []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "model.pt")
        train(checkpoint, options.epochs)
        files = list(map(png, datasets.load("digits", "test")[:][0]))
        with server(checkpoint, ["--threads", "1", "--max-wait-ms", "2"]) as (port, process):
            asyncio.run(load(port, files, 64, 1.0))  # warm
            capacity = len(asyncio.run(load(port, files, 64, 5.0))) / 5
            with Watch(port, process) as watch:
                rate = options.factor * capacity
                run = offered(port, files, rate, options.seconds, options.clients)
                overload = asyncio.run(run)
            report["overload"] = {"capacity": capacity, **overload, **watch.told()}
            print(json.dumps(report["overload"]), file=sys.stderr)
        for connections in options.connections:
            # One more, for /healthz.
            limits = ["--connections", str(connections + 1), "--max-body", str(options.max_body)]
            with server(checkpoint, ["--threads", "1", "--resize", *limits]) as (port, process):
                for kind, body in (("warm", b"x"), *largest(options.max_body).items()):
                    form = "multipart/form-data; boundary=b" if "form" in kind else "x/x"
                    with Watch(port, process) as watch:
                        statuses = asyncio.run(flood(port, body, form, connections, 3))
                    line = {"kind": kind, "connections": connections, "statuses": statuses}
                    report["memory"].append({**line, "bytes": len(body), **watch.told()})
                    print(json.dumps(report["memory"][-1]), file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
