"""Robust radii for a stream of batches: buffers allocated once and, on a GPU, captured graphs.

What `robust_radius` launches kernel by kernel, `RadiusEstimator` records once as CUDA graphs: the
ray (forward, and backward to the input) and the step of the search (probe, forward, bracket
update). Each is recorded for batches of 1, 2, 3, 4, 6, 8, 12, ... rows up to the example's, so that
a batch of which most rows are settled goes on at a smaller size. The step is the body of a loop on
the device where torch can record one; elsewhere the host replays it and polls how many rows are
left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._common.per_sample import Arguments, PerSample, of_rows, with_arguments
from .._common.user_model import Model, check_device, full_float32, undisturbed
from .._core import core
from ..attacks.rays import fgsm
from ..search.bracket_search import batch_sizes
from ..search.checked import Options
from ..search.options import SearchOptions, shows_options
from ..search.result import RadiusResult, concatenate, warn_about
from ..search.tensors import (
    checked_input,
    differentiable_logits,
    empty_rows_like,
    input_flags,
    with_dense_rows,
)
from . import graphs

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NOTHING = contextlib.nullcontext()


@shows_options(without=["attack", "batch_size", "norm", "steps"])
class RadiusEstimator:
    """`robust_radius` for many batches of one shape, dtype and device.

    Every call returns what ``robust_radius(model, x, full=True)`` does, for any number of rows, and
    keeps its promises. On a GPU the model is captured at construction, in eval mode and under the
    autocast of that moment, and calls replay it. Its parameters may change in place (by an
    optimizer or ``load_state_dict``); where they are re-assigned, the next call captures anew.
    After moving, casting or editing the model, make a new estimator. A model that cannot be
    captured, because its control flow depends on the data or it draws random numbers in eval mode,
    runs eagerly after one RuntimeWarning. On the CPU nothing is captured; only the buffers are kept
    from call to call.

    Calls from several threads take turns, and calls on several CUDA streams follow one another. For
    searches at the same time make an estimator for each stream.

    Args:
        model: as in `robust_radius`.
        example_x: (B, ...) inputs, valid in themselves. Later inputs have their row shape, dtype
            and device, and reach the model in their memory format. B is the most rows of a search
            at a time; one forward takes up to B * probes rows.
        model_kwargs: more arguments of the model, as in `robust_radius`, for the example. Tensors
            whose first dimension is B are of each sample, and every call gives its own; everything
            else stays as it is here.
        capture: False runs eagerly on a GPU, too.
        check_input: raise if x is out of bounds, and warn of rows that are not finite, for both of
            which the host waits for a GPU. If False, such rows get nan without a word, and a call
            that replays the device loop returns before the GPU is done.
        {options}

    Attributes:
        mode: "device loop" (captured; the search never asks the host), "replay loop" (captured; the
            host polls how many rows are left) or "eager".

    Raises:
        ValueError, TypeError: as `robust_radius`; an empty example_x; in a call,
            an x that is not like the example.
    """

    def __init__(
        self,
        model: Model,
        example_x: Tensor,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        capture: bool = True,
        check_input: bool = True,
        **options: Unpack[SearchOptions],
    ) -> None:
        self._options = estimator_options(example_x, **options)
        if isinstance(model, PerSample):
            raise ValueError(
                "the model has arguments for the samples of one batch; a RadiusEstimator is for "
                "many. Give it the model itself, and model_kwargs here and in each call"
            )
        if not len(example_x):
            raise ValueError("example_x has no rows; give a batch of the size that is to be used")
        device = self._device = example_x.device
        self._model, self._check_input = model, check_input
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        ambient = self._under_autocast(
            torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        )
        with torch.inference_mode(False), torch.no_grad(), self._in_stream_order():
            example = with_dense_rows(example_x.detach())
            checked_input(example, self._options)
            check_device(model, example)
            with undisturbed(model, device), self._precision():
                random_state = _random_state(device)
                # Buffers of its own, which calls write to.
                bound = with_arguments(ambient, example, model_kwargs)
                self._arguments = None
                if isinstance(bound, PerSample):
                    bound = bound.of(torch.arange(len(example)))
                    self._arguments = bound.arguments
                _, logits = differentiable_logits(bound, example)
                draws = not torch.equal(random_state, _random_state(device))
                self._allocate(bound, example, logits.shape[1])
                del logits
                self._trace(len(example))
                self.mode = self._prepare(capture, draws)
                self._addresses = self._parameter_addresses()

    def __call__(
        self, x: Tensor, *, model_kwargs: Mapping[str, Tensor] | None = None
    ) -> RadiusResult:
        """The results of (N, ...) inputs like the example, for any N; see `robust_radius`.

        Args:
            x: the inputs.
            model_kwargs: the arguments of each sample, where the estimator was made with such: the
                same names, (N, ...) tensors otherwise like those of the example.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; expected a torch.Tensor")
        like = self._x
        if (x.shape[1:], x.dtype, x.device) != (like.shape[1:], like.dtype, like.device):
            raise ValueError(
                f"x has rows of shape {tuple(x.shape[1:])}, {x.dtype} on {x.device}; this "
                f"estimator was made for {tuple(like.shape[1:])}, {like.dtype} on {like.device}. "
                "Convert x, or make another estimator"
            )
        arguments = self._like_the_example(x, model_kwargs or {})
        if not len(x):
            return RadiusResult.empty(x, self._options)
        with torch.inference_mode(False), torch.no_grad(), self._lock, self._in_stream_order():
            if self._check_input and self._done is None:  # a GPU is asked once, at the end
                checked_input(with_dense_rows(x.detach()), self._options)
            addresses = self._parameter_addresses()
            if not self._runs_model and addresses != self._addresses:
                # Graphs would go on with the memory of parameters that were re-assigned.
                with undisturbed(self._model, self._device), self._precision():
                    self.mode = self._prepare(capture=True, draws=False)
                self._addresses = addresses
            # A replay runs no Python of the model, so there is nothing to put back.
            runs = undisturbed(self._model, self._device) if self._runs_model else _NOTHING
            with runs, self._precision():
                results, counts = [], [0, 0]
                for begin in range(0, len(x), len(like)):
                    rows = slice(begin, begin + len(like))
                    part = x[rows]
                    results.append(self._search_rows(part, arguments.of(rows)))
                    if self._check_input:
                        counts = [a + b for a, b in zip(counts, self._checked(part), strict=True)]
        result = concatenate(results) if len(results) > 1 else results[0]
        warn_about(counts, len(x), stacklevel=2)
        return result

    def _like_the_example(self, x: Tensor, given: Mapping[str, Tensor]) -> Arguments:
        """The arguments of each sample of x; raises if they are not like the example's."""
        buffers = {} if self._arguments is None else self._arguments.per_sample
        if given.keys() != buffers.keys():
            raise ValueError(
                f"model_kwargs has {', '.join(given) or 'nothing'}; the arguments of each sample "
                f"that this estimator was made with are {', '.join(buffers) or 'none'}"
            )
        for name, value in given.items():
            like = buffers[name]
            fine = isinstance(value, Tensor) and value.shape == (len(x), *like.shape[1:])
            if not fine or (value.dtype, value.device) != (like.dtype, like.device):
                what = type(value).__name__
                if isinstance(value, Tensor):
                    what = f"of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
                raise ValueError(
                    f"{name} of model_kwargs is {what}; for {len(x)} inputs this estimator takes "
                    f"{(len(x), *like.shape[1:])}, {like.dtype} on {like.device}"
                )
        return Arguments(len(x), dict(given), {})

    def _search_rows(self, x: Tensor, arguments: Arguments) -> RadiusResult:
        rows = len(x)
        self._x[:rows].copy_(x)
        for name, value in arguments.per_sample.items():
            assert self._arguments is not None
            self._arguments.per_sample[name][:rows].copy_(value)
        self._rows.fill_(rows)
        self._run_trace(rows)
        self._run_search(rows)
        self._run_finish(rows)
        return self._outputs.read(rows)

    def _checked(self, x: Tensor) -> list[int]:
        """The problems of the rows just searched; raises if some are out of bounds."""
        outside, *counts = self._problems.tolist()
        if outside:
            rows = self._flags[: len(x)] == core.INPUT_OUTSIDE
            raise self._options.bounds.error(x[rows], len(x))
        return counts

    # What is captured: work on the first `rows` rows of the buffers, none of which the host reads.

    def _trace(self, rows: int) -> None:
        """Take the rays, and make all rows active that are in bounds and no padding."""
        search = self._search
        model = of_rows(search.model, slice(0, rows))
        leaf, logits = differentiable_logits(model, self._x[:rows])
        search.aim(leaf, logits)
        padding = self._order[:rows] >= self._rows
        flags = self._flags[:rows].copy_(input_flags(self._x[:rows], self._options))
        search.exclude((flags != 0).to(padding.device) | padding)
        self._index[:rows].copy_(self._order[:rows])
        self._count.fill_(rows)
        search.compact(self._index[:rows], self._count)

    def _step(self, rows: int) -> None:
        index = self._index[:rows]
        self._search.step(index, self._points, self._count)
        self._search.compact(index, self._count)

    def _finish(self, rows: int) -> None:
        """Write the results, and what is wrong with the rows that are no padding."""
        result = self._search.result(rows)
        self._outputs.write(result)
        given = self._order[:rows].to(self._device) < self._rows.to(self._device)
        outside = self._flags[:rows] == core.INPUT_OUTSIDE
        unknown = result.radius.isnan() & given
        coarse = ~result.resolved & ~unknown & given
        self._problems.copy_(
            torch.stack([each.sum() for each in (outside & given, unknown, coarse)])
        )

    # ---- construction ----------------------------------------------------------------------------

    def _under_autocast(self, dtype: torch.dtype, enabled: bool) -> Model:
        def run(x: Tensor, **model_kwargs: Any) -> Any:
            # Without the cache each cast is captured; else a graph would read what an earlier
            # forward cast, and not see the parameters change.
            with torch.autocast(self._device.type, dtype, enabled, cache_enabled=False):
                model: Any = self._model
                return model(x, **model_kwargs)

        return run

    def _allocate(self, model: Model, example: Tensor, classes: int) -> None:
        n = len(example)
        self._x = empty_rows_like(example, n, example.dtype).copy_(example)
        self._search = fgsm(model, self._x, classes, self._options)
        self._order = torch.arange(n, dtype=torch.int32, device=self._search.home)
        self._index = self._order.clone()
        self._count, self._rows = (self._order.new_full((1,), n) for _ in range(2))
        self._points = empty_rows_like(example, n * self._options.probes, example.dtype)
        self._flags = torch.zeros(n, dtype=torch.uint8, device=self._device)
        self._problems = torch.zeros(3, dtype=torch.int64, device=self._device)
        self._outputs = _Outputs(self._search.result())

    def _prepare(self, capture: bool, draws: bool) -> str:
        """Capture what runs a search, or leave it eager if that cannot be. Returns the mode."""
        recorder = graphs.graphs_for(self._search.home) if capture else None
        if recorder is None:
            return self._build(graphs.Eager())
        sizes = batch_sizes(len(self._x))
        cause = "it draws random numbers in eval mode"
        outer = sys.exc_info()[1]  # what the caller is handling
        driver: type[graphs.ReplayLoop]
        for driver in () if draws else (graphs.DeviceLoop, graphs.ReplayLoop):
            try:
                return self._build(driver(recorder, sizes, self._search.least_rounds))
            except Exception as error:
                cause = _root_cause(error, outer)
                # With a stream that is not capturing:
                recorder = graphs.graphs_for(self._device) or recorder
        warnings.warn(
            f"the model cannot be captured in CUDA graphs and runs eagerly: {cause}. "
            "capture=False runs eagerly without this warning",
            RuntimeWarning,
            stacklevel=3,
        )
        return self._build(graphs.Eager())

    def _build(self, driver: graphs.Driver) -> str:
        self._run_search = driver.loop(self._step, self._count)
        self._run_trace = driver.piece(self._trace)
        self._run_finish = driver.piece(self._finish)
        self._runs_model = driver.runs_model
        return driver.name

    def _parameter_addresses(self) -> list[int]:
        if not isinstance(self._model, nn.Module):
            return []
        return [t.data_ptr() for t in (*self._model.parameters(), *self._model.buffers())]

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return full_float32() if self._options.tf32 is False else contextlib.nullcontext()

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


