"""Training with plain cross-entropy or with the RAT loss."""

from .loop import Trained, train
from .loss import RATLoss, RATLossOutput
from .presets import PRESETS, recipe
from .recipe import Recipe

__all__ = ["PRESETS", "RATLoss", "RATLossOutput", "Recipe", "Trained", "recipe", "train"]
