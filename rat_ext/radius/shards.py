"""Radii on disk: a long run over a data set, in files that are each there whole or not at all.

The batches of a loader are numbered from 0, and some consecutive ones make a shard. A shard's file
is named by its number, and under torchrun its number also says which process computes it. So the
files alone tell what is left to do, whatever killed the run, and with how many processes it goes
on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._common.storage import fingerprint, write_whole
from .._common.user_model import Model
from .._core import __version__
from ..search.options import Options, SearchOptions
from ..search.result import LoaderRadii, RadiusResult
from .numbered_batches import NumberedBatches
from .robust_radius import robust_radius

MANIFEST = "_run.json"  # readers of a folder of Parquet files ignore what begins with _
_COLUMNS = ("radius", "lower", "upper", "prediction", "flipped_to", "forward_rows")


class RadiusShards:
    """What `robust_radii(model, loader, out=folder)` has written, read a shard at a time.

    Iterating gives, for each shard in the loader's order, a dict of (n,) tensors on the CPU:
    ``radius``, ``lower``, ``upper``, ``prediction``, ``flipped_to`` and ``forward_rows`` as in
    `RadiusResult`, and ``target`` if the loader has targets. An unfinished run can be read too:
    the shards that are there.

    Args:
        folder: the ``out`` of the run.

    Raises:
        FileNotFoundError: there is no run in this folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no radii: there is no {path}")
        self.manifest: dict[str, Any] = json.loads(path.read_text())
        """Options, fingerprint of the model, and ``complete``."""
        self.format: str = self.manifest["format"]

    @property
    def complete(self) -> bool:
        """The run got to the end of its loader."""
        return bool(self.manifest["complete"])

    def numbers(self) -> list[int]:
        """Of the shards that are there, in order."""
        return sorted(int(p.stem[6:]) for p in self.folder.glob(f"radii-*.{self.format}"))

    def path(self, number: int) -> Path:
        """Of the file of a shard."""
        return self.folder / f"radii-{number:06d}.{self.format}"

    def __len__(self) -> int:
        """How many shards are there."""
        return len(self.numbers())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        read = _FORMATS[self.format][0]
        for number in self.numbers():
            try:
                columns = read(self.path(number))
            except Exception as error:  # zipfile, numpy and pyarrow raise many kinds
                raise ValueError(
                    f"{self.path(number)} is damaged ({error}); delete it, and go on with "
                    "resume=True"
                ) from error
            yield {name: torch.from_numpy(values) for name, values in columns.items()}

    def load(self) -> LoaderRadii:
        """Everything in memory, as `robust_radii` without ``out`` returns it.

        Raises:
            ValueError: the run is not complete.
        """
        if not self.complete:
            raise ValueError(
                f"the run in {self.folder} is not complete: go on with resume=True, or iterate "
                "over the shards that are there"
            )
        parts = [{k: v for k, v in shard.items() if k in LoaderRadii._fields} for shard in self]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return LoaderRadii(columns["radius"], columns["prediction"], columns.get("target"))

    def _mark_complete(self, batches: int) -> None:
        """Record that all batches of the loader are in the shards."""
        expected = -(-batches // self.manifest["batches_per_shard"])
        if self.numbers() != list(range(expected)):
            raise RuntimeError(
                f"{self.folder} has {len(self)} shards where {batches} batches make {expected}; "
                "did the processes have loaders of different lengths?"
            )
        self.manifest["complete"] = True
        self._write_manifest()

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1) + "\n"
        write_whole(self.folder / MANIFEST, lambda temporary: temporary.write_text(text))

    @classmethod
    def _create(cls, folder: Path, manifest: dict[str, Any]) -> RadiusShards:
        """Start a run."""
        folder.mkdir(parents=True, exist_ok=True)
        shards = cls.__new__(cls)
        shards.folder, shards.manifest, shards.format = folder, manifest, manifest["format"]
        shards._write_manifest()
        return shards


