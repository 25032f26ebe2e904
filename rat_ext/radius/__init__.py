"""Robust radii: of a batch, of a whole loader, on disk, and for a stream of batches."""

from ..search.result import LoaderRadii, RadiusResult, SearchReport
from .estimator import RadiusEstimator
from .over_loader import robust_radii
from .robust_accuracy import robust_accuracy
from .robust_radius import robust_radius, temperature_sweep
from .shards import RadiusShards

__all__ = [
    "LoaderRadii",
    "RadiusEstimator",
    "RadiusResult",
    "RadiusShards",
    "SearchReport",
    "robust_accuracy",
    "robust_radii",
    "robust_radius",
    "temperature_sweep",
]
