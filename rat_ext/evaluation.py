"""How well confidence scores find a classifier's wrong predictions, over random splits."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import _build, metrics, report, scores
from ._model import fingerprint, logits_of, undisturbed
from .datasets import batches
from .radius_scores import RadiusScore
from .training import replace

CHUNK = 1000
"""Images whose confidences are written to disk together."""
TIMED = 256
"""Images that the run time of a score is measured on."""

COLUMNS = {
    "aurc": ("AURC x1000", 1000, False),
    "e_aurc": ("E-AURC x1000", 1000, False),
    "auroc": ("AUROC %", 100, True),
    "aupr_success": ("AUPR-s %", 100, True),
    "aupr_error": ("AUPR-e %", 100, True),
    "fpr95": ("FPR@95TPR %", 100, False),
}
"""For each metric of the table: its title, its scale in print, and larger is better."""


@dataclass(frozen=True)
class Settings:
    """Of an evaluation."""

    scores: tuple[str, ...] = ()
    """Names in the registry of `rat_ext.scores`; none for all of them."""
    splits: int = 5
    """Random splits into a part that settings are chosen on and a part that is tested on."""
    validation_share: float = 0.2
    """Of the images, in each split."""
    tune: str = "all"
    """What is chosen on the validation part: "all" (temperatures and input perturbations),
    "temperature", or "none" (temperature 1, no perturbation)."""
    seed: int = 0
    """Of the splits."""
    batch_size: int = 250

    def __post_init__(self) -> None:
        for name in self.scores:
            scores.get(name)
        for name in ("splits", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share is {self.validation_share}; it must be between 0 and 1"
            )
        if self.tune not in ("all", "temperature", "none"):
            raise ValueError(f"tune is {self.tune!r}; expected 'all', 'temperature' or 'none'")

    def create(self, name: str) -> scores.Score:
        """A new score, with the grid that this evaluation lets it choose from."""
        score = scores.get(name)
        if isinstance(score, scores.TunedScore):
            if self.tune == "none":
                score = scores.get(name, temperature=1.0)
            elif self.tune == "temperature" and any(s.perturbation for s in score.grid):
                score = scores.get(name, perturbation=0.0)
        return score


@dataclass(frozen=True)
class Result:
    """What one score did."""

    name: str
    splits: list[dict[str, float]]
    """For each split the metrics of `metrics.summary`; nan where undefined."""
    chosen: list[str]
    """For each split what was chosen on the validation part."""
    confidences: list[Tensor]
    """For each split (N,), of all images."""
    milliseconds: float
    """Run time per image."""
    forward_rows: float
    backward_rows: float


@dataclass(frozen=True)
class Evaluation:
    """A classifier's predictions on N images, and what the scores make of them."""

    settings: Settings
    prediction: Tensor
    target: Tensor
    tests: list[Tensor]
    """For each split the indices of the images that it is tested on."""
    results: list[Result]

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.prediction == self.target


def evaluate(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    out: str | Path,
    *,
    resume: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation | None:
    """Fit the scores on one part of the images and test them on the rest, for random splits.

    What is computed is kept in ``out``/cache, in files of a thousand images; the processes of
    torch.distributed share the files among them, and a run that was interrupted can go on.

    Args:
        model: from pixels in [0, 1] to logits, on its device; run in eval mode, left as it was.
        data: gives (pixels, class) pairs. Targets of -1 (outliers) are never predicted right.
        settings: which scores, and how.
        out: folder of the cache; the same for all processes.
        resume: go on with the cache of the same model, data and settings.
        workers: processes that load data.
        progress: show a tqdm bar on standard error.

    Returns:
        The evaluation; None in the processes of torch.distributed other than the first.

    Raises:
        ValueError: the cache is of something else, or there are too few images.
    """
    validation = round(settings.validation_share * len(data))
    if not 0 < validation < len(data):
        raise ValueError(f"{len(data)} images are too few to split; use more")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cache = _Cache(Path(out) / "cache")
    if rank == 0:
        cache.open(_fingerprint(model, data, settings), resume)
    if world > 1:
        dist.barrier()
    generator = torch.Generator().manual_seed(settings.seed)
    orders = [torch.randperm(len(data), generator=generator) for _ in range(settings.splits)]
    splits = [order.tensor_split([validation]) for order in orders]
    work = _Work(model, data, settings, cache, workers, progress, rank, world)
    logits, target = work.over_data("logits", _logits)
    prediction = logits.argmax(1)
    correct = prediction == target
    results = []
    for name in settings.scores or scores.names():
        fitted, confidences = work.scored(name, splits, logits, target)
        if rank:
            continue
        rows = [
            _summary(confidence[test], correct[test])
            for confidence, (_, test) in zip(confidences, splits, strict=True)
        ]
        chosen = [_chosen(score) for score in fitted]
        results.append(Result(name, rows, chosen, confidences, *work.cost(name, fitted[0])))
    if rank:
        return None
    return Evaluation(settings, prediction, target, [test for _, test in splits], results)


def _summary(confidence: Tensor, correct: Tensor) -> dict[str, float]:
    with warnings.catch_warnings():  # shown as undefined in the table
        warnings.filterwarnings("ignore", ".* is undefined and set to nan")
        # An image whose confidence is not a number is trusted least.
        confidence = confidence.nan_to_num(-math.inf, math.inf, -math.inf)
        return metrics.summary(confidence, correct)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), undisturbed(model, x.device):
        return logits_of(model(x), len(x))


