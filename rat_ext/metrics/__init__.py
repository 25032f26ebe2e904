"""How well a confidence tells right predictions from wrong ones, and how honest probabilities are.

Risk-coverage and ROC metrics are ``f(confidence, correct)`` on torch tensors or numpy arrays of
shape (N,): a larger confidence means a prediction more likely to be right, and ``correct`` tells
(bool or 0/1) which ones are. Only the order of the confidences counts, so infinite ones are
allowed. Calibration metrics are ``f(probabilities, target)``, of shapes (N, C) and (N,). Results
are fractions, not percent; nan in the input is an error; the order of the samples never counts.

Every metric also takes ``n_boot=0``, ``level=0.95`` and ``seed=0``, by keyword. With ``n_boot > 0``
it returns an `Estimate`: its value, and the percentile bootstrap interval of confidence ``level``
over that many resamples of the N samples. The same ``seed`` gives every metric the same resamples.
`differences` compares confidences on the same samples.

`rat_ext.torchmetrics` has the same metrics as classes that accumulate over batches and processes.
"""

from .bootstrap import Estimate
from .calibration import Reliability, brier_score, ece, nll, reliability
from .paired import differences
from .ranking import (
    RiskCoverage,
    accuracy_at_coverage,
    augrc,
    aupr_error,
    aupr_success,
    aurc,
    auroc,
    coverage_at_risk,
    e_aurc,
    fpr_at_tpr,
    risk_at_coverage,
    risk_coverage_curve,
    summary,
)

__all__ = [
    "Estimate",
    "Reliability",
    "RiskCoverage",
    "accuracy_at_coverage",
    "augrc",
    "aupr_error",
    "aupr_success",
    "aurc",
    "auroc",
    "brier_score",
    "coverage_at_risk",
    "differences",
    "e_aurc",
    "ece",
    "fpr_at_tpr",
    "nll",
    "reliability",
    "risk_at_coverage",
    "risk_coverage_curve",
    "summary",
]
