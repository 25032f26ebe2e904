"""Confidence scores of a classifier's predictions: the baselines that radii are compared with.

A score is an object with two methods: ``fit(model, loader)``, which chooses or learns what the
score has to from held-out data, and ``score(model, x)``, which gives (N,) confidences, larger for
predictions more likely to be right. Only the order of the confidences has a meaning.

    score = scores.get("odin", perturbation=0.0).fit(model, validation_loader)
    confidence = score.score(model, x)

A score of one's own is registered in one line, and is then like the others:

    @scores.register("second-logit")
    class SecondLogit(scores.LogitScore):
        def score_logits(self, logits):
            return -logits.topk(2, dim=1).values[:, 1]
"""

from __future__ import annotations

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from . import metrics
from ._model import Model, check_device, logits_of, undisturbed

if TYPE_CHECKING:
    from typing_extensions import Self

# The grids of the evaluation code of RAT (arXiv 2503.14783).
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, 2.5, 3.0, 100.0, 1000.0)
PERTURBATIONS = (0.0, 5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4, 3.5e-4, 4e-4, 6e-4, 8e-4, 1e-3)

_registry: dict[str, type[Score]] = {}
_ScoreType = TypeVar("_ScoreType", bound="type[Score]")


def register(name: str) -> Callable[[_ScoreType], _ScoreType]:
    """Class decorator that makes a `Score` available as ``get(name)``.

    Raises:
        ValueError: another class has this name.
        TypeError: the class is not a Score.
    """

    def add(cls: _ScoreType) -> _ScoreType:
        if not issubclass(cls, Score):
            raise TypeError(f"{cls.__name__} is not a rat_ext.scores.Score; derive it from one")
        if name in _registry:
            raise ValueError(f"{name!r} is already {_registry[name].__qualname__}; choose another")
        _registry[name] = cls
        return cls

    return add


def names() -> list[str]:
    """The registered names, in the order of registration."""
    return list(_registry)


def get(name: str, **options: Any) -> Score:
    """A new score by its registered name; options go to its constructor.

    Raises:
        ValueError: no score has this name.
    """
    if name not in _registry:
        raise ValueError(f"no score is named {name!r}; there are {', '.join(map(repr, names()))}")
    return _registry[name](**options)


def name_of(score: Score) -> str | None:
    """The name under which a score's class is registered; None if it is not."""
    return next((name for name, cls in _registry.items() if cls is type(score)), None)


class Score(ABC):
    """What all scores have in common."""

    forward_rows: float = 1.0
    """Rows through the model forward, per sample, that score() takes."""
    backward_rows: float = 0.0
    """Rows through the model backward, per sample, that score() takes."""
    logits_only: bool = False
    """The score needs the logits of x alone: ``score_logits(model(x))`` equals ``score(model, x)``,
    so that one forward can serve many scores."""

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Choose from held-out data what the score leaves open; here nothing.

        Args:
            model: as in `score`.
            loader: yields (x, target, ...): (N, ...) inputs and (N,) class indices that the model
                was not trained on.
            progress: show a tqdm bar on standard error.
        """
        return self

    @property
    def needs_fit(self) -> bool:
        """fit() has to be called before score().

        A score with a fit() of its own tells when that is done; until it does, it always needs it.
        """
        return type(self).fit is not Score.fit

    @abstractmethod
    def score(self, model: Model, x: Tensor) -> Tensor:
        """Confidences in the model's predictions.

        The model is run in eval mode and left as it was: parameters, their ``.grad``, train/eval
        flags and random state.

        Args:
            model: callable from (N, ...) inputs to (N, C) logits, C >= 2, or to an object with
                ``.logits``.
            x: (N, ...) inputs on the model's device.

        Returns:
            (N,) confidences on x's device, without a graph; nan where the logits are nan.
        """

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        """The confidences of `score`, and the (N,) int64 predictions that they are of.

        The built-in scores get the predictions on the way; here they cost one more forward.
        """
        confidence = self.score(model, x)
        if not len(x):
            return confidence, _no_prediction(x)
        with _left_alone(model, x):
            return confidence, logits_of(model(x), len(x)).argmax(1)

    def state(self) -> dict[str, Any]:
        """What `from_state` makes this score from: tensors, and values that JSON has.

        A class with a constructor or a fit() of its own defines this one, too.

        Raises:
            TypeError: the score has attributes, and no state() that tells which of them matter.
        """
        if vars(self):
            raise TypeError(f"{type(self).__name__} does not define state()")
        return {}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The score, fitted, whose state() this was; here state() has the constructor's options."""
        return cls(**state)


