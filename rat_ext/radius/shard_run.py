"""A long run over a data set, which writes its radii as it goes.

The batches of a loader are numbered from 0, and some consecutive ones make a shard. A shard's file
is named by its number, and under torchrun its number also says which process computes it. So the
files alone tell what is left to do, whatever killed the run or damaged them, and with how many
processes it goes on.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._common.loaders import arguments_of, inputs_and_targets
from .._common.per_sample import with_arguments
from .._common.storage import fingerprint, locked, remove_leftovers
from .._common.user_model import Model
from .._core import __version__
from ..search.checked import Options
from ..search.options import OPTIONS, SearchOptions
from ..search.result import RadiusResult
from .numbered_batches import NumberedBatches
from .robust_radius import robust_radius
from .shard_files import (
    FORMATS,
    Columns,
    Mark,
    file_name,
    need_parquet,
    numbers_in,
    read_shard,
    write_shard,
)
from .shards import MANIFEST, RadiusShards, write_manifest

_COLUMNS = ("radius", "lower", "upper", "prediction", "flipped_to", "forward_rows")
# What a manifest says of how far the run is; the rest is what the run is of.
_UNFINISHED = {"complete": False, "batches_done": None, "shards": None}


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
    batch_fn: Callable[[Any], Any] | None,
    options: SearchOptions,
) -> RadiusShards:
    """`robust_radii` with ``out``, which see."""
    folder = Path(out)
    source = NumberedBatches(loader, batch_fn)
    manifest = _manifest(model, source, batches_per_shard, format, options)
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(folder, "robust_radii"))
            _open(folder, manifest, resume)

        _first_for_all(take)
        shards = RadiusShards(folder)
        batches = _write_missing(
            shards, source, lambda batch: _columns(model, batch, device, options), progress
        )
        if dist.is_initialized():
            dist.barrier()  # the others may still write
        _first_for_all(lambda: _mark_complete(shards, batches))
    return RadiusShards(folder)


def _write_missing(
    shards: RadiusShards,
    source: NumberedBatches,
    compute: Callable[[Any], Columns],
    progress: bool,
) -> int:
    """Write those of this process's shards that are not there whole; how many batches there are."""
    from tqdm.auto import tqdm

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    run, per_shard = shards.manifest["run"], shards.manifest["batches_per_shard"]
    known: int | None = shards.manifest["batches_done"]
    sizes: dict[int, int] = {}  # in batches, of the shards that are done
    for number in shards.numbers():
        if number % world == rank:
            with suppress(ValueError):
                sizes[number] = read_shard(shards.path(number), run, number)[1]

    def is_mine(position: int) -> bool:
        return position // per_shard % world == rank and (known is None or position < known)

    def is_left(position: int) -> bool:
        return is_mine(position) and position // per_shard not in sizes

    if known is not None and not any(map(is_left, range(known))):
        return known
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
        for number, part in itertools.groupby(numbered, lambda item: item[0] // per_shard):
            rows = []
            for _, batch in part:
                rows.append(compute(batch))
                bar.update()
            columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            write_shard(shards.path(number), columns, Mark(run, number, len(rows)))
            sizes[number] = len(rows)
    if not source.total:
        raise ValueError("the loader gave no batch")
    fit = all(n == min(per_shard, source.total - i * per_shard) for i, n in sizes.items())
    if not fit or known not in (None, source.total):
        raise ValueError(
            f"the loader gave {source.total} batches, and another number when the run in "
            f"{shards.folder} was started; it must give the same each time. Use another folder"
        )
    return source.total


def batch_radii(
    model: Model, batch: Any, device: torch.device | str | None, options: SearchOptions
) -> tuple[RadiusResult, Tensor | None]:
    """The result for one batch of a loader, and the batch's targets on the CPU, if it has any."""
    x, target = inputs_and_targets(batch)
    x = x.to(device)
    arguments = arguments_of(batch)
    if arguments is not None:
        model = with_arguments(model, x, arguments.to(x.device))
    result = robust_radius(model, x, full=True, **options)
    return result, None if target is None else target.cpu()


def _columns(
    model: Model, batch: Any, device: torch.device | str | None, options: SearchOptions
) -> Columns:
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
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected {' or '.join(map(repr, FORMATS))}")
    if format == "parquet":
        need_parquet()
    # In float64, which allows the finest rtol, and without the bounds, which may be those of a row:
    # what a batch allows is checked with the batch.
    but_bounds: SearchOptions = {**options, "bounds": (0.0, 1.0)}
    Options.checked(torch.empty(1, 1, dtype=torch.float64), **but_bounds)
    given = {name: options.get(name, option.default) for name, option in OPTIONS.items()}
    manifest = {
        "rat_ext": __version__,
        "model": fingerprint(model) if isinstance(model, nn.Module) else None,
        "options": given,
        "samples": source.samples,
        "batches": source.length,
        "batches_per_shard": batches_per_shard,
        "first_batch": source.first_batch(),
        "format": format,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(manifest, default=_in_words))
    return as_read


def _in_words(option: Any) -> Any:
    """An option that JSON does not know: a tensor, or a function, whose repr has its address."""
    if isinstance(option, torch.Tensor):
        return option.tolist()
    return getattr(option, "__qualname__", None) or type(option).__qualname__


def _first_for_all(action: Callable[[], None]) -> None:
    """Let the first process do something while the others wait; an error is raised in all."""
    outcome: list[Any] = [None]
    if not dist.is_initialized():
        return action()
    if dist.get_rank() == 0:
        try:
            action()
        except (ValueError, OSError, RuntimeError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def _open(folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    """Start a run in the folder, or see that the one that is there may go on."""
    if not (folder / MANIFEST).exists():
        for format in FORMATS:
            if numbers := numbers_in(folder, format):
                raise FileExistsError(
                    f"{folder} has shards (such as {file_name(numbers[0], format)}) but no "
                    f"{MANIFEST}, which says what they are of; use another folder, or delete them"
                )
        write_manifest(folder, {**manifest, "run": uuid.uuid4().hex, **_UNFINISHED})
    else:
        shards = RadiusShards(folder)
        if not resume:
            raise FileExistsError(
                f"{folder} has {'all' if shards.complete else 'a part'} of the radii of a run; go "
                "on with resume=True, or use another folder"
            )
        if changes := _changes(shards.manifest, manifest):
            raise ValueError(
                f"cannot resume the run in {folder}: {', '.join(changes)}. Use the same, or "
                "another folder"
            )
    remove_leftovers(folder, MANIFEST, "radii-*")


def _mark_complete(shards: RadiusShards, batches: int) -> None:
    """Record that all batches of the loader are in the shards."""
    there, expected = shards.numbers(), -(-batches // shards.manifest["batches_per_shard"])
    if not set(range(expected)) <= set(there):
        raise RuntimeError(
            f"{shards.folder} has {len(there)} shards where {batches} batches make {expected}; "
            "did the processes have loaders of different lengths?"
        )
    if there[-1] >= expected:  # readers of the folder would take it as a part of the result
        raise ValueError(
            f"{shards.path(there[-1])} is not of this run, which has {expected} shards; delete it, "
            "and go on with resume=True"
        )
    done = {"complete": True, "batches_done": batches, "shards": expected}
    if shards.manifest != shards.manifest | done:
        write_manifest(shards.folder, shards.manifest | done)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the runs of two manifests, in words."""
    unlike = [name for name in new if new[name] != old.get(name)]
    words = {
        "model": "the model has other weights",
        "first_batch": "the loader's first batch has other inputs",
    }
    changes = [words[name] for name in unlike if name in words]
    pairs = [(name, old.get(name), new[name]) for name in unlike if name not in (*words, "options")]
    before, after = old.get("options", {}), new["options"]
    pairs += [(k, before.get(k), v) for k, v in after.items() if before.get(k) != v]
    return changes + [f"{name} was {was}, is {now}" for name, was, now in pairs]
