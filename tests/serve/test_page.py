"""The page in a browser."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import chromium
import numpy as np
import pytest
from files import GREY, image_file
from service import CLASSES, Program, npy


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    program = chromium.find()
    if program is None:
        pytest.skip(f"no {' or '.join(chromium.NAMES)} was found: install one to test the page")
    with chromium.chromium(program, tmp_path_factory.mktemp("profile")) as it:
        yield it


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    path.write_bytes(image_file(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4))
    return path


def text(page: chromium.Page, name: str) -> str | None:
    """What an element shows; None if it is hidden."""
    element = f"document.getElementById({json.dumps(name)})"
    return page.evaluate(f"{element}.checkVisibility() ? {element}.innerText : null")


def shown(page: chromium.Page, name: str) -> None:
    page.until(f"document.getElementById({json.dumps(name)}).checkVisibility()")


def answered(page: chromium.Page) -> None:
    page.until("/^\\S+: /.test(document.getElementById('status').textContent)")


def drop(page: chromium.Page, path: Path) -> None:
    """Drop a file on the page."""
    content = json.dumps(base64.b64encode(path.read_bytes()).decode())
    page.evaluate(
        f"""{{
          const bytes = Uint8Array.from(atob({content}), (c) => c.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          const file = new File([bytes], {json.dumps(path.name)}, {{ type: "image/png" }});
          dataTransfer.items.add(file);
          const options = {{ dataTransfer, bubbles: true, cancelable: true }};
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
        }}"""
    )


def test_shows_what_the_service_answers(
    page: chromium.Page,
    server: Program,
    digit: Path,
    tmp_path: Path,
) -> None:
    expected = server.post(digit.read_bytes()).json()
    page.open(f"http://127.0.0.1:{server.port}/")
    page.until("document.getElementById('about').textContent.includes('8 wide and 8 high, grey')")
    assert text(page, "result") is None
    page.choose_file("#file", digit)
    answered(page)
    assert text(page, "class") == expected["class_name"]
    assert text(page, "class") in CLASSES
    assert text(page, "status") == f"digit.png: {expected['class_name']}"
    radius, _, levels = text(page, "radius").partition(" (")
    assert float(radius) == pytest.approx(expected["radius"], rel=5e-3)
    assert float(levels.split()[0]) == pytest.approx(255 * expected["radius"], rel=5e-3)
    assert text(page, "verdict") == "No detector"
    assert page.evaluate("document.getElementById('preview').naturalWidth") == 8
    page.screenshot(tmp_path / "page.png")

    # What cannot be classified takes its place, and goes once something can.
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(image_file(GREY))
    drop(page, wrong)
    shown(page, "error")
    assert "the image is 6 wide and 5 high, the model takes 8 x 8" in text(page, "error")
    assert text(page, "result") is None
    drop(page, digit)
    shown(page, "result")
    assert text(page, "error") is None
    assert text(page, "class") == expected["class_name"]
    # Only the refusal is in the console: no script failed, and nothing was loaded from elsewhere.
    assert len(page.console) == 1
    assert "422" in page.console[0]


def test_shows_a_verdict(page: chromium.Page, server: Program, digit: Path) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    for answer, verdict, confidence, chance in [
        (
            {"accepted": True, "confidence": 0.25, "probability": 0.875},
            "Accepted",
            "0.25",
            "87.5 %",
        ),
        (
            {"accepted": True, "confidence": 0.99999, "probability": 0.9996},
            "Accepted",
            "0.99999",
            "99.96 %",
        ),
        (
            {"accepted": True, "confidence": 1 - 2**-53, "probability": 1.0},
            "Accepted",
            "0.9999999999999999",
            "100 %",
        ),
        (
            {"accepted": False, "confidence": -12.345, "probability": 1e-7},
            "Rejected",
            "-12.3",
            "0.00001 %",
        ),
        (
            {"accepted": False, "confidence": None, "probability": None},
            "Rejected",
            "the lowest",
            None,
        ),
    ]:
        whole = {"prediction": 1, "class_name": None, "radius": None, "found": False, **answer}
        page.evaluate(f"show(new File([], 'x.npy'), {json.dumps(whole)})")
        assert text(page, "verdict").endswith(f" {verdict}")
        assert text(page, "class") == "Class 1"
        assert text(page, "radius") == "no change of the prediction found"
        assert text(page, "confidence") == confidence
        assert text(page, "probability") == chance
        assert text(page, "status") == f"x.npy: Class 1, {verdict.lower()}"


def test_can_be_used_with_the_keyboard_and_in_the_dark(
    page: chromium.Page,
    server: Program,
) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    outline = "getComputedStyle(document.getElementById('drop')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    tree = page.command("Accessibility.getFullAXTree")["nodes"]
    names = {node["name"]["value"] for node in tree if "name" in node}
    assert "Choose an image, drop it here, or paste it" in names
    background = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.command("Emulation.setEmulatedMedia", features=features)
        colours.append(page.evaluate(background))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 29)"]


def test_only_its_own_server_may_be_asked(page: chromium.Page, server: Program) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    for elsewhere in ("http://127.0.0.1:9/", "https://elsewhere.invalid/"):
        code = f"fetch({json.dumps(elsewhere)}).then(() => 'let', () => 'blocked')"
        assert page.evaluate(code) == "blocked"
    assert any("Content Security Policy" in line for line in page.console)
    assert server.post(npy(np.zeros((1, 8, 8)))).status_code == 200


def click(selector: str) -> str:
    """Clicks on what is there, if it is."""
    element = f"document.querySelector({json.dumps(selector)})"
    return f"{element} !== null && ({element}.click(), true)"


def test_the_interactive_documentation_needs_no_other_server(
    page: chromium.Page, server: Program, digit: Path
) -> None:
    pytest.importorskip("fastapi_offline")
    seen = len(page.console)
    page.open(f"http://127.0.0.1:{server.port}/docs")
    page.until("document.body.innerText.includes('Predict several inputs')")
    for selector in ("#operations-default-predict_predict_post button", ".try-out__btn"):
        page.until(click(selector))
    page.until("document.querySelector('input[type=file]') !== null")
    page.choose_file("input[type=file]", digit)
    page.until(click(".execute"))
    page.until("document.querySelector('.live-responses-table .microlight') !== null")
    answer = page.evaluate("document.querySelector('.live-responses-table .microlight').innerText")
    assert json.loads(answer) == server.post(digit.read_bytes()).json()
    assert page.console[seen:] == []
