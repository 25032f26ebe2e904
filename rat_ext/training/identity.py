"""What a run was of: its recipe, data and model, told from others when it goes on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._common.storage import raw_bytes
from ..datasets import Images, Labelled
from .recipe import Recipe

_SAMPLES = 32
"""How many samples of a data set are looked at, evenly spread. Each may be a file to decode."""


def of_data(data: Labelled) -> dict[str, Any]:
    """What tells a data set from others: its size, and digests of the labels and pixels of some.

    Of `Images` all labels count. Samples are read twice, from the same random seeds. If that gives
    other pixels, they are random in a way that cannot be seeded, and left out: the digest is None.
    """
    count = len(data)
    index = sorted({round(i) for i in np.linspace(0, count - 1, min(count, _SAMPLES))})
    labels, first = _digests(data, index)
    _, second = _digests(data, index)
    return {"samples": count, "labels": labels, "pixels": first if first == second else None}


def check(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if the state in a checkpoint is of another recipe, preprocessing, data or model.

    What one of the two does not tell, such as a checkpoint of an older version, is not compared.
    """
    # What an older version did not know had the effect of its default.
    recipe = {**asdict(Recipe()), **was["recipe"]}
    for what, changes in (
        ("another recipe", _values(recipe, now["recipe"], list(now["recipe"]))),
        ("another preprocessing", _preprocessing(was, now)),
        ("other data", _data(was, now)),
        ("another model", _model(was, now)),
    ):
        if changes:
            raise ValueError(
                f"{path} is of {what} ({', '.join(changes)}); use the same, or another "
                "output folder"
            )


def _preprocessing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = was.get("preprocessing"), now["preprocessing"]
    return _values(old, new, list(new)) if old and new else []


def _data(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = was.get("data") or {}, now["data"]
    changes = _values(old, new, ["samples"]) if old else []
    if was.get("classes") is not None:
        changes += _classes(list(was["classes"]), list(now["classes"]))
    for part in ("labels", "pixels"):  # of samples that are known to be others: no news
        if not changes and None not in (old.get(part), new[part]) and old[part] != new[part]:
            changes.append(f"its {part} are others")
    return changes


def _classes(old: list[str], new: list[str]) -> list[str]:
    if len(old) != len(new):
        return [f"it had {len(old)} classes, has {len(new)}"]
    others = (i for i in range(len(new)) if old[i] != new[i])
    return [f"class {i} was {old[i]!r}, is {new[i]!r}" for i in others][:1]


def _model(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    named = None not in (was.get("name"), now["name"])
    changes = _values(was, now, ["name"]) if named else []
    old, new = _shapes(was["model"]), _shapes(now["model"])
    others = [key for key in old | new if old.get(key) != new.get(key)]
    changes += [
        f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}" for key in others[:2]
    ]
    return changes + (["..."] if len(others) > 2 else [])


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _values(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    changed = [name for name in names if old.get(name) != new[name]]
    return [f"{name} was {old.get(name)}, is {new[name]}" for name in changed]


def _digests(data: Labelled, index: Sequence[int]) -> tuple[str, str]:
    labels, pixels = hashlib.sha256(), hashlib.sha256()
    if isinstance(data, Images):
        labels.update(raw_bytes(data.targets.long()))
    with _seeded():
        for i in index:
            # Images by their own method: what a subclass adds to it is not their identity.
            x, target = Images.__getitem__(data, i) if isinstance(data, Images) else data[i]
            x = torch.as_tensor(x)
            labels.update(f"{int(target)} ".encode())
            pixels.update(f"{x.dtype} {tuple(x.shape)}".encode())
            pixels.update(raw_bytes(x))
    return labels.hexdigest(), pixels.hexdigest()


@contextmanager
def _seeded() -> Iterator[None]:
    """Everything that a data set may draw from begins anew, and is then put back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.default_generator.manual_seed(0)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
