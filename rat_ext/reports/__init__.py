"""Drawing results: tables for a terminal and a page, plots, and pages without external resources.

Nothing here knows of models or scores; `rat_ext.evaluation` and `rat_ext.demo` bring the numbers.
"""

from .page import (
    Picture,
    definitions,
    gallery,
    page,
    radius_section,
    risk_section,
    write_report,
)
from .plots import PALETTE, RIGHT, WRONG, Radii, draw, radius_histograms, risk_coverage
from .table import Cell, Column, Table, over_runs, over_runs_caption, rows_over_runs, with_best

__all__ = [
    "PALETTE",
    "RIGHT",
    "WRONG",
    "Cell",
    "Column",
    "Picture",
    "Radii",
    "Table",
    "definitions",
    "draw",
    "gallery",
    "over_runs",
    "over_runs_caption",
    "page",
    "radius_histograms",
    "radius_section",
    "risk_coverage",
    "risk_section",
    "rows_over_runs",
    "with_best",
    "write_report",
]
