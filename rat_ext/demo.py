"""The method on real images with nothing to download: scikit-learn's handwritten digits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from . import datasets, evaluation, metrics, models, reports, training
from ._core import __version__

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
SHOWN_IMAGES = 24


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


def write(experiment: Experiment, networks: Sequence[Network], seconds: float, out: Path) -> None:
    """Write index.html, results.json and overview.png into the folder."""
    results = {
        "rat_ext": __version__,
        "torch": torch.__version__,
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
    reports.write_report(out, results, _page(experiment, networks, seconds))
    curves = _curves(networks)
    panels = reports.radius_histograms(_radii(networks))[1:]
    panels.append(lambda axes: reports.risk_coverage(axes, curves))
    figure = reports.draw(panels, (9.6, 3.6), ink="#1d2733")
    figure.savefig(out / "overview.png", dpi=110, facecolor="white")


def _radii(networks: Sequence[Network]) -> dict[str, reports.Radii]:
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


def _page(experiment: Experiment, networks: Sequence[Network], seconds: float) -> str:
    shown = of(networks, "rat")[0]
    return reports.page(
        "Catching wrong predictions by their robust radius",
        [
            '<p class="lead">A prediction close to the decision boundary is a doubtful one. Here a '
            "small network reads handwritten digits; the distance of each image from the boundary, "
            "its <em>robust radius</em>, tells which predictions to trust.</p>",
            f"<p>{verdict(networks)}</p>",
            "<h2>Scores</h2>",
            table(networks).html(),
            "<h2>How to read it</h2>",
            reports.definitions(MEANINGS),
            reports.risk_section(_curves(networks), "seeds"),
            reports.radius_section(_radii(networks), "all seeds together"),
            "<h2>The most doubtful images</h2>",
            f"<p>The {SHOWN_IMAGES} test images of smallest radius (RR-BS, RAT training, seed "
            f"{shown.seed}). Wrong predictions have a frame.</p>",
            reports.gallery(_most_doubtful(shown)),
            "<h2>How it was made</h2>",
            f'<p class="soft">rat_ext {__version__}, torch {torch.__version__}, '
            f"{seconds:.0f} s. scikit-learn's digits, 8x8 pixels: for each seed another random "
            f"split with {experiment.train_size} images to train on, and another initial network, "
            f"the same for both trainings. {experiment.epochs} epochs of AdamW; RAT with eps "
            f"{experiment.eps:g} and lambda {experiment.lam:g}, chosen by RAT's validation "
            "AURC on other random splits of the same images, which may favour RAT a little; radii "
            "at temperature 1. All numbers of the table, for each seed, are in "
            "<code>results.json</code>.</p>",
        ],
    )


def _most_doubtful(network: Network) -> list[reports.Picture]:
    found, classes, pictures = network.evaluation, network.images.classes, []
    radius = found.of("rr-bs").confidences[0].numpy()
    for i in np.argsort(radius, kind="stable")[:SHOWN_IMAGES]:
        x, target = network.images[int(i)]
        pictures.append(
            reports.Picture(
                pixels=x.numpy(),
                heading=f"predicted {classes[found.prediction[i]]}",
                lines=[f"true {classes[int(target)]}", f"radius {radius[i]:.4f}"],
                wrong=not found.correct[i],
            )
        )
    return pictures


def main(experiment: Experiment, out: Path, *, progress: bool = True) -> None:
    """Run the demo, print its table, and write its report into the folder."""
    start = time.perf_counter()
    networks = run(experiment, progress=progress)
    seconds = time.perf_counter() - start
    shown = table(networks)
    print(f"\n{shown.text()}\n\n{shown.caption} A star marks the best of a column.")
    print(verdict(networks))
    write(experiment, networks, seconds, out)
    print(f"\nReport: {out / 'index.html'}")
