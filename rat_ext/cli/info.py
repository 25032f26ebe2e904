"""rat-ext info"""

from __future__ import annotations

import argparse

from .._build_info import format_build_info
from .inputs import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("info", help="what was built and what is usable here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    print(format_build_info())
