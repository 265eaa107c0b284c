"""Run the application with uvicorn, and shut down in order."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket

import uvicorn
from fastapi import FastAPI

from retrieval_tip.errors import UsageError

BACKLOG = 1024
IDLE_SECONDS = 15
"""Seconds after which an idle connection is closed."""
HEAD_BYTES = 64 << 10
"""Largest size of the request line and headers together."""
CONNECTIONS = 512
"""Number of open connections beyond which requests get a 503."""
FILES = 4096
"""Largest limit of open files, which also bounds connections without a request."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UsageError for an invalid address or a port in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
        )
        raise UsageError(f"--host {host} --port {port}: {reason}; choose another address or port") from None


def address(listening: socket.socket) -> str:
    """Return the URL of a listening socket for a browser."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # wildcard addresses cannot be opened
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def configured(app: FastAPI, seconds: float) -> uvicorn.Config:
    """Return the settings of uvicorn. At shutdown, requests in progress have ``seconds`` to finish."""
    return uvicorn.Config(
        app, http="h11", h11_max_incomplete_event_size=HEAD_BYTES, limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=int(seconds) + 1, ws="none", lifespan="on",
        log_config=None, access_log=False, server_header=False,
    )  # fmt: skip


def serve(app: FastAPI, listening: socket.socket, seconds: float) -> None:
    """Serve until SIGINT or SIGTERM, then finish requests in progress within ``seconds`` and return."""
    for name in ("uvicorn", "python_multipart"):  # no log line for each malformed request: the client is told
        logging.getLogger(name).setLevel(logging.ERROR)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if soft == resource.RLIM_INFINITY else min(soft, FILES), hard))
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(configured(app, seconds)).run([listening])  # sends itself the signal again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
