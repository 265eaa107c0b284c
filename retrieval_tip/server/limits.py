"""Limits on requests, and the ASGI middleware that enforces them."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_tip.server import metrics
from retrieval_tip.server.problems import Problem, answer

DEADLINE = "retrieval_tip.deadline"
"""Key under which the ASGI scope holds the ``asyncio.Timeout`` of the request."""

PART = 64 << 10
"""Number of bytes of a response to write at a time. The rest is held in memory."""

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

    A form has at most ``bytes`` bytes and ``images`` images of ``pixels`` pixels each. A JSON body has at most
    ``json_bytes`` bytes and ``rows`` rows of features. At most ``grouped`` features are grouped at once. The answers to
    several queries contain at most ``cells`` numbers (see :meth:`served.Version.cells`). A response must start within
    ``seconds``, and the client must read it within the same time.

    Each client can fill a quarter of a queue for ``queue`` images. :data:`ROWS_PER_IMAGE` rows count as one image.
    Request bodies, and responses larger than :data:`PART`, can occupy ``held`` bytes. There are at most ``indexes``
    indexes. Only requests for the host names in ``hosts`` are answered. If ``hosts`` is ``None``, all requests are
    answered.

    A map contains at most ``mapped`` key values, accuracy is estimated only for at most ``estimated`` keys, and a
    response contains at most ``values`` solved or trained values. A request for a slow result is answered with status
    202 after ``patience`` seconds. Indexes are checked for new versions every ``poll`` seconds.
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
    values: int = 1 << 18
    patience: float = 10.0
    poll: float = 1.0

    def check_host(self, host: str) -> None:
        """Raise Problem 421 if the host name is unknown, since another site may have resolved it to this machine."""
        name = re.sub(r":\d*$", "", host.lower())
        if self.hosts is not None and name not in self.hosts:
            raise Problem(421, f"unknown host {name!r}; restart the server with --allow-host {name}")

    def check_size(self, size: int) -> None:
        """Raise Problem 413 if a body of ``size`` bytes is too large."""
        if size > self.bytes:
            raise Problem(
                413, f"request of at least {size:,} bytes: the limit is {self.bytes:,}; send less data at once"
            )


ROWS_PER_IMAGE = 16
"""Number of rows of features that count as one image in the queue."""


class Guard:
    """ASGI middleware that enforces limits, adds security headers and records metrics."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits, self.held = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the app, or answer it with a problem if it exceeds a limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        metrics.IN_FLIGHT.inc()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            try:
                await send(message)
            except LocalProtocolError:  # uvicorn has rejected the rest of the request
                raise ClientDisconnect from None

        try:
            headers = Headers(scope=scope)
            try:
                self.limits.check_host(headers.get("host", ""))
                told = headers.get("content-length", "")
                self.limits.check_size(int(told) if told.isdecimal() else 0)
                await _Exchange(self, scope, receive, sending).run()
            except Problem as problem:
                await answer(problem)(scope, receive, sending)
        except ClientDisconnect:
            status = 499
        finally:
            metrics.IN_FLIGHT.dec()
            route = getattr(scope.get("route"), "path", "other")
            metrics.REQUESTS.labels(route, scope["method"] if route != "other" else "", str(status)).inc()
            metrics.SECONDS.labels(route).observe(time.perf_counter() - start)


class _Exchange:
    """A request and its response. Both count towards ``limits.held``, and each has ``limits.seconds`` to complete."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard, self._limits = guard, guard.limits
        self._scope, self._receive, self._send = scope, receive, send
        self._size = self._held = 0
        self._waits = self._whole = self._begun = self._refused = False

    async def run(self) -> None:
        """Run the app. Raises Problem 408 if the body arrives too late, and 503 if the response starts too late."""
        try:
            async with asyncio.timeout(self._limits.seconds) as self._deadline:
                self._scope[DEADLINE] = self._deadline
                await self._guard.app(self._scope, self.receive, self.send)
        except TimeoutError:
            seconds = f"within {self._limits.seconds:g} s; try again"
            if self._waits:
                raise Problem(408, f"the request body did not arrive {seconds}", {"Connection": "close"}) from None
            if not self._begun:
                raise Problem(503, f"no answer {seconds}", {"Retry-After": "5"}) from None
        finally:
            self._guard.held -= self._held

    async def receive(self) -> Message:
        """Receive a part of the body, unless it is too large (413) or too much data is held (503)."""
        self._waits = not self._whole
        message = await self._receive()
        self._waits, self._whole = False, not message.get("more_body")
        size = len(message.get("body", b""))
        self._size += size
        self._limits.check_size(self._size)
        if not self._hold(size):
            raise _full()
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response. If a large response does not fit in memory, send a problem instead."""
        if self._refused:
            return
        if message["type"] == "http.response.start":
            size = int(Headers(raw=message["headers"]).get("content-length", 0))
            self._refused = size > PART and not self._hold(size)
            if self._refused:
                await answer(_full())(self._scope, self._receive, self._send)
                return
            self._begun = True
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._limits.seconds)
        body, more = message.get("body", b""), message.get("more_body", False)
        for at in range(PART, len(body), PART):
            await self._send({"type": message["type"], "body": body[at - PART : at], "more_body": True})
            message = {"type": message["type"], "body": body[at : at + PART], "more_body": more}
        await self._send(message)

    def _hold(self, size: int) -> bool:
        """Count ``size`` bytes as held if they fit or no other request holds any, and return whether they are."""
        if self._guard.held + size > self._limits.held and self._guard.held > self._held:
            return False
        self._guard.held += size
        self._held += size
        return True


def _full() -> Problem:
    return Problem(503, "too many large requests and responses at once; try again in 1 s", {"Retry-After": "1"})
