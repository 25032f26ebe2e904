"""How tight each attack's radius is on CIFAR-10, what it costs, and how well it detects errors.

    python benchmarks/attacks.py --shared DIR

DIR has data/cifar10-jpeg-test.npz and models/cifar10-jpeg-resnet20.pt. Every attack runs with its
default options, in batches; what is done is in the output file after each batch, and `--resume`
goes on from there (and prints the tables again where all is done). Radii are compared within a
norm: "of FGSM" is the mean over the images of the radius divided by that of the FGSM ray. The rows
"all" take the smallest radius over the attacks of a norm. AURC is that of the radius as a
confidence, times 1000, at T = 1 for all (no temperature is chosen), with 95 % bootstrap intervals
over the images; the last column is its difference to that of FGSM on the same resamples. "msr" is
the largest softmax probability.
"""

import argparse
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import load_model, load_test_images, shared_folder
from throughput import Watched
from tqdm import tqdm

import rat_ext
from rat_ext import metrics
from rat_ext.search.attack import ATTACKS

NORMS = {"linf": "L-inf", "l2": "L2"}
FGSM = {"linf": "fgsm", "l2": "fgsm_l2"}
RESAMPLES = 1000


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--model", choices=("resnet20", "resnet56"), default="resnet20")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--outside", action="store_true", help="only time what is not the model")
    parser.add_argument("--resume", action="store_true", help="go on with the output file")
    out = Path(__file__).parent / "results" / "attacks.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.shared, arguments.model)
    x, target = load_test_images(arguments.shared, arguments.images)
    if arguments.outside:
        return print_share_outside(model, x, arguments)
    results = measured(model, x, target, arguments)
    print(table(results))
    print(looseness(results))


def measured(model, x, target, arguments) -> dict:
    """What the output file holds: the radii and costs of each attack, image by image."""
    setting = {"model": arguments.model, "images": len(x), "threads": arguments.threads}
    results = {**setting, "attacks": {}}
    if arguments.resume and arguments.out.exists():
        results = json.loads(arguments.out.read_text())
        if {name: results[name] for name in setting} != setting:
            raise SystemExit(
                f"{arguments.out} has other settings than {setting}; use another --out"
            )
    with torch.no_grad():
        logits = torch.cat([model(rows) for rows in x.split(arguments.batch)])
    results["correct"] = (logits.argmax(1) == target).int().tolist()
    results["msr"] = rounded(logits.softmax(1).amax(1))
    with tqdm(total=len(x) * len(arguments.attacks), unit="image") as bar:
        for name in arguments.attacks:
            bar.set_description(name)
            fresh = {"radius": [], "forward_rows": 0, "backward_rows": 0, "seconds": 0.0}
            done = results["attacks"].setdefault(name, fresh)
            bar.update(len(done["radius"]))
            for begin in range(len(done["radius"]), len(x), arguments.batch):
                rows = x[begin : begin + arguments.batch]
                start = time.perf_counter()
                result = rat_ext.robust_radius(model, rows, attack=name, full=True)
                done["seconds"] += time.perf_counter() - start
                done["radius"] += rounded(result.radius)
                # With the forward and the backward at x itself.
                done["forward_rows"] += len(rows) + int(result.forward_rows.sum())
                done["backward_rows"] += len(rows) + int(result.backward_rows.sum())
                write(arguments.out, results)
                bar.update(len(rows))
    return results


def print_share_outside(model, x, arguments, rounds: int = 3) -> None:
    """The share of each attack's time that is not in the model's forward or backward."""
    for name in arguments.attacks:
        shares = []
        for _ in range(rounds):
            watched = Watched(model)
            with mock.patch.object(torch.autograd, "grad", watched.backward):
                start = time.perf_counter()
                rat_ext.robust_radius(watched, x, attack=name, batch_size=arguments.batch)
                shares.append(1 - watched.seconds / (time.perf_counter() - start))
        print(f"{name}: {100 * min(shares):.1f} to {100 * max(shares):.1f} % outside the model")


def rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results) + "\n")
    partial.replace(path)


# --- The tables -----------------------------------------------------------------------------------


