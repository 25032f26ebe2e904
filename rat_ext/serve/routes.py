"""The paths that answer with predictions, and say what predicts them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse

from .body import read_body
from .gate import Answer
from .judging import Judge, refusals
from .schema import (
    BATCH_BODY,
    ERRORS,
    REQUEST_BODY,
    Info,
    Prediction,
    Predictions,
    Problem,
    Result,
)
from .settings import Settings

# The page is one file: its script and style are its own, and it talks to this server alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "model": Problem,
        **({"headers": _RETRY} if status in (503, 504) else {}),
    }
    for status, text in ERRORS.items()
}


def routes(
    judge: Judge,
    settings: Settings,
    info: Info,
    *,
    check: Callable[[], None],
    observe: Callable[[Answer], None],
) -> APIRouter:
    """The page, /predict, /predict-batch and /info.

    Args:
        judge: what answers.
        settings: limits.
        info: what is served.
        check: raises QueueFullError or ClosedError where nothing is taken now.
        observe: is shown each answer.
    """
    router = APIRouter()
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    async def received(request: Request) -> tuple[str, bytes]:
        with refusals():
            check()  # before time is spent on a body
        kind = request.headers.get("content-type", "")
        return kind, await read_body(request, settings)

    def prediction(answer: Answer) -> Prediction:
        observe(answer)
        return Prediction.of(answer, info.classes)

    @router.post(
        "/predict",
        summary="Predict one input",
        response_model=Prediction,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def predict(request: Request) -> Prediction:
        """The prediction for one image or tensor, with its radius and verdict."""
        return prediction(await judge.one(*await received(request)))

    @router.post(
        "/predict-batch",
        summary="Predict several inputs",
        response_model=Predictions,
        responses=_PROBLEMS,
        openapi_extra={"requestBody": BATCH_BODY},
    )
    async def predict_batch(request: Request) -> Predictions:
        """As /predict, for several inputs: one that has no answer leaves the others theirs."""
        return Predictions(
            results=[
                Result(status=answer.status_code, detail=answer.detail)
                if isinstance(answer, HTTPException)
                else Result(status=200, prediction=prediction(answer))
                for answer in await judge.each(*await received(request))
            ]
        )

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @router.get("/info", summary="What is served")
    async def what() -> Info:
        """What is served."""
        return info

    return router
