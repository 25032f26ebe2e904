"""Radii on disk: what a run over a data set has written, and of what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._common.storage import write_whole
from ..search.result import LoaderRadii
from .shard_files import file_name, numbers_in, read_shard

MANIFEST = "_run.json"  # readers of a folder of Parquet files ignore what begins with _


class RadiusShards:
    """What `robust_radii(model, loader, out=folder)` has written, read a shard at a time.

    Iterating gives, for each shard in the loader's order, a dict of (n,) tensors on the CPU:
    ``radius``, ``lower``, ``upper``, ``prediction``, ``flipped_to`` and ``forward_rows`` as in
    `RadiusResult`, and ``target`` if the loader has targets. An unfinished run can be read too:
    the shards that are there. A shard that is damaged or of another run, or that a finished run
    lacks, is a ValueError; `robust_radii` with ``resume=True`` computes it again.

    Args:
        folder: the ``out`` of the run.

    Raises:
        FileNotFoundError: there is no run in this folder.
        ValueError: what the folder says of its run cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no radii: there is no {path}")
        self.manifest: dict[str, Any] = _read_manifest(path)
        """Options, fingerprint of the model, and ``complete``."""
        self.format: str = self.manifest["format"]

    @property
    def complete(self) -> bool:
        """The run got to the end of its loader, and none of its shards is missing."""
        return bool(self.manifest["complete"]) and set(self._expected()) <= set(self.numbers())

    def numbers(self) -> list[int]:
        """Of the shards that are there, in order."""
        return numbers_in(self.folder, self.format)

    def path(self, number: int) -> Path:
        """Of the file of a shard."""
        return self.folder / file_name(number, self.format)

    def __len__(self) -> int:
        """How many shards are there."""
        return len(self.numbers())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in self._expected():
            columns, _ = read_shard(self.path(number), self.manifest["run"], number)
            yield {name: torch.from_numpy(values) for name, values in columns.items()}

    def load(self) -> LoaderRadii:
        """Everything in memory, as `robust_radii` without ``out`` returns it.

        Raises:
            ValueError: the run is not complete, or one of its shards is damaged.
        """
        if not self.manifest["complete"]:
            raise ValueError(
                f"the run in {self.folder} is not complete: go on with resume=True, or iterate "
                "over the shards that are there"
            )
        parts = [{k: v for k, v in shard.items() if k in LoaderRadii._fields} for shard in self]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return LoaderRadii(columns["radius"], columns["prediction"], columns.get("target"))

    def _expected(self) -> list[int]:
        """The shards that a reader must find: all of a finished run, or those that are there."""
        finished = self.manifest["complete"]
        return list(range(self.manifest["shards"])) if finished else self.numbers()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Record what the run in a folder is of, and how far it is."""
    text = json.dumps(manifest | {"sha256": _checksum(manifest)}, indent=1) + "\n"
    write_whole(folder / MANIFEST, lambda temporary: temporary.write_text(text))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):  # no JSON, or another kind of JSON
        manifest = {}
    if "run" not in manifest and "rat_ext" in manifest:
        raise ValueError(
            f"{path} is of an older version of rat_ext, whose runs this one cannot read; use "
            "another folder, or delete this one"
        )
    if manifest.get("sha256") != _checksum(manifest):
        raise ValueError(
            f"{path} is damaged or was edited, and nothing else says what the shards are of; use "
            "another folder, or delete this one"
        )
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()
