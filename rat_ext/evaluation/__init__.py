"""How well confidence scores find a classifier's wrong predictions, over random splits."""

from .evaluate import Evaluation, Result, evaluate
from .report import COLUMNS, costs, table, write
from .settings import Settings

__all__ = ["COLUMNS", "Evaluation", "Result", "Settings", "costs", "evaluate", "table", "write"]
