"""ASGI middleware for the limits that Starlette lacks: deadlines, the memory of all requests, and host names."""

from __future__ import annotations

import asyncio
import re

from starlette.datastructures import Headers
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_tip.server.limits import Limits
from retrieval_tip.server.problems import MEDIA, Problem, answer, too_large

DEADLINE = "retrieval_tip.deadline"
"""Key under which the ASGI scope holds the ``asyncio.Timeout`` of the request."""
PART = 64 << 10
"""Number of bytes of a response to write at a time. The rest is held in memory."""


class Guard:
    """ASGI middleware for an application. ``held`` is the total size of requests and responses in memory."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits, self.held = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the app, or answer it with a problem if it exceeds a limit."""
        await (_Exchange(self).run if scope["type"] == "http" else self.app)(scope, receive, send)


class _Exchange:
    """A request and its response. Both count towards ``limits.held``, and each has ``limits.seconds`` to complete."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self._limits, self._held = guard, guard.limits, 0
        self._waits = self._whole = self._begun = self._refused = False

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        hosts, seconds = self._limits.hosts, f"within {self._limits.seconds:g} s; try again"
        name = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "").lower())
        if hosts is not None and name not in hosts:  # another site may have resolved it
            await self._refuse(Problem(421, f"unknown host {name!r}; restart the server with --allow-host {name}"))
            return
        try:
            async with asyncio.timeout(self._limits.seconds) as self._deadline:
                scope[DEADLINE] = self._deadline
                await self._guard.app(scope, self._read, self._write)
        except TimeoutError:
            if self._waits:
                await self._refuse(Problem(408, f"the request body did not arrive {seconds}", {"Connection": "close"}))
            elif not self._begun:
                await self._refuse(Problem(503, f"no answer {seconds}", {"Retry-After": "5"}))
        finally:
            self._guard.held -= self._held

    async def _read(self) -> Message:
        self._waits = not self._whole
        message = await self._receive()
        self._waits, self._whole = False, not message.get("more_body")
        self._hold(len(message.get("body", b"")))
        return message

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun, headers = True, Headers(raw=message["headers"])
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._limits.seconds)
            try:
                if message["status"] == 413 and headers.get("content-type") != MEDIA:  # Starlette's own answer
                    raise too_large(self._scope[MAX_BODY_SIZE_SCOPE_KEY])
                if (size := int(headers.get("content-length", 0))) > PART:
                    self._hold(size)
            except Problem as problem:
                await self._refuse(problem)
        if self._refused:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        for at in range(PART, len(body), PART):
            await self._send({"type": message["type"], "body": body[at - PART : at], "more_body": True})
            message = {"type": message["type"], "body": body[at : at + PART], "more_body": more}
        await self._send(message)

    async def _refuse(self, problem: Problem) -> None:
        self._refused = True
        await answer(problem)(self._scope, self._receive, self._send)

    def _hold(self, size: int) -> None:
        """Count ``size`` bytes. Raises Problem 503 if they do not fit, unless no other request holds any."""
        if self._guard.held + size > self._limits.held and self._guard.held > self._held:
            raise Problem(503, "too many large requests and responses at once; try again in 1 s", {"Retry-After": "1"})
        self._guard.held += size
        self._held += size
