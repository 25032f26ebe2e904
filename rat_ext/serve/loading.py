"""From a trained model to what answers for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ..datasets import Preprocessing
from ..detector import Detector
from ..search.checked import Options
from ..search.options import SearchOptions
from .decoding import Decoder
from .gate import Gate


def check_search(shape: tuple[int, ...], dtype: torch.dtype, options: SearchOptions) -> None:
    """Raise a ValueError or TypeError where inputs cannot be served with these options."""
    low, high = _bounds(options)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"bounds is {(low, high)}; to serve they must be finite: those of the pixels of an "
            "image, or of the values that the model was trained on"
        )
    Options.checked(torch.empty(1, *shape, dtype=dtype), **options)


def make_gate(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    detector: Path | None,
    radius: bool,
    device: torch.device,
    resize: bool,
    max_pixels: int,
    preprocessing: Preprocessing | None,
    options: SearchOptions,
) -> tuple[Gate, Decoder]:
    """What judges the inputs of a model, which is moved to the device; and what decodes them.

    The model has run on one input then.

    Args:
        model: in eval mode.
        shape: of an input, without the batch dimension.
        detector: file of the detector that gives verdicts.
        radius: measure radii.
        device: where the model is to run.
        resize: images of another size, instead of refusing them.
        max_pixels: of an image.
        preprocessing: of images; None as in `Decoder`.
        options: of `rat_ext.robust_radius`.

    Raises:
        ValueError: the options do not fit, the model does not take such inputs, or the detector is
            of another model or other bounds.
        FileNotFoundError: there is no such detector.
    """
    model.to(device)
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    check_search(shape, dtype, options)
    verdicts = None if detector is None else Detector.load(detector, model)
    gate = Gate(model, verdicts, radius, device, options)
    gate.warm_up(shape, dtype)
    decoder = Decoder(shape, dtype, _bounds(options), resize, max_pixels, preprocessing)
    return gate, decoder


def _bounds(options: SearchOptions) -> tuple[float, float]:
    return cast("tuple[float, float]", options.get("bounds", (0.0, 1.0)))
