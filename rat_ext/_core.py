"""The compiled core: loads it, or says how to build it."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent
_REBUILD = "pip install --force-reinstall --no-deps ."


def _import_core() -> ModuleType:
    try:
        return importlib.import_module(f"{__package__}._C")
    except ImportError as cause:
        raise ImportError(f"{_diagnosis()}\nThe cause was: {cause}") from cause


def _diagnosis() -> str:
    built = sorted(path.name for path in _PACKAGE.glob("_C.*"))
    root = _PACKAGE.parent
    if not built and (root / "csrc").is_dir() and (root / "setup.py").is_file():
        return (
            f"rat_ext was imported from its source tree, {root}, where no compiled core is built.\n"
            "Either `pip install .` there and run Python from another directory, or build it in "
            "place with `pip install -e .`."
        )
    importable = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    if not built:
        state = f"The compiled core of rat_ext is missing from {_PACKAGE}."
    elif set(built).isdisjoint(importable):
        state = (
            f"The compiled core of rat_ext was built for another Python: {_PACKAGE} holds "
            f"{', '.join(built)}; this Python loads {importable[0]}."
        )
    else:
        state = f"The compiled core of rat_ext in {_PACKAGE} does not load."
    return f"{state}\nRebuild it: in the source tree of rat_ext, run `{_REBUILD}` with this Python."


core = _import_core()
__version__: str = core.BUILD_VERSION
