"""What is written to disk, whole or not at all and by one at a time; state dicts told apart."""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn


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
    """SHA-256 of the model's tensors: names in its state dict, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model.state_dict()).items():
        if isinstance(value, Tensor):  # a module's extra state may be anything
            _add(digest, name, value)
    constants = []
    for value in _constants(model):
        _add(constant := hashlib.sha256(), "constant", value)
        constants.append(constant.digest())
    digest.update(b"".join(sorted(constants)))  # saving changes their order
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(raw_bytes(value))


def _constants(model: nn.Module) -> Iterator[Tensor]:
    """The tensors in the code of TorchScript models: all that they have, once they are frozen."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) and hasattr(module, "forward"):
            graph: Any = module.inlined_graph  # its nodes live no longer than it
            for node in graph.findAllNodes("prim::Constant"):
                if node.hasAttribute("value") and node.kindOf("value") == "t":
                    yield node.t("value")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is never seen half written, also if the writer is killed."""
    # Of this call alone, so that no other writer takes it. The part that differs is the extension,
    # because torch.save puts the rest of the name into the file.
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what killed processes left of files that they were writing with `write_whole`.

    Args:
        folder: where nobody else is writing them now.
        names: of the files, as patterns.
    """
    for name in names:
        for path in folder.glob(f".{name}.tmp-*"):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep others from writing to a folder, which is made if it is not there.

    The lock is the operating system's, which takes it back when the process dies, however it dies.
    Of several processes that work together, the first takes it for all.

    Args:
        folder: only those who call this are kept out.
        what: works in it, for the others' error.

    Raises:
        BlockingIOError: somebody has the lock; says who.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Not in the lock file itself, whose content is filelock's affair.
    lock, holder = FileLock(folder / ".lock"), folder / ".lock-holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            who = holder.read_text()
        except OSError:  # it is only starting, or just ending
            who = ""
        raise BlockingIOError(
            f"{folder} is in use by {who or 'another run'}; wait until it ends, or use another "
            "folder"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(f"{what}, process {os.getpid()} on {socket.gethostname()}, since {since}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
