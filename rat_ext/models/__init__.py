"""Classifiers by name, with the normalisation inside, so that radii are in the units of pixels."""

from .architectures import CifarResNet, DigitsCNN, Normalized, ResNet18, WideResNet
from .built_in import (
    CIFAR_MEAN,
    CIFAR_STD,
    DIGITS_MEAN,
    DIGITS_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
from .by_name import create, names, preprocessing, pretrained_classes
from .checkpoint import classes_in, load_weights, name_in, preprocessing_in, save_weights
from .scaling import TemperatureScaling, VectorScaling
from .views import ViewAveraged, mirrored

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "DIGITS_MEAN",
    "DIGITS_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "CifarResNet",
    "DigitsCNN",
    "Normalized",
    "ResNet18",
    "TemperatureScaling",
    "VectorScaling",
    "ViewAveraged",
    "WideResNet",
    "classes_in",
    "create",
    "load_weights",
    "mirrored",
    "name_in",
    "names",
    "preprocessing",
    "preprocessing_in",
    "pretrained_classes",
    "save_weights",
]
