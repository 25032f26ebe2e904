"""The format of a detector's .safetensors file.

The tensors are those of the score and of the calibration; all else is JSON in the header.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._common.extras import install
from .._common.storage import fingerprint, write_whole
from .._common.user_model import Model
from ..scores.base import Score, comes_with
from ..scores.cascade import CascadeReport
from ..scores.registry import kind_of, name_of
from .fit_report import DetectorReport

KEY, VERSION = "rat_ext.detector", 2  # of the metadata


class Saved(NamedTuple):
    """What is kept of a detector."""

    score: Score
    report: DetectorReport
    steps: tuple[Tensor, Tensor] | None
    """Of the calibration."""
    fingerprint: str | None
    """Of the model's weights."""


def require_safetensors() -> Any:
    """The module that detectors are saved with."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"saving and loading a detector needs safetensors: {install('detector')}"
        ) from error
    return safetensors


def write(path: Path, saved: Saved) -> None:
    """Write the file, whole or not at all.

    Raises:
        ValueError: the score cannot be saved; says why.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    serialized = require_safetensors().torch.save
    tensors: dict[str, Tensor] = {}
    header = {
        "version": VERSION,
        "fingerprint": saved.fingerprint,
        "score": _packed(saved.score, "score", tensors),
        # As text: it may be infinite, for which JSON has no number.
        "report": {**asdict(saved.report), "threshold": str(saved.report.threshold)},
    }
    if saved.steps is not None:
        tensors["probability.starts"], tensors["probability.values"] = saved.steps
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {KEY: json.dumps(header, allow_nan=False)}
    content = serialized(tensors, metadata)
    try:
        # Not by safetensors, whose errors of the disk are no OSError.
        write_whole(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise type(error)(
            f"the detector cannot be written to {path}: {error.strerror}; free some space "
            "there, or save it elsewhere"
        ) from error


def read(path: Path) -> Saved:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a detector, is damaged, or has a score that is not registered.
        ImportError: safetensors is not installed.
    """
    safetensors = require_safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"there is no detector {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or not all of one ({error}): copy it again, or fit "
            "the detector again"
        ) from error
    if KEY not in metadata:
        raise ValueError(f"{path} is not a detector; Detector.save writes them")
    try:
        return _parsed(path, json.loads(metadata[KEY]), tensors)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is damaged, or not as Detector.save writes them ({what}): fit the detector "
            "again"
        ) from error


def _parsed(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Saved:
    version = header["version"]
    if version not in (1, VERSION):
        raise ValueError(
            f"{path} has version {version} of the format, this rat_ext reads up to {VERSION}; fit "
            "the detector again"
        )
    report = header["report"]
    report["threshold"] = float(report["threshold"])
    if report["cascade"] is not None:
        report["cascade"] = CascadeReport(**report["cascade"])
    if report.get("compared") is not None:
        report["compared"] = [(name, aurc) for name, aurc in report["compared"]]
    steps = None
    if "probability.starts" in tensors:
        steps = tensors["probability.starts"], tensors["probability.values"]
    packed = header["score"] if version > 1 else _from_version_1(header["score"])
    score = _unpacked(packed, "score", tensors)
    return Saved(score, DetectorReport(**report), steps, header["fingerprint"])


def check_fingerprint(path: Path, known: str | None, model: Model) -> None:
    """Raise if the model's weights are not those that the detector was fitted on."""
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


def _packed(score: Score, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The score as values for JSON; its tensors, and those of its parts, go under the prefix."""
    kind, name = type(score), name_of(score)
    if name is None:
        raise ValueError(
            f"a {kind.__name__} cannot be saved: its class is not registered; put "
            "@rat_ext.scores.register(name) above it"
        )
    try:
        for method in ("__init__", "fit"):
            if not comes_with(kind, "state", method):
                raise TypeError(f"{kind.__name__} defines {method}(), but not state() with it")
        state = score.state()
        parts = {key: value for key, value in state.items() if isinstance(value, Score)}
        own_tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        values = {key: state[key] for key in state if key not in parts and key not in own_tensors}
        json.dumps(values, allow_nan=False)
        kind.from_state(state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the score {name!r} cannot be saved: {error}. Let {kind.__name__}.state() return "
            "tensors, scores, and values that JSON has, from which from_state() makes the fitted "
            "score"
        ) from error
    tensors.update({f"{prefix}.{key}": value for key, value in own_tensors.items()})
    packed = {key: _packed(part, f"{prefix}.{key}", tensors) for key, part in parts.items()}
    return {"name": name, "state": values, "parts": packed}


def _unpacked(packed: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Score:
    try:
        kind = kind_of(packed["name"])
    except ValueError as error:
        raise ValueError(
            f"{error}; if it is yours, import the module that registers it before loading"
        ) from error
    parts = {
        key: _unpacked(part, f"{prefix}.{key}", tensors) for key, part in packed["parts"].items()
    }
    elsewhere = tuple(f"{prefix}.{key}." for key in parts)
    held = {
        name.removeprefix(f"{prefix}."): value
        for name, value in tensors.items()
        if name.startswith(f"{prefix}.") and not name.startswith(elsewhere)
    }
    return kind.from_state({**packed["state"], **parts, **held})


def _from_version_1(packed: dict[str, Any]) -> dict[str, Any]:
    """The score of a file of version 1, in which a cascade had neither name nor state."""
    if "band" not in packed:
        return {**packed, "parts": {}}
    parts = {key: _from_version_1(packed[key]) for key in ("cheap", "expensive")}
    state = {key: packed[key] for key in ("band", "max_changed")}
    return {"name": "cascade", "state": state, "parts": parts}
