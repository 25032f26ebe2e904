"""Reads the body of a request, within its limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import Message

from .decoding import InputError
from .settings import Settings

LINGER = 1.0
"""Seconds in which the rest of a refused body is read and dropped. A connection that is closed on
unread data is reset, and a client that is still sending may then never see the answer."""

CLOSE = {"Connection": "close"}


async def read_body(request: Request, settings: Settings) -> bytes:
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
        raise HTTPException(408, message, CLOSE) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the client went away", CLOSE) from error
    if too_large or len(body) > limit:
        body.clear()
        if "expect" not in request.headers:  # else it waits for leave to send
            await _drop(stream)
        raise HTTPException(413, f"the request has more than {limit} bytes", CLOSE)
    return bytes(body)


async def _drop(stream: AsyncIterator[bytes]) -> None:
    async def drop() -> None:
        async for _ in stream:
            pass

    with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect):
        await asyncio.wait_for(drop(), LINGER)


async def file_in(request: Request, body: bytes) -> bytes:
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
