"""What a detector with a guaranteed risk accepts, and what a cascade saves, on CIFAR-10.

    python benchmarks/detector.py --shared DIR

DIR has data/cifar10-jpeg-test.npz and models/cifar10-jpeg-resnet20.pt. Detectors are fitted on the
first test images and tested on the next ones. "Rows" are rows through the model per test image,
forward + backward; "changed" is the share of the cascade's decisions on the test images that differ
from those of its expensive score at the same threshold.
"""

import argparse
import json
from pathlib import Path

import torch
from common import load_model, load_test_images, shared_folder
from torch.utils.data import DataLoader, TensorDataset

from rat_ext import Cascade, Detector, scores


def tested(detector, x, target, batch_size):
    """What the detector does on images that it was not fitted on."""
    detector.score = detector.score.copy()  # counts its rows anew
    parts = [detector(part) for part in x.split(batch_size)]
    accepted = torch.cat([part.accepted for part in parts])
    wrong = torch.cat([part.prediction for part in parts]) != target
    result = {
        "coverage": float(accepted.double().mean()),
        "risk": float(wrong[accepted].double().mean()),
        "forward_rows": detector.score.forward_rows,
        "backward_rows": detector.score.backward_rows,
    }
    if isinstance(detector.score, Cascade):
        alone = detector.score.expensive.copy()
        confidence = torch.cat([alone.score(detector.model, part) for part in x.split(batch_size)])
        changed = (confidence >= detector.threshold) != accepted
        result["changed"] = float(changed.double().mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=shared_folder, default=shared_folder())
    parser.add_argument("--fit", type=int, default=2000, help="images to fit on")
    parser.add_argument("--test", type=int, default=2000, help="images to test on")
    parser.add_argument("--target-risk", type=float, default=0.05)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.4, 1.0, 2.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.shared, "resnet20")
    images, targets = load_test_images(arguments.shared, arguments.fit + arguments.test)
    held_out, x = images.split([arguments.fit, arguments.test])
    held_out_targets, target = targets.split([arguments.fit, arguments.test])
    loader = DataLoader(TensorDataset(held_out, held_out_targets), batch_size=200)

    radius = scores.get("rr-bs", temperature=arguments.temperatures)
    contenders = {"msr": "msr", "rr-bs": radius, "msr, then rr-bs": Cascade("msr", radius)}
    results = {}
    print(f"ResNet-20, target risk {arguments.target_risk:g}, delta 0.001")
    print("                   held out                    tested")
    print("score              coverage  risk   bound      coverage  risk   rows         changed")
    for name, score in contenders.items():
        detector = Detector.fit(model, loader, score, target_risk=arguments.target_risk)
        report, test = detector.report, tested(detector, x, target, 200)
        results[name] = {
            "held_out": {
                "samples": report.samples,
                "tuned_on": report.tuned_on,
                "coverage": report.coverage,
                "risk": report.risk,
                "risk_bound": report.risk_bound,
                "changed": report.cascade and report.cascade.changed,
                "examined": report.cascade and report.cascade.examined,
            },
            "test": test,
        }
        print(
            f"{name:18s} {100 * report.coverage:6.1f} % {100 * report.risk:5.2f} % "
            f"{100 * report.risk_bound:5.2f} %   {100 * test['coverage']:6.1f} % "
            f"{100 * test['risk']:5.2f} %  {test['forward_rows']:.2f} + {test['backward_rows']:.2f}"
            + (f"  {100 * test['changed']:.2f} %" if "changed" in test else ""),
            flush=True,
        )
    if arguments.out:
        settings = {
            "fit": arguments.fit,
            "test": arguments.test,
            "target_risk": arguments.target_risk,
            "delta": 0.001,
            "temperatures": arguments.temperatures,
        }
        results = {"settings": settings, "scores": results}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
