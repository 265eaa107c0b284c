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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from retrieval_tip.errors import StoreError, one_line
from retrieval_tip.lance.objects import Objects
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


class Lease:
    """The right to write. This one, of a disk, is never lost: the system keeps it."""

    def still_held(self) -> None:
        """Ask right before a commit. Raises StoreError where another may have taken it meanwhile."""


@contextmanager
def held(objects: Objects, wait: float) -> Iterator[Lease]:
    """The right to be the one writer of a store, within the context; one waits its turn, up to ``wait`` seconds.

    Any exception ends it too. One whose process died holds it for :data:`LEASE` seconds in a bucket, and no longer at
    all on a disk. Raises StoreError: another one writes, or the disk or the service fails.
    """
    address = objects.address
    if address.local is None:
        lease = _Renewed(objects)
        try:
            lease.take(wait)
            yield lease
        finally:
            lease.release()
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(address.local, address, wait))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StoreError(one_line(f"{address}/lock: cannot be locked: {reason}; nothing was changed")) from None
        yield Lease()


class _Renewed(Lease):
    """The lease in a bucket. All that is written says whose it is, so that nobody takes another's for its own."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._token, self._beats = objects, uuid.uuid4().hex, 0
        self._version: UpdateVersion | None = None
        self._lost: str | None = None
        self._renewed = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)

    def take(self, wait: float) -> None:
        """Get it within so many seconds. Raises StoreError where another holds it for longer."""
        until = time.monotonic() + wait
        seen, since = None, 0.0
        while True:
            look = content, version = self._look()
            now = time.monotonic()  # after the look: what is seen is not older
            if look != seen:
                seen, since = look, now
            free = version is None or _read(content).get("released") is True or now - since >= LEASE
            if free and self._write(version):
                break
            if time.monotonic() >= until:
                raise busy(self._objects.address, _owner(content))
            time.sleep(max(0.0, min(POLL, LEASE / 8, until - time.monotonic())))
        self._thread.start()

    def still_held(self) -> None:
        """Look whether it was taken. Raises StoreError where it was, or where that cannot be found out."""
        if self._lost is None and not self._is_own(content := self._look()[0]):
            self._lose(content)
        if self._lost is not None:
            address = self._objects.address
            raise StoreError(
                one_line(f"{address}: lost the right to write ({self._lost}); nothing was changed, try again")
            )

    def release(self) -> None:
        """Let the next one have it. What fails here costs that one :data:`LEASE` seconds, and nothing else."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()  # or else a late sign of life would take the release back
        with suppress(StoreError):  # one that was interrupted while it took the lease may have it, too
            content, version = self._look()
            if self._is_own(content):
                self._write(version, released=True)

    def _look(self) -> tuple[bytes, UpdateVersion | None]:
        """The object and its version; ``None`` where there is none."""
        try:
            return self._objects.read(NAME, MOST_BYTES)
        except FileNotFoundError:
            return b"", None

    def _write(self, version: UpdateVersion | None, released: bool = False) -> bool:
        """Replace this version, or one of ours, by what says that this process lives; whether that lies there now."""
        began = time.monotonic()
        self._beats += 1
        said = {"owner": this_process(), "token": self._token, "beat": self._beats, "released": released}
        content = json.dumps(said, indent=1).encode()
        written = self._objects.replace(NAME, content, version)
        if written is None:  # a server can keep what it then fails to acknowledge
            there, version = self._look()
            if there == content:
                written = version
            elif self._is_own(there):
                written = self._objects.replace(NAME, content, version)
        if written is not None:
            self._version, self._renewed = written, began
        return written is not None

    def _live(self) -> None:
        """Give signs of life until it is released or lost."""
        while self._lost is None and not self._ended.wait(LEASE / 4):
            try:
                if not self._write(self._version):
                    self._lose(self._look()[0])
            except StoreError as error:
                if time.monotonic() - self._renewed >= LEASE:
                    self._lost = f"it could not be renewed: {error}"

    def _is_own(self, content: bytes) -> bool:
        return _read(content).get("token") == self._token

    def _lose(self, content: bytes) -> None:
        self._lost = f"it was taken over by {_owner(content) if content else 'somebody who removed it'}"


def _read(content: bytes) -> dict[str, Any]:
    """The facts of a lease; none where it is damaged, and then it ends as that of a dead holder does."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _owner(content: bytes) -> str:
    owner = _read(content).get("owner")
    return ascii(owner[:200]).strip("'") if isinstance(owner, str) and owner else "another process"
