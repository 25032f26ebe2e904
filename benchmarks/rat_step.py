"""What a training step with the RAT loss, or with SAM, costs beside a plain one, on a ResNet-20.

    python benchmarks/rat_step.py

Plain, RATLoss and the textbook RAT loss (`rat_ext.reference.rat_loss`: three forward and three
backward passes) take turns; the ratios are medians over the rounds. The floor of RAT is 2: it has
two forward and two backward passes. SAM does everything twice, so its floors are 2 and 4. SWA,
label smoothing and logit normalisation add next to nothing to a step.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import rat_ext
from rat_ext import models, reference
from rat_ext.training.sam import at_worst_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20", choices=models.names())
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = models.create(arguments.model).to(device).train()
    channels = 1 if arguments.model == "digits-cnn" else 3
    size = 8 if arguments.model == "digits-cnn" else 32
    x = torch.rand(arguments.batch_size, channels, size, size, device=device)
    t = torch.randint(10, (len(x),), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    criterion = rat_ext.RATLoss(eps=1e-3)
    losses = {
        "plain": lambda: F.cross_entropy(model(x), t),
        "RATLoss": lambda: criterion(model, x, t).loss,
        "textbook RAT": lambda: reference.rat_loss(model, x, t, eps=1e-3),
    }
    losses |= {"SAM": losses["plain"], "RATLoss, SAM": losses["RATLoss"]}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(arguments.rounds + 2):
        for name, loss in losses.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            loss().backward()
            if "SAM" in name:
                with at_worst_weights(model, 0.05):
                    optimizer.zero_grad()
                    loss().backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: times[2:] for name, times in seconds.items()}  # the first ones warm up
    print(f"{arguments.model}, batch {len(x)}, {device}, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["plain"], strict=True)]
        print(
            f"{name:13s} {1e3 * statistics.median(times):7.1f} ms a step, "
            f"{statistics.median(ratios):.2f} x plain (RATLoss: target 2.15, floor 2)"
        )


if __name__ == "__main__":
    main()
