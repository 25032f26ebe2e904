"""How to train: the settings of a run, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .augmentation import AUGMENTATIONS
from .loss import RATLoss


@dataclass(frozen=True)
class Recipe:
    """How to train. The learning rate warms up linearly, then falls to 0 along a cosine.

    Raises:
        ValueError: a value out of its range.
    """

    loss: str = "rat"
    """"rat", or "ce" for plain cross-entropy."""
    eps: float = 1e-3
    """Size of the RAT perturbation, in the units of pixels in [0, 1]."""
    lam: float = 1.0
    """Weight of the RAT loss's perturbed term."""
    steps: int = 1
    """Steps of the RAT loss's inner loop: 1 for FGSM, more for PGD."""
    epochs: int = 100
    batch_size: int = 128
    """Of all processes together. The last, incomplete batch of an epoch is left out."""
    optimizer: str = "sgd"
    """"sgd" (with Nesterov momentum) or "adamw"."""
    lr: float = 0.1
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    warmup: int = 0
    """Epochs in which the learning rate rises."""
    augment: str = "none"
    """"crop" (shifted by up to an eighth of the height, zeros beyond the edge), "crop-flip" (also
    flipped left to right), or "none"."""
    mixup: float = 0.0
    """Mixup (Zhang et al., ICLR 2018) with weights from Beta(mixup, mixup); 0 for none."""
    mixup_off: int = 0
    """Last epochs without mixup."""
    bf16: bool = False
    """Autocast to bfloat16."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights that is returned; 0 for none."""
    seed: int = 0
    """Of the order of the samples, augmentation, mixup and dropout. Not of the initial weights."""

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[str]] = {
            "loss": ("ce", "rat"),
            "optimizer": ("sgd", "adamw"),
            "augment": tuple(AUGMENTATIONS),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                known = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} is {value!r}; expected {known}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup", 0), ("mixup_off", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        for name in ("momentum", "ema"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be from 0 to below 1")
        for name in ("weight_decay", "mixup"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}; it must not be negative")
        self.criterion()

    def criterion(self) -> RATLoss:
        """The RAT loss of this recipe."""
        return RATLoss(self.eps, self.lam, steps=self.steps)
