"""What is in the batches of a user's loader: inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .per_sample import Arguments, with_arguments
from .user_model import Model


def map_batches(loader: Iterable[Any], batch_fn: Callable[[Any], Any]) -> MappedBatches:
    """A loader whose batches are made from those of another, each time it is gone through.

    For loaders that yield something else than (x, target), (x, target, model_kwargs) or a mapping
    with "pixel_values" and "labels". ::

        loader = rat_ext.map_batches(loader, lambda b: (b["embeddings"], b["label"]))
    """
    return MappedBatches(loader, batch_fn)


class MappedBatches:
    """What `map_batches` returns."""

    def __init__(self, loader: Iterable[Any], batch_fn: Callable[[Any], Any]) -> None:
        self.loader, self.batch_fn = loader, batch_fn
        self.sampler = getattr(loader, "sampler", None)  # tells whether it shuffles

    def __len__(self) -> int:
        return len(cast(Sized, self.loader))

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch_fn, self.loader)


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The x and target of a batch; None if it has none.

    A batch is (x, target, ...), x alone, or a mapping with "pixel_values" and "labels", as the
    collators of Hugging Face's transformers give it. The arguments of the model for these samples
    may stand in third place: see `arguments_of`.

    Raises:
        ValueError: a mapping without "pixel_values".
        TypeError: x is not a tensor.
    """
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise ValueError(
                f"the loader yields mappings with the keys {', '.join(map(repr, batch))}; expected "
                "'pixel_values', and 'labels' for targets. Let the loader's collate_fn make such a "
                "mapping, or (x, target)"
            )
        x, target = batch["pixel_values"], batch.get("labels")
    else:
        x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        target = rest[0] if rest else None
    if not isinstance(x, Tensor):
        raise TypeError(f"the loader's inputs are a {type(x).__name__}; expected a torch.Tensor")
    return x, None if target is None else torch.as_tensor(target)


def arguments_of(batch: Any) -> Arguments | None:
    """The model_kwargs of a batch: the mapping in its third place; None if it has none."""
    third = batch[2] if isinstance(batch, tuple | list) and len(batch) > 2 else None
    if isinstance(third, Mapping):
        return Arguments.checked(third, len(batch[0]))
    return third if isinstance(third, Arguments) else None


def labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """The x and target of a batch, which must have both."""
    x, target = inputs_and_targets(batch)
    if target is None:
        raise ValueError(
            "the loader must yield (x, target, ...), or mappings with 'pixel_values' and 'labels': "
            "fitting needs the targets"
        )
    return x, target


def labelled_batches(
    model: Model, loader: Iterable[Any], progress: bool, what: str
) -> Iterator[tuple[Model, Tensor, Tensor]]:
    """The (model, x, target) of each batch, on the model's device; `what` names the progress bar.

    The model has the arguments of the batch's samples, where the batch has such.

    Raises:
        ValueError: a batch has no targets, or they are not (N,); there is no batch.
    """
    device = None
    if isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), None)
    empty = True
    for batch in tqdm(loader, desc=what, unit="batch", disable=not progress):
        x, target = (each.to(device) for each in labelled(batch))
        arguments = arguments_of(batch)
        if target.shape != (len(x),):
            raise ValueError(
                f"targets have shape {tuple(target.shape)} for {len(x)} inputs; expected class "
                f"indices of shape ({len(x)},)"
            )
        empty = False
        if arguments is not None:
            yield with_arguments(model, x, arguments.to(x.device)), x, target
        else:
            yield model, x, target
    if empty:
        raise ValueError("the loader gave no batch")
