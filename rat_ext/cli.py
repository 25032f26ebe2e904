"""The command line: rat-ext COMMAND. Modules that a command needs are imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, or 2 for an error of the user's, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"rat-ext {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rat-ext {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rat-ext",
        description="Robust radii of PyTorch classifiers, and misclassification detection by them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_demo(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="what was built and what is usable here")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    from ._build import format_build_info

    print(format_build_info())


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="the method on handwritten digits: a table and an HTML report",
        description="Trains small networks on scikit-learn's handwritten digits, plainly and with "
        "RAT, and tells how well MSR, RR-Fast and RR-BS find their wrong predictions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=_demo)
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write to")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one pair of networks each"
    )
    parser.add_argument("--train-size", type=int, default=500, help="images to train on")
    parser.add_argument("--epochs", type=int, default=40, help="of training")
    parser.add_argument("--eps", type=float, default=0.1, help="size of the RAT perturbation")
    parser.add_argument("--lam", type=float, default=1.0, help="weight of the RAT loss's term")


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    settings = demo.Settings(
        seeds=tuple(options.seeds),
        train_size=options.train_size,
        epochs=options.epochs,
        eps=options.eps,
        lam=options.lam,
    )
    demo.main(settings, options.out)
