"""What an evaluation writes: the table, results.csv, results.json and index.html."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from .. import reports
from .._core import __version__
from .evaluate import Evaluation

COLUMNS = {
    "aurc": reports.Column("AURC x1000", 1000, False),
    "e_aurc": reports.Column("E-AURC x1000", 1000, False),
    "augrc": reports.Column("AUGRC x1000", 1000, False),
    "auroc": reports.Column("AUROC %", 100, True),
    "aupr_success": reports.Column("AUPR-s %", 100, True),
    "aupr_error": reports.Column("AUPR-e %", 100, True),
    "fpr95": reports.Column("FPR@95TPR %", 100, False),
}
"""For each metric of the table: its title, its scale in print, and larger is better."""
MEANINGS = {
    "AURC": "Area under the risk-coverage curve, times 1000: the error rate among the most trusted "
    "predictions, averaged over how many are accepted. Lower is better. A score without "
    "information has the error rate.",
    "E-AURC": "AURC less that of the best possible order. Lower is better.",
    "AUGRC": "Area under the generalized risk-coverage curve, times 1000: the share of all "
    "predictions that are wrong and yet accepted, averaged over how many are accepted. Lower is "
    "better. A score without information has half the error rate.",
    "AUROC": "Chance that a right prediction is trusted more than a wrong one. Higher is better; "
    "50 % is guessing.",
    "AUPR-s, AUPR-e": "Average precision at finding the right (success) and the wrong predictions "
    "(error). Higher is better.",
    "FPR@95TPR": "Share of the wrong predictions that are accepted where 95 % of the right ones "
    "are. Lower is better.",
}
"""Of the metrics, for the reader of a report."""


def table(evaluation: Evaluation) -> reports.Table:
    """Means and standard deviations over the splits."""
    tests = evaluation.tests
    return reports.Table(
        ["score", *(column.title for column in COLUMNS.values())],
        reports.rows_over_runs({(r.name,): r.splits for r in evaluation.results}, COLUMNS),
        reports.over_runs_caption(len(tests), "random split", len(tests[0])),
    )


def costs(evaluation: Evaluation) -> reports.Table:
    """What an image costs, and what was chosen in the splits."""
    rows: list[list[str | reports.Cell]] = [
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
                    {"chosen": chosen, **row}
                    for chosen, row in zip(result.chosen, result.splits, strict=True)
                ],
            }
            for result in evaluation.results
        },
    }
    reports.write_report(out, results, _page(evaluation, title))
    rows = [
        {"score": result.name, "split": split, "chosen": result.chosen[split], **values}
        for result in evaluation.results
        for split, values in enumerate(result.splits)
    ]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _page(evaluation: Evaluation, title: str) -> str:
    correct = evaluation.correct
    curves = {result.name: evaluation.curves(result.name) for result in evaluation.results}
    by_aurc = sorted(curves, key=lambda name: float(np.mean([c.risk.mean() for c in curves[name]])))
    shown = {name: curves[name] for name in curves if name in by_aurc[:6] or name.startswith("rr-")}
    body = [
        f'<p class="lead">{len(correct):,} images, {int((~correct).sum()):,} of them predicted '
        f"wrong: accuracy {100 * float(correct.double().mean()):.2f} %.</p>",
        "<h2>Scores</h2>",
        table(evaluation).html(),
        '<p class="soft">What a score leaves open is chosen by AURC on the '
        f"{100 * evaluation.settings.validation_share:g} % of the images that a split does not "
        "test on.</p>",
        reports.definitions(MEANINGS),
        "<h2>Costs</h2>",
        costs(evaluation).html(),
        reports.risk_section(shown, "splits, for the scores of lowest AURC and the radii"),
    ]
    test = evaluation.tests[0]
    radii: dict[str, reports.Radii] = {}
    for result in evaluation.results:
        if result.name.startswith("rr-"):
            radius = result.confidences[0][test].double()
            radii[f"{result.name}, {result.chosen[0]}"] = radius.numpy(), correct[test].numpy()
    if radii:
        body.append(reports.radius_section(radii, "the first split"))
    body.append(f'<p class="soft">rat_ext {__version__}, torch {torch.__version__}.</p>')
    return reports.page(title, body)
