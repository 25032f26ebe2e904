"""The plots of the reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..metrics import Reliability, RiskCoverage

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
Judged = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""(N,) confidences, and whether the (N,) predictions are right."""
INK = "#010203"  # in an SVG it stands for the colour of the page's text


def draw(
    panels: Sequence[Callable[[Axes], None]], size: tuple[float, float], ink: str = INK
) -> Figure:
    """A figure with the panels side by side, of this size in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(names, ink),
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "text.parse_math": False,  # a name may have a dollar sign
    }
    with rc_context(style):
        figure = Figure(size, layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            panel(axes)
        figure.draw_without_rendering()  # ticks are made when they are first drawn
    return figure


def bin_edges(values: NDArray[np.float64], *, log: bool) -> NDArray[np.float64]:
    """Edges of 10 to 40 bins, from the lowest to the highest but for 0.25 % of the values each.

    Their width is that of Freedman and Diaconis (1981), ``2 IQR / N^(1/3)``, within that range;
    of the logarithm of the values if ``log``. Infinite values, and with ``log`` those that are not
    positive, are left out.
    """
    known = values[np.isfinite(values) & ((values > 0) | (not log))]
    if log:
        known = np.log10(known)
    if not len(known):
        known = np.zeros(1)
    low, first, third, high = np.quantile(known, [0.0025, 0.25, 0.75, 0.9975])
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size:  # one value, or as good as one
        low, high = low - max(size, 1) / 2, high + max(size, 1) / 2
    width = 2 * (third - first) / len(known) ** (1 / 3)
    count = int(np.clip((high - low) / max(width, (high - low) / 40), 10, 40))
    edges = np.linspace(low, high, count + 1)
    return 10**edges if log else edges


def histogram(
    axes: Axes,
    judged: Judged,
    title: str,
    label: str,
    edges: NDArray[np.float64],
    *,
    log: bool = False,
) -> None:
    """The finite values of right and of wrong predictions, each as shares of its own kind.

    What is outside the edges is in the first and the last bin.
    """
    from matplotlib.ticker import LogLocator

    values, correct = judged
    for kind, color, name in ((correct, RIGHT, "right"), (~correct, WRONG, "wrong")):
        own = values[kind & np.isfinite(values)].clip(edges[0], edges[-1])
        share = 100 * np.histogram(own, edges)[0] / max(len(own), 1)
        text = f"{name} ({kind.sum():,})"
        axes.stairs(share, edges, fill=True, color=color, alpha=0.45)
        axes.stairs(share, edges, color=color, linewidth=1.4, label=text)
    axes.set(title=title, xlabel=label, ylabel="share of the kind (%)")
    if log:
        # Numbers, not powers of ten: within a decade, too.
        axes.set_xscale("log", subs=[])
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if edges[-1] < 30 * edges[0] else (1,))
        )
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0)
    axes.legend(title="predictions")


def confidence_histogram(name: str, judged: Judged) -> Callable[[Axes], None]:
    """A panel of `draw`: the histogram of any confidence."""
    edges = bin_edges(judged[0], log=False)
    return lambda axes: histogram(axes, judged, name, name, edges)


def radius_histograms(radii: Mapping[str, Judged]) -> list[Callable[[Axes], None]]:
    """Panels of `draw`: histograms of radii, in the same bins, on a logarithmic axis."""
    every = [radius for radius, _ in radii.values()]
    edges = bin_edges(np.concatenate(every or [np.empty(0)]), log=True)

    def panel(title: str) -> Callable[[Axes], None]:
        label = "robust radius (pixel units)"
        return lambda axes: histogram(axes, radii[title], title, label, edges, log=True)

    return [panel(title) for title in radii]


def reliability_diagram(axes: Axes, diagrams: Mapping[str, Reliability]) -> None:
    """How often predictions are right, by their probability; a larger dot is of more samples."""
    axes.plot([0, 100], [0, 100], color="#7b8794", linewidth=1, linestyle="--")
    colors = itertools.cycle(PALETTE[1:])
    for (name, found), color in zip(diagrams.items(), colors, strict=False):
        confidence, accuracy = 100 * found.confidence, 100 * found.accuracy
        label = f"{name}: ECE {100 * found.ece:.1f} %"
        axes.plot(confidence, accuracy, color=color, linewidth=1.4, label=label)
        area = 10 + 140 * found.samples / found.samples.sum()
        axes.scatter(
            confidence, accuracy, area, color=color, alpha=0.8, linewidths=0, clip_on=False
        )
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("accuracy (%)")
    lowest = min(float(np.min(found.confidence)) for found in diagrams.values())
    axes.set_xlim(min(100 * lowest, 90) - 2, 102)
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.2)
    _legend_below(axes, 1)


def risk_coverage(axes: Axes, curves: Mapping[str, Sequence[RiskCoverage]]) -> None:
    """Risk-coverage curves: for each name those of the runs to average."""
    top = 0.0
    for (name, runs), color in zip(curves.items(), itertools.cycle(PALETTE), strict=False):
        grid = np.linspace(0.01, 1, 200)
        risk = 100 * np.stack([np.interp(grid, run.coverage, run.risk) for run in runs])
        mean, spread = risk.mean(0), risk.std(0, ddof=1) if len(risk) > 1 else 0 * risk[0]
        axes.plot(100 * grid, mean, color=color, label=name, linewidth=1.8)
        axes.fill_between(100 * grid, mean - spread, mean + spread, color=color, alpha=0.13, lw=0)
        top = max(top, mean.max())
    axes.set_xlabel("coverage: share accepted (%)")
    axes.set_ylabel("risk: error rate among them (%)")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.15 * top or 1)
    axes.grid(alpha=0.2)
    _legend_below(axes, 2)


def _legend_below(axes: Axes, columns: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)