def radii_of(results: dict, norm: str) -> dict[str, np.ndarray]:
    attacks = results["attacks"]
    return {n: np.array(attacks[n]["radius"]) for n in attacks if ATTACKS[n].norm == norm}


def table(results: dict) -> str:
    correct = np.array(results["correct"])
    wrong = 100 * (1 - correct.mean())
    lines = [
        f"{results['model']}, {len(correct)} test images, {wrong:.1f} % wrong, "
        f"{results['threads']} thread(s)",
        "",
        "| attack | found | mean | median | of FGSM | forward rows | backward rows | ms an image "
        "| AURC x1000 | minus FGSM's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| msr | | | | | 1.0 | 0.0 | | {aurc(np.array(results['msr']), correct)} | |",
    ]
    for norm, title in NORMS.items():
        radii = radii_of(results, norm)
        baseline = radii.get(FGSM[norm])
        for name in radii:
            done = results["attacks"][name]
            n = len(radii[name])
            costs = [
                f"{done['forward_rows'] / n:.1f}",
                f"{done['backward_rows'] / n:.1f}",
                f"{1000 * done['seconds'] / n:.0f}",
            ]
            lines.append(line(name, radii[name], costs, baseline, correct))
        if len(radii) > 1:
            smallest = np.min(list(radii.values()), axis=0)
            lines.append(line(f"all {title}", smallest, ["", "", ""], baseline, correct))
    return "\n".join(lines)


def looseness(results: dict) -> str:
    """How far the FGSM radius is above the smallest one, and which attack finds that."""
    correct = np.array(results["correct"], dtype=bool)
    lines = []
    for norm, title in NORMS.items():
        radii = radii_of(results, norm)
        if FGSM[norm] not in radii or len(radii) == 1:
            continue
        fgsm, smallest = radii[FGSM[norm]], np.min(list(radii.values()), axis=0)
        found = np.isfinite(fgsm)
        ratio = fgsm[found] / smallest[found]
        right = correct[found]
        low, middle, high = np.quantile(ratio, [0.1, 0.5, 0.9])
        ranks = [np.argsort(np.argsort(values)) for values in (fgsm, smallest)]
        winners = np.argmin(list(radii.values()), axis=0)
        shares = np.bincount(winners, minlength=len(radii)) / len(winners)
        won = ", ".join(f"{n} {100 * s:.0f} %" for n, s in zip(radii, shares, strict=True))
        lines.append(
            f"{title}: FGSM over the smallest: 10 % of the images below {low:.2f}, median "
            f"{middle:.2f}, 10 % above {high:.2f}; {100 * (ratio > 2).mean():.1f} % above 2. "
            f"Median where right {np.median(ratio[right]):.2f}, where wrong "
            f"{np.median(ratio[~right]):.2f}. Rank correlation {np.corrcoef(ranks)[0, 1]:.3f}. "
            f"Smallest: {won}."
        )
    return "\n".join(["", *lines])


def line(name, radius, costs, baseline, correct) -> str:
    found = np.isfinite(radius)
    ratio = difference = ""
    if baseline is not None:
        both = found & np.isfinite(baseline)
        ratio = f"{np.mean(radius[both] / baseline[both]):.3f}"
        difference = aurc_difference(radius, baseline, correct)
    cells = [
        name,
        f"{100 * found.mean():.1f} %",
        f"{radius[found].mean():.5f}",
        f"{np.median(radius[found]):.5f}",
        ratio,
        *costs,
        aurc(radius, correct),
        difference,
    ]
    return "| " + " | ".join(cells) + " |"


def aurc(confidence, correct) -> str:
    value, low, high = metrics.aurc(confidence, correct, n_boot=RESAMPLES)
    return f"{1000 * value:.1f} [{1000 * low:.1f}, {1000 * high:.1f}]"


def aurc_difference(confidence, baseline, correct) -> str:
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        i = rng.integers(len(correct), size=len(correct))
        draws.append(
            metrics.aurc(confidence[i], correct[i]) - metrics.aurc(baseline[i], correct[i])
        )
    value = metrics.aurc(confidence, correct) - metrics.aurc(baseline, correct)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{1000 * value:+.1f} [{1000 * low:+.1f}, {1000 * high:+.1f}]"


if __name__ == "__main__":
    main()
