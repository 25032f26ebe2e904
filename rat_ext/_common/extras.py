"""What to install where an optional library is missing."""

from __future__ import annotations

import importlib.metadata
import re


def install(extra: str) -> str:
    """How to get the libraries of an extra, for an error: those that are missing, by name.

    The names are those of the installed package's metadata, which pyproject.toml gives it.
    """
    clone = f"pip install '.[{extra}]'"
    libraries = _libraries(extra)
    missing = [name for name in libraries if not _is_installed(name)] or libraries
    if not missing:  # the package is run from its sources
        return f"{clone} in a clone of rat_ext"
    return f"pip install {' '.join(missing)} (or {clone} in a clone of rat_ext)"


def _libraries(extra: str) -> list[str]:
    try:
        requirements = importlib.metadata.requires("rat-ext") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[str] = []
    for requirement in requirements:
        what, _, marker = requirement.partition(";")
        if not re.search(rf"""extra == ['"]{extra}['"]""", marker):
            continue
        if own := re.match(r"rat[-_]ext\[([\w,]+)\]", what):
            found += [name for each in own[1].split(",") for name in _libraries(each)]
        elif library := re.match(r"[\w.-]+", what):
            found.append(library[0])
    return found


def _is_installed(library: str) -> bool:
    try:
        importlib.metadata.distribution(library)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
