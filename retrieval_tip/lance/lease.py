"""One writer at a time.

On a local disk that is the system's lock on a file, which ends with the process that holds it. A bucket has no locks,
so there it is a chain of objects, ``lock/00000017``: whoever creates the next number holds the lease, and may do so
when the last one was released, or has not changed for :data:`LEASE` seconds while one looked at it. The holder changes
it more often than that, so clocks of two machines need not agree.

A holder that was stopped for longer learns that it lost the lease when it asks, right before it commits. What is
committed is an object that is created, so even one that loses it a moment later replaces nothing.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from retrieval_tip.errors import StoreError, one_line
from retrieval_tip.files import make_folders
from retrieval_tip.lance.objects import Address, Objects

LEASE = 20.0
"""Seconds without a sign of life after which a holder in a bucket counts as dead; it gives four in that time."""
POLL, LOCAL_POLL = 0.2, 0.02
"""Seconds between two looks of a waiter: at a service, at a disk."""
MOST_BYTES = 1 << 14
"""A lease that is larger was not written here."""
_TRIES = 16
"""Times that a lock is taken anew because its folder was removed meanwhile."""

_LINK = re.compile(r"lock/(\d{8})")


class Lease:
    """That this process may write. This one is never lost: the system keeps it."""

    def still_held(self) -> None:
        """Ask right before a commit. Raises StoreError where another may have taken it meanwhile."""


@contextmanager
def held(objects: Objects, address: Address, wait: float) -> Iterator[Lease]:
    """Be the one writer of a store, within the context; another one waits its turn, up to ``wait`` seconds.

    Any exception ends it too. One whose process died holds it for :data:`LEASE` seconds in a bucket, and no longer at
    all on a disk. Raises StoreError: another one writes, or the disk or the service fails.
    """
    with _locked(address, address.local, wait) if address.local is not None else _leased(objects, address, wait) as own:
        yield own


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _busy(address: Address, owner: str) -> StoreError:
    return StoreError(one_line(f"{address}: is being written by {owner or 'another process'}; try later"))


@contextmanager
def _locked(address: Address, folder: Path, wait: float) -> Iterator[Lease]:
    path = folder / "lock"
    lock = filelock.FileLock(path)
    try:
        for left in reversed(range(_TRIES)):
            try:
                make_folders(folder)
                lock.acquire(timeout=wait, poll_interval=LOCAL_POLL)
                break
            except FileNotFoundError:  # removed just now
                if not left:
                    raise
    except filelock.Timeout:
        text = ""
        with suppress(OSError):
            text = ascii(path.read_text("utf-8", "replace")[:200].strip()).strip("'")
        raise _busy(address, text) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StoreError(one_line(f"{address}/lock: cannot be locked: {reason}; nothing was changed")) from None
    try:
        with suppress(OSError):  # Windows lets nobody write a locked file, and then it just has no name
            path.write_text(_me(), "utf-8")
        yield Lease()
    finally:
        with suppress(OSError):  # the next owner may take a moment to say who it is, and is not this one
            os.truncate(path, 0)
        lock.release()


@contextmanager
def _leased(objects: Objects, address: Address, wait: float) -> Iterator[Lease]:
    lease = _Chained(objects, address)
    try:
        lease.take(wait)
        yield lease
    finally:
        lease.release()


class _Chained(Lease):
    """The lease in a bucket. All that is written says whose it is, so that nobody takes another's for its own."""

    def __init__(self, objects: Objects, address: Address) -> None:
        self._objects, self._address = objects, address
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._name: str | None = None
        self._lost: str | None = None
        self._renewed = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, wait: float) -> None:
        """Get it within so many seconds. Raises StoreError where another holds it for longer."""
        until = time.monotonic() + wait
        last, content, since = "", b"", 0.0
        while True:
            chain = self._chain()
            now = time.monotonic()  # after the look: what is seen is not older
            found = b""
            if chain:
                try:
                    found = self._objects.get(chain[-1], MOST_BYTES)
                except FileNotFoundError:  # the next holder removed it
                    chain, found = [chain[-1]], b"gone"
                if (chain[-1], found) != (last, content):
                    last, content, since = chain[-1], found, now
            free = not chain or _read(found).get("released") is True or now - since >= LEASE
            if free and self._create(chain[-1] if chain else "lock/00000000"):
                break
            if time.monotonic() >= until:
                raise _busy(self._address, _owner(found))
            time.sleep(max(0.0, min(POLL, LEASE / 8, until - time.monotonic())))
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self._thread.start()
        with suppress(StoreError):  # the next one removes them
            self._objects.delete([name for name in self._chain() if name < self._held])

    def still_held(self) -> None:
        """Look whether it was taken. Raises StoreError where it was, or where that cannot be found out."""
        if self._lost is None:
            self._look()
        if self._lost is not None:
            raise StoreError(
                one_line(f"{self._address}: lost the right to write ({self._lost}); nothing was changed, try again")
            )

    def release(self) -> None:
        """Let the next one have it. What fails here costs that one :data:`LEASE` seconds, and nothing else."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()  # or else a late sign of life would take the release back
        if self._name is None or self._lost is not None:
            return
        with suppress(StoreError, FileNotFoundError):
            if self._thread is not None or self._is_mine(self._name):  # else it was interrupted while it took it
                self._objects.put(self._name, self._content(released=True))

    @property
    def _held(self) -> str:
        assert self._name is not None
        return self._name

    def _create(self, last: str) -> bool:
        """Create what comes after the last one; whether it is ours and the last."""
        name = f"lock/{int(last[-8:]) + 1:08d}"
        self._name, self._renewed = name, time.monotonic()
        if self._objects.create(name, self._content()) or self._is_mine(name):
            if self._chain()[-1:] == [name]:
                return True
            # Others went on meanwhile, and removed the one that had this number.
            self._objects.delete([name])
        self._name = None
        return False

    def _is_mine(self, name: str) -> bool:
        """Whether an object is ours after all: a server can keep what it then fails to acknowledge."""
        try:
            return _read(self._objects.get(name, MOST_BYTES)).get("token") == self._token
        except FileNotFoundError:
            return False

    def _chain(self) -> list[str]:
        return [name for name in self._objects.names("lock") if _LINK.fullmatch(name)]

    def _content(self, released: bool = False) -> bytes:
        self._beats += 1
        return json.dumps(
            {"owner": _me(), "token": self._token, "beat": self._beats, "released": released}, indent=1
        ).encode()

    def _look(self) -> None:
        chain = self._chain()
        if chain[-1:] != [self._held]:
            owner = "another process"
            with suppress(StoreError, FileNotFoundError):
                owner = _owner(self._objects.get(chain[-1], MOST_BYTES)) if chain else "somebody who removed it"
            self._lost = f"it was taken over by {owner}"

    def _live(self) -> None:
        """Give signs of life until it is released or lost."""
        while self._lost is None and not self._ended.wait(LEASE / 4):
            began = time.monotonic()
            try:
                self._look()  # first: what was taken over is not written again
                if self._lost is None:
                    self._objects.put(self._held, self._content())
                    self._renewed = began
            except StoreError as error:
                if time.monotonic() - self._renewed >= LEASE:
                    self._lost = f"it could not be renewed: {error}"


def _read(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing where it is damaged, and then it ends as that of a dead holder does."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _owner(content: bytes) -> str:
    owner = _read(content).get("owner")
    return ascii(owner[:200]).strip("'") if isinstance(owner, str) and owner else "another process"
