"""Fine-tune a classifier with the RAT loss, and act only on predictions that can be trusted.

    python examples/finetune_rat.py
    python examples/finetune_rat.py --data folder:photos --model torchvision:resnet18 \\
        --pretrained --eps 0.001 --lr 0.0001

Without options: a small network on scikit-learn's digits, in about 20 seconds. Needs scikit-learn.
"""

import copy

import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader, Subset

import rat_ext
from rat_ext import datasets, models


def main(
    data: str = "digits",
    model: str = "digits-cnn",
    pretrained: bool = False,
    eps: float = 0.1,
    lr: float = 3e-3,
    epochs: int = 20,
    target_risk: float = 0.03,
) -> None:
    """Fine-tune one copy of a network plainly and one with RAT, compare them, and gate the second.

    Args:
        data: data set by name, as rat-ext train takes it.
        model: model by name, likewise.
        pretrained: start from weights of torchvision or timm.
        eps: step of the RAT loss, in the units of pixels from 0 to 1.
        lr: highest learning rate.
        epochs: of each training.
        target_risk: highest error rate among the accepted predictions.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = models.preprocessing(model, pretrained=pretrained)
    train, test = (datasets.load(data, part, preprocessing=size) for part in ("train", "test"))
    start = models.create(model, len(train.classes), pretrained=pretrained, new_head=True)

    # The test images in two parts, each with its share of every class: the first fits the gate.
    order = datasets.shuffled(test).tolist()
    half = len(order) // 2
    held_out = DataLoader(Subset(test, order[:half]), 100)
    new = DataLoader(Subset(test, order[half:]), 100)

    def fit(network, loss_of) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        network.to(device).train()
        for _ in range(epochs):
            for x, t in DataLoader(train, 50, shuffle=True, drop_last=True):
                optimizer.zero_grad()
                loss_of(network, x.to(device), t.to(device)).backward()
                optimizer.step()
            schedule.step()

    def plain(network, x, t):
        return nn.functional.cross_entropy(network(x), t)

    criterion = rat_ext.RATLoss(eps=eps, lam=1.0)

    def rat(network, x, t):
        return criterion(network, x, t).loss

    if not pretrained:
        fit(start, plain)
    for name, loss_of in (("plain", plain), ("RAT", rat)):
        network = copy.deepcopy(start)
        fit(network, loss_of)
        radii = rat_ext.robust_radii(network, new, progress=False)
        accuracy = (radii.prediction == radii.target).float().mean()
        print(f"{name}: accuracy {accuracy:.4f}, median radius {radii.radius.median():.4f}")

    # "auto" takes the best of several scores on a fifth of the held-out images; the others choose
    # the threshold, so that the bound on the risk holds.
    gate = rat_ext.Detector.fit(network, held_out, "auto", target_risk=target_risk, progress=False)
    print(gate.report)
    decisions = [(gate(x.to(device)), t.to(device)) for x, t in new]
    accepted = sum(int(out.accepted.sum()) for out, _ in decisions)
    wrong = sum(int((out.prediction != t)[out.accepted].sum()) for out, t in decisions)
    print(f"Of {len(order) - half} new images {accepted} are accepted; {wrong} of these are wrong.")


if __name__ == "__main__":
    tyro.cli(main)