class LogitScore(Score):
    """A score that is a function of the logits, the one thing that a subclass writes."""

    logits_only = True

    @abstractmethod
    def score_logits(self, logits: Tensor) -> Tensor:
        """(N,) confidences from (N, C) logits, differentiable in the logits."""

    def score(self, model: Model, x: Tensor) -> Tensor:
        return self.score_and_predict(model, x)[0]

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_empty(0), _no_prediction(x)
        with _left_alone(model, x):
            logits = logits_of(model(x), len(x))
            return self.score_logits(logits), logits.argmax(1)


@register("msr")
class MSR(LogitScore):
    """Maximum softmax response (Hendrycks and Gimpel, ICLR 2017)."""

    def score_logits(self, logits: Tensor) -> Tensor:
        return _log_odds(logits)[0].sigmoid()


@register("max-logit")
class MaxLogit(LogitScore):
    """The largest logit (Hendrycks et al., ICML 2022)."""

    def score_logits(self, logits: Tensor) -> Tensor:
        return logits.amax(1)


@register("margin")
class Margin(LogitScore):
    """The difference between the two largest logits."""

    def score_logits(self, logits: Tensor) -> Tensor:
        first, second = logits.topk(2, dim=1).values.unbind(1)
        return first - second


@register("negative-entropy")
class NegativeEntropy(LogitScore):
    """The negated Shannon entropy of the softmax, in nats."""

    def score_logits(self, logits: Tensor) -> Tensor:
        return -torch.special.entr(wide(logits).softmax(1)).sum(1)


class Setting(NamedTuple):
    """What a `TunedScore` chooses from its grid."""

    temperature: float
    perturbation: float