def _chosen(score: scores.Score) -> str:
    if not isinstance(score, scores.TunedScore):
        return ""
    setting = score.setting
    return f"T={setting.temperature:g}" + (
        f" eps={setting.perturbation:g}" if setting.perturbation else ""
    )


def _chooses_only(score: scores.Score) -> bool:
    """All that fit() does is to choose a setting."""
    return type(score).fit in (scores.TunedScore.fit, RadiusScore.fit)


class _Work:
    """Scoring a data set: shared among processes, and kept in the cache."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        settings: Settings,
        cache: _Cache,
        workers: int,
        progress: bool,
        rank: int,
        world: int,
    ) -> None:
        self.model, self.data, self.settings, self.cache = model, data, settings, cache
        self.workers, self.progress, self.rank, self.world = workers, progress, rank, world
        self.device = next(model.parameters()).device

    def scored(
        self,
        name: str,
        splits: Sequence[Sequence[Tensor]],
        logits: Tensor,
        target: Tensor,
    ) -> tuple[list[scores.Score], list[Tensor]]:
        """For each split the score fitted on its validation part, and its (N,) confidences."""
        score = self.settings.create(name)
        if isinstance(score, scores.LogitScore) and not _perturbs(score):
            # The logits are known already; of them, the model is the identity.
            model, fitted = nn.Identity(), []
            for part, _ in splits:
                batch = [(logits[part], target[part])]
                fitted.append(self.settings.create(name).fit(model, batch, progress=False))
            return fitted, [one.score(model, logits) for one in fitted]
        if type(score).fit is scores.Score.fit:
            return [score] * len(splits), self.over_data(name, score.score)[:1] * len(splits)
        if not _chooses_only(score):
            fitted = [
                self.settings.create(name).fit(self.model, self.loader(part), progress=False)
                for part, _ in splits
            ]
            keys = [f"{name}-split{number}" for number in range(len(splits))]
        else:
            tasks = [
                (f"{name}-fit{number}", lambda part=part: [self.choice(name, part)])
                for number, (part, _) in enumerate(splits)
            ]
            chosen = [scores.Setting(*c.tolist()) for (c,) in self.shared(f"fit {name}", tasks)]
            fitted = [score.at(setting) for setting in chosen]
            keys = [f"{name}-{_chosen(one)}" for one in fitted]
        confidences = [self.over_data(k, s.score)[0] for k, s in zip(keys, fitted, strict=True)]
        return fitted, confidences

    def choice(self, name: str, part: Tensor) -> Tensor:
        """The setting that a score chooses on a part of the data."""
        score = self.settings.create(name).fit(self.model, self.loader(part), progress=False)
        return torch.tensor(score.setting, dtype=torch.float64)

    def over_data(self, name: str, compute: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        """compute(model, x) of all images, and their targets, on the CPU."""

        def chunk(index: Tensor) -> list[Tensor]:
            values, targets = [], []
            for x, target in self.loader(index):
                values.append(compute(self.model, x.to(self.device)).cpu())
                targets.append(target)
            return [torch.cat(values), torch.cat(targets)]

        chunks = torch.arange(len(self.data)).split(CHUNK)
        tasks = [(f"{name}-{i}", lambda c=c: chunk(c)) for i, c in enumerate(chunks)]
        return [torch.cat(parts) for parts in zip(*self.shared(name, tasks), strict=True)]

    def loader(self, index: Tensor) -> Any:
        parts = [part.tolist() for part in index.split(self.settings.batch_size)]
        return batches(self.data, parts, self.workers, self.device)

    def shared(
        self, what: str, tasks: Sequence[tuple[str, Callable[[], list[Tensor]]]]
    ) -> list[list[Tensor]]:
        """The results of all tasks; each process computes its share of those not in the cache."""
        from tqdm.auto import tqdm

        mine = [task for task in tasks[self.rank :: self.world] if not self.cache.has(task[0])]
        hidden = not self.progress or self.rank > 0 or not mine
        for key, compute in tqdm(mine, desc=what, unit="part", leave=False, disable=hidden):
            self.cache.write(key, compute())
        if self.world > 1:
            dist.barrier()
        return [self.cache.read(key) for key, _ in tasks]

    def cost(self, name: str, fitted: scores.Score) -> tuple[float, float, float]:
        """Milliseconds, forward rows and backward rows per image, on the first images."""
        count = min(TIMED, len(self.data))
        ((x, _),) = batches(self.data, [list(range(count))], 0, self.device)
        x = x.to(self.device)
        score = fitted
        if _chooses_only(fitted):  # a new one, which counts its rows from 0
            score = self.settings.create(name).at(fitted.setting)
        score.score(self.model, x[:8])
        self._synchronize()
        start = time.perf_counter()
        score.score(self.model, x)
        self._synchronize()
        seconds = time.perf_counter() - start
        return 1000 * seconds / len(x), float(score.forward_rows), float(score.backward_rows)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _perturbs(score: scores.Score) -> bool:
    grid = score.grid if isinstance(score, scores.TunedScore) else []
    return any(setting.perturbation for setting in grid)


class _Cache:
    """Named lists of tensors in a folder; a file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, fingerprint: str, resume: bool) -> None:
        """Start empty, or go on with what there is of the same evaluation."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "evaluation"
        if resume and mark.exists():
            if mark.read_text() != fingerprint:
                raise ValueError(
                    f"{self.folder} is of another model, data set or settings; do not resume, or "
                    "use another output folder"
                )
            return
        for path in self.folder.glob("*.pt"):
            path.unlink()
        mark.write_text(fingerprint)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def write(self, key: str, tensors: list[Tensor]) -> None:
        replace(self.path(key), lambda temporary: torch.save(tensors, temporary))

    def read(self, key: str) -> list[Tensor]:
        return torch.load(self.path(key), weights_only=True)


def _fingerprint(model: nn.Module, data: Dataset, settings: Settings) -> str:
    digest = hashlib.sha256(fingerprint(model).encode())
    for index in (0, len(data) // 2, len(data) - 1):
        x, target = data[index]
        digest.update(x.numpy().tobytes() + str(int(target)).encode())
    digest.update(repr((len(data), settings, _build.__version__)).encode())
    return digest.hexdigest()


# --- What is written ------------------------------------------------------------------------------


def table(evaluation: Evaluation) -> report.Table:
    """Means and standard deviations over the splits."""
    columns = []
    for metric, (_, scale, larger_is_better) in COLUMNS.items():
        runs = [[scale * row[metric] for row in result.splits] for result in evaluation.results]
        columns.append(report.with_best(list(map(report.over_runs, runs)), larger_is_better))
    rows = [
        [result.name, *(column[i] for column in columns)]
        for i, result in enumerate(evaluation.results)
    ]
    splits, images = len(evaluation.tests), len(evaluation.tests[0])
    return report.Table(
        ["score", *(title for title, _, _ in COLUMNS.values())],
        rows,
        f"Mean{' ± standard deviation' if splits > 1 else ''} over {splits} random "
        f"{'splits' if splits > 1 else 'split'}, {images:,} test images each.",
    )


def costs(evaluation: Evaluation) -> report.Table:
    """What an image costs, and what was chosen in the splits."""
    rows = [
        [
            result.name,
            report.Cell(result.milliseconds, digits=3),
            report.Cell(result.forward_rows, digits=1),
            report.Cell(result.backward_rows, digits=1),
            ", ".join(dict.fromkeys(result.chosen)),
        ]
        for result in evaluation.results
    ]
    return report.Table(
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
        "rat_ext": _build.__version__,
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
        report.html_figure(
            report.draw([lambda axes: report.risk_coverage(axes, shown)], (9.2, 4.2)),
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
            report.html_figure(
                report.draw(panels, (9.2, 3.5)),
                "Histograms of the robust radii of right and wrong predictions",
                "Of the first split. The largest 0.5 % are in the last bin; infinite radii, where "
                "no change of the prediction was found, are left out.",
            ),
        ]
    body.append(f'<p class="soft">rat_ext {_build.__version__}, torch {torch.__version__}.</p>')
    return report.page(title, body)


def _histogram(result: Result, test: Tensor, correct: Tensor) -> Callable[[Any], None]:
    radius = result.confidences[0][test].double().numpy()
    finite = radius[np.isfinite(radius)]
    end = float(np.quantile(finite, 0.995)) if len(finite) else 1.0
    name = f"{result.name}, {result.chosen[0]}"
    return lambda axes: report.radius_histogram(axes, radius, correct[test].numpy(), name, end)
