"""Makes classifiers by name: built-in ones, those of torchvision and timm, and the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..datasets import Preprocessing
from ..datasets.preprocessing import IMAGENET
from .architectures import Normalized
from .built_in import BUILT_IN, IMAGENET_MEAN, IMAGENET_STD, BuiltIn

Statistics = tuple[Sequence[float], Sequence[float]]
"""The mean and the standard deviation of each channel."""


def names() -> list[str]:
    """The built-in models."""
    return list(BUILT_IN)


def create(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pretrained: bool = False,
    new_head: bool = False,
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
        pretrained: with the library's weights; torchvision and timm only.
        new_head: to fine-tune pretrained weights of another number of classes: the last layer is
            new, with random weights. Without it, another number is an error.

    Raises:
        ValueError: there is no such model, or it cannot be had like this.
        ImportError: the library of the model is not installed.
    """
    library, _, member = name.partition(":")
    if library in ("torchvision", "timm") and member:
        build = _torchvision if library == "torchvision" else _timm
        network, (own_mean, own_std) = build(member, num_classes, pretrained, new_head)
        return Normalized(network, mean or own_mean, std or own_std)
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights here; load a checkpoint instead")
    if member:
        network = _user_function(library, member)(num_classes)
        if not isinstance(network, nn.Module):
            raise ValueError(f"{name} returned a {type(network).__name__}; expected an nn.Module")
        return Normalized(network, mean, std) if mean and std else network
    known = _built_in(name)
    return Normalized(known.build(num_classes=num_classes), mean or known.mean, std or known.std)


def _built_in(name: str) -> BuiltIn:
    if name not in BUILT_IN:
        raise ValueError(
            f"no model is named {name!r}; there are {', '.join(names())}, torchvision:NAME, "
            "timm:NAME and module:function"
        )
    return BUILT_IN[name]


def preprocessing(name: str, *, pretrained: bool = False) -> Preprocessing | None:
    """What images go through for a model by name; None for a function of the user's.

    Of a built-in model it is the size of the images that it is for; of a model of timm what timm's
    data configuration says; of one of torchvision with pretrained weights what these say, and
    without them 224 pixels of 256. Nothing is downloaded. Where timm asks for an image to be
    squeezed into a square ("squash"), or for a border, its middle is taken here as for the others.

    Args:
        name: as for `create`.
        pretrained: likewise.

    Raises:
        ValueError: there is no such model.
        ImportError: the library of the model is not installed.
    """
    library, _, member = name.partition(":")
    if library == "torchvision" and member:
        weights = _torchvision_weights(_torchvision_models(member), member, pretrained)
        if weights is None:
            return IMAGENET
        preset = weights.transforms()
        (side,), (resized,) = preset.crop_size, preset.resize_size
        return Preprocessing((3, side, side), side / resized, preset.interpolation.value)
    if library == "timm" and member:
        timm = _import_timm(member)
        known = timm.get_pretrained_cfg(member)
        config = timm.data.resolve_data_config(pretrained_cfg=known.to_dict() if known else {})
        crop = min(1.0, config["crop_pct"])  # more stands for a border
        return Preprocessing(config["input_size"], crop, config["interpolation"])
    return Preprocessing(_built_in(name).size) if not member else None


def pretrained_classes(name: str) -> tuple[str, ...] | None:
    """The names of the classes of pretrained weights; None where the library does not tell them.

    timm tells those of ImageNet and its parts, by their number. Nothing is downloaded.

    Args:
        name: as for `create`.

    Raises:
        ValueError: there is no such model.
        ImportError: the library of the model is not installed.
    """
    library, _, member = name.partition(":")
    if library == "torchvision" and member:
        weights = _torchvision_weights(_torchvision_models(member), member, True)
        return tuple(weights.meta["categories"])
    if library == "timm" and member:
        timm = _import_timm(member)
        known = timm.get_pretrained_cfg(member)
        subset = timm.data.infer_imagenet_subset(known.to_dict() if known else {})
        return tuple(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else None
    return None


def _torchvision(
    name: str, num_classes: int, pretrained: bool, new_head: bool
) -> tuple[nn.Module, Statistics]:
    models = _torchvision_models(name)
    weights = _torchvision_weights(models, name, pretrained)
    # With weights, torchvision makes no model of another number of classes.
    own_classes = len(weights.meta["categories"]) if weights else num_classes
    _check_pretrained(name, num_classes, own_classes, new_head)
    network = models.get_model(name, weights=weights, num_classes=own_classes)
    if own_classes != num_classes:
        _replace_heads(name, network, own_classes, num_classes)
    preset = weights.transforms() if weights else None
    return network, (getattr(preset, "mean", IMAGENET_MEAN), getattr(preset, "std", IMAGENET_STD))


def _torchvision_models(name: str) -> Any:
    """torchvision.models, which has a classifier of this name."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"torchvision:{name} needs torchvision: pip install torchvision"
        ) from error
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classifier named {name!r}")
    return models


def _torchvision_weights(models: Any, name: str, pretrained: bool) -> Any:
    return models.get_model_weights(name).DEFAULT if pretrained else None


def _timm(
    name: str, num_classes: int, pretrained: bool, new_head: bool
) -> tuple[nn.Module, Statistics]:
    timm = _import_timm(name)
    own_classes = timm.get_pretrained_cfg_value(name, "num_classes") if pretrained else None
    _check_pretrained(name, num_classes, own_classes, new_head)
    network: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    config = network.pretrained_cfg
    return network, (config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD))


def _import_timm(name: str) -> Any:
    """timm, which has a model of this name."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model named {name!r}")
    return timm


def _check_pretrained(name: str, num_classes: int, own_classes: int | None, new_head: bool) -> None:
    if own_classes not in (None, num_classes) and not new_head:
        raise ValueError(
            f"the pretrained {name} has {own_classes} classes, not {num_classes}; fine-tune it "
            "first (rat-ext train --pretrained, or new_head=True), or use its own data set"
        )


def _replace_heads(name: str, network: nn.Module, own_classes: int, num_classes: int) -> None:
    """Put new layers, with random weights, in the place of those that give the logits.

    Inception and GoogLeNet have a second one, of use in training only.
    """
    heads = [
        (path, layer)
        for path, layer in network.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == own_classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == own_classes)
    ]
    if not heads:
        raise ValueError(f"{name} has no last layer of {own_classes} classes that can be replaced")
    for path, layer in heads:
        bias = layer.bias is not None
        new: nn.Module
        if isinstance(layer, nn.Linear):
            new = nn.Linear(layer.in_features, num_classes, bias)
        else:
            new = nn.Conv2d(layer.in_channels, num_classes, 1, bias=bias)
        parent, _, attribute = path.rpartition(".")
        setattr(network.get_submodule(parent), attribute, new)


def _user_function(module: str, function: str) -> Callable[[int], Any]:
    try:
        found: Callable[[int], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the model {module}:{function}: {error}") from error
    return found
