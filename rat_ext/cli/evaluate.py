"""rat-ext evaluate"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from .. import datasets, evaluation, reports
from .inputs import Classifier, Data, Device, Flag, OptionalName, checked, command_line


@dataclass(frozen=True)
class SettingsOptions(evaluation.Settings):
    scores: Annotated[
        tuple[str, ...], arg(metavar="SCORE...", help_behavior_hint="(default: all)")
    ] = ()
    """names of the scores to compare"""

    def __post_init__(self) -> None:
        """Not checked yet: an error is to be that of the command."""


@dataclass(frozen=True)
class Evaluate:
    """How well confidence scores find a classifier's wrong predictions.

    Fits confidence scores on one part of the test images and tests them on the rest, for several
    random splits; writes results.csv, results.json and index.html. On several devices: torchrun
    --nproc-per-node=2 -m rat_ext evaluate ...
    """

    after_interrupt: ClassVar[str] = "; with --resume the command goes on"

    out: Path
    """folder to write to"""
    images: Data
    classifier: Classifier = field(default_factory=Classifier)
    ood: OptionalName = None
    """a data set whose images are mixed in and count as errors"""
    resume: Flag = False
    """go on with an evaluation that was interrupted"""
    where: Device = field(default_factory=Device)
    settings: SettingsOptions = field(default_factory=SettingsOptions)

    def run(self) -> None:
        reports.check_installed()
        settings = checked(evaluation.Settings, self.settings)
        data, _ = self.images.load("test", known=self.classifier.preprocessing)
        model = self.classifier.load(len(data.classes))
        title = f"Misclassification detection: {self.classifier.name} on {self.images.data}"
        if self.classifier.views:
            title += f", averaged over views ({', '.join(self.classifier.views)})"
        if self.ood is not None:
            preprocessing = datasets.preprocessing_of(data)
            outliers = self.images.load_other(self.ood, "test", preprocessing)
            data = datasets.with_outliers(data, outliers)
            title += f" with {self.ood} as errors"
        with self.where.use() as (device, _):
            result = evaluation.evaluate(
                model.to(device),
                data,
                settings,
                self.out,
                resume=self.resume,
                workers=self.images.workers,
            )
        if result is not None:
            about = {"data set": self.images.data, "model": self.classifier.name}
            verdict = evaluation.write(
                result, title, self.out, data=data, command=command_line.get(), about=about
            )
            shown = evaluation.table(result)
            accuracy = 100 * result.correct.double().mean()
            print(f"Accuracy {accuracy:.2f} % of {len(result.target):,} images.")
            print(f"\n{shown.text()}\n\n{shown.caption} A star marks the best of a column.")
            print("\n".join(verdict))
            print(f"\n{evaluation.costs(result).text()}")
            print(f"\nReport: {self.out / 'index.html'}")
