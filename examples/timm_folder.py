"""A pretrained timm model on a folder of images: its least robust predictions, and a gate.

    python examples/timm_folder.py --images imagenet/val --model mobilenetv3_small_100

The folder has one folder of images for each class, as torchvision's ImageFolder reads it. Sorted by
name, they must be the classes of the model: those of ImageNet for most of timm's weights, your own
with --checkpoint. Needs timm and torchvision.
"""

from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import rat_ext
from rat_ext import models


def main(
    images: Path,
    model: str = "mobilenetv3_small_100",
    checkpoint: Path | None = None,
    target_risk: float = 0.1,
    limit: int = 2000,
    batch_size: int = 50,
) -> None:
    """Measure radii, then accept as many predictions as can be with few errors among them.

    Args:
        images: folder with a folder of images for each class.
        model: name in timm.list_models().
        checkpoint: file with your own weights, instead of those of timm.
        target_risk: highest error rate among the accepted predictions.
        limit: how many images to use, chosen at random; half of them fit the gate.
        batch_size: images in a batch.
    """
    torch.manual_seed(0)
    # Resized and cropped as timm says for this model, to pixels from 0 to 1. The normalisation is
    # inside the classifier, so that radii are in the units of pixels.
    name = f"timm:{model}"
    data = ImageFolder(str(images), models.preprocessing(name))
    classifier = models.create(name, len(data.classes), pretrained=not checkpoint)
    if checkpoint:
        models.load_weights(classifier, checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier.to(device)

    # Shuffled before it is halved: the folder is sorted by class.
    half = min(limit, len(data)) // 2
    held_out, new, _ = random_split(data, [half, half, len(data) - 2 * half])

    radii = rat_ext.robust_radii(classifier, DataLoader(new, batch_size))
    print("The least robust predictions (radius in grey levels of 255):")
    for index in radii.radius.argsort()[:5].tolist():
        path, _ = data.samples[new.indices[index]]
        predicted = data.classes[radii.prediction[index]]
        print(f"  {255 * radii.radius[index]:.3f}  {predicted}  {path}")

    # "auto" compares several confidences, the radius among them, and takes the best one here.
    gate = rat_ext.Detector.fit(
        classifier, DataLoader(held_out, batch_size), "auto", target_risk=target_risk
    )
    print(f"The gate, fitted on {half} images: {gate.report}")

    accepted = wrong = 0
    for x, target in DataLoader(new, batch_size):
        out = gate(x.to(device))
        accepted += int(out.accepted.sum())
        wrong += int((out.prediction.cpu() != target)[out.accepted.cpu()].sum())
    print(f"On {half} new images it accepted {accepted}, and {wrong} of these are wrong.")


if __name__ == "__main__":
    tyro.cli(main)
