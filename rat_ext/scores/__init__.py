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

from .base import LogitScore, Score, Setting
from .of_logits import (
    MSR,
    ODIN,
    DoctorAlpha,
    DoctorBeta,
    Energy,
    Margin,
    MaxLogit,
    NegativeEntropy,
)
from .registry import get, kind_of, name_of, names, register
from .tuned import PERTURBATIONS, TEMPERATURES, TunedLogitScore, TunedScore

# names() lists them in the order of these imports.
from .rel_u import RelU  # isort: skip
from .radius import RRBS, RadiusScore, RRFast  # isort: skip
from .views import MSRViews  # isort: skip
from .pytorch_ood import PytorchOOD  # isort: skip
from .cascade import Cascade  # isort: skip

__all__ = [
    "MSR",
    "ODIN",
    "PERTURBATIONS",
    "RRBS",
    "TEMPERATURES",
    "Cascade",
    "DoctorAlpha",
    "DoctorBeta",
    "Energy",
    "LogitScore",
    "MSRViews",
    "Margin",
    "MaxLogit",
    "NegativeEntropy",
    "PytorchOOD",
    "RRFast",
    "RadiusScore",
    "RelU",
    "Score",
    "Setting",
    "TunedLogitScore",
    "TunedScore",
    "get",
    "kind_of",
    "name_of",
    "names",
    "register",
]
