"""A gate for predictions: which of a classifier's predictions to act on.

    detector = Detector.fit(model, held_out_loader, "rr-bs", target_risk=0.05)
    out = detector(x)
    out.prediction[out.accepted]  # at most 5 % of these are wrong

The threshold is chosen on held-out data by a risk, a coverage or a share of right predictions that
is to be kept. A target risk is guaranteed in the sense of Geifman and El-Yaniv, "Selective
Classification for Deep Neural Networks" (NeurIPS 2017): see `Detector.fit`.
"""

from ..scores.cascade import CascadeReport
from .detector import Detector
from .fit_report import Decision, DetectorReport

__all__ = ["CascadeReport", "Decision", "Detector", "DetectorReport"]
