"""Tables, plots and pages."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

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


class Structure(HTMLParser):
    """Fails on tags that are not closed in order, and collects what a page refers to."""

    VOID = frozenset({"meta", "img", "br", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.references = [], [], []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(networks: list[demo.Network]) -> None:
    experiment = demo.Experiment(seeds=(5,), train_size=100, epochs=1)
    page = demo._page(experiment, networks, 1.0)
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    outside = [r for r in structure.references if not r.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert {r[1:] for r in structure.references if r.startswith("#")} <= set(structure.ids)
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "prefers-color-scheme: dark" in page
    assert reports.plots.INK not in page


def test_most_doubtful_images_are_those_of_smallest_radius(networks: list[demo.Network]) -> None:
    network = demo.of(networks, "rat")[0]
    pictures = demo._most_doubtful(network)
    radii = [float(picture.lines[1].removeprefix("radius ")) for picture in pictures]
    assert radii == sorted(radii)
    smallest = np.sort(network.evaluation.of("rr-bs").confidences[0])[: len(radii)]
    assert radii == pytest.approx(smallest, abs=6e-5)
    for picture in pictures:
        same = picture.heading.removeprefix("predicted ") == picture.lines[0].removeprefix("true ")
        assert picture.wrong != same


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


def test_infinite_radii_are_left_out_of_the_histogram() -> None:
    radius = np.append(np.linspace(0.001, 0.3, 1000), [0.1, 0.2, np.inf, 5.0])
    correct = np.append(np.zeros(1000, bool), [True, True, True, False])
    near = np.array([0.01]), np.array([True])
    panels = reports.radius_histograms({"all": (radius, correct), "near": near})
    axes, other = reports.draw(panels, (4, 3)).axes
    heights = [patch.get_height() for patch in axes.patches]
    assert sum(heights[:30]) == pytest.approx(100)  # the two right ones that are finite
    assert sum(heights[30:]) == pytest.approx(100)
    assert heights[59] > heights[58]  # with the one beyond the end
    assert axes.get_xlim() == other.get_xlim() == (0, pytest.approx(0.299, abs=0.002))
    assert axes.get_title(loc="left") == "all"


def test_risk_coverage_curves_are_averaged() -> None:
    runs = [
        metrics.risk_coverage_curve(np.arange(4.0), np.array(right))
        for right in ([1, 1, 1, 0], [1, 1, 1, 1])
    ]
    panel = [lambda axes: reports.risk_coverage(axes, {"some": runs})]
    line = reports.draw(panel, (4, 3)).axes[0].lines[0]
    assert line.get_label() == "some"
    assert line.get_ydata()[-1] == pytest.approx(12.5)  # of 25 % and 0 %
