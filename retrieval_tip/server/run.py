"""The process: a socket, uvicorn on it, and an orderly end."""

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
"""Largest request line and header fields, together."""
CONNECTIONS = 512
"""Open connections from which on requests are answered with 503."""
FILES = 4096
"""Largest limit of open files, and so of connections that have not asked anything yet."""
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
    """Return the settings of uvicorn; at the end, requests that are being answered have ``seconds``."""
    return uvicorn.Config(
        app,
        http="h11",
        h11_max_incomplete_event_size=HEAD_BYTES,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(seconds) + 1,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
    )


def serve(app: FastAPI, listening: socket.socket, seconds: float) -> None:
    """Answer until SIGINT or SIGTERM; then accept nothing more, finish within ``seconds``, and return."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # no line for each request that is malformed
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the client is told what is malformed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if soft == resource.RLIM_INFINITY else min(soft, FILES), hard))
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(configured(app, seconds)).run([listening])  # which sends itself the signal that ended it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
