"""How much of everything a request may take, and the guard in front of the routes that sees to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from retrieval_tip.server import metrics
from retrieval_tip.server.problems import Problem, answer

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DEADLINE = "retrieval_tip.deadline"
"""Where a scope keeps its :class:`asyncio.Timeout`."""

READ = "retrieval_tip.read"
"""Where a scope says that the body has been read to its end."""

DRAINED_SECONDS = 5.0
"""For so long the rest of a refused body is read and dropped: who still sends would else not see the answer."""

SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every answer: nothing is loaded from elsewhere, and nobody else shows what is here."""


@dataclass(frozen=True)
class Limits:
    """What requests may take.

    One: ``bytes`` of its body, of which ``json_bytes`` of JSON, ``images`` or ``rows`` of features, ``pixels`` of an
    image, ``seconds`` until its answer. All together: ``queue`` images wait at most, and ``QUEUED_ROWS`` times as many
    rows; bodies that are held have ``held`` bytes.

    ``hosts`` are the names that the server answers to, ``None`` for any: a page elsewhere that points a name of its own
    at this machine gets nothing.
    """

    bytes: int = 32 << 20
    json_bytes: int = 8 << 20
    images: int = 64
    rows: int = 1024
    pixels: int = 50_000_000
    seconds: float = 30.0
    queue: int = 256
    held: int = 256 << 20
    hosts: frozenset[str] | None = None


QUEUED_ROWS = 16


class Guard:
    """ASGI middleware: host names, sizes, time, headers and counts, around an app."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through to the app, as far as its limits allow."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
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
            await send(message)

        try:
            await self._within_limits(scope, receive, sending)
        except ClientDisconnect:
            status = 499
        except (Problem, TimeoutError) as error:
            if status:  # the answer has begun
                raise
            late = Problem(503, f"no answer within {self._limits.seconds:g} s; try again", {"Retry-After": "5"})
            await self._refuse(error if isinstance(error, Problem) else late, scope, receive, sending)
        finally:
            metrics.IN_FLIGHT.dec()
            route = getattr(scope.get("route"), "path", "other")
            metrics.REQUESTS.labels(route, scope["method"] if route != "other" else "", str(status)).inc()
            metrics.SECONDS.labels(route).observe(time.perf_counter() - start)

    async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Problem, TimeoutError and ClientDisconnect, before an answer has begun or after."""
        limits, headers = self._limits, Headers(scope=scope)
        host = headers.get("host", "").rpartition("@")[2]
        host = host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]
        if limits.hosts is not None and host.lower() not in limits.hosts:
            raise Problem(421, f"host {host!r} is none that this server answers to; start it with --allow-host {host}")
        told = headers.get("content-length", "")
        expected = int(told) if told.isdecimal() else limits.bytes if "transfer-encoding" in headers else 0
        self._check(expected)
        if expected and self._held + expected > limits.held and self._held:
            raise Problem(429, "too many uploads at once; try again in 1 s", {"Retry-After": "1"})
        self._held += expected
        seen = 0

        async def receiving() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            self._check(seen)
            scope[READ] = not message.get("more_body")
            return message

        try:
            async with asyncio.timeout(limits.seconds) as deadline:
                scope[DEADLINE] = deadline
                await self._app(scope, receiving, send)
        finally:
            self._held -= expected

    def _check(self, size: int) -> None:
        if size > self._limits.bytes:
            raise Problem(
                413, f"a request may have {self._limits.bytes:,} bytes, not {size:,} or more; send less at once"
            )

    @staticmethod
    async def _refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and read what is still sent for a while, so that the answer is seen; then the connection ends."""
        response = answer(problem)
        response.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        try:
            async with asyncio.timeout(DRAINED_SECONDS):
                while not scope.get(READ):
                    message = await receive()
                    scope[READ] = message["type"] != "http.request" or not message.get("more_body")
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
