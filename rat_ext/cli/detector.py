"""rat-ext detector"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from .._common.loaders import labelled_batches
from .._common.storage import write_whole
from ..detector import Detector
from ..detector.file import require_safetensors
from ..scores import Cascade
from .inputs import (
    Commands,
    Formatter,
    add_classifier,
    add_data,
    load_classifier,
    load_data,
    load_part,
    make_loader,
    use_device,
)


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "detector", help="fit a gate that accepts trustworthy predictions, or put it to use"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="fit|apply")

    fit = actions.add_parser(
        "fit",
        help="choose the threshold of a score on test images",
        description="Chooses the threshold of a confidence score on test images; see "
        "rat_ext.Detector.fit for\nwhat is guaranteed. Exactly one of --target-risk, --coverage "
        "and --tpr is needed. To fit\non some images and apply the detector to the others: "
        "fit --limit 2000, then apply --skip 2000.",
        formatter_class=Formatter,
    )
    fit.set_defaults(run=_fit_detector)
    fit.add_argument("--out", type=Path, required=True, help="file to write: .safetensors")
    add_classifier(fit)
    _add_detector_data(fit)
    fit.add_argument(
        "--score",
        default="rr-bs",
        help="name of the confidence score, or auto: the best of several",
    )
    fit.add_argument(
        "--cascade", metavar="CHEAP", help="cheap score to use wherever it settles the decision"
    )
    criterion = fit.add_mutually_exclusive_group(required=True)
    criterion.add_argument(
        "--target-risk", type=float, help="highest error rate among the accepted predictions"
    )
    criterion.add_argument("--coverage", type=float, help="share of the images to accept")
    criterion.add_argument("--tpr", type=float, help="share of right predictions to accept")
    fit.add_argument(
        "--delta", type=float, default=0.001, help="probability with which the bound may fail"
    )
    fit.add_argument(
        "--tune-share",
        type=float,
        default=0.2,
        help="share of the images on which the score itself is fitted",
    )
    fit.add_argument(
        "--calibrate",
        action="store_true",
        help="also give the probability that a prediction is right",
    )
    fit.add_argument("--seed", type=int, default=0, help="seed of the choice of those images")

    apply = actions.add_parser(
        "apply",
        help="predict test images, and decide which predictions to accept",
        description="Writes a CSV file of predictions, confidences and decisions; index is that in "
        "the data set.\n--skip 2000 leaves out just the images that fit --limit 2000 has used, if "
        "--data and\n--sample-seed are the same.",
        formatter_class=Formatter,
    )
    apply.set_defaults(run=_apply_detector)
    apply.add_argument("--detector", type=Path, required=True, help="file that fit has written")
    apply.add_argument("--out", type=Path, required=True, help="file to write: .csv")
    add_classifier(apply)
    _add_detector_data(apply)


def _add_detector_data(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        help="leave out this many images: those that the same --limit without --skip takes",
    )
    parser.add_argument("--batch-size", type=int, default=250, help="images in a batch")


def _fit_detector(options: argparse.Namespace) -> None:
    require_safetensors()  # rather than after the work
    options.out.parent.mkdir(parents=True, exist_ok=True)
    score = Cascade(options.cascade, options.score) if options.cascade else options.score
    data = load_data(options, "test")
    _, model = load_classifier(options, len(data.classes))
    with use_device(options) as (device, _):
        detector = Detector.fit(
            model.to(device),
            make_loader(options, data, device),
            score,
            target_risk=options.target_risk,
            coverage=options.coverage,
            tpr=options.tpr,
            delta=options.delta,
            tune_share=options.tune_share,
            calibrate=options.calibrate,
            seed=options.seed,
        )
    detector.save(options.out)
    print(f"{detector.report}\nDetector: {options.out}")


def _apply_detector(options: argparse.Namespace) -> None:
    data, index = load_part(options, "test")
    _, model = load_classifier(options, len(data.classes))
    rows = accepted = errors = 0

    def write(path: Path) -> None:
        nonlocal rows, accepted, errors
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            names = ["prediction", "confidence", "accepted"]
            names += ["probability"] if detector.calibrated else []
            writer.writerow(["index", *names, "target"])
            for x, target in labelled_batches(model, loader, True, "detector"):
                out = detector(x)
                columns = [getattr(out, name) for name in names] + [target]
                values = zip(*(column.tolist() for column in columns), strict=True)
                for number, row in zip(index[rows : rows + len(out)], values, strict=True):
                    writer.writerow([number, *(int(v) if isinstance(v, bool) else v for v in row)])
                rows += len(out)
                accepted += int(out.accepted.sum())
                errors += int((out.prediction != target)[out.accepted].sum())

    with use_device(options) as (device, _):
        loader = make_loader(options, data, device)
        detector = Detector.load(options.detector, model.to(device))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, write)
    wrong = f"; {100 * errors / accepted:.2f} % of these are wrong" if accepted else ""
    share = f"{100 * accepted / rows:.2f} %"
    print(f"Accepted {accepted:,} of {rows:,} images ({share}){wrong}. Decisions: {options.out}")
