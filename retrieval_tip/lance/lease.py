"""One writer at a time.

On a local disk that is the system's lock on a file (:mod:`store.lock`). A bucket has no locks, so there it is one
object, ``lease``, which is only written in place of the version that was read before (If-Match). Whoever replaces one
that was released, or that has not changed for :data:`LEASE` seconds while one looked at it, holds it. The holder
changes it more often than that, so clocks of two machines need not agree.

A holder that was stopped for longer learns that it lost the lease when it asks, right before it commits. What is
committed is an object that is created, so even one that loses it a moment later replaces nothing.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from retrieval_tip.errors import StoreError, one_line
from retrieval_tip.lance.objects import Objects
from retrieval_tip.store import lock
from retrieval_tip.store.lock import busy, locked, this_process

if TYPE_CHECKING:
    from obstore import UpdateVersion

LEASE = 20.0
"""Seconds without a sign of life after which a holder in a bucket counts as dead; it gives four in that time."""
POLL = 0.2
"""Seconds between two looks of a waiter at a bucket."""
NAME = "lease"
MOST_BYTES = 1 << 14
"""A lease that is larger was not written here."""


@contextmanager
def held(objects: Objects, wait: float | None = None, seconds: float | None = None) -> Iterator[Callable[[], None]]:
    """Be the one writer of a store within the context; wait for it up to ``wait`` seconds (:data:`lock.LOCK_WAIT`).

    Yields a function to be called right before a commit, which raises StoreError if another may have taken over. A
    process that died holds it for ``seconds`` (:data:`LEASE`) in a bucket, and no longer on a disk. Raises StoreError
    if another one writes, or the disk or the service fails.
    """
    if objects.address.local is not None:
        with locked(objects.address.local, objects.address, wait):
            yield lambda: None  # the system keeps it
        return
    lease = _Lease(objects, LEASE if seconds is None else seconds)
    try:
        lease.take(lock.LOCK_WAIT if wait is None else wait)
        yield lease.still_held
    finally:
        lease.release()


class _Lease:
    """The lease in a bucket. All that is written says whose it is, so that nobody takes another's for its own."""

    def __init__(self, objects: Objects, seconds: float) -> None:
        self._objects, self._seconds, self._token, self._beats = objects, seconds, uuid.uuid4().hex, 0
        self._version: UpdateVersion | None = None
        self._lost: str | None = None
        self._renewed = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)

    def take(self, wait: float) -> None:
        """Get it within so many seconds. Raises StoreError where another holds it for longer."""
        until, seen, since = time.monotonic() + wait, None, 0.0
        while True:
            look = said, version = self._look()
            now = time.monotonic()  # after the look: what is seen is not older
            if look != seen:
                seen, since = look, now
            free = version is None or said.get("released") is True or now - since >= self._seconds
            if free and self._write(version):
                break
            if time.monotonic() >= until:
                raise busy(self._objects.address, _owner(said))
            time.sleep(max(0.0, min(POLL, self._seconds / 8, until - time.monotonic())))
        self._thread.start()

    def still_held(self) -> None:
        """Look whether it was taken. Raises StoreError where it was, or where that cannot be found out."""
        self._lost = self._lost or self._taken_by(self._look()[0])
        if self._lost is not None:
            text = f"{self._objects.address}: lost the right to write ({self._lost}); nothing was changed, try again"
            raise StoreError(one_line(text))

    def release(self) -> None:
        """Let the next one have it. What fails here costs that one some seconds, and nothing else."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()  # or else a late sign of life would take the release back
        with suppress(StoreError):  # one that was interrupted while it took the lease may have it, too
            said, version = self._look()
            if self._taken_by(said) is None:
                self._write(version, released=True)

    def _look(self) -> tuple[dict[str, object], UpdateVersion | None]:
        """The facts of the lease and its version; ``None`` where there is none.

        One that is damaged has no facts, and ends as that of a dead holder does.
        """
        try:
            content, version = self._objects.read(NAME, MOST_BYTES)
        except FileNotFoundError:
            return {}, None
        with suppress(ValueError, RecursionError):
            said = json.loads(content)
            return said if isinstance(said, dict) else {}, version
        return {}, version

    def _write(self, version: UpdateVersion | None, released: bool = False) -> bool:
        """Replace this version, or one of ours, by what says that this process lives; whether that lies there now."""
        began, self._beats = time.monotonic(), self._beats + 1
        new = {"owner": this_process(), "token": self._token, "beat": self._beats, "released": released}
        content = json.dumps(new, indent=1).encode()
        written = self._objects.replace(NAME, content, version)
        if written is None:  # a server can keep what it then fails to acknowledge: this, or the one before
            said, version = self._look()
            if self._taken_by(said) is None:
                written = version if said == new else self._objects.replace(NAME, content, version)
        if written is not None:
            self._version, self._renewed = written, began
        return written is not None

    def _live(self) -> None:
        """Give signs of life until it is released or lost."""
        while self._lost is None and not self._ended.wait(self._seconds / 4):
            try:
                if not self._write(self._version):
                    self._lost = self._taken_by(self._look()[0])
            except StoreError as error:
                if time.monotonic() - self._renewed >= self._seconds:
                    self._lost = f"it could not be renewed: {error}"

    def _taken_by(self, said: dict[str, object]) -> str | None:
        """The loss of the lease, in words; ``None``: it is ours."""
        return None if said.get("token") == self._token else f"it was taken over by {_owner(said)}"


def _owner(said: dict[str, object]) -> str:
    owner = said.get("owner")
    return ascii(owner[:200]).strip("'") if isinstance(owner, str) and owner else "another process"
