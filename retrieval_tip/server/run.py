"""Functions that run the application with uvicorn and shut it down cleanly."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI
from h11 import LocalProtocolError

from retrieval_tip.errors import UsageError

BACKLOG = 1024
IDLE_SECONDS = 15
"""Number of seconds after which an idle connection is closed."""
HEAD_BYTES = 64 << 10
"""Maximum total size of the request line and the headers, in bytes."""
CONNECTIONS = 512
"""Maximum number of open connections. Requests beyond this limit are answered with status 503."""
FILES = 4096
"""Maximum number of open files, which limits connections without a request."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UsageError if the address is invalid or the port is in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
        )
        raise UsageError(f"--host {host} --port {port}: {reason}; choose another address or port") from None


def address(listening: socket.socket) -> str:
    """Return the URL at which a browser can reach a listening socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # browsers cannot open wildcards
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def configured(app: FastAPI, seconds: float, proxies: Sequence[str] = ()) -> uvicorn.Config:
    """Return the uvicorn configuration. At shutdown, requests in progress have ``seconds`` to finish.

    ``proxies`` are the addresses and networks of trusted proxies, which forward the addresses of their clients.
    """
    return uvicorn.Config(
        app, http="h11", h11_max_incomplete_event_size=HEAD_BYTES, limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=int(seconds) + 1, ws="none", lifespan="on",
        log_config=None, access_log=False, server_header=False, proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
    )  # fmt: skip


def _is_no_protocol_error(record: logging.LogRecord) -> bool:
    """Drop the error of uvicorn's second rejection of a malformed request, which ends the connection anyway."""
    return record.exc_info is None or record.exc_info[0] is not LocalProtocolError


def serve(app: FastAPI, listening: socket.socket, seconds: float, proxies: Sequence[str] = ()) -> None:
    """Serve requests until SIGINT or SIGTERM is received. See :func:`configured`."""
    for name in ("uvicorn", "python_multipart"):  # malformed requests are reported to the client, not logged
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(_is_no_protocol_error)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if soft == resource.RLIM_INFINITY else min(soft, FILES), hard))
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(configured(app, seconds, proxies)).run([listening])  # finally sends the signal again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
