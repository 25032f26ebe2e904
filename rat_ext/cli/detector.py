"""rat-ext detector"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg, create_mutex_group, subcommand

from .._common.loaders import labelled_batches
from .._common.storage import write_whole
from ..detector import Detector
from ..detector.file import require_safetensors
from ..scores import Cascade
from .inputs import Classifier, Data, Device, Flag, OptionalFloat, OptionalName

Criterion = create_mutex_group(required=True, title="what to reach (exactly one)")


@dataclass(frozen=True)
class Fit:
    """Choose the threshold of a score on test images.

    See rat_ext.Detector.fit for what is guaranteed. To fit on some images and apply the detector to
    the others: fit --limit 2000, then apply --skip 2000.
    """

    out: Path
    """file to write: .safetensors"""
    images: Data
    classifier: Classifier = field(default_factory=Classifier)
    target_risk: Annotated[OptionalFloat, Criterion] = None
    """highest error rate among the accepted predictions"""
    coverage: Annotated[OptionalFloat, Criterion] = None
    """share of the images to accept"""
    tpr: Annotated[OptionalFloat, Criterion] = None
    """share of right predictions to accept"""
    score: str = "rr-bs"
    """name of the confidence score, or auto: the best of several"""
    cascade: OptionalName = None
    """cheap score to use wherever it settles the decision"""
    delta: float = 0.001
    """probability with which the bound may fail"""
    tune_share: float = 0.2
    """share of the images on which the score itself is fitted"""
    calibrate: Flag = False
    """also give the probability that a prediction is right"""
    seed: int = 0
    """seed of the choice of those images"""
    skip: int = 0
    """leave out this many images: those that the same --limit without --skip takes"""
    batch_size: int = 250
    """images in a batch"""
    where: Device = field(default_factory=Device)

    def run(self) -> None:
        require_safetensors()  # rather than after the work
        self.out.parent.mkdir(parents=True, exist_ok=True)
        score = Cascade(self.cascade, self.score) if self.cascade else self.score
        data, _ = self.images.load("test", self.skip, known=self.classifier.preprocessing)
        model = self.classifier.load(len(data.classes))
        with self.where.use() as (device, _):
            detector = Detector.fit(
                model.to(device),
                self.images.loader(data, self.batch_size, device),
                score,
                target_risk=self.target_risk,
                coverage=self.coverage,
                tpr=self.tpr,
                delta=self.delta,
                tune_share=self.tune_share,
                calibrate=self.calibrate,
                seed=self.seed,
            )
        detector.save(self.out)
        print(f"{detector.report}\nDetector: {self.out}")


@dataclass(frozen=True)
class Apply:
    """Predict test images, and decide which predictions to accept.

    Writes a CSV file of predictions, confidences and decisions; index is that in the data set.
    --skip 2000 leaves out just the images that fit --limit 2000 has used, if --data and
    --sample-seed are the same.
    """

    detector: Annotated[Path, arg(metavar="FILE")]
    """file that fit has written"""
    out: Annotated[Path, arg(metavar="FILE")]
    """file to write: .csv"""
    images: Data
    classifier: Classifier = field(default_factory=Classifier)
    skip: int = 0
    """leave out this many images: those that the same --limit without --skip takes"""
    batch_size: int = 250
    """images in a batch"""
    where: Device = field(default_factory=Device)

    def run(self) -> None:
        data, index = self.images.load("test", self.skip, known=self.classifier.preprocessing)
        model = self.classifier.load(len(data.classes))
        rows = accepted = errors = 0

        def write(path: Path) -> None:
            nonlocal rows, accepted, errors
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                names = ["prediction", "confidence", "accepted"]
                names += ["probability"] if detector.calibrated else []
                writer.writerow(["index", *names, "target"])
                for _, x, target in labelled_batches(model, loader, True, "detector"):
                    out = detector(x)
                    columns = [getattr(out, name) for name in names] + [target]
                    values = zip(*(column.tolist() for column in columns), strict=True)
                    numbered = zip(index[rows : rows + len(out)], values, strict=True)
                    for number, row in numbered:
                        cells = (int(v) if isinstance(v, bool) else v for v in row)
                        writer.writerow([number, *cells])
                    rows += len(out)
                    accepted += int(out.accepted.sum())
                    errors += int((out.prediction != target)[out.accepted].sum())

        with self.where.use() as (device, _):
            loader = self.images.loader(data, self.batch_size, device)
            detector = Detector.load(self.detector, model.to(device))
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.out, write)
        wrong = f"; {100 * errors / accepted:.2f} % of these are wrong" if accepted else ""
        share = f"{100 * accepted / rows:.2f} %"
        print(f"Accepted {accepted:,} of {rows:,} images ({share}){wrong}. Decisions: {self.out}")


@dataclass(frozen=True)
class DetectorCommand:
    """Fit a gate that accepts trustworthy predictions, or put it to use."""

    action: Annotated[Fit, subcommand("fit")] | Annotated[Apply, subcommand("apply")]

    def run(self) -> None:
        self.action.run()
