"""The method on real images with nothing to download: scikit-learn's handwritten digits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from . import datasets, evaluation, metrics, models, reports, training
from ._core import __version__
from .metrics.levels import area_under_risk, by_level
from .metrics.paired import over_parts, simultaneous, stacked

TRAININGS = {"ce": "plain", "rat": "RAT"}
SCORES = {"msr": "MSR", "rr-fast": "RR-Fast", "rr-bs": "RR-BS"}
COLUMNS = {
    "accuracy": reports.Column("accuracy %", 100, True),
    **{metric: evaluation.COLUMNS[metric] for metric in ("aurc", "auroc", "fpr95")},
}
MEANINGS = {
    "accuracy": "Share of right predictions, without rejecting any.",
    **{term: evaluation.MEANINGS[term] for term in ("AURC", "AUROC", "FPR@95TPR")},
    "forward rows": "Cost of a score: passes of one image through the network. The radii take one "
    "backward pass on top.",
    "MSR": "Maximum softmax response: the probability of the predicted class.",
    "RR-BS, RR-Fast": "The robust radius in pixel units (0 black, 1 white): by a bracketing "
    "search, and by one linear extrapolation.",
    "RAT": "Training that moves the boundary away from right predictions only.",
}


@dataclass(frozen=True)
class Experiment:
    """Networks to train. The defaults were chosen on the validation images of other splits.

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
class Network:
    """A trained network on the test images of its seed."""

    loss: str
    seed: int
    images: datasets.Images
    evaluation: evaluation.Evaluation

    def metrics(self, score: str) -> dict[str, float]:
        """Of all test images."""
        return self.evaluation.of(score).splits[0]


