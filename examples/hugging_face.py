"""A Hugging Face image classifier: radii, and the accuracy that is left under an attack.

    python examples/hugging_face.py --images photos/test --model my-classifier

--model is a folder that save_pretrained() has written, or a name on the Hugging Face hub. The
images are in one folder for each class, named like a label of the model. Needs transformers and
torchvision.
"""

from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from transformers import AutoImageProcessor, AutoModelForImageClassification

import rat_ext
from rat_ext import models


def main(images: Path, model: str, batch_size: int = 16, attack: str = "fgsm") -> None:
    """Measure how robust a classifier of transformers is.

    Args:
        images: folder with a folder of images for each class.
        model: name on the Hugging Face hub, or a folder written by save_pretrained().
        batch_size: images in a batch.
        attack: fgsm, or pgd for smaller radii at about ten times the cost.
    """
    processor = AutoImageProcessor.from_pretrained(model)
    network = AutoModelForImageClassification.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # The processor resizes and crops. Normalising is left to the model, so that its input is pixels
    # from 0 to 1, and a radius is in their units.
    classifier = models.Normalized(network, processor.image_mean, processor.image_std).to(device)

    data = ImageFolder(str(images))
    labels = network.config.label2id
    if unknown := set(data.classes) - set(labels):
        raise SystemExit(f"no label of {model}: {', '.join(sorted(unknown))}")

    def collate(samples: list) -> dict[str, torch.Tensor]:
        pictures, classes = zip(*samples, strict=True)
        batch = processor(list(pictures), do_normalize=False, return_tensors="pt")
        batch["labels"] = torch.tensor([labels[data.classes[each]] for each in classes])
        return batch

    # Loaders may yield mappings with "pixel_values" and "labels", as here.
    loader = DataLoader(data, batch_size, collate_fn=collate)
    radii = rat_ext.robust_radii(classifier, loader, attack=attack)

    correct = radii.prediction == radii.target
    steps = [0, 0.25, 0.5, 1, 2, 4]
    accuracy = rat_ext.robust_accuracy(radii.radius, correct, [step / 255 for step in steps])
    print(f"Accuracy where {attack} may change each pixel by so many grey levels of 255:")
    for step, share in zip(steps, accuracy.tolist(), strict=True):
        print(f"  {step:4}  {100 * share:.1f} %")

    # The model's other outputs do not matter: what is needed is .logits.
    x = next(iter(loader))["pixel_values"].to(device)
    result = rat_ext.robust_radius(classifier, x, attack=attack, full=True)
    names = network.config.id2label
    print("The first images: prediction, radius in grey levels, class on the other side")
    for row in result.to_pandas().head().itertuples():
        other = names[row.flipped_to] if row.found else "none found"
        print(f"  {names[row.prediction]}  {255 * row.radius:.3f}  {other}")


if __name__ == "__main__":
    tyro.cli(main)
