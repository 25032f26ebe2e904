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
    """How often to go through the training samples."""
    batch_size: int = 128
    """Samples in a step, of all processes together. The last, incomplete batch of an epoch is left
    out."""
    optimizer: str = "sgd"
    """"sgd" or "adamw"."""
    lr: float = 0.1
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """SGD with Nesterov's momentum."""
    weight_decay: float = 5e-4
    """Weight decay of the optimizer."""
    warmup: int = 0
    """Epochs in which the learning rate rises."""
    augment: str = "none"
    """"crop" (shifted by up to an eighth of the height, zeros beyond the edge), "crop-flip" (also
    flipped left to right), or "none"."""
    mixup: float = 0.0
    """Mixup (Zhang et al., ICLR 2018) with weights from Beta(mixup, mixup); 0 for none."""
    mixup_off: int = 0
    """Number of last epochs without mixup."""
    rat_on: str = "mixed"
    """What the RAT loss's perturbed term is of, with mixup: "mixed" images, as the clean term, or
    the "unmixed" ones with their own labels, as the authors of RAT do it."""
    clip: bool = True
    """Keep perturbed pixels in [0, 1]."""
    bf16: bool = False
    """Run the network in bfloat16 (autocast)."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights that is returned; 0 for none."""
    swa: int = 0
    """Number of last epochs whose final weights are averaged (SWA, Izmailov et al., UAI 2018). The
    average is returned, with the batch normalisation statistics of the training images. 0 for none.
    """
    swa_lr: float = 0.02
    """Learning rate of those epochs; before them it falls to this one along the cosine."""
    sam: float = 0.0
    """How far away SAM (Foret et al., ICLR 2021) looks for the worst weights: 0.05 is usual; 0 for
    none. A step costs twice as much. With swa this is FMFP (Zhu et al., ECCV 2022)."""
    crl: float = 0.0
    """Weight of the correctness ranking loss (Moon et al., ICML 2020); 0 for none."""
    label_smoothing: float = 0.0
    """Share of a target that is spread over all classes; 0 for none."""
    logit_norm: float = 0.0
    """Temperature of logit normalisation (Wei et al., ICML 2022): training sees logits divided by
    their length and by this; 0.04 is usual on CIFAR-10, 0 for none. The net that is returned gives
    its logits as they are."""
    seed: int = 0
    """Seed of the order of the samples, augmentation, mixup and dropout; in rat-ext train, of the
    initial weights, too."""

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[str]] = {
            "loss": ("ce", "rat"),
            "optimizer": ("sgd", "adamw"),
            "augment": tuple(AUGMENTATIONS),
            "rat_on": ("mixed", "unmixed"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                known = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} is {value!r}; expected {known}")
        smallest = {"epochs": 1, "batch_size": 1, "warmup": 0, "mixup_off": 0, "swa": 0}
        for name, least in smallest.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("lr", "swa_lr"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive")
        for name in ("momentum", "ema", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be from 0 to below 1")
        for name in ("weight_decay", "mixup", "sam", "crl", "logit_norm"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}; it must not be negative")
        if self.swa > self.epochs - self.warmup:
            raise ValueError(
                f"swa is {self.swa}; there are {self.epochs} epochs, {self.warmup} of warm-up"
            )
        for one, other in (("ema", "swa"), ("crl", "mixup")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"{one} and {other} are both given; only one of them can be")
        self.criterion()

    def criterion(self) -> RATLoss:
        """The RAT loss of this recipe."""
        bounds = (0.0, 1.0) if self.clip else None
        return RATLoss(self.eps, self.lam, bounds=bounds, steps=self.steps)
