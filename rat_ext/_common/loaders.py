"""What is in the batches of a user's loader: inputs and targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .user_model import Model


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The x and target of a batch; None if it has none.

    A batch is (x, target, ...), x alone, or a mapping with "pixel_values" and "labels", as the
    collators of Hugging Face's transformers give it.

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
) -> Iterator[tuple[Tensor, Tensor]]:
    """The (x, target) of each batch, on the device of the model; `what` names the progress bar.

    Raises:
        ValueError: a batch has no targets, or they are not (N,); there is no batch.
    """
    device = None
    if isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), None)
    empty = True
    for batch in tqdm(loader, desc=what, unit="batch", disable=not progress):
        x, target = (each.to(device) for each in labelled(batch))
        if target.shape != (len(x),):
            raise ValueError(
                f"targets have shape {tuple(target.shape)} for {len(x)} inputs; expected class "
                f"indices of shape ({len(x)},)"
            )
        empty = False
        yield x, target
    if empty:
        raise ValueError("the loader gave no batch")
