"""The plots of the reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..metrics import RiskCoverage

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
Radii = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""(N,) radii, and whether the (N,) predictions are right."""
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


def radius_histogram(
    axes: Axes, radius: NDArray[np.float64], correct: NDArray[np.bool_], title: str, end: float
) -> None:
    """Histograms of finite radii from 0 to `end`, each of the two kinds as shares of its own."""
    edges = np.linspace(0, end, 31).tolist()
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


def radius_histograms(radii: Mapping[str, Radii]) -> list[Callable[[Axes], None]]:
    """Panels of `draw`: histograms on the scale of all but the largest 0.5 % of the radii."""
    finite = np.concatenate([radius[np.isfinite(radius)] for radius, _ in radii.values()])
    end = float(np.quantile(finite, 0.995)) if len(finite) else 1.0

    def histogram(title: str) -> Callable[[Axes], None]:
        return lambda axes: radius_histogram(axes, *radii[title], title, end)

    return [histogram(title) for title in radii]


def risk_coverage(axes: Axes, curves: Mapping[str, Sequence[RiskCoverage]]) -> None:
    """Risk-coverage curves: for each name those of the runs to average."""
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
