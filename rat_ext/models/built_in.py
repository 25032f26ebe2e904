"""The registry of the built-in networks, and the statistics of the images that they are for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)

Network = TypeVar("Network", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class BuiltIn:
    """A network, and the images that it is for."""

    build: Callable[..., nn.Module]
    """Called with ``num_classes``."""
    size: tuple[int, int, int]
    """(C, H, W)."""
    mean: Sequence[float]
    """Of each channel."""
    std: Sequence[float]
    """Of each channel."""


BUILT_IN: dict[str, BuiltIn] = {}


def built_in(
    name: str,
    size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    **arguments: Any,
) -> Callable[[Network], Network]:
    """Registers a network under a name, which stands for these arguments of it."""

    def register(network: Network) -> Network:
        BUILT_IN[name] = BuiltIn(partial(network, **arguments), size, mean, std)
        return network

    return register
