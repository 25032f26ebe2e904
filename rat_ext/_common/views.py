"""Views of an input: transformations that leave its class as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

View = Callable[[Tensor], Tensor]
"""From (N, ...) inputs to as many of the same kind; differentiable for radii."""


def mirrored(x: Tensor) -> Tensor:
    """(N, C, H, W) images with left and right exchanged."""
    return x.flip(-1)


@dataclass(frozen=True)
class Shifted:
    """(N, C, H, W) images moved by some pixels; the pixels of the edge fill what is laid bare."""

    down: int
    """May be negative: up."""
    right: int
    """May be negative: to the left."""

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        most = max(abs(self.down), abs(self.right))
        padded = F.pad(x, [most] * 4, mode="replicate")
        top, left = most - self.down, most - self.right
        return padded[..., top : top + height, left : left + width]


def view_named(name: str) -> View:
    """The view of a name: "mirrored", or "shift:DOWN:RIGHT" in pixels, such as "shift:0:-2".

    Raises:
        ValueError: there is no such view.
    """
    kind, *numbers = name.split(":")
    if name == "mirrored":
        return mirrored
    try:
        if kind == "shift":
            down, right = map(int, numbers)
            return Shifted(down, right)
    except ValueError:
        pass
    raise ValueError(
        f"no view is named {name!r}; there are 'mirrored' and 'shift:DOWN:RIGHT', such as "
        "'shift:0:-2'"
    )


def name_of_view(view: View) -> str:
    """What `view_named` makes the view of.

    Raises:
        TypeError: it has no name.
    """
    if isinstance(view, Shifted):
        return f"shift:{view.down}:{view.right}"
    if view is mirrored:
        return "mirrored"
    raise TypeError(f"the view {view!r} has no name; only those that are given by name can be kept")
