"""Prometheus metrics of the server, and the middleware that records them. Each process has one set of metrics."""

from __future__ import annotations

import time

from h11 import LocalProtocolError
from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TIMES = 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30
SIZES = 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024
REQUESTS = Counter("retrieval_tip_requests", "Requests answered", ["route", "method", "status"])
SECONDS = Histogram("retrieval_tip_request_seconds", "Time to answer a request", ["route"], buckets=TIMES)
IN_FLIGHT = Gauge("retrieval_tip_in_flight", "Requests in progress")
CLASSIFIED = Counter("retrieval_tip_classified", "Images and features classified", ["index"])
WAITING = Gauge("retrieval_tip_waiting", "Items that are waiting for the next batch", ["lane"])
BATCHES = Histogram("retrieval_tip_batch_items", "Items per batch", ["lane"], buckets=SIZES)
REFUSED = Counter("retrieval_tip_refused", "Requests refused because the client fills its share of the queue")
VERSION = Gauge("retrieval_tip_index_version", "Version of a served index", ["index"])
KEYS = Gauge("retrieval_tip_index_keys", "Keys of a served index", ["index"])
RELOADS = Counter("retrieval_tip_reloads", "New versions found", ["index", "outcome"])

SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every response. The page can neither load anything from other sites nor be embedded in them."""


class Recorder:
    """ASGI middleware that records requests, and adds security headers to responses."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the app."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        IN_FLIGHT.inc()

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
            await self.app(scope, receive, sending)
        except ClientDisconnect:
            status = 499
        finally:
            IN_FLIGHT.dec()
            route = getattr(scope.get("route"), "path", "other")
            REQUESTS.labels(route, scope["method"] if route != "other" else "", str(status)).inc()
            SECONDS.labels(route).observe(time.perf_counter() - start)
