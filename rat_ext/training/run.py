"""Training with plain cross-entropy or with the RAT loss: one loop for both.

Plain torch: with DistributedDataParallel the loop is short, and Fabric or Accelerate would save a
dozen lines of it for one more dependency. Under torchrun every process calls `train` with the same
arguments, after ``torch.distributed.init_process_group``.
"""

from __future__ import annotations

import csv
import inspect
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from .._common.storage import write_whole
from .._common.user_model import logits_of
from ..datasets import batches
from .recipe import _AUGMENT, Recipe, _mixed


class Trained(NamedTuple):
    """What `train` returns."""

    model: nn.Module
    """The model that was given, with its final weights (the averaged ones with ``ema``)."""
    history: list[dict[str, float]]
    """For each epoch: epoch, lr, loss and accuracy (on what was trained on: mixed and augmented),
    and validation_accuracy."""


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    validation: Dataset | None = None,
    out: str | Path | None = None,
    workers: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
) -> Trained:
    """Train a classifier of pixels in [0, 1], in place, on the device that it is on.

    With ``out`` each epoch ends with a checkpoint, and a call with the same recipe goes on from the
    last one; the result is that of a run which was not interrupted, bit for bit where the device's
    kernels are deterministic. The global random state is left as it was.

    Args:
        model: from (N, C, H, W) pixels to (N, classes) logits, with its normalisation inside.
        data: gives (pixels, class) pairs, and has ``classes``, such as `datasets.Images`.
        recipe: how to train.
        validation: to report accuracy on, each epoch.
        out: folder for last.pt (the checkpoint) and history.csv.
        workers: processes that load data; for data sets that decode files.
        tensorboard: also log to ``out``/tensorboard.
        progress: show a tqdm bar on standard error.

    Raises:
        ValueError: ``out`` has a checkpoint of another recipe; the batch cannot be shared equally.
        FloatingPointError: the loss is not finite. The last checkpoint is kept.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if recipe.batch_size % world:
        raise ValueError(f"batch_size is {recipe.batch_size}; {world} processes cannot share it")
    if tensorboard and out is None:
        raise ValueError("tensorboard needs the folder out to log to")
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = _Run(model, data, recipe, device, rank, world)
        checkpoint = Path(out) / "last.pt" if out is not None else None
        if checkpoint is not None and checkpoint.exists():
            run.restore(checkpoint)
        writer = _tensorboard_writer(checkpoint.parent, run.epoch) if tensorboard else None
        with _bar(run, progress and rank == 0) as bar:
            while run.epoch < recipe.epochs:
                row = run.train_epoch(workers, bar)
                if validation is not None:
                    row["validation_accuracy"] = run.accuracy(validation, workers)
                run.history.append(row)
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "epoch"})
                if checkpoint is not None and rank == 0:
                    run.save(checkpoint)
                if writer is not None and rank == 0:
                    for name, value in row.items():
                        writer.add_scalar(name, value, int(row["epoch"]))
        if writer is not None:
            writer.close()
        if run.ema is not None:
            model.load_state_dict(run.ema.module.state_dict())
    return Trained(model.eval(), run.history)


class _Run:
    """The state of a training run: all that a checkpoint has to hold."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        recipe: Recipe,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.model, self.data, self.recipe, self.device = model, data, recipe, device
        self.rank, self.world = rank, world
        self.epoch, self.history = 0, []
        self.batch_size = min(recipe.batch_size, len(data) // world * world)
        self.batches_per_epoch = len(data) // self.batch_size
        self.parallel = model
        if world > 1:
            self.parallel = _parallel(model, device)
        settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "sgd":
            settings |= {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
        optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe.optimizer]
        self.optimizer = optimizer(model.parameters(), **settings)
        self.ema = None
        if recipe.ema:
            average = get_ema_multi_avg_fn(recipe.ema)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.criterion = recipe.criterion()

    def train_epoch(self, workers: int, bar: Any) -> dict[str, float]:
        """One epoch, whose random numbers depend on the recipe's seed and the epoch alone."""
        seed = self.recipe.seed * 1_000_003 + self.epoch
        own_seed = seed * 1009 + self.rank
        torch.manual_seed(own_seed)  # of dropout, mixup and the data set's transforms
        common = torch.Generator(self.device).manual_seed(seed)  # the same in all processes
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed))
        whole = order[: self.batches_per_epoch * self.batch_size].view(-1, self.batch_size)
        share = slice(self.rank, None, self.world)
        loader = batches(self.data, whole[:, share].tolist(), workers, self.device, own_seed)

        self.parallel.train()
        totals = torch.zeros(3, device=self.device)  # loss, right ones, samples
        for step, (x, t) in enumerate(loader):
            lr = self.learning_rate(self.epoch * self.batches_per_epoch + step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            x, t = x.to(self.device, non_blocking=True), t.to(self.device, non_blocking=True)
            x = _AUGMENT[self.recipe.augment](x, common, self.world, share)
            if self.recipe.mixup and self.epoch < self.recipe.epochs - self.recipe.mixup_off:
                x, t = _mixed(x, t, self.recipe.mixup, len(self.data.classes))
            self.optimizer.zero_grad()
            loss, logits = self._loss(x, t)
            loss.backward()
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            target = t if t.ndim == 1 else t.argmax(1)
            right = (logits.argmax(1) == target).sum()
            totals += torch.stack([loss.detach() * len(x), right, right.new_tensor(len(x))])
            bar.update()
        self._average_buffers()
        loss, right, samples = self._summed(totals)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} in epoch {self.epoch + 1}; lower lr (now {self.recipe.lr}) or "
                "use warmup"
            )
        self.epoch += 1
        return {"epoch": self.epoch, "lr": lr, "loss": loss / samples, "accuracy": right / samples}

    def _loss(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            if self.recipe.loss == "rat":
                output = self.criterion(self.parallel, x, t)
                return output.loss, output.logits
            logits = logits_of(self.parallel(x), len(x))
            return F.cross_entropy(logits.float(), t), logits.detach()

    def learning_rate(self, step: int) -> float:
        """Of the step with this number, from 0."""
        warmup = self.recipe.warmup * self.batches_per_epoch
        if step < warmup:
            return self.recipe.lr * (step + 1) / (warmup + 1)
        falling = self.recipe.epochs * self.batches_per_epoch - warmup
        return self.recipe.lr * (1 + math.cos(math.pi * (step - warmup) / falling)) / 2

    @torch.no_grad()
    def accuracy(self, data: Dataset, workers: int) -> float:
        """Of the model that would be returned now."""
        model = (self.model if self.ema is None else self.ema.module).eval()
        index = torch.arange(self.rank, len(data), self.world)
        loader = batches(data, [part.tolist() for part in index.split(512)], workers, self.device)
        totals = torch.zeros(2, device=self.device)
        for x, t in loader:
            right = logits_of(model(x.to(self.device)), len(x)).argmax(1) == t.to(self.device)
            totals += torch.stack([right.sum(), right.sum().new_tensor(len(x))])
        right, samples = self._summed(totals)
        return right / samples

    def _summed(self, totals: Tensor) -> list[float]:
        totals = totals.double()
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def _average_buffers(self) -> None:
        """Give all processes the same batch normalisation."""
        if self.world > 1:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        write_whole(path, lambda temporary: torch.save(state, temporary))
        write_whole(path.with_name("history.csv"), self._write_history)

    def _write_history(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.history[0].keys())
            writer.writeheader()
            writer.writerows(self.history)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        mine = asdict(self.recipe)
        if changed := [name for name in mine if mine[name] != state["recipe"].get(name)]:
            what = ", ".join(f"{n} was {state['recipe'].get(n)}, is {mine[n]}" for n in changed)
            raise ValueError(
                f"{path} is of another recipe ({what}); use the same, or another output folder"
            )
        self.epoch, self.history = state["epoch"], state["history"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def _parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    # Without sending buffers around in each forward: the RAT loss has two of them before it goes
    # backward, which must not find the buffers of the first overwritten.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **{name: False})


def _bar(run: _Run, shown: bool) -> Any:
    from tqdm.auto import tqdm

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
