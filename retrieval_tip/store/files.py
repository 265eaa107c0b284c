"""The files of an index in a folder, and the lock of a folder."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from retrieval_tip.arrays import KeyArray
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import (
    NotAFileError,
    delete,
    lock,
    make_folders,
    read_regular,
    replace,
    sha256_of,
    sync,
    temporary,
)
from retrieval_tip.store.manifest import SUFFIXES, DataFile
from retrieval_tip.wording import first_line, one_line

FAST_BYTES = 1 << 22
"""Maximum size in bytes of the files that a fast check hashes."""
LOCK_WAIT = 30.0
"""Number of seconds to wait for another writer."""
TRIES = 16
"""Number of attempts to acquire the lock if another writer keeps removing the folder."""
FILE_NAME = re.compile(rf"({'|'.join(SUFFIXES)})-[0-9a-f]{{16}}\.(npy|parquet|faiss)")


class StoreFiles(Protocol):
    """Files in a folder or in a bucket.

    Names are relative to the folder. A file is always read and written as a whole. Methods raise OSError if the disk
    refuses a request, and StoreError if a service does.
    """

    def get(self, name: str, most: int) -> bytes:
        """Read a file.

        Raises FileNotFoundError if it is missing, and StoreError if it has more than ``most`` bytes, is not a regular
        file or leads out of the folder.
        """

    def put(self, name: str, *chunks: bytes | memoryview) -> None:
        """Write or replace a file. Readers get either the complete old file or the complete new file."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, or return ``False`` if it already exists. Only one of several processes succeeds.

        In a folder, the caller must hold its lock. A server may store a file and then fail to acknowledge it. After
        ``False`` or a StoreError, check whether the file contains your data.
        """

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the names and sizes of the files in a folder, sorted by name."""

    def old(self, folder: str, age: timedelta) -> set[str]:
        """Return the names of the files in a folder that no running process has written.

        In a bucket, these are the files that were written at least ``age`` ago by the clock of the service. The clock
        of this machine may be wrong. In a folder, the caller must hold its lock, and these are all files.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Delete files. Missing files are ignored."""

    def flush(self, *folders: str) -> None:
        """Flush the entries of folders to disk. Each file is flushed before it gets its name."""

    def problem(self, file: DataFile, whole: bool = True) -> str | None:
        """Return how a file differs from its entry in a manifest, or ``None``.

        The digest is compared if the file is small or ``whole`` is true. A file of a table has no size in the manifest,
        and may be missing, because only earlier versions may need it.
        """


class LocalFiles:
    """Files in a folder, which messages call ``place`` (see :class:`StoreFiles`)."""

    def __init__(self, folder: Path, place: str) -> None:
        self.folder = folder
        self.place = place

    def get(self, name: str, most: int) -> bytes:
        path = self.folder / name
        shown = f"{self.place}/{name}"
        if not lies_in(self.folder, path):
            raise StoreError(
                f"{shown}: is a link that leads out of the index; replace it with the file itself"
            )
        try:
            return read_regular(path, most)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{shown}: cannot be read: {error.strerror}") from None
        except NotAFileError:
            raise StoreError(f"{shown}: is not a file; restore it") from None
        except InputError:
            raise StoreError(
                f"{shown}: damaged (more than {most:,} bytes); restore it, or build the index again"
            ) from None

    def put(self, name: str, *chunks: bytes | memoryview) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with temporary(path, clean=False) as new:
            with new.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            replace(new, path)

    def create(self, name: str, data: bytes) -> bool:
        if os.path.lexists(self.folder / name):
            return False
        self.put(name, data)
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            entries = sorted(os.scandir(self.folder / folder), key=lambda entry: entry.name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                return {}
            raise
        sizes = {}
        for entry in entries:
            with suppress(FileNotFoundError):  # just deleted
                sizes[f"{folder}/{entry.name}"] = entry.stat(follow_symlinks=False).st_size
        return sizes

    def old(self, folder: str, age: timedelta) -> set[str]:
        return set(self.sizes(folder))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            delete(self.folder / name)

    def flush(self, *folders: str) -> None:
        for folder in folders:
            sync(self.folder / folder)

    def problem(self, file: DataFile, whole: bool = True) -> str | None:
        path = self.folder / file.name
        shown = f"{self.place}/{file.name}"
        try:
            if not lies_in(self.folder, path):
                return f"{shown}: is a link that leads out of the index"
            if file.bytes and path.stat().st_size != file.bytes:
                return f"{shown}: damaged ({path.stat().st_size:,} bytes instead of {file.bytes:,})"
            if (whole or file.bytes <= FAST_BYTES) and sha256_of(path) != file.sha256:
                return f"{shown}: damaged (its SHA-256 does not match the manifest)"
        except FileNotFoundError:
            return f"{shown}: missing" if file.bytes else None
        except OSError as error:
            return f"{shown}: cannot be read: {error.strerror}"
        return None


def lies_in(folder: Path, path: Path) -> bool:
    """Return whether a path is inside the folder after all links are resolved."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that points to itself
        return False


def read_array(
    folder: Path,
    file: DataFile,
    shape: tuple[int, int],
    dtypes: Sequence[npt.DTypeLike] = (np.float32, np.float16),
) -> KeyArray:
    """Memory-map a ``.npy`` file in copy-on-write mode, so that torch can share the memory."""
    path = folder / file.name
    try:
        array: KeyArray = np.lib.format.open_memmap(path, mode="c")  # never unpickles
    except Exception as error:  # a damaged header can make numpy raise any error
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None
    if array.shape != shape or array.dtype not in dtypes:
        raise StoreError(
            f"{path}: an array of {array.dtype} {array.shape} does not match {shape} in the manifest"
        )
    return array


def check_name(folder: Path) -> None:
    """Raise StoreError if the name of a folder is not valid UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise StoreError(
            f"{shown}: the folder's name is not UTF-8, which FAISS needs; use another name"
        ) from None


@contextmanager
def locked(folder: Path, place: object) -> Iterator[None]:
    """Lock ``folder`` for writing inside the context, so that only one process can write to it at a time.

    The operating system locks a file in the folder, which contains the name of the owner, and releases the lock when
    the process ends.

    Waits up to :data:`LOCK_WAIT` seconds for another writer. The folder and its ``data`` folder are created first.
    Raises StoreError naming ``place`` if the lock is still held or cannot be acquired.
    """
    path = folder / "lock"
    data = folder / "data"
    held = None
    for left in reversed(range(TRIES)):
        try:
            make_folders(data)
            held = lock(path, os.O_RDWR | os.O_CREAT, wait=LOCK_WAIT)
            break
        except OSError as error:
            if not left or not isinstance(
                error, FileNotFoundError | FileExistsError
            ):  # else it was just removed
                reason = error.strerror or type(error).__name__
                raise StoreError(
                    one_line(f"{place}: cannot be written: {reason}; nothing was changed")
                ) from None
    if held is None:
        owner = _owner(path) or "another process"
        raise StoreError(one_line(f"{place}: is being written by {owner}; try later"))
    try:
        data.mkdir(exist_ok=True)
        with suppress(OSError):  # if the disk is full, the owner cannot write its name
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        with suppress(OSError):  # the file stays empty until the next owner writes its name
            os.truncate(path, 0)
        os.close(held)


def _owner(path: Path) -> str:
    with suppress(OSError):
        return ascii(path.read_text("utf-8", "replace")[:200].strip()).strip("'")
    return ""
