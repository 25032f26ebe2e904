"""The scores that are functions of the logits, some of them at a perturbed input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._common.user_model import wide
from .base import LogitScore
from .registry import register
from .tuned import PERTURBATIONS, TEMPERATURES, TunedLogitScore


@register("msr")
class MSR(LogitScore):
    """Maximum softmax response (Hendrycks and Gimpel, ICLR 2017)."""

    is_probability = True

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
        terms: Tensor = torch.special.entr(wide(logits).softmax(1))
        return -terms.sum(1)


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


def _log_odds(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The (N,) log-odds of the predicted class, and the (N, C) distribution over the others.

    In float32 the probability of many predictions rounds to 1, and ties that are not there spoil
    the ranking; the log-odds are exact.
    """
    scaled = wide(logits) / temperature
    top, prediction = scaled.max(1, keepdim=True)
    others = scaled.scatter(1, prediction, -math.inf)
    return top.squeeze(1) - others.logsumexp(1), others.softmax(1)
