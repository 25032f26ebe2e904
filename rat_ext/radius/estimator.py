"""Robust radii for a stream of batches: buffers allocated once and, on a GPU, captured graphs.

What `robust_radius` launches kernel by kernel, `RadiusEstimator` records once as CUDA graphs: the
ray (forward, and backward to the input) and the step of the search (probe, forward, bracket
update). Each is recorded for batches of 1, 2, 4, ... rows up to the example's, so that a batch of
which most rows are settled goes on at a smaller size. The step is the body of a loop on the device
where torch can record one; elsewhere the host replays it and polls how many rows are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import radius as _capture
from .._common.user_model import Model, check_device, undisturbed, warn_not_finite
from .._core import core
from ..search.bracket_search import Search
from ..search.options import Options
from ..search.result import RadiusResult, concatenate
from ..search.tensors import (
    checked_input,
    differentiable_logits,
    empty_rows_like,
    input_flags,
    with_dense_rows,
)

_NOTHING = contextlib.nullcontext()


class RadiusEstimator:
    """`robust_radius` for many batches of one shape, dtype and device.

    Every call returns what ``robust_radius(model, x, full=True)`` does, for any number of rows, and
    keeps its promises. On a GPU the model is captured at construction, in eval mode and under the
    autocast of that moment, and calls replay it. Its parameters may change in place (by an
    optimizer or ``load_state_dict``); after moving, casting or editing the model, make a new
    estimator. A model that cannot be captured, because its control flow depends on the data or it
    draws random numbers in eval mode, runs eagerly after one RuntimeWarning. On the CPU nothing is
    captured; only the buffers are kept from call to call.

    Calls from several threads take turns, and calls on several CUDA streams follow one another. For
    searches at the same time make an estimator for each stream.

    Args:
        model: as in `robust_radius`.
        example_x: (B, ...) inputs, valid in themselves. Later inputs have their row shape, dtype
            and device, and reach the model in their memory format. B is the most rows of a search
            at a time; one forward takes up to B * probes rows.
        precision: "bf16" probes under bfloat16 autocast, then verifies both ends of each bracket
            without it, at 2 forward rows a sample. Where the prediction is not kept at ``lower`` or
            not changed at ``upper`` it searches once more without it. Needs method "bs".
        capture: False runs eagerly on a GPU, too.
        check_input: raise if x is out of bounds, and warn of rows that are not finite, for both of
            which the host waits for a GPU. If False, such rows get nan without a word, and a call
            that replays the device loop returns before the GPU is done.
        options: method, rtol, bounds, temperature, eps_max, target, h, search and probes of
            `robust_radius`. The attack is "fgsm".

    Attributes:
        mode: "device loop" (captured; the search never asks the host), "replay loop" (captured; the
            host polls how many rows are left) or "eager".

    Raises:
        ValueError, TypeError: as `robust_radius`; an empty example_x or an unknown precision; in a
            call, an x that is not like the example.
    """

    def __init__(
        self,
        model: Model,
        example_x: Tensor,
        *,
        precision: str | None = None,
        capture: bool = True,
        check_input: bool = True,
        **options: Any,
    ) -> None:
        if "batch_size" in options:
            raise TypeError("the batch size of a RadiusEstimator is that of example_x")
        self._options = Options.checked(example_x, **options)
        names = [attack.name for attack in self._options.attacks]
        if names != ["fgsm"]:
            raise ValueError(
                f"a RadiusEstimator searches FGSM rays; for attack {', '.join(names)} use "
                "rat_ext.robust_radius"
            )
        if precision not in (None, "bf16"):
            raise ValueError(f"precision is {precision!r}; expected None or 'bf16'")
        if precision and self._options.method != "bs":
            raise ValueError("precision='bf16' verifies brackets, so it needs method='bs'")
        if not len(example_x):
            raise ValueError("example_x has no rows; give a batch of the size that is to be used")
        device = self._device = example_x.device
        self._model, self._bf16, self._check_input = model, precision == "bf16", check_input
        ambient = (torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type))
        self._exact = self._under_autocast(*ambient)
        self._fast = self._under_autocast(torch.bfloat16, True) if self._bf16 else self._exact
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        with torch.inference_mode(False), torch.no_grad(), self._in_stream_order():
            example = with_dense_rows(example_x.detach())
            checked_input(example, self._options)
            check_device(model, example)
            with undisturbed(model, device):
                random_state = _random_state(device)
                _, logits = differentiable_logits(self._exact, example)
                draws = not torch.equal(random_state, _random_state(device))
                self._allocate(example, logits.shape[1])
                del logits
                self._trace(len(example))
                self.mode = self._prepare(capture, draws)

    def __call__(self, x: Tensor) -> RadiusResult:
        """The results of (N, ...) inputs like the example, for any N; see `robust_radius`."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor")
        like = self._x
        if (x.shape[1:], x.dtype, x.device) != (like.shape[1:], like.dtype, like.device):
            raise ValueError(
                f"x has rows of shape {tuple(x.shape[1:])}, {x.dtype} on {x.device}; this "
                f"estimator was made for {tuple(like.shape[1:])}, {like.dtype} on {like.device}. "
                "Convert x, or make another estimator"
            )
        if not len(x):
            return RadiusResult.empty(x, self._options)
        with torch.inference_mode(False), torch.no_grad(), self._lock, self._in_stream_order():
            if self._check_input:
                checked_input(with_dense_rows(x.detach()), self._options)
            # A replay runs no Python of the model, so there is nothing to put back.
            runs = undisturbed(self._model, self._device) if self._runs_model else _NOTHING
            with runs:
                results = [self._search_rows(rows) for rows in x.split(len(like))]
        result = concatenate(results) if len(results) > 1 else results[0]
        if self._check_input:
            warn_not_finite(result.radius, stacklevel=2)
        return result

    def _search_rows(self, x: Tensor) -> RadiusResult:
        rows = len(x)
        self._x[:rows].copy_(x)
        self._rows.fill_(rows)
        self._run_trace(rows)
        self._run_search(rows)
        if not self._bf16:
            return self._search.result(rows)
        self._run_verify(rows)
        self._run_repair(rows)
        result = self._search.result(rows)
        return dataclasses.replace(
            result,
            forward_rows=result.forward_rows + self._spent[:rows],
            worst_case_rows=2 * result.worst_case_rows + 2,
        )

    # What is captured: work on the first `rows` rows of the buffers, none of which the host reads.

    def _trace(self, rows: int) -> None:
        """Take the rays, and make all rows active that are in bounds and no padding."""
        search = self._search
        leaf, logits = differentiable_logits(self._exact, self._x[:rows])
        search.aim(leaf, logits)
        padding = self._order[:rows] >= self._rows
        search.exclude((input_flags(self._x[:rows], self._options) != 0) | padding)
        if self._bf16:
            self._searched[:rows].copy_(search.column("status")[:rows] == core.ACTIVE)
            for start, now in zip(self._start, search.tensors, strict=True):
                start[:rows].copy_(now[:rows])
        self._activate(rows)

    def _activate(self, rows: int) -> None:
        self._index[:rows].copy_(self._order[:rows])
        self._count.fill_(rows)
        self._search.compact(self._index[:rows], self._count)

    def _step(self, model: Model, rows: int) -> None:
        index = self._index[:rows]
        self._search.step(model, index, self._points, self._count)
        self._search.compact(index, self._count)

    def _verify(self, rows: int) -> None:
        """Look at both ends of each bracket in full precision, and restart those that are wrong."""
        search = self._search
        lower, upper, prediction, flipped_to, status = (
            search.column(name)[:rows]
            for name in ("lower", "upper", "prediction", "flipped_to", "status")
        )
        found = status == core.FOUND
        self._ends[:rows, 0].copy_(lower)
        self._ends[:rows, 1].copy_(upper.where(found, lower))
        self._count.fill_(rows)
        logits = search.logits_at(
            self._exact, self._order[:rows], self._ends, self._points, self._count
        )
        classes = logits.argmax(1).view(rows, 2)
        finite = logits.isfinite().all(1).view(rows, 2).all(1) & (status != core.NOT_FINITE)
        holds = (classes[:, 0] == prediction) & ((classes[:, 1] != prediction) | ~found) & finite
        flipped_to.copy_(torch.where(found & holds, classes[:, 1], flipped_to))
        searched = self._searched[:rows]
        again = searched & ~holds
        self._spent[:rows].copy_(search.column("rows")[:rows].where(again, 0) + 2 * searched)
        for start, now in zip(self._start, search.tensors, strict=True):
            now[:rows].copy_(start[:rows].where(again[:, None], now[:rows]))
        self._activate(rows)

    # ---- construction ----------------------------------------------------------------------------

    def _under_autocast(self, dtype: torch.dtype, enabled: bool) -> Model:
        def run(x: Tensor) -> Any:
            # Without the cache each cast is captured; else a graph would read what an earlier
            # forward cast, and not see the parameters change.
            with torch.autocast(self._device.type, dtype, enabled, cache_enabled=False):
                return self._model(x)

        return run

    def _allocate(self, example: Tensor, classes: int) -> None:
        n, device = len(example), self._device
        self._x = empty_rows_like(example, n, example.dtype).copy_(example)
        self._search = Search(self._x, classes, self._options)
        self._order = torch.arange(n, dtype=torch.int32, device=device)
        self._index = self._order.clone()
        self._count, self._rows = (self._order.new_full((1,), n) for _ in range(2))
        points = n * max(self._options.probes, 2 if self._bf16 else 1)
        self._points = empty_rows_like(example, points, example.dtype)
        if self._bf16:
            self._searched = torch.empty(n, dtype=torch.bool, device=device)
            self._start = [torch.empty_like(tensor) for tensor in self._search.tensors]
            self._ends = torch.empty_like(self._search.brackets[:, :2])
            self._spent = torch.empty(n, dtype=torch.int64, device=device)

    def _prepare(self, capture: bool, draws: bool) -> str:
        """Capture what runs a search, or leave it eager if that cannot be. Returns the mode."""
        graphs = _capture.graphs_for(self._device) if capture else None
        if graphs is None:
            return self._build(_capture.Eager())
        n = len(self._x)
        sizes = [*(2**k for k in range(n.bit_length()) if 2**k < n), n]
        cause = "it draws random numbers in eval mode"
        for driver in () if draws else (_capture.DeviceLoop, _capture.ReplayLoop):
            try:
                return self._build(driver(graphs, sizes, self._options.least_rounds))
            except Exception as error:
                cause = _root_cause(error)
                graphs = _capture.graphs_for(self._device)  # with a stream that is not capturing
        warnings.warn(
            f"the model cannot be captured in CUDA graphs and runs eagerly: {cause}. "
            "capture=False runs eagerly without this warning",
            RuntimeWarning,
            stacklevel=3,
        )
        return self._build(_capture.Eager())

    def _build(self, driver: _capture.Driver) -> str:
        self._run_search = driver.loop(partial(self._step, self._fast), self._count)
        self._run_trace = driver.piece(self._trace)
        if self._bf16:
            self._run_verify = driver.piece(self._verify)
            self._run_repair = driver.loop(partial(self._step, self._exact), self._count)
        self._runs_model = driver.runs_model
        return driver.name

    @contextlib.contextmanager
    def _in_stream_order(self) -> Iterator[None]:
        """Let no stream touch the buffers before the last one that did is done with them."""
        if self._done is None:
            yield
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)


def _random_state(device: torch.device) -> Tensor:
    """The state of every random generator that a model on `device` may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _root_cause(error: BaseException) -> str:
    """The error that came first: ending a capture that failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
