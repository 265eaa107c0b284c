"""The process: a socket, uvicorn on it, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
from collections.abc import Callable
from http import HTTPStatus

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from retrieval_tip.errors import UsageError
from retrieval_tip.server.limits import DRAINED_SECONDS, PART_SECONDS
from retrieval_tip.server.problems import MEDIA, Problem, body_of

BACKLOG = 1024
IDLE_SECONDS = 15
"""A connection on which nothing is asked is closed after so long."""
HEAD_SECONDS = 10.0
"""For so long a connection may take to say what it asks for."""
HEAD_BYTES = 64 << 10
"""Bytes that a request may ask with: the request line and the header fields, with those after a body in chunks."""
PIPELINED = 8
"""Requests that a connection may ask while another of it is answered."""
CONNECTIONS = 512
"""Open at most. For a further one, of those that the other side leaves waiting the one that began first is closed."""
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
    """The settings of uvicorn; ``seconds`` are for what is being answered at the end."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
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
    """A connection with limits where uvicorn has none: of what comes before a request is one, and of what is not taken.

    The time and the size of a head, the requests that wait behind another, the time in which an answer is taken, and
    the number of connections.
    """

    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _problem: Problem | None = None
    _refused = _in_body = False
    _head = _unparsed = 0
    _since = 0.0
    _cycles: tuple[RequestResponseCycle, ...] = ()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEAD_SECONDS)
        if len(self.connections) > CONNECTIONS:
            others = (one for one in self.connections if isinstance(one, _Protocol) and one.waits and one is not self)
            if (oldest := min(others, key=lambda one: one._since, default=None)) is None:
                self._refuse(Problem(503, "too many connections; try again in 5 s", {"Retry-After": "5"}))
            else:
                self.connections.discard(oldest)
                oldest.transport.abort()

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered here."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether the other side has to do something: ask, or take the answer."""
        return self.idle or self.cycle.more_body or self.cycle.response_started

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self.timeout_keep_alive_task is not None:  # which ends here: what has come may be no request
            self._wait(HEAD_SECONDS)
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > HEAD_BYTES and not self._refused:
            self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        self._wait(HEAD_SECONDS)
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if not self._in_body:  # fields after the body are none of the request's
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > HEAD_BYTES:
            self._fail(_TOO_LARGE)

    def _fail(self, problem: Problem) -> None:
        """End the parsing of what has come."""
        self._problem = problem
        raise ValueError(problem.detail)

    def on_headers_complete(self) -> None:
        self._end()
        self._unparsed = 0
        if len(self.pipeline) >= PIPELINED:
            self._fail(Problem(429, "too many requests before the first is answered", {"Retry-After": "1"}))
        named = re.fullmatch(rb"[a-z]+://([^/?#]*).*", self.url, re.IGNORECASE | re.DOTALL)
        if named and [named[1]] != [value for name, value in self.headers if name == b"host"]:
            self._fail(Problem(400, "the request names one host, and its field Host another"))
        super().on_headers_complete()
        self._cycles = (*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle)
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed, self._in_body = 0, False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, for anything that is no request; what is wrong is said as by the routes."""
        self._refuse(self._problem or Problem(400, "this is no request of HTTP/1.1"))

    def _refuse(self, problem: Problem) -> None:
        """Answer, and end the connection; where requests before this one are being answered, only that, after them.

        What still comes is dropped for a while: where it met a closed connection, the answer would not be seen.
        """
        self._refused = True
        self._end()
        if not self.idle:
            if not self._in_body:
                self.cycle.keep_alive = False
                return
            if self.pipeline or self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body, phrase = body_of(problem.status, problem.detail), HTTPStatus(problem.status).phrase
        fields = {"Content-Type": MEDIA, "Content-Length": len(body), "Connection": "close"} | problem.headers
        head = [f"HTTP/1.1 {problem.status} {phrase}", *(f"{name}: {value}" for name, value in fields.items())]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.transport.write_eof()
        self._wait(DRAINED_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(PART_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        if self._stalled is not None:
            self._stalled.cancel()
        for cycle in self._cycles:  # uvicorn tells the last one only, and others would fail when they answer
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        self._end()
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(seconds, self.transport.close)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


_TOO_LARGE = Problem(431, f"the request line and the header fields may have {HEAD_BYTES:,} bytes")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
