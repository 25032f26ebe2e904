"""Whether the scores that are probabilities say how often a prediction is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import metrics, models, scores
from .evaluate import Evaluation
from .verdict import BASELINE


def reliabilities(evaluation: Evaluation) -> dict[str, metrics.Reliability]:
    """By name, on the images that the first split tests on.

    They are the softmax, the softmax after temperature scaling on the rest of the images, if there
    is any, and the evaluated scores that are probabilities. Those that are not finite are left out.
    """
    test, softmax = evaluation.tests[0], scores.MSR()
    logits, target = evaluation.logits, evaluation.target
    held_out = torch.ones(len(target), dtype=torch.bool)
    held_out[test] = False
    held_out &= (target >= 0) & logits.isfinite().all(1)  # outliers have no class

    confidences = {BASELINE: softmax.score_logits(logits)}
    if held_out.any():
        scaling = models.TemperatureScaling(nn.Identity())
        scaling.fit([(logits[held_out], target[held_out])], progress=False)
        name = f"{BASELINE} after temperature scaling (T={scaling.temperature:.3g})"
        confidences[name] = softmax.score_logits(scaling.scaled(logits))
    confidences |= {
        result.name: result.confidences[0]
        for result in evaluation.results
        if scores.kind_of(result.name).is_probability
    }

    def reliability(confidence: Tensor) -> metrics.Reliability | None:
        known = test[confidence[test].isfinite()]
        return (
            metrics.reliability(confidence[known], evaluation.correct[known])
            if len(known)
            else None
        )

    found = {name: reliability(own) for name, own in confidences.items()}
    return {name: diagram for name, diagram in found.items() if diagram is not None}
