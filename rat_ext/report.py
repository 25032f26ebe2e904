"""Plots, and reports as one HTML page without external resources."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG = "#3b82c4", "#dd6b20"  # told apart by colour-blind readers, on white and on black
PALETTE = (
    "#7b8794",
    RIGHT,
    WRONG,
    "#2f9e6e",
    "#9b5fc0",
    "#c2a000",
    "#c2417c",
    "#4aa3a3",
    "#8c564b",
)
_INK = "#010203"  # in an SVG it stands for the colour of the page's text

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --paper: #ffffff;
  --card: #f5f7f9; --line: #dbe1e7; --right: #3b82c4; --wrong: #dd6b20; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4; --paper: #14181d;
  --card: #1d232a; --line: #343d47; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
.text { text-align: left; }
tr.group > * { border-top: 2px solid var(--line); }
td.best { font-weight: 700; }
.spread { color: var(--soft); font-weight: 400; font-size: .88em; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); gap: .7rem;
  padding: 0; margin: 1rem 0; list-style: none; }
.images li { background: var(--card); border: 2px solid var(--line); border-radius: .4rem;
  padding: .45rem; font-size: .82rem; line-height: 1.35; text-align: center; }
.images li.wrong { border-color: var(--wrong); }
.images img { width: 100%; image-rendering: pixelated; display: block; border-radius: .2rem;
  margin-bottom: .35rem; }
.images b { display: block; overflow-wrap: anywhere; }
.wrong b { color: var(--wrong); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; max-width: 50rem; }
dt { font-weight: 600; } dd { margin: 0; }
code { font: .92em ui-monospace, monospace; }
"""


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
            f'<th scope="col"{_class(text=isinstance(cell, str))}>{escape(name)}</th>'
            for name, cell in zip(self.columns, self.rows[0], strict=True)
        )
        body, group = [], self.rows[0][0]
        for row in self.rows:
            cells = "".join(map(_html_cell, row))
            body.append(f"<tr{_class(group=row[0] != group)}>{cells}</tr>")
            group = row[0]
        return (
            f'<div class="scroll"><table><caption>{escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(body)}</tbody></table></div>"
        )


def _html_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f'<td class="text">{escape(cell)}</td>'
    mean, _, std = str(cell).partition(" ± ")
    spread = f' <span class="spread">± {std}</span>' if std else ""
    return f"<td{_class(best=cell.best)}>{mean}{spread}</td>"


def _class(**present: bool) -> str:
    names = [name for name, is_present in present.items() if is_present]
    return f' class="{" ".join(names)}"' if names else ""


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML page of these pieces of HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def definitions(terms: Mapping[str, str]) -> str:
    """A list of terms and what they mean, as HTML."""
    items = (f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<dl>{''.join(items)}</dl>"


class Picture(NamedTuple):
    """An image in a gallery: its (C, H, W) pixels in [0, 1] and the lines of text below."""

    pixels: NDArray[np.float32]
    heading: str
    lines: Sequence[str]
    wrong: bool


def gallery(pictures: Iterable[Picture]) -> str:
    """A grid of images as HTML; those of wrong predictions have a frame."""
    items = []
    for picture in pictures:
        below = "".join(f"<div>{escape(line)}</div>" for line in picture.lines)
        items.append(
            f'<li{_class(wrong=picture.wrong)}><img src="{_png_url(picture.pixels)}" alt="">'
            f"<b>{escape(picture.heading)}</b>{below}</li>"
        )
    return f'<ul class="images">{"".join(items)}</ul>'


def _png_url(pixels: NDArray[np.float32]) -> str:
    from PIL import Image

    values = np.rint(pixels * 255).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def draw(
    panels: Sequence[Callable[[Axes], None]], size: tuple[float, float], ink: str = _INK
) -> Figure:
    """A figure with the panels side by side, of this size in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {
        **dict.fromkeys(names, ink),
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with rc_context(style):
        figure = Figure(size, layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            panel(axes)
        figure.draw_without_rendering()  # ticks are made when they are first drawn
    return figure


def html_figure(figure: Figure, description: str, caption: str) -> str:
    """A figure of `draw` as inline SVG, whose text has the colour of the page's."""
    from matplotlib import rc_context

    file = io.StringIO()
    # The salt makes identifiers that are unique on the page and the same in each run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # not referred to, and in all figures the same
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def radius_histogram(
    axes: Axes, radius: NDArray[np.float64], correct: NDArray[np.bool_], title: str, end: float
) -> None:
    """Histograms of finite radii from 0 to `end`, each of the two kinds as shares of its own."""
    edges = np.linspace(0, end, 31)
    for kind, color, name in ((correct, RIGHT, "right"), (~correct, WRONG, "wrong")):
        values = radius[kind & np.isfinite(radius)].clip(0, end)
        weights = np.full(len(values), 100 / max(len(values), 1))
        axes.hist(
            values,
            edges,
            weights=weights,
            color=color,
            alpha=0.55,
            label=f"{name} ({kind.sum():,})",
        )
    axes.set(title=title, xlabel="robust radius (pixel units)", ylabel="share of the kind (%)")
    axes.set_xlim(0, end)
    axes.legend(title="predictions")


def risk_coverage(axes: Axes, curves: Mapping[str, Sequence[Any]]) -> None:
    """Risk-coverage curves: for each name the `metrics.RiskCoverage` of the runs to average."""
    top = 0.0
    for (name, runs), color in zip(curves.items(), PALETTE, strict=False):
        grid = np.linspace(0.01, 1, 200)
        risk = 100 * np.stack([np.interp(grid, run.coverage, run.risk) for run in runs])
        mean, spread = risk.mean(0), risk.std(0, ddof=1) if len(risk) > 1 else 0 * risk[0]
        axes.plot(100 * grid, mean, color=color, label=name, linewidth=1.8)
        axes.fill_between(100 * grid, mean - spread, mean + spread, color=color, alpha=0.13, lw=0)
        top = max(top, mean.max())
    axes.set_xlabel("coverage: share of predictions accepted (%)")
    axes.set_ylabel("risk: error rate among them (%)")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.15 * top or 1)
    axes.grid(alpha=0.2)
    axes.legend(loc="upper left")
