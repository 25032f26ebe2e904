"""The command line: rat-ext COMMAND, and what an error or an interruption looks like."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import demo, detector, evaluate, info, radii, serve, train

COMMANDS = (info, demo, train, evaluate, radii, detector, serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, or 2 for an error of the user's, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"rat-ext {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rat-ext {options.command}: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rat-ext",
        description="Robust radii of PyTorch classifiers, and misclassification detection by them.",
    )
    parser.set_defaults(after_interrupt="")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
