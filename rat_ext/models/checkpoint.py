"""Reads checkpoints: weights, and the names and the preprocessing that lie beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._common.storage import unwrapped, write_whole
from ..datasets import Preprocessing
from .architectures import Normalized

METADATA = "rat_ext"
"""Where a .safetensors file says what model it is of."""


def name_in(path: str | Path) -> str | None:
    """The name of the model in a file of ``rat-ext train``, model.pt or last.pt; None for others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint.
    """
    content = _read(Path(path))
    if not isinstance(content, Mapping):
        return None
    # "name" in last.pt, where "model" has the weights.
    names = (content.get(key) for key in ("name", "model"))
    return next((name for name in names if isinstance(name, str)), None)


def classes_in(path: str | Path) -> tuple[str, ...] | None:
    """The names of the classes in a file of ``rat-ext train`` or `training.train`; else None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint.
    """
    content = _read(Path(path))
    classes = content.get("classes") if isinstance(content, Mapping) else None
    return tuple(map(str, classes)) if isinstance(classes, list) else None


def preprocessing_in(path: str | Path) -> Preprocessing | None:
    """What images went through, in a file of ``rat-ext train`` or `training.train`; else None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or what it has there is no preprocessing.
    """
    content = _read(Path(path))
    values = content.get("preprocessing") if isinstance(content, Mapping) else None
    return Preprocessing.from_dict(values) if isinstance(values, Mapping) else None


def save_weights(
    model: nn.Module,
    path: str | Path,
    *,
    name: str,
    classes: Sequence[str],
    preprocessing: Preprocessing | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to a .safetensors file that the commands of rat-ext take as a --checkpoint.

    Args:
        model: whose state dict is written.
        path: of the file, .safetensors.
        name: of the model, as for `create`.
        classes: the names of the classes.
        preprocessing: what images go through.
        recipe: how it was trained, such as ``dataclasses.asdict(recipe)``; for readers.

    Raises:
        ValueError: the path does not end in .safetensors.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {str(path)!r}; it must end in .safetensors")
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("writing .safetensors needs: pip install safetensors") from error
    told = {
        "model": name,
        "classes": list(classes),
        "preprocessing": preprocessing.to_dict() if preprocessing else None,
        "recipe": dict(recipe) if recipe is not None else None,
    }
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    content = save(state, {METADATA: json.dumps(told)})
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint, in one of the common layouts, into the model.

    The file is a state dict, or a dict with one under "state_dict", "model_state_dict" or "model",
    saved by torch.save (read with ``weights_only=True``) or as .safetensors. The prefixes of
    DistributedDataParallel and torch.compile are dropped. Weights of the bare network are loaded
    behind the normalisation of a `Normalized` model. Of a checkpoint of `training.train` the
    averaged weights are loaded where there are some: they are what that run returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or not of this model.
    """
    path = Path(path)
    state = _state_dict(path)
    expected = model.state_dict().keys()
    if isinstance(model, Normalized) and not state.keys() & expected:
        state = {f"m.{key}": value for key, value in state.items()}
        state.update(mean=model.mean, std=model.std)
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(getattr(model, 'm', model)).__name__}: {_some(missing)} "
            f"missing, {_some(unexpected)} unexpected. Is it of another model?"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{path} does not fit the model: {error}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError("reading .safetensors needs: pip install safetensors") from error
        try:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                told = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged, or no .safetensors file: {error}") from error
        return {"state_dict": state, **told} if told else state
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, unpickling ones among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a checkpoint of tensors alone: {reason}") from error


def _state_dict(path: Path) -> dict[str, Tensor]:
    state = _read(path)
    if isinstance(state, Mapping):
        if "recipe" in state and isinstance(state.get("ema"), Mapping):  # of training.train
            averaged = dict(state["ema"])
            averaged.pop("n_averaged", None)  # AveragedModel's own
            state = {"state_dict": averaged}
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict")
    return unwrapped(state)


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:3])}, ...)" if keys else "no key"
