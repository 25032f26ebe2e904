"""What a search costs on a device without kernels of ours, beside the compiled path.

    python benchmarks/host_state.py --shared DIR --out benchmarks/results/host_state.json

On such a device the state of a search is kept in host memory and torch makes the points
(docs/architecture.md). Here that way is forced on the CPU, where copies to the device cost nothing:
what is measured is torch's operations against the core's. Both ways run in turn on the same batch.
The ratio of their times, and the share of each that is not in the model's forward and backward, are
medians over the rounds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from common import load_model, load_test_images, shared_folder
from throughput import share_outside
from tqdm.auto import tqdm

from rat_ext import robust_radius
from rat_ext.search import place


def compare(model, x, rounds: int) -> dict[str, float]:
    seconds, outside, results = {}, {}, {}
    for _ in tqdm(range(rounds), leave=False, unit="round"):
        for way in ("compiled", "host"):
            with mock.patch.object(place, "host_only", way == "host"):
                start = time.perf_counter()
                results[way] = robust_radius(model, x, full=True)
                seconds.setdefault(way, []).append(time.perf_counter() - start)
                outside.setdefault(way, []).append(share_outside(model, x, len(x)))
    pairs = zip(seconds["host"], seconds["compiled"], strict=True)
    rows = {way: result.forward_rows.double().mean().item() for way, result in results.items()}
    radii = [result.radius for result in results.values()]
    return {
        "time, host / compiled": statistics.median(host / compiled for host, compiled in pairs),
        "outside the model": {way: statistics.median(each) for way, each in outside.items()},
        "rows a sample": rows,
        "largest difference of radii": float((radii[0] / radii[1] - 1).abs().nan_to_num(0).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x, _ = load_test_images(arguments.shared, max(arguments.batches))
    report = {}
    print("model      batch   time   outside: compiled   host   rows: compiled   host")
    for name in ("resnet20", "resnet56"):
        model = load_model(arguments.shared, name)
        for batch in arguments.batches:
            run = compare(model, x[:batch], arguments.rounds)
            report[f"{name}, batch {batch}"] = run
            outside, rows = run["outside the model"], run["rows a sample"]
            print(
                f"{name:10s} {batch:5d} {run['time, host / compiled']:6.2f}"
                f" {100 * outside['compiled']:17.1f} % {100 * outside['host']:4.1f} %"
                f" {rows['compiled']:14.2f} {rows['host']:6.2f}"
            )
    if arguments.out:
        settings = {"rounds": arguments.rounds, "torch": torch.__version__}
        settings["threads"] = arguments.threads
        arguments.out.write_text(json.dumps({**settings, "runs": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
