r"""How fine radii must be to rank predictions: rows and AURC by rtol.

    python benchmarks/coarse_radii.py --shared DIR --nets NAME=FILE... \
        --out benchmarks/results/coarse_radii.json

RR-BS at temperature 1, by the shared ResNets and by each checkpoint FILE of a ResNet-20, on test
images from 1,000 to 4,999 of DIR. AURC is times 1000; the difference is to rtol 2^-12, with a 95 %
interval of a bootstrap over the images in which both have the same resamples. Rank correlation is
Spearman's. Rows are forward rows of the search, without the one of the ray.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import (
    interval,
    load_checkpoints,
    load_model,
    load_test_images,
    resampled,
    shared_folder,
)
from tqdm.auto import tqdm

import rat_ext
from rat_ext import metrics

FINE = 2.0**-12
RTOLS = (FINE, 0.01, 0.05, 0.1, 0.2, 0.5)


def ranks(values: np.ndarray) -> np.ndarray:
    """The mean rank of each value among ties."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def measure(model, x, target, resamples: int) -> dict[str, dict[str, object]]:
    results = {}
    for rtol in tqdm(RTOLS, leave=False, unit="rtol"):
        parts = [rat_ext.robust_radius(model, part, rtol=rtol, full=True) for part in x.split(250)]
        radius, rows, prediction = (
            torch.cat([getattr(part, name) for part in parts]).numpy()
            for name in ("radius", "forward_rows", "prediction")
        )
        results[rtol] = radius.astype(np.float64), rows, prediction == target.numpy()
    aurcs = [(metrics.aurc, radius, correct) for radius, _, correct in results.values()]
    draws = dict(zip(results, resampled(aurcs, resamples), strict=True))
    fine = results[FINE]
    report = {}
    for rtol, (radius, rows, correct) in results.items():
        aurc, finest = metrics.aurc(radius, correct), metrics.aurc(fine[0], fine[2])
        report[f"{rtol:g}"] = {
            "rows": float(rows.mean()),
            "aurc": 1000 * aurc,
            "minus_fine": 1000 * (aurc - finest),
            "interval": interval(1000 * (draws[rtol] - draws[FINE])),
            "rank_correlation": float(np.corrcoef(ranks(radius), ranks(fine[0]))[0, 1]),
        }
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--nets", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    x, target = load_test_images(options.shared, 1000 + options.images)
    x, target = x[1000:], target[1000:]
    nets = {name: load_model(options.shared, name) for name in ("resnet20", "resnet56")}
    nets |= load_checkpoints(options.nets)
    report = {}
    print("| net | rtol | rows | AURC x1000 | minus that of 2^-12 | rank correlation |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, model in nets.items():
        report[name] = measure(model, x, target, options.resamples)
        for rtol, row in report[name].items():
            low, high = row["interval"]
            print(
                f"| {name} | {rtol} | {row['rows']:.2f} | {row['aurc']:.2f} "
                f"| {row['minus_fine']:+.2f} ({low:+.2f} to {high:+.2f}) "
                f"| {row['rank_correlation']:.5f} |",
                flush=True,
            )
    if options.out:
        settings = {"images": len(x), "torch": torch.__version__}
        options.out.write_text(json.dumps({**settings, "nets": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
