"""Listens for HTTP, and stops without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Iterator
from typing import cast

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .access_log import AccessLog, Style, log_to_stdout
from .body import LINGER
from .settings import Settings


class Server(uvicorn.Server):
    """uvicorn's, but it refuses new work as soon as it is told to stop, and then ends with 0."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"Serving on http://{host}:{port} (Ctrl-C stops)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cast(FastAPI, self.config.app).state.batcher.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again after it has obeyed, which kills the process.
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# Sent before anything is parsed: refusals come when there is too much work already.
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 45\r\n"
    b"retry-after: 1\r\nconnection: close\r\n\r\n"
    b'{"detail": "too many connections: try again"}'
)


def _protocol(seconds: float, connections: int) -> type[H11Protocol]:
    """uvicorn's protocol, but it closes the connections of clients that do not keep up.

    They are those who do not send the whole head of a request in time, or do not read an answer.
    uvicorn itself waits for ever: a few hundred such clients would take all connections. And where
    there are too many it refuses requests on all of them; here those that came first are served.
    """
    served: set[H11Protocol] = set()

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _patience = seconds
        _works = False

        # asyncio's stubs let any transport come; over TCP it is this one.
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # pause as soon as anything is left unread
            if len(served) < connections:
                served.add(self)
                self.app = self._serve
            self._watch()

        def data_received(self, data: bytes) -> None:
            if self not in served:
                self.transport.write(_TOO_MANY)
                self.transport.close()
                return
            super().data_received(data)
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            self._forget()
            self.resume_writing()
            if not self._works:
                served.discard(self)
            super().connection_lost(error)

        async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
            self._works = True
            try:
                await cast(ASGIApp, self.config.loaded_app)(scope, receive, send)
            finally:
                self._works = False
                if self not in self.connections:  # it was lost, but had work under way
                    served.discard(self)

        def pause_writing(self) -> None:
            super().pause_writing()
            # Not close(), which would wait until all is read.
            self._unread = self.loop.call_later(self._patience, self.transport.abort)

        def resume_writing(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None
            super().resume_writing()

        def shutdown(self) -> None:
            super().shutdown()
            self._patience = min(seconds, LINGER)
            if self._unread is not None:
                self._unread.cancel()
                self._unread = self.loop.call_later(self._patience, self.transport.abort)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()  # the application has the request, and limits of its own
            elif self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol


def serve(
    app: FastAPI,
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    access_log: Style | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then answer what was accepted, and return.

    Args:
        app: of `rat_ext.serve.app.create_app`.
        settings: the same as the app's.
        host: name or address to listen on.
        port: 0 for a free one. The address is printed once it takes requests.
        access_log: print a line for each request, as "text" or "json".

    Raises:
        ValueError: there is no such port.
        OSError: the address cannot be had.
    """
    listener = listen(host, port)
    if access_log:
        app.add_middleware(AccessLog, style=access_log)
        log_to_stdout()
    longest = settings.body_timeout + LINGER + settings.timeout
    config = uvicorn.Config(
        app,
        http=_protocol(settings.body_timeout, settings.connections),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,  # uvicorn's own tells less
        timeout_graceful_shutdown=math.ceil(longest) + 1,
    )
    with listener:
        Server(config).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address.

    Raises:
        ValueError: there is no such port.
        OSError: the address cannot be had.
    """
    if not 0 <= port < 2**16:  # the address would have its lowest 16 bits
        raise ValueError(f"port is {port}; it must be from 0, for a free one, to {2**16 - 1}")
    try:
        # With its protocol named: asyncio turns Nagle's algorithm off for such sockets alone, and
        # with it every answer waits some 40 ms for the acknowledgement of its first packet.
        tcp = {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_TCP}
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, **tcp)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}") from error
    try:
        # A port is free as soon as the last server is gone, not only a minute later.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error}") from error
    return listener
