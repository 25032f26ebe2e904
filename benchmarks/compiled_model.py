"""What few batch sizes spare a compiled model: compilations, time, and rows run in vain.

    python benchmarks/compiled_model.py --shared DIR --out benchmarks/results/compiled_model.json

`robust_radius` on ResNet-20 through `torch.compile`, on the CPU, batch after batch of CIFAR-10. The
active rows of a search become fewer from round to round, and each new number of rows is a new shape
to the compiler: "every size" gives the model just the active rows, "few sizes" rounds their number
up, as the package does for compiled models. Compilations are those of torch's compiler; times are
of the whole run, its compilations included. `dynamic` is that of torch.compile: False compiles for
each shape, None (default) for any number of rows once a second shape is seen.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from common import load_model, load_test_images, shared_folder
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from tqdm.auto import tqdm

from rat_ext import robust_radius
from rat_ext.search.bracket_search import BracketSearch


def measure(model, x, batch: int, dynamic: bool | None, pads: bool) -> dict[str, float]:
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, dynamic=dynamic)
    rows = padded = 0
    times = []
    for part in tqdm(x.split(batch), leave=False, unit="batch"):
        with mock.patch.object(BracketSearch, "pads", pads):
            start = time.perf_counter()
            result = robust_radius(compiled, part, full=True)
            times.append(time.perf_counter() - start)
        rows, padded = rows + int(result.forward_rows.sum()), padded + result.padded_rows
    return {
        "compilations": counters["stats"]["unique_graphs"],
        "seconds": sum(times),
        "median batch, seconds": statistics.median(times),
        "rows a sample": rows / len(x),
        "rows in vain a sample": padded / len(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.shared, "resnet20")
    x, _ = load_test_images(arguments.shared, arguments.batches * arguments.batch)
    # The compiler gives up on a function after so many shapes, and runs it as it is.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    inductor.force_disable_caches = True  # each run compiles for itself
    measure(model, x[:4], 4, None, True)  # what is started once for all is started here
    report = {}
    print("dynamic  sizes        compilations   seconds  median batch  rows   in vain")
    for dynamic in (None, False):
        for pads, name in ((False, "every size"), (True, "few sizes")):
            run = measure(model, x, arguments.batch, dynamic, pads)
            report[f"dynamic={dynamic}, {name}"] = run
            print(
                f"{dynamic!s:8s} {name:10s} {run['compilations']:14d} {run['seconds']:9.1f}"
                f" {run['median batch, seconds']:10.2f} s {run['rows a sample']:6.2f}"
                f" {run['rows in vain a sample']:9.2f}"
            )
    if arguments.out:
        settings = {"batches": arguments.batches, "batch": arguments.batch}
        settings["torch"] = torch.__version__
        arguments.out.write_text(json.dumps({**settings, "runs": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
