"""Which training, and which score, find the most wrong predictions of a classifier?

    python benchmarks/misd.py train --nets scratch/plain/0 --shared DIR
    python benchmarks/misd.py score --nets scratch/plain/0 --shared DIR
    python benchmarks/misd.py report
    python benchmarks/misd.py keep --nets scratch/plain/0 --shared DIR

DIR has data/cifar10-jpeg-{train,test}.npz. Each net is trained in its own folder of --work and
scored on its own, so that nets can be spread over days and machines: `score` writes the order in
which each score puts the test images to results/misd, and `report` takes all that are there. `keep`
writes the weights of a net to results/nets, for `rat-ext evaluate --checkpoint`; `score` takes them
where they are. Training goes on from its last epoch after an interruption (`timeout 540 python
benchmarks/misd.py train ...` makes steps of nine minutes). Without --nets those of the first
experiment are meant: ResNet-20 from scratch.

Test images: the first 1,000 choose temperatures (TUNE), the next 4,000 choose a recipe and a score
(COMPARE), the last 5,000 (CONFIRM) are for the one that was chosen: nothing is chosen on them.
Intervals are percentiles of a bootstrap over the images, paired where two nets or scores are
compared, over the mean of the seeds of a recipe.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import interval, resampled, shared_folder
from tqdm.auto import tqdm

from rat_ext import datasets, metrics, models, scores
from rat_ext._common.storage import write_whole
from rat_ext.models import ViewAveraged
from rat_ext.training import PRESETS, Recipe, train

HERE = Path(__file__).resolve().parent
TUNE, COMPARE, CONFIRM = slice(0, 1000), slice(1000, 5000), slice(5000, 10000)
TEMPERATURES = (0.1, 0.3, 1.0)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Net:
    """A net to train."""

    recipe: Recipe
    model: str = "resnet20"
    images: int | None = None
    """How many training images, from the first; None for all."""
    data: str = "shared"
    """Or the name of a data set, which `rat_ext.datasets.load` finds in --root."""


def from_scratch(loss: str = "ce", **changes) -> Recipe:
    recipe = {
        "loss": loss,
        "eps": 4e-3,
        "epochs": 24,
        "warmup": 1,
        "augment": "crop-flip",
        "bf16": True,
        **changes,
    }
    return Recipe(**recipe)


SCRATCH = {
    "plain": {},
    "RAT": {"loss": "rat"},
    "SWA": {"swa": 6, "swa_lr": 0.02},
    "SAM + SWA": {"sam": 0.05, "swa": 6, "swa_lr": 0.02},
    "RAT + SWA": {"loss": "rat", "swa": 6, "swa_lr": 0.02},
    "RAT + SAM + SWA": {"loss": "rat", "sam": 0.05, "swa": 6, "swa_lr": 0.02},
}
"""The recipes of a ResNet-20 from scratch: what they change."""

PAPER = replace(PRESETS["rat-paper"], eps=4e-3, epochs=40, bf16=True)
HEART = {"plain": from_scratch(epochs=40, warmup=5), "RAT, as in the paper": PAPER}
TUNED = {"epochs": 3, "warmup": 0, "optimizer": "adamw", "lr": 1e-3}
PRETRAINED = {"plain": from_scratch(**TUNED), "RAT": from_scratch("rat", **TUNED)}
LARGE = {
    "plain": replace(PRESETS["plain"], epochs=200, augment="crop-flip", bf16=True),
    "RAT, as in the paper": replace(PRESETS["rat-paper"], bf16=True),
    "FMFP": replace(PRESETS["fmfp"], bf16=True),
    "RAT + FMFP": replace(PRESETS["rat-fmfp"], eps=4e-3, bf16=True),
}


def with_seeds(prefix: str, recipes: dict[str, Recipe], **how) -> dict[str, Net]:
    return {
        f"{prefix}/{name}/{seed}": Net(replace(each, seed=seed), **how)
        for name, each in recipes.items()
        for seed in SEEDS
    }


NETS = {
    **with_seeds("scratch", {name: from_scratch(**each) for name, each in SCRATCH.items()}),
    # Trained until nearly all of 10,000 images are known by heart.
    **with_seeds("by heart", HEART, model="resnet18-w32", images=10_000),
    **with_seeds("pretrained", PRETRAINED, model="efficientnet_lite0:create", images=20_000),
    # For a GPU, in steps of some minutes: the checkpoint of every epoch is kept.
    **{
        key: net
        for model in ("resnet18", "wrn-28-10")
        for data in ("cifar10", "cifar100")
        for key, net in with_seeds(f"{model} {data}", LARGE, model=model, data=data).items()
    },
}
FROM_SCRATCH = [name for name in NETS if name.startswith("scratch/")]
BASE, BASE_SCORE = "plain", "MSR"
SCORES = (
    "MSR",
    "margin",
    "RR-BS",
    "MSR, mirrored",
    "MSR, own class mirrored",
    "RR-BS, mirrored",
)
"""Those with "mirrored" take two forward rows for the logits, the others one."""


class Scored(NamedTuple):
    """What a score makes of all test images."""

    confidence: np.ndarray
    """Its rank among them, which is all that the metrics see."""
    correct: np.ndarray


class Folders(NamedTuple):
    """Where images are, and where they go."""

    shared: Path
    root: Path
    device: str


def folders(options: argparse.Namespace) -> Folders:
    return Folders(options.shared, options.root, options.device)


def folder_of(name: str, work: Path) -> Path:
    return work / name.replace(" + ", "+").replace(", ", "-").replace(" ", "-")


def result_of(name: str, options: argparse.Namespace, kind: str, ending: str) -> Path:
    """The file of a net in a folder beside --out."""
    slug = folder_of(name, Path()).as_posix().replace("/", "-")
    return options.out.parent / kind / f"{slug}{ending}"


@cache
def images_of(
    data: str, options: "Folders", split: str, limit: int | None = None
) -> datasets.Images:
    """The images of a data set, on the device."""
    if data == "shared":
        path = options.shared / "data" / f"cifar10-jpeg-{split}.npz"
        images = datasets.jpeg_archive(path, limit)
    else:
        images = datasets.load(data, split, options.root)
    pixels, targets = (each.to(options.device) for each in (images.pixels, images.targets))
    return datasets.Images(pixels, targets, images.classes)


def trained(name: str, options: argparse.Namespace) -> torch.nn.Module:
    """The net; goes on from its checkpoint, and only reads it where training was finished."""
    net = NETS[name]
    torch.manual_seed(net.recipe.seed)
    data = images_of(net.data, folders(options), "train", net.images)
    model = models.create(net.model, len(data.classes)).to(options.device)
    model = model.to(memory_format=torch.channels_last)  # the faster layout
    if options.compile:
        model.compile()
    out = folder_of(name, options.work)
    return train(model, data, net.recipe, out=out, name=net.model).model


def from_file(name: str, path: Path, options: argparse.Namespace) -> torch.nn.Module:
    """The net with weights that were kept."""
    net = NETS[name]
    model = models.create(net.model, len(images_of(net.data, folders(options), "test").classes))
    models.load_weights(model, path)
    return model.to(options.device)


def in_batches(images: datasets.Images, device: str, size: int = 250):
    for part in torch.arange(len(images)).split(size):
        x, target = images[part]
        yield x.to(device), target.to(device)


def score(name: str, options: argparse.Namespace) -> None:
    """Write the order of the test images by each score, and which of them are right."""
    record = result_of(name, options, "misd", ".npz")
    if record.exists():
        return
    net = NETS[name]
    kept = result_of(name, options, "nets", ".safetensors")
    model = (from_file(name, kept, options) if kept.exists() else trained(name, options)).eval()
    images = images_of(net.data, folders(options), "test")
    seen = images_of(net.data, folders(options), "train", net.images)
    tune = images.subset(TUNE)
    columns = {"train_accuracy": accuracy_on(model, seen, options.device)}
    averaged = ViewAveraged(model)
    with tqdm(SCORES, desc=f"score {name}", unit="score") as bar:
        for title in bar:
            bar.set_postfix_str(title)
            confidence, prediction = measured(title, model, averaged, images, tune, options.device)
            ranks = confidence.unique(return_inverse=True)[1]
            columns[f"{title}/rank"] = ranks.numpy().astype(np.uint16)
            columns[f"{title}/correct"] = np.packbits(prediction == images.targets.cpu())

    def write(path: Path) -> None:
        with path.open("wb") as file:  # savez would give the path another ending
            np.savez_compressed(file, **columns)

    record.parent.mkdir(parents=True, exist_ok=True)
    write_whole(record, write)


@torch.no_grad()
def accuracy_on(model: torch.nn.Module, images: datasets.Images, device: str) -> float:
    """On the images as they are, not augmented."""
    right = sum(int((model(x).argmax(1) == t).sum()) for x, t in in_batches(images, device))
    return right / len(images)


def measured(title, model, averaged, images, tune, device):
    """The (N,) confidences and predictions of a score on the images."""
    name, _, views = title.partition(", ")
    classifier = averaged if views == "mirrored" else model
    if views == "own class mirrored":
        each = scores.get("msr-views")
    elif name == "RR-BS":
        each = scores.get("rr-bs", temperature=TEMPERATURES)
    else:
        each = scores.get(name.lower())
    each.fit(classifier, in_batches(tune, device), progress=False)
    parts = [each.score_and_predict(classifier, x) for x, _ in in_batches(images, device)]
    return tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))


def read(path: Path) -> tuple[dict[str, Scored], float]:
    """What `score` wrote of a net, and its accuracy on the training images."""
    with np.load(path) as columns:
        found = {}
        for title in SCORES:
            ranks = columns[f"{title}/rank"]
            correct = np.unpackbits(columns[f"{title}/correct"], count=len(ranks))
            found[title] = Scored(ranks.astype(float), correct.astype(bool))
        return found, float(columns["train_accuracy"])


METRICS = {"aurc": metrics.aurc, "fpr_at_95_tpr": metrics.fpr_at_tpr, "auroc": metrics.auroc}


class Sample(NamedTuple):
    """A metric on some images, and on resamples of them."""

    value: float
    draws: np.ndarray

    @staticmethod
    def mean(samples: list["Sample"]) -> "Sample":
        values, draws = zip(*samples, strict=True)
        return Sample(float(np.mean(values)), np.mean(draws, axis=0))

    def interval(self) -> list[float]:
        return interval(self.draws)

    def over(self, base: "Sample") -> "Sample":
        """The change from `base`, as a share of it."""
        return Sample(self.value / base.value - 1, self.draws / base.draws - 1)

    def minus(self, base: "Sample") -> "Sample":
        return Sample(self.value - base.value, self.draws - base.draws)


def sampled(scored: Scored, images: slice, resamples: int) -> dict[str, Sample]:
    """Every metric on a part of the images; all nets and scores have the same resamples."""
    part = scored.confidence[images], scored.correct[images]
    draws = resampled([(metric, *part) for metric in METRICS.values()], resamples)
    values = [metric(*part) for metric in METRICS.values()]
    return dict(zip(METRICS, map(Sample, values, draws), strict=True))


def without_rat(recipe: str) -> str:
    """The recipe that a recipe is to be compared with, to see what was added to it."""
    return recipe.removeprefix("RAT + ") if recipe.startswith("RAT + ") else BASE


def summarised(title: str, seeds: dict, fewer: dict, bases: dict) -> dict:
    """A recipe with a score on a part of the images, beside the plain net with MSR."""
    row = {}
    for metric in METRICS:
        own = Sample.mean([seeds[seed][title][metric] for seed in seeds])
        base = Sample.mean([bases[seed][BASE_SCORE][metric] for seed in seeds])
        msr = Sample.mean([seeds[seed][BASE_SCORE][metric] for seed in seeds])
        row[metric] = {
            "value": own.value,
            "interval": own.interval(),
            "seeds": [seeds[seed][title][metric].value for seed in seeds],
            "change": own.over(base).value,
            "change_interval": own.over(base).interval(),
            "base_interval": base.interval(),
            # What the score contributes in this net.
            "minus_msr": own.minus(msr).value,
            "minus_msr_interval": own.minus(msr).interval(),
        }
        # What RAT does to this score, or, where the recipe is without RAT, all of the recipe.
        if both := [seed for seed in seeds if seed in fewer]:
            more = Sample.mean([seeds[seed][title][metric] for seed in both])
            rat = more.minus(Sample.mean([fewer[seed][title][metric] for seed in both]))
            row[metric]["minus_without_rat"] = rat.value
            row[metric]["minus_without_rat_interval"] = rat.interval()
    return row


def report(options: argparse.Namespace) -> None:
    """Write what there is of all nets to results/misd.json and the page of docs, and draw it."""
    records = {name: result_of(name, options, "misd", ".npz") for name in NETS}
    known = [name for name in NETS if records[name].exists()]
    content = {"torch": torch.__version__, "resamples": options.resamples, "experiments": {}}
    experiments: dict[str, dict[str, dict[int, str]]] = {}
    for name in known:
        experiment, recipe, seed = name.split("/")
        experiments.setdefault(experiment, {}).setdefault(recipe, {})[int(seed)] = name
    bar = tqdm(total=2 * len(known) * len(SCORES), desc="bootstrap", unit="score")
    for experiment, recipes in experiments.items():
        parts = content["experiments"][experiment] = {}
        for part, images in (("compare", COMPARE), ("confirm", CONFIRM)):
            samples: dict = {}
            accuracy: dict = {}
            for recipe, seeds in recipes.items():
                for seed, name in seeds.items():
                    scored, train_accuracy = read(records[name])
                    samples.setdefault(recipe, {})[seed] = {}
                    right = scored[BASE_SCORE].correct[images]
                    accuracy.setdefault(recipe, []).append((float(right.mean()), train_accuracy))
                    for title in SCORES:
                        each = sampled(scored[title], images, options.resamples)
                        samples[recipe][seed][title] = each
                        bar.update()
            parts[part] = {
                recipe: {
                    "accuracy": [own for own, _ in accuracy[recipe]],
                    "train_accuracy": [train for _, train in accuracy[recipe]],
                    "scores": {
                        title: summarised(
                            title, common, samples.get(without_rat(recipe), {}), samples[BASE]
                        )
                        for title in SCORES
                    },
                }
                for recipe, seeds in samples.items()
                # Compared with the plain nets of the same seeds.
                if (common := {s: seeds[s] for s in seeds if s in samples.get(BASE, {})})
            }
    bar.close()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    for experiment, parts in content["experiments"].items():
        print(f"\n{experiment}\n\n{HEAD}", *rows(parts), sep="\n")
        print(f"\n{shares(parts)}")
    fill(options.plots / "misd.md", content["experiments"])
    draw(content["experiments"], options.plots / "misd.png")


def keep(name: str, options: argparse.Namespace) -> None:
    """Write the weights of a net to a file for others, with its recipe."""
    net = NETS[name]
    classes = images_of(net.data, folders(options), "test").classes
    kept = from_file(name, folder_of(name, options.work) / "last.pt", options)
    path = result_of(name, options, "nets", ".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save_weights(
        kept,
        path,
        name=net.model,
        classes=classes,
        preprocessing=models.preprocessing(net.model),
        recipe=asdict(net.recipe),
    )


HEAD = """\
| recipe, score | AURC x1000, first | change | FPR@95TPR %, first \
| AURC x1000, last | change | FPR@95TPR %, last |
|---|---:|---:|---:|---:|---:|---:|"""
"""First are the images of COMPARE, last those of CONFIRM; AURC is by seed."""
LEFT_OUT = r", (margin|RR-BS, mirrored) \|"
"""Lines that the page of docs is shorter without: scores that nobody should prefer."""


def rows(experiment: dict) -> list[str]:
    """The lines of a table, in markdown: each recipe with each score, on both parts."""
    lines = []
    for recipe in experiment["compare"]:
        for title in SCORES:
            cells = [f"{recipe}, {title}"]
            for part in ("compare", "confirm"):
                each = experiment[part][recipe]["scores"][title]
                aurc, fpr = each["aurc"], each["fpr_at_95_tpr"]
                cells.append(", ".join(f"{1000 * value:.1f}" for value in aurc["seeds"]))
                if (recipe, title) == (BASE, BASE_SCORE):
                    cells += ["", f"{100 * fpr['value']:.0f}"]
                else:
                    cells += [changed(aurc), f"{100 * fpr['value']:.0f}: {changed(fpr)}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def fill(page: Path, experiments: dict) -> None:
    """Write the tables of a page anew: each between ``<!-- rows: EXPERIMENT -->`` and its end."""

    def table(found: re.Match) -> str:
        kept = [line for line in rows(experiments[found[2]]) if not re.search(LEFT_OUT, line)]
        return "\n".join([found[1], HEAD, *kept, found[3]])

    if page.exists():
        marked = r"(<!-- rows: ([^>]+) -->)\n.*?(<!-- end -->)"
        page.write_text(re.sub(marked, table, page.read_text(), flags=re.DOTALL))


def changed(row: dict) -> str:
    """From the plain nets with MSR."""
    low, high = row["change_interval"]
    return f"{100 * row['change']:+.0f} % ({100 * low:+.0f} to {100 * high:+.0f})"


def shares(experiment: dict) -> str:
    """The accuracy of every recipe, and what the radius and the recipe do to the AURC x1000."""
    lines = []
    for recipe, row in experiment["compare"].items():
        last = experiment["confirm"][recipe]
        parts = {"first": row["accuracy"], "last": last["accuracy"], "train": row["train_accuracy"]}
        each = (f"{k} {', '.join(f'{100 * v:.1f}' for v in values)}" for k, values in parts.items())
        lines.append(f"{recipe}: accuracy in %: {'; '.join(each)}")
        for what, title, share in (
            ("radius less MSR", "RR-BS", "minus_msr"),
            (f"MSR, less {without_rat(recipe)}", "MSR", "minus_without_rat"),
        ):
            cells = [part["scores"][title]["aurc"] for part in (row, last)]
            if recipe != BASE or share == "minus_msr":
                lines.append(f"    {what}: " + ", last ".join(difference(c, share) for c in cells))
    return "\n".join(lines)


def difference(row: dict, share: str) -> str:
    if share not in row:
        return "not known"
    low, high = row[f"{share}_interval"]
    return f"{1000 * row[share]:+.1f} ({1000 * low:+.1f} to {1000 * high:+.1f})"


def draw(experiments: dict, path: Path) -> None:
    """The change of AURC on the first images, by recipe and score: a panel for each experiment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from rat_ext.reports import PALETTE

    heights = [len(each["compare"]) for each in experiments.values()]
    figure, panels = plt.subplots(
        len(heights),
        figsize=(8.4, 1.2 * len(heights) + 0.62 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    marks = "osDosD"
    for axes, (experiment, parts) in zip(panels[:, 0], experiments.items(), strict=True):
        recipes = parts["compare"]
        places = np.arange(len(recipes))
        for i, title in enumerate(SCORES):
            each = [recipe["scores"][title]["aurc"] for recipe in recipes.values()]
            centre = 100 * np.array([row["change"] for row in each])
            ends = 100 * np.array([row["change_interval"] for row in each]).T
            axes.errorbar(
                centre,
                places + 0.11 * (i - 2.5),
                xerr=np.abs(ends - centre),
                fmt=marks[i],
                markersize=4,
                color=PALETTE[i % 3 + 1],
                fillstyle="full" if "mirrored" in title else "none",
                label=title,
            )
        axes.axvline(0, color="#7b8794", linewidth=1)
        axes.set_yticks(places, list(recipes))
        axes.invert_yaxis()
        axes.set_title(experiment, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("change of AURC in % from the plain net with MSR: left of 0 is better")
    panels[0, 0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["train", "score", "report", "keep"])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of data sets")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=FROM_SCRATCH, metavar="NET")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--work", type=Path, default=HERE / "misd-work", help="kept between runs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "misd.json")
    parser.add_argument("--plots", type=Path, default=HERE.parent / "docs" / "measurements")
    options = parser.parse_args(argv)
    if options.step == "report":
        return report(options)
    for name in options.nets:
        {"train": trained, "score": score, "keep": keep}[options.step](name, options)


if __name__ == "__main__":
    main()
