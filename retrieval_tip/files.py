"""Files that others name: opened only where they are regular ones, so that no pipe, device or socket holds us up."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
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
    """A place to write a file that takes the name ``path`` when it is whole; a link is written through.

    Raises InputError where ``path`` cannot be written; then nothing is left of it.
    """
    place = Path(os.path.realpath(path))
    temporary = place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        if place.exists() and not place.is_file():
            raise InputError(f"{show(path)}: cannot be written: not a file")
        yield temporary
        temporary.replace(place)
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest, size = hashlib.sha256(), path.stat().st_size
    block = bytearray(min(max(size, 1), HASHED_AT_A_TIME))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            digest.update(memoryview(block)[:read])
    return digest.hexdigest()
