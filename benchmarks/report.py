"""The time that `rat_ext.evaluation.write` takes for the report of an evaluation.

The evaluation is made up: random logits and confidences, in 5 splits, and images of noise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rat_ext import datasets, evaluation, metrics, scores


def made_up(images: int, names: list[str]) -> evaluation.Evaluation:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(images, 10, generator=generator)
    target = (logits / 2).softmax(1).multinomial(1, generator=generator).squeeze(1)
    right = logits.argmax(1) == target
    settings = evaluation.Settings(tuple(names))
    orders = [torch.randperm(images, generator=generator) for _ in range(settings.splits)]
    tests = [order[images // 5 :] for order in orders]
    results = []
    for name in names:
        own = torch.rand(images, generator=generator) * (1 + right) / 2
        rows = [metrics.summary(own[test], right[test]) for test in tests]
        per_split = [own] * settings.splits
        results.append(evaluation.Result(name, rows, [""] * len(rows), per_split, 1.0, 1.0, 0.0))
    return evaluation.Evaluation(settings, logits, target, tests, results)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--scores", type=int, default=12)
    options = parser.parse_args(arguments)
    found = made_up(options.images, [*scores.names(), "msr-views"][: options.scores])
    pixels = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8)
    data = datasets.Images(pixels, found.target.long(), tuple("0123456789"))
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        evaluation.write(found, "made up", Path(folder), data=data)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = (Path(folder) / "index.html").stat().st_size
    print(
        f"{options.images:,} images, {len(found.results)} scores, {len(found.tests)} splits: "
        f"{wall:.1f} s ({cpu:.1f} s of CPU), a page of {size / 1e3:.0f} kB"
    )


if __name__ == "__main__":
    main()
