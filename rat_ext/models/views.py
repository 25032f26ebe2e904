"""A classifier averaged over views of its input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._common.user_model import Model, logits_of
from .._common.views import View, mirrored, name_of_view, view_named

__all__ = ["ViewAveraged", "mirrored"]


class ViewAveraged(nn.Module):
    """The mean of a classifier's softmax over x and views of x (test-time augmentation).

    A model like any other: it can be scored, gated, and searched for radii, which are then those of
    the averaged prediction. A row of it costs one row of the classifier for x and one for each
    view. Where a mirrored object is of the same class, as in most photographs, it makes fewer
    errors, and the AURC of its confidences is lower (docs/guide/score.md). Mirrored digits or text
    are something else.

    Args:
        model: from (N, ...) inputs to (N, classes) logits, or an object with ``.logits``.
        views: names, "mirrored" or "shift:DOWN:RIGHT" (in pixels), or functions from (N, ...)
            inputs to as many of the same kind; differentiable for radii.
    """

    def __init__(self, model: Model, views: Sequence[str | View] = ("mirrored",)) -> None:
        super().__init__()
        self.model = model
        self.views = tuple(view_named(each) if isinstance(each, str) else each for each in views)

    def get_extra_state(self) -> Tensor:
        """Which views they are, so that the state of an average over others is another."""
        names = "\n".join(map(_named, self.views))
        return torch.frombuffer(bytearray(names.encode()) or bytearray(1), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError if the state is of an average over other views."""
        if not torch.equal(state.cpu(), self.get_extra_state()):
            names = bytes(state.tolist()).decode().replace("\n", ", ")
            own = ", ".join(map(_named, self.views))
            raise ValueError(f"the state is of an average over the views {names}, not {own}")

    def forward(self, x: Tensor) -> Tensor:
        """(N, classes) logarithms of the mean probabilities, which serve as logits."""
        views = [x, *(view(x) for view in self.views)]
        logits = logits_of(self.model(torch.cat(views)), len(views) * len(x))
        # In half precision the probabilities of confident predictions would all round to 1.
        log_p = logits.log_softmax(1, torch.promote_types(logits.dtype, torch.float32))
        mean: Tensor = log_p.unflatten(0, (len(views), len(x))).logsumexp(0)
        return mean - math.log(len(views))


def _named(view: View) -> str:
    try:
        return name_of_view(view)
    except TypeError:
        return getattr(view, "__qualname__", type(view).__qualname__)
