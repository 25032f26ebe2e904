"""One line for each request: what was asked, how it ended, and where its time went."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .batching import Pending

logger = logging.getLogger(__name__)

Style = Literal["text", "json"]


@dataclass
class Work:
    """What the model did for one request, which may have several inputs."""

    inputs: int = 0
    queue: float = 0.0
    """Seconds that an input waited for its batch, at most."""
    model: float = 0.0
    """Seconds that a batch with an input took, at most."""
    batch: int = 0
    """Inputs in the largest of these batches."""

    def add(self, answered: Pending[Any]) -> None:
        """Count an input that was run."""
        self.inputs += 1
        self.queue = max(self.queue, answered.waited)
        self.model = max(self.model, answered.ran)
        self.batch = max(self.batch, answered.together)


work: ContextVar[Work | None] = ContextVar("work", default=None)
"""Of the request that is answered now; None where nobody asks for it."""


class AccessLog:
    """ASGI middleware that logs each request once it is answered.

    Args:
        app: the application.
        style: "text", ``name=value`` with a space between, or "json", an object.
    """

    def __init__(self, app: ASGIApp, style: Style) -> None:
        self.app, self.style = app, style

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, sizes = time.perf_counter(), 500, {"in": 0, "out": 0}

        async def counted_in() -> Message:
            message = await receive()
            sizes["in"] += len(message.get("body", b""))
            return message

        async def counted_out(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            sizes["out"] += len(message.get("body", b""))
            await send(message)

        done = Work()
        token = work.set(done)
        try:
            await self.app(scope, counted_in, counted_out)
        finally:
            work.reset(token)
            entry: dict[str, Any] = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "client": (scope.get("client") or ["-"])[0],
                "method": scope["method"],
                "path": quote(scope["path"]),  # with no line break, nor a space
                "status": status,
                "ms": _ms(time.perf_counter() - start),
                "bytes_in": sizes["in"],
                "bytes_out": sizes["out"],
            }
            if done.inputs:
                entry["inputs"] = done.inputs
                entry["queue_ms"], entry["model_ms"] = _ms(done.queue), _ms(done.model)
                entry["batch"] = done.batch
            logger.info("%s", json.dumps(entry) if self.style == "json" else _text(entry))


def log_to_stdout() -> None:
    """Print the lines, and nothing else of them, to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def _text(entry: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.items())
