"""rat-ext evaluate"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import datasets, evaluation
from .inputs import (
    Commands,
    Formatter,
    add_classifier,
    add_data,
    load_classifier,
    load_data,
    use_device,
)


def add(commands: Commands) -> None:
    default = evaluation.Settings()
    parser = commands.add_parser(
        "evaluate",
        help="how well confidence scores find a classifier's wrong predictions",
        description="Fits confidence scores on one part of the test images and tests them on the "
        "rest, for\nseveral random splits; writes results.csv, results.json and index.html. On "
        "several devices:\n\n  torchrun --nproc-per-node=2 -m rat_ext evaluate ...",
        formatter_class=Formatter,
    )
    parser.set_defaults(run=run, after_interrupt="; with --resume the command goes on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    add_classifier(parser)
    add_data(parser)
    parser.add_argument("--ood", help="a data set whose images are mixed in and count as errors")
    parser.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="SCORE",
        help="names of the scores to compare (default: all)",
    )
    parser.add_argument(
        "--splits", type=int, default=default.splits, help="number of random splits"
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=default.validation_share,
        help="share of the images on which temperatures and perturbations are chosen",
    )
    parser.add_argument(
        "--tune",
        choices=["all", "temperature", "none"],
        default=default.tune,
        help="what to choose for each score: temperature and input perturbation, the temperature "
        "alone, or nothing",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of the random splits")
    parser.add_argument(
        "--batch-size", type=int, default=default.batch_size, help="images in a batch"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an evaluation that was interrupted"
    )


def run(options: argparse.Namespace) -> None:
    settings = evaluation.Settings(
        scores=tuple(options.scores),
        splits=options.splits,
        validation_share=options.validation_share,
        tune=options.tune,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    data = load_data(options, "test")
    name, model = load_classifier(options, len(data.classes))
    title = f"Misclassification detection: {name} on {options.data}"
    if options.ood is not None:
        outliers = datasets.load(options.ood, "test", options.root, download=options.download)
        data = datasets.with_outliers(data, outliers)
        title += f" with {options.ood} as errors"
    with use_device(options) as (device, _):
        result = evaluation.evaluate(
            model.to(device),
            data,
            settings,
            options.out,
            resume=options.resume,
            workers=options.workers,
        )
    if result is not None:
        evaluation.write(result, title, options.out)
        shown = evaluation.table(result)
        accuracy = 100 * result.correct.double().mean()
        print(f"Accuracy {accuracy:.2f} % of {len(result.target):,} images.")
        print(f"\n{shown.text()}\n\n{shown.caption} A star marks the best of a column.")
        print(f"\n{evaluation.costs(result).text()}")
        print(f"\nReport: {options.out / 'index.html'}")
