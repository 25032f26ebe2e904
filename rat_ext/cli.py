"""The command line: rat-ext COMMAND. Modules that a command needs are imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, or 2 for an error of the user's, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"rat-ext {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rat-ext {options.command}: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rat-ext",
        description="Robust radii of PyTorch classifiers, and misclassification detection by them.",
    )
    parser.set_defaults(after_interrupt="")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_demo(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_radii(commands)
    _add_detector(commands)
    _add_serve(commands)
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of a description as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="what was built and what is usable here")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    from ._build import format_build_info

    print(format_build_info())


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="the method on handwritten digits: a table and an HTML report",
        description="Trains small networks on scikit-learn's handwritten digits, plainly and with "
        "RAT, and tells how well MSR, RR-Fast and RR-BS find their wrong predictions.",
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=_demo)
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write to")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one pair of networks each"
    )
    parser.add_argument("--train-size", type=int, default=500, help="images to train on")
    parser.add_argument("--epochs", type=int, default=40, help="of training")
    parser.add_argument("--eps", type=float, default=0.1, help="size of the RAT perturbation")
    parser.add_argument("--lam", type=float, default=1.0, help="weight of the RAT loss's term")


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    settings = demo.Settings(
        seeds=tuple(options.seeds),
        train_size=options.train_size,
        epochs=options.epochs,
        eps=options.eps,
        lam=options.lam,
    )
    demo.main(settings, options.out)


_RECIPE_HELP = {
    "loss": "rat, or ce for plain cross-entropy",
    "eps": "size of the RAT perturbation, pixels being in [0, 1]",
    "lam": "weight of the RAT loss's perturbed term",
    "steps": "of the RAT loss's inner loop: 1 for FGSM, more for PGD",
    "epochs": "of training",
    "batch_size": "of all processes together",
    "optimizer": "sgd (with Nesterov momentum) or adamw",
    "lr": "highest learning rate",
    "momentum": "of SGD",
    "weight_decay": "of the optimizer",
    "warmup": "epochs in which the learning rate rises; then it falls along a cosine",
    "augment": "none, crop (random shifts), or crop-flip",
    "mixup": "parameter of mixup's Beta distribution; 0 for no mixup",
    "mixup_off": "last epochs without mixup",
    "bf16": "autocast to bfloat16",
    "ema": "decay of an average of the weights, which is then the result; 0 for none",
    "seed": "of the initial weights, and all that is random in training",
}


def _add_train(commands: argparse._SubParsersAction) -> None:
    from .training import Recipe

    parser = commands.add_parser(
        "train",
        help="train a classifier with the RAT loss or plainly",
        description="Trains a classifier. Each epoch ends with a checkpoint in the output folder; "
        "after an\ninterruption the same command goes on from the last one, exactly. On several "
        "devices:\n\n  torchrun --nproc-per-node=2 -m rat_ext train ...",
        formatter_class=_Formatter,
    )
    parser.set_defaults(
        run=_train, after_interrupt="; the same command goes on from the last epoch"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    _add_data(parser)
    _add_model(parser, required=True)
    parser.add_argument("--from", dest="start", type=Path, help="checkpoint to fine-tune")
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard, too")
    _add_fields(parser.add_argument_group("recipe"), Recipe, _RECIPE_HELP)


def _add_fields(group: argparse._ArgumentGroup, settings: type, helps: dict[str, str]) -> None:
    """An option for each field of a dataclass."""
    for field in fields(settings):
        flag, text = f"--{field.name.replace('_', '-')}", helps[field.name]
        if isinstance(field.default, bool):
            group.add_argument(flag, action="store_true", help=text)
        else:
            group.add_argument(flag, type=type(field.default), default=field.default, help=text)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        help="digits, cifar10, cifar100, svhn, imagenet, cifar10-c:fog:3, cifar100-c:fog:3, "
        "imagenet-c:fog:3, folder:PATH or npz:PATH",
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of data sets")
    parser.add_argument(
        "--download", action="store_true", help="let torchvision download the data set"
    )
    parser.add_argument("--limit", type=int, help="use only the first images")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: one for each core)")


def _add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    where = "" if required else " (default: that of the checkpoint)"
    parser.add_argument(
        "--model",
        required=required,
        help="digits-cnn, resnet20, resnet56, resnet110, wrn-28-10, torchvision:NAME, timm:NAME or "
        f"MODULE:FUNCTION, a function from the number of classes to the model{where}",
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="weights of torchvision or timm to begin with"
    )


def _add_classifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="weights of the model")
    _add_model(parser, required=False)


def _model_name(options: argparse.Namespace) -> str:
    from . import models

    if options.checkpoint is None and not options.pretrained:
        raise ValueError("give the --checkpoint of the model, or --pretrained")
    name = options.model or (models.name_in(options.checkpoint) if options.checkpoint else None)
    if name is None:
        raise ValueError("the checkpoint does not name its model: give --model")
    return name


def _classifier(options: argparse.Namespace, num_classes: int) -> tuple[str, torch.nn.Module]:
    """The name of the trained model that was asked for, and the model."""
    from . import models

    name = _model_name(options)
    model = models.create(name, num_classes, pretrained=options.pretrained)
    if options.checkpoint is not None:
        models.load_weights(model, options.checkpoint)
    return name, model.eval()


def _train(options: argparse.Namespace) -> None:
    import torch

    from . import models
    from .training import Recipe, replace, train

    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    data, test = _data(options, "train"), _data(options, "test")
    torch.manual_seed(recipe.seed)
    model = models.create(options.model, len(data.classes), pretrained=options.pretrained)
    if options.start:
        models.load_weights(model, options.start)
    with _device(options) as (device, rank):
        model.to(device)
        result = train(
            model,
            data,
            recipe,
            validation=test,
            out=options.out,
            workers=options.workers,
            tensorboard=options.tensorboard,
        )
        if rank:
            return
        state = {
            "state_dict": model.state_dict(),
            "model": options.model,
            "classes": list(data.classes),
        }
        path = options.out / "model.pt"
        replace(path, lambda temporary: torch.save(state, temporary))
        accuracy = result.history[-1]["validation_accuracy"]
        print(f"Test accuracy {100 * accuracy:.2f} %. Model: {path}")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    from .evaluation import Settings

    default = Settings()
    parser = commands.add_parser(
        "evaluate",
        help="how well confidence scores find a classifier's wrong predictions",
        description="Fits confidence scores on one part of the test images and tests them on the "
        "rest, for\nseveral random splits; writes results.csv, results.json and index.html. On "
        "several devices:\n\n  torchrun --nproc-per-node=2 -m rat_ext evaluate ...",
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=_evaluate, after_interrupt="; with --resume the command goes on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    _add_classifier(parser)
    _add_data(parser)
    parser.add_argument("--ood", help="a data set whose images are mixed in and count as errors")
    parser.add_argument(
        "--scores", nargs="+", default=[], metavar="SCORE", help="names (default: all)"
    )
    parser.add_argument("--splits", type=int, default=default.splits, help="random splits")
    parser.add_argument(
        "--validation-share",
        type=float,
        default=default.validation_share,
        help="of the images, to choose temperatures and perturbations on",
    )
    parser.add_argument(
        "--tune",
        choices=["all", "temperature", "none"],
        default=default.tune,
        help="what is chosen: temperature and input perturbation, or less",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the splits")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="of images")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an evaluation that was interrupted"
    )


def _evaluate(options: argparse.Namespace) -> None:
    from . import datasets, evaluation

    settings = evaluation.Settings(
        scores=tuple(options.scores),
        splits=options.splits,
        validation_share=options.validation_share,
        tune=options.tune,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    data = _data(options, "test")
    name, model = _classifier(options, len(data.classes))
    title = f"Misclassification detection: {name} on {options.data}"
    if options.ood is not None:
        outliers = datasets.load(options.ood, "test", options.root, download=options.download)
        data = datasets.with_outliers(data, outliers)
        title += f" with {options.ood} as errors"
    with _device(options) as (device, _):
        result = evaluation.evaluate(
            model.to(device),
            data,
            settings,
            options.out,
            resume=options.resume,
            workers=options.workers,
        )
    if result is not None:
        evaluation.write(result, title, options.out)
        shown = evaluation.table(result)
        accuracy = 100 * result.correct.double().mean()
        print(f"Accuracy {accuracy:.2f} % of {len(result.target):,} images.")
        print(f"\n{shown.text()}\n\n{shown.caption} A star marks the best of a column.")
        print(f"\n{evaluation.costs(result).text()}")
        print(f"\nReport: {options.out / 'index.html'}")


def _add_radii(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "radii",
        help="the robust radius of every image of a data set, to files",
        description="Writes radii, predictions and targets to the output folder, in files of some "
        "batches\neach; rat_ext.RadiusShards reads them. On several devices:\n\n"
        "  torchrun --nproc-per-node=2 -m rat_ext radii ...",
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=_radii, after_interrupt="; with --resume the command goes on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    _add_classifier(parser)
    _add_data(parser)
    parser.add_argument("--split", choices=["test", "train"], default="test", help="of the data")
    parser.add_argument(
        "--method", choices=["bs", "fast"], default="bs", help="of the search: RR-BS or RR-Fast"
    )
    parser.add_argument("--rtol", type=float, default=1e-2, help="relative width of a bracket")
    parser.add_argument("--temperature", type=float, default=1.0, help="that directs the ray")
    parser.add_argument("--batch-size", type=int, default=250, help="of images")
    parser.add_argument(
        "--batches-per-shard", type=int, default=16, help="batches whose results share a file"
    )
    parser.add_argument("--format", choices=["npz", "parquet"], default="npz", help="of the files")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was interrupted"
    )


def _radii(options: argparse.Namespace) -> None:
    from .radius import robust_radii

    data = _data(options, options.split)
    _, model = _classifier(options, len(data.classes))
    with _device(options) as (device, rank):
        shards = robust_radii(
            model.to(device).eval(),
            _loader(options, data, device),
            out=options.out,
            resume=options.resume,
            batches_per_shard=options.batches_per_shard,
            format=options.format,
            method=options.method,
            rtol=options.rtol,
            temperature=options.temperature,
        )
    if rank:
        return
    radii = shards.load()
    right = radii.prediction == radii.target
    print(f"Accuracy {100 * right.double().mean():.2f} % of {len(right):,} images.")
    for name, which in (("right", right), ("wrong", ~right)):
        if which.any():
            print(f"Median radius of the {name} predictions: {radii.radius[which].median():.4g}")
    print(f"Radii: {options.out}, {len(shards)} {options.format} file(s)")


def _add_detector(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "detector", help="fit a gate that accepts trustworthy predictions, or put it to use"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="fit|apply")

    fit = actions.add_parser(
        "fit",
        help="choose the threshold of a score on test images",
        description="Chooses the threshold of a confidence score on test images; see "
        "rat_ext.Detector.fit for\nwhat is guaranteed. Exactly one of --target-risk, --coverage "
        "and --tpr is needed.",
        formatter_class=_Formatter,
    )
    fit.set_defaults(run=_fit_detector)
    fit.add_argument("--out", type=Path, required=True, help="file to write: .safetensors")
    _add_classifier(fit)
    _add_detector_data(fit)
    fit.add_argument("--score", default="rr-bs", help="name of the confidence score")
    fit.add_argument("--cascade", metavar="CHEAP", help="use this score where it will do")
    criterion = fit.add_mutually_exclusive_group(required=True)
    criterion.add_argument("--target-risk", type=float, help="error rate of what is accepted")
    criterion.add_argument("--coverage", type=float, help="share of the images to accept")
    criterion.add_argument("--tpr", type=float, help="share of right predictions to accept")
    fit.add_argument("--delta", type=float, default=0.001, help="chance that a bound fails")
    fit.add_argument("--tune-share", type=float, default=0.2, help="of the images, for the score")
    fit.add_argument("--calibrate", action="store_true", help="give probabilities, too")
    fit.add_argument("--seed", type=int, default=0, help="of the split for the score")

    apply = actions.add_parser(
        "apply",
        help="predict test images, and decide which predictions to accept",
        description="Writes a CSV file of predictions, confidences and decisions.",
        formatter_class=_Formatter,
    )
    apply.set_defaults(run=_apply_detector)
    apply.add_argument("--detector", type=Path, required=True, help="file that fit has written")
    apply.add_argument("--out", type=Path, required=True, help="file to write: .csv")
    _add_classifier(apply)
    _add_detector_data(apply)


def _add_detector_data(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first images")
    parser.add_argument("--batch-size", type=int, default=250, help="of images")


def _fit_detector(options: argparse.Namespace) -> None:
    from .cascade import Cascade
    from .detector import Detector, require_safetensors

    require_safetensors()  # rather than after the work
    options.out.parent.mkdir(parents=True, exist_ok=True)
    score = Cascade(options.cascade, options.score) if options.cascade else options.score
    data = _data(options, "test")
    _, model = _classifier(options, len(data.classes))
    with _device(options) as (device, _):
        detector = Detector.fit(
            model.to(device),
            _loader(options, data, device),
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
    import csv

    from .detector import Detector
    from .scores import labelled_batches
    from .training import replace

    data = _data(options, "test")
    _, model = _classifier(options, len(data.classes))
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
                for index, row in enumerate(values, start=options.skip + rows):
                    writer.writerow([index, *(int(v) if isinstance(v, bool) else v for v in row)])
                rows += len(out)
                accepted += int(out.accepted.sum())
                errors += int((out.prediction != target)[out.accepted].sum())

    with _device(options) as (device, _):
        loader = _loader(options, data, device)
        detector = Detector.load(options.detector, model.to(device))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace(options.out, write)
    wrong = f"; {100 * errors / accepted:.2f} % of these are wrong" if accepted else ""
    share = f"{100 * accepted / rows:.2f} %"
    print(f"Accepted {accepted:,} of {rows:,} images ({share}){wrong}. Decisions: {options.out}")


def _loader(options: argparse.Namespace, data: Any, device: torch.device) -> Any:
    import torch

    from .datasets import batches

    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; it must be at least 1")
    parts = [part.tolist() for part in torch.arange(len(data)).split(options.batch_size)]
    return batches(data, parts, options.workers, device)


_SERVE_HELP = {
    "max_batch": "most inputs that the model runs on together",
    "max_wait_ms": "how long the first input of a batch waits for others",
    "queue": "inputs that may wait for the model; more are refused (503)",
    "timeout": "seconds from a complete request to its answer (504)",
    "body_timeout": "seconds in which a client must have sent its request (408)",
    "max_body": "bytes of a request (413)",
    "max_pixels": "of an image, however small its file is (413)",
    "connections": "open at the same time; more are refused (503)",
}


def _add_serve(commands: argparse._SubParsersAction) -> None:
    from .serve import Settings

    parser = commands.add_parser(
        "serve",
        help="predictions over HTTP, each with its radius and a verdict",
        description="Serves a classifier: POST an image or a tensor to /predict. There is a page "
        "to try it at /,\nmetrics at /metrics, and no authentication: see the guide before you "
        "listen on more than\nthis machine.",
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=_serve)
    _add_classifier(parser)
    _add_device(parser)
    parser.add_argument(
        "--num-classes", type=int, help="of the model (default: as many as there are names)"
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
    parser.add_argument(
        "--bounds",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="of the model's inputs",
    )
    parser.add_argument(
        "--method",
        choices=["bs", "fast"],
        default="bs",
        help="how radii are measured, unless the detector goes by a radius of its own",
    )
    parser.add_argument("--rtol", type=float, default=1e-2, help="relative tolerance of radii")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the radius's direction")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="name or address to listen on")
    group.add_argument("--port", type=int, default=8000, help="0 for a free one")
    group.add_argument("--access-log", action="store_true", help="log every request")
    _add_fields(group, Settings, _SERVE_HELP)


def _serve(options: argparse.Namespace) -> None:
    from . import models
    from ._options import Options
    from .serve import Settings

    try:
        from .serve import app, server
        from .serve.decoding import Decoder
        from .serve.gate import Gate
    except ModuleNotFoundError as error:
        raise ImportError(f"serving needs {error.name}: pip install 'rat-ext[serve]'") from error
    import torch

    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    name = _model_name(options)
    shape = _input_size(options.input_size) if options.input_size else models.input_size(name)
    if shape is None:
        raise ValueError(f"give the --input-size of {name}, for example 3x224x224")
    classes = _class_names(options)
    _, model = _classifier(options, _num_classes(options, classes))
    with _device(options) as (device, _):
        model.to(device)
        parameter = next(model.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        bounds = tuple(options.bounds)
        search = {
            "method": options.method,
            "rtol": options.rtol,
            "temperature": options.temperature,
            "bounds": bounds,
        }
        Options.checked(torch.empty(1, *shape, dtype=dtype), **search)
        detector = None
        if options.detector is not None:
            from .detector import Detector

            detector = Detector.load(options.detector, model)
        gate = Gate(model, detector, not options.no_radius, device, search)
        gate.warm_up(shape, dtype)
        decoder = Decoder(shape, dtype, bounds, options.resize, settings.max_pixels)
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
        raise ValueError(f"input-size is {text!r}; expected sizes such as 3x224x224")
    return shape


def _class_names(options: argparse.Namespace) -> tuple[str, ...] | None:
    from . import models

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
        raise ValueError(f"num-classes is {number}, but there are {len(classes)} names of classes")
    return number


def _data(options: argparse.Namespace, split: str) -> Any:
    from . import datasets

    data = datasets.load(options.data, split, options.root, download=options.download)
    skip = getattr(options, "skip", 0)
    if not 0 <= skip < len(data):
        raise ValueError(f"skip is {skip}; it must be from 0 to {len(data) - 1}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit is {options.limit}; it must be at least 1")
    if skip or options.limit is not None:
        data = datasets.first(data, options.limit or len(data), skip)
    return data


@contextlib.contextmanager
def _device(options: argparse.Namespace) -> Iterator[tuple[torch.device, int]]:
    """The device of this process, and its rank under torchrun (else 0)."""
    import torch
    import torch.distributed as dist

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is usable here (see rat-ext info); use --device cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device, 0
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank()
    finally:
        dist.destroy_process_group()
