"""The command line: rat-ext COMMAND, and what an error or an interruption looks like."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Union

import tyro
from tyro.conf import subcommand

from .._core import __version__
from .demo import Demo
from .detector import DetectorCommand
from .evaluate import Evaluate
from .info import Info
from .inputs import Command, command_line
from .radii import Radii
from .serve import Serve
from .train import Train

COMMANDS: dict[str, type[Command]] = {
    "info": Info,
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "radii": Radii,
    "detector": DetectorCommand,
    "serve": Serve,
}
_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, or 2 for an error of the user's, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"rat-ext {__version__}")
        return 0
    command = parse(arguments)
    command_line.set(shlex.join(["rat-ext", *arguments]))
    name = next(name for name, kind in COMMANDS.items() if isinstance(command, kind))
    try:
        if isinstance(command, Train) and command.preset is not None:
            command = parse(arguments, command.with_defaults())
        command.run()
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"rat-ext {name}: error: {_as_typed(error, command)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"rat-ext {name}: interrupted{getattr(command, 'after_interrupt', '')}", file=sys.stderr
        )
        return 130
    return 0


def parse(arguments: Sequence[str], defaults: Command | None = None) -> Command:
    """The command that was typed, with its options.

    Args:
        arguments: the words after "rat-ext".
        defaults: the command with other defaults than its own.

    Raises:
        SystemExit: help was asked for (status 0), or there is no such command or option (2).
    """
    typed = next(iter(arguments), None)
    kinds = [
        Annotated[kind, subcommand(name, description=_description(kind, name == typed))]
        for name, kind in COMMANDS.items()
    ]
    # A type made at run time, which type checkers do not follow.
    commands: Any = Union[tuple(kinds)]  # noqa: UP007
    command: Command = tyro.cli(
        commands,
        prog="rat-ext",
        description="Robust radii of PyTorch classifiers, and misclassification detection by them. "
        "rat-ext --version tells the version.",
        args=arguments,
        default=tyro.MISSING if defaults is None else defaults,
        config=_STYLE,
    )
    return command


def _description(kind: type[Command], whole: bool) -> str:
    """For a command's own help, or its first line for the list of commands."""
    text = inspect.getdoc(kind) or ""  # none under python -OO
    if not whole:
        return text.partition("\n")[0]
    return "\n\n".join(textwrap.fill(part, 80) for part in text.split("\n\n"))


def _as_typed(error: Exception, command: Command) -> str:
    """The message of an error, with options as they are typed: --batch-size for batch_size=...

    What the package says names Python's arguments, ``resume=True`` or "batch_size is 0".
    """

    options = set(_names(command))

    def typed(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in options:
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        return flag if value in ("", "True") else f"{flag} {value}"

    # A name counts where it begins the message, or has a value.
    message = re.sub(r"\b(?P<name>[a-z]\w*)=(?P<value>[\w.]+)", typed, str(error))
    return re.sub(r"^(?P<name>[a-z]\w*)(?P<value>)(?= is )", typed, message)


def _names(options: Any) -> Iterator[str]:
    """Of all the options of a command."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _names(value)
        else:
            yield field.name
