"""What a classifier averaged over mirrored images gains, on CIFAR-10.

    python benchmarks/views.py --shared DIR --out benchmarks/results/views.json

The trained ResNets as they are, and behind `rat_ext.models.ViewAveraged`; each with the largest
softmax probability ("msr") and the radius ("rr-bs", at temperature 1) as a confidence in its own
predictions. "msr-views" keeps the predictions of the net alone, and averages the probability of
their class over the views. AURC is times 1000, with a 95 % bootstrap interval over the images.
"""

import argparse
import json
from pathlib import Path

import torch
from common import load_model, load_test_images, shared_folder
from tqdm.auto import tqdm

from rat_ext import metrics, scores
from rat_ext.models import ViewAveraged

SCORES = {"msr": {}, "rr-bs": {"temperature": 1.0, "rtol": 0.05}}


def measure(model, x, target, name: str) -> dict[str, object]:
    score = scores.get(name, **SCORES.get(name, {}))
    parts = [score.score_and_predict(model, part) for part in tqdm(x.split(250), leave=False)]
    confidence, prediction = (torch.cat(each) for each in zip(*parts, strict=True))
    correct = prediction == target
    aurc, low, high = metrics.aurc(confidence, correct, n_boot=1000)
    return {
        "accuracy": correct.double().mean().item(),
        "aurc": [1000 * aurc, 1000 * low, 1000 * high],
        "auroc": metrics.auroc(confidence, correct),
        "fpr_at_95_tpr": metrics.fpr_at_tpr(confidence, correct),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    x, target = load_test_images(arguments.shared, arguments.images)
    report = {}
    print("model     views      score      accuracy   AURC (95 % interval)   AUROC   FPR@95TPR")
    for net in ("resnet20", "resnet56"):
        model = load_model(arguments.shared, net)
        averaged = ViewAveraged(model)
        cases = [(views, name) for views in ("x alone", "mirrored") for name in SCORES]
        for views, name in [*cases, ("x alone", "msr-views")]:
            each = averaged if views == "mirrored" else model
            run = measure(each, x, target, name)
            report[f"{net}, {views}, {name}"] = run
            aurc, low, high = run["aurc"]
            print(
                f"{net}  {views:9s}  {name:9s} {100 * run['accuracy']:8.2f} %"
                f"   {aurc:5.2f} ({low:.2f} to {high:.2f})   {run['auroc']:.4f}"
                f"   {100 * run['fpr_at_95_tpr']:.1f} %",
                flush=True,
            )
    if arguments.out:
        settings = {"images": len(x), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({**settings, "runs": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
