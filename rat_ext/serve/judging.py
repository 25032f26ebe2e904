"""From what clients sent to answers, or to the HTTP status that tells why there is none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from fastapi import HTTPException
from fastapi.concurrency import run_in_threadpool
from numpy.typing import NDArray
from torch import Tensor

from .batching import ClosedError, QueueFullError
from .body import CLOSE, file_in, files_in, is_form
from .decoding import Decoder, InputError
from .gate import Answer, NotFiniteError
from .settings import Settings

logger = logging.getLogger(__name__)

INLINE = 2**14
"""Bytes up to which an input is decoded where it came in, and not in another thread: for small
ones the change of threads takes longer. An image to be resized may be large however few they are.
"""

DECODED_TOGETHER = 2
"""Larger inputs that are decoded at the same time, since each takes several times its size."""

_RETRY = {"Retry-After": "1"}
_Piece = bytes | memoryview | NDArray[Any] | InputError
_Made = TypeVar("_Made")


class Judge:
    """Decodes inputs, and has them answered.

    Args:
        submit: answers a decoded input; raises QueueFullError or ClosedError where it takes none.
        decoder: what makes inputs of requests.
        settings: limits.
    """

    def __init__(
        self, submit: Callable[[Tensor], Awaitable[Answer]], decoder: Decoder, settings: Settings
    ) -> None:
        self._submit, self._decoder, self._settings = submit, decoder, settings
        self._decoding = asyncio.Semaphore(DECODED_TOGETHER)
        self._splitting = asyncio.Semaphore(DECODED_TOGETHER)  # bodies of several inputs

    async def one(self, kind: str, body: bytes) -> Answer:
        """The answer to the input in a body.

        Raises:
            HTTPException: there is none.
        """

        async def answer(body: bytes) -> Answer:
            x = await self._decode(self._input, kind, body)
            del body  # the answer may take long
            return await self._answer(x)

        work = answer(body)
        del body
        return await self._before(self._deadline(), work)

    async def each(self, kind: str, body: bytes) -> list[Answer | HTTPException]:
        """The answer to each of the inputs in a body, or why there is none.

        Raises:
            HTTPException: there are no inputs to be found in it.
        """
        deadline = self._deadline()
        answers = []
        async with self._splitting:
            pieces = await self._decode(self._pieces, kind, body)
            del body
            with refusals():
                if isinstance(pieces, InputError):
                    raise pieces
            while pieces:
                x = await self._decode(self._input, "", pieces.popleft())
                answers.append(asyncio.create_task(self._before(deadline, self._answer(x))))
                await asyncio.sleep(0)  # it is submitted, and other requests have their turn
        results = await asyncio.gather(*answers, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, HTTPException):
                raise result
        return results  # type: ignore[return-value]

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.timeout

    async def _before(self, deadline: float, work: Awaitable[Answer]) -> Answer:
        with refusals():
            try:
                return await asyncio.wait_for(work, max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError as error:
                message = f"there was no answer after {self._settings.timeout:g} s"
                raise HTTPException(504, message, _RETRY) from error

    async def _answer(self, x: Tensor | InputError) -> Answer:
        if isinstance(x, InputError):
            raise x
        try:
            return await self._submit(x)
        except (ClosedError, QueueFullError):
            raise
        except NotFiniteError as error:
            raise HTTPException(500, str(error)) from error
        except Exception as error:
            logger.exception("the model failed on an input")
            message = "the model failed on this input; see the server's log"
            raise HTTPException(500, message) from error

    async def _decode(
        self, make: Callable[[str, Any], _Made], kind: str, piece: _Piece
    ) -> _Made | InputError:
        def made() -> _Made | InputError:
            try:
                return make(kind, piece)
            except InputError as error:
                return error.alone()

        if _size(piece) <= INLINE and not self._decoder.resize:
            return made()
        async with self._decoding:
            return await run_in_threadpool(made)

    def _input(self, kind: str, piece: _Piece) -> Tensor:
        if isinstance(piece, InputError):
            raise piece
        if isinstance(piece, np.ndarray):
            return self._decoder(piece)
        return self._decoder(file_in(kind, bytes(piece)))

    def _pieces(self, kind: str, body: bytes) -> deque[_Piece]:
        most = self._settings.queue  # more would not be taken, however little there is to do
        return deque(
            files_in(kind, body, most) if is_form(kind) else self._decoder.rows(body, most)
        )


def _size(piece: _Piece) -> int:
    if isinstance(piece, InputError):
        return 0
    return len(piece) if isinstance(piece, bytes) else piece.nbytes


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns the reasons for which work is not taken into answers."""
    try:
        yield
    except InputError as error:
        raise HTTPException(error.status, str(error)) from error
    except QueueFullError as error:
        raise HTTPException(503, f"too much work: {error}; try again", _RETRY) from error
    except ClosedError as error:
        raise HTTPException(503, "the server is shutting down", {**_RETRY, **CLOSE}) from error
