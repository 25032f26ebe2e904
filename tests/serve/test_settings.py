"""The limits of a server."""

from __future__ import annotations

import re

import pytest

from rat_ext.serve import Settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_batch", 0, "max_batch is 0; it must be at least 1"),
        ("max_body", 0, "max_body is 0"),
        ("timeout", 0.0, "timeout is 0.0; it must be positive and finite"),
        ("body_timeout", float("nan"), "body_timeout is nan"),
        ("max_wait_ms", -1.0, "max_wait_ms is -1.0"),
        ("queue", 8, "queue is 8, which never fills a batch of max_batch = 32"),
    ],
)
def test_settings_are_checked(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**{name: value})
