"""What `rat-ext serve` carries, beside the same radii without HTTP.

    python benchmarks/serve.py

Trains the digits model, serves it in a process of its own, and sends it PNG images from this one,
with several numbers of clients that each send the next image when they have the last answer. After
each run come the radii of as many images in this process, in batches of the size that the server's
had on average: the floor, which a service cannot beat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import rat_ext
from rat_ext import datasets, demo, models, training

RESULTS = Path(__file__).resolve().parent / "results"
Reply = tuple[int, float, float]
"""Number of the image, radius, seconds from request to answer."""


def train(path: Path, epochs: int) -> nn.Module:
    """The digits model; a checkpoint is written to `path`."""
    recipe = demo.Experiment(epochs=epochs).recipe("rat", seed=0)
    data = datasets.digits()
    model = models.create("digits-cnn")
    training.train(model, data.train, recipe, validation=data.validation, progress=False)
    state = {"state_dict": model.state_dict(), "model": "digits-cnn"}
    torch.save({**state, "classes": list(data.train.classes)}, path)
    return model.eval()


def png(x: Tensor) -> bytes:
    file = io.BytesIO()
    pixels = (x * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy().squeeze(2) if len(x) == 1 else pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def server(checkpoint: Path, options: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The port and the process id of a server that takes requests."""
    command = [sys.executable, "-m", "rat_ext", "serve", "--checkpoint", str(checkpoint)]
    command += ["--port", "0", "--device", "cpu", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            address = re.search(r":(\d+) ", line)
            if address is None:
                raise RuntimeError(f"the server did not start: {line!r}")
            yield int(address[1]), process.pid
        finally:
            process.terminate()
            process.wait()


async def load(
    port: int,
    files: Sequence[bytes],
    clients: int,
    seconds: float,
    kind: str = "application/octet-stream",
) -> list[Reply]:
    """Send bodies of a kind in turn from each of the clients, which keep their connections."""
    replies: list[Reply] = []
    end = time.perf_counter() + seconds

    async def client(first: int) -> None:
        # By hand, because a client library would take more of the cores than the server does.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        i = first
        while (start := time.perf_counter()) < end:
            body = files[i % len(files)]
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", answer)[1])
            content = await reader.readexactly(length)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"{answer.decode()}{content.decode()}")
            took = time.perf_counter() - start
            radius = json.loads(content)["radius"]
            replies.append((i % len(files), np.inf if radius is None else radius, took))
            i += clients
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client(first) for first in range(clients)))
    return replies


def counters(port: int) -> tuple[float, ...]:
    """How many batches the server ran, of how many inputs together, and its CPU seconds."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    names = ("rat_ext_batch_size_count", "rat_ext_batch_size_sum", "process_cpu_seconds_total")
    return tuple(float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1]) for name in names)


def floor(model: nn.Module, x: Tensor, batch: int, seconds: float) -> tuple[float, float]:
    """Radii in a second, and CPU milliseconds of each."""
    count, start, busy = 0, time.perf_counter(), time.process_time()
    while (took := time.perf_counter() - start) < seconds:
        rows = torch.arange(count, count + batch) % len(x)
        rat_ext.robust_radius(model, x[rows])
        count += batch
    return count / took, 1000 * (time.process_time() - busy) / count


def measure(
    port: int, model: nn.Module, files: list[bytes], x: Tensor, clients: int, seconds: float
) -> dict[str, float]:
    """One run of the service, and its floor."""
    before = counters(port)
    start = time.perf_counter()
    replies = asyncio.run(load(port, files, clients, seconds))
    took = time.perf_counter() - start
    after = counters(port)
    count, rows, busy = (now - then for now, then in zip(after, before, strict=True))
    assert rows == len(replies)
    index, radius, _ = map(np.asarray, zip(*replies, strict=True))
    expected = rat_ext.robust_radius(model, x).double().numpy()[index]
    equal = radius == expected  # also where both are infinite
    difference = np.abs(np.subtract(radius, expected, out=np.zeros(len(index)), where=~equal))
    latency = 1000 * np.asarray([reply[2] for reply in replies])
    fill = rows / count
    floor_rate, floor_busy = floor(model, x, round(fill), seconds / 2)
    return {
        "clients": clients,
        "requests": len(replies),
        "requests_per_second": len(replies) / took,
        "p50_ms": float(np.percentile(latency, 50)),
        "p99_ms": float(np.percentile(latency, 99)),
        "mean_batch": fill,
        "cpu_ms_per_request": 1000 * busy / len(replies),
        "floor_batch": round(fill),
        "floor_radii_per_second": floor_rate,
        "floor_cpu_ms_per_radius": floor_busy,
        "worst_difference": float(difference.max()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="of all numbers of clients")
    parser.add_argument("--epochs", type=int, default=10, help="of training")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the server's, too: the other core is the client's
    limits = ["--max-batch", str(options.max_batch), "--max-wait-ms", str(options.max_wait_ms)]
    results: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = train(Path(folder, "model.pt"), options.epochs)
        pixels, _ = datasets.load("digits", "test")[:]
        files = list(map(png, pixels))
        x = (pixels * 255).round() / 255
        with server(Path(folder, "model.pt"), [*limits, "--threads", "1"]) as (port, _):
            asyncio.run(load(port, files, 8, 0.5))  # warm
            for _ in range(options.rounds):
                for clients in options.clients:
                    results.append(measure(port, model, files, x, clients, options.seconds))
                    print(json.dumps(results[-1]), file=sys.stderr)
    report = {
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "machine": {"cpus": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "runs": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


def table(results: Sequence[dict[str, float]]) -> str:
    """Medians over the rounds."""
    lines = [
        "| clients | requests/s | p50, ms | p99, ms | mean batch | CPU ms a request | "
        "floor: radii/s | floor: CPU ms a radius |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    columns = {
        "clients": ".0f",
        "requests_per_second": ".0f",
        "p50_ms": ".1f",
        "p99_ms": ".1f",
        "mean_batch": ".1f",
        "cpu_ms_per_request": ".2f",
        "floor_radii_per_second": ".0f",
        "floor_cpu_ms_per_radius": ".2f",
    }
    for clients in dict.fromkeys(run["clients"] for run in results):
        runs = [run for run in results if run["clients"] == clients]
        cells = (
            format(statistics.median(run[name] for run in runs), style)
            for name, style in columns.items()
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
