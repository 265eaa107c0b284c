"""The lock of a folder: one process at a time writes what lies in it.

It is the system's lock on a file, so it ends with the process that holds it; the file's text says who that is.
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
"""Seconds that a writer waits for another one, where it is not told."""
POLL = 0.02
"""Seconds between two looks of a writer that waits."""
TRIES = 16
"""Times that a lock is taken anew because its folder was removed meanwhile."""


@contextmanager
def locked(folder: Path, place: object, wait: float | None = None) -> Iterator[None]:
    """The right to write a folder, within the context; a writer waits its turn, up to ``wait`` seconds.

    By default that is :data:`LOCK_WAIT`. The folder and its ``data`` are made; another writer that fails to make a
    first version removes them under its lock. Raises StoreError, which calls the folder ``place``, where another holds
    the lock for longer, or it cannot be had.
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
            if not left or not isinstance(error, FileNotFoundError | FileExistsError):  # else removed just now
                reason = error.strerror or type(error).__name__
                raise StoreError(one_line(f"{place}: cannot be written: {reason}; nothing was changed")) from None
    try:
        data.mkdir(exist_ok=True)
        with suppress(OSError):  # a full disk: then the lock does not name its owner
            path.write_text(this_process(), "utf-8")
        yield
    finally:
        with suppress(OSError):  # the next owner may take a moment to say who it is, and is not this one
            os.truncate(path, 0)
        lock.release()


def this_process() -> str:
    """The owner of what this process writes."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def busy(place: object, owner: str) -> StoreError:
    """The error of a writer that has waited long enough."""
    return StoreError(one_line(f"{place}: is being written by {owner or 'another process'}; try later"))


def _owner(path: Path) -> str:
    with suppress(OSError):
        return ascii(path.read_text("utf-8", "replace")[:200].strip()).strip("'")
    return ""
