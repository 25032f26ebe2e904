"""Calling a user's model without leaving a trace: its modes, its RNG and its outputs."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Any]


@contextlib.contextmanager
def undisturbed(model: Model, device: torch.device) -> Iterator[None]:
    """Run the model in eval mode, then put back every module's mode and the random state."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            # Set flag by flag rather than by eval(), which a model may override with side effects.
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def logits_of(output: Any, rows: int) -> Tensor:
    """The (rows, classes) logits in a model's output: a tensor, or an object with ``.logits``."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}; expected a tensor of logits or an object "
            "with a .logits tensor. Wrap the model so that it returns its logits, for example "
            "lambda x: model(x)[0]"
        )
    if logits.ndim != 2 or logits.shape[0] != rows or logits.shape[1] < 2:
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for {rows} inputs; expected "
            f"({rows}, classes) with at least 2 classes. A single-logit model can return "
            "torch.cat([-z, z], 1) / 2"
        )
    if not logits.is_floating_point():
        raise TypeError(f"the model returned {logits.dtype}; expected floating-point logits")
    return logits


def check_device(model: Model, x: Tensor) -> None:
    """Raise if the model's parameters are all on other devices than x."""
    if not isinstance(model, nn.Module):
        return
    devices = {p.device for p in model.parameters()}
    if devices and x.device not in devices:
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"x is on {x.device} but the model is on {where}; move one of them, for example "
            f"x.to('{where.split(', ')[0]}')"
        )


def warn_not_finite(radius: Tensor, stacklevel: int) -> None:
    """One warning for all the rows whose radius is nan, if there are any.

    `stacklevel` is that of `warnings.warn`, counted from the caller.
    """
    bad = int(radius.isnan().sum())
    if bad:
        warnings.warn(
            f"{bad} of {len(radius)} rows have inputs, logits or gradients that are not finite; "
            "their radius is nan",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the prefixes of DistributedDataParallel and torch.compile."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def raw_bytes(tensor: Tensor) -> Any:
    """The elements of a tensor as a uint8 array on the CPU."""
    # Flat, because a tensor without dimensions cannot be viewed as bytes.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the tensors of the model's state dict: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model.state_dict()).items():
        if isinstance(value, Tensor):  # a module's extra state may be anything
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(raw_bytes(value))
    return digest.hexdigest()
