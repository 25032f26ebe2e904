"""State on disk: files written whole or not at all, and state dicts told apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is never seen half written, also if the writer is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the prefixes of DistributedDataParallel and torch.compile."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def raw_bytes(tensor: Tensor) -> Any:
    """The elements of a tensor as a uint8 array on the CPU."""
    # Flat, because a tensor without dimensions cannot be viewed as bytes.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the tensors of the model's state dict: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model.state_dict()).items():
        if isinstance(value, Tensor):  # a module's extra state may be anything
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(raw_bytes(value))
    return digest.hexdigest()
