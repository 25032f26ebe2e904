"""What several commands take: data, a device, a model, the options of a search."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, cast, get_args, get_origin

import torch
import torch.distributed as dist
from tyro.conf import FlagCreatePairsOff, arg

from .. import datasets, models
from ..datasets import Images, Preprocessing, batches
from ..search.options import OPTIONS, SearchOptions

# What is off or not there unless it is given has no default to show.
Flag = Annotated[bool, FlagCreatePairsOff, arg(help_behavior_hint="")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
OptionalName = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]

command_line: ContextVar[str | None] = ContextVar("command_line", default=None)
"""What was typed, for the reports that tell how they were made."""

_Settings = TypeVar("_Settings")


class Command(Protocol):
    """A command with its options, which are the fields of a dataclass."""

    def run(self) -> None: ...


@dataclass(frozen=True)
class Device:
    """Where a command runs."""

    device: OptionalName = None
    """cpu or cuda (default: cuda if there is one)"""
    threads: OptionalInt = None
    """threads on the CPU (default: as torch is set)"""

    @contextlib.contextmanager
    def use(self) -> Iterator[tuple[torch.device, int]]:
        """The device of this process, and its rank under torchrun (else 0)."""
        if self.threads is not None:
            if self.threads < 1:
                raise ValueError(f"threads is {self.threads}; it must be at least 1")
            torch.set_num_threads(self.threads)
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
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


@dataclass(frozen=True)
class Resizing:
    """How an image of another size is brought to that of the model."""

    crop: OptionalFloat = None
    """share of a resized image that is kept, in its middle (default: as the checkpoint says, else
    the model)"""
    interpolation: Annotated[OptionalName, arg(metavar="BILINEAR|BICUBIC")] = None
    """how it is resized (default: likewise)"""

    def changed(
        self, known: Preprocessing | None, size: tuple[int, ...] | None = None
    ) -> Preprocessing | None:
        """A preprocessing with what was given in the place of what is known."""
        options = {"size": size, "crop": self.crop, "interpolation": self.interpolation}
        given: dict[str, Any] = {
            name: value for name, value in options.items() if value is not None
        }
        if known is not None:
            return replace(known, **given)
        if given and size is None:
            raise ValueError("the model does not say of which size its images are: give --size")
        return Preprocessing(**given) if given else None


@dataclass(frozen=True)
class Data:
    """The images, and how they are loaded."""

    data: str
    """digits, cifar10, cifar100, svhn, imagenet, cifar10-c:fog:3, cifar100-c:fog:3,
    imagenet-c:fog:3, folder:PATH or npz:PATH"""
    root: Path = Path("data")
    """folder of data sets"""
    download: Flag = False
    """let torchvision download the data set"""
    limit: OptionalInt = None
    """use this many images: a random sample, with its share of each class (default: all)"""
    sample_seed: int = 0
    """seed of the random order from which --limit takes the first images"""
    workers: int = 0
    """processes that load data beside the main one"""
    size: Annotated[OptionalName, arg(metavar="SIZE")] = None
    """pixels that the model takes, such as 96 or 3x96x96 (default: as the checkpoint says, else the
    model)"""
    resizing: Resizing = field(default_factory=Resizing)

    def load(
        self, split: str, skip: int = 0, *, known: Preprocessing | None = None
    ) -> tuple[Any, Sequence[int]]:
        """The images that were asked for, and their indices in the data set, which ascend.

        The first images would be those of the first classes where a data set is sorted by class.
        What is known of the model's preprocessing, options may change.
        """
        data = self.load_other(self.data, split, self._preprocessing(known))
        if isinstance(data, Images) and data.preprocessing is not None:
            sizes = f"{_by(data.pixels.shape[1:])} to {_by(data.preprocessing.size)}"
            print(f"The {split} images are resized from {sizes}.", file=sys.stderr)
        if not 0 <= skip < len(data):
            raise ValueError(f"skip is {skip}; it must be from 0 to {len(data) - 1}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")
        if not skip and self.limit is None:
            return data, range(len(data))
        order = datasets.shuffled(data, self.sample_seed)
        index = order[skip:][: self.limit].sort().values.tolist()
        return datasets.subset(data, index), index

    def load_other(self, name: str, split: str, preprocessing: Preprocessing | None) -> Any:
        """All of a data set of another name, from the same folder."""
        return datasets.load(
            name, split, self.root, download=self.download, preprocessing=preprocessing
        )

    def _preprocessing(self, known: Preprocessing | None) -> Preprocessing | None:
        if self.size is None:
            return self.resizing.changed(known)
        size = shape_in(self.size, "size")
        if len(size) == 1:
            size = (known.size[0] if known else 3, *size, *size)
        return self.resizing.changed(known, size)

    def loader(self, data: Any, batch_size: int, device: torch.device) -> Any:
        """Batches of the images, in their order."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        parts = [part.tolist() for part in torch.arange(len(data)).split(batch_size)]
        return batches(data, parts, self.workers, device)


