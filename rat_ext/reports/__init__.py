"""Drawing results: tables for a terminal and a page, plots, and pages without external resources.

Nothing here knows of models or scores; `rat_ext.evaluation` and `rat_ext.demo` bring the numbers.
"""

from .page import (
    Picture,
    check_installed,
    definitions,
    figures,
    gallery,
    histogram_section,
    lead,
    note,
    now,
    page,
    reliability_section,
    risk_section,
    write_report,
)
from .plots import (
    PALETTE,
    RIGHT,
    WRONG,
    Judged,
    bin_edges,
    draw,
    histogram,
    radius_histograms,
    reliability_diagram,
    risk_coverage,
)
from .table import Cell, Column, Table, over_runs, over_runs_caption, rows_over_runs, with_best

__all__ = [
    "PALETTE",
    "RIGHT",
    "WRONG",
    "Cell",
    "Column",
    "Judged",
    "Picture",
    "Table",
    "bin_edges",
    "check_installed",
    "definitions",
    "draw",
    "figures",
    "gallery",
    "histogram",
    "histogram_section",
    "lead",
    "note",
    "now",
    "over_runs",
    "over_runs_caption",
    "page",
    "radius_histograms",
    "reliability_diagram",
    "reliability_section",
    "risk_coverage",
    "risk_section",
    "rows_over_runs",
    "with_best",
    "write_report",
]
