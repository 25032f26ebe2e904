"""Does RAT training turn the robust radius into the better detector of errors?

    python benchmarks/misd_slopes.py --shared DIR

DIR has data/cifar10-jpeg-{train,test}.npz and models/cifar10-jpeg-resnet20.pt. Trains the NETS
(a CIFAR-10 ResNet-20 each), scores the same test images with each of them, and writes
results/misd_slopes.json and the plots of docs/measurements/misd-slopes.md, the page that says what
came of it. What is done is kept in --work; the same command goes on from there after an
interruption, and --nets does only some.

Temperatures and perturbations are chosen on test images that are not reported on. Intervals are
percentiles of a bootstrap over the images; those of differences are paired. They say nothing about
another seed of the training.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from common import interval, load_model, resampled, shared_folder
from tqdm.auto import tqdm

from rat_ext import datasets, metrics, models, scores
from rat_ext._common.storage import write_whole
from rat_ext._common.user_model import logits_of, undisturbed
from rat_ext.training import Recipe, train

HERE = Path(__file__).resolve().parent
COMMON = {"batch_size": 128, "weight_decay": 5e-4, "bf16": True}
TEMPERATURES = (0.1, 0.3, 1.0)
BASELINE = "MSR"
EXPONENTS = np.linspace(-1, 1.5, 26)


@dataclass(frozen=True)
class Net:
    """How a net comes about; without a recipe it is the shared one."""

    recipe: Recipe | None = None
    from_shared: bool = True


def fine_tuned(loss: str = "rat", **changes) -> Net:
    recipe = {"lr": 0.01, "epochs": 3, "augment": "crop-flip", **changes}
    return Net(Recipe(loss=loss, **COMMON, **recipe))


def from_scratch(loss: str = "rat", **changes) -> Net:
    recipe = {"lr": 0.1, "epochs": 8, "warmup": 1, "augment": "crop-flip", **changes}
    return Net(Recipe(loss=loss, **COMMON, **recipe), from_shared=False)


NETS = {
    "shared": Net(),
    "plain": fine_tuned("ce"),
    "plain seed 1": fine_tuned("ce", seed=1),
    "rat 1e-3": fine_tuned(eps=1e-3),
    "rat 2e-3": fine_tuned(eps=2e-3),
    "rat 4e-3": fine_tuned(eps=4e-3),
    "rat 4e-3 seed 1": fine_tuned(eps=4e-3, seed=1),
    "rat 8e-3": fine_tuned(eps=8e-3),
    "rat 8e-3 pgd": fine_tuned(eps=8e-3, steps=3),
    "rat 4e-3 lam 4": fine_tuned(eps=4e-3, lam=4.0),
    "plain mixup": fine_tuned("ce", mixup=1.0),
    "rat 4e-3 mixup": fine_tuned(eps=4e-3, mixup=1.0),
    # Until the training images are learnt by heart, so that the softmax is over-confident.
    "overfitted plain": fine_tuned("ce", lr=0.05, epochs=6, augment="none"),
    "scratch plain": from_scratch("ce"),
    "scratch rat 4e-3": from_scratch(eps=4e-3),
    "long scratch plain": from_scratch("ce", epochs=24),
    "long scratch plain seed 1": from_scratch("ce", epochs=24, seed=1),
    "long scratch rat 4e-3": from_scratch(eps=4e-3, epochs=24),
    "long scratch rat 4e-3 seed 1": from_scratch(eps=4e-3, epochs=24, seed=1),
}


def new_scores() -> dict[str, scores.Score]:
    """The scores under comparison; those with several settings choose by AURC."""
    return {
        "MSR": scores.get("msr"),
        "MSR, T tuned": scores.get("doctor-beta"),
        "max logit": scores.get("max-logit"),
        "energy": scores.get("energy"),
        "margin": scores.get("margin"),
        "negative entropy": scores.get("negative-entropy"),
        "Doctor alpha": scores.get("doctor-alpha"),
        "ODIN": scores.get("odin", temperature=(1.0, 2.0), perturbation=(0.0, 5e-4, 1e-3, 2e-3)),
        "RelU": scores.get("rel-u"),
        "RR-Fast": scores.get("rr-fast", temperature=TEMPERATURES),
        "RR-BS, T=1": scores.get("rr-bs", temperature=1.0),
        "RR-BS": scores.get("rr-bs", temperature=TEMPERATURES),
    }


def trained(name: str, shared: Path, work: Path) -> torch.nn.Module:
    """The net, from its checkpoint as far as it was trained before."""
    net = NETS[name]
    if net.recipe is None:
        return load_model(shared, "resnet20")
    if net.from_shared:
        model = load_model(shared, "resnet20")
    else:
        torch.manual_seed(net.recipe.seed)
        model = models.create("resnet20")
    model = model.to(memory_format=torch.channels_last)  # the faster layout in bfloat16
    data = datasets.jpeg_archive(shared / "data" / "cifar10-jpeg-train.npz")
    out = work / name.replace(" ", "-")
    return train(model, data, net.recipe, out=out).model.to(memory_format=torch.contiguous_format)


def in_batches(images: datasets.Images, size: int = 250) -> torch.utils.data.DataLoader:
    index = torch.arange(len(images)).split(size)
    return datasets.batches(images, [part.tolist() for part in index], 0, torch.device("cpu"))


def all_logits(model: torch.nn.Module, images: datasets.Images) -> torch.Tensor:
    with torch.no_grad(), undisturbed(model, torch.device("cpu")):
        return torch.cat([logits_of(model(x), len(x)) for x, _ in in_batches(images)])


def slopes(model: torch.nn.Module, images: datasets.Images) -> torch.Tensor:
    """(N,) L1 norms of the input gradient of the predicted class's log-odds."""
    norms = []
    for x, _ in in_batches(images):
        leaf = x.requires_grad_()
        logits = model(leaf)
        predicted = logits.argmax(1, keepdim=True)
        others = logits.scatter(1, predicted, -torch.inf).logsumexp(1)
        log_odds = logits.gather(1, predicted)[:, 0] - others
        (gradient,) = torch.autograd.grad(log_odds.sum(), leaf)
        norms.append(gradient.abs().flatten(1).sum(1))
    return torch.cat(norms)


