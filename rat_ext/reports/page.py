"""Reports: one HTML page without external resources, and the numbers beside it as JSON."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._common.extras import install
from .plots import (
    INK,
    Judged,
    confidence_histogram,
    draw,
    radius_histograms,
    reliability_diagram,
    risk_coverage,
)
from .table import css_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..metrics import Reliability, RiskCoverage

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --paper: #ffffff;
  --card: #f5f7f9; --line: #dbe1e7; --right: #3b82c4; --wrong: #dd6b20; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4; --paper: #14181d;
  --card: #1d232a; --line: #343d47; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; white-space: normal;
  position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2rem)); }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
.text { text-align: left; }
tr.group > * { border-top: 2px solid var(--line); }
td.best { font-weight: 700; }
.spread { color: var(--soft); font-weight: 400; font-size: .88em; }
.figures { display: grid; grid-template-columns: repeat(2, 1fr); gap: 1.5rem 2rem; margin: 1rem 0; }
figure { margin: 0; max-width: 34rem; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); gap: .7rem;
  padding: 0; margin: 1rem 0; list-style: none; }
.images li { background: var(--card); border: 2px solid var(--line); border-radius: .4rem;
  padding: .45rem; font-size: .82rem; line-height: 1.35; text-align: center; }
.images li.wrong { border-color: var(--wrong); }
.images img { width: 100%; display: block; border-radius: .2rem; margin-bottom: .35rem; }
.images img.pixelated { image-rendering: pixelated; }
.images b { display: block; }
.wrong b { color: var(--wrong); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; max-width: 50rem; }
dt { font-weight: 600; } dd { margin: 0; }
code { font: .92em ui-monospace, monospace; }
@media (max-width: 600px) {
  body { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .figures, dl { grid-template-columns: minmax(0, 1fr); }
  dl { gap: 0; } dd { margin-bottom: .6rem; }
}
"""
THUMBNAIL = 96
"""The longest side of an image on the page, in pixels."""


def check_installed() -> None:
    """Raises ImportError if a library that draws is missing: before the work, not after it."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a report needs matplotlib and pillow: {install('demo')}") from error


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


def now() -> str:
    """The date and time, for a report."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def definitions(terms: Mapping[str, str]) -> str:
    """A list of terms and what they mean, as HTML."""
    items = (f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<dl>{''.join(items)}</dl>"


def lead(text: str) -> str:
    """What a report has found, in large letters, as HTML."""
    return f'<p class="lead">{escape(text)}</p>'


def note(text: str) -> str:
    """A remark, as HTML."""
    return f'<p class="soft">{escape(text)}</p>'


class Picture(NamedTuple):
    """An image in a gallery: its (1, 3 or 4, H, W) pixels in [0, 1] and the lines of text below."""

    pixels: NDArray[np.float32]
    alt: str
    heading: str
    lines: Sequence[str]
    wrong: bool


def gallery(pictures: Iterable[Picture]) -> str:
    """A grid of images as HTML; those of wrong predictions have a frame."""
    items = []
    for picture in pictures:
        below = "".join(f"<div>{escape(line)}</div>" for line in picture.lines)
        small = css_class(pixelated=max(picture.pixels.shape[1:]) < THUMBNAIL)
        items.append(
            f'<li{css_class(wrong=picture.wrong)}><img{small} src="{_png_url(picture.pixels)}" '
            f'alt="{escape(picture.alt)}"><b>{escape(picture.heading)}</b>{below}</li>'
        )
    return f'<ul class="images">{"".join(items)}</ul>'


def _png_url(pixels: NDArray[np.float32]) -> str:
    from PIL import Image

    values = np.rint(pixels * 255).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image = image.quantize()  # a photograph in 256 colours takes a third of the bytes
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figures(panels: Mapping[str, Callable[[Axes], None]], caption: str) -> str:
    """Panels of `draw`, by what they show, as inline SVGs beside each other and one caption.

    Each is so small that its text can be read on a phone; the text has the colour of the page's.
    """
    drawn = (f"<figure>{_svg(panel, what)}</figure>" for what, panel in panels.items())
    return f'<div class="figures">{"".join(drawn)}</div>{note(caption)}'


def _svg(panel: Callable[[Axes], None], description: str) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    # The salt makes identifiers that are unique on the page and the same in each run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure = draw([panel], (4.8, 3.9))
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # not referred to, and in all figures the same
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def risk_section(curves: Mapping[str, Sequence[RiskCoverage]], runs: str) -> str:
    """The risk-coverage curves of `risk_coverage`, averaged over the runs ("seeds"), as HTML."""
    several = any(len(some) > 1 for some in curves.values())
    return "<h2>Risk and coverage</h2>\n" + figures(
        {f"Risk-coverage curves of {', '.join(curves)}": lambda axes: risk_coverage(axes, curves)},
        "The error rate (risk) among the predictions that are accepted, most trusted first. "
        f"Mean{' and standard deviation' if several else ''} over the {runs}.",
    )


def histogram_section(
    radii: Mapping[str, Judged], whose: str, others: Mapping[str, Judged] | None = None
) -> str:
    """Histograms of radii and other confidences, of a choice of images ("all seeds"), as HTML."""
    others = others or {}
    panels = radius_histograms(radii)
    panels += [confidence_histogram(name, judged) for name, judged in others.items()]
    infinite = sum(int(np.isinf(radius).sum()) for radius, _ in radii.values())
    left_out = f" Left out, because no change of the prediction was found: {infinite:,}."
    return "<h2>Right and wrong predictions</h2>\n" + figures(
        {
            f"Histogram of {n}, of right and wrong predictions": p
            for n, p in zip([*radii, *others], panels, strict=True)
        },
        f"Of {whose}. The less the two kinds overlap, the better the score tells them apart. The "
        f"first and the last bin also have what is beyond them.{left_out if infinite else ''}",
    )


def reliability_section(diagrams: Mapping[str, Reliability], whose: str) -> str:
    """The reliability diagrams of `reliability_diagram`, of a choice of images, as HTML."""
    return "<h2>Are the probabilities right?</h2>\n" + figures(
        {
            f"Reliability diagram of {', '.join(diagrams)}": lambda axes: reliability_diagram(
                axes, diagrams
            )
        },
        f"Of {whose}: the share of right predictions among those of about the same confidence. On "
        "the dashed line the confidence is the probability of being right; below it the model is "
        "over-confident. A larger dot is of more images. ECE, the expected calibration error, is "
        "the mean distance from the line.",
    )
