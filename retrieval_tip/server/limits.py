"""The limits of everything that a request may take, and the guard in front of the routes that sees to it."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_tip.server import metrics
from retrieval_tip.server.problems import Problem, answer

DEADLINE = "retrieval_tip.deadline"
"""The entry in which a scope keeps its ``asyncio.Timeout``."""

READ = "retrieval_tip.read"
"""The entry in which a scope says that the body has been read to its end."""

DRAINED_SECONDS = 5.0
"""For so long the rest of a refused body is read and dropped: who still sends would else not see the answer."""

PART, PART_SECONDS = 64 << 10, 8.0
"""Bytes of a body, or its rest, that have to come within so many seconds of waiting for them: 8 KiB/s. Of an answer,
as many have to be taken within as long (:class:`run._Protocol` sees to that)."""

HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[0-9a-z._-]{1,255})(?::[0-9]{1,5})?", re.IGNORECASE | re.ASCII)
"""The form of a request's field Host: a name or an address, and a port."""

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
    """The limits of requests.

    One: ``bytes`` of its body, of which ``json_bytes`` of JSON, ``images`` or ``rows`` of features, ``pixels`` of an
    image, ``seconds`` until its answer begins and again until that is taken, ``cells`` numbers in the answers to
    several queries (:meth:`served.Version.cells`). All together: ``queue`` images wait at most, and ``QUEUED_ROWS``
    times as many rows; what has come of bodies has ``held`` bytes, and so have answers of more than :data:`PART`.
    No index is made where ``indexes`` are served.

    ``hosts`` are the names that the server answers to, ``None`` for any: a page elsewhere that points a name of its own
    at this machine gets nothing.
    """

    bytes: int = 32 << 20
    json_bytes: int = 8 << 20
    images: int = 64
    rows: int = 1024
    pixels: int = 50_000_000
    seconds: float = 30.0
    cells: int = 1 << 22
    queue: int = 256
    held: int = 256 << 20
    indexes: int = 100
    hosts: frozenset[str] | None = None


QUEUED_ROWS = 16


class Guard:
    """ASGI middleware: host names, sizes, time, headers and counts, around an app."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._came = self._going = 0

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
        except Problem as problem:
            if status:  # the answer has begun
                raise
            await self._refuse(problem, scope, receive, sending)
        finally:
            metrics.IN_FLIGHT.dec()
            route = getattr(scope.get("route"), "path", "other")
            metrics.REQUESTS.labels(route, scope["method"] if route != "other" else "", str(status)).inc()
            metrics.SECONDS.labels(route).observe(time.perf_counter() - start)

    async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Problem, also of the answer's time, and ClientDisconnect, before an answer has begun or after."""
        limits, headers = self._limits, Headers(scope=scope)
        self._check_host(headers, scope["http_version"])
        told = headers.get("content-length", "")
        self._check(int(told) if told.isdecimal() else 0)
        held = going = seen = part = 0
        waited, begun, refused = 0.0, False, False
        clock = asyncio.get_running_loop().time

        async def receiving() -> Message:
            nonlocal held, seen, part, waited
            if scope.get(READ):
                return await receive()
            before = clock()
            try:
                async with asyncio.timeout(PART_SECONDS - waited):
                    message = await receive()
            except TimeoutError:
                raise _late(f"{PART:,} bytes of it, or its rest, have to come within {PART_SECONDS:g} s") from None
            size = len(message.get("body", b""))
            seen, part, waited = seen + size, part + size, waited + clock() - before
            if part >= PART:
                part, waited = 0, 0.0
            self._check(seen)
            if self._came + size > limits.held and self._came > held:  # one alone has room
                raise Problem(429, "too many uploads at once; try again in 1 s", {"Retry-After": "1"})
            self._came, held = self._came + size, held + size
            scope[READ] = not message.get("more_body")
            return message

        async def answering(message: Message) -> None:
            nonlocal going, begun, refused
            if message["type"] == "http.response.start":
                size = int(Headers(raw=message["headers"]).get("content-length", 0))
                if size > PART:
                    refused = bool(self._going) and self._going + size > limits.held
                    going = 0 if refused else size
                    self._going += going
                begun = not refused
                deadline.reschedule(clock() + limits.seconds)
            if refused:
                return
            body, more = message.get("body", b""), message.get("more_body", False)
            for at in range(PART, len(body), PART):  # so that what is not taken yet waits here, where it is counted
                await send({"type": message["type"], "body": body[at - PART : at], "more_body": True})
                message = {"type": message["type"], "body": body[at : at + PART], "more_body": more}
            await send(message)

        try:
            async with asyncio.timeout(limits.seconds) as deadline:
                scope[DEADLINE] = deadline
                await self._app(scope, receiving, answering)
        except TimeoutError:
            if begun:  # it is not taken: the connection ends
                return
            if not scope.get(READ):
                raise _late(f"all of it has to come within {limits.seconds:g} s") from None
            raise Problem(503, f"no answer within {limits.seconds:g} s; try again", {"Retry-After": "5"}) from None
        finally:
            self._came -= held
            self._going -= going
        if refused:
            raise Problem(503, "too many answers are being sent; try again in 1 s", {"Retry-After": "1"})

    def _check_host(self, headers: Headers, version: str) -> None:
        """Raise Problem 400 unless there is one host, of a form that leaves no doubt; 421 for one that is another."""
        hosts = self._limits.hosts
        said = headers.getlist("host")
        if not said and version == "1.0" and hosts is None:
            return
        host = HOST.fullmatch(said[0]) if len(said) == 1 else None
        if host is None:
            raise Problem(400, "expected one field Host, with a name or an address, and a port")
        name = host[1].lower()
        if hosts is not None and name not in hosts:
            raise Problem(421, f"host {name!r} is none that this server answers to; start it with --allow-host {name}")

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
                while not scope.get(READ) and problem.status != 408:  # which comes too slowly
                    message = await receive()
                    scope[READ] = message["type"] != "http.request" or not message.get("more_body")
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _late(what: str) -> Problem:
    return Problem(408, f"the request's body came too slowly: {what}; try again", {"Connection": "close"})
