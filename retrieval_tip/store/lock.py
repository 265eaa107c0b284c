"""Lock a folder, so that only one process writes it at a time.

The lock is the system's lock on a file, so it ends with its process. The file's text names its owner.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from retrieval_tip.errors import StoreError, one_line
from retrieval_tip.files import make_folders

LOCK_WAIT = 30.0
"""Default seconds to wait for another writer."""
POLL = 0.02
"""Seconds between attempts to take the lock."""
TRIES = 16
"""Attempts to take a lock whose folder another writer removes meanwhile."""


@contextmanager
def locked(folder: Path, place: object, wait: float | None = None) -> Iterator[None]:
    """Lock ``folder`` for writing inside the context, after up to ``wait`` seconds (:data:`LOCK_WAIT` by default).

    Makes the folder and its ``data``, which another writer removes under its lock if it fails to make a first version.
    Raises StoreError naming ``place`` if the lock is still held or cannot be taken.
    """
    path, data = folder / "lock", folder / "data"
    lock = filelock.FileLock(path)
    for left in reversed(range(TRIES)):
        try:
            make_folders(data)
            lock.acquire(timeout=LOCK_WAIT if wait is None else wait, poll_interval=POLL)
            break
        except filelock.Timeout:
            raise busy(place, _owner(path)) from None
        except OSError as error:
            if not left or not isinstance(error, FileNotFoundError | FileExistsError):  # else it was removed just now
                reason = error.strerror or type(error).__name__
                raise StoreError(one_line(f"{place}: cannot be written: {reason}; nothing was changed")) from None
    try:
        data.mkdir(exist_ok=True)
        with suppress(OSError):  # on a full disk, the lock does not name its owner
            path.write_text(this_process(), "utf-8")
        yield
    finally:
        with suppress(OSError):  # until the next owner has written its name
            os.truncate(path, 0)
        lock.release()


def this_process() -> str:
    """Describe this process as the owner of a lock."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def busy(place: object, owner: str) -> StoreError:
    """Return the error for a place that another process still writes."""
    return StoreError(one_line(f"{place}: is being written by {owner or 'another process'}; try later"))


def _owner(path: Path) -> str:
    with suppress(OSError):
        return ascii(path.read_text("utf-8", "replace")[:200].strip()).strip("'")
    return ""
