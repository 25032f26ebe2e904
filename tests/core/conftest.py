"""The build of the core that the tests of its operations are for."""

from __future__ import annotations

from types import ModuleType

import pytest

from rat_ext import _core


@pytest.fixture(scope="session")
def core() -> ModuleType:
    """The one that the package runs; overridden where another build has to pass the same tests."""
    return _core.core
