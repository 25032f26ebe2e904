"""Recipes by name, and from TOML files."""

from __future__ import annotations

import difflib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from .recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LONG: dict[str, Any] = {"augment": "crop-flip", "epochs": 200}
_FMFP: dict[str, Any] = {**_LONG, "sam": 0.05, "swa": 80, "swa_lr": 0.05}

PRESETS: dict[str, Recipe] = {
    "plain": Recipe(loss="ce"),
    "rat": Recipe(),
    # Yan and Weng, arXiv 2503.14783. Its eps, lam and the parameter of its mixup are ours.
    "rat-paper": Recipe(
        epochs=500,
        lr=0.2,
        warmup=5,
        nesterov=False,
        weight_decay=1e-4,
        augment="crop-flip",
        mixup=1.0,
        mixup_off=10,
        rat_on="unmixed",
        clip=False,
    ),
    # Zhu et al., ECCV 2022: SAM, and SWA in the last two fifths.
    "fmfp": Recipe(loss="ce", **_FMFP),
    "rat-fmfp": Recipe(**_FMFP),
    # Moon et al., ICML 2020.
    "crl": Recipe(loss="ce", crl=1.0, **_LONG),
}
"""By the names that ``rat-ext train --recipe`` takes."""


def recipe(name: str | Path) -> Recipe:
    """The recipe of a name in `PRESETS`, or of a TOML file whose keys are the fields of `Recipe`.

    A file may name the preset that it changes: ``recipe = "rat-paper"``.

    Raises:
        ValueError: there is no such recipe; the file is no TOML, or has an unknown key or a value
            out of its range.
        FileNotFoundError: there is no such file.
    """
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    path = Path(name)
    if path.suffix != ".toml":
        raise ValueError(
            f"no recipe is named {str(name)!r}; there are {', '.join(PRESETS)}, and files .toml"
        )
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    base = recipe(values.pop("recipe", "rat"))
    known = {field.name: getattr(base, field.name) for field in fields(Recipe)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; do you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"{path} has the key {key}, which no recipe has{hint}")
        kind = type(known[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{key} in {path} is {value!r}; expected {kind.__name__}")
    return Recipe(**{**known, **values})
