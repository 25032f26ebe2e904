"""The command line: rat-ext COMMAND, each command in a file of its own."""

from .main import main

__all__ = ["main"]
