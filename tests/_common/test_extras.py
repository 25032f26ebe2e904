"""Errors for want of a library name it."""

from __future__ import annotations

import importlib.metadata

import pytest

from rat_ext._common.extras import install

REQUIRES = [
    "torch>=2.4",
    'safetensors; extra == "detector"',
    'rat-ext[detector]; extra == "serve"',
    'uvicorn>=0.29; python_version >= "3.8" and extra == "serve"',
    "fastapi; extra == 'serve'",
    'fastapi-other; extra == "server"',
]


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        ((), "safetensors uvicorn fastapi"),
        (("safetensors", "fastapi"), "uvicorn"),
        (("safetensors", "uvicorn", "fastapi"), "safetensors uvicorn fastapi"),  # one is broken
    ],
)
def test_what_is_missing_is_named(
    installed: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> None:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda package: REQUIRES)
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    expected = f"pip install {named} (or pip install '.[serve]' in a clone of rat_ext)"
    assert install("serve") == expected


def test_sources_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert install("onnx") == "pip install '.[onnx]' in a clone of rat_ext"
