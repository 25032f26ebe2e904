"""Robust radii of PyTorch classifiers, and misclassification detection with them.

`robust_radius(model, x)` measures how far each input is from the decision boundary;
`rat_ext.reference` is the same in plain PyTorch. The method is that of Yan and Weng, "RAT: Boosting
Misclassification Detection Ability without Extra Data" (arXiv 2503.14783).
"""

from . import attacks, metrics, radius_scores, reference, scores
from ._build_info import BuildInfo, build_info
from ._common.loaders import map_batches
from ._common.per_sample import with_arguments
from ._core import __version__
from .detector import Decision, Detector
from .radius import (
    LoaderRadii,
    RadiusEstimator,
    RadiusResult,
    RadiusShards,
    SearchReport,
    robust_accuracy,
    robust_radii,
    robust_radius,
    temperature_sweep,
)
from .scores import Cascade
from .training import RATLoss, RATLossOutput

__all__ = [
    "BuildInfo",
    "Cascade",
    "Decision",
    "Detector",
    "LoaderRadii",
    "RATLoss",
    "RATLossOutput",
    "RadiusEstimator",
    "RadiusResult",
    "RadiusShards",
    "SearchReport",
    "__version__",
    "attacks",
    "build_info",
    "map_batches",
    "metrics",
    "radius_scores",
    "reference",
    "robust_accuracy",
    "robust_radii",
    "robust_radius",
    "scores",
    "temperature_sweep",
    "with_arguments",
]
