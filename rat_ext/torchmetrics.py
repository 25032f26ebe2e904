"""The metrics of `rat_ext.metrics` as torchmetrics classes: ``update(confidence, correct)``.

They accumulate over batches and are synchronised across processes, so that ``compute()`` is the
metric of all samples of all processes, not a mean of metrics. Needs torchmetrics (pip install
torchmetrics), which nothing else in the package imports. Keyword arguments that are not named
here are those of `torchmetrics.Metric`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._common.extras import install

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise ImportError(f"rat_ext.torchmetrics needs torchmetrics: {install('metrics')}") from error

from . import metrics

__all__ = [
    "AURC",
    "AUROC",
    "EAURC",
    "AUPRError",
    "AUPRSuccess",
    "AccuracyAtCoverage",
    "FPRAtTPR",
]


class _ConfidenceMetric(Metric):
    """A function of the confidences and correctness of all samples seen, which it stores."""

    full_state_update = False
    is_differentiable = False
    confidence: list[Tensor]
    correct: list[Tensor]
    _function: Callable[..., Any]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {}
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add a batch: (N,) confidences and (N,) bool or 0/1."""
        if confidence.ndim != 1 or confidence.shape != correct.shape:
            raise ValueError(
                f"confidence has shape {tuple(confidence.shape)} and correct "
                f"{tuple(correct.shape)}; both must be (N,)"
            )
        self.confidence.append(confidence.detach())
        self.correct.append(correct.detach())

    def compute(self) -> Tensor:
        """The metric of everything seen: a scalar on the metric's device."""
        confidence, correct = dim_zero_cat(self.confidence), dim_zero_cat(self.correct)
        value = type(self)._function(confidence, correct, **self.options)
        return torch.tensor(value, device=self.device)


class AURC(_ConfidenceMetric):
    """Area under the risk-coverage curve: `rat_ext.metrics.aurc`."""

    higher_is_better = False
    _function = staticmethod(metrics.aurc)

    def __init__(self, variant: str = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"variant": variant}


class EAURC(_ConfidenceMetric):
    """Excess AURC: `rat_ext.metrics.e_aurc`."""

    higher_is_better = False
    _function = staticmethod(metrics.e_aurc)


class AUROC(_ConfidenceMetric):
    """Area under the ROC curve: `rat_ext.metrics.auroc`."""

    higher_is_better = True
    _function = staticmethod(metrics.auroc)


class AUPRSuccess(_ConfidenceMetric):
    """Average precision at detecting right predictions: `rat_ext.metrics.aupr_success`."""

    higher_is_better = True
    _function = staticmethod(metrics.aupr_success)


class AUPRError(_ConfidenceMetric):
    """Average precision at detecting wrong predictions: `rat_ext.metrics.aupr_error`."""

    higher_is_better = True
    _function = staticmethod(metrics.aupr_error)


class FPRAtTPR(_ConfidenceMetric):
    """False-positive rate at a true-positive rate: `rat_ext.metrics.fpr_at_tpr`."""

    higher_is_better = False
    _function = staticmethod(metrics.fpr_at_tpr)

    def __init__(self, tpr: float = 0.95, positive: str = "correct", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"tpr": tpr, "positive": positive}


class AccuracyAtCoverage(_ConfidenceMetric):
    """Accuracy of the most confident share of the samples: `metrics.accuracy_at_coverage`."""

    higher_is_better = True
    _function = staticmethod(metrics.accuracy_at_coverage)

    def __init__(self, coverage: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"coverage": coverage}