MODEL = (
    "digits-cnn, resnet20, resnet56, resnet110, resnet18, resnet18-w32, wrn-28-10, "
    "torchvision:NAME, timm:NAME or MODULE:FUNCTION, a function from the number of classes to the "
    "model"
)
PRETRAINED = "use the pretrained weights of torchvision or timm"


@dataclass(frozen=True)
class Classifier:
    """A trained model."""

    checkpoint: OptionalFile = None
    """weights of the model"""
    model: Annotated[OptionalName, arg(help=f"{MODEL} (default: that of the checkpoint)")] = None
    pretrained: Annotated[Flag, arg(help=PRETRAINED)] = False
    views: Annotated[tuple[str, ...], arg(metavar="VIEW...", help_behavior_hint="")] = ()
    """average the softmax over each image and views of it: mirrored, or shift:DOWN:RIGHT in pixels,
    such as shift:0:-2"""

    @property
    def name(self) -> str:
        if self.checkpoint is None and not self.pretrained:
            raise ValueError("give the --checkpoint of the model, or --pretrained")
        name = self.model or (models.name_in(self.checkpoint) if self.checkpoint else None)
        if name is None:
            raise ValueError("the checkpoint does not name its model: give --model")
        return name

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What images went through in training, or else that of the model's name."""
        known = models.preprocessing_in(self.checkpoint) if self.checkpoint else None
        return known or models.preprocessing(self.name, pretrained=self._pretrained)

    @property
    def _pretrained(self) -> bool:
        return self.pretrained and not self.checkpoint

    def load(self, num_classes: int) -> torch.nn.Module:
        """The trained model, in eval mode."""
        model = models.create(self.name, num_classes, pretrained=self._pretrained)
        if self.checkpoint is not None:
            models.load_weights(model, self.checkpoint)
        if self.views:
            model = models.ViewAveraged(model, self.views)
        return model.eval()


def shape_in(text: str, option: str) -> tuple[int, ...]:
    """Sizes that are typed like 3x224x224."""
    try:
        shape = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"{option} is {text!r}; expected sizes such as 3x224x224")
    return shape


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def search(*names: str) -> type:
    """A dataclass of options of `robust_radius`, by their definitions; see `searched`."""
    fields = []
    for name in names:
        option = OPTIONS[name]
        kind = option.type
        if get_origin(kind) in (Union, UnionType):  # the first is what a command line can give
            kind = get_args(kind)[0]
        text = (option.flag_help or option.help).replace("`", "")
        how: dict[str, Any] = {"help": text}
        if kind is bool:
            name, kind, default = f"no_{name}", Flag, False
        else:
            default = option.default
            if get_origin(kind) is tuple:
                kind, how["metavar"] = tuple[float, float], "LOW HIGH"
            elif default is None:
                metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__
                how |= {"help_behavior_hint": "", "metavar": metavar.upper()}
                kind = kind | None
        fields.append((name, Annotated[kind, arg(**how)], default))
    return make_dataclass("Search", fields, frozen=True)


def searched(options: Any) -> SearchOptions:
    """What was given for the options of `search`."""
    given = {
        name.removeprefix("no_"): (False if value else None) if name.startswith("no_") else value
        for name, value in vars(options).items()
    }
    return cast(SearchOptions, given)


def checked(settings: type[_Settings], options: object) -> _Settings:
    """The settings that the options of a command stand for."""
    return settings(**vars(options))
