"""The process: a socket, uvicorn on it, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from retrieval_tip.errors import UsageError

BACKLOG = 1024
IDLE_SECONDS = 15
"""A connection on which nothing is asked is closed after so long."""
HEAD_SECONDS = 10.0
"""For so long a connection may take to say what it asks for."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UsageError for an address that is none, or a port that is in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
        )
        raise UsageError(f"--host {host} --port {port}: {reason}; give another one") from None


def address(listening: socket.socket) -> str:
    """The address of a listening socket, for a browser."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # what one can go to
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def configured(app: FastAPI, seconds: float) -> uvicorn.Config:
    """How uvicorn runs the application; ``seconds`` are for what is being answered at the end."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(seconds) + 1,
    )


def serve(app: FastAPI, listening: socket.socket, ready: Callable[[], None], seconds: float) -> None:
    """Answer until SIGINT or SIGTERM; then take nothing more, finish what was taken, ``seconds`` at most, and return.

    ``ready`` is called once requests are taken.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what is malformed is answered
    server = _Server(configured(app, seconds), ready)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run([listening])  # which sends itself the signal that ended it: an orderly end is no failure
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Protocol(HttpToolsProtocol):
    """Closes a connection on which a request's head does not come to its end: uvicorn would wait for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._end()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