def run(experiment: Experiment, *, progress: bool = True) -> list[Network]:
    """Train and evaluate all the networks.

    Args:
        experiment: seeds and recipe.
        progress: show a tqdm bar on standard error.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a setting out of its range.
    """
    from tqdm.auto import tqdm

    if not experiment.seeds:
        raise ValueError("seeds is empty; give at least one")
    parts = [datasets.digits(experiment.train_size, seed) for seed in experiment.seeds]
    tasks = [
        (experiment.recipe(loss, seed), some)
        for seed, some in zip(experiment.seeds, parts, strict=True)
        for loss in TRAININGS
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the images are so small that threads cost more than they bring
    try:
        bar = tqdm(tasks, desc="demo", unit="net", disable=not progress)
        return [_network(recipe, some) for recipe, some in bar]
    finally:
        torch.set_num_threads(threads)


def _network(recipe: training.Recipe, parts: datasets.Splits) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = models.create("digits-cnn")
    training.train(model, parts.train, recipe, progress=False)
    settings = evaluation.Settings(
        tuple(SCORES), splits=1, validation_share=0, tune="none", batch_size=len(parts.test)
    )
    found = evaluation.evaluate(model, parts.test, settings, progress=False)
    return Network(recipe.loss, recipe.seed, parts.test, cast(evaluation.Evaluation, found))


def of(networks: Sequence[Network], loss: str) -> list[Network]:
    """Those trained with this loss, in the order of the seeds."""
    return [network for network in networks if network.loss == loss]


def table(networks: Sequence[Network]) -> reports.Table:
    """Means and standard deviations over the seeds."""
    cases = [(loss, score) for loss in TRAININGS for score in SCORES]
    runs: dict[tuple[str, ...], list[dict[str, float]]] = {
        (TRAININGS[loss], SCORES[score]): [each.metrics(score) for each in of(networks, loss)]
        for loss, score in cases
    }
    rows = reports.rows_over_runs(runs, COLUMNS)
    for row, (loss, score) in zip(rows, cases, strict=True):
        costs = [each.evaluation.of(score).forward_rows for each in of(networks, loss)]
        row.append(reports.Cell(float(np.mean(costs)), digits=1))
    titles = [column.title for column in COLUMNS.values()]
    return reports.Table(
        ["training", "score", *titles, "forward rows"],
        rows,
        reports.over_runs_caption(len(of(networks, "ce")), "seed", len(networks[0].images)),
    )


def verdict(networks: Sequence[Network]) -> str:
    """What the AURCs say, in two sentences."""
    plain, rat = of(networks, "ce"), of(networks, "rat")

    def won(radius: Sequence[Network], softmax: Sequence[Network]) -> str:
        pairs = zip(radius, softmax, strict=True)
        lower = sum(a.metrics("rr-bs")["aurc"] < b.metrics("msr")["aurc"] for a, b in pairs)
        return f"in {lower} of {len(radius)} seeds"

    return (
        f"RAT with RR-BS has a lower AURC than plain training with MSR {won(rat, plain)}. With the "
        f"same network, RR-BS has a lower AURC than MSR {won(plain, plain)} after plain training "
        f"and {won(rat, rat)} after RAT."
    )


def comparison(networks: Sequence[Network]) -> list[str]:
    """What RAT with RR-BS gains over plain training, and over the softmax after RAT."""
    arms = [("ce", "msr"), ("rat", "msr"), ("rat", "rr-bs")]
    # The seeds test on parts of the same images: they are resampled as one set.
    pixels = torch.cat([network.images.pixels.flatten(1) for network in of(networks, "ce")])
    distinct, number = pixels.unique(dim=0, return_inverse=True)
    parts = []
    for seed, index in enumerate(number.tensor_split(len(of(networks, "ce")))):
        pairs = [(of(networks, loss)[seed].evaluation, score) for loss, score in arms]
        statistics = [
            by_level(area_under_risk, found.of(score).confidences[0], found.correct)
            for found, score in pairs
        ]
        parts.append((index.numpy(), stacked(statistics)))
    every = over_parts(len(distinct), parts)
    differences = simultaneous(every, np.array([[-1, 0, 1], [0, -1, 1]]), 500, 0.95, seed=0)
    plain_msr, msr, rr_bs = every.of(slice(None))
    bases = {"plain training with MSR": plain_msr, "RAT with MSR": msr}
    sentences = []
    for (base, aurc), difference in zip(bases.items(), differences, strict=True):
        told = {
            "better": f"RAT with RR-BS has a lower AURC than {base}",
            "worse": f"RAT with RR-BS has a higher AURC than {base}",
            "": f"No difference between RAT with RR-BS and {base} can be told",
        }[evaluation.verdict.outcome(difference)]
        sentences.append(f"{told} ({evaluation.verdict.evidence(rr_bs, aurc, difference)}).")
    return sentences


def write(
    experiment: Experiment,
    networks: Sequence[Network],
    seconds: float,
    out: Path,
    command: str | None = None,
) -> None:
    """Write index.html, results.json and overview.png into the folder."""
    record = {
        **({"command": command} if command else {}),
        "date": reports.now(),
        "images": f"scikit-learn's handwritten digits, {len(networks[0].images):,} to test on",
        "classes": f"{len(networks[0].images.classes)}",
        "model": "digits-cnn",
        "settings": ", ".join(f"{name}={value}" for name, value in asdict(experiment).items()),
        "run time": f"{seconds:.0f} s",
        "versions": f"rat_ext {__version__}, torch {torch.__version__}",
    }
    results = {
        "rat_ext": __version__,
        "torch": torch.__version__,
        "made": record,
        "verdict": [*comparison(networks), verdict(networks)],
        "settings": asdict(experiment),
        "recipe": asdict(experiment.recipe("rat", experiment.seeds[0])),
        "test_images": len(networks[0].images),
        "seconds": round(seconds, 1),
        "runs": [
            {
                "training": network.loss,
                "seed": network.seed,
                "score": score,
                **network.metrics(score),
                "forward_rows": network.evaluation.of(score).forward_rows,
            }
            for network in networks
            for score in SCORES
        ],
    }
    reports.write_report(out, results, _page(experiment, networks, record))
    curves = _curves(networks)
    panels = reports.radius_histograms(_radii(networks))[1:]
    panels.append(lambda axes: reports.risk_coverage(axes, curves))
    figure = reports.draw(panels, (9.6, 3.6), ink="#1d2733")
    figure.savefig(out / "overview.png", dpi=110, facecolor="white")


def _radii(networks: Sequence[Network]) -> dict[str, reports.Judged]:
    """The radii of all test images, for each training."""
    radii = {}
    for loss, title in TRAININGS.items():
        found = [network.evaluation for network in of(networks, loss)]
        radius = torch.cat([each.of("rr-bs").confidences[0] for each in found]).double().numpy()
        correct = torch.cat([each.correct for each in found]).numpy()
        radii[f"Radii (RR-BS), {title} training"] = radius, correct
    return radii


def _curves(networks: Sequence[Network]) -> dict[str, list[metrics.RiskCoverage]]:
    """The risk-coverage curves of the seeds, for each training, of MSR and RR-BS."""
    return {
        f"{title}, {SCORES[score]}": [
            each.evaluation.curves(score)[0] for each in of(networks, loss)
        ]
        for loss, title in TRAININGS.items()
        for score in ("msr", "rr-bs")
    }


def _reliabilities(networks: Sequence[Network]) -> dict[str, metrics.Reliability]:
    """Those of the softmax on all test images, for each training."""
    found = {}
    for loss, title in TRAININGS.items():
        own = [network.evaluation for network in of(networks, loss)]
        confidence = torch.cat([each.of("msr").confidences[0] for each in own])
        correct = torch.cat([each.correct for each in own])
        found[f"MSR, {title} training"] = metrics.reliability(confidence, correct)
    return found


def _page(experiment: Experiment, networks: Sequence[Network], record: Mapping[str, str]) -> str:
    shown = of(networks, "rat")[0]
    return reports.page(
        "Catching wrong predictions by their robust radius",
        [
            *map(reports.lead, comparison(networks)),
            f"<p>{verdict(networks)}</p>",
            "<p>A prediction close to the decision boundary is a doubtful one. Here a "
            "small network reads handwritten digits; the distance of each image from the boundary, "
            "its <em>robust radius</em>, tells which predictions to trust.</p>",
            "<h2>Scores</h2>",
            table(networks).html(),
            "<h2>How to read it</h2>",
            reports.definitions(MEANINGS),
            reports.risk_section(_curves(networks), "seeds"),
            reports.histogram_section(_radii(networks), "all seeds together"),
            reports.reliability_section(_reliabilities(networks), "all seeds together"),
            *evaluation.examples.sections(
                shown.evaluation,
                "rr-bs",
                f"the test images of seed {shown.seed}, after RAT training",
                shown.images,
            ),
            "<h2>How this report was made</h2>",
            reports.definitions(record),
            '<p class="soft">scikit-learn\'s digits, 8x8 pixels: for each seed another random '
            f"split with {experiment.train_size} images to train on, and another initial network, "
            f"the same for both trainings. {experiment.epochs} epochs of AdamW; RAT with eps "
            f"{experiment.eps:g} and lambda {experiment.lam:g}, chosen by RAT's validation "
            "AURC on other random splits of the same images, which may favour RAT a little; radii "
            "at temperature 1. All numbers of the table, for each seed, are in "
            "<code>results.json</code>.</p>",
        ],
    )


def main(
    experiment: Experiment, out: Path, *, progress: bool = True, command: str | None = None
) -> None:
    """Run the demo, print its table, and write its report into the folder.

    Args:
        experiment: what to train.
        out: the folder.
        progress: show a tqdm bar on standard error.
        command: the command that was run, which the report shows.
    """
    reports.check_installed()
    start = time.perf_counter()
    networks = run(experiment, progress=progress)
    seconds = time.perf_counter() - start
    shown = table(networks)
    print(f"\n{shown.text()}\n\n{shown.caption} A star marks the best of a column.")
    print("\n".join([*comparison(networks), verdict(networks)]))
    write(experiment, networks, seconds, out, command)
    print(f"\nReport: {out / 'index.html'}")
