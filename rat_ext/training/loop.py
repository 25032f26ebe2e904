"""Training with plain cross-entropy or with the RAT loss: one loop for both.

Plain torch: with DistributedDataParallel the loop is short, and Fabric or Accelerate would save a
dozen lines of it for one more dependency. Under torchrun every process calls `train` with the same
arguments, after ``torch.distributed.init_process_group``.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from .._common.storage import locked, remove_leftovers
from ..datasets import Labelled
from .recipe import Recipe
from .run import Run


class Trained(NamedTuple):
    """What `train` returns."""

    model: nn.Module
    """The model that was given, with its final weights (averaged with ``ema`` or ``swa``)."""
    history: list[dict[str, float]]
    """For each epoch: epoch, lr, loss and accuracy (on what was trained on: mixed and augmented),
    and validation_accuracy."""


def train(
    model: nn.Module,
    data: Labelled,
    recipe: Recipe,
    *,
    validation: Labelled | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    workers: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
) -> Trained:
    """Train a classifier of pixels in [0, 1], in place, on the device that it is on.

    With ``out`` each epoch ends with a checkpoint, and a call with the same recipe, data and model
    goes on from the last one; the result is that of a run which was not interrupted, bit for bit
    where the device's kernels are deterministic. `models.load_weights` reads from the checkpoint
    what would be returned then. The global random state is left as it was.

    Args:
        model: from (N, C, H, W) pixels to (N, classes) logits, with its normalisation inside.
        data: gives (pixels, class) pairs, and has ``classes``, such as `datasets.Images`. The
            checkpoint holds what its images go through (`datasets.preprocessing_of`).
        recipe: how to train.
        validation: to report accuracy on, each epoch.
        out: folder for last.pt (the checkpoint) and history.csv.
        name: of the model, as for `models.create`; the checkpoint then holds it, so that the
            command line needs no ``--model`` with it.
        workers: processes that load data; for data sets that decode files.
        tensorboard: also log to ``out``/tensorboard.
        progress: show a tqdm bar on standard error.

    Raises:
        TypeError: the model is not an nn.Module.
        ValueError: ``out`` has a checkpoint that is damaged, or of another recipe, preprocessing,
            data set or model; the model has nothing to train, a data set no samples; the batch
            cannot be shared equally.
        FloatingPointError: the loss is not finite. The last checkpoint is kept.
        OSError: a checkpoint cannot be written, and the last one is kept; or another run is writing
            to ``out``.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if recipe.batch_size % world:
        raise ValueError(f"batch_size is {recipe.batch_size}; {world} processes cannot share it")
    if tensorboard and out is None:
        raise ValueError("tensorboard needs the folder out to log to")
    if not len(data) or (validation is not None and not len(validation)):
        raise ValueError(f"the {'validation ' if len(data) else ''}data has no samples")
    device = _device_of(model)
    writes = out is not None and rank == 0
    lock = locked(Path(out), "training") if out is not None and writes else nullcontext()
    with lock, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = Run(model, data, recipe, device, rank, world, name)
        checkpoint = writer = None
        if out is not None:
            checkpoint = Path(out) / "last.pt"
            if writes:
                remove_leftovers(Path(out), "last.pt", "history.csv", "model.pt")
            if checkpoint.exists():
                run.restore(checkpoint)
            if tensorboard:
                writer = _tensorboard_writer(Path(out), run.epoch)
        with _bar(run, progress and rank == 0) as bar:
            while run.epoch < recipe.epochs:
                row = run.train_epoch(workers, bar)
                if validation is not None:
                    row["validation_accuracy"] = run.accuracy(validation, workers)
                run.history.append(row)
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "epoch"})
                if checkpoint is not None and writes:
                    run.save(checkpoint)
                if writer is not None and rank == 0:
                    for name, value in row.items():
                        writer.add_scalar(name, value, int(row["epoch"]))
        if writer is not None:
            writer.close()
        if run.result is not model:
            model.load_state_dict(run.result.state_dict())
    return Trained(model.eval(), run.history)


def _device_of(model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; only an nn.Module can be trained")
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    if trained is None:
        raise ValueError(
            "the model has no parameters that require a gradient, so there is nothing to train. Is "
            "it frozen? Give model.requires_grad_(), or the model before torch.jit.freeze"
        )
    return trained.device


def _bar(run: Run, shown: bool) -> tqdm[Any]:
    return tqdm(
        desc=f"train ({run.recipe.loss})",
        unit="batch",
        initial=run.epoch * run.batches_per_epoch,
        total=run.recipe.epochs * run.batches_per_epoch,
        disable=not shown,
    )


def _tensorboard_writer(out: Path, epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("the logs need TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=epoch + 1)
