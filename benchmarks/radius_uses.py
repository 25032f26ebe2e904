r"""What a robust radius is good for, beside the softmax and the logit margin.

    python benchmarks/radius_uses.py --shared DIR --nets NAME=FILE... \
        --out benchmarks/results/radius_uses.json

For the shared ResNet-20 and for each checkpoint FILE of a ResNet-20, on test images from 1,000 on
of DIR: how well MSR, the margin and RR-BS tell

- robustness: which right predictions a stronger attack (PGD) changes within eps, the median of
  its radii;
- label errors: which labels were replaced by another class, one in ten. A label is doubted the
  more, the surer the prediction is that differs from it;
- errors on corrupted images: which predictions are wrong under noise, blur, low contrast, large
  pixels or a grey patch;
- other inputs: which inputs are no test images but handwritten digits, gratings, uniform noise or
  blurred noise.

Each figure is an AUROC (1: perfect, 0.5: by chance) with the difference of RR-BS to MSR and its
95 % interval, of a bootstrap over the inputs in which both have the same resamples.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    interval,
    load_checkpoints,
    load_model,
    load_test_images,
    resampled,
    shared_folder,
)
from tqdm.auto import tqdm

import rat_ext
from rat_ext import datasets, metrics, scores

SCORES = {"MSR": ("msr", {}), "margin": ("margin", {}), "RR-BS": ("rr-bs", {"temperature": 1.0})}


def noise(x, generator):
    return (x + 0.08 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def blur(x, generator):
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def low_contrast(x, generator):
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + 0.3 * (x - mean)


def large_pixels(x, generator):
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")


def patch(x, generator):
    """An 8 x 8 square of grey somewhere."""
    x = x.clone()
    corners = torch.randint(25, (len(x), 2), generator=generator)
    for image, (top, left) in zip(x, corners, strict=True):
        image[:, top : top + 8, left : left + 8] = 0.5
    return x


CORRUPTIONS = {
    f.__name__.replace("_", " "): f for f in (noise, blur, low_contrast, large_pixels, patch)
}


def digits(count, generator):
    pixels = datasets.digits().train.pixels
    chosen = pixels[torch.randint(len(pixels), (count,), generator=generator)]
    return F.interpolate(chosen, 32, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)


def gratings(count, generator):
    """Sine waves of any direction, two to ten periods an image, in any two colours."""
    angle, phase, periods = torch.rand(3, count, 1, 1, generator=generator)
    angle, phase, periods = math.pi * angle, 2 * math.pi * phase, 2 + 8 * periods
    rows, columns = torch.meshgrid(
        torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij"
    )
    along = angle.cos() * columns + angle.sin() * rows
    wave = 0.5 + 0.5 * (2 * math.pi * periods * along + phase).sin()
    one, other = torch.rand(2, count, 3, 1, 1, generator=generator)
    return torch.lerp(one, other, wave[:, None])


def uniform_noise(count, generator):
    return torch.rand(count, 3, 32, 32, generator=generator)


def blurred_noise(count, generator):
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return F.interpolate(coarse, 32, mode="bicubic", align_corners=False).clamp(0, 1)


OTHERS = {f.__name__.replace("_", " "): f for f in (digits, gratings, uniform_noise, blurred_noise)}


def measured(model, x):
    """The confidences of every score, and the predictions, of (N, 3, 32, 32) images."""
    columns = {}
    for title, (name, options) in SCORES.items():
        score = scores.get(name, **options)
        parts = [score.score_and_predict(model, part.contiguous()) for part in x.split(250)]
        columns[title], prediction = (torch.cat(part) for part in zip(*parts, strict=True))
    return columns, prediction


def compared(values, positive, resamples):
    """AUROCs of `values` (title -> (N,)) for `positive` (N,), and RR-BS minus MSR."""
    positive = positive.numpy()
    values = {title: each.double().numpy() for title, each in values.items()}
    row = {title: metrics.auroc(each, positive) for title, each in values.items()}
    aurocs = [(metrics.auroc, values[title], positive) for title in ("RR-BS", "MSR")]
    radius, msr = resampled(aurocs, resamples)
    row["RR-BS minus MSR"] = row["RR-BS"] - row["MSR"]
    row["interval"] = interval(radius - msr)
    row["share"] = float(positive.mean())
    return row


def uses(model, x, target, options):
    """Everything of one net, by use and case."""
    generator = torch.Generator().manual_seed(0)
    report = {}
    clean, prediction = measured(model, x)
    right = prediction == target

    some = right.nonzero()[: options.attacked, 0]
    pgd = torch.cat(
        [rat_ext.robust_radius(model, part, attack="pgd") for part in x[some].split(250)]
    )
    eps = float(pgd.median())
    ranks = {title: each[some] for title, each in clean.items()}
    report["robustness"] = {f"PGD, eps {eps:.4f}": compared(ranks, pgd > eps, options.resamples)}
    report["errors"] = {"as they are": compared(clean, right, options.resamples)}

    replaced = torch.rand(len(x), generator=generator) < 0.1
    shift = torch.randint(1, 10, (len(x),), generator=generator)
    label = torch.where(replaced, (target + shift) % 10, target)
    trust = {t: torch.where(prediction == label, each, -each) for t, each in clean.items()}
    report["label errors"] = {"one in ten": compared(trust, ~replaced, options.resamples)}

    for name, corrupt in CORRUPTIONS.items():
        confidence, predicted = measured(model, corrupt(x, generator))
        report["errors"][name] = compared(confidence, predicted == target, options.resamples)

    report["other inputs"] = {}
    inside = torch.arange(2 * len(x)) < len(x)
    for name, make in OTHERS.items():
        confidence, _ = measured(model, make(len(x), generator))
        both = {title: torch.cat([clean[title], each]) for title, each in confidence.items()}
        report["other inputs"][name] = compared(both, inside, options.resamples)
    return report


def table(report) -> str:
    lines = ["| net | use | case | MSR | margin | RR-BS | RR-BS - MSR |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for net, uses_of in report.items():
        for use, cases in uses_of.items():
            for case, row in cases.items():
                low, high = row["interval"]
                cells = " | ".join(f"{row[title]:.3f}" for title in SCORES)
                lines.append(
                    f"| {net} | {use} | {case} | {cells} "
                    f"| {row['RR-BS minus MSR']:+.3f} ({low:+.3f} to {high:+.3f}) |"
                )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--nets", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--attacked", type=int, default=1000, help="right predictions to attack")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    x, target = load_test_images(options.shared, 1000 + options.images)
    x, target = x[1000:], target[1000:]
    nets = {"shared": load_model(options.shared, "resnet20"), **load_checkpoints(options.nets)}
    report = {name: uses(model, x, target, options) for name, model in tqdm(nets.items())}
    print(table(report))
    if options.out:
        settings = {"images": len(x), "attacked": options.attacked, "torch": torch.__version__}
        options.out.write_text(json.dumps({**settings, "nets": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
