"""What the service says of itself: its OpenAPI document, and the page that shows it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers import mlp
from in_process import get, service
from pydantic import BaseModel

from rat_ext.serve import schema


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    with service(mlp()) as app:
        return get(app, "/openapi.json").json()


def described(component: dict[str, Any]) -> bool:
    return all(each.get("description") for each in component["properties"].values())


def test_everything_is_described_and_has_an_example(document: dict[str, Any]) -> None:
    components = document["components"]["schemas"]
    assert {"Prediction", "Predictions", "Result", "Problem", "Info"} == set(components)
    for name, component in components.items():
        assert component["description"]
        assert described(component), name
        kind = getattr(schema, name)
        assert issubclass(kind, BaseModel)
        for example in component["examples"]:
            assert (
                kind.model_validate(example, strict=True).model_dump(exclude_none=True) == example
            )
    assert not described({"properties": {"x": {"type": "number"}}})
    for path in ("/predict", "/predict-batch"):
        operation = document["paths"][path]["post"]
        assert operation["description"]
        assert operation["requestBody"]["description"]
        assert "example" in operation["requestBody"]["content"]["application/json"]
        assert set(operation["responses"]) == {"200", *map(str, schema.ERRORS)}
        for status in ("503", "504"):
            assert "Retry-After" in operation["responses"][status]["headers"]


def test_the_page_and_its_files_are_this_servers_own() -> None:
    pytest.importorskip("fastapi_offline")
    with service(mlp()) as app:
        page = get(app, "/docs")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        addresses = re.findall(r"""(?:src|href)=["']?([^"' >]+)|url: ["']([^"']+)""", page.text)
        files = {first or second for first, second in addresses} - {"data:,"}
        assert files == {
            "docs-files/swagger-ui-bundle.js", "docs-files/swagger-ui.css", "openapi.json"
        }  # fmt: skip
        for file in files:
            assert get(app, f"/{file}").status_code == 200


def test_without_its_files_there_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rat_ext.serve.api_docs._FILES", "not_installed")
    with service(mlp()) as app:
        assert get(app, "/docs").status_code == 404
        assert get(app, "/openapi.json").status_code == 200
