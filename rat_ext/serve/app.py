"""The HTTP service around a gate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from importlib import resources

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse
from torch import Tensor

from .. import __version__
from .batching import Batcher, ClosedError, QueueFullError
from .body import CLOSE, file_in, read_body
from .decoding import Decoder, InputError
from .gate import Answer, Gate, NotFiniteError
from .monitoring import Measured, Metrics
from .schema import ERRORS, REQUEST_BODY, Info, Prediction, Problem
from .settings import Settings

logger = logging.getLogger(__name__)

INLINE = 2**14
"""Bytes up to which an input is decoded where it came in, and not in another thread: for small
ones the change of threads takes longer. An image to be resized may be large however few they are.
"""

DECODED_TOGETHER = 2
"""Larger inputs that are decoded at the same time, since each takes several times its size."""

_RETRY = {"Retry-After": "1"}
# The page is one file: its script and style are its own, and it talks to this server alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


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
    metrics = Metrics(settings)

    def run(inputs: list[Tensor]) -> list[Answer | NotFiniteError]:
        metrics.batch_size.observe(len(inputs))
        return gate(inputs)

    batcher: Batcher[Tensor, Answer] = Batcher(
        run,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait_ms / 1000,
        queue=settings.queue,
    )
    turns = asyncio.Semaphore(DECODED_TOGETHER)

    def decoded(kind: str, body: bytes) -> Tensor | InputError:
        try:
            return decoder(file_in(kind, body))
        except InputError as error:
            # Without its traceback, whose frames hold the body: asyncio ties errors into cycles,
            # which are freed much later.
            return InputError(str(error), error.status)

    async def judged(kind: str, body: bytes) -> Answer:
        if len(body) <= INLINE and not decoder.resize:
            x = decoded(kind, body)
        else:
            async with turns:
                x = await run_in_threadpool(decoded, kind, body)
        del body  # the answer may take long
        if isinstance(x, InputError):
            raise x
        return await _answer(batcher.submit(x))

    metrics.waiting.set_function(lambda: batcher.waiting)
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    info = Info(
        version=__version__,
        model=name,
        input_size=list(decoder.shape),
        bounds=list(decoder.bounds),
        classes=None if classes is None else list(classes),
        resize=decoder.resize,
        detector=gate.detector is not None,
        max_body=settings.max_body,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()
        if not await run_in_threadpool(batcher.join, settings.timeout):
            logger.error("the model did not finish its last batch in %g s", settings.timeout)

    # The interactive documentation of FastAPI would load scripts from elsewhere.
    app = FastAPI(
        title="rat_ext",
        version=__version__,
        description="Predictions with their robust radius and a verdict.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.batcher = batcher
    app.add_middleware(Measured, metrics=metrics)

    @app.post(
        "/predict",
        response_model=Prediction,
        responses={
            status: {"description": text, "model": Problem} for status, text in ERRORS.items()
        },
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def predict(request: Request) -> Prediction:
        """The prediction for one image or tensor, with its radius and verdict."""
        with _refusals():
            batcher.check()  # before time is spent on a body
        kind = request.headers.get("content-type", "")
        work = judged(kind, await read_body(request, settings))
        with _refusals():
            try:
                answer = await asyncio.wait_for(work, settings.timeout)
            except asyncio.TimeoutError as error:
                message = f"there was no answer after {settings.timeout:g} s"
                raise HTTPException(504, message, _RETRY) from error
        verdict = {True: "accepted", False: "rejected", None: "ungated"}[answer.accepted]
        metrics.predictions.labels(verdict).inc()
        return Prediction.of(answer, classes)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/info")
    async def what() -> Info:
        """What is served."""
        return info

    @app.get(
        "/healthz",
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
        response_class=PlainTextResponse,
        responses={503: {"description": "no requests are taken"}},
    )
    async def readyz() -> Response:
        """200 while requests are taken; 503: send them elsewhere."""
        if batcher.alive and not batcher.closed:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("shutting down\n", 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def exposition() -> Response:
        """Prometheus metrics."""
        text = prometheus.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns the reasons for which work is not taken into answers."""
    try:
        yield
    except InputError as error:
        raise HTTPException(error.status, str(error)) from error
    except QueueFullError as error:
        raise HTTPException(503, f"too much work: {error}; try again", _RETRY) from error
    except ClosedError as error:
        raise HTTPException(503, "the server is shutting down", {**_RETRY, **CLOSE}) from error


async def _answer(future: Future[Answer]) -> Answer:
    try:
        return await asyncio.wrap_future(future)
    except NotFiniteError as error:
        raise HTTPException(500, str(error)) from error
    except Exception as error:
        logger.exception("the model failed on an input")
        raise HTTPException(500, "the model failed on this input; see the server's log") from error
