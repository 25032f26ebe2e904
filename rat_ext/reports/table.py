"""Tables of means and spreads, for a terminal and for a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np


class Cell(NamedTuple):
    """A number in a table, with its spread (nan for none)."""

    mean: float
    std: float = math.nan
    digits: int = 2
    best: bool = False

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "undefined"
        mean = f"{self.mean:.{self.digits}f}"
        return mean if math.isnan(self.std) else f"{mean} ± {self.std:.{self.digits}f}"


def over_runs(values: Sequence[float]) -> Cell:
    """Mean and standard deviation over the runs where the value is defined (not nan)."""
    defined = np.array([value for value in values if not math.isnan(value)])
    if not len(defined):
        return Cell(math.nan)
    return Cell(float(defined.mean()), float(defined.std(ddof=1)) if len(defined) > 1 else math.nan)


def with_best(cells: Sequence[Cell], larger_is_better: bool) -> list[Cell]:
    """The cells of a column, the best one (and those equal to it) marked."""
    defined = [cell.mean for cell in cells if not math.isnan(cell.mean)]
    best = (max if larger_is_better else min)(defined, default=math.nan)
    return [cell._replace(best=cell.mean == best) for cell in cells]


class Column(NamedTuple):
    """How a metric is shown."""

    title: str
    scale: float
    """In print."""
    larger_is_better: bool


class Table(NamedTuple):
    """Rows of text and numbers. Successive rows with the same first cell are a group."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""

    def text(self) -> str:
        """For a terminal. A star marks the best cell of a column."""
        lines = [[name + " " for name in self.columns]]
        for row in self.rows:
            lines.append([f"{c}{'*' if isinstance(c, Cell) and c.best else ' '}" for c in row])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = [isinstance(cell, str) for cell in self.rows[0]]
        text = [
            " ".join(
                cell.ljust(width) if at_left else cell.rjust(width)
                for cell, width, at_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])

    def html(self) -> str:
        """For a page. The best cell of a column is bold."""
        head = "".join(
            f'<th scope="col"{css_class(text=isinstance(cell, str))}>{escape(name)}</th>'
            for name, cell in zip(self.columns, self.rows[0], strict=True)
        )
        body, group = [], self.rows[0][0]
        for row in self.rows:
            cells = "".join(map(_html_cell, row))
            body.append(f"<tr{css_class(group=row[0] != group)}>{cells}</tr>")
            group = row[0]
        return (
            f'<div class="scroll"><table><caption>{escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(body)}</tbody></table></div>"
        )


def rows_over_runs(
    runs: Mapping[tuple[str, ...], Sequence[Mapping[str, float]]], columns: Mapping[str, Column]
) -> list[list[str | Cell]]:
    """Rows of a `Table`: each the labels of a key, and the mean of its runs for each column.

    Args:
        runs: for each tuple of labels the metrics of its runs (splits, seeds).
        columns: for each metric shown, how. The best of a column is marked.
    """
    cells = [
        with_best(
            [over_runs([scale * run[metric] for run in some]) for some in runs.values()], larger
        )
        for metric, (_, scale, larger) in columns.items()
    ]
    return [[*labels, *row] for labels, *row in zip(runs, *cells, strict=True)]


def over_runs_caption(runs: int, kind: str, images: int) -> str:
    """What `rows_over_runs` shows, of runs of a kind ("split") on so many test images."""
    return (
        f"Mean{' ± standard deviation' if runs > 1 else ''} over {runs} {kind}"
        f"{'s' if runs > 1 else ''}, {images:,} test images each."
    )


def _html_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f'<td class="text">{escape(cell)}</td>'
    mean, _, std = str(cell).partition(" ± ")
    spread = f' <span class="spread">± {std}</span>' if std else ""
    return f"<td{css_class(best=cell.best)}>{mean}{spread}</td>"


def css_class(**present: bool) -> str:
    """The class attribute of an HTML tag: the names that are present; nothing without any."""
    names = [name for name, is_present in present.items() if is_present]
    return f' class="{" ".join(names)}"' if names else ""
