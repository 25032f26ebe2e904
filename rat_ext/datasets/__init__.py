"""Labelled images with pixels in [0, 1].

`images` says what a data set is here, `preprocessing` how an image becomes the pixels that a model
takes; `sources` has one function for each data set that is known, registered with `by_name`, where
`load` finds it.
"""

from .by_name import forms, load
from .images import (
    Images,
    Labelled,
    batches,
    first,
    preprocessing_of,
    shuffled,
    subset,
    with_outliers,
)
from .preprocessing import Preprocessing
from .sources import Splits, array_archive, digits, jpeg_archive

NAMES = forms()
"""The forms of the names that `load` knows."""

__all__ = [
    "NAMES",
    "Images",
    "Labelled",
    "Preprocessing",
    "Splits",
    "array_archive",
    "batches",
    "digits",
    "first",
    "jpeg_archive",
    "load",
    "preprocessing_of",
    "shuffled",
    "subset",
    "with_outliers",
]
