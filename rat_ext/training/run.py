"""The state of a training run: its epochs, its checkpoint, and going on from one."""

from __future__ import annotations

import csv
import inspect
import math
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm.auto import tqdm

from .._common.user_model import at_least_float32, logits_of
from ..datasets import Labelled, batches, preprocessing_of
from . import checkpoint, identity
from .augmentation import AUGMENTATIONS, Mixup, smoothed
from .crl import CorrectnessHistory, correctness_ranking
from .logit_norm import LogitNormalized
from .recipe import Recipe
from .sam import at_worst_weights


class Run:
    """The state of a training run: all that a checkpoint has to hold."""

    def __init__(
        self,
        model: nn.Module,
        data: Labelled,
        recipe: Recipe,
        device: torch.device,
        rank: int,
        world: int,
        name: str | None = None,
    ) -> None:
        self.model, self.data, self.recipe, self.device = model, data, recipe, device
        self.rank, self.world, self.name = rank, world, name
        if len(data) < world:
            raise ValueError(f"{len(data)} samples cannot be shared by {world} process(es)")
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.batch_size = min(recipe.batch_size, len(data) // world * world)
        self.batches_per_epoch = len(data) // self.batch_size
        self.parallel = _parallel(model, device) if world > 1 else model
        settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "sgd":
            settings |= {
                "momentum": recipe.momentum,
                "nesterov": recipe.nesterov and recipe.momentum > 0,
            }
        optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe.optimizer]
        self.optimizer = optimizer(model.parameters(), **settings)
        self.average = None
        """Of the weights, with ema or swa."""
        if recipe.ema:
            decayed = get_ema_multi_avg_fn(recipe.ema)
            self.average = AveragedModel(model, multi_avg_fn=decayed, use_buffers=True)
        elif recipe.swa:
            self.average = AveragedModel(model)
        self.correctness = CorrectnessHistory(len(data)) if recipe.crl else None
        self.criterion = recipe.criterion()
        if recipe.logit_norm:
            self.parallel = LogitNormalized(self.parallel, recipe.logit_norm)

    def train_epoch(self, workers: int, bar: tqdm[Any]) -> dict[str, float]:
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
            x = AUGMENTATIONS[self.recipe.augment](x, common, self.world, share)
            mix = None
            if self.recipe.mixup and self.epoch < self.recipe.epochs - self.recipe.mixup_off:
                mix = Mixup.drawn(x, self.recipe.mixup)
                if self.recipe.loss == "ce" or self.recipe.rat_on == "mixed":
                    x, t, mix = mix.images(x), mix.targets(t, len(self.data.classes)), None
            self.optimizer.zero_grad()
            index = whole[step, share]
            loss, logits = self._loss(x, t, index, mix)
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on the model's parameters through autograd, so there "
                    "is nothing to train. Is the model's forward under no_grad, or does it detach?"
                )
            loss.backward()
            if self.recipe.sam:
                with at_worst_weights(self.model, self.recipe.sam):
                    self.optimizer.zero_grad()
                    self._loss(x, t, index, mix)[0].backward()
            self.optimizer.step()
            if self.recipe.ema and self.average is not None:
                self.average.update_parameters(self.model)
            right = logits.argmax(1) == (t if t.ndim == 1 else t.argmax(1))
            if self.correctness is not None:
                self.correctness.see(index, right)
            right = right.sum()
            totals += torch.stack([loss.detach() * len(x), right, right.new_tensor(len(x))])
            bar.update()
        self._average_buffers(self.model)
        total, correct, samples = self._summed(totals)
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total} in epoch {self.epoch + 1}; lower lr (now {self.recipe.lr}) "
                "or use warmup"
            )
        if self.correctness is not None:
            self.correctness.add(self._added(self.correctness.end_epoch()))
        if self.average is not None and self.epoch >= self.recipe.epochs - self.recipe.swa:
            self.average.update_parameters(self.model)
            self._renew_statistics(workers)
        self.epoch += 1
        row = {"loss": total / samples, "accuracy": correct / samples}
        return {"epoch": self.epoch, "lr": lr, **row}

    def _loss(
        self, x: Tensor, t: Tensor, index: Tensor, mix: Mixup | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch, samples ``index`` of the data, and its detached logits."""
        classes, mixed = len(self.data.classes), None
        if mix is not None:
            mixed = (
                mix.images,
                smoothed(mix.targets(t, classes), self.recipe.label_smoothing, classes),
            )
        if self.recipe.label_smoothing:
            t = smoothed(t, self.recipe.label_smoothing, classes)
        ranking = None
        if self.correctness is not None:
            shares = self.correctness.shares(index).to(self.device)

            def ranking(logits: Tensor) -> Tensor:
                return self.recipe.crl * correctness_ranking(logits, shares)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            if self.recipe.loss == "rat":
                output = self.criterion(self.parallel, x, t, extra=ranking, mix=mixed)
                return output.loss, output.logits
            logits = logits_of(self.parallel(x), len(x))
            loss = F.cross_entropy(at_least_float32(logits), t)
            return loss if ranking is None else loss + ranking(logits), logits.detach()

    def learning_rate(self, step: int) -> float:
        """Of the step with this number, from 0."""
        warmup = self.recipe.warmup * self.batches_per_epoch
        if step < warmup:
            return self.recipe.lr * (step + 1) / (warmup + 1)
        falling = (self.recipe.epochs - self.recipe.swa) * self.batches_per_epoch - warmup
        least = self.recipe.swa_lr if self.recipe.swa else 0.0
        if step >= warmup + falling:
            return least
        share = (1 + math.cos(math.pi * (step - warmup) / falling)) / 2
        return least + (self.recipe.lr - least) * share

    @property
    def result(self) -> nn.Module:
        """The model that would be returned now: the average, as soon as there is one."""
        if self.average is None or not self.average.n_averaged:
            return self.model
        module: nn.Module = self.average.module
        return module

    def _renew_statistics(self, workers: int) -> None:
        """Give averaged weights their own statistics of batch normalisation.

        Of augmented images, which the weights were trained on: a black margin alone moves the first
        layer's mean by more than the weights do.
        """
        assert self.average is not None
        share = slice(self.rank, None, self.world)
        parts = torch.arange(len(self.data))[share].split(self.batch_size)
        loader = batches(self.data, [part.tolist() for part in parts], workers, self.device)
        common = torch.Generator(self.device).manual_seed(self.recipe.seed)
        augment = AUGMENTATIONS[self.recipe.augment]
        images = (augment(x.to(self.device), common, self.world, share) for x, _ in loader)
        update_bn(images, self.average, self.device)
        self._average_buffers(self.average)

    @torch.no_grad()
    def accuracy(self, data: Labelled, workers: int) -> float:
        """Of the model that would be returned now."""
        model = self.result.eval()
        index = torch.arange(self.rank, len(data), self.world)
        loader = batches(
            data, [part.tolist() for part in torch.split(index, 512)], workers, self.device
        )
        totals = torch.zeros(2, device=self.device)
        for x, t in loader:
            right = logits_of(model(x.to(self.device)), len(x)).argmax(1) == t.to(self.device)
            totals += torch.stack([right.sum(), right.sum().new_tensor(len(x))])
        correct, samples = self._summed(totals)
        return correct / samples

    def _summed(self, totals: Tensor) -> list[float]:
        """Over all processes."""
        return [float(total) for total in self._added(totals.double())]

    def _added(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def _average_buffers(self, model: nn.Module) -> None:
        """Give all processes the same batch normalisation."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells this run from others, but for the model's shapes."""
        preprocessing = preprocessing_of(self.data)
        return {
            "recipe": asdict(self.recipe),
            "name": self.name,
            "classes": list(map(str, self.data.classes)),
            "preprocessing": preprocessing.to_dict() if preprocessing else None,
            "data": identity.of_data(self.data),
        }

    def save(self, path: Path) -> None:
        """Write the checkpoint, and the history beside it.

        Raises:
            OSError: they cannot be written. The last checkpoint is kept.
        """
        average = self.average
        state = {
            **self.identity,
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            # None before the first average: then the model itself is what there is.
            "ema": average.state_dict() if average is not None and average.n_averaged else None,
            "correctness": None if self.correctness is None else self.correctness.counts,
        }
        checkpoint.write_tensors(path, state)
        checkpoint.write(path.with_name("history.csv"), self._write_history)

    def _write_history(self, path: Path) -> None:
        # Of all epochs: the first ones may have been without a validation.
        columns = dict.fromkeys(name for row in self.history for name in row)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.history)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is damaged, or of another recipe, preprocessing, data set or model.
            OSError: it cannot be read.
        """
        state = checkpoint.read(path)
        identity.check(path, state, {**self.identity, "model": self.model.state_dict()})
        try:
            self.epoch, self.history = int(state["epoch"]), list(state["history"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None and state["ema"] is not None:
                self.average.load_state_dict(state["ema"])
            if self.correctness is not None:
                self.correctness.counts = state["correctness"]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.damaged(path, error) from error


def _parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    # Without sending buffers around in each forward: the RAT loss has two of them before it goes
    # backward, which must not find the buffers of the first overwritten.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **options)