def measured(name: str, model: torch.nn.Module, arguments: argparse.Namespace) -> dict:
    """What the scores make of a net, as it goes into the results."""
    data = datasets.jpeg_archive(
        arguments.shared / "data" / "cifar10-jpeg-test.npz", arguments.tune + arguments.test
    )
    held_out = data.subset(slice(arguments.tune))
    test = data.subset(slice(arguments.tune, None))
    held_out_logits, logits = all_logits(model, held_out), all_logits(model, test)
    correct = logits.argmax(1) == test.targets
    train_images = datasets.jpeg_archive(
        arguments.shared / "data" / "cifar10-jpeg-train.npz", arguments.test
    )
    train_right = all_logits(model, train_images).argmax(1) == train_images.targets

    confidences, chosen = {}, {}
    for title, score in (bar := tqdm(new_scores().items(), desc=f"score {name}", unit="score")):
        bar.set_postfix_str(title)
        grid = getattr(score, "grid", [])
        if isinstance(score, scores.LogitScore) and not any(each.perturbation for each in grid):
            identity = torch.nn.Identity()  # the logits are known
            score.fit(identity, [(held_out_logits, held_out.targets)], progress=False)
            confidences[title] = score.score(identity, logits)
        else:
            score.fit(model, in_batches(held_out), progress=False)
            confidences[title] = torch.cat([score.score(model, x) for x, _ in in_batches(test)])
        if len(grid) > 1:
            chosen[title] = score.setting._asdict()

    right = correct.numpy()
    values = {title: each.double().numpy() for title, each in confidences.items()}
    aurcs = [(metrics.aurc, each, right) for each in values.values()]
    samples = resampled(aurcs, arguments.resamples)
    baseline = samples[list(values).index(BASELINE)]
    rows = {}
    for title, sample in zip(values, samples, strict=True):
        summary = metrics.summary(values[title], right)
        rows[title] = {
            **{key: float(value) for key, value in summary.items()},
            "aurc_interval": interval(sample),
            "minus_msr": float(summary["aurc"] - rows[BASELINE]["aurc"]) if rows else 0.0,
            "minus_msr_interval": interval(sample - baseline),
            "chosen": chosen.get(title),
        }
    top = logits.topk(2, dim=1).values
    margin, slope = (top[:, 0] - top[:, 1]).double().numpy(), slopes(model, test).double().numpy()
    tiny = np.finfo(float).tiny
    by_exponent = [
        metrics.aurc(np.log(margin + tiny) - a * np.log(slope + tiny), right) for a in EXPONENTS
    ]
    probability = logits.softmax(1).amax(1)
    return {
        "recipe": asdict(NETS[name].recipe) if NETS[name].recipe else None,
        "from_shared": NETS[name].from_shared,
        "train_accuracy": float(train_right.double().mean()),
        "accuracy": float(right.mean()),
        "errors": int((~right).sum()),
        "mean_confidence": float(probability.mean()),
        "median_radius": float(np.median(values["RR-BS, T=1"])),
        "median_slope": {
            "right": float(np.median(slope[right])),
            "wrong": float(np.median(slope[~right])),
        },
        "scores": rows,
        "aurc_by_exponent": by_exponent,
    }