class TunedScore(Score):
    """A score with a temperature and an input perturbation; fit() chooses them from a grid.

    The choice is the setting with the smallest AURC on the held-out data, the first of equals. A
    grid of one setting leaves nothing to choose: fit() does nothing and is not needed.

    Args:
        temperature: one, or several for fit() to choose from; each > 0.
        perturbation: likewise; each >= 0, in the units of x.

    Raises:
        ValueError: a value out of its range, or none at all.
    """

    validation_aurc: dict[Setting, float]
    """After a fit() with several settings: the AURC of each."""

    def __init__(
        self, temperature: float | Sequence[float], perturbation: float | Sequence[float] = 0.0
    ) -> None:
        temperatures = _grid("temperature", temperature, lambda value: value > 0)
        perturbations = _grid("perturbation", perturbation, lambda value: value >= 0)
        self.grid = [Setting(t, p) for t in temperatures for p in perturbations]
        self.validation_aurc = {}
        self._setting = self.grid[0] if len(self.grid) == 1 else None

    @property
    def needs_fit(self) -> bool:
        return self._setting is None

    @property
    def setting(self) -> Setting:
        """The temperature and perturbation in use.

        Raises:
            RuntimeError: there are several, and fit() has not chosen yet.
        """
        if self._setting is None:
            raise RuntimeError(
                f"{type(self).__name__} has {len(self.grid)} settings to choose from: call "
                "fit(model, loader) with held-out data first, or construct it with one temperature "
                "and one perturbation"
            )
        return self._setting

    @property
    def temperature(self) -> float:
        """The temperature in use."""
        return self.setting.temperature

    @property
    def perturbation(self) -> float:
        """The perturbation in use."""
        return self.setting.perturbation

    @abstractmethod
    def score_settings(
        self, model: Model, x: Tensor, settings: Sequence[Setting]
    ) -> tuple[Tensor, Tensor]:
        """(settings, N) confidences at each setting, and the (N,) predictions."""

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Choose the setting with the smallest AURC on (x, target, ...) batches held out."""
        if len(self.grid) == 1:
            return self
        confidences, correct = [], []
        for x, target in labelled_batches(model, loader, progress, f"fit {type(self).__name__}"):
            confidence, prediction = self.score_settings(model, x, self.grid)
            confidences.append(confidence.cpu())
            correct.append((prediction == target).cpu())
        self._choose(torch.cat(confidences, 1), torch.cat(correct))
        return self

    def _choose(self, confidences: Tensor, correct: Tensor) -> None:
        aurcs = [metrics.aurc(confidence, correct) for confidence in confidences]
        self.validation_aurc = dict(zip(self.grid, aurcs, strict=True))
        self._setting = min(self.grid, key=self.validation_aurc.__getitem__)

    def at(self, setting: Setting) -> Self:
        """This score with one setting, which needs no fit() to choose it."""
        score = copy.copy(self)
        score._setting = setting
        return score


class TunedLogitScore(TunedScore, LogitScore):
    """A `LogitScore` with a temperature, taken at an input that may be perturbed.

    The input of perturbation eps is ``clip(x + step_sign * eps * sign(grad_x score), *bounds)``. A
    score that is perturbed must not saturate, or the sign is lost in rounding: the log-odds of a
    probability have the gradient's sign, the probability itself has it only in exact arithmetic.

    Args:
        temperature: one, or several for fit() to choose from; each > 0.
        perturbation: likewise; each >= 0, in the units of x. fit() takes a backward per temperature
            and a forward per temperature and perturbation other than 0.
        bounds: smallest and largest value of an input element, for perturbed inputs.
    """

    step_sign: ClassVar[int] = 1
    """+1: the perturbation raises the confidence; -1: it lowers it."""

    def __init__(
        self,
        temperature: float | Sequence[float] = TEMPERATURES,
        perturbation: float | Sequence[float] = 0.0,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(temperature, perturbation)
        if not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ValueError(f"bounds is {bounds}; expected (low, high) with low below high")
        self.bounds = bounds

    @property
    def logits_only(self) -> bool:
        return self.perturbation == 0

    @property
    def forward_rows(self) -> float:
        return 1.0 if self.logits_only else 2.0

    @property
    def backward_rows(self) -> float:
        return 0.0 if self.logits_only else 1.0

    def score_and_predict(self, model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        if not len(x):
            return x.new_empty(0), _no_prediction(x)
        confidences, prediction = self.score_settings(model, x, [self.setting])
        return confidences[0], prediction

    def state(self) -> dict[str, Any]:
        return {**self.setting._asdict(), "bounds": list(self.bounds)}

    def score_settings(
        self, model: Model, x: Tensor, settings: Sequence[Setting]
    ) -> tuple[Tensor, Tensor]:
        perturbed = any(setting.perturbation for setting in settings)
        if perturbed:
            self._check_bounds(x)
        with _left_alone(model, x):
            # A tensor made in inference mode cannot enter a graph.
            leaf = x.clone() if x.is_inference() else x.detach()
            with torch.set_grad_enabled(perturbed):
                logits = logits_of(model(leaf.requires_grad_(perturbed)), len(x))
            x, confidences, directions = leaf.detach(), [], {}
            for setting in settings:
                score = self.at(setting)
                at = logits.detach()
                if setting.perturbation:
                    if setting.temperature not in directions:
                        directions[setting.temperature] = score._direction(logits, leaf)
                    step = self.step_sign * setting.perturbation
                    point = x + step * directions[setting.temperature]
                    at = logits_of(model(point.clamp(*self.bounds)), len(x))
                confidences.append(score.score_logits(at))
        return torch.stack(confidences), logits.detach().argmax(1)

    def _direction(self, logits: Tensor, leaf: Tensor) -> Tensor:
        """The sign of the gradient of the score with respect to the input."""
        if not logits.requires_grad:
            raise RuntimeError(
                "the logits do not depend on the input through autograd, so there is no direction "
                "to perturb it in. Is the model's forward under no_grad, or does it detach? With "
                "perturbation=0.0 no gradient is needed"
            )
        with torch.enable_grad():
            values = wide(logits.detach()).requires_grad_()
            (seed,) = torch.autograd.grad(self.score_logits(values).sum(), values)
        (gradient,) = torch.autograd.grad(logits, leaf, seed.to(logits.dtype), retain_graph=True)
        return gradient.sign()

    def _check_bounds(self, x: Tensor) -> None:
        low, high = self.bounds
        least, most = (value.item() for value in x.detach().aminmax())
        if least < low or most > high:
            raise ValueError(
                f"x has values from {least:.4g} to {most:.4g}, outside bounds ({low:g}, {high:g}). "
                "The usual cause is normalising before the model: put the normalisation inside the "
                "model, as its first layer. If x has another range, pass bounds=(low, high)"
            )


@register("energy")
class Energy(TunedLogitScore):
    """The negated free energy ``T * logsumexp(z / T)`` (Liu et al., NeurIPS 2020, section 3)."""

    def __init__(self, temperature: float | Sequence[float] = 1.0) -> None:
        super().__init__(temperature)

    def state(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def score_logits(self, logits: Tensor) -> Tensor:
        return self.temperature * (logits / self.temperature).logsumexp(1)


@register("odin")
class ODIN(TunedLogitScore):
    """The maximum S of the softmax of ``z / T``, at the input perturbed to raise it.

    Liang et al., ICLR 2018, section 3: ``x - eps * sign(-grad_x log S(x; T))``. The confidence is
    the log-odds ``log(S / (1 - S))``, which orders the samples as S does but does not saturate at
    low temperatures, and whose gradient has the same sign.
    """

    def __init__(
        self,
        temperature: float | Sequence[float] = TEMPERATURES,
        perturbation: float | Sequence[float] = PERTURBATIONS,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(temperature, perturbation, bounds)

    state = TunedLogitScore.state

    def score_logits(self, logits: Tensor) -> Tensor:
        return _log_odds(logits, self.temperature)[0]


@register("doctor-alpha")
class DoctorAlpha(TunedLogitScore):
    """DOCTOR's D_alpha: ``-log((1 - g) / g)`` with g the sum of the squared softmax of ``z / T``.

    Granese et al., NeurIPS 2021. The perturbed input of their partially-black-box scenario is
    ``x - eps * sign(-grad_x log((1 - g) / g))``, which lowers the confidence, unlike ODIN's; the
    default is their totally-black-box scenario, without a perturbation.
    """

    step_sign = -1

    def score_logits(self, logits: Tensor) -> Tensor:
        # With p the largest probability, q = 1 - p and r the distribution over the other classes,
        # g = p^2 + q^2 |r|^2 and 1 - g = q (1 + p - q |r|^2): nothing cancels when q is tiny.
        log_odds, others = _log_odds(logits, self.temperature)
        p, q = log_odds.sigmoid(), (-log_odds).sigmoid()
        squared = others.square().sum(1)
        log_error = logsigmoid(-log_odds) + (1 + p - q * squared).log()
        return (p.square() + q.square() * squared).log() - log_error


@register("doctor-beta")
class DoctorBeta(TunedLogitScore):
    """DOCTOR's D_beta: ``-log(P / (1 - P))`` with ``P = 1 - max softmax(z / T)``.

    Granese et al., NeurIPS 2021; perturbed as `DoctorAlpha`. Without a perturbation it is ODIN's
    score.
    """

    step_sign = -1

    def score_logits(self, logits: Tensor) -> Tensor:
        return _log_odds(logits, self.temperature)[0]


@register("rel-u")
class RelU(TunedLogitScore):
    """Rel-U: ``-p D p^T`` with p the softmax of ``z / T`` and D learned from held-out data.

    Dadalto et al., ICLR 2024 (arXiv 2306.01710), sections 2 and 3: off the diagonal ``D =
    relu(weight * E[p p^T | wrong] - (1 - weight) * E[p p^T | right])``, on it 0. D is scaled to
    norm 1; where it is all zero it is replaced by ones (Gini), as in the authors' code.

    Of several temperatures, fit() chooses by AURC on every second sample with D learned from the
    others, then learns D from all samples.

    Args:
        temperature: one, or several for fit() to choose from; each > 0.
        weight: the paper's lambda, in [0, 1]: how much wrong predictions count.
    """

    def __init__(
        self, temperature: float | Sequence[float] = TEMPERATURES, weight: float = 0.5
    ) -> None:
        super().__init__(temperature)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}; it must be from 0 to 1")
        self.weight = weight
        self.matrix: Tensor | None = None
        """(C, C) float64: D, after fit()."""

    @property
    def needs_fit(self) -> bool:
        return self.matrix is None

    def state(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "weight": self.weight, "matrix": self.matrix}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        options = dict(state)
        matrix = options.pop("matrix")
        score = cls(**options)
        score.matrix = matrix
        return score

    def fit(self, model: Model, loader: Iterable[Any], *, progress: bool = True) -> Self:
        """Learn D, and choose the temperature, on (x, target, ...) batches held out.

        Raises:
            ValueError: the predictions there are all right, or all wrong.
        """
        logits, correct = [], []
        for x, target in labelled_batches(model, loader, progress, "fit RelU"):
            with _left_alone(model, x):
                batch = logits_of(model(x), len(x))
            logits.append(batch.cpu())
            correct.append((batch.argmax(1) == target).cpu())
        all_logits, all_correct = torch.cat(logits), torch.cat(correct)
        if len(self.grid) > 1:
            candidates = [self.at(setting) for setting in self.grid]
            for candidate in candidates:
                candidate._learn(all_logits[::2], all_correct[::2])
            confidences = [candidate.score_logits(all_logits[1::2]) for candidate in candidates]
            self._choose(torch.stack(confidences), all_correct[1::2])
        self._learn(all_logits, all_correct)
        return self

    def _learn(self, logits: Tensor, correct: Tensor) -> None:
        if correct.all() or not correct.any():
            raise ValueError(
                f"RelU learns from right and wrong predictions, but all {len(correct)} held out to "
                f"learn from are {'right' if correct.all() else 'wrong'}; use more data"
            )
        p = (wide(logits) / self.temperature).softmax(1)
        right, wrong = p[correct], p[~correct]
        matrix = self.weight * (wrong.T @ wrong) / len(wrong)
        matrix -= (1 - self.weight) * (right.T @ right) / len(right)
        matrix = matrix.relu().fill_diagonal_(0)
        if not matrix.any():
            matrix = torch.ones_like(matrix).fill_diagonal_(0)
        self.matrix = matrix / matrix.norm()

    def score_logits(self, logits: Tensor) -> Tensor:
        if self.matrix is None:
            raise RuntimeError("RelU is not fitted: call fit(model, loader) with held-out data")
        p = (wide(logits) / self.temperature).softmax(1)
        return -((p @ self.matrix.to(p)) * p).sum(1)


def wide(logits: Tensor) -> Tensor:
    """Logits in float64, in which the softmax of a confident prediction is not yet 1."""
    return logits.float() if logits.device.type == "mps" else logits.double()


def _log_odds(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The (N,) log-odds of the predicted class, and the (N, C) distribution over the others.

    In float32 the probability of many predictions rounds to 1, and ties that are not there spoil
    the ranking; the log-odds are exact.
    """
    scaled = wide(logits) / temperature
    top, prediction = scaled.max(1, keepdim=True)
    others = scaled.scatter(1, prediction, -math.inf)
    return top.squeeze(1) - others.logsumexp(1), others.softmax(1)


