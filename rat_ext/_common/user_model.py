"""Runs a user's model: leaves it as it was, and checks where it is and what it gives."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Any]


_CHANGING = threading.RLock()
"""Held while a model is in another mode than its owner left it in. One for all models, because
models may share modules, and because threads that each hold the lock of one model and wait for that
of the other would wait forever."""


@contextlib.contextmanager
def undisturbed(model: Model, device: torch.device) -> Iterator[None]:
    """Run the model in eval mode, then put back every module's mode and the random state.

    Threads may share a model. Of models that are in training mode, one thread at a time runs one,
    and the others wait; models that are wholly in eval mode run side by side. The thread that
    enters this block has to leave it.

    What is not kept apart: a thread that trains the model meanwhile finds it in eval mode. And
    torch's random state is one for all threads: putting it back undoes what other threads drew
    meanwhile, and a model that draws in eval mode, in several threads, may leave another state.
    """
    devices = [device] if device.type == "cuda" else []
    with _in_eval_mode(model), torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _in_eval_mode(model: Model) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with contextlib.ExitStack() as stack:
        with _CHANGING:  # else another thread's eval mode would be taken for the model's own
            # A module that torch.jit.freeze made has no mode: it is as in eval mode for good.
            training = [module for module in modules if getattr(module, "training", False)]
            if training:
                stack.enter_context(_CHANGING)  # once more: until the modes are put back
                stack.callback(_set_mode, training, True)
                _set_mode(training, False)
        yield


def _set_mode(modules: list[nn.Module], training: bool) -> None:
    # Flag by flag rather than by train(), which a model may override with side effects.
    for module in modules:
        module.training = training


@contextlib.contextmanager
def left_alone(model: Model, x: Tensor) -> Iterator[None]:
    """Run the model on x without a graph, and leave it as it was."""
    check_device(model, x)
    with torch.inference_mode(False), torch.no_grad(), undisturbed(model, x.device):
        yield


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 numbers on CUDA in float32, not in TF32; afterwards as before."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later
        held = [(each, "fp32_precision") for each in (backends.cuda.matmul, backends.cudnn.conv)]
        exact: Any = "ieee"
    else:
        held = [(each, "allow_tf32") for each in (backends.cuda.matmul, backends.cudnn)]
        exact = False
    before = [getattr(owner, name) for owner, name in held]
    try:
        for owner, name in held:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name), value in zip(held, before, strict=True):
            setattr(owner, name, value)


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
            "torch.cat([-z, z], 1) / 2. A model that uses a tensor of the whole batch, such as a "
            "mask, fails here, as it also gets some of the rows alone: give it by model_kwargs"
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


def wide(logits: Tensor) -> Tensor:
    """Logits in float64, in which the softmax of a confident prediction is not yet 1."""
    return logits.float() if logits.device.type == "mps" else logits.double()


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in which probabilities and losses can be computed: half precision is widened."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
