"""A run's files: read and written with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from .._common.storage import write_whole

_PARTS: dict[str, type | tuple[type, ...]] = {
    "recipe": dict,
    "epoch": int,
    "history": list,
    "model": dict,
    "optimizer": dict,
    "ema": (dict, NoneType),
    "data": (dict, NoneType),  # absent in files of older versions, as are those below
    "classes": (list, NoneType),
    "preprocessing": (dict, NoneType),
    "name": (str, NoneType),
    "correctness": (torch.Tensor, NoneType),
}


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of a run.

    Raises:
        ValueError: it is damaged, or something else.
        OSError: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds, unpickling ones among them
        raise damaged(path, error) from error
    if not isinstance(state, dict) or not all(
        isinstance(state.get(part), kind) for part, kind in _PARTS.items()
    ):
        raise ValueError(
            f"{path} is not a checkpoint of a training run; move it, or use another output folder"
        )
    return state


def damaged(path: Path, error: Exception) -> ValueError:
    """What to raise where a checkpoint cannot be used for this reason."""
    return ValueError(
        f"{path} is damaged ({_first_line(error)}); delete it or use another output folder"
    )


def write(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Write a file of a run whole, or leave the one that is there.

    Raises:
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write_to)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter if the disk is full
        kept = ", and is as it was" if path.exists() else ""
        raise OSError(
            f"{path} cannot be written{kept} ({_first_line(error)}). Is the disk full? Free some "
            "space, or use another output folder; the same call goes on from the last epoch saved"
        ) from error


def write_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """As `write`, with torch.save."""
    write(path, lambda temporary: torch.save(state, temporary))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
