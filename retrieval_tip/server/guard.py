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
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self, scope, receive, send)
        name = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "").lower())
        try:
            if self.limits.hosts is not None and name not in self.limits.hosts:  # another site may have resolved it
                raise Problem(421, f"unknown host {name!r}; restart the server with --allow-host {name}")
            await exchange.run()
        except Problem as problem:
            await answer(problem)(scope, receive, send)
        finally:
            self.held -= exchange.held


class _Exchange:
    """A request and its response. Both count towards ``limits.held``, and each has ``limits.seconds`` to complete."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard, self._scope, self._receive, self._send = guard, scope, receive, send
        self.held = 0
        self._waits = self._whole = self._begun = self._refused = False

    async def run(self) -> None:
        """Run the app. Raises Problem 408 if the body arrives too late, and 503 if the response starts too late."""
        seconds = self._guard.limits.seconds
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                self._scope[DEADLINE] = self._deadline
                await self._guard.app(self._scope, self._read, self._write)
        except TimeoutError:
            if self._waits:
                late = f"the request body did not arrive within {seconds:g} s; try again"
                raise Problem(408, late, {"Connection": "close"}) from None
            if not self._begun:
                raise Problem(503, f"no answer within {seconds:g} s; try again", {"Retry-After": "5"}) from None

    async def _read(self) -> Message:
        self._waits = not self._whole
        message = await self._receive()
        self._waits, self._whole = False, not message.get("more_body")
        if not self._hold(len(message.get("body", b""))):
            raise _full()
        return message

    async def _write(self, message: Message) -> None:
        """Send a part of the response, or a problem if a large response does not fit in memory."""
        if message["type"] == "http.response.start":
            self._begun, headers = True, Headers(raw=message["headers"])
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._guard.limits.seconds)
            size, problem = int(headers.get("content-length", 0)), None
            if message["status"] == 413 and headers.get("content-type") != MEDIA:  # Starlette's answer is plain text
                problem = too_large(self._scope[MAX_BODY_SIZE_SCOPE_KEY])
            elif size > PART and not self._hold(size):
                problem = _full()
            self._refused = problem is not None
            if problem is not None:
                await answer(problem)(self._scope, self._receive, self._send)
        if self._refused:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        for at in range(PART, len(body), PART):
            await self._send({"type": message["type"], "body": body[at - PART : at], "more_body": True})
            message = {"type": message["type"], "body": body[at : at + PART], "more_body": more}
        await self._send(message)

    def _hold(self, size: int) -> bool:
        """Count ``size`` bytes as held if they fit or no other request holds any, and return whether they are."""
        if self._guard.held + size > self._guard.limits.held and self._guard.held > self.held:
            return False
        self._guard.held += size
        self.held += size
        return True


def _full() -> Problem:
    return Problem(503, "too many large requests and responses at once; try again in 1 s", {"Retry-After": "1"})
