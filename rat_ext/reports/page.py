"""Reports: one HTML page without external resources, and the numbers beside it as JSON."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .plots import INK, Radii, draw, radius_histograms, risk_coverage
from .table import css_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..metrics import RiskCoverage

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


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML page of these pieces of HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def write_report(out: Path, results: Mapping[str, Any], html: str) -> None:
    """Write results.json, in which null stands for nan, and index.html into the folder."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(results), indent=1, allow_nan=False)
    (out / "results.json").write_text(text + "\n")
    (out / "index.html").write_text(html, encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(held) for held in value]
    return None if isinstance(value, float) and math.isnan(value) else value


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
            f'<li{css_class(wrong=picture.wrong)}><img src="{_png_url(picture.pixels)}" alt="">'
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


def html_figure(figure: Figure, description: str, caption: str) -> str:
    """A figure of `draw` as inline SVG, whose text has the colour of the page's."""
    from matplotlib import rc_context

    file = io.StringIO()
    # The salt makes identifiers that are unique on the page and the same in each run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # not referred to, and in all figures the same
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def risk_section(curves: Mapping[str, Sequence[RiskCoverage]], runs: str) -> str:
    """The risk-coverage curves of `risk_coverage`, averaged over the runs ("seeds"), as HTML."""
    several = any(len(some) > 1 for some in curves.values())
    figure = draw([lambda axes: risk_coverage(axes, curves)], (9.2, 4.0))
    return "<h2>Risk and coverage</h2>\n" + html_figure(
        figure,
        f"Risk-coverage curves of {', '.join(curves)}",
        "The error rate (risk) among the predictions that are accepted, most trusted first. "
        f"Mean{' and standard deviation' if several else ''} over the {runs}.",
    )


def radius_section(radii: Mapping[str, Radii], whose: str) -> str:
    """The histograms of `radius_histograms`, of a choice of images ("all seeds"), as HTML."""
    infinite = sum(int(np.isinf(radius).sum()) for radius, _ in radii.values())
    return "<h2>Radii of right and wrong predictions</h2>\n" + html_figure(
        draw(radius_histograms(radii), (9.2, 3.5)),
        "Histograms of the robust radii of right and wrong predictions",
        f"Of {whose}. The less the two kinds overlap, the better the radius tells them apart. The "
        "largest 0.5 % of the radii are in the last bin. Left out, because no change of the "
        f"prediction was found: {infinite:,}.",
    )
