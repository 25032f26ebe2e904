"""A detector as one .safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import scores
from .._common.storage import fingerprint
from .._common.user_model import Model
from ..scores.base import Score
from ..scores.cascade import Cascade

_KEY, _VERSION = "rat_ext.detector", 1  # of the metadata in a detector's file
_EXTRA = "pip install 'rat-ext[detector]'"


def _packed(score: Score, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The score as values for JSON; its tensors are put under the prefix."""
    if isinstance(score, Cascade):
        parts = {
            name: _packed(getattr(score, name), f"{prefix}.{name}", tensors)
            for name in ("cheap", "expensive")
        }
        return {**parts, "band": list(map(str, score.band)), "max_changed": score.max_changed}
    kind, name = type(score), scores.name_of(score)
    if name is None:
        raise ValueError(
            f"a {kind.__name__} cannot be saved: its class is not registered; put "
            "@rat_ext.scores.register(name) above it"
        )
    try:
        for method in ("__init__", "fit"):
            if not issubclass(_definer(kind, "state"), _definer(kind, method)):
                raise TypeError(f"{kind.__name__} defines {method}(), but not state() with it")
        state = score.state()
        values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        json.dumps(values, allow_nan=False)
        kind.from_state(state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the score {name!r} cannot be saved: {error}. Let {kind.__name__}.state() return "
            "tensors, and values that JSON has, from which from_state() makes the fitted score"
        ) from error
    tensors.update({f"{prefix}.{key}": state[key] for key in state.keys() - values.keys()})
    return {"name": name, "state": values}


def _unpacked(packed: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Score:
    if "band" in packed:
        parts = {
            name: _unpacked(packed[name], f"{prefix}.{name}", tensors)
            for name in ("cheap", "expensive")
        }
        cascade = Cascade(**parts, max_changed=packed["max_changed"])
        low, high = map(float, packed["band"])
        cascade.band = low, high
        return cascade
    name = packed["name"]
    if name not in scores.names():
        raise ValueError(
            f"no score is named {name!r}; import the module that registers it before loading"
        )
    held = {
        key.removeprefix(f"{prefix}."): value
        for key, value in tensors.items()
        if key.startswith(f"{prefix}.")
    }
    return scores._registry[name].from_state({**packed["state"], **held})


def _definer(kind: type, method: str) -> type:
    """The class that a method of `kind` comes from."""
    return next(cls for cls in kind.__mro__ if method in vars(cls))


def _check_fingerprint(path: Path, known: str | None, model: Model) -> None:
    escape = "pass strict=False if you know that it is the same"
    if known is None or not isinstance(model, nn.Module):
        raise ValueError(
            f"{path} cannot be checked against this model: a callable that is no nn.Module has no "
            f"state dict; {escape}"
        )
    if fingerprint(model) != known:
        raise ValueError(
            f"{path} was fitted on a model with other weights than this {type(model).__name__}, "
            f"for which its threshold means nothing: load the weights that it was fitted on, or "
            f"fit a detector on these; {escape}"
        )


def require_safetensors() -> Any:
    """The module that detectors are saved with."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"saving and loading a detector needs safetensors: {_EXTRA}") from error
    return safetensors
