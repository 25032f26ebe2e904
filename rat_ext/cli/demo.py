"""rat-ext demo"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import demo
from .inputs import Commands, Formatter


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="the method on handwritten digits: a table and an HTML report",
        description="Trains small networks on scikit-learn's handwritten digits, plainly and with "
        "RAT, and tells how well MSR, RR-Fast and RR-BS find their wrong predictions.",
        formatter_class=Formatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write to")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="random seeds; each trains one pair of networks",
    )
    parser.add_argument("--train-size", type=int, default=500, help="number of images to train on")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of training")
    parser.add_argument("--eps", type=float, default=0.1, help="size of the RAT perturbation")
    parser.add_argument("--lam", type=float, default=1.0, help="weight of the RAT loss's term")


def run(options: argparse.Namespace) -> None:
    experiment = demo.Experiment(
        seeds=tuple(options.seeds),
        train_size=options.train_size,
        epochs=options.epochs,
        eps=options.eps,
        lam=options.lam,
    )
    demo.main(experiment, options.out)
