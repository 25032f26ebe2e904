"""The command line: rat-ext COMMAND, and what an error or an interruption looks like."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from .._core import __version__
from . import demo, detector, evaluate, info, radii, serve, train

COMMANDS = (info, demo, train, evaluate, radii, detector, serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, or 2 for an error of the user's, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"rat-ext {options.command}: error: {_as_typed(error, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rat-ext {options.command}: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130
    return 0


def _as_typed(error: Exception, options: argparse.Namespace) -> str:
    """The message of an error, with options as they are typed: --batch-size for batch_size=...

    What the package says names Python's arguments, ``resume=True`` or "batch_size is 0".
    """

    def typed(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if not hasattr(options, name):
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        return flag if value in ("", "True") else f"{flag} {value}"

    # A name counts where it begins the message, or has a value.
    message = re.sub(r"\b(?P<name>[a-z]\w*)=(?P<value>[\w.]+)", typed, str(error))
    return re.sub(r"^(?P<name>[a-z]\w*)(?P<value>)(?= is )", typed, message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rat-ext",
        description="Robust radii of PyTorch classifiers, and misclassification detection by them.",
    )
    parser.add_argument("--version", action="version", version=f"rat-ext {__version__}")
    parser.set_defaults(after_interrupt="")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
