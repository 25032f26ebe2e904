"""Batching of rat_ext beside that of LitServe: the same model, requests and load.

    pip install litserve
    python benchmarks/serve_litserve.py

Both decode the same multipart forms by the same code, and run the same gate; what differs is how
inputs come to the model in batches, and answers back. `rat-ext serve` has a thread for the model in
the process that speaks HTTP; LitServe has a process for each, with a queue between them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import load_model, load_test_images, shared_folder
from serve import RESULTS, load, png, server
from torch import Tensor, nn

import rat_ext
from rat_ext import datasets, models

BOUNDARY = "c5b7a1"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
SHAPES = {"digits-cnn": (1, 8, 8), "resnet20": (3, 32, 32)}
CONTENDERS = ("rat-ext serve", "LitServe", "LitServe, fast queue")


def form(file: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="request"; filename="x"\r\n\r\n'
    return head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()


def prepare(name: str, folder: Path, count: int) -> tuple[nn.Module, Tensor]:
    """The model, whose checkpoint is written to the folder, and images in steps of 1 / 255."""
    shared = shared_folder()
    if name == "resnet20" and (shared / "models").is_dir():
        model, (x, _) = load_model(shared, name), load_test_images(shared, count)
    else:
        torch.manual_seed(0)
        model, x = models.create(name).eval(), torch.rand(count, *SHAPES[name])
        if name == "digits-cnn":
            x = datasets.load("digits", "test")[:count][0]
    state = {"state_dict": model.state_dict(), "model": name}
    torch.save({**state, "classes": list("0123456789")}, folder / "model.pt")
    return model, (x * 255).round() / 255


@contextlib.contextmanager
def lit_server(folder: Path, options: argparse.Namespace, fast: bool) -> Iterator[tuple[int, int]]:
    """The port and the process id of LitServe, which takes requests."""
    np.memmap(folder / "counts", np.int64, "w+", shape=2).flush()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).with_name("litserve_app.py")
    command = [sys.executable, script, folder, "--port", port, "--max-batch", options.max_batch]
    command += ["--max-wait-ms", options.max_wait_ms, *["--fast-queue"] * fast]
    command += ["--shape", *SHAPES[options.model]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*map(str, command)], env=environment, start_new_session=True) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                if process.poll() is not None:
                    raise RuntimeError("LitServe did not start")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its processes do not all end with the first


def batches_of(contender: str, port: int, folder: Path) -> tuple[float, float]:
    """How many batches ran, and of how many inputs together."""
    if contender != "rat-ext serve":
        return tuple(np.memmap(folder / "counts", np.int64, "r", shape=2).tolist())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = [line.rpartition(" ") for line in response.read().decode().splitlines()]
    numbers = {name: float(value) for name, _, value in lines if name.startswith("rat_ext_batch")}
    return numbers["rat_ext_batch_size_count"], numbers["rat_ext_batch_size_sum"]


def cpu_seconds(process: int) -> float:
    """Of a process and all below it."""
    ticks, children = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            number = int(stat.parent.name)
            ticks[number] = int(fields[11]) + int(fields[12])
            children.setdefault(int(fields[1]), []).append(number)
    total, left = 0, [process]
    while left:
        number = left.pop()
        total += ticks.get(number, 0)
        left += children.get(number, [])
    return total / os.sysconf("SC_CLK_TCK")


def measure(
    contender: str,
    port: int,
    process: int,
    folder: Path,
    bodies: list[bytes],
    expected: np.ndarray,
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    before, busy = batches_of(contender, port, folder), cpu_seconds(process)
    start = time.perf_counter()
    replies = asyncio.run(load(port, bodies, clients, seconds, FORM))
    took = time.perf_counter() - start
    busy = cpu_seconds(process) - busy
    count, rows = (
        now - then for now, then in zip(batches_of(contender, port, folder), before, strict=True)
    )
    assert rows == len(replies)
    index, radius, seconds_each = map(np.asarray, zip(*replies, strict=True))
    np.testing.assert_allclose(radius, expected[index], rtol=1e-2)
    return {
        "contender": contender,
        "clients": clients,
        "requests_per_second": len(replies) / took,
        "p50_ms": 1000 * float(np.percentile(seconds_each, 50)),
        "p99_ms": 1000 * float(np.percentile(seconds_each, 99)),
        "mean_batch": rows / count,
        "cpu_ms_per_request": 1000 * busy / len(replies),
    }


def idle(process: int, seconds: float) -> float:
    """Share of a core that a server takes when nobody asks."""
    before = cpu_seconds(process)
    time.sleep(seconds)
    return (cpu_seconds(process) - before) / seconds


async def spoiled(port: int, bodies: list[bytes], times: int = 20) -> float:
    """Share of good inputs without an answer, where one of 32 that come together is no image."""

    async def answered(body: bytes) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        return answer.startswith(b"HTTP/1.1 200 ")

    good = bodies[:31]
    failed = 0
    for _ in range(times):
        *answers, bad = await asyncio.gather(*map(answered, [*good, form(b"no image")]))
        assert not bad
        failed += answers.count(False)
    return failed / (times * len(good))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Medians over the rounds."""
    lines = [
        "| clients | server | requests/s | p50, ms | p99, ms | mean batch | CPU ms a request |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    columns = {
        "requests_per_second": ".0f",
        "p50_ms": ".1f",
        "p99_ms": ".1f",
        "mean_batch": ".1f",
        "cpu_ms_per_request": ".2f",
    }
    for clients in dict.fromkeys(run["clients"] for run in results):
        for contender in dict.fromkeys(run["contender"] for run in results):
            runs = [r for r in results if (r["clients"], r["contender"]) == (clients, contender)]
            cells = (format(statistics.median(r[c] for r in runs), f) for c, f in columns.items())
            lines.append(f"| {clients} | {contender} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(SHAPES), default="resnet20")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="of all servers and clients")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="(default: serve_litserve-MODEL.json, in results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    limits = ["--max-batch", str(options.max_batch), "--max-wait-ms", str(options.max_wait_ms)]
    results: list[dict[str, Any]] = []
    at_rest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model, x = prepare(options.model, folder, 256)
        expected = rat_ext.robust_radius(model, x, batch_size=64).double().numpy()
        bodies = [form(png(image)) for image in x]
        ours = server(folder / "model.pt", [*limits, "--threads", "1"])
        running = {CONTENDERS[0]: stack.enter_context(ours)}
        for fast, contender in enumerate(CONTENDERS[1:]):
            (folder / contender).mkdir()
            (folder / contender / "model.pt").symlink_to(folder / "model.pt")
            lit = lit_server(folder / contender, options, bool(fast))
            running[contender] = stack.enter_context(lit)
        for contender, (port, process) in running.items():
            asyncio.run(load(port, bodies, 8, 1.0, FORM))  # warm
            at_rest[contender] = idle(process, 2.0)
        for _ in range(options.rounds):
            for clients in options.clients:
                for contender, (port, process) in running.items():
                    results.append(
                        measure(
                            contender,
                            port,
                            process,
                            folder / contender,
                            bodies,
                            expected,
                            clients,
                            options.seconds,
                        )
                    )
                    print(json.dumps(results[-1]), file=sys.stderr)
        failed = {
            contender: asyncio.run(spoiled(port, bodies))
            for contender, (port, _) in running.items()
        }
    report = {
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "machine": {"cpus": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "idle_share_of_a_core": at_rest,
        "good_inputs_that_failed": failed,
        "runs": results,
    }
    out = options.out or RESULTS / f"serve_litserve-{options.model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    print(
        *(f"failed: {name} {share:.1%} of good inputs" for name, share in failed.items()), sep="\n"
    )
    print(*(f"idle: {name} {share:.3f} of a core" for name, share in at_rest.items()), sep="\n")


if __name__ == "__main__":
    main()
