"""The method on real images with nothing to download: scikit-learn's handwritten digits."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import datasets, metrics, models, reports, scores, training
from ._core import __version__
from .scores import RRBS, RRFast

TRAININGS = {"ce": "plain", "rat": "RAT"}
SCORES = {"msr": "MSR", "rr-fast": "RR-Fast", "rr-bs": "RR-BS"}
METRICS = [
    ("accuracy", 100, True),
    ("aurc", 1000, False),
    ("auroc", 100, True),
    ("fpr95", 100, False),
]
"""Name, scale in print, and larger is better."""
SHOWN_IMAGES = 24


@dataclass(frozen=True)
class Settings:
    """Of the demo. The defaults were chosen on the validation images of other splits.

    Those splits are of the same 1,797 images, so the choice of eps has seen some test images.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    train_size: int = 500
    epochs: int = 40
    eps: float = 0.1
    lam: float = 1.0

    def recipe(self, loss: str, seed: int) -> training.Recipe:
        """How both networks of a seed are trained."""
        return training.Recipe(
            loss=loss,
            eps=self.eps,
            lam=self.lam,
            epochs=self.epochs,
            batch_size=50,
            optimizer="adamw",
            lr=3e-3,
            weight_decay=1e-2,
            seed=seed,
        )


@dataclass(frozen=True)
class Outcome:
    """One network on the test images of its seed."""

    loss: str
    seed: int
    images: datasets.Images
    prediction: NDArray[np.int64]
    correct: NDArray[np.bool_]
    confidence: dict[str, NDArray[np.float64]]
    forward_rows: dict[str, float]
    metrics: dict[str, dict[str, float]]
    """For each score: accuracy, aurc, auroc, fpr95; nan where undefined."""


