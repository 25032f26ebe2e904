"""Tables, plots, and reports as one HTML page without external resources."""

from .page import Picture, definitions, gallery, html_figure, page
from .plots import PALETTE, RIGHT, WRONG, draw, radius_histogram, risk_coverage
from .table import Cell, Table, over_runs, with_best

__all__ = [
    "PALETTE",
    "RIGHT",
    "WRONG",
    "Cell",
    "Picture",
    "Table",
    "definitions",
    "draw",
    "gallery",
    "html_figure",
    "over_runs",
    "page",
    "radius_histogram",
    "risk_coverage",
    "with_best",
]
