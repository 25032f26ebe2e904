"""The images whose predictions are least trusted, and the wrong ones that are trusted most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .. import reports
from ..datasets import Labelled
from .evaluate import Evaluation, trust

SHOWN = 18


def sections(evaluation: Evaluation, name: str, whose: str, data: Labelled | None) -> list[str]:
    """Both choices of images by a score, as HTML: pictures, or a table where there are none.

    Args:
        evaluation: of these images.
        name: of the score. Its confidences are those of the first split, in the images that this
            one tests on.
        whose: what these images are ("the first split").
        data: the images that were evaluated, which are read once more; None for a table. Samples
            that are not (C, H, W) with 1, 3 or 4 channels are listed in a table as well.
    """
    test = evaluation.tests[0]
    confidence = trust(evaluation.of(name).confidences[0])
    doubtful = test[confidence[test].argsort(stable=True)]
    wrong = doubtful[~evaluation.correct[doubtful]].flip(0)
    frame = (
        " In bold the predicted class; wrong predictions have a frame."
        if data is not None and _are_images(data)
        else ""
    )
    shown = [
        ("The most doubtful predictions", doubtful, f"those of lowest {name}.{frame}"),
        ("Confident and wrong", wrong, f"the wrong predictions of highest {name}."),
    ]
    return [
        part
        for title, index, what in shown
        if len(index)
        for part in (
            f"<h2>{title}</h2>",
            reports.note(f"Of {whose}, {what} The number is the index in the data evaluated."),
            _examples(evaluation, name, confidence, index[:SHOWN].tolist(), data),
        )
    ]


def _examples(
    evaluation: Evaluation,
    name: str,
    confidence: Tensor,
    index: Sequence[int],
    data: Labelled | None,
) -> str:
    classes = data.classes if data is not None else ()
    rows, pictures = [], []
    for i in index:
        predicted = _class(int(evaluation.prediction[i]), classes)
        true = _class(int(evaluation.target[i]), classes)
        value = f"{float(confidence[i]):.4g}"
        rows.append([f"{i}", predicted, true, value])
        if data is not None and _are_images(data):
            pictures.append(
                reports.Picture(
                    pixels=np.asarray(data[i][0], np.float32),
                    alt=f"Image {i}: predicted {predicted}, in truth {true}",
                    heading=predicted,
                    lines=[f"true: {true}", f"{name} {value}", f"no. {i}"],
                    wrong=not evaluation.correct[i],
                )
            )
    if pictures:
        return reports.gallery(pictures)
    return reports.Table(["number", "predicted", "true", name], rows).html()


def _are_images(data: Labelled) -> bool:
    shape = tuple(data[0][0].shape)
    return len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) > 1


def _class(index: int, classes: Sequence[str]) -> str:
    """The name of a class; -1 is the target of outliers."""
    if index < 0:
        return "an outlier"
    return str(classes[index]) if index < len(classes) else f"class {index}"
