"""The HTTP service around a gate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from importlib import resources
from typing import Any

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from .. import __version__
from . import Settings
from .batching import Batcher, ClosedError, QueueFullError
from .decoding import Decoder, InputError
from .gate import Answer, Gate, NotFiniteError

logger = logging.getLogger(__name__)

LINGER = 1.0
"""Seconds in which the rest of a refused body is read and dropped. A connection that is closed on
unread data is reset, and a client that is still sending may then never see the answer."""

INLINE = 2**14
"""Bytes up to which an input is decoded where it came in, and not in another thread: for small
ones the change of threads takes longer. An image to be resized may be large however few they are.
"""

_CLOSE = {"Connection": "close"}
_RETRY = {"Retry-After": "1"}
# The page is one file: its script and style are its own, and it talks to this server alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY = {
    "required": True,
    "content": {
        **{f"image/{kind}": _BINARY for kind in ("png", "jpeg", "webp")},
        "application/octet-stream": _BINARY,
        "application/json": {"schema": {"type": "array", "items": {}}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "string", "format": "binary"}},
                "required": ["file"],
            }
        },
    },
}
_ERRORS = {
    400: "an empty or malformed request",
    408: "the request came too slowly",
    413: "too many bytes or pixels",
    415: "no kind of file that is read here",
    422: "of the wrong shape, out of bounds, not finite, or a damaged file",
    500: "the model failed on this input",
    503: "too much work, or shutting down: try again after Retry-After seconds",
    504: "the answer took too long",
}


class Prediction(BaseModel):
    """What the service answers."""

    prediction: int = Field(description="index of the class")
    class_name: str | None = Field(description="its name, if known")
    radius: float | None = Field(
        description="robust radius in the units of the input; null where the prediction changes "
        "nowhere on the ray, or if radii are off"
    )
    found: bool | None = Field(
        description="a change of the prediction was found; null without radii"
    )
    confidence: float | None = Field(description="the detector's; null without one, or if infinite")
    probability: float | None = Field(description="that the prediction is right, if known")
    accepted: bool | None = Field(description="the detector's verdict; null without one")


class Info(BaseModel):
    """What is served."""

    version: str
    model: str
    input_size: list[int]
    bounds: tuple[float, float]
    classes: list[str] | None
    resize: bool
    detector: bool
    max_body: int


class Metrics:
    """The service's Prometheus metrics, in a registry of their own."""

    def __init__(self, settings: Settings) -> None:
        registry = prometheus.CollectorRegistry()
        self.registry = registry
        self.requests = prometheus.Counter(
            "rat_ext_requests", "Requests for a prediction.", ["status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "rat_ext_request_seconds",
            "Time from the headers of a request to those of its answer.",
            buckets=[1e-3 * 2**i for i in range(16)],
            registry=registry,
        )
        self.waiting = prometheus.Gauge(
            "rat_ext_queue_length", "Inputs that wait for the model.", registry=registry
        )
        sizes = [2**i for i in range(settings.max_batch.bit_length())]
        self.batch_size = prometheus.Histogram(
            "rat_ext_batch_size",
            "Inputs that the model ran on together.",
            buckets=sorted({*sizes, settings.max_batch}),
            registry=registry,
        )
        self.predictions = prometheus.Counter(
            "rat_ext_predictions",
            "Predictions, by the detector's verdict (ungated without a detector).",
            ["verdict"],
            registry=registry,
        )
        for verdict in ("accepted", "rejected", "ungated"):
            self.predictions.labels(verdict)  # shown as 0 before the first
        prometheus.ProcessCollector(registry=registry)


class _Measured:
    """ASGI middleware that counts and times the requests for a prediction."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/predict"):
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500  # where an exception leaves no answer

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            self.metrics.requests.labels(status).inc()
            self.metrics.seconds.observe(time.perf_counter() - start)


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
    metrics.waiting.set_function(lambda: batcher.waiting)
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    info = Info(
        version=__version__,
        model=name,
        input_size=list(decoder.shape),
        bounds=decoder.bounds,
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
    app.add_middleware(_Measured, metrics=metrics)

    @app.post(
        "/predict",
        response_model=Prediction,
        responses={status: {"description": text} for status, text in _ERRORS.items()},
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def predict(request: Request) -> Prediction:
        """The prediction for one image or tensor, with its radius and verdict."""
        with _refusals():
            batcher.check()  # before time is spent on a body
        body = await _read(request, settings)
        with _refusals():
            file = await _file_in(request, body)
            quick = len(file) <= INLINE and not decoder.resize
            x = decoder(file) if quick else await run_in_threadpool(decoder, file)
            future = batcher.submit(x)
        answer = await _answer(future, settings.timeout)
        verdict = {True: "accepted", False: "rejected", None: "ungated"}[answer.accepted]
        metrics.predictions.labels(verdict).inc()
        return _prediction(answer, classes)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/info")
    async def what() -> Info:
        """What is served."""
        return info

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> Response:
        """200 while the process works; 503: restart it."""
        if batcher.alive or batcher.closed:
            return PlainTextResponse("ok\n")
        return PlainTextResponse("the model's thread has died\n", 503)

    @app.get("/readyz", response_class=PlainTextResponse)
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
def _refusals() -> Any:
    """Turns the reasons for which work is not taken into answers."""
    try:
        yield
    except InputError as error:
        raise HTTPException(error.status, str(error)) from error
    except QueueFullError as error:
        raise HTTPException(503, f"too much work: {error}; try again", _RETRY) from error
    except ClosedError as error:
        raise HTTPException(503, "the server is shutting down", {**_RETRY, **_CLOSE}) from error


async def _read(request: Request, settings: Settings) -> bytes:
    """The body, of which no more is ever held than is allowed."""
    limit, stream = settings.max_body, request.stream()
    body = bytearray()

    async def fill() -> None:
        async for chunk in stream:
            body.extend(chunk)
            if len(body) > limit:
                return

    too_large = int(request.headers.get("content-length", 0)) > limit
    try:
        if not too_large:
            await asyncio.wait_for(fill(), settings.body_timeout)
    except asyncio.TimeoutError as error:
        message = f"the request was not complete after {settings.body_timeout:g} s"
        raise HTTPException(408, message, _CLOSE) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the client went away", _CLOSE) from error
    if too_large or len(body) > limit:
        body.clear()
        if "expect" not in request.headers:  # else it waits for leave to send
            await _drop(stream)
        raise HTTPException(413, f"the request has more than {limit} bytes", _CLOSE)
    return bytes(body)


async def _drop(stream: AsyncIterator[bytes]) -> None:
    async def drop() -> None:
        async for _ in stream:
            pass

    with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect):
        await asyncio.wait_for(drop(), LINGER)


async def _file_in(request: Request, body: bytes) -> bytes:
    """The uploaded file of a form, or the body itself."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return body

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, receive).form(max_files=1, max_fields=16) as form:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        if not files:
            raise InputError("the form has no file: send one in the field file", 400)
        return await files[0].read()


async def _answer(future: Future[Answer], seconds: float) -> Answer:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
    except asyncio.TimeoutError as error:
        raise HTTPException(504, f"there was no answer after {seconds:g} s", _RETRY) from error
    except NotFiniteError as error:
        raise HTTPException(500, str(error)) from error
    except Exception as error:
        logger.exception("the model failed on an input")
        raise HTTPException(500, "the model failed on this input; see the server's log") from error


def _prediction(answer: Answer, classes: Sequence[str] | None) -> Prediction:
    known = classes is not None and answer.prediction < len(classes)
    return Prediction(
        prediction=answer.prediction,
        class_name=classes[answer.prediction] if known else None,
        radius=_finite(answer.radius),
        found=None if answer.radius is None else math.isfinite(answer.radius),
        confidence=_finite(answer.confidence),
        probability=_finite(answer.probability),
        accepted=answer.accepted,
    )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
