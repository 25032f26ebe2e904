"""The confidence in a prediction by how probable its class is in other views of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common.per_sample import of_rows
from .._common.user_model import Model, left_alone, logits_of, wide
from .._common.views import View, name_of_view, view_named
from .base import Score, no_prediction
from .registry import register


@register("msr-views")
class MSRViews(Score):
    """The mean probability of the predicted class over x and views of x.

    Test-time augmentation as a confidence (Bahat and Shakhnarovich, arXiv 2006.16705). The
    prediction is that for x itself, and stays as it is; `rat_ext.models.ViewAveraged` predicts by
    the average instead. For images, and for views that do not change the class.

    Args:
        views: names, "mirrored" or "shift:DOWN:RIGHT" (in pixels), or functions from (N, ...)
            inputs to as many of the same kind. Each costs a forward row. A score with functions
            cannot be saved.
    """

    is_probability = True
    listed = False

    def __init__(self, views: Sequence[str | View] = ("mirrored",)) -> None:
        self.views = tuple(view_named(each) if isinstance(each, str) else each for each in views)
        self.forward_rows = 1.0 + len(self.views)

    def state(self) -> dict[str, Any]:
        return {"views": [name_of_view(view) for view in self.views]}

    def score(self, model: Model, x: Tensor) -> Tensor:
        return self.score_and_predict(model, x)[0]

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_empty(0), no_prediction(x)
        with left_alone(model, x):
            views = [x, *(view(x) for view in self.views)]
            run = of_rows(model, torch.arange(len(x)).repeat(len(views)))
            logits = logits_of(run(torch.cat(views)), len(views) * len(x))
        prediction = logits[: len(x)].argmax(1)
        log_p = wide(logits).log_softmax(1).unflatten(0, (len(views), len(x)))
        column = prediction.expand(len(views), -1).unsqueeze(2)
        own = log_p.gather(2, column).squeeze(2).logsumexp(0)
        others = log_p.scatter(2, column, -math.inf).flatten(0, 1).logsumexp(1)
        # From the log-odds, as `MSR`: near 1 the probability itself has fewer digits.
        return (own - others.view(len(views), -1).logsumexp(0)).sigmoid(), prediction
