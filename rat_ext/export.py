"""RR-Fast as a graph without autograd, for engines that only go forward.

A radius needs the gradient of the logits in the input. Here the backward pass is traced along with
the forward one, so that the graph holds it as ordinary operations: torch.export can save it, and
ONNX Runtime can run it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._common.extras import install
from ._common.user_model import check_device, logits_of, undisturbed
from .search.checked import WIDE, Options
from .search.tensors import checked_input

# torch.onnx of torch 2.4 takes modules only, with their example arguments.
ONNX_EXPORTS_PROGRAMS = (
    inspect.signature(torch.onnx.export).parameters["args"].default is not inspect.Parameter.empty
)


def export_radius(
    model: nn.Module, example: Tensor, *, dynamic_batch: bool = True, **options: Any
) -> torch.export.ExportedProgram:
    """A program from inputs to predictions and RR-Fast radii, with the gradient in its graph.

    ``program.module()(x)`` gives the (N,) int64 predictions and the (N,) radii of
    ``robust_radius(model, x, method="fast", **options)``. A graph cannot raise, so rows that leave
    the bounds have radius nan and prediction -1, as those that are not finite have.
    `torch.export.save` writes the program to a file.

    The model is traced in eval mode, with its weights as constants of the graph; it is left as it
    was. RR-BS is not exported: how many forwards it takes depends on the data.

    Args:
        model: as in `rat_ext.robust_radius`; a module.
        example: (N, ...) inputs within the bounds, N >= 1. The graph is for their shape, type and
            device.
        dynamic_batch: let the batch size vary. With False it is that of ``example``.
        options: ``bounds``, ``temperature`` and ``h`` of `rat_ext.robust_radius`.

    Raises:
        ValueError: the example is unsuitable, an option is out of its range, or the model fixes the
            batch size.
    """
    return _program(model, example, dynamic_batch, options, {})


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    **options: Any,
) -> None:
    """Write what `export_radius` returns as an ONNX model.

    Its input is x, its outputs are prediction and radius. Operations of the backward pass that ONNX
    does not know are written in those that it knows; where one is left over, torch.onnx raises an
    error that names it.

    Args:
        model: as in `export_radius`, and so are ``example``, ``dynamic_batch`` and ``options``.
        path: of the file.

    Raises:
        ImportError: onnx or onnxscript is not installed, or torch is older than 2.5.
        ValueError: as `export_radius`.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX models need onnx and onnxscript: {install('onnx')}") from error
    if not ONNX_EXPORTS_PROGRAMS:
        raise ImportError(
            f"ONNX models need torch 2.5 or newer, and this is {torch.__version__}. export_radius "
            "works with it."
        )
    aten = torch.ops.aten
    table = torch._decomp.core_aten_decompositions()
    table[aten.convolution_backward.default] = _convolution_backward
    table[aten.avg_pool2d_backward.default] = _avg_pool2d_backward
    torch.onnx.export(
        _program(model, example, dynamic_batch, options, table),
        f=str(path),
        input_names=["x"],
        output_names=["prediction", "radius"],
        dynamo=True,
        verbose=False,
    )


