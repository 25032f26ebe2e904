"""rat-ext train"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from .. import models
from ..training import Recipe, train
from ..training.checkpoint import write_tensors
from .inputs import Commands, Formatter, add_data, add_fields, add_model, load_data, use_device

_RECIPE_HELP = {
    "loss": "rat, or ce for plain cross-entropy",
    "eps": "size of the RAT perturbation, pixels being in [0, 1]",
    "lam": "weight of the RAT loss's perturbed term",
    "steps": "steps of the RAT loss's inner loop: 1 for FGSM, more for PGD",
    "epochs": "how often to go through the training images",
    "batch_size": "images in a training step, of all processes together",
    "optimizer": "sgd (with Nesterov momentum) or adamw",
    "lr": "highest learning rate",
    "momentum": "momentum of SGD",
    "weight_decay": "weight decay of the optimizer",
    "warmup": "epochs in which the learning rate rises; then it falls along a cosine",
    "augment": "how images are varied: none, crop (random shifts), or crop-flip (mirrored as well)",
    "mixup": "parameter of mixup's Beta distribution; 0 for no mixup",
    "mixup_off": "number of last epochs without mixup",
    "bf16": "run the network in bfloat16 (autocast)",
    "ema": "decay of an average of the weights, which is then the result; 0 for none",
    "seed": "seed of the initial weights and of all that is random in training",
}


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a classifier with the RAT loss or plainly",
        description="Trains a classifier. Each epoch ends with a checkpoint in the output folder; "
        "after an\ninterruption the same command goes on from the last one, exactly. On several "
        "devices:\n\n  torchrun --nproc-per-node=2 -m rat_ext train ...",
        formatter_class=Formatter,
    )
    parser.set_defaults(run=run, after_interrupt="; the same command goes on from the last epoch")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    add_data(parser)
    add_model(parser, required=True)
    parser.add_argument("--from", dest="start", type=Path, help="checkpoint to fine-tune")
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard, too")
    add_fields(parser.add_argument_group("recipe"), Recipe, _RECIPE_HELP)


def run(options: argparse.Namespace) -> None:
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    data, test = load_data(options, "train"), load_data(options, "test")
    torch.manual_seed(recipe.seed)
    model = models.create(
        options.model, len(data.classes), pretrained=options.pretrained, new_head=True
    )
    if options.start:
        models.load_weights(model, options.start)
    with use_device(options) as (device, rank):
        model.to(device)
        result = train(
            model,
            data,
            recipe,
            validation=test,
            out=options.out,
            name=options.model,
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
        write_tensors(path, state)
        # Of a run that train() began without a validation, and that was finished, there is none.
        accuracy = result.history[-1].get("validation_accuracy")
        shown = "" if accuracy is None else f"Test accuracy {100 * accuracy:.2f} %. "
        print(f"{shown}Model: {path}")
