"""Text: how far the embeddings of a sentence are from another class, and which word matters most.

    python examples/text.py --texts reviews.txt --model my-classifier

Words cannot be changed by a little, but their embeddings can: a radius is measured there. --model
is a folder that save_pretrained() has written, or a name on the Hugging Face hub; the file has a
text in each line. Needs transformers.
"""

from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rat_ext


class OnEmbeddings(nn.Module):
    """A text classifier as a function of the embeddings of its tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        return self.network(inputs_embeds=embeddings, attention_mask=attention_mask).logits


def main(texts: Path, model: str, batch_size: int = 16) -> None:
    """Print each text with its prediction, its radius, and the word that changes most.

    Args:
        texts: file with a text in each line.
        model: name on the Hugging Face hub, or a folder written by save_pretrained().
        batch_size: texts in a batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = OnEmbeddings(network).to(device).eval()
    labels = network.config.id2label

    lines = texts.read_text(encoding="utf-8").splitlines()
    print("radius  prediction  class on the other side  word that changes most  text")
    for start in range(0, len(lines), batch_size):
        batch = lines[start : start + batch_size]
        tokens = tokenizer(
            batch,
            padding=True,
            truncation=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            embeddings = network.get_input_embeddings()(tokens["input_ids"])

        # The mask says which tokens are padding. It has a row for each text, which has to follow
        # its text through the search: so it goes into model_kwargs, not into a function of x.
        result = rat_ext.robust_radius(
            classifier,
            embeddings,
            bounds=None,
            attack="fgsm_l2",
            full="points",
            model_kwargs={"attention_mask": tokens["attention_mask"]},
        )
        change = (result.x_adv - embeddings).norm(dim=2)
        most = change.masked_fill(tokens["special_tokens_mask"] == 1, -1).argmax(1)
        for row, text in enumerate(batch):
            prediction = labels[int(result.prediction[row])]
            other, word = "none found", ""
            if result.found[row]:
                other = labels[int(result.flipped_to[row])]
                word = tokenizer.decode(tokens["input_ids"][row, most[row]])
            print(f"{result.radius[row]:.4g}  {prediction}  {other}  {word}  {text}")


if __name__ == "__main__":
    tyro.cli(main)
