"""Arguments of a model for each sample, such as attention masks, which follow their samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .user_model import Model


class PerSample(nn.Module):
    """A model for one batch: it is called with the arguments of the samples that it is given.

    Args:
        model: called as ``model(x, **arguments)``.
        arguments: tensors whose first dimension is `samples` have a row for each sample; everything
            else is the same for all.
        samples: how many there are.
    """

    def __init__(self, model: Model, arguments: Mapping[str, Any], samples: int) -> None:
        super().__init__()
        self.model, self.arguments, self.samples = model, arguments, samples

    def of(self, rows: slice | Tensor) -> PerSample:
        """The model for some of the samples, of which one may be there several times."""
        if isinstance(rows, slice):
            rows = torch.arange(self.samples)[rows]
        return PerSample(self.model, chosen(self.arguments, self.samples, rows), len(rows))

    def forward(self, x: Tensor) -> Any:
        if len(x) != self.samples:
            raise ValueError(
                f"the model was called with {len(x)} inputs, and has arguments for {self.samples} "
                "samples: which of them they are cannot be told. Some attacks of other libraries "
                "run the model on a part of the batch; give them one sample at a time"
            )
        model: Any = self.model
        return model(x, **self.arguments)


def chosen(arguments: Mapping[str, Any], samples: int, rows: Tensor) -> dict[str, Any]:
    """The arguments of some of the samples, whose indices are `rows`."""
    return {
        name: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples
        else value
        for name, value in arguments.items()
    }


def with_arguments(model: Model, x: Tensor, model_kwargs: Mapping[str, Any] | None) -> Model:
    """A model that takes x alone, for this batch: ``model(x, **model_kwargs)``.

    Whatever runs it, also on some of the rows of x as a search does, gives each row its own
    arguments: `rat_ext.scores` and `rat_ext.robust_radius` know it. A closure over the tensors of a
    batch would pair rows with the arguments of others. ::

        bound = rat_ext.with_arguments(model, x, {"attention_mask": mask})
        confidence = score.score(bound, x)

    Args:
        model: called as ``model(x, **model_kwargs)``; (N, C) logits, or an object with ``.logits``.
        x: (N, ...) inputs.
        model_kwargs: tensors whose first dimension is N have a row for each sample, and follow it;
            everything else is the same for all. None or empty: the model as it is.

    Raises:
        TypeError: model_kwargs is not a mapping.
        ValueError: a tensor in it is on another device than x.
    """
    if model_kwargs is None:
        return model
    if not isinstance(model_kwargs, Mapping):
        raise TypeError(
            f"model_kwargs is a {type(model_kwargs).__name__}; expected a mapping from names to "
            "arguments, such as {'attention_mask': mask}"
        )
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(
                f"{name} of model_kwargs is on {value.device} and x on {x.device}; move one of them"
            )
    return PerSample(model, model_kwargs, len(x)) if model_kwargs else model


def of_rows(model: Model, rows: slice | Tensor) -> Model:
    """The model for these rows of its batch; the model itself if it has no arguments for each."""
    return model.of(rows) if isinstance(model, PerSample) else model


def moved(model_kwargs: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The arguments with their tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in model_kwargs.items()
    }
