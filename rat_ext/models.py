"""Classifiers by name, with the normalisation inside, so that radii are in the units of pixels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._model import logits_of, unwrapped

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)


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
        return self.linear(x.mean((2, 3)))


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
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(F.relu(self.bn2(self.conv1(y))))
        return shortcut + self.conv2(y)


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
        return self.linear(self.features(x).mean((2, 3)))


_BUILT_IN: dict[str, tuple[Callable[[int], nn.Module], Sequence[float], Sequence[float]]] = {
    "digits-cnn": (DigitsCNN, DIGITS_MEAN, DIGITS_STD),
    "resnet20": (lambda classes: CifarResNet(20, classes), CIFAR_MEAN, CIFAR_STD),
    "resnet56": (lambda classes: CifarResNet(56, classes), CIFAR_MEAN, CIFAR_STD),
    "resnet110": (lambda classes: CifarResNet(110, classes), CIFAR_MEAN, CIFAR_STD),
    "wrn-28-10": (lambda classes: WideResNet(28, 10, classes), CIFAR_MEAN, CIFAR_STD),
}


def names() -> list[str]:
    """The built-in models."""
    return list(_BUILT_IN)


def create(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A classifier of pixels in [0, 1] by name.

    Args:
        name: a built-in one (see `names`); "torchvision:NAME" or "timm:NAME"; or "module:function",
            called with num_classes, which returns a module that normalises its input itself, or
            does not need to.
        num_classes: number of logits.
        mean: of each channel, subtracted in front of the network; default that of the training
            data that the name stands for.
        std: likewise.
        pretrained: with the library's weights; torchvision and timm only, and num_classes must be
            theirs.

    Raises:
        ValueError: there is no such model, or it cannot be had like this.
        ImportError: the library of the model is not installed.
    """
    library, _, member = name.partition(":")
    if library in ("torchvision", "timm") and member:
        build = _torchvision if library == "torchvision" else _timm
        network, default_mean, default_std = build(member, num_classes, pretrained)
        return Normalized(network, mean or default_mean, std or default_std)
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights here; load a checkpoint instead")
    if member:
        network = _user_function(library, member)(num_classes)
        if not isinstance(network, nn.Module):
            raise ValueError(f"{name} returned a {type(network).__name__}; expected an nn.Module")
        return Normalized(network, mean, std) if mean and std else network
    if name not in _BUILT_IN:
        raise ValueError(
            f"no model is named {name!r}; there are {', '.join(names())}, torchvision:NAME, "
            "timm:NAME and module:function"
        )
    build_network, default_mean, default_std = _BUILT_IN[name]
    return Normalized(build_network(num_classes), mean or default_mean, std or default_std)


def name_in(path: str | Path) -> str | None:
    """The name of the model that a checkpoint of ``rat-ext train`` is of; None for others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint.
    """
    content = _read(Path(path))
    name = content.get("model") if isinstance(content, Mapping) else None
    return name if isinstance(name, str) else None


def classes_in(path: str | Path) -> tuple[str, ...] | None:
    """The names of the classes in a checkpoint of ``rat-ext train``; None for others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint.
    """
    content = _read(Path(path))
    classes = content.get("classes") if isinstance(content, Mapping) else None
    return tuple(map(str, classes)) if isinstance(classes, list) else None


def input_size(name: str) -> tuple[int, ...] | None:
    """The shape (C, H, W) of the images that a built-in model is for; None for others."""
    if name == "digits-cnn":
        return (1, 8, 8)
    return (3, 32, 32) if name in _BUILT_IN else None


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint, in one of the common layouts, into the model.

    The file is a state dict, or a dict with one under "state_dict", "model_state_dict" or "model",
    saved by torch.save (read with ``weights_only=True``) or as .safetensors. The prefixes of
    DistributedDataParallel and torch.compile are dropped. Weights of the bare network are loaded
    behind the normalisation of a `Normalized` model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or not of this model.
    """
    path = Path(path)
    state = _state_dict(path)
    expected = model.state_dict().keys()
    if isinstance(model, Normalized) and not state.keys() & expected:
        state = {f"m.{key}": value for key, value in state.items()}
        state.update(mean=model.mean, std=model.std)
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(getattr(model, 'm', model)).__name__}: {_some(missing)} "
            f"missing, {_some(unexpected)} unexpected. Is it of another model?"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{path} does not fit the model: {error}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("reading .safetensors needs: pip install safetensors") from error
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, unpickling ones among them
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of tensors alone: {reason}") from error


def _state_dict(path: Path) -> dict[str, Tensor]:
    state = _read(path)
    if isinstance(state, Mapping):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict")
    return unwrapped(state)


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:3])}, ...)" if keys else "no key"


def _torchvision(
    name: str, num_classes: int, pretrained: bool
) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"torchvision:{name} needs torchvision: pip install torchvision"
        ) from error
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classifier named {name!r}")
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    _check_pretrained(name, num_classes, len(weights.meta["categories"]) if weights else None)
    network = models.get_model(name, weights=weights, num_classes=num_classes)
    preset = weights.transforms() if weights else None
    return (
        network,
        getattr(preset, "mean", IMAGENET_MEAN),
        getattr(preset, "std", IMAGENET_STD),
    )


def _timm(
    name: str, num_classes: int, pretrained: bool
) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model named {name!r}")
    own_classes = timm.get_pretrained_cfg_value(name, "num_classes") if pretrained else None
    _check_pretrained(name, num_classes, own_classes)
    network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    config = network.pretrained_cfg
    return network, config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)


def _check_pretrained(name: str, num_classes: int, own_classes: int | None) -> None:
    if own_classes not in (None, num_classes):
        raise ValueError(
            f"the pretrained {name} has {own_classes} classes, not {num_classes}; train it without "
            "pretrained weights, or use its own data set"
        )


def _user_function(module: str, function: str) -> Callable[[int], Any]:
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the model {module}:{function}: {error}") from error
