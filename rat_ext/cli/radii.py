"""rat-ext radii"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..radius import robust_radii
from ..search.options import OPTIONS
from .inputs import (
    Commands,
    Formatter,
    add_classifier,
    add_data,
    add_search_options,
    load_classifier,
    load_data,
    make_loader,
    search_options,
    use_device,
)

SEARCH = tuple(name for name in OPTIONS if name != "batch_size")  # that of the loader


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "radii",
        help="the robust radius of every image of a data set, to files",
        description="Writes radii, predictions and targets to the output folder, in files of some "
        "batches\neach; rat_ext.RadiusShards reads them. On several devices:\n\n"
        "  torchrun --nproc-per-node=2 -m rat_ext radii ...",
        formatter_class=Formatter,
    )
    parser.set_defaults(run=run, after_interrupt="; with --resume the command goes on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    add_classifier(parser)
    add_data(parser)
    parser.add_argument(
        "--split", choices=["test", "train"], default="test", help="which part of the data set"
    )
    parser.add_argument("--batch-size", type=int, default=250, help="images in a batch")
    parser.add_argument(
        "--batches-per-shard", type=int, default=16, help="batches whose results share a file"
    )
    parser.add_argument(
        "--format", choices=["npz", "parquet"], default="npz", help="format of the files"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was interrupted"
    )
    add_search_options(parser.add_argument_group("search"), *SEARCH)


def run(options: argparse.Namespace) -> None:
    data = load_data(options, options.split)
    _, model = load_classifier(options, len(data.classes))
    with use_device(options) as (device, rank):
        shards = robust_radii(
            model.to(device).eval(),
            make_loader(options, data, device),
            out=options.out,
            resume=options.resume,
            batches_per_shard=options.batches_per_shard,
            format=options.format,
            **search_options(options, *SEARCH),
        )
    if rank:
        return
    radii = shards.load()
    assert radii.target is not None  # data sets have targets
    right = radii.prediction.eq(radii.target)
    print(f"Accuracy {100 * right.double().mean():.2f} % of {len(right):,} images.")
    for name, which in (("right", right), ("wrong", ~right)):
        if which.any():
            print(f"Median radius of the {name} predictions: {radii.radius[which].median():.4g}")
    print(f"Radii: {options.out}, {len(shards)} {options.format} file(s)")
