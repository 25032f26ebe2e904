"""The limits of a server."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a server takes in, and for how long it waits.

    Raises:
        ValueError: a setting is out of its range.
    """

    max_batch: int = 32
    """Most inputs that the model runs on together."""
    max_wait_ms: float = 5.0
    """How long the first input of a batch waits for others, in milliseconds."""
    queue: int = 256
    """Inputs that may wait for the model; more are refused with status 503."""
    timeout: float = 30.0
    """Seconds from the last byte of a request to its answer; then status 504."""
    body_timeout: float = 30.0
    """Seconds in which a client must have sent its request, then status 408; and in which it must
    have read its answer, else the connection is closed."""
    max_body: int = 10 * 2**20
    """Most bytes of a request; more are refused with status 413."""
    max_pixels: int = 2**24
    """Most pixels of an image, however small its file is, and of what it is resized to before its
    middle is taken; more are refused with status 413."""
    connections: int = 512
    """Most connections open at the same time; requests on more are refused with status 503."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "max_body", "max_pixels", "connections"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("timeout", "body_timeout"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if not 0 <= self.max_wait_ms < math.inf:
            raise ValueError(f"max_wait_ms is {self.max_wait_ms}; it must be finite, and not < 0")
        if self.queue < self.max_batch:
            raise ValueError(
                f"queue is {self.queue}, which never fills a batch of max_batch = {self.max_batch}"
            )
