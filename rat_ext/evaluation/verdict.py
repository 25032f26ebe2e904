"""Which score finds the wrong predictions best, and whether it does so better than the softmax."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import reports, scores
from ..metrics import Estimate
from ..metrics.levels import area_under_risk, by_level
from ..metrics.paired import over_parts, simultaneous, stacked
from .evaluate import Evaluation, trust

BASELINE = "msr"
LEVEL = 0.95
RESAMPLES = 500


class Comparison(NamedTuple):
    """AURCs, means over the splits, of the baseline and of the scores."""

    aurc: dict[str, float]
    """The baseline is among them also if it was not evaluated."""
    difference: dict[str, Estimate]
    """Of each other score, from the baseline. The intervals are simultaneous."""


def compare(evaluation: Evaluation) -> Comparison:
    """Compare the AURC of each score with that of the baseline, paired over the images.

    The images are resampled as in `metrics.differences`, and with them the parts that the splits
    test on. What was chosen on the other parts stays as it is.
    """
    softmax = scores.MSR().score_logits(evaluation.logits)
    confidences = {BASELINE: [softmax] * len(evaluation.tests)}
    confidences |= {result.name: result.confidences for result in evaluation.results}
    parts = []
    for split, test in enumerate(evaluation.tests):
        correct = evaluation.correct[test]
        each = [
            by_level(area_under_risk, trust(own[split][test]), correct)
            for own in confidences.values()
        ]
        parts.append((test.numpy(), stacked(each)))
    every = over_parts(len(evaluation.target), parts)
    aurc = dict(zip(confidences, every.of(slice(None)).tolist(), strict=True))
    from_first = np.eye(len(aurc))[1:] - np.eye(len(aurc))[0]
    found = simultaneous(every, from_first, RESAMPLES, LEVEL, evaluation.settings.seed)
    return Comparison(aurc, dict(zip([*aurc][1:], found, strict=True)))


def verdict(comparison: Comparison) -> list[str]:
    """A sentence on the best score, and one on the best radius if that is another."""
    aurc, difference = comparison
    best = min(aurc, key=lambda name: aurc[name])  # of equals the first, which is the baseline
    base = f"the softmax baseline {BASELINE}"
    if not difference:
        return [f"Only {base} was evaluated: AURC x1000 {1000 * aurc[BASELINE]:.2f}."]
    told = best
    if best == BASELINE:
        told = min(difference, key=lambda name: aurc[name])
        text = f"No score ranks errors better than {base}; next is {told}"
        text += (
            ", which ranks them worse"
            if outcome(difference[told])
            else ", but no difference can be told"
        )
    elif outcome(difference[best]):
        text = f"{best} finds wrong predictions best: it ranks errors better than {base}"
    else:
        text = f"{best} has the lowest AURC, but no difference from {base} can be told"
    sentences = [f"{text} ({evidence(aurc[told], aurc[BASELINE], difference[told])})."]
    radii = [name for name in difference if name.startswith("rr-")]
    if radii and not told.startswith("rr-"):
        radius = min(radii, key=lambda name: aurc[name])
        text = {
            "better": f"{radius} ranks errors better than {base}",
            "worse": f"{radius} ranks errors worse than {base}",
            "": f"no difference between {radius} and {base} can be told",
        }[outcome(difference[radius])]
        found = evidence(aurc[radius], aurc[BASELINE], difference[radius])
        sentences.append(f"Of the radii, {text} ({found}).")
    return sentences


def evidence(aurc: float, base_aurc: float, difference: Estimate) -> str:
    """Two AURCs and their difference, in words."""
    return (
        f"AURC x1000 {1000 * aurc:.2f} against {1000 * base_aurc:.2f}; difference "
        f"{signed(difference.value)}, {100 * LEVEL:.0f} % interval {signed(difference.low)} to "
        f"{signed(difference.high)}, paired over images"
    )


def outcome(difference: Estimate) -> str:
    """Says "better" or "worse" of a difference in AURC; empty where its interval holds 0."""
    return "better" if difference.high < 0 else "worse" if difference.low > 0 else ""


def signed(aurc: float) -> str:
    """A difference in AURC, times 1000."""
    return f"{1000 * aurc:+.2f}"


def differences(comparison: Comparison) -> reports.Table:
    """Each score beside the baseline, the lowest AURC first."""
    aurc, difference = comparison
    rows: list[list[str | reports.Cell]] = [
        [
            name,
            reports.Cell(1000 * aurc[name]),
            signed(found.value),
            f"{signed(found.low)} to {signed(found.high)}",
            outcome(found) or "no difference can be told",
        ]
        for name, found in sorted(difference.items(), key=lambda item: aurc[item[0]])
    ]
    return reports.Table(
        ["score", "AURC x1000", "difference", f"{100 * LEVEL:.0f} % interval", "verdict"],
        rows,
        f"AURC less that of the softmax ({BASELINE}: {1000 * aurc[BASELINE]:.2f}): below 0 is "
        f"better. Paired bootstrap over the images, {RESAMPLES} resamples; the probability is "
        f"{100 * LEVEL:.0f} % that all the intervals hold their true difference, so that the best "
        "may be picked from the table. They do not cover another training of the model.",
    )
