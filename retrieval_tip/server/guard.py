"""Limits on requests, and the ASGI middleware that applies them, counts requests and adds security headers."""

from __future__ import annotations

import asyncio
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass

from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_tip.server.metrics import IN_FLIGHT, REQUESTS, SECONDS
from retrieval_tip.server.problems import Problem, answer

CLIENT, _DEADLINE = (
    ContextVar("client", default=""),
    ContextVar[asyncio.Timeout | None]("deadline", default=None),
)
"""The address of the client of the current request, and the time limit for its answer."""
PART = 64 << 10
"""Number of bytes of a response to write at a time. The rest is held in memory."""
ROWS_PER_IMAGE = 16
"""Number of rows of features that count as one image in the queue."""
FORM, JSON, FLOATS = "multipart/form-data", "application/json", "application/octet-stream"
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every response. The page can neither load anything from other sites nor be embedded in them."""


@dataclass(frozen=True)
class Limits:
    """Limits on requests and on the work that they cause.

    A form or binary features have at most ``bytes`` bytes, and a form at most ``images`` images. Any other body has at
    most ``json_bytes`` bytes. There are at most ``rows`` rows of features, or ``grouped`` if they are grouped. An image
    has at most ``pixels`` pixels. The answers to several queries contain at most ``cells`` numbers (see
    :meth:`served.OpenVersion.cells`). A response must start within ``seconds``, and the client must read it within the
    same time.

    A client that fills more than a quarter of the ``queue``, counted in images, is refused. A large image counts
    several times, and 16 features count once. Request bodies, and responses larger than :data:`PART`, can occupy
    ``held`` bytes. There are at most ``indexes`` indexes. Only requests for the host names in ``hosts`` are answered.
    If ``hosts`` is ``None``, all requests are answered.

    A map contains at most ``mapped`` key values, and accuracy is estimated only for at most ``estimated`` keys. A
    request for a slow result is answered with status 202 after ``patience`` seconds. Indexes are checked for new
    versions every ``poll`` seconds. An encoder on a CPU leaves memory if it was not used for ``idle`` seconds.
    """

    bytes: int = 32 << 20
    json_bytes: int = 8 << 20
    images: int = 64
    rows: int = 1024
    grouped: int = 4096
    pixels: int = 50_000_000
    seconds: float = 30.0
    cells: int = 1 << 22
    queue: int = 256
    held: int = 256 << 20
    indexes: int = 100
    hosts: frozenset[str] | None = None
    mapped: int = 1 << 24
    estimated: int = 1 << 12
    patience: float = 10.0
    poll: float = 1.0
    idle: float = 600.0


def give_time(seconds: float | None = None) -> None:
    """Give the current request some seconds to be answered, or unlimited time, so that a change is not interrupted."""
    if (deadline := _DEADLINE.get()) is not None:
        deadline.reschedule(
            None if seconds is None else asyncio.get_running_loop().time() + seconds
        )


def kind_of(headers: Headers) -> str:
    """Return the content type of a request without its options."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class Guard:
    """ASGI middleware for an application. ``held`` is the total size of requests and responses in memory."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the app, or answer it with a problem if it exceeds a limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        CLIENT.set((scope.get("client") or [""])[0])
        start = time.perf_counter()
        exchange = _Exchange(self, scope, receive, send)
        try:
            with IN_FLIGHT.track_inprogress():
                await exchange.run()
        except ClientDisconnect:
            exchange.status = 499
        finally:
            self.held -= exchange.held
            route = getattr(scope.get("route"), "path", "other")
            REQUESTS.labels(
                route, scope["method"] if route != "other" else "", str(exchange.status)
            ).inc()
            SECONDS.labels(route).observe(time.perf_counter() - start)


class _Exchange:
    """A request and its response. Both count towards ``limits.held``, and each has ``limits.seconds`` to complete."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard = guard
        self._limits = guard.limits
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = Headers(scope=scope)
        self._most = (
            self._limits.bytes
            if kind_of(self._headers) in (FORM, FLOATS)
            else self._limits.json_bytes
        )
        announced = self._headers.get("content-length", "")
        self._announced = int(announced) if announced.isdecimal() else 0
        self.held = self.status = self._received = 0
        self._waits = self._whole = self._refused = False

    async def run(self) -> None:
        """Answer the request."""
        hosts = self._limits.hosts
        seconds = f"within {self._limits.seconds:g} s; try again"
        name = re.sub(r":\d*$", "", self._headers.get("host", "").lower())
        if hosts is not None and name not in hosts:  # another site may have resolved it
            await self._refuse(
                Problem(421, f"unknown host {name!r}; restart the server with --allow-host {name}")
            )
            return
        try:
            async with asyncio.timeout(self._limits.seconds) as self._deadline:
                _DEADLINE.set(self._deadline)
                await self._guard.app(self._scope, self._read, self._write)
        except TimeoutError:
            if self._waits:
                await self._refuse(
                    Problem(
                        408, f"the request body did not arrive {seconds}", {"Connection": "close"}
                    )
                )
            elif not self.status:
                await self._refuse(Problem(503, f"no answer {seconds}", {"Retry-After": "5"}))

    async def _read(self) -> Message:
        self._waits = not self._whole
        message = await self._receive()
        self._waits = False
        self._whole = not message.get("more_body")
        size = len(message.get("body", b""))
        self._received += size
        self._hold(size)
        if max(self._received, self._announced) > self._most:
            raise Problem(
                413,
                f"the request has more than {self._most:,} bytes, which is the limit; send less at once",
            )
        return message

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._limits.seconds)
            if (size := int(Headers(raw=message["headers"]).get("content-length", 0))) > PART:
                try:
                    self._hold(size)
                except Problem as problem:
                    await self._refuse(problem)
        if self._refused:
            return
        body = message.get("body", b"")
        more = message.get("more_body", False)
        for at in range(PART, len(body), PART):
            await self._pass(
                {"type": message["type"], "body": body[at - PART : at], "more_body": True}
            )
            message = {"type": message["type"], "body": body[at : at + PART], "more_body": more}
        await self._pass(message)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY.items():
                headers.setdefault(name, value)
        try:
            await self._send(message)
        except LocalProtocolError:  # uvicorn has rejected the rest of the request
            raise ClientDisconnect from None

    async def _refuse(self, problem: Problem) -> None:
        self._refused = True
        await answer(problem)(self._scope, self._receive, self._pass)

    def _hold(self, size: int) -> None:
        """Count ``size`` bytes. Raises Problem 503 if they do not fit, unless no other request holds any."""
        if self._guard.held + size > self._limits.held and self._guard.held > self.held:
            raise Problem(
                503,
                "too many large requests and responses at once; try again in 1 s",
                {"Retry-After": "1"},
            )
        self._guard.held += size
        self.held += size