def run(settings: Settings, *, progress: bool = True) -> list[Outcome]:
    """Train and score all the networks.

    Args:
        settings: seeds and recipe.
        progress: show a tqdm bar on standard error.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a setting out of its range.
    """
    from tqdm.auto import tqdm

    if not settings.seeds:
        raise ValueError("seeds is empty; give at least one")
    splits = [datasets.digits(settings.train_size, seed) for seed in settings.seeds]
    tasks = [
        (settings.recipe(loss, seed), parts)
        for seed, parts in zip(settings.seeds, splits, strict=True)
        for loss in TRAININGS
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the images are so small that threads cost more than they bring
    try:
        return [
            _outcome(recipe, parts)
            for recipe, parts in tqdm(tasks, desc="demo", unit="net", disable=not progress)
        ]
    finally:
        torch.set_num_threads(threads)


def _outcome(recipe: training.Recipe, parts: datasets.Splits) -> Outcome:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = models.create("digits-cnn")
    training.train(model, parts.train, recipe, progress=False)
    x, target = parts.test[:]
    with torch.inference_mode():
        prediction = model(x).argmax(1)
    correct = prediction == target
    used = {"msr": scores.MSR(), "rr-fast": RRFast(1.0), "rr-bs": RRBS(1.0)}
    confidence = {name: score.score(model, x) for name, score in used.items()}
    return Outcome(
        loss=recipe.loss,
        seed=recipe.seed,
        images=parts.test,
        prediction=prediction.numpy(),
        correct=correct.numpy(),
        confidence={name: values.double().numpy() for name, values in confidence.items()},
        forward_rows={name: float(score.forward_rows) for name, score in used.items()},
        metrics={name: _metrics(values, correct) for name, values in confidence.items()},
    )


def _metrics(confidence: Tensor, correct: Tensor) -> dict[str, float]:
    with warnings.catch_warnings():  # shown as undefined in the table
        warnings.filterwarnings("ignore", "auroc is undefined|fpr_at_tpr is undefined")
        return {
            "accuracy": float(correct.double().mean()),
            "aurc": metrics.aurc(confidence, correct),
            "auroc": metrics.auroc(confidence, correct),
            "fpr95": metrics.fpr_at_tpr(confidence, correct),
        }


def of(outcomes: Sequence[Outcome], loss: str) -> list[Outcome]:
    """Those trained with this loss, in the order of the seeds."""
    return [outcome for outcome in outcomes if outcome.loss == loss]


def table(outcomes: Sequence[Outcome]) -> reports.Table:
    """Means and standard deviations over the seeds."""
    nets = [(loss, score) for loss in TRAININGS for score in SCORES]
    columns = []
    for metric, scale, larger_is_better in METRICS:
        runs = [
            [scale * outcome.metrics[score][metric] for outcome in of(outcomes, loss)]
            for loss, score in nets
        ]
        columns.append(reports.with_best(list(map(reports.over_runs, runs)), larger_is_better))
    costs = [
        [outcome.forward_rows[score] for outcome in of(outcomes, loss)] for loss, score in nets
    ]
    columns.append([reports.Cell(float(np.mean(cost)), digits=1) for cost in costs])
    rows = [
        [TRAININGS[loss], SCORES[score], *(column[i] for column in columns)]
        for i, (loss, score) in enumerate(nets)
    ]
    seeds = len(of(outcomes, "ce"))
    return reports.Table(
        ["training", "score", "accuracy %", "AURC x1000", "AUROC %", "FPR@95TPR %", "forward rows"],
        rows,
        f"Mean{' ± standard deviation' if seeds > 1 else ''} over {seeds} "
        f"{'seeds' if seeds > 1 else 'seed'}, {len(outcomes[0].correct):,} test images each.",
    )


def verdict(outcomes: Sequence[Outcome]) -> str:
    """What the AURCs say, in two sentences."""
    plain, rat = of(outcomes, "ce"), of(outcomes, "rat")

    def compared(score: str, than: str, left: Sequence[Outcome], right: Sequence[Outcome]) -> str:
        pairs = zip(left, right, strict=True)
        won = sum(a.metrics[score]["aurc"] < b.metrics[than]["aurc"] for a, b in pairs)
        return f"in {won} of {len(left)} seeds"

    return (
        f"RAT with RR-BS has a lower AURC than plain training with MSR "
        f"{compared('rr-bs', 'msr', rat, plain)}. With the same network, RR-BS has a lower AURC "
        f"than MSR {compared('rr-bs', 'msr', plain, plain)} after plain training and "
        f"{compared('rr-bs', 'msr', rat, rat)} after RAT."
    )


def write(settings: Settings, outcomes: Sequence[Outcome], seconds: float, out: Path) -> None:
    """Write index.html, results.json and overview.png into the folder."""
    out.mkdir(parents=True, exist_ok=True)
    results = _json(settings, outcomes, seconds)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (out / "index.html").write_text(_page(settings, outcomes, seconds), encoding="utf-8")
    figure = reports.draw(_panels(outcomes)[1:], (9.6, 3.6), ink="#1d2733")
    figure.savefig(out / "overview.png", dpi=110, facecolor="white")


def _json(settings: Settings, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    return {
        "rat_ext": __version__,
        "torch": torch.__version__,
        "settings": asdict(settings),
        "recipe": asdict(settings.recipe("rat", settings.seeds[0])),
        "test_images": len(outcomes[0].correct),
        "seconds": round(seconds, 1),
        "runs": [
            {
                "training": outcome.loss,
                "seed": outcome.seed,
                "score": score,
                **{
                    name: None if math.isnan(value) else value
                    for name, value in outcome.metrics[score].items()
                },
                "forward_rows": outcome.forward_rows[score],
            }
            for outcome in outcomes
            for score in SCORES
        ],
    }


def _panels(outcomes: Sequence[Outcome]) -> list[Any]:
    """Histogram of the plain networks, of the RAT networks, and risk-coverage curves."""
    pooled = {}
    for loss in TRAININGS:
        some = of(outcomes, loss)
        radius = np.concatenate([outcome.confidence["rr-bs"] for outcome in some])
        pooled[loss] = radius, np.concatenate([outcome.correct for outcome in some])
    finite = np.concatenate([radius for radius, _ in pooled.values()])
    finite = finite[np.isfinite(finite)]
    end = float(np.quantile(finite, 0.995)) if len(finite) else 1.0
    curves = {
        f"{TRAININGS[loss]}, {SCORES[score]}": [
            metrics.risk_coverage_curve(outcome.confidence[score], outcome.correct)
            for outcome in of(outcomes, loss)
        ]
        for loss, score in (("ce", "msr"), ("ce", "rr-bs"), ("rat", "msr"), ("rat", "rr-bs"))
    }

    def histogram(loss: str) -> Any:
        title = f"Radii (RR-BS), {TRAININGS[loss]} training"
        return lambda axes: reports.radius_histogram(axes, *pooled[loss], title, end)

    return [
        histogram("ce"),
        histogram("rat"),
        lambda axes: reports.risk_coverage(axes, curves),
    ]


def _page(settings: Settings, outcomes: Sequence[Outcome], seconds: float) -> str:
    seeds = len(settings.seeds)
    panels = _panels(outcomes)
    shown = of(outcomes, "rat")[0]
    infinite = sum(int(np.isinf(outcome.confidence["rr-bs"]).sum()) for outcome in outcomes)
    return reports.page(
        "Catching wrong predictions by their robust radius",
        [
            '<p class="lead">A prediction close to the decision boundary is a doubtful one. Here a '
            "small network reads handwritten digits; the distance of each image from the boundary, "
            "its <em>robust radius</em>, tells which predictions to trust.</p>",
            f"<p>{verdict(outcomes)}</p>",
            "<h2>Scores</h2>",
            table(outcomes).html(),
            "<h2>How to read it</h2>",
            reports.definitions(
                {
                    "accuracy": "Share of right predictions, without rejecting any.",
                    "AURC": "Area under the risk-coverage curve, times 1000: the error rate among "
                    "the most trusted predictions, averaged over how many are accepted. Lower is "
                    "better. A score without information has the error rate.",
                    "AUROC": "Chance that a right prediction is trusted more than a wrong one. "
                    "Higher is better; 50 % is guessing.",
                    "FPR@95TPR": "Share of the wrong predictions that are accepted where 95 % of "
                    "the right ones are. Lower is better.",
                    "forward rows": "Cost of a score: passes of one image through the network. The "
                    "radii take one backward pass on top.",
                    "MSR": "Maximum softmax response: the probability of the predicted class.",
                    "RR-BS, RR-Fast": "The robust radius in pixel units (0 black, 1 white): by a "
                    "bracketing search, and by one linear extrapolation.",
                    "RAT": "Training that moves the boundary away from right predictions only.",
                }
            ),
            "<h2>Risk and coverage</h2>",
            reports.html_figure(
                reports.draw(panels[2:], (9.2, 3.9)),
                "Risk-coverage curves of both trainings with MSR and RR-BS",
                "The error rate (risk) among the predictions that are accepted, most trusted "
                f"first. Mean{' and standard deviation' if seeds > 1 else ''} over the seeds.",
            ),
            "<h2>Radii of right and wrong predictions</h2>",
            reports.html_figure(
                reports.draw(panels[:2], (9.2, 3.5)),
                "Histograms of the robust radii of right and wrong predictions",
                "All seeds together. The less the two kinds overlap, the better the radius tells "
                "them apart. The largest 0.5 % of the radii are in the last bin. Left out, because "
                f"no change was found up to radius 1: {infinite:,}.",
            ),
            "<h2>The most doubtful images</h2>",
            f"<p>The {SHOWN_IMAGES} test images of smallest radius (RR-BS, RAT training, seed "
            f"{shown.seed}). Wrong predictions have a frame.</p>",
            reports.gallery(_most_doubtful(shown)),
            "<h2>How it was made</h2>",
            f'<p class="soft">rat_ext {__version__}, torch {torch.__version__}, '
            f"{seconds:.0f} s. scikit-learn's digits, 8x8 pixels: for each seed another random "
            f"split with {settings.train_size} images to train on, and another initial network, "
            f"the same for both trainings. {settings.epochs} epochs of AdamW; RAT with eps "
            f"{settings.eps:g} and lambda {settings.lam:g}, chosen by RAT's validation "
            "AURC on other random splits of the same images, which may favour RAT a little; radii "
            "at temperature 1. All numbers of the table, for each seed, are in "
            "<code>results.json</code>.</p>",
        ],
    )


def _most_doubtful(outcome: Outcome) -> list[reports.Picture]:
    radius, classes = outcome.confidence["rr-bs"], outcome.images.classes
    pictures = []
    for i in np.argsort(radius, kind="stable")[:SHOWN_IMAGES]:
        x, target = outcome.images[int(i)]
        pictures.append(
            reports.Picture(
                pixels=x.numpy(),
                heading=f"predicted {classes[outcome.prediction[i]]}",
                lines=[f"true {classes[int(target)]}", f"radius {radius[i]:.4f}"],
                wrong=not outcome.correct[i],
            )
        )
    return pictures


def main(settings: Settings, out: Path, *, progress: bool = True) -> None:
    """Run the demo, print its table, and write its report into the folder."""
    start = time.perf_counter()
    outcomes = run(settings, progress=progress)
    seconds = time.perf_counter() - start
    result = table(outcomes)
    print(f"\n{result.text()}\n\n{result.caption} A star marks the best of a column.")
    print(verdict(outcomes))
    write(settings, outcomes, seconds, out)
    print(f"\nReport: {out / 'index.html'}")
