"""Radii of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .._common.user_model import Model
from ..search.options import SearchOptions, shows_options
from ..search.result import LoaderRadii
from .shard_run import batch_radii, write_radii
from .shards import RadiusShards

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def robust_radii(
    model: Model,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = ...,
    progress: bool = ...,
    batch_fn: Callable[[Any], Any] | None = ...,
    out: None = ...,
    **options: Unpack[SearchOptions],
) -> LoaderRadii: ...
@overload
def robust_radii(
    model: Model,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = ...,
    progress: bool = ...,
    batch_fn: Callable[[Any], Any] | None = ...,
    out: str | Path,
    resume: bool = ...,
    batches_per_shard: int = ...,
    format: str = ...,
    **options: Unpack[SearchOptions],
) -> RadiusShards: ...
@shows_options()
def robust_radii(
    model: Model,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    batch_fn: Callable[[Any], Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    batches_per_shard: int = 16,
    format: str = "npz",
    **options: Unpack[SearchOptions],
) -> LoaderRadii | RadiusShards:
    """Radii of every batch of a DataLoader, with a progress bar.

    Takes the options of `robust_radius`, too (all but ``full``).

    With ``out`` the results go to files in that folder, one for every ``batches_per_shard`` batches
    (a shard), and memory does not grow with the data. A run that was killed goes on with
    ``resume=True``: finished shards are kept, the one in work is done again. So are those that are
    missing or damaged, also when the run had come to its end. Batches of a DataLoader over a
    map-style data set that are done already are not loaded; those of other iterables are read and
    passed over. The loader must give the same batches each time.

    Under torchrun, after ``torch.distributed.init_process_group``, every process makes the same
    call with the same loader (without a DistributedSampler), and shard i is computed by process
    i mod (number of processes). A run may be resumed with another number of processes.

    Args:
        model: as in `robust_radius`. Resuming with other weights is refused; those of a callable
            that is not a module cannot be compared.
        loader: yields (x, target, ...), x alone, or mappings with "pixel_values" and, if there are
            targets, "labels", as with Hugging Face's transformers. A mapping in the third place is
            the model_kwargs of `robust_radius` for these samples.
        device: where to move the inputs; default the device of the model's first parameter.
        progress: show a tqdm bar on standard error.
        batch_fn: for a loader that yields something else: makes one of these from a batch.
        out: folder to write to; one run in each. Default: the results are kept in memory.
        resume: go on with the run in ``out``, if there is one.
        batches_per_shard: how many batches a kill can cost at most, in each process.
        format: of the files: "npz", or "parquet" (needs pyarrow).

    Returns:
        Radii, predictions and targets, (N,) tensors on the CPU; target is None if the loader has
        none. With ``out`` a `RadiusShards`, whose ``load()`` returns them.

    Raises:
        ValueError: the loader is empty; with ``out``, it shuffles, or the run in the folder is of
            another model, other data or other options.
        FileExistsError: there is a run in ``out``, and ``resume`` is False; or there are shards
            of a run whose ``_run.json`` is gone.
        BlockingIOError: another run is writing to ``out``.
        ImportError: the format needs pyarrow.
    """
    if isinstance(options.get("target"), Tensor):
        raise ValueError(
            "target is a tensor, which is of one batch; robust_radii takes 'runner-up'. Call "
            "rat_ext.robust_radius for each batch"
        )
    if device is None and isinstance(model, torch.nn.Module):
        device = next((p.device for p in model.parameters()), None)
    if out is not None:
        return write_radii(
            model,
            loader,
            out,
            resume=resume,
            batches_per_shard=batches_per_shard,
            format=format,
            device=device,
            progress=progress,
            batch_fn=batch_fn,
            options=options,
        )
    if resume:
        raise ValueError("resume=True needs the folder out of the run to go on with")
    from tqdm.auto import tqdm

    radii: list[Tensor] = []
    predictions: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in tqdm(loader, desc="robust radius", unit="batch", disable=not progress):
        batch = batch_fn(batch) if batch_fn else batch
        result, target = batch_radii(model, batch, device, options)
        radii.append(result.radius.cpu())
        predictions.append(result.prediction.cpu())
        if target is not None:
            targets.append(target)
    if not radii:
        raise ValueError("the loader gave no batch")
    return LoaderRadii(
        torch.cat(radii), torch.cat(predictions), torch.cat(targets) if targets else None
    )
