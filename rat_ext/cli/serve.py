"""rat-ext serve"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from .. import models
from .._common.extras import install
from ..serve import Settings
from .inputs import (
    Classifier,
    Device,
    Flag,
    OptionalFile,
    OptionalInt,
    OptionalName,
    Resizing,
    checked,
    search,
    searched,
    shape_in,
)

if TYPE_CHECKING:
    Search = Any
else:
    Search = search("method", "rtol", "temperature", "bounds")


@dataclass(frozen=True)
class SettingsOptions(Settings):
    def __post_init__(self) -> None:
        """Not checked yet: an error is to be that of the command."""


@dataclass(frozen=True)
class Serve:
    """Predictions over HTTP, each with its radius and a verdict.

    Serves a classifier: POST an image or a tensor to /predict. There is a page to try it at /,
    metrics at /metrics, and no authentication: see the guide before you listen on more than this
    machine.
    """

    classifier: Classifier = field(default_factory=Classifier)
    num_classes: OptionalInt = None
    """number of classes of the model (default: as many as there are names)"""
    classes: OptionalFile = None
    """text file with the name of a class in each line (default: those of the checkpoint, else of
    the pretrained weights)"""
    input_size: Annotated[OptionalName, arg(metavar="CxHxW")] = None
    """shape of an input (default: as the checkpoint says, else the model)"""
    resize: Flag = False
    """resize images of another size, not refuse them"""
    resizing: Resizing = field(default_factory=Resizing)
    detector: OptionalFile = None
    """file of the detector that gives verdicts"""
    no_radius: Flag = False
    """measure no radii beside the detector's confidence"""
    host: str = "127.0.0.1"
    """name or address to listen on"""
    port: int = 8000
    """port to listen on; 0 for a free one"""
    access_log: Annotated[
        Literal["text", "json"] | None, arg(metavar="{text,json}", help_behavior_hint="")
    ] = None
    """print a line for each request, as text or as a JSON object"""
    where: Device = field(default_factory=Device)
    radii: Search = field(default_factory=Search)
    settings: SettingsOptions = field(default_factory=SettingsOptions)

    def run(self) -> None:
        try:
            from ..serve import app, server
            from ..serve.loading import make_gate
        except ModuleNotFoundError as error:
            raise ImportError(f"serving needs {error.name}: {install('serve')}") from error
        settings = checked(Settings, self.settings)
        name = self.classifier.name
        known = self.classifier.preprocessing
        shape: tuple[int, ...] | None = known.size if known else None
        if self.input_size is not None:
            shape = shape_in(self.input_size, "input_size")
        if shape is None:
            raise ValueError(f"give the --input-size of {name}, for example 3x224x224")
        preprocessing = self.resizing.changed(known, shape) if len(shape) == 3 else None
        classes = self._class_names()
        model = self.classifier.load(self._num_classes(classes))
        with self.where.use() as (device, _):
            gate, decoder = make_gate(
                model,
                shape,
                detector=self.detector,
                radius=not self.no_radius,
                device=device,
                resize=self.resize,
                max_pixels=settings.max_pixels,
                preprocessing=preprocessing,
                options=searched(self.radii),
            )
            application = app.create_app(gate, decoder, settings, name=name, classes=classes)
            server.serve(application, settings, self.host, self.port, access_log=self.access_log)

    def _class_names(self) -> tuple[str, ...] | None:
        if self.classes is not None:
            return tuple(self.classes.read_text(encoding="utf-8").splitlines())
        if self.classifier.checkpoint is not None:
            return models.classes_in(self.classifier.checkpoint)
        return models.pretrained_classes(self.classifier.name)

    def _num_classes(self, classes: Sequence[str] | None) -> int:
        number = self.num_classes or (len(classes) if classes else None)
        if number is None:
            raise ValueError("the model does not name its classes: give --classes or --num-classes")
        if classes and number != len(classes):
            raise ValueError(
                f"--num-classes is {number}, but there are {len(classes)} names of classes"
            )
        return number
