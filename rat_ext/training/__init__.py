"""Training with plain cross-entropy or with the RAT loss."""

from .loss import RATLoss, RATLossOutput
from .recipe import Recipe
from .run import Trained, train

__all__ = ["RATLoss", "RATLossOutput", "Recipe", "Trained", "train"]
