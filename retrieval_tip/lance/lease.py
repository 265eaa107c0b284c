"""Make sure that only one process at a time writes to a store.

On a local disk, the operating system locks a file (see :mod:`store.lock`). A bucket has no locks, so an object named
``lease`` is used instead. A process only replaces the object if the object still has the version that it has read
before (If-Match). A process takes the lease if it was released, or if it has not changed for :data:`LEASE` seconds
while the process watched it. The holder renews the lease more often than that. Each process only uses its own clock, so
the clocks of the machines do not have to agree.

A holder checks right before a commit whether the lease was lost. A commit creates a new object, so a holder that loses
the lease just after this check does not overwrite anything.
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
"""Number of seconds after which a holder that has not renewed its lease is considered dead."""
POLL = 0.2
"""Number of seconds between two checks of the lease by a waiting process."""
NAME = "lease"
MOST_BYTES = 1 << 14
"""Maximum size of a lease in bytes. A larger object is not a lease."""


@contextmanager
def held(objects: Objects, wait: float | None = None, seconds: float | None = None) -> Iterator[Callable[[], None]]:
    """Hold the write lock of a store inside the context.

    Waits up to ``wait`` seconds, which defaults to :data:`lock.LOCK_WAIT`. The context yields a function that you must
    call right before a commit. It raises StoreError if another process may have taken over the lock. In a bucket, the
    lock of a dead process expires after ``seconds``, which defaults to :data:`LEASE`. Raises StoreError if another
    process is writing, or if the disk or the service fails.
    """
    if objects.address.local is not None:
        with locked(objects.address.local, objects.address, wait):
            yield lambda: None  # the operating system enforces the lock
        return
    lease = _Lease(objects, LEASE if seconds is None else seconds)
    try:
        lease.take(lock.LOCK_WAIT if wait is None else wait)
        yield lease.still_held
    finally:
        lease.release()


class _Lease:
    """A lease in a bucket. It contains the name of the holder, so that each process can recognize its own lease."""

    def __init__(self, objects: Objects, seconds: float) -> None:
        self._objects, self._seconds, self._token, self._beats = objects, seconds, uuid.uuid4().hex, 0
        self._version: UpdateVersion | None = None
        self._lost: str | None = None
        self._renewed = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self, wait: float) -> None:
        """Acquire the lease within ``wait`` seconds. Raises StoreError if another process still holds it afterwards."""
        until, seen, since = time.monotonic() + wait, None, 0.0
        while True:
            look = said, version = self._look()
            now = time.monotonic()  # measured after the request, so that a lease never seems older than it is
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
        """Raise StoreError if another process has taken the lease, or if it cannot be read."""
        self._lost = self._lost or self._taken_by(self._look()[0])
        if self._lost is not None:
            text = f"{self._objects.address}: lost the right to write ({self._lost}); nothing changed; try again"
            raise StoreError(one_line(text))

    def release(self) -> None:
        """Release the lease. If this fails, the next writer only has to wait for the lease to expire."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()  # otherwise a late renewal would undo the release
        with suppress(StoreError):  # the lease may be ours even if take was interrupted
            said, version = self._look()
            if self._taken_by(said) is None:
                self._write(version, released=True)

    def _look(self) -> tuple[dict[str, object], UpdateVersion | None]:
        """Return the content of the lease and its version. A damaged lease has no content, so it expires."""
        try:
            content, version = self._objects.read(NAME, MOST_BYTES)
        except FileNotFoundError:
            return {}, None
        with suppress(ValueError, RecursionError):
            said = json.loads(content)
            return said if isinstance(said, dict) else {}, version
        return {}, version

    def _write(self, version: UpdateVersion | None, released: bool = False) -> bool:
        """Replace this version of the lease, or our own, and return whether the lease is ours now."""
        began, self._beats = time.monotonic(), self._beats + 1
        new = {"owner": this_process(), "token": self._token, "beat": self._beats, "released": released}
        content = json.dumps(new, indent=1).encode()
        written = self._objects.replace(NAME, content, version)
        if written is None:  # the server may have stored this or the last write without acknowledging it
            said, version = self._look()
            if self._taken_by(said) is None:
                written = version if said == new else self._objects.replace(NAME, content, version)
        if written is not None:
            self._version, self._renewed = written, began
        return written is not None

    def _renew(self) -> None:
        while self._lost is None and not self._ended.wait(self._seconds / 4):
            try:
                if not self._write(self._version):
                    self._lost = self._taken_by(self._look()[0])
            except StoreError as error:
                if time.monotonic() - self._renewed >= self._seconds:
                    self._lost = f"it could not be renewed: {error}"

    def _taken_by(self, said: dict[str, object]) -> str | None:
        return None if said.get("token") == self._token else f"it was taken over by {_owner(said)}"


def _owner(said: dict[str, object]) -> str:
    owner = said.get("owner")
    return ascii(owner[:200]).strip("'") if isinstance(owner, str) and owner else "another process"
