"""How well confidence scores find a classifier's wrong predictions, over random splits.

`evaluate` fits and tests the scores, and keeps on disk what it computes; `table`, `costs` and
`write` report.
"""

from .evaluate import Evaluation, Result, evaluate
from .report import COLUMNS, MEANINGS, costs, table, write
from .settings import Settings

__all__ = [
    "COLUMNS",
    "MEANINGS",
    "Evaluation",
    "Result",
    "Settings",
    "costs",
    "evaluate",
    "table",
    "write",
]
