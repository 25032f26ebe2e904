"""Attacks of foolbox, of torchattacks and of the user: they say where to look."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._common.bounds import Value
from .._common.per_sample import of_rows
from .._common.user_model import Model, logits_of
from ..search.attack import Attack, register
from ..search.checked import WIDE, Options
from ..search.result import RadiusResult
from ..search.tensors import like_rows
from .rays import VectorRay, length, unit


class AttackRay(VectorRay):
    """Searches on the rays through the points that somebody else's attack finds."""

    def __init__(self, model: Model, x: Tensor, classes: int, options: Options) -> None:
        super().__init__(model, x, classes, options)
        self.attack_rows = torch.zeros(2, len(x), dtype=torch.int64, device=x.device)

    def head(self, gradient: Tensor, begin: int) -> None:
        rows = slice(begin, begin + len(gradient))
        step, watched = self.attack(rows)
        totals = (watched.forwards, watched.backwards)
        for spent, total in zip(self.attack_rows[:, rows], totals, strict=True):
            # Which of its batch's rows an attack goes on with is not known: all pay alike.
            spent.fill_(total // len(step))[: total % len(step)] += 1
        self.direction[rows] = unit(step, self.options.norm)
        slope = self.slope(gradient, rows)
        # The ray need not start downhill; 0 would say that nothing can move.
        found = length(step, self.options.norm)
        self.start(slope.clamp_min(torch.finfo(slope.dtype).tiny).where(found > 0, 0), begin)
        parts = self.options.probes
        shares = torch.arange(1, parts + 1, device=found.device, dtype=found.dtype) / parts
        probes = (found[:, None] * shares).to(self.home)
        probes = probes.maximum(self.column("least_step")[rows, None])
        self.probes[rows] = probes.clamp_max_(self.options.eps_max)

    def attack(self, rows: slice) -> tuple[Tensor, WatchedModel]:
        """The steps from rows of x to what the attack finds, and the model that it used."""
        attack, options = self.options.attacks[0], self.options
        x = self.x[rows].contiguous()
        wide = WIDE[x.dtype]
        # Rows that are given up anyway must not upset the others.
        clip = options.bounds.clip
        x = x.where(like_rows(x.flatten(1).isfinite().all(1), x), clip(torch.zeros_like(x)))
        low: Value = 0.0
        width: Value = 1.0
        if attack.library:  # which takes inputs in [0, 1]
            low, width = options.bounds.low, options.bounds.width
            if isinstance(width, Tensor):
                width = width.where(width > 0, 1)
        watched = WatchedModel(of_rows(self.model, rows), x, low, width)
        run: Any = attack.function
        if attack.library:
            run = functools.partial(_LIBRARIES[attack.library], attack, options.steps)
        start = ((x - low) / width).to(x.dtype)
        if attack.library:
            start.clamp_(0, 1)  # what rounding did
        with torch.enable_grad():
            found = run(watched, start.clone(), self.predicted(rows))
        if not isinstance(found, Tensor) or found.shape != x.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"attack {attack.name!r} returned {what}; expected inputs of shape {tuple(x.shape)}"
            )
        # A difference of the library's points, so that what it left alone has not moved at all.
        step = ((found.detach().to(x.device, wide) - start.to(wide)) * width).to(wide)
        return clip(x.to(wide) + step) - x.to(wide), watched

    def result(self, rows: int | None = None) -> RadiusResult:
        result = super().result(rows)
        forwards, backwards = self.attack_rows[:, :rows]
        return replace(
            result,
            forward_rows=result.forward_rows + forwards,
            backward_rows=backwards.clone(),
            worst_case_rows=result.worst_case_rows + int(forwards.max()),
        )


class WatchedModel(nn.Module):
    """The model as other people's attacks see it: rows are counted, and it is left alone.

    It takes inputs of any floating dtype, ``low + width * u`` being what the model gets. Gradients
    reach the inputs and nothing else: ``backward()`` leaves no ``.grad`` on the model's parameters.
    """

    def __init__(self, model: Model, x: Tensor, low: Value, width: Value) -> None:
        super().__init__()
        self.training = False
        self.device_of = nn.Parameter(x.new_empty(0), requires_grad=False)  # libraries ask for it
        self.model, self.dtype, self.low, self.width = model, x.dtype, low, width
        self.forwards = self.backwards = 0

    def run(self, u: Tensor) -> Tensor:
        x = (self.low + self.width * u).to(self.dtype)
        return logits_of(self.model(x), len(u)).to(u.dtype)

    def forward(self, u: Tensor) -> Tensor:
        self.forwards += len(u)
        if u.requires_grad and torch.is_grad_enabled():
            logits: Tensor = _ToTheInput.apply(u, self)
            return logits
        with torch.no_grad():
            return self.run(u)


class _ToTheInput(torch.autograd.Function):
    """A watched model's logits, with a gradient in the input alone."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, watched: WatchedModel) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = u.detach().requires_grad_()
            ctx.logits = watched.run(ctx.leaf)
        ctx.watched = watched
        logits: Tensor = ctx.logits.detach()
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor, None]:
        ctx.watched.backwards += len(seed)
        # FAB asks for one gradient after the other.
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.leaf, seed, retain_graph=True)
        return gradient, None


def _foolbox(
    attack: Attack, steps: int | None, model: WatchedModel, u: Tensor, y: Tensor
) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what newer libraries deprecate
        import foolbox

    kinds = {
        "deepfool": foolbox.attacks.LinfDeepFoolAttack,
        "deepfool_l2": foolbox.attacks.L2DeepFoolAttack,
        "fmn": foolbox.attacks.LInfFMNAttack,
        "fmn_l2": foolbox.attacks.L2FMNAttack,
    }
    run = kinds[attack.name](**({} if steps is None else {"steps": steps})).run
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=u.device)
    found: Tensor = run(wrapped, u, foolbox.criteria.Misclassification(y))
    return found


def _torchattacks(
    attack: Attack, steps: int | None, model: WatchedModel, u: Tensor, y: Tensor
) -> Tensor:
    import torchattacks

    norm = {"linf": "Linf", "l2": "L2"}[attack.norm]
    options = {} if steps is None else {"steps": steps}
    # eps is where it gives up; nothing in the bounds is that far.
    start = u.float()  # the one dtype that it knows
    found: Tensor = torchattacks.FAB(model, norm=norm, eps=math.inf, **options)(start, y)
    return u + (found - start)


_LIBRARIES = {"foolbox": _foolbox, "torchattacks": _torchattacks}

for _name, _library in (("deepfool", "foolbox"), ("fmn", "foolbox"), ("fab", "torchattacks")):
    register(_name, library=_library, iterative=True)(AttackRay)
    register(f"{_name}_l2", norm="l2", library=_library, iterative=True)(AttackRay)
