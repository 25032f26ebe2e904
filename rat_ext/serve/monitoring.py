"""The service's Prometheus metrics."""

from __future__ import annotations

import math
import time

import prometheus_client as prometheus
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .gate import Answer
from .settings import Settings

_SIZES = [10 ** (k / 2) for k in range(4, -11, -1)]
"""Half decades, from 100 down to 1e-5."""
_CONFIDENCES = sorted(
    {0.0, *_SIZES, *(-size for size in _SIZES), *(1 - size for size in _SIZES if size < 0.5)}
)
"""Of any score: logits and radii on both sides of 0, and probabilities, which crowd below 1."""
_PREDICTING = ("/predict", "/predict-batch")


class Metrics:
    """The service's Prometheus metrics, in a registry of their own."""

    def __init__(self, settings: Settings, bounds: tuple[float, float]) -> None:
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
        low, high = bounds
        self.radius = prometheus.Histogram(
            "rat_ext_radius",
            "Robust radii that were found, in the units of the input.",
            buckets=[(high - low) * size for size in reversed(_SIZES) if size <= 1],
            registry=registry,
        )
        self.confidence = prometheus.Histogram(
            "rat_ext_confidence",
            "The detector's confidences.",
            buckets=_CONFIDENCES,
            registry=registry,
        )
        prometheus.ProcessCollector(registry=registry)

    def observe(self, answer: Answer) -> None:
        """Count an answer."""
        verdict = {True: "accepted", False: "rejected", None: "ungated"}[answer.accepted]
        self.predictions.labels(verdict).inc()
        if answer.radius is not None and math.isfinite(answer.radius):  # else the sum is no more
            self.radius.observe(answer.radius)
        if answer.confidence is not None:
            self.confidence.observe(answer.confidence)


class Measured:
    """ASGI middleware that counts and times the requests for a prediction."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(_PREDICTING):
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
