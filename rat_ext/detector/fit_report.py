"""What a detector says of an input, and of the data that it was fitted on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..scores.cascade import CascadeReport


@dataclass(frozen=True)
class Decision:
    """What a `Detector` says of N inputs. Every tensor has shape (N,) and is on their device."""

    prediction: Tensor
    """int64: the model's prediction; -1 where the confidence is nan."""
    confidence: Tensor
    """The score's; nan where the input or the logits are not finite."""
    accepted: Tensor
    """bool: the confidence reaches the threshold. Never where it is nan."""
    probability: Tensor | None = None
    """Estimate of the probability that the prediction is right, nan where the confidence is; None
    if the detector was not fitted with ``calibrate=True``."""

    def __len__(self) -> int:
        return len(self.prediction)


@dataclass(frozen=True)
class DetectorReport:
    """The threshold of a `Detector`, and what it did on the data that chose it.

    The bounds are one-sided Clopper-Pearson bounds. That of the risk under a target_risk holds as
    `Detector.fit` says, over the choice of the threshold; the others as if it had been fixed
    before.
    """

    criterion: str
    """What was asked for: "target_risk", "coverage" or "tpr"."""
    value: float
    """How much of it."""
    delta: float
    """Each bound fails with at most this probability."""
    threshold: float
    """The least confidence that is accepted."""
    samples: int
    """Held-out samples that chose the threshold."""
    tuned_on: int
    """Other held-out samples, that the score was fitted on."""
    right: int
    """Of the samples: predicted right."""
    accepted: int
    """Of the samples: accepted."""
    errors: int
    """Of the accepted ones: predicted wrong."""
    coverage_bound: float
    """The coverage on new data is at least this."""
    risk_bound: float
    """The risk on new data is at most this."""
    cascade: CascadeReport | None = None
    compared: list[tuple[str, float]] | None = None
    """If there were several scores: the AURC of each on the samples that they were tuned on."""

    @property
    def coverage(self) -> float:
        """Share of the samples that is accepted."""
        return self.accepted / self.samples

    @property
    def risk(self) -> float:
        """Error rate of the accepted samples."""
        return self.errors / self.accepted

    @property
    def tpr(self) -> float:
        """Share of the right predictions that is accepted; nan if none is right."""
        return (self.accepted - self.errors) / self.right if self.right else math.nan

    def __str__(self) -> str:
        sure = f"with probability {1 - self.delta:g}"
        tuned = f", {self.tuned_on:,} others tuned the score" if self.tuned_on else ""
        lines = [
            f"{self.criterion} {self.value:g}: accept a confidence of {self.threshold:.6g} or more",
            f"{self.samples:,} held-out samples{tuned}",
            f"coverage {self.coverage:.4f} (at least {self.coverage_bound:.4f} {sure})",
            f"risk {self.risk:.4f} (at most {self.risk_bound:.4f} {sure})",
            f"{self.tpr:.4f} of the right predictions accepted",
        ]
        if self.compared is not None:
            each = ", ".join(f"{name} {1000 * aurc:.2f}" for name, aurc in self.compared)
            lines.append(f"smallest AURC of (x1000): {each}")
        if (c := self.cascade) is not None:
            lines.append(
                f"cascade: {c.forward_rows:.2f} rows forward and {c.backward_rows:.2f} backward a "
                f"sample instead of {c.expensive_forward_rows:.2f} and "
                f"{c.expensive_backward_rows:.2f}; {100 * c.changed:.2f} % of the decisions changed"
            )
        return "\n".join(lines)
