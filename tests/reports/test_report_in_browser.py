"""The pages of the reports in a browser, on a phone and on a desk."""

from __future__ import annotations

from collections.abc import Iterator

import chromium
import numpy as np
import pytest

from rat_ext import metrics, reports

NAME = "torchvision:a_score_with_a_name_that_does_not_break"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    program = chromium.find()
    if program is None:
        pytest.skip(f"no {' or '.join(chromium.NAMES)} was found: install one to test the page")
    with chromium.chromium(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with all that a report can have."""
    rng = np.random.default_rng(0)
    correct = rng.random(300) < 0.9
    radius = 10 ** (rng.normal(-2, 0.3, 300) + correct)
    curve = metrics.risk_coverage_curve(radius, correct)
    cells = [reports.Cell(12.345, 6.789)] * 7
    picture = reports.Picture(rng.random((3, 32, 32), np.float32), "alt", NAME, [NAME], True)
    body = [
        reports.lead(f"{NAME} is best."),
        reports.Table(["score", *map(str, range(7))], [[NAME[:12], *cells]], 4 * NAME).html(),
        reports.definitions({"command": f"rat-ext evaluate --data folder:/{NAME}/{NAME}/{NAME}"}),
        reports.risk_section({f"{i}: {NAME[:20]}": [curve] for i in range(8)}, "splits"),
        reports.histogram_section({"rr-fast": (radius, correct), "rr-bs": (radius, correct)}, "x"),
        reports.reliability_section({"msr": metrics.reliability(radius.clip(0, 1), correct)}, "x"),
        reports.gallery([picture] * 18),
    ]
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(reports.page(f"Title {NAME}", body), encoding="utf-8")
    return path.as_uri()


def opened(browser: chromium.Page, url: str, width: int, scheme: str = "light") -> chromium.Page:
    browser.command(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=800,
        deviceScaleFactor=2,
        mobile=width < 600,
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.command("Emulation.setEmulatedMedia", features=[feature])
    browser.open("about:blank")
    browser.open(url)
    return browser


@pytest.mark.parametrize("width", [320, 390, 599, 601, 1200])
def test_nothing_is_wider_than_the_screen(browser: chromium.Page, url: str, width: int) -> None:
    page = opened(browser, url, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('.figures')).gridTemplateColumns.split(' ').length"
    )
    assert columns == (1 if width < 600 else 2)
    table = "document.querySelector('.scroll')"
    scrolls = page.evaluate(f"{table}.scrollWidth > {table}.clientWidth")
    assert scrolls or width > 1000
    caption = "document.querySelector('caption').getBoundingClientRect()"
    assert page.evaluate(f"{caption}.right") <= width  # its lines break there
    page.evaluate(f"{table}.scrollLeft = 200")
    first = "document.querySelector('td').getBoundingClientRect()"
    assert page.evaluate(f"{first}.left") >= 0  # the name of the row stays
    assert page.console == []


@pytest.mark.parametrize("width", [360, 1200])
def test_the_text_of_figures_can_be_read(browser: chromium.Page, url: str, width: int) -> None:
    page = opened(browser, url, width)
    least, largest, outside = page.evaluate(
        """(() => {
          const sizes = [];
          let outside = 0;
          for (const svg of document.querySelectorAll("figure svg")) {
            const box = svg.getBoundingClientRect();
            const scale = box.width / svg.viewBox.baseVal.width;
            for (const text of svg.querySelectorAll("text")) {
              sizes.push(scale * parseFloat(getComputedStyle(text).fontSize));
              const own = text.getBoundingClientRect();
              outside += own.left < box.left - 8 || own.right > box.right + 8;
            }
          }
          return [Math.min(...sizes), Math.max(...sizes), outside];
        })()"""
    )
    assert 9 < least <= largest < 20
    assert outside == 0


def test_dark_and_light(browser: chromium.Page, url: str) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = opened(browser, url, 390, scheme)
        ink = "getComputedStyle(document.querySelector('figure text')).fill"
        paper = "getComputedStyle(document.body).backgroundColor"
        colours[scheme] = page.evaluate(f"[{ink}, {paper}]")
    assert colours["light"] != colours["dark"]
    assert colours["light"][1] == "rgb(255, 255, 255)"


def test_small_images_are_not_blurred(browser: chromium.Page, url: str) -> None:
    page = opened(browser, url, 390)
    image = "document.querySelector('img')"
    assert page.evaluate(f"getComputedStyle({image}).imageRendering") == "pixelated"
    assert page.evaluate(f"{image}.naturalWidth") == 32
