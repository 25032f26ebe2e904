"""The HTTP service in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import torch
from helpers import RowExact
from service import PATIENCE
from torch import Tensor, nn

from rat_ext.serve import Settings
from rat_ext.serve.app import create_app
from rat_ext.serve.decoding import Decoder
from rat_ext.serve.gate import Gate


@contextlib.contextmanager
def service(
    model: nn.Module,
    shape: tuple[int, ...] = (12,),
    dtype: torch.dtype = torch.float64,
    detector: Callable | None = None,
    classes: list[str] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """The ASGI application."""
    app = create_app(
        Gate(model, detector),
        Decoder(shape, dtype),
        Settings(**{"max_wait_ms": 0.0, **options}),
        name="a model",
        classes=classes,
    )
    try:
        yield app
    finally:
        app.state.batcher.close()
        assert app.state.batcher.join(PATIENCE)


def client(app: Any) -> Any:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
        base_url="http://service",
        timeout=None,
    )


def post(app: Any, *bodies: Any, path: str = "/predict", **options: Any) -> list[Any]:
    """The answers to requests that are made together."""

    async def together() -> list[Any]:
        async with client(app) as http:
            posts = (http.post(path, content=body, **options) for body in bodies)
            return await asyncio.gather(*posts)

    return asyncio.run(together())


def get(app: Any, path: str) -> Any:
    async def one() -> Any:
        async with client(app) as http:
            return await http.get(path)

    return asyncio.run(one())


class HeldModel(RowExact):
    """A model that the test holds up."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.release = threading.Semaphore(0), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.entered.release()
        assert self.release.wait(PATIENCE)
        return super().forward(x)


async def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