def estimator_options(example_x: Tensor, **options: Unpack[SearchOptions]) -> Options:
    """The options of a `RadiusEstimator` for inputs like these, checked; raises as it does."""
    if "batch_size" in options:
        raise TypeError("the batch size of a RadiusEstimator is that of example_x")
    checked = Options.checked(example_x, **options)
    names = [attack.name for attack in checked.attacks]
    if names != ["fgsm"]:
        raise ValueError(
            f"a RadiusEstimator searches FGSM rays; for attack {', '.join(names)} use "
            "rat_ext.robust_radius"
        )
    if checked.classes is not None:
        raise ValueError(
            "target is a tensor, which is of one batch; a RadiusEstimator takes 'runner-up'. "
            "Use rat_ext.robust_radius"
        )
    return checked


class _Outputs:
    """Room for the results of a batch, one tensor for each dtype: a few copies take them out."""

    def __init__(self, like: RadiusResult) -> None:
        self._like = like
        self._names: dict[torch.dtype, list[str]] = {}
        for field in dataclasses.fields(like):
            if isinstance(value := getattr(like, field.name), Tensor):
                self._names.setdefault(value.dtype, []).append(field.name)
        self._rooms = {
            dtype: torch.zeros(len(names), len(like), dtype=dtype, device=like.radius.device)
            for dtype, names in self._names.items()
        }

    def write(self, result: RadiusResult) -> None:
        for dtype, names in self._names.items():
            values = [getattr(result, name) for name in names]
            self._rooms[dtype][:, : len(result)].copy_(torch.stack(values))

    def read(self, rows: int) -> RadiusResult:
        """The first rows, in memory of their own."""
        values = {
            name: value
            for dtype, names in self._names.items()
            for name, value in zip(names, self._rooms[dtype][:, :rows].clone(), strict=True)
        }
        return dataclasses.replace(self._like, **values)


def _random_state(device: torch.device) -> Tensor:
    """The state of every random generator that a model on `device` may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _root_cause(error: BaseException, outer: BaseException | None) -> str:
    """The error that came first: ending a capture that failed raises another one.

    `outer` was there before, and has no part in it.
    """
    while error.__context__ is not None and error.__context__ is not outer:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
