"""Files that others name: opened only where they are regular ones, so that no pipe, device or socket holds us up."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from retrieval_tip.errors import InputError, one_line, show

FOLDER = "a folder"
KERNEL = "made up by the kernel"

HASHED_AT_A_TIME = 1 << 24
"""Bytes: between two blocks a thread waits for the interpreter's lock, milliseconds while another one imports."""

LOCK_POLL = 0.05
"""Seconds between two looks at a folder that another process has locked."""
LOCK_TRIES = 4
"""Times that a temporary file is made under another name because it was removed before it was locked."""

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: FOLDER,
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NotAFileError(InputError):
    """A path that leads to no regular file; ``kind`` says what is there: a folder, a pipe, a device or a socket.

    Or a file that the kernel makes up, in ``/proc`` or ``/sys``.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(f"{one_line(os.fspath(path))}: {kind}, not a file")
        self.kind = kind


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, or what a link leads to, opened to be read, without ever waiting for it.

    What is no regular file is not even opened: that alone would wake whoever writes to a pipe, and rewind a tape.

    Raises NotAFileError, which names the path and what it is; OSError and ValueError as ``open`` does: no such file, no
    permission, no name that a file can have.
    """
    _check(Path(path).stat(), path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check(os.fstat(descriptor), path)  # another may have come in its place
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise as :func:`open_regular` does, before a library opens a file by its name; and OSError where it is empty."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise OSError(errno.ENODATA, "the file is empty", os.fspath(path))


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a regular file, as many as it says that it has.

    Raises InputError where these are more than ``most``, unread, and else as :func:`open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise InputError(f"{one_line(os.fspath(path))}: {size:,} bytes are more than it may have ({most:,})")
        return file.read(size)


def real(path: str | os.PathLike[str]) -> Path:
    """A path with its links followed; of one that leads in a circle, as far as they lead: ``resolve`` raises there."""
    return Path(os.path.realpath(path))


def make_folders(path: str | os.PathLike[str]) -> None:
    """A folder and those above it that are not there; ``Path.mkdir`` calls itself for each, and ends at a thousand.

    Raises OSError as ``mkdir`` does: something else has the name of one, it is too long, no permission.
    """
    missing, folder = [Path(path)], Path(path)
    while not _is_there(folder) and folder != folder.parent:
        folder = folder.parent
        missing.append(folder)
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _check(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotAFileError(path, _KINDS.get(stat.S_IFMT(status.st_mode), "something else"))
    if status.st_dev in _kernel_devices():  # says that it is regular, and may have no end or never answer: /proc/kmsg
        raise NotAFileError(path, KERNEL)


@cache
def _kernel_devices() -> frozenset[int]:
    return frozenset(folder.stat().st_dev for folder in (Path("/proc"), Path("/sys")) if folder.is_mount())


def cache_folder() -> Path | None:
    """``$RETRIEVAL_TIP_CACHE``, else ``retrieval-tip`` in the user's cache folder; ``None`` where there is no home."""
    if own := os.environ.get("RETRIEVAL_TIP_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrieval-tip"
    except RuntimeError:  # as in some containers
        return None


def sync(folder: Path) -> None:
    """Flush a folder's entries, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that takes the name ``path`` in the end (:func:`temporary`); a link is written through.

    Raises InputError where ``path`` cannot be written; then nothing is left of it.
    """
    place = Path(os.path.realpath(path))
    try:
        if place.exists() and not place.is_file():
            raise InputError(f"{show(path)}: cannot be written: not a file")
        with temporary(place) as new:
            yield new
            new.replace(place)
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be written: {error.strerror or error}") from None


@contextmanager
def temporary(place: Path, *, folder: bool = False) -> Iterator[Path]:
    """Make an empty file or folder ``.NAME.HEX.tmp`` beside ``place``, and remove it in the end if it is still there.

    First remove those of the same NAME that killed processes left. Raises OSError.
    """
    remove_leftovers(place.parent, place.name)
    new, lock = place, None
    for _ in range(LOCK_TRIES):
        new = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
        new.mkdir() if folder else new.touch(exist_ok=False)
        lock = _lock(new)
        if new.exists():  # else another process took it for a leftover before it was locked
            break
    try:
        yield new
    finally:
        _remove(new)
        if lock is not None:
            os.close(lock)


def remove_leftovers(folder: Path, name: str | None = None) -> int:
    """Remove temporary files and folders that killed processes left beside ``name``, or beside any file of a folder.

    What :func:`temporary` made is locked by the process that uses it, and the system unlocks it when that process ends.
    Returns the number of bytes of the files.
    """
    freed = 0
    with suppress(OSError):
        for entry in os.scandir(folder):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None or name not in (None, match[1]) or (lock := _lock(Path(entry.path))) is None:
                continue
            freed += os.fstat(lock).st_size * entry.is_file()
            _remove(Path(entry.path))
            os.close(lock)
    return freed


@contextmanager
def locked_folder(folder: Path, *, alone: bool, wait: float) -> Iterator[bool]:
    """Lock a folder, alone or with all who do not want it alone, and yield whether it is locked.

    It is not if another process locks it for longer than ``wait`` seconds.
    """
    until, lock = time.monotonic() + wait, _lock(folder, alone=alone)
    while lock is None and time.monotonic() < until:
        time.sleep(LOCK_POLL)
        lock = _lock(folder, alone=alone)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _lock(path: Path, *, alone: bool = True) -> int | None:
    """Lock a file or a folder and return its descriptor; ``None`` where it is something else, or is locked."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with suppress(OSError):
        if stat.S_IFMT(os.fstat(lock).st_mode) in (stat.S_IFREG, stat.S_IFDIR):
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return lock
    os.close(lock)
    return None


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, where that can be done."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest, size = hashlib.sha256(), path.stat().st_size
    block = bytearray(min(max(size, 1), HASHED_AT_A_TIME))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            digest.update(memoryview(block)[:read])
    return digest.hexdigest()
