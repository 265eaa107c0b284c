"""Functions that run the application with uvicorn and shut it down cleanly."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from h11 import LocalProtocolError
from uvicorn.protocols.http.h11_impl import H11Protocol

from retrieval_tip import platforms
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import cache_folder, make_folders, open_regular, real
from retrieval_tip.server.guard import Limits

BACKLOG = 1024
IDLE_SECONDS = 15
"""Number of seconds after which a connection without a request is closed."""
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
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number and number > 0 else str(error)
        raise UsageError(
            f"--host {host} --port {port}: {reason}; choose another address or port"
        ) from None


def is_local(listening: socket.socket) -> bool:
    """Return whether only this machine can reach a listening socket."""
    return str(listening.getsockname()[0]).startswith(("127.", "::1"))


def address(listening: socket.socket) -> str:
    """Return the URL at which a browser can reach a listening socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # browsers cannot open wildcards
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class LastServer:
    """The port and the token of the last server of some indexes, so that its page works with the next server.

    The file with the token is only used if no other user can read or write it. The token is only used on the same port,
    because a program that has taken this port may have received the token from an open page.
    """

    def __init__(self, command: str, places: Iterable[Path | str]) -> None:
        names = [
            command,
            *(str(real(place) if isinstance(place, Path) else place) for place in places),
        ]
        name = hashlib.sha256(repr(names).encode()).hexdigest()
        self.file = (cache_folder() or Path(os.devnull)) / "servers" / name
        self.port = 0
        self.token = ""
        with suppress(OSError, InputError, ValueError), open_regular(self.file) as file:
            if platforms.is_private(self.file, os.fstat(file.fileno())):
                port, self.token = file.read().decode().split()
                self.port = int(port)

    def listen(self, host: str) -> socket.socket:
        """Listen on the last port, or on a free one if it is in use."""
        try:
            return listen(host, self.port)
        except UsageError:
            return listen(host, 0)

    def token_for(self, listening: socket.socket) -> str:
        """Return the token of a listening server, which is new unless the server has the last port of this machine."""
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(16)
        if not is_local(listening):
            return token
        if port == self.port:
            return self.token
        with suppress(OSError):  # without a file, the next token is new
            make_folders(self.file.parent)
            self.file.unlink(missing_ok=True)
            handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(f"{port} {token}")
        return token


class Connection(H11Protocol):
    """A connection that is closed if no whole request head arrives in time.

    uvicorn only starts its timer after a response, and stops it as soon as any byte arrives.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        """Handle data, and stop the timer only if a request is being answered."""
        timer = self.timeout_keep_alive_task
        self.timeout_keep_alive_task = None
        super().data_received(data)
        if timer is None:
            return
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_task = timer
        else:
            timer.cancel()


def configured(app: FastAPI, proxies: Sequence[str] = ()) -> uvicorn.Config:
    """Return the uvicorn configuration. At shutdown, requests in progress have their usual time to finish.

    ``proxies`` are the addresses and networks of trusted proxies, which forward the addresses of their clients.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        h11_max_incomplete_event_size=HEAD_BYTES,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(Limits.seconds) + 1,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
    )


def serve(app: FastAPI, listening: socket.socket, proxies: Sequence[str] = ()) -> None:
    """Serve requests until SIGINT or SIGTERM is received. See :func:`configured`."""
    for name in (
        "uvicorn",
        "python_multipart",
    ):  # malformed requests are reported to the client, not logged
        logging.getLogger(name).setLevel(logging.ERROR)
    # uvicorn rejects a malformed request twice. The second time raises an error, which ends the connection anyway.
    logging.getLogger("asyncio").addFilter(
        lambda record: LocalProtocolError not in (record.exc_info or ())
    )
    platforms.limit_files(FILES)
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        uvicorn.Server(configured(app, proxies)).run([listening])  # finally sends the signal again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