def _grid(
    name: str, values: float | Sequence[float], allowed: Callable[[float], bool]
) -> list[float]:
    grid = [float(value) for value in (values if isinstance(values, Iterable) else [values])]
    if not grid:
        raise ValueError(f"{name} is empty; give one value, or several to choose from")
    for value in grid:
        if not (math.isfinite(value) and allowed(value)):
            raise ValueError(f"{name} {value} is out of range")
    return grid


@contextlib.contextmanager
def _left_alone(model: Model, x: Tensor) -> Iterator[None]:
    """Run the model on x without a graph, and leave it as it was."""
    check_device(model, x)
    with torch.inference_mode(False), torch.no_grad(), undisturbed(model, x.device):
        yield


def _no_prediction(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device)


def labelled_batches(
    model: Model, loader: Iterable[Any], progress: bool, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The (x, target) of each batch, on the device of the model."""
    from tqdm.auto import tqdm

    device = None
    if isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), None)
    empty = True
    for batch in tqdm(loader, desc=what, unit="batch", disable=not progress):
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError("the loader must yield (x, target, ...): fitting needs the targets")
        x, target = batch[0].to(device), torch.as_tensor(batch[1]).to(device)
        if target.shape != (len(x),):
            raise ValueError(
                f"targets have shape {tuple(target.shape)} for {len(x)} inputs; expected class "
                f"indices of shape ({len(x)},)"
            )
        empty = False
        yield x, target
    if empty:
        raise ValueError("the loader gave no batch")
