"""Arguments of a model for each sample, such as attention masks, which follow their samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .user_model import Model


@dataclass(frozen=True)
class Arguments:
    """The arguments of a model for the samples of one batch.

    Which of them have a row for each sample is decided once, by the whole batch: a shared tensor
    may be as long as a part of it.
    """

    samples: int
    per_sample: dict[str, Tensor]
    shared: dict[str, Any]

    @classmethod
    def checked(cls, given: Any, samples: int) -> Arguments:
        """What a user gave for so many samples, without a graph.

        Raises:
            TypeError: not a mapping, or one with tensors in a list, tuple or mapping.
        """
        if not isinstance(given, Mapping):
            raise TypeError(
                f"model_kwargs is a {type(given).__name__}; expected a mapping from names to "
                "arguments, such as {'attention_mask': mask}"
            )
        per_sample, shared = {}, {}
        for name, value in given.items():
            if _holds_tensors(value):
                raise TypeError(
                    f"{name} of model_kwargs is a {type(value).__name__} of tensors, which would "
                    "not follow their samples; give each of them a name of its own, and let a "
                    "function around the model put them together"
                )
            if isinstance(value, Tensor) and value.ndim and len(value) == samples:
                per_sample[name] = value.detach()
            else:
                shared[name] = value
        return cls(samples, per_sample, shared)

    def of(self, rows: slice | Tensor) -> Arguments:
        """Those of some of the samples, of which one may be there several times."""
        with torch.inference_mode(False):  # what is made in it cannot enter a graph
            part = {
                name: value[rows.to(value.device) if isinstance(rows, Tensor) else rows]
                for name, value in self.per_sample.items()
            }
        count = len(rows) if isinstance(rows, Tensor) else len(range(self.samples)[rows])
        return Arguments(count, part, self.shared)

    def to(self, device: torch.device) -> Arguments:
        """These, with their tensors on a device."""
        with torch.inference_mode(False):
            per_sample = {name: value.to(device) for name, value in self.per_sample.items()}
            shared = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.shared.items()
            }
        return Arguments(self.samples, per_sample, shared)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, list | tuple) and any(
        isinstance(each, Tensor) or _holds_tensors(each) for each in value
    )


class PerSample(nn.Module):
    """A model for one batch: it is called with the arguments of the samples that it is given.

    Args:
        model: called as ``model(x, **arguments)``.
        arguments: of the batch.
    """

    def __init__(self, model: Model, arguments: Arguments) -> None:
        super().__init__()
        self.training = False  # it has no mode of its own, which would have to be put back
        self.model, self.arguments = model, arguments

    def of(self, rows: slice | Tensor) -> PerSample:
        """The model for some of the samples, of which one may be there several times."""
        return PerSample(self.model, self.arguments.of(rows))

    def forward(self, x: Tensor) -> Any:
        self.check(x)
        model: Any = self.model
        return model(x, **self.arguments.shared, **self.arguments.per_sample)

    def check(self, x: Tensor) -> None:
        """Raise if these cannot be the inputs of the batch."""
        if len(x) != self.arguments.samples:
            raise ValueError(
                f"the model was called with {len(x)} inputs, and has arguments for "
                f"{self.arguments.samples} samples: which of them they are cannot be told. Some "
                "attacks of other libraries run the model on a part of the batch; give them one "
                "sample at a time"
            )


def with_arguments(
    model: Model, x: Tensor, model_kwargs: Mapping[str, Any] | Arguments | None
) -> Model:
    """A model that takes x alone, for this batch: ``model(x, **model_kwargs)``.

    Whatever runs it, also on some of the rows of x as a search does, gives each row its own
    arguments: `rat_ext.scores` and `rat_ext.robust_radius` know it. A closure over the tensors of a
    batch would pair rows with the arguments of others. ::

        bound = rat_ext.with_arguments(model, x, {"attention_mask": mask})
        confidence = score.score(bound, x)

    Args:
        model: called as ``model(x, **model_kwargs)``; (N, C) logits, or an object with ``.logits``.
        x: (N, ...) inputs. What comes back is for these alone.
        model_kwargs: tensors whose first dimension is N have a row for each sample, and follow it;
            everything else is the same for all. So a tensor for all samples must not be N long by
            chance: give it a first dimension of 1, or make it a part of the model. No gradient goes
            to the arguments. None or empty: the model as it is.

    Raises:
        TypeError: model_kwargs is not a mapping, or has tensors in a list, tuple or mapping.
        ValueError: a tensor in it is on another device than x; the model is bound to another batch.
    """
    if isinstance(model, PerSample):
        model.check(x)
    if model_kwargs is None:
        return model
    arguments = model_kwargs
    if not isinstance(arguments, Arguments):
        arguments = Arguments.checked(arguments, len(x))
    for name, value in (*arguments.per_sample.items(), *arguments.shared.items()):
        if isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(
                f"{name} of model_kwargs is on {value.device} and x on {x.device}; move one of them"
            )
    if not arguments.per_sample and not arguments.shared:
        return model
    with torch.inference_mode(False):  # a tensor made in it cannot enter a graph
        normal = {
            name: value.clone() if value.is_inference() else value
            for name, value in arguments.per_sample.items()
        }
    return PerSample(model, Arguments(len(x), normal, arguments.shared))


def of_rows(model: Model, rows: slice | Tensor) -> Model:
    """The model for these rows of its batch; the model itself if it has no arguments for each."""
    return model.of(rows) if isinstance(model, PerSample) else model
