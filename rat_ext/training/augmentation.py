"""What training does to a batch: augmentation and mixup."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator, int, slice], Tensor]
"""Called with the (N, C, H, W) images of a process, a generator which all processes have alike, how
many processes there are, and the part of the images of all that is this one's."""


def unchanged(x: Tensor, generator: torch.Generator, world: int, share: slice) -> Tensor:
    return x


def crop(x: Tensor, generator: torch.Generator, world: int, share: slice) -> Tensor:
    n, channels, height, width = x.shape
    device, margin = x.device, height // 8
    # Drawn for the batch of all processes, so that their number does not change what is learnt.
    shift = torch.randint(2 * margin + 1, (2, n * world), device=device, generator=generator)
    top, left = shift[:, share].view(2, n, 1, 1, 1)
    samples = torch.arange(n, device=device).view(n, 1, 1, 1)
    planes = torch.arange(channels, device=device).view(1, channels, 1, 1)
    rows = top + torch.arange(height, device=device).view(1, 1, height, 1)
    columns = left + torch.arange(width, device=device).view(1, 1, 1, width)
    return F.pad(x, [margin] * 4)[samples, planes, rows, columns]


def crop_flip(x: Tensor, generator: torch.Generator, world: int, share: slice) -> Tensor:
    x = crop(x, generator, world, share)
    coin = torch.rand(len(x) * world, device=x.device, generator=generator)[share]
    return torch.where(coin.view(-1, 1, 1, 1) < 0.5, x.flip(3), x)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": unchanged,
    "crop": crop,
    "crop-flip": crop_flip,
}
"""By the name that a recipe gives them."""


class Mixup(NamedTuple):
    """Mixup (Zhang et al., ICLR 2018) of a batch with itself in another order."""

    weight: float
    """Of the images in their own order; one for the batch."""
    order: Tensor
    """(N,)"""

    @staticmethod
    def drawn(x: Tensor, alpha: float) -> Mixup:
        """For a batch like x, with the weight from Beta(alpha, alpha)."""
        weight = float(torch.distributions.Beta(alpha, alpha).sample())
        return Mixup(weight, torch.randperm(len(x), device=x.device))

    def images(self, x: Tensor) -> Tensor:
        """The (N, ...) mixed images, differentiable in x."""
        # Rounding may leave the bounds of the pixels, which the RAT loss checks.
        return torch.lerp(x[self.order], x, self.weight).clamp(0, 1)

    def targets(self, t: Tensor, classes: int) -> Tensor:
        """The (N, classes) class probabilities of the mixed images."""
        onehot = F.one_hot(t, classes).float()
        return torch.lerp(onehot[self.order], onehot, self.weight)


def smoothed(t: Tensor, share: float, classes: int) -> Tensor:
    """(N, classes) probabilities: targets of which a share is spread over all classes.

    Label smoothing (Szegedy et al., CVPR 2016) of (N,) classes, or of (N, classes) probabilities.
    """
    probabilities = t if t.is_floating_point() else F.one_hot(t, classes).float()
    return torch.lerp(probabilities, torch.full_like(probabilities, 1 / classes), share)
