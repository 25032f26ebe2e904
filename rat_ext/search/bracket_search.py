"""The bracket searches of a batch, run in the compiled core (csrc/rule/search.h has the rule)."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from .._common.per_sample import PerSample, of_rows
from .._common.user_model import Model, logits_of
from .._core import core
from .checked import WIDE, Options
from .place import launch_arguments, state_device
from .result import RadiusResult
from .tensors import empty_rows_like, for_core, like_rows, plain, ray_room

_COLUMN = {name: i for i, name in enumerate(core.BRACKET_FIELDS)}


class ActiveCount:
    """Reads from the device how many rows are active.

    On a GPU the number comes by an asynchronous copy to pinned memory, and the host waits for the
    event behind it alone. In the first `sure` rounds no row can have settled (unless it is not
    finite or cannot move), so `total` is returned at once, and the host runs ahead. Reading every
    count one round late would spare the other waits too, of some microseconds each, but it costs
    exactly one forward row more for every sample: the rows launched would be those that were active
    a round before.
    """

    def __init__(self, device: torch.device, total: int = 0, sure: int = 0) -> None:
        self.total, self.sure = total, sure
        self.device = device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.host = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self.event = torch.cuda.Event()

    def __call__(self, count: Tensor) -> int:
        """How many rows are active at most; never fewer than the (1,) int32 `count`."""
        if not self.on_gpu:
            return int(count)
        if self.sure > 0:
            self.sure -= 1
            return self.total
        self.host.copy_(count, non_blocking=True)
        self.event.record(torch.cuda.current_stream(self.device))
        self.event.synchronize()
        return int(self.host)


class BracketSearch:
    """The bracket searches of all rows of x, each on its FGSM ray.

    In order: `aim` takes the ray of each row, `exclude` gives up some rows, `run` searches, and
    `result` tells what was found. Searches on other rays override `head` and `points_at`.

    Where only a change to one class counts (`options.classes`), the core is shown two classes: all
    others as one, with the largest of their logits, and the target.

    `home` is the device of what the core works on: brackets, gaps, probes, and indices of rows.
    """

    def __init__(self, model: Model, x: Tensor, classes: int, options: Options) -> None:
        self.model, self.x, self.options = model, x, options
        self.home = home = state_device(x.device)
        self.padded_rows = 0
        n, dtype = len(x), WIDE[x.dtype]
        self.target, self.at_x = options.classes, torch.full((n,), -1, device=x.device)
        if self.target is not None:
            classes = 2
        self.direction = empty_rows_like(x, n, torch.int8)
        self.brackets = torch.empty(n, len(_COLUMN), dtype=dtype, device=home)
        self.probes = torch.empty(n, options.probes, dtype=dtype, device=home)
        self.gaps = torch.empty(n, core.KNOTS * classes, dtype=dtype, device=home)
        self.state = core.State(
            self.brackets,
            self.gaps,
            self.probes,
            rtol=options.narrowest,
            eps_max=options.eps_max,
            temperature=options.temperature,
            bisect_from=options.first_step if options.bisect else 0.0,
        )

    def aim(self, leaf: Tensor, logits: Tensor, begin: int = 0, retain_graph: bool = False) -> None:
        """Take the ray of rows begin, begin + 1, ... from the logits of `leaf` and their graph."""
        rows = slice(begin, begin + len(leaf))
        values = for_core(logits, self.x)
        shown = self.shown(values, rows).to(self.home)
        seed = torch.empty_like(shown)
        core.start(shown, seed, self.state, begin, **self.launch)
        if self.target is not None:
            seed = target_seed(values, self.target[rows], self.options.temperature)
            self.at_x[rows] = values.argmax(1)
            there = (self.at_x[rows] == self.target[rows]).to(self.home)
            there &= self.column("status")[rows] != core.NOT_FINITE
            self.column("upper")[rows].masked_fill_(there, 0)
            self.column("status")[rows].masked_fill_(there, core.FOUND)
        elif self.options.target is not None:
            seed = runner_up_seed(values, self.predicted(rows))
        (gradient,) = torch.autograd.grad(
            logits, leaf, seed.to(logits.device, logits.dtype), retain_graph=retain_graph
        )
        self.head(gradient, begin)
        if self.options.method == "fast":
            self.probes[begin : begin + len(leaf)].fill_(self.options.h)

    def head(self, gradient: Tensor, begin: int) -> None:
        """Take the direction and the first probes of rows begin, ... from the input gradient."""
        low, high = self.options.low, self.options.high
        rows = slice(begin, begin + len(gradient))
        x, direction = self.x[rows], self.direction[rows]
        gradient = plain(gradient)
        if gradient.stride() != x.stride():
            gradient = empty_rows_like(x, len(x), x.dtype).copy_(gradient)
        room = ray_room(x)
        core.aim(gradient, x, direction, low, high, self.state, begin, room, **self.launch)

    def exclude(self, rows: Tensor) -> None:
        """Give up the first len(rows) rows where the (...,) bool `rows` is True."""
        self.column("status")[: len(rows)].masked_fill_(rows.to(self.home), core.NOT_FINITE)

    def compact(self, index: Tensor, count: Tensor) -> None:
        """Move the active ones of the first `count` rows in `index` to its front; update count."""
        core.compact(index, self.state, index, count, count, **self.launch)

    def step(self, index: Tensor, points: Tensor, count: Tensor) -> None:
        """Probe the rows in `index`; those beyond the (1,) int32 `count` do not change."""
        logits = self.logits_at(index, self.probes, points, count).to(self.home)
        if self.options.method == "fast":
            core.extrapolate(logits, index, self.options.h, self.state, count, **self.launch)
        else:
            core.advance(logits, index, self.state, count, **self.launch)

    def logits_at(self, index: Tensor, radii: Tensor, points: Tensor, count: Tensor) -> Tensor:
        """Logits of the rows in `index` at each of their `radii`; `points` is room for them."""
        points = points[: len(index) * radii.shape[1]]
        self.points_at(index, radii, points, count)
        model, rows = self.model, None
        if self.target is not None or isinstance(model, PerSample):
            rows = index.long().repeat_interleave(radii.shape[1])
            model = of_rows(model, rows)
        logits = for_core(logits_of(model(points), len(points)), self.x)
        return logits if rows is None else self.shown(logits, rows)

    def shown(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """What the core sees of the logits of some rows: all, or (n, 2) others and target."""
        if self.target is None:
            return logits
        target = self.target[rows].to(logits.device)[:, None]
        others = logits.scatter(1, target, -math.inf).amax(1, keepdim=True)
        both = torch.cat([others, logits.gather(1, target)], 1)
        return both.masked_fill(~logits.isfinite().all(1, keepdim=True), math.nan)

    def points_at(self, index: Tensor, radii: Tensor, points: Tensor, count: Tensor) -> None:
        """Write the points of the rays of the rows in `index` at each of their `radii`."""
        low, high = self.options.low, self.options.high
        core.perturb(self.x, self.direction, index, radii, low, high, points, count, **self.launch)

    def changed_points(self) -> Tensor:
        """Like x: the points at `upper`; of rows that are not found, any."""
        n = len(self.x)
        index = torch.arange(n, dtype=torch.int32, device=self.home)
        count = torch.full((1,), n, dtype=torch.int32, device=self.home)
        upper = self.column("upper").nan_to_num(posinf=0)[:, None]
        points = empty_rows_like(self.x, n, self.x.dtype)
        self.points_at(index, upper, points, count)
        return points

    def run(self) -> None:
        """Probe until no row is active. Finished rows leave the batch, and waiting ones fill it."""
        n, probes = len(self.x), self.options.probes
        index = torch.arange(n, dtype=torch.int32, device=self.home)
        count = torch.full((1,), n, dtype=torch.int32, device=self.home)
        active = ActiveCount(self.home, total=n, sure=self.least_rounds)
        rows = max(1, min(self.options.batch_size or n, n) // probes)
        sizes = batch_sizes(rows) if self.pads else range(1, rows + 1)
        points = empty_rows_like(self.x, rows * probes, self.x.dtype).zero_()
        while True:
            self.compact(index, count)
            alive = active(count)
            if not alive:
                return
            whole, rest = divmod(alive, rows)
            run = min(len(index), whole * rows + (sizes[bisect_left(sizes, rest)] if rest else 0))
            self.padded_rows += (run - alive) * probes
            index = index[:run]
            for i, part in enumerate(index.split(rows)):
                left = count if i == 0 else (count - i * rows).clamp_min_(0)
                self.step(part, points, left)

    @property
    def launch(self) -> dict[str, Any]:
        """How the core is run."""
        return launch_arguments(self.home)

    @property
    def pads(self) -> bool:
        """Batches come in few sizes, because the model is planned or compiled for each anew.

        Rows that are settled fill them up; they are counted in `padded_rows`.
        """
        model = self.model.model if isinstance(self.model, PerSample) else self.model
        compiled = hasattr(model, "_orig_mod") or hasattr(model, "_torchdynamo_orig_callable")
        return compiled or self.x.device.type != "cpu"

    @property
    def least_rounds(self) -> int:
        """No row settles in fewer rounds, unless it is not finite or cannot move."""
        # One probe a round shows one side of the flip only.
        return 2 if self.options.method == "bs" and self.options.probes == 1 else 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a search changes, each with one row per sample."""
        return self.brackets, self.gaps, self.probes

    def column(self, name: str) -> Tensor:
        """(N,) view of one field of the brackets (csrc/rule/bracket.h)."""
        return self.brackets[:, _COLUMN[name]]

    def predicted(self, rows: slice | Tensor) -> Tensor:
        """int64: the classes at radius 0 of some rows; any class for those that are not finite."""
        classes = self.gaps.shape[1] // core.KNOTS
        return self.column("prediction")[rows].long().clamp_(0, classes - 1).to(self.x.device)

    def resolved(self, lower: Tensor, upper: Tensor, found: Tensor) -> Tensor:
        """Whether a bracket is as narrow as was asked for; the whole ray, where nothing flipped."""
        narrow = upper - lower <= self.options.rtol * upper
        return narrow.where(found, lower >= self.options.eps_max)

    def result(self, rows: int | None = None) -> RadiusResult:
        """The results of the first `rows` rows, of all by default."""
        brackets = self.brackets[:rows].to(self.x.device)
        column = {name: brackets[:, i] for name, i in _COLUMN.items()}
        status = column["status"]
        finite = status != core.NOT_FINITE
        lower = column["lower"].where(finite, math.nan)
        upper = column["upper"].where(finite, math.nan)
        found = status == core.FOUND
        prediction, flipped_to = column["prediction"].long(), column["flipped_to"].long()
        if self.target is not None:
            prediction, flipped_to = self.at_x[:rows], self.target[:rows]
        searched = self.options.method == "bs"
        x_adv = None
        if self.options.keep_points:
            x_adv = self.changed_points().where(like_rows(found, self.x), self.x)
        return RadiusResult(
            radius=(lower + upper) / 2,
            lower=lower,
            upper=upper,
            found=found,
            resolved=self.resolved(lower, upper, found),
            prediction=prediction.where(finite, -1),
            flipped_to=flipped_to.where(found, -1),
            forward_rows=column["rows"].long(),
            fallbacks=column["fallbacks"].long(),
            backward_rows=torch.zeros_like(status, dtype=torch.int64),
            won=torch.zeros_like(status, dtype=torch.int64),
            worst_case_rows=self.state.max_rows() if searched else 0,
            padded_rows=self.padded_rows,
            norm=self.options.norm,
            attacks=tuple(attack.name for attack in self.options.attacks),
            x_adv=x_adv,
        )


def batch_sizes(most: int) -> list[int]:
    """The few sizes that batches come in: 1, 2, 3, 4, 6, 8, 12, ... and the most."""
    powers = [2**k for k in range(most.bit_length())]
    sizes = sorted({*powers, *(3 * p // 2 for p in powers[1:])})
    return [*(size for size in sizes if size < most), most]


def target_seed(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Gradient of the target's log-odds: +1 for it, minus the others' softmax among themselves."""
    t = target.to(logits.device)[:, None]
    wide = logits.to(WIDE[logits.dtype])
    others = (wide / temperature).scatter(1, t, -math.inf).softmax(1)
    return others.neg_().scatter_(1, t, 1)


def runner_up_seed(logits: Tensor, prediction: Tensor) -> Tensor:
    """Gradient of the runner-up's logit minus the prediction's: +1 and -1, 0 elsewhere."""
    y = prediction[:, None]
    runner_up = logits.scatter(1, y, -math.inf).argmax(1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, runner_up, 1).scatter_(1, y, -1)
