"""rat-ext serve"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from .. import models
from .._common.extras import install
from ..detector import Detector
from ..search.options import Options
from ..serve import Settings
from .inputs import (
    Commands,
    Formatter,
    add_classifier,
    add_device,
    add_fields,
    add_search_options,
    load_classifier,
    model_name,
    search_options,
    use_device,
)

SEARCH = ("method", "rtol", "temperature", "bounds")

_SERVE_HELP = {
    "max_batch": "most inputs that the model runs on together",
    "max_wait_ms": "how long the first input of a batch waits for others",
    "queue": "inputs that may wait for the model; more are refused (503)",
    "timeout": "seconds from a complete request to its answer (504)",
    "body_timeout": "seconds in which a client must have sent its request (408), and read its "
    "answer",
    "max_body": "most bytes of a request (413)",
    "max_pixels": "most pixels of an image, however small its file is (413)",
    "connections": "most connections open at the same time; more are refused (503)",
}


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="predictions over HTTP, each with its radius and a verdict",
        description="Serves a classifier: POST an image or a tensor to /predict. There is a page "
        "to try it at /,\nmetrics at /metrics, and no authentication: see the guide before you "
        "listen on more than\nthis machine.",
        formatter_class=Formatter,
    )
    parser.set_defaults(run=run)
    add_classifier(parser)
    add_device(parser)
    parser.add_argument(
        "--num-classes",
        type=int,
        help="number of classes of the model (default: as many as there are names)",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with the name of a class in each line (default: those of the checkpoint)",
    )
    parser.add_argument(
        "--input-size",
        metavar="CxHxW",
        help="shape of an input (default: that of the images that a built-in model is for)",
    )
    parser.add_argument(
        "--resize", action="store_true", help="resize images of another size, not refuse them"
    )
    parser.add_argument("--detector", type=Path, help="file of the detector that gives verdicts")
    parser.add_argument(
        "--no-radius",
        action="store_true",
        help="measure no radii beside the detector's confidence",
    )
    add_search_options(parser.add_argument_group("radii"), *SEARCH)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="name or address to listen on")
    group.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for a free one")
    group.add_argument("--access-log", action="store_true", help="log every request")
    add_fields(group, Settings, _SERVE_HELP)


def run(options: argparse.Namespace) -> None:
    try:
        from ..serve import app, server
        from ..serve.decoding import Decoder
        from ..serve.gate import Gate
    except ModuleNotFoundError as error:
        raise ImportError(f"serving needs {error.name}: {install('serve')}") from error
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    name = model_name(options)
    shape = _input_size(options.input_size) if options.input_size else models.input_size(name)
    if shape is None:
        raise ValueError(f"give the --input-size of {name}, for example 3x224x224")
    classes = _class_names(options)
    _, model = load_classifier(options, _num_classes(options, classes))
    with use_device(options) as (device, _):
        model.to(device)
        parameter = next(model.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        low, high = options.bounds
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"bounds is {(low, high)}; to serve they must be finite: those of the pixels of an "
                "image, or of the values that the model was trained on"
            )
        search = search_options(options, *SEARCH)
        Options.checked(torch.empty(1, *shape, dtype=dtype), **search)
        detector = None
        if options.detector is not None:
            detector = Detector.load(options.detector, model)
        gate = Gate(model, detector, not options.no_radius, device, search)
        gate.warm_up(shape, dtype)
        decoder = Decoder(shape, dtype, (low, high), options.resize, settings.max_pixels)
        application = app.create_app(gate, decoder, settings, name=name, classes=classes)
        server.serve(
            application, settings, options.host, options.port, access_log=options.access_log
        )


def _input_size(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--input-size is {text!r}; expected sizes such as 3x224x224")
    return shape


def _class_names(options: argparse.Namespace) -> tuple[str, ...] | None:
    if options.classes is None:
        return models.classes_in(options.checkpoint) if options.checkpoint else None
    return tuple(options.classes.read_text(encoding="utf-8").splitlines())


def _num_classes(options: argparse.Namespace, classes: Sequence[str] | None) -> int:
    number = options.num_classes or (len(classes) if classes else None)
    if number is None:
        raise ValueError(
            "the checkpoint does not name its classes: give --classes or --num-classes"
        )
    if classes and number != len(classes):
        raise ValueError(
            f"--num-classes is {number}, but there are {len(classes)} names of classes"
        )
    return number
