"""What an evaluation writes: the table, results.csv, results.json and index.html."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from .. import reports, scores
from .._core import __version__
from ..datasets import Labelled
from . import examples
from .calibration import reliabilities
from .evaluate import Evaluation
from .verdict import BASELINE, Comparison, compare, differences, verdict

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


def write(
    evaluation: Evaluation,
    title: str,
    out: Path,
    *,
    data: Labelled | None = None,
    command: str | None = None,
    about: Mapping[str, str] | None = None,
) -> list[str]:
    """Write results.csv (a row for each score and split), results.json and index.html.

    Args:
        evaluation: what to report.
        title: of the page.
        out: the folder.
        data: the images that were evaluated, for the examples on the page; None: only their numbers
            are listed.
        command: the command that was run, for the page's last section.
        about: what else that section is to say, such as the names of the model and the data set.

    Returns:
        The sentences of the verdict.
    """
    comparison = compare(evaluation)
    sentences = verdict(comparison)
    settings = asdict(evaluation.settings)
    record = {
        **({"command": command} if command else {}),
        "date": reports.now(),
        **(about or {}),
        "images": f"{len(evaluation.target):,}",
        "classes": f"{evaluation.logits.shape[1]:,}",
        "settings": ", ".join(f"{name}={_plain(value)}" for name, value in settings.items()),
        "versions": f"rat_ext {__version__}, torch {torch.__version__}",
    }
    results = {
        "rat_ext": __version__,
        "torch": torch.__version__,
        "title": title,
        "made": record,
        "settings": settings,
        "images": len(evaluation.target),
        "accuracy": float(evaluation.correct.double().mean()),
        "verdict": sentences,
        "aurc_less_that_of_msr": {
            name: found._asdict() for name, found in comparison.difference.items()
        },
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
    reports.write_report(out, results, _page(evaluation, title, comparison, record, data))
    rows = [
        {"score": result.name, "split": split, "chosen": result.chosen[split], **values}
        for result in evaluation.results
        for split, values in enumerate(result.splits)
    ]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return sentences


def _plain(value: object) -> str:
    return " ".join(value) or "all" if isinstance(value, tuple) else f"{value}"


def _page(
    evaluation: Evaluation,
    title: str,
    comparison: Comparison,
    record: Mapping[str, str],
    data: Labelled | None,
) -> str:
    correct = evaluation.correct
    curves = {result.name: evaluation.curves(result.name) for result in evaluation.results}
    by_aurc = sorted(curves, key=lambda name: comparison.aurc[name])
    best = by_aurc[0]
    shown = {name: curves[name] for name in curves if name in by_aurc[:6] or name.startswith("rr-")}
    test = evaluation.tests[0]
    judged: dict[str, reports.Judged] = {
        result.name: (result.confidences[0][test].double().numpy(), correct[test].numpy())
        for result in evaluation.results
    }
    radii = {
        ", ".join(filter(None, [name, evaluation.of(name).chosen[0]])): own
        for name, own in judged.items()
        if name.startswith("rr-")
    }
    first = "the images that the first split tests on"
    body = [
        *map(reports.lead, verdict(comparison)),
        f"<p>{len(correct):,} images, {int((~correct).sum()):,} of them predicted "
        f"wrong: accuracy {100 * float(correct.double().mean()):.2f} %.</p>",
        "<h2>Scores</h2>",
        table(evaluation).html(),
        reports.note(
            "What a score leaves open is chosen by AURC on the "
            f"{100 * evaluation.settings.validation_share:g} % of the images that a split does not "
            "test on."
        ),
        reports.definitions(MEANINGS),
    ]
    if comparison.difference:
        body += [f"<h2>Differences from {BASELINE}</h2>", differences(comparison).html()]
    body += [
        "<h2>Costs</h2>",
        costs(evaluation).html(),
        reports.risk_section(shown, "splits, for the scores of lowest AURC and the radii"),
    ]
    others = {} if best.startswith("rr-") else {best: judged[best]}
    if others and scores.kind_of(best).is_probability:
        # Most probabilities are next to 1; their log-odds are apart.
        values, right = judged[best]
        others = {f"log-odds of {best}": (torch.tensor(values).logit(1e-12).numpy(), right)}
    body.append(reports.histogram_section(radii, first, others))
    if diagrams := reliabilities(evaluation):
        body.append(reports.reliability_section(diagrams, first))
    body += examples.sections(evaluation, best, first, data)
    body += ["<h2>How this report was made</h2>", reports.definitions(record)]
    return reports.page(title, body)
