"""For all tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import gpu_helpers
import pytest

from rat_ext._common.user_model import full_float32


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with full_float32():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which modes ran: a mode that torch does not have is skipped, and the run still passes."""
    if gpu_helpers.ran:
        terminalreporter.write_line(gpu_helpers.modes_line())
