"""What the service answers, and what its OpenAPI schema says of requests and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .. import __version__
from .decoding import Decoder
from .gate import Answer, Gate
from .settings import Settings

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_NUMBERS = {"type": "array", "items": {}}


def _form(file: dict[str, Any], description: str) -> dict[str, Any]:
    properties = {"file": {**file, "description": description}}
    return {"schema": {"type": "object", "properties": properties, "required": ["file"]}}


REQUEST_BODY = {
    "description": "One input: an image of the model's size; a .npy array or a JSON list of the "
    "model's shape, without a batch dimension, within the bounds (see /info); or a form with such "
    "a file. The first bytes tell which it is, whatever the content type says.",
    "required": True,
    "content": {
        **{f"image/{kind}": _BINARY for kind in ("png", "jpeg", "webp")},
        "application/octet-stream": _BINARY,
        "application/json": {"schema": _NUMBERS, "example": [[[0.0, 0.25], [0.5, 1.0]]]},
        "multipart/form-data": _form(_BINARY["schema"], "an image, a .npy array or a JSON list"),
    },
}
BATCH_BODY = {
    "description": "Up to max_inputs (see /info) inputs: a form with a file for each, a .npy array "
    "of shape (N, ...), or a JSON list of inputs.",
    "required": True,
    "content": {
        "multipart/form-data": _form(
            {"type": "array", "items": _BINARY["schema"]},
            "each an image, a .npy array or a JSON list",
        ),
        "application/octet-stream": _BINARY,
        "application/json": {
            "schema": _NUMBERS,
            "example": [[[[0.0, 0.25], [0.5, 1.0]]], [[[1.0, 0.75], [0.5, 0.0]]]],
        },
    },
}
ERRORS = {
    400: "an empty or malformed request",
    408: "the request came too slowly",
    413: "too many bytes or pixels",
    415: "no kind of file that is read here",
    422: "of the wrong shape, out of bounds, not finite, or a damaged file",
    500: "the model failed on this input",
    503: "too much work, or shutting down: try again after Retry-After seconds",
    504: "the answer took too long",
}


_PREDICTION: dict[str, Any] = {
    "prediction": 8,
    "class_name": "8",
    "radius": 0.1072,
    "found": True,
    "confidence": 0.1072,
    "probability": 0.98,
    "accepted": True,
}
_DETAIL = "the image is 6 wide and 5 high, the model takes 8 x 8; resize it, or start the server "
_DETAIL += "with --resize"
_RESULTS: list[Any] = [
    {"status": 200, "prediction": _PREDICTION, "detail": None},
    {"status": 422, "prediction": None, "detail": _DETAIL},
]


class Prediction(BaseModel):
    """What the service answers."""

    model_config = ConfigDict(json_schema_extra={"examples": [_PREDICTION]})

    prediction: int = Field(description="index of the class")
    class_name: str | None = Field(description="its name, if known")
    radius: float | None = Field(
        description="robust radius in the units of the input; null where the prediction changes "
        "nowhere on the ray, or if radii are off"
    )
    found: bool | None = Field(
        description="a change of the prediction was found; null without radii"
    )
    confidence: float | None = Field(description="the detector's; null without one, or if infinite")
    probability: float | None = Field(description="that the prediction is right, if known")
    accepted: bool | None = Field(description="the detector's verdict; null without one")

    @classmethod
    def of(cls, answer: Answer, classes: Sequence[str] | None) -> Prediction:
        """An answer, with the names of the classes if they are known."""
        name = None
        if classes is not None and answer.prediction < len(classes):
            name = classes[answer.prediction]
        return cls(
            prediction=answer.prediction,
            class_name=name,
            radius=_finite(answer.radius),
            found=None if answer.radius is None else math.isfinite(answer.radius),
            confidence=_finite(answer.confidence),
            probability=_finite(answer.probability),
            accepted=answer.accepted,
        )


class Result(BaseModel):
    """What became of one of several inputs."""

    model_config = ConfigDict(json_schema_extra={"examples": _RESULTS})

    status: int = Field(description="what /predict would have had: 200, or that of an error")
    prediction: Prediction | None = Field(default=None, description="if the status is 200")
    detail: str | None = Field(default=None, description="what is wrong, and what to do")


class Predictions(BaseModel):
    """What the service answers to several inputs."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"results": _RESULTS}]})

    results: list[Result] = Field(description="in the order of the inputs")


class Problem(BaseModel):
    """What every error comes as."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"detail": _DETAIL}]})

    detail: str = Field(description="what is wrong, and what to do")


class Info(BaseModel):
    """What is served."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "version": "0.1.0",
                    "model": "digits-cnn",
                    "input_size": [1, 8, 8],
                    "bounds": [0.0, 1.0],
                    "classes": list("0123456789"),
                    "resize": False,
                    "detector": True,
                    "max_body": 10485760,
                    "max_inputs": 256,
                }
            ]
        }
    )

    version: str = Field(description="of rat_ext")
    model: str = Field(description="its name")
    input_size: list[int] = Field(description="shape of an input: (C, H, W) for images")
    bounds: list[float] = Field(
        min_length=2, max_length=2, description="smallest and largest value of an input element"
    )
    classes: list[str] | None = Field(description="in the order of the logits; null if not known")
    resize: bool = Field(description="images of another size are resized, not refused")
    detector: bool = Field(description="there is one, which gives verdicts")
    max_body: int = Field(description="most bytes of a request")
    max_inputs: int = Field(description="most inputs of a request to /predict-batch")

    @classmethod
    def of(
        cls,
        gate: Gate,
        decoder: Decoder,
        settings: Settings,
        name: str,
        classes: Sequence[str] | None,
    ) -> Info:
        """That a gate is served under a name, and with these names of its classes."""
        return cls(
            version=__version__,
            model=name,
            input_size=list(decoder.shape),
            bounds=list(decoder.bounds),
            classes=None if classes is None else list(classes),
            resize=decoder.resize,
            detector=gate.detector is not None,
            max_body=settings.max_body,
            max_inputs=settings.queue,
        )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
