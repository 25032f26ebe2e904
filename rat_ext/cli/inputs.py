"""What several commands take: data, a device, a model; and the options for them."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

import torch
import torch.distributed as dist

from .. import datasets, models
from ..datasets import batches
from ..search.options import OPTIONS, SearchOptions

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of a description as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Not given, a flag, or an empty list; but 0 is a default like any other.
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def add_fields(group: argparse._ArgumentGroup, settings: type, helps: dict[str, str]) -> None:
    """An option for each field of a dataclass."""
    for field in fields(settings):
        flag, text = f"--{field.name.replace('_', '-')}", helps[field.name]
        if isinstance(field.default, bool):
            group.add_argument(flag, action="store_true", help=text)
        else:
            group.add_argument(flag, type=type(field.default), default=field.default, help=text)


def add_search_options(parser: argparse._ActionsContainer, *names: str) -> None:
    """Options of `robust_radius`, by their definitions."""
    for name in names:
        option = OPTIONS[name]
        kind = option.type
        if get_origin(kind) in (Union, UnionType):  # the first is what a command line can give
            kind = get_args(kind)[0]
        flag = f"--{name.replace('_', '-')}"
        how: dict[str, Any] = {"type": kind}
        if get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        elif get_origin(kind) is tuple:
            how = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        elif kind is bool:
            flag, how = f"--no-{name}", {"dest": name, "action": "store_const", "const": False}
        text = (option.flag_help or option.help).rstrip(".").replace("`", "").replace("%", "%%")
        parser.add_argument(flag, default=option.default, help=text, **how)


def search_options(options: argparse.Namespace, *names: str) -> SearchOptions:
    """What was given for the options that `add_search_options` added."""
    given: Any = {name: getattr(options, name) for name in names}
    given["bounds"] = tuple(options.bounds)
    search: SearchOptions = given
    return search


def add_data(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--limit",
        type=int,
        help="use this many images: a random sample, with its share of each class (default: all)",
    )
    parser.add_argument(
        "--sample-seed",
        type=int,
        default=0,
        help="seed of the random order from which --limit takes the first images",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that load data beside the main one"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: as torch is set)")


def add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    where = "" if required else " (default: that of the checkpoint)"
    parser.add_argument(
        "--model",
        required=required,
        help="digits-cnn, resnet20, resnet56, resnet110, wrn-28-10, torchvision:NAME, timm:NAME or "
        f"MODULE:FUNCTION, a function from the number of classes to the model{where}",
    )
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="use the pretrained weights of torchvision or timm",
    )


def add_classifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="weights of the model")
    add_model(parser, required=False)


def model_name(options: argparse.Namespace) -> str:
    if options.checkpoint is None and not options.pretrained:
        raise ValueError("give the --checkpoint of the model, or --pretrained")
    name = options.model or (models.name_in(options.checkpoint) if options.checkpoint else None)
    if name is None:
        raise ValueError("the checkpoint does not name its model: give --model")
    return name


def load_classifier(options: argparse.Namespace, num_classes: int) -> tuple[str, torch.nn.Module]:
    """The name of the trained model that was asked for, and the model."""
    name = model_name(options)
    model = models.create(
        name, num_classes, pretrained=options.pretrained and not options.checkpoint
    )
    if options.checkpoint is not None:
        models.load_weights(model, options.checkpoint)
    return name, model.eval()


def make_loader(options: argparse.Namespace, data: Any, device: torch.device) -> Any:
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; it must be at least 1")
    parts = [part.tolist() for part in torch.arange(len(data)).split(options.batch_size)]
    return batches(data, parts, options.workers, device)


def load_data(options: argparse.Namespace, split: str) -> Any:
    """The images that were asked for."""
    return load_part(options, split)[0]


def load_part(options: argparse.Namespace, split: str) -> tuple[Any, Sequence[int]]:
    """The images that were asked for, and their indices in the data set, which ascend.

    The first images would be those of the first classes where a data set is sorted by class.
    """
    data = datasets.load(options.data, split, options.root, download=options.download)
    skip = getattr(options, "skip", 0)
    if not 0 <= skip < len(data):
        raise ValueError(f"skip is {skip}; it must be from 0 to {len(data) - 1}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit is {options.limit}; it must be at least 1")
    if not skip and options.limit is None:
        return data, range(len(data))
    order = datasets.shuffled(data, options.sample_seed)
    index = order[skip:][: options.limit].sort().values.tolist()
    return datasets.subset(data, index), index


@contextlib.contextmanager
def use_device(options: argparse.Namespace) -> Iterator[tuple[torch.device, int]]:
    """The device of this process, and its rank under torchrun (else 0)."""
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
