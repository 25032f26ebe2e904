"""Training with plain cross-entropy or with the RAT loss."""

from .loop import Trained, train
from .loss import RATLoss, RATLossOutput
from .recipe import Recipe

__all__ = ["RATLoss", "RATLossOutput", "Recipe", "Trained", "train"]
