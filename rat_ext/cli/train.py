"""rat-ext train"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from tyro.conf import arg

from .. import datasets, models
from ..training import Recipe, train
from ..training import recipe as recipe_of
from ..training.checkpoint import write_tensors
from .inputs import MODEL, PRETRAINED, Data, Device, Flag, OptionalFile, OptionalName, checked


@dataclass(frozen=True)
class RecipeOptions(Recipe):
    # Of a flag that can be switched off, too: another recipe may have it on.
    bf16: Annotated[bool, arg(help_behavior_hint="")] = False

    def __post_init__(self) -> None:
        """Not checked yet: an error is to be that of the command."""


@dataclass(frozen=True)
class Train:
    """Train a classifier with the RAT loss or plainly.

    Each epoch ends with a checkpoint in the output folder; after an interruption the same command
    goes on from the last one, exactly. On several devices: torchrun --nproc-per-node=2 -m rat_ext
    train ...
    """

    after_interrupt: ClassVar[str] = "; the same command goes on from the last epoch"

    out: Path
    """folder to write to"""
    model: Annotated[str, arg(help=MODEL)]
    images: Data
    pretrained: Annotated[Flag, arg(help=PRETRAINED)] = False
    start: Annotated[OptionalFile, arg(name="from")] = None
    """checkpoint to fine-tune"""
    tensorboard: Flag = False
    """log to OUT/tensorboard, too"""
    preset: Annotated[OptionalName, arg(name="recipe", metavar="NAME|FILE.toml")] = None
    """recipe whose values are the defaults of the options below: plain, rat, rat-paper, fmfp,
    rat-fmfp, crl, or a TOML file (default: rat)"""
    where: Device = field(default_factory=Device)
    recipe: RecipeOptions = field(default_factory=RecipeOptions)

    def with_defaults(self) -> Train:
        """The command with the recipe that --recipe names in the place of its own."""
        assert self.preset is not None
        return replace(self, recipe=RecipeOptions(**asdict(recipe_of(self.preset))))

    def run(self) -> None:
        recipe = checked(Recipe, self.recipe)
        known = models.preprocessing_in(self.start) if self.start else None
        known = known or models.preprocessing(self.model, pretrained=self.pretrained)
        (data, _), (test, _) = (self.images.load(split, known=known) for split in ("train", "test"))
        torch.manual_seed(recipe.seed)
        model = models.create(
            self.model, len(data.classes), pretrained=self.pretrained, new_head=True
        )
        if self.start:
            models.load_weights(model, self.start)
        with self.where.use() as (device, rank):
            model.to(device)
            result = train(
                model,
                data,
                recipe,
                validation=test,
                out=self.out,
                name=self.model,
                workers=self.images.workers,
                tensorboard=self.tensorboard,
            )
            if rank:
                return
            preprocessing = datasets.preprocessing_of(data)
            state = {
                "state_dict": model.state_dict(),
                "model": self.model,
                "classes": list(data.classes),
                "preprocessing": preprocessing.to_dict() if preprocessing else None,
            }
            path = self.out / "model.pt"
            write_tensors(path, state)
            # Of a run that train() began without a validation, and that was finished, there is
            # none.
            accuracy = result.history[-1].get("validation_accuracy")
            shown = "" if accuracy is None else f"Test accuracy {100 * accuracy:.2f} %. "
            print(f"{shown}Model: {path}")
