"""rat-ext info"""

from __future__ import annotations

from dataclasses import dataclass

from .._build_info import format_build_info


@dataclass(frozen=True)
class Info:
    """What was built and what is usable here."""

    def run(self) -> None:
        print(format_build_info())
