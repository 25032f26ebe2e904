"""Reads the body of a request, within its limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from .decoding import InputError
from .settings import Settings

LINGER = 1.0
"""Seconds in which the rest of a refused body is read and dropped. A connection that is closed on
unread data is reset, and a client that is still sending may then never see the answer."""

CLOSE = {"Connection": "close"}

_MAX_FIELDS = 16  # that are no files
_MAX_PART_HEAD = 2**13
_BOUNDARY = re.compile(r'\bboundary=(?:"([^"]+)"|([^\s;",]+))', re.IGNORECASE)
_FILE = re.compile(rb"^content-disposition:.*;\s*filename\*?=", re.IGNORECASE | re.MULTILINE)


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
        body.clear()  # else it lives as long as the error's traceback
        message = f"the request was not complete after {settings.body_timeout:g} s"
        raise HTTPException(408, message, CLOSE) from error
    except ClientDisconnect as error:
        body.clear()
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


def file_in(content_type: str, body: bytes) -> bytes:
    """The first uploaded file of a form, or the body itself."""
    if not is_form(content_type):
        return body
    return bytes(next(files_in(content_type, body)))


def is_form(content_type: str) -> bool:
    """A body of this type is a form, which files are in."""
    return content_type.lower().startswith("multipart/form-data")


def files_in(content_type: str, body: bytes, most: int = 1) -> Iterator[memoryview]:
    """The uploaded files of a form, without a copy of them.

    By hand, because the usual parsers make an object of each piece of a file between two line
    breaks: of 10 MiB of line breaks they make gigabytes.

    Raises:
        InputError: the form is damaged, has no file, or more than `most`, which are looked at
            beside a few fields.
    """
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise InputError("the form's content-type names no boundary between its parts", 400)
    delimiter = b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1")
    first = body.find(delimiter[2:])  # with no line before it, unless there is a preamble
    at = first + len(delimiter) - 2 if first >= 0 else len(body)
    files = fields = 0
    while fields < _MAX_FIELDS and body.startswith(b"\r\n", at):  # the last one ends in --
        begin = body.find(b"\r\n\r\n", at, at + _MAX_PART_HEAD)
        end = body.find(delimiter, begin + 4)
        if begin < 0 or end < 0:
            raise InputError("the form is damaged: a part of it has no end", 400)
        if _FILE.search(body, at, begin):
            files += 1
            if files > most:
                raise InputError(f"the form has more than {most} files; send fewer at a time", 413)
            yield memoryview(body)[begin + 4 : end]
        else:
            fields += 1
        at = end + len(delimiter)
    if not files:
        raise InputError("the form has no file: send one in the field file", 400)