def printed(results: dict[str, dict]) -> str:
    """A table of the nets, as markdown."""
    lines = [
        "| net | train % | test % | confidence % | median radius | MSR | MSR, T tuned | RR-Fast "
        "| RR-BS | RR-BS - MSR |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, net in results.items():
        row = net["scores"]
        aurcs = [f"{1000 * row[t]['aurc']:.1f}" for t in ("MSR", "MSR, T tuned", "RR-Fast")]
        rr = row["RR-BS"]
        low, high = (1000 * v for v in rr["minus_msr_interval"])
        lines.append(
            f"| {name} | {100 * net['train_accuracy']:.1f} | {100 * net['accuracy']:.1f} "
            f"| {100 * net['mean_confidence']:.1f} | {net['median_radius']:.4f} "
            f"| {' | '.join(aurcs)} | {1000 * rr['aurc']:.1f} "
            f"| {1000 * rr['minus_msr']:+.1f} ({low:+.1f} to {high:+.1f}) |"
        )
    return "\n".join(lines)


def all_scores(results: dict[str, dict]) -> str:
    """AURC x1000 of every score in every net, as markdown."""
    titles = list(next(iter(results.values()))["scores"])
    lines = ["| net | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for name, net in results.items():
        cells = (
            "{:.1f} ({:.1f} to {:.1f})".format(
                *(1000 * v for v in (row["aurc"], *row["aurc_interval"]))
            )
            for row in net["scores"].values()
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict], folder: Path) -> None:
    """misd-differences.png and misd-exponents.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from rat_ext.reports import PALETTE

    names = list(results)
    figure, axes = plt.subplots(figsize=(8.4, 1.2 + 0.36 * len(names)), layout="constrained")
    places = np.arange(len(names))
    for offset, (title, colour) in enumerate(
        [("RR-BS", PALETTE[2]), ("RR-Fast", PALETTE[4]), ("MSR, T tuned", PALETTE[1])]
    ):
        rows = [results[name]["scores"][title] for name in names]
        centre = np.array([1000 * row["minus_msr"] for row in rows])
        ends = 1000 * np.array([row["minus_msr_interval"] for row in rows]).T
        axes.errorbar(
            centre,
            places + 0.22 * (offset - 1),
            xerr=np.abs(ends - centre),
            fmt="o",
            markersize=4,
            color=colour,
            label=title,
        )
    axes.axvline(0, color="#7b8794", linewidth=1)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("AURC x1000 minus that of MSR: left of 0 is better than MSR")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "misd-differences.png", dpi=130)
    plt.close(figure)

    figure, (curves, points) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    at_margin = int(np.abs(EXPONENTS).argmin())
    titles = set()
    for name, net in results.items():
        recipe = NETS[name].recipe
        rat = recipe is not None and recipe.loss == "rat"
        title = ("RAT" if rat else "plain") + ("" if NETS[name].from_shared else ", from scratch")
        colour = PALETTE[2] if rat else PALETTE[1]
        label = None if title in titles else title
        titles.add(title)
        aurc = 1000 * np.array(net["aurc_by_exponent"])
        style = "-" if NETS[name].from_shared else "--"
        curves.plot(EXPONENTS, aurc - aurc[at_margin], style, color=colour, label=label)
        slope = net["median_slope"]
        points.plot(
            100 * (slope["wrong"] / slope["right"] - 1),
            1000 * net["scores"]["RR-BS"]["minus_msr"],
            "o",
            color=colour,
            fillstyle="full" if NETS[name].from_shared else "none",
            label=label,
        )
    for place, text in ((0, "logit margin"), (1, "linear radius")):
        curves.axvline(place, color="#7b8794", linewidth=1, linestyle=":")
        curves.annotate(
            text, (place, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom"
        )
    curves.set_xlabel("a in  margin / slope^a")
    curves.set_ylabel("AURC x1000 minus that of the margin")
    points.axhline(0, color="#7b8794", linewidth=1)
    points.set_xlabel("median slope, wrong over right predictions, in % above 1")
    points.set_ylabel("AURC x1000 of RR-BS minus that of MSR")
    for axes in (curves, points):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "misd-exponents.png", dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET")
    parser.add_argument("--tune", type=int, default=1000, help="test images to choose settings on")
    parser.add_argument("--test", type=int, default=4000, help="test images to report on")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument(
        "--work", type=Path, default=HERE / "misd-slopes-work", help="kept between runs"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "misd_slopes.json")
    parser.add_argument("--plots", type=Path, default=HERE.parent / "docs" / "measurements")
    arguments = parser.parse_args(argv)

    settings = {name: getattr(arguments, name) for name in ("tune", "test", "resamples")}
    results = {}
    for name in arguments.nets:
        record = arguments.work / f"{name.replace(' ', '-')}.json"
        if record.exists() and (known := json.loads(record.read_text()))["settings"] == settings:
            results[name] = known["result"]
            continue
        model = trained(name, arguments.shared, arguments.work)
        results[name] = measured(name, model, arguments)
        content = json.dumps({"settings": settings, "result": results[name]}, indent=1)
        arguments.work.mkdir(parents=True, exist_ok=True)
        write_whole(record, lambda path, content=content: path.write_text(content))
        print(printed({name: results[name]}), flush=True)

    content = {
        "torch": torch.__version__,
        **settings,
        "exponents": list(EXPONENTS),
        "nets": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    draw(results, arguments.plots)
    print(printed(results), all_scores(results), sep="\n\n")


if __name__ == "__main__":
    main()
