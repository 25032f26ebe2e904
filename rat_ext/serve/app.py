"""The HTTP service around a gate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import prometheus_client as prometheus
from fastapi import FastAPI, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from torch import Tensor

from .. import __version__
from . import api_docs
from .access_log import work
from .batching import Batcher
from .decoding import Decoder
from .gate import Answer, Gate, NotFiniteError
from .judging import Judge
from .monitoring import Measured, Metrics
from .routes import routes
from .schema import Info
from .settings import Settings

logger = logging.getLogger(__name__)


def create_app(
    gate: Gate,
    decoder: Decoder,
    settings: Settings | None = None,
    *,
    name: str = "model",
    classes: Sequence[str] | None = None,
) -> FastAPI:
    """The ASGI application.

    Its ``state.batcher`` runs from now on, until the application shuts down or `Batcher.close`.

    Args:
        gate: what judges the inputs.
        decoder: what makes them of requests.
        settings: limits.
        name: of the model, to show.
        classes: names of the classes, in the order of the logits.
    """
    settings = settings or Settings()
    metrics = Metrics(settings, decoder.bounds)

    def run(inputs: list[Tensor]) -> list[Answer | NotFiniteError]:
        metrics.batch_size.observe(len(inputs))
        return gate(inputs)

    batcher: Batcher[Tensor, Answer] = Batcher(
        run,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait_ms / 1000,
        queue=settings.queue,
    )

    async def submit(x: Tensor) -> Answer:
        pending = batcher.submit(x)
        try:
            return await asyncio.wrap_future(pending)
        finally:
            if pending.together and (done := work.get()):
                done.add(pending)

    metrics.waiting.set_function(lambda: batcher.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()
        if not await run_in_threadpool(batcher.join, settings.timeout):
            logger.error("the model did not finish its last batch in %g s", settings.timeout)

    app = new_app(lifespan)
    app.state.batcher = batcher
    app.add_middleware(Measured, metrics=metrics)
    app.include_router(
        routes(
            Judge(submit, decoder, settings),
            settings,
            Info.of(gate, decoder, settings, name, classes),
            check=batcher.check,
            observe=metrics.observe,
        )
    )

    @app.get(
        "/healthz",
        summary="Is the process of use?",
        response_class=PlainTextResponse,
        responses={503: {"description": "the process is of no more use"}},
    )
    async def healthz() -> Response:
        """200 while the process works; 503: restart it."""
        if batcher.alive or batcher.closed:
            return PlainTextResponse("ok\n")
        return PlainTextResponse("the model's thread has died\n", 503)

    @app.get(
        "/readyz",
        summary="Are requests taken?",
        response_class=PlainTextResponse,
        responses={503: {"description": "no requests are taken"}},
    )
    async def readyz() -> Response:
        """200 while requests are taken; 503: send them elsewhere."""
        if batcher.alive and not batcher.closed:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("shutting down\n", 503)

    @app.get("/metrics", summary="Numbers to watch", response_class=PlainTextResponse)
    async def exposition() -> Response:
        """Prometheus metrics."""
        text = prometheus.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


def new_app(lifespan: Callable[[FastAPI], Any] | None = None) -> FastAPI:
    """An application without paths, but those of its documentation."""
    app = FastAPI(
        title="rat_ext",
        version=__version__,
        description="Predictions with their robust radius and a verdict.",
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        servers=[{"url": "."}],  # beside the document, also where a proxy puts it below a prefix
        lifespan=lifespan,
    )
    api_docs.add_to(app)
    return app
