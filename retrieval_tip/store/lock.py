"""Lock a folder, so that only one process can write to it at a time.

The operating system locks a file in the folder, and releases the lock when the process ends. The file contains the name
of the owner.
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
"""Number of seconds to wait for another writer by default."""
POLL = 0.02
"""Number of seconds between two attempts to acquire the lock."""
TRIES = 16
"""Number of attempts to acquire the lock if another writer keeps removing the folder."""


@contextmanager
def locked(folder: Path, place: object, wait: float | None = None) -> Iterator[None]:
    """Lock ``folder`` for writing inside the context.

    Waits up to ``wait`` seconds for another writer. ``wait`` defaults to :data:`LOCK_WAIT`. The folder and its ``data``
    folder are created first. Raises StoreError naming ``place`` if the lock is still held or cannot be acquired.
    """
    path, data = folder / "lock", folder / "data"
    lock = filelock.FileLock(path)
    for left in reversed(range(TRIES)):
        try:
            make_folders(data)
            lock.acquire(timeout=LOCK_WAIT if wait is None else wait, poll_interval=POLL)
            break
        except filelock.Timeout:
            owner = _owner(path) or "another process"
            raise StoreError(one_line(f"{place}: is being written by {owner}; try later")) from None
        except OSError as error:
            if not left or not isinstance(error, FileNotFoundError | FileExistsError):  # else it was just removed
                reason = error.strerror or type(error).__name__
                raise StoreError(one_line(f"{place}: cannot be written: {reason}; nothing was changed")) from None
    try:
        data.mkdir(exist_ok=True)
        with suppress(OSError):  # if the disk is full, the owner cannot write its name
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        with suppress(OSError):  # the file stays empty until the next owner writes its name
            os.truncate(path, 0)
        lock.release()


def _owner(path: Path) -> str:
    with suppress(OSError):
        return ascii(path.read_text("utf-8", "replace")[:200].strip()).strip("'")
    return ""
