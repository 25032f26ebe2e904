"""What the service answers, and what its OpenAPI schema says of requests and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, Field

from .. import __version__
from .decoding import Decoder
from .gate import Answer, Gate
from .settings import Settings

_BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY = {
    "required": True,
    "content": {
        **{f"image/{kind}": _BINARY for kind in ("png", "jpeg", "webp")},
        "application/octet-stream": _BINARY,
        "application/json": {"schema": {"type": "array", "items": {}}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "string", "format": "binary"}},
                "required": ["file"],
            }
        },
    },
}
BATCH_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "file": {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
                "required": ["file"],
            }
        },
        "application/octet-stream": _BINARY,
        "application/json": {"schema": {"type": "array", "items": {}}},
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


class Prediction(BaseModel):
    """What the service answers."""

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

    status: int = Field(description="the HTTP status that /predict would have had; 200 if it went")
    prediction: Prediction | None = None
    detail: str | None = Field(default=None, description="what is wrong, and what to do")


class Predictions(BaseModel):
    """What the service answers to several inputs."""

    results: list[Result] = Field(description="in the order of the inputs")


class Problem(BaseModel):
    """What every error comes as."""

    detail: str = Field(description="what is wrong, and what to do")


class Info(BaseModel):
    """What is served."""

    version: str
    model: str
    input_size: list[int]
    bounds: list[float] = Field(min_length=2, max_length=2)
    classes: list[str] | None
    resize: bool
    detector: bool
    max_body: int
    max_inputs: int

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