def write_radii(
    model: Model,
    loader: Iterable[Any],
    out: str | Path,
    *,
    resume: bool,
    batches_per_shard: int,
    format: str,
    device: torch.device | str | None,
    progress: bool,
    options: SearchOptions,
) -> RadiusShards:
    """`robust_radii` with ``out``, which see."""
    from tqdm.auto import tqdm

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = NumberedBatches(loader)
    manifest = _manifest(model, source, batches_per_shard, format, options)
    shards = _open_together(Path(out), manifest, resume, rank, world)
    if shards.complete:
        return shards
    done = set(shards.numbers())

    def is_mine(position: int) -> bool:
        return position // batches_per_shard % world == rank

    def is_left(position: int) -> bool:
        return is_mine(position) and position // batches_per_shard not in done

    total = None if source.length is None else sum(map(is_mine, range(source.length)))
    left = sum(map(is_left, range(source.length or 0)))
    with tqdm(
        desc="robust radius",
        unit="batch",
        initial=total - left if total else 0,
        total=total,
        disable=not progress or rank > 0,
    ) as bar:
        numbered = source.batches(is_left)
        for number, part in itertools.groupby(numbered, lambda item: item[0] // batches_per_shard):
            rows = []
            for _, batch in part:
                rows.append(_columns(model, batch, device, options))
                bar.update()
            columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            write = _FORMATS[format][1]
            write_whole(shards.path(number), partial(write, columns))
    if not source.total:
        raise ValueError("the loader gave no batch")
    if world > 1:
        dist.barrier()
    if rank == 0:
        shards._mark_complete(source.total)
    if world > 1:
        dist.barrier()
    return RadiusShards(out)


def batch_radii(
    model: Model, batch: Any, device: torch.device | str | None, options: SearchOptions
) -> tuple[RadiusResult, Tensor | None]:
    """The result for one batch of a loader, and the batch's targets on the CPU, if it has any."""
    x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
    result = robust_radius(model, x.to(device), full=True, **options)
    return result, torch.as_tensor(rest[0]).cpu() if rest else None


def _columns(
    model: Model, batch: Any, device: torch.device | str | None, options: SearchOptions
) -> dict[str, np.ndarray]:
    result, target = batch_radii(model, batch, device, options)
    columns = {name: getattr(result, name) for name in _COLUMNS}
    if target is not None:
        if target.shape != result.radius.shape:
            raise ValueError(
                f"the loader's targets have shape {tuple(target.shape)} for {len(result)} samples; "
                "with out they must be (N,)"
            )
        columns["target"] = target
    return {name: column.cpu().numpy() for name, column in columns.items()}


def _manifest(
    model: Model,
    source: NumberedBatches,
    batches_per_shard: int,
    format: str,
    options: SearchOptions,
) -> dict[str, Any]:
    if batches_per_shard < 1:
        raise ValueError(f"batches_per_shard is {batches_per_shard}; it must be at least 1")
    if format not in _FORMATS:
        raise ValueError(f"format is {format!r}; expected {' or '.join(map(repr, _FORMATS))}")
    if format == "parquet":
        _parquet()
    # In float64, which allows the finest rtol; what a batch allows is checked with the batch.
    checked = Options.checked(torch.empty(1, 1, dtype=torch.float64), **options)
    manifest = {
        "rat_ext": __version__,
        "model": fingerprint(model) if isinstance(model, nn.Module) else None,
        "options": {**vars(checked), "attacks": [attack.name for attack in checked.attacks]},
        "batches": source.length,
        "batches_per_shard": batches_per_shard,
        "first_batch": source.first_batch(),
        "format": format,
        "complete": False,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(manifest))
    return as_read


def _open_together(
    folder: Path, manifest: dict[str, Any], resume: bool, rank: int, world: int
) -> RadiusShards:
    """The run in the folder, old or new; the same, or the same error, in all processes."""
    if world == 1:
        return _open(folder, manifest, resume)
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            _open(folder, manifest, resume)
        except (ValueError, OSError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
    return _open(folder, manifest, resume=True)


def _open(folder: Path, manifest: dict[str, Any], resume: bool) -> RadiusShards:
    if not (folder / MANIFEST).exists():
        return RadiusShards._create(folder, manifest)
    shards = RadiusShards(folder)
    if not resume:
        raise FileExistsError(
            f"{folder} has {'all' if shards.complete else 'a part'} of the radii of a run; go on "
            "with resume=True, or use another folder"
        )
    if changes := _changes(shards.manifest, manifest):
        raise ValueError(
            f"cannot resume the run in {folder}: {', '.join(changes)}. Use the same, or another "
            "folder"
        )
    return shards


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the runs of two manifests, in words."""
    unlike = [name for name in new if new[name] != old.get(name) and name != "complete"]
    words = {
        "model": "the model has other weights",
        "first_batch": "the loader's first batch has other inputs",
    }
    changes = [words[name] for name in unlike if name in words]
    pairs = [(name, old.get(name), new[name]) for name in unlike if name not in (*words, "options")]
    before, after = old.get("options", {}), new["options"]
    pairs += [(k, before.get(k), v) for k, v in after.items() if before.get(k) != v]
    return changes + [f"{name} was {was}, is {now}" for name, was, now in pairs]


Columns = dict[str, np.ndarray]


def _read_npz(path: Path) -> Columns:
    # Opened here, because np.load leaves a file open that it finds damaged.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _write_npz(columns: Columns, path: Path) -> None:
    with path.open("wb") as file:  # to a name, numpy would add .npz
        np.savez(file, **columns)  # type: ignore[arg-type]  # its stub knows one option, too


def _read_parquet(path: Path) -> Columns:
    # ParquetFile, because read_table would look for columns in the names of the folders.
    table = _parquet().ParquetFile(path).read()
    return {name: table[name].to_numpy().copy() for name in table.column_names}


def _write_parquet(columns: Columns, path: Path) -> None:
    import pyarrow

    _parquet().write_table(pyarrow.table(columns), path)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("format 'parquet' needs pyarrow: pip install pyarrow") from error
    return parquet


_FORMATS: dict[str, tuple[Callable[[Path], Columns], Callable[[Columns, Path], None]]] = {
    "npz": (_read_npz, _write_npz),
    "parquet": (_read_parquet, _write_parquet),
}
