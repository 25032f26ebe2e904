"""The metrics of `rat_ext.metrics` as torchmetrics classes.

All take ``update(probabilities, target)``, so that one `MetricCollection` can hold them; those of a
confidence also take ``update(confidence, correct)``, for any other confidence than the largest
probability. They accumulate over batches and are synchronised across processes, so that
``compute()`` is the metric of all samples of all processes, not a mean of metrics. For that they
store two values a sample; `ECE`, `BrierScore` and `NLL` store all C probabilities (once, if they
are in one `MetricCollection`).

Needs torchmetrics (pip install torchmetrics), which nothing else in the package imports. Keyword
arguments that are not named here are those of `torchmetrics.Metric`.
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
    "AUGRC",
    "AURC",
    "AUROC",
    "EAURC",
    "ECE",
    "NLL",
    "AUPRError",
    "AUPRSuccess",
    "AccuracyAtCoverage",
    "BrierScore",
    "CoverageAtRisk",
    "FPRAtTPR",
    "RiskAtCoverage",
]


class _SampleMetric(Metric):
    """A function of all samples seen, which it stores."""

    full_state_update = False
    is_differentiable = False
    plot_lower_bound = 0.0
    plot_upper_bound: float | None = 1.0
    _function: Callable[..., Any]
    _states: tuple[str, str]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {}
        for state in self._states:
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def _store(self, *batch: Tensor) -> None:
        for state, values in zip(self._states, batch, strict=True):
            getattr(self, state).append(values.detach())

    def compute(self) -> Tensor:
        """The metric of everything seen: a scalar on the metric's device."""
        seen = (dim_zero_cat(getattr(self, state)) for state in self._states)
        return torch.tensor(type(self)._function(*seen, **self.options), device=self.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot values that ``compute`` or ``forward`` gave, by default that of everything seen.

        Args:
            val: a value, or a sequence of them, such as one for each epoch.
            ax: matplotlib axes to draw on; None: new ones.

        Returns:
            The figure (None if ``ax`` is given) and the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return self._plot(val, ax)


class _ConfidenceMetric(_SampleMetric):
    _states = "confidence", "correct"

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add a batch.

        Args:
            confidence: (N,) larger means more likely right; or (N, C) probabilities, of which the
                largest is the confidence and its class the prediction.
            correct: (N,) bool or 0/1; with probabilities the target classes.

        Raises:
            ValueError: another shape, or rows of probabilities that do not sum to 1.
        """
        if confidence.ndim == 2 and correct.shape == confidence.shape[:1]:
            if ((confidence.sum(1, dtype=torch.float32) - 1).abs() > 0.01).any():
                raise ValueError(
                    "each row of probabilities must sum to 1; for logits, pass logits.softmax(1)"
                )
            confidence, prediction = confidence.max(1)
            correct = prediction == correct
        if confidence.ndim != 1 or confidence.shape != correct.shape:
            raise ValueError(
                f"confidence has shape {tuple(confidence.shape)} and correct "
                f"{tuple(correct.shape)}; both must be (N,), or probabilities (N, C) and target "
                "classes (N,)"
            )
        self._store(confidence, correct)


class _CalibrationMetric(_SampleMetric):
    _states = "probabilities", "target"

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add a batch: (N, C) probabilities, whose rows sum to 1, and (N,) target classes."""
        if probabilities.ndim != 2 or target.shape != probabilities.shape[:1]:
            raise ValueError(
                f"probabilities has shape {tuple(probabilities.shape)} and target "
                f"{tuple(target.shape)}; expected (N, C) and (N,)"
            )
        self._store(probabilities, target)


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


class AUGRC(_ConfidenceMetric):
    """Area under the generalized risk-coverage curve: `rat_ext.metrics.augrc`."""

    higher_is_better = False
    _function = staticmethod(metrics.augrc)


class RiskAtCoverage(_ConfidenceMetric):
    """Error rate of the most confident share of the samples: `metrics.risk_at_coverage`."""

    higher_is_better = False
    _function = staticmethod(metrics.risk_at_coverage)

    def __init__(self, coverage: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"coverage": coverage}


class CoverageAtRisk(_ConfidenceMetric):
    """Largest coverage with at most this selective risk: `rat_ext.metrics.coverage_at_risk`."""

    higher_is_better = True
    _function = staticmethod(metrics.coverage_at_risk)

    def __init__(self, risk: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"risk": risk}


class ECE(_CalibrationMetric):
    """Expected calibration error: `rat_ext.metrics.ece`."""

    higher_is_better = False
    _function = staticmethod(metrics.ece)

    def __init__(self, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"n_bins": n_bins}


class BrierScore(_CalibrationMetric):
    """Squared distance to the one-hot target: `rat_ext.metrics.brier_score`."""

    higher_is_better = False
    plot_upper_bound = 2.0
    _function = staticmethod(metrics.brier_score)


class NLL(_CalibrationMetric):
    """Negative log-likelihood, in nats: `rat_ext.metrics.nll`."""

    higher_is_better = False
    plot_upper_bound = None
    _function = staticmethod(metrics.nll)
