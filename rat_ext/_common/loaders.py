"""The labelled batches of a user's loader, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .user_model import Model


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
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError("the loader must yield (x, target, ...): fitting needs the targets")
        x, target = batch[0].to(device), torch.as_tensor(batch[1]).to(device)
        if target.shape != (len(x),):
            raise ValueError(
                f"targets have shape {tuple(target.shape)} for {len(x)} inputs; expected class "
                f"indices of shape ({len(x)},)"
            )
        empty = False
        yield x, target
    if empty:
        raise ValueError("the loader gave no batch")