def _program(
    model: nn.Module,
    example: Tensor,
    dynamic_batch: bool,
    options: dict[str, Any],
    decompositions: dict[Any, Callable[..., Any]],
) -> torch.export.ExportedProgram:
    if unknown := options.keys() - {"bounds", "temperature", "h"}:
        raise TypeError(f"an exported radius has no option {', '.join(sorted(unknown))}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; only an nn.Module can be exported")
    checked = Options.checked(example, method="fast", **options)
    if not len(example):
        raise ValueError("the example has no rows; give at least one")
    if not checked_input(example, checked).all():
        raise ValueError("the example has values that are not finite")
    check_device(model, example)
    # Detached, so that the graph has no gradients of weights.
    state = {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers())}

    slack = checked.bounds.slack(example.dtype)

    def radius(x: Tensor) -> tuple[Tensor, Tensor]:
        return _rr_fast(lambda x: torch.func.functional_call(model, state, (x,)), x, checked, slack)

    # Attention in plain operations: the backward of a fused kernel is a kernel of its own.
    with (
        torch.inference_mode(False),
        undisturbed(model, example.device),
        sdpa_kernel(SDPBackend.MATH),
    ):
        example = example.detach().clone()
        if dynamic_batch:  # sizes that are equal would be taken for one and the same
            rows = next(n for n in itertools.count(2) if n not in example.shape[1:])
            example = example[:1].repeat(rows, *[1] * (example.ndim - 1))
        graph = make_fx(
            radius,
            decomposition_table=decompositions,
            tracing_mode="symbolic" if dynamic_batch else "real",
            _allow_non_fake_inputs=True,
        )(example)
        shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
        try:
            return torch.export.export(graph, (example,), dynamic_shapes=shapes)
        except torch._dynamo.exc.UserError as error:
            raise ValueError(
                "the model fixes the batch size, for example by len(x), which x.shape[0] does not. "
                "Change it, or export with dynamic_batch=False"
            ) from error


def _rr_fast(
    model: Callable[[Tensor], Any], x: Tensor, options: Options, slack: float
) -> tuple[Tensor, Tensor]:
    """Predictions and radii, as in `reference.rr_fast`, in operations that can be traced."""
    rows, wide = x.shape[0], WIDE[x.dtype]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = logits_of(model(leaf), rows)
    z = logits.detach().to(wide)
    y = z.argmax(1)
    is_y = torch.arange(z.shape[1], device=z.device) == y[:, None]
    odds = (z / options.temperature).masked_fill(is_y, -math.inf).softmax(1)
    seed = odds.masked_fill(is_y, -1.0).to(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, leaf, seed)
    moved = options.bounds.clip(x + options.h * gradient.sign())
    z_h = logits_of(model(moved), rows).detach().to(wide)
    gap, gap_h = (each.gather(1, y[:, None]) - each for each in (z, z_h))
    fall = gap - gap_h
    crossing = (options.h * gap / fall).masked_fill((fall <= 0) | is_y, math.inf)
    valid = _all(z.isfinite()) & _all(z_h.isfinite()) & _all(gradient.isfinite())
    valid &= _all((x >= options.low - slack) & (x <= options.high + slack))
    return y.masked_fill(~valid, -1), crossing.amin(1).masked_fill(~valid, math.nan)


def _all(values: Tensor) -> Tensor:
    """(N,) all of each row. Not flattened, which not every order of the memory allows as a view."""
    return values.all(tuple(range(1, values.ndim)))


# --- Backward operations in those that ONNX knows -------------------------------------------------


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> Any:
    """The gradient of a convolution in its input: the transposed convolution, and vice versa."""
    if output_mask[1] or output_mask[2]:
        return NotImplemented
    if transposed:
        rest = [0] * len(stride)
    else:  # what the strides did not reach of the input
        sizes = zip(x.shape[2:], gradient.shape[2:], weight.shape[2:], strict=True)
        spans = zip(sizes, stride, padding, dilation, strict=True)
        rest = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for (n, m, k), s, p, d in spans]
    out = torch.ops.aten.convolution(
        gradient, weight, None, stride, padding, dilation, not transposed, rest, groups
    )
    return out, None, None


def _avg_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Any:
    """The gradient of average pooling as that of a convolution by a constant."""
    if ceil_mode or (any(padding) and not count_include_pad and divisor_override is None):
        return NotImplemented  # windows of unlike sizes
    (height, width), strides, paddings = (
        list(pair) if len(pair) == 2 else list(pair) * 2
        for pair in (kernel_size, stride or kernel_size, padding)
    )
    weight = gradient.new_full(
        (x.shape[1], 1, height, width), 1 / (divisor_override or height * width)
    )
    return _convolution_backward(
        gradient,
        x,
        weight,
        None,
        strides,
        paddings,
        [1, 1],
        False,
        [0, 0],
        x.shape[1],
        [True, False, False],
    )[0]
