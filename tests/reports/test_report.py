"""Tables, plots and pages."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from html_page import structure_of
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image

from rat_ext import demo, metrics, reports
from rat_ext.reports import Cell, Column, Table


@pytest.fixture(scope="module")
def networks() -> list[demo.Network]:
    return demo.run(demo.Experiment(seeds=(5,), train_size=100, epochs=1), progress=False)


def test_table_as_text() -> None:
    table = Table(["name", "value"], [["a", Cell(1.234, 0.5)], ["bb", Cell(20, best=True)]])
    assert table.text().splitlines() == [
        "name        value",
        "------------------",
        "a     1.23 ± 0.50",
        "bb          20.00*",
    ]


def test_table_as_html() -> None:
    rows = [["a<b", Cell(1, 0.5)], ["a<b", Cell(2, best=True)], ["c", Cell(math.nan)]]
    html = Table(["name", "value"], rows, "the caption").html()
    assert '<td class="text">a&lt;b</td><td>1.00 <span class="spread">± 0.50</span></td>' in html
    assert '<td class="best">2.00</td>' in html
    assert '<tr class="group"><td class="text">c</td><td>undefined</td></tr>' in html
    assert html.count('class="group"') == 1
    assert "<caption>the caption</caption>" in html


def test_page_is_well_formed_and_self_contained(networks: list[demo.Network]) -> None:
    experiment = demo.Experiment(seeds=(5,), train_size=100, epochs=1)
    page = demo._page(experiment, networks, {"command": "rat-ext demo --out 'a <b'"})
    structure = structure_of(page)
    assert "prefers-color-scheme: dark" in page
    assert reports.plots.INK not in page
    assert structure.metas["viewport"] == "width=device-width, initial-scale=1"
    assert "rat-ext demo --out &#x27;a &lt;b&#x27;" in page
    assert all(structure.alts)
    assert structure.texts["h1"] == ["Catching wrong predictions by their robust radius"]
    assert structure.texts["h2"] == [
        "Scores", "How to read it", "Risk and coverage", "Right and wrong predictions",
        "Are the probabilities right?", "The most doubtful predictions", "Confident and wrong",
        "How this report was made",
    ]  # fmt: skip


def test_demo_compares_on_the_distinct_images(networks: list[demo.Network]) -> None:
    twice = [*networks, *networks]  # as if two seeds had tested on the same images
    assert demo.comparison(twice) == demo.comparison(networks)
    plain, rat = networks
    aurcs = [
        f"{1000 * each.metrics(score)['aurc']:.2f}"
        for each, score in ((rat, "rr-bs"), (plain, "msr"), (rat, "msr"))
    ]
    first, second = demo.comparison(networks)
    for sentence, base, aurc in (
        (first, "plain training with MSR", aurcs[1]),
        (second, "RAT with MSR", aurcs[2]),
    ):
        assert f" {base} " in sentence
        assert f"(AURC x1000 {aurcs[0]} against {aurc}; difference" in sentence


def test_verdict_counts_seeds() -> None:
    class Known(demo.Network):
        def metrics(self, score: str) -> dict[str, float]:
            return {"aurc": self.evaluation[score]}

    def network(loss: str, seed: int, msr: float, rr_bs: float) -> demo.Network:
        return Known(loss, seed, None, {"msr": msr, "rr-bs": rr_bs})

    plain = [network("ce", 0, 0.3, 0.4), network("ce", 1, 0.3, 0.2)]
    rat = [network("rat", 0, 0.2, 0.1), network("rat", 1, 0.2, 0.1)]
    assert demo.verdict([*plain, *rat]) == (
        "RAT with RR-BS has a lower AURC than plain training with MSR in 2 of 2 seeds. With the "
        "same network, RR-BS has a lower AURC than MSR in 1 of 2 seeds after plain training and in "
        "2 of 2 seeds after RAT."
    )


def test_undefined_values_are_left_out_of_the_mean() -> None:
    assert str(reports.over_runs([math.nan, math.nan])) == "undefined"
    assert str(reports.over_runs([math.nan, 2.0])) == "2.00"
    assert str(reports.over_runs([1.0, 3.0])) == "2.00 ± 1.41"


def test_rows_over_runs() -> None:
    columns = {"x": Column("X %", 100, True), "y": Column("Y", 1, False)}
    runs = {
        ("a", "b"): [{"x": 0.1, "y": 1.0}, {"x": 0.3, "y": math.nan}],
        ("a", "c"): [{"x": 0.2, "y": 0.5}, {"x": 0.1, "y": 0.5}],
    }
    assert [list(map(str, row)) for row in reports.rows_over_runs(runs, columns)] == [
        ["a", "b", "20.00 ± 14.14", "1.00"],
        ["a", "c", "15.00 ± 7.07", "0.50 ± 0.00"],
    ]
    (_, _, x, y), (_, _, other_x, other_y) = reports.rows_over_runs(runs, columns)
    assert (x.best, y.best, other_x.best, other_y.best) == (True, False, False, True)
    assert reports.over_runs_caption(1, "seed", 1000).startswith("Mean over 1 seed, 1,000 test")
    assert "± standard deviation over 2 seeds" in reports.over_runs_caption(2, "seed", 10)


def test_nan_is_null_in_results(tmp_path: Path) -> None:
    results = {"runs": [{"auroc": math.nan, "aurc": 0.5}], "seeds": (1, 2)}
    reports.write_report(tmp_path / "new", results, "<p>ä</p>")
    read = json.loads((tmp_path / "new/results.json").read_text())
    assert read == {"runs": [{"auroc": None, "aurc": 0.5}], "seeds": [1, 2]}
    assert (tmp_path / "new/index.html").read_text(encoding="utf-8") == "<p>ä</p>"


def test_best_cells() -> None:
    cells = [Cell(1), Cell(math.nan), Cell(3), Cell(3)]
    assert [cell.best for cell in reports.with_best(cells, True)] == [False, False, True, True]
    assert [cell.best for cell in reports.with_best(cells, False)] == [True, False, False, False]
    assert not reports.with_best([Cell(math.nan)], True)[0].best


def steps(axes: Axes) -> list[np.ndarray]:
    """The heights of the filled histograms on the axes."""
    return [patch.get_data().values for patch in axes.patches if patch.get_fill()]


def test_histograms_of_radii() -> None:
    rng = np.random.default_rng(0)
    right, wrong = 10 ** rng.normal(-1, 0.3, 3000), 10 ** rng.normal(-3, 0.3, 60)
    radius = np.concatenate([right, [np.inf, 0.0], wrong])
    correct = np.arange(len(radius)) < 3002
    near = np.array([0.01]), np.array([True])
    panels = reports.radius_histograms({"all": (radius, correct), "near": near})
    axes, other = (reports.draw([panel], (4, 3)).axes[0] for panel in panels)
    of_right, of_wrong = steps(axes)
    assert of_right.sum() == of_wrong.sum() == pytest.approx(100)  # each of its own kind
    assert (of_wrong > 0).sum() >= 5  # the wrong ones are not all in one bin
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == other.get_xlim()
    assert axes.get_title(loc="left") == "all"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["right (3,002)", "wrong (60)"]
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert {"0.001", "0.01", "0.1"} <= set(ticks)
    page = reports.histogram_section({"all": (radius, correct)}, "some")
    assert "no change of the prediction was found: 1." in page


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=50), st.booleans()
)
def test_bins_of_any_values(values: list[float], log: bool) -> None:
    edges = reports.bin_edges(np.array(values, float), log=log)
    assert 10 <= len(edges) - 1 <= 40
    assert np.isfinite(edges).all()
    assert (np.diff(edges) > 0).all()
    assert not log or (edges > 0).all()


def test_bins_are_narrower_for_more_values() -> None:
    rng = np.random.default_rng(0)
    few, many = (reports.bin_edges(rng.normal(size=size), log=False) for size in (100, 2000))
    assert np.diff(many)[0] < 0.7 * np.diff(few)[0]
    outlier = np.append(rng.normal(size=2000), 1e9)
    assert reports.bin_edges(outlier, log=False)[-1] < 10


def test_reliability_diagram() -> None:
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.3])
    found = metrics.reliability(confidence, [1, 1, 1, 0, 0])
    panel = [lambda axes: reports.reliability_diagram(axes, {"some": found})]
    axes = reports.draw(panel, (4, 3)).axes[0]
    diagonal, line = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert np.stack(line.get_data(), 1) == pytest.approx(np.array([[30, 0], [90, 75]]))
    assert line.get_label() == "some: ECE 18.0 %"  # 0.8 * 0.15 + 0.2 * 0.3
    small, large = axes.collections[0].get_sizes()
    assert small < large


def test_gallery_escapes_and_describes() -> None:
    pixels = np.zeros((3, 300, 200), np.float32)
    noise = np.random.default_rng(0).random((4, 300, 200), np.float32)
    odd = '"><script>'
    pictures = [reports.Picture(p, odd, odd, [odd], True) for p in (pixels[:1, :8, :8], noise)]
    page = reports.gallery(pictures)
    assert "<script" not in page
    structure = structure_of(page)
    assert structure.alts == [odd, odd]
    assert structure.texts["b"] == structure.texts["div"] == [odd, odd]
    assert page.count('class="pixelated"') == 1
    images = [
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        for url in structure.references
    ]
    assert [image.size for image in images] == [(8, 8), (64, 96)]
    assert all(len(url) < 15_000 for url in structure.references)


def test_names_are_shown_as_they_are() -> None:
    right = np.array([True, False])
    name = "a$b$ <i>"
    page = reports.risk_section({name: [metrics.risk_coverage_curve([1.0, 2.0], right)]}, "runs")
    assert "a$b$ &lt;i&gt;</text>" in page
    assert "<i>" not in page


def test_risk_coverage_curves_are_averaged() -> None:
    runs = [
        metrics.risk_coverage_curve(np.arange(4.0), np.array(right))
        for right in ([1, 1, 1, 0], [1, 1, 1, 1])
    ]
    panel = [lambda axes: reports.risk_coverage(axes, {"some": runs})]
    line = reports.draw(panel, (4, 3)).axes[0].lines[0]
    assert line.get_label() == "some"
    assert line.get_ydata()[-1] == pytest.approx(12.5)  # of 25 % and 0 %
