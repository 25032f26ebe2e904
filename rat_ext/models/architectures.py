"""The built-in networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common.user_model import logits_of
from .built_in import CIFAR_MEAN, CIFAR_STD, DIGITS_MEAN, DIGITS_STD, built_in


class Normalized(nn.Module):
    """A network behind the normalisation ``(x - mean) / std`` of each channel.

    Args:
        network: from normalised (N, C, H, W) inputs to logits; the attribute ``m``.
        mean: of each of the C channels; a buffer, and so part of the state dict.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.m = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, classes) logits of (N, C, H, W) pixels in [0, 1]."""
        return logits_of(self.m((x - self.mean) / self.std), x.shape[0])


@built_in("digits-cnn", (1, 8, 8), DIGITS_MEAN, DIGITS_STD)
class DigitsCNN(nn.Sequential):
    """Three convolutions for 8x8 images of one channel; trains in seconds on a CPU."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, num_classes),
        )


class _BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:  # option A: subsample, and pad the channels with zeros
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *[self.padding] * 2))
        return F.relu(x + y)


@built_in("resnet110", (3, 32, 32), CIFAR_MEAN, CIFAR_STD, depth=110)
@built_in("resnet56", (3, 32, 32), CIFAR_MEAN, CIFAR_STD, depth=56)
@built_in("resnet20", (3, 32, 32), CIFAR_MEAN, CIFAR_STD, depth=20)
class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al., CVPR 2016, section 4.2) with option A shortcuts.

    Args:
        depth: 6 n + 2: 20, 32, 44, 56 or 110 in the paper.
        num_classes: number of logits.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}; it must be 6 n + 2, for example 20 or 56")
        blocks = depth // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(width_in, width, stride)
        return nn.Sequential(first, *[_BasicBlock(width, width, 1) for _ in range(blocks - 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _ProjectedBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


@built_in("resnet18-w32", (3, 32, 32), CIFAR_MEAN, CIFAR_STD, width=32)
@built_in("resnet18", (3, 32, 32), CIFAR_MEAN, CIFAR_STD)
class ResNet18(nn.Module):
    """ResNet-18 (He et al., CVPR 2016) with a stem for 32x32 images: 3x3, no stride, no pooling.

    Args:
        width: channels of the first stage: 64 in the paper.
        num_classes: number of logits.
    """

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        width_in = width
        for stage in range(4):
            for stride in (2 if stage else 1, 1):
                blocks.append(_ProjectedBlock(width_in, width << stage, stride))
                width_in = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _WideBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or width_in != width:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(y)))))
        return y + shortcut


@built_in("wrn-28-10", (3, 32, 32), CIFAR_MEAN, CIFAR_STD, depth=28, width=10)
class WideResNet(nn.Module):
    """Wide residual network for 32x32 images (Zagoruyko and Komodakis, BMVC 2016).

    Args:
        depth: 6 n + 4: 28 in WRN-28-10.
        width: the widening factor: 10 in WRN-28-10.
        num_classes: number of logits.
        dropout: between the convolutions of a block.
    """

    def __init__(
        self, depth: int = 28, width: int = 10, num_classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth is {depth}; it must be 6 n + 4, for example 28")
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        width_in = 16
        for stage in range(3):
            for block in range(depth // 6):
                stride = 2 if stage and not block else 1
                layers.append(_WideBlock(width_in, 16 * width << stage, stride, dropout))
                width_in = 16 * width << stage
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width_in), nn.ReLU())
        self.linear = nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits
