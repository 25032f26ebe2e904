"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def outside_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run elsewhere, so that a Python which a test starts imports the installed package."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small nets are slower on several threads, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data that are not in the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("RAT_EXT_SHARED", beside))
    if not (path / "models").is_dir():
        pytest.skip(f"{path} has no models: set RAT_EXT_SHARED to the folder of shared data")
    return path


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """A Ray of this machine alone, with two workers; skips where it is not installed."""
    from local_ray import local_ray  # which imports the package; tests of the core do without

    with local_ray():
        yield
