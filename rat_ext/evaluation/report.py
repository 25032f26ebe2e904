"""What an evaluation writes: the table, results.csv, results.json and index.html."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics, reports
from .._core import __version__
from .evaluate import Evaluation, Result

COLUMNS = {
    "aurc": ("AURC x1000", 1000, False),
    "e_aurc": ("E-AURC x1000", 1000, False),
    "auroc": ("AUROC %", 100, True),
    "aupr_success": ("AUPR-s %", 100, True),
    "aupr_error": ("AUPR-e %", 100, True),
    "fpr95": ("FPR@95TPR %", 100, False),
}
"""For each metric of the table: its title, its scale in print, and larger is better."""


def table(evaluation: Evaluation) -> reports.Table:
    """Means and standard deviations over the splits."""
    columns = []
    for metric, (_, scale, larger_is_better) in COLUMNS.items():
        runs = [[scale * row[metric] for row in result.splits] for result in evaluation.results]
        columns.append(reports.with_best(list(map(reports.over_runs, runs)), larger_is_better))
    rows = [
        [result.name, *(column[i] for column in columns)]
        for i, result in enumerate(evaluation.results)
    ]
    splits, images = len(evaluation.tests), len(evaluation.tests[0])
    return reports.Table(
        ["score", *(title for title, _, _ in COLUMNS.values())],
        rows,
        f"Mean{' ± standard deviation' if splits > 1 else ''} over {splits} random "
        f"{'splits' if splits > 1 else 'split'}, {images:,} test images each.",
    )


def costs(evaluation: Evaluation) -> reports.Table:
    """What an image costs, and what was chosen in the splits."""
    rows = [
        [
            result.name,
            reports.Cell(result.milliseconds, digits=3),
            reports.Cell(result.forward_rows, digits=1),
            reports.Cell(result.backward_rows, digits=1),
            ", ".join(dict.fromkeys(result.chosen)),
        ]
        for result in evaluation.results
    ]
    return reports.Table(
        ["score", "ms/image", "forward rows", "backward rows", "chosen"],
        rows,
        "Run time per image here, and how often an image goes forward and backward through the "
        "model; what the splits chose on their validation parts.",
    )


def write(evaluation: Evaluation, title: str, out: Path) -> None:
    """Write results.csv (a row for each score and split), results.json and index.html."""
    rows = [
        {"score": result.name, "split": split, "chosen": result.chosen[split], **values}
        for result in evaluation.results
        for split, values in enumerate(result.splits)
    ]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    results = {
        "rat_ext": __version__,
        "torch": torch.__version__,
        "title": title,
        "settings": asdict(evaluation.settings),
        "images": len(evaluation.target),
        "accuracy": float(evaluation.correct.double().mean()),
        "scores": {
            result.name: {
                "milliseconds": result.milliseconds,
                "forward_rows": result.forward_rows,
                "backward_rows": result.backward_rows,
                "splits": [
                    {"chosen": chosen, **{k: None if math.isnan(v) else v for k, v in row.items()}}
                    for chosen, row in zip(result.chosen, result.splits, strict=True)
                ],
            }
            for result in evaluation.results
        },
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (out / "index.html").write_text(_page(evaluation, title), encoding="utf-8")


def _page(evaluation: Evaluation, title: str) -> str:
    correct = evaluation.correct
    tests = evaluation.tests
    curves = {
        result.name: [
            metrics.risk_coverage_curve(
                confidence[test].nan_to_num(-math.inf, math.inf, -math.inf), correct[test]
            )
            for confidence, test in zip(result.confidences, tests, strict=True)
        ]
        for result in evaluation.results
    }
    by_aurc = sorted(curves, key=lambda name: float(np.mean([c.risk.mean() for c in curves[name]])))
    shown = {name: curves[name] for name in curves if name in by_aurc[:6] or name.startswith("rr-")}
    body = [
        f'<p class="lead">{len(correct):,} images, {int((~correct).sum()):,} of them predicted '
        f"wrong: accuracy {100 * float(correct.double().mean()):.2f} %.</p>",
        "<h2>Scores</h2>",
        table(evaluation).html(),
        '<p class="soft">What a score leaves open is chosen by AURC on the '
        f"{100 * evaluation.settings.validation_share:g} % of the images that a split does not "
        "test on. AURC and FPR: lower is better. AUPR-s and AUPR-e: average precision at finding "
        "the right (success) and the wrong predictions (error).</p>",
        "<h2>Costs</h2>",
        costs(evaluation).html(),
        "<h2>Risk and coverage</h2>",
        reports.html_figure(
            reports.draw([lambda axes: reports.risk_coverage(axes, shown)], (9.2, 4.2)),
            "Risk-coverage curves of the scores",
            "The error rate (risk) among the predictions that are accepted, most trusted first. "
            "Mean and standard deviation over the splits, for the scores of lowest AURC and the "
            "radii.",
        ),
    ]
    radii = [result for result in evaluation.results if result.name.startswith("rr-")]
    if radii:
        test = tests[0]
        panels = [_histogram(result, test, correct) for result in radii]
        body += [
            "<h2>Radii of right and wrong predictions</h2>",
            reports.html_figure(
                reports.draw(panels, (9.2, 3.5)),
                "Histograms of the robust radii of right and wrong predictions",
                "Of the first split. The largest 0.5 % are in the last bin; infinite radii, where "
                "no change of the prediction was found, are left out.",
            ),
        ]
    body.append(f'<p class="soft">rat_ext {__version__}, torch {torch.__version__}.</p>')
    return reports.page(title, body)


def _histogram(result: Result, test: Tensor, correct: Tensor) -> Callable[[Any], None]:
    radius = result.confidences[0][test].double().numpy()
    finite = radius[np.isfinite(radius)]
    end = float(np.quantile(finite, 0.995)) if len(finite) else 1.0
    name = f"{result.name}, {result.chosen[0]}"
    return lambda axes: reports.radius_histogram(axes, radius, correct[test].numpy(), name, end)
