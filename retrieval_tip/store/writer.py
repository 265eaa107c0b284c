"""Write the next version of an index folder.

The data files are written, flushed and renamed first, and the manifest last. If the process is killed, the old version
stays current, and the next writer removes the leftover files.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.errors import InputError, StoreError, UsageError, first_line
from retrieval_tip.files import sha256_of, sync
from retrieval_tip.store import history, lock
from retrieval_tip.store.folder import (
    check_name,
    check_there,
    earlier_paths,
    is_index,
    lies_in,
    manifest_bytes,
    manifest_name,
    read_manifest,
)
from retrieval_tip.store.manifest import SUFFIXES, DataFile, Manifest, named_in

_ZEROS = bytes(1 << 20)
_ANY_KIND, _ANY_SUFFIX = "|".join(SUFFIXES), "|".join(sorted({suffix[1:] for suffix in SUFFIXES.values()}))
FILE_NAME = re.compile(rf"({_ANY_KIND})-[0-9a-f]{{16}}\.({_ANY_SUFFIX})")
TEMPORARY = re.compile(rf"\.(({_ANY_KIND})-[0-9a-f]{{32}}\.\w+|(manifest|\d+)\.json\.[0-9a-f]{{32}})\.tmp")


class Writer:
    """A writer of a new version of an index folder. Use :func:`write` to create one."""

    def __init__(self, folder: Path, parent: Manifest | None) -> None:
        self.folder, self.parent = folder, parent
        self.current = parent
        self._staged: list[Path] = []
        self._files: dict[str, DataFile] = {}

    def stage(self, kind: str) -> Path:
        """Return a temporary path for a data file of this kind. Write the file there before you call :meth:`seal`."""
        path = self.folder / "data" / f".{kind}-{uuid.uuid4().hex}{SUFFIXES[kind]}.tmp"
        self._staged.append(path)
        return path

    def stage_array(
        self, kind: str, shape: tuple[int, int], dtype: npt.DTypeLike
    ) -> tuple[Path, npt.NDArray[np.floating]]:
        """Stage a writable memory-mapped array, and return its path and the array.

        The disk space is reserved in advance, because a full disk would otherwise cause a SIGBUS.
        """
        path = self.stage(kind)
        with path.open("wb") as file:
            _write_header(file, shape, dtype)
            start = file.tell()
            size = math.prod(shape) * np.dtype(dtype).itemsize
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), start, size)
            else:  # on macOS, space is only reserved by writing
                for at in range(0, size, len(_ZEROS)):
                    file.write(_ZEROS[: size - at])
        return path, np.lib.format.open_memmap(path, mode="r+")

    def seal(self, kind: str, staged: Path, rows: int, digest: str | None = None) -> Path:
        """Flush a staged file to disk, rename it by its digest, and return the new path.

        If you do not pass the SHA-256 as ``digest``, the file is read again.
        """
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        digest = digest or sha256_of(staged)
        entry = DataFile(f"data/{kind}-{digest[:16]}{SUFFIXES[kind]}", rows, staged.stat().st_size, digest)
        self._files[kind], path = entry, self.folder / entry.name
        staged.replace(path)
        self._staged.remove(staged)
        return path

    def seal_array(self, kind: str, array: npt.NDArray[np.floating]) -> None:
        """Write a two-dimensional array as the data file of this kind."""
        staged, header, data = self.stage(kind), io.BytesIO(), np.ascontiguousarray(array).data
        _write_header(header, array.shape, array.dtype)
        with staged.open("wb") as file:  # a memory-mapped file would count towards this process's memory
            file.write(header.getvalue())
            file.write(data)
        digest = hashlib.sha256(header.getvalue())
        digest.update(data)
        self.seal(kind, staged, len(array), digest.hexdigest())

    def seal_table(self, kind: str, table: pa.Table) -> None:
        """Write a table as the data file of this kind. Raises InputError if Parquet cannot store a column."""
        staged = self.stage(kind)
        try:
            with staged.open("wb") as file:
                pq.write_table(table, file)
        except pa.ArrowException as error:
            raise InputError(f"{kind}: cannot store a column ({first_line(error)})") from None
        self.seal(kind, staged, len(table))

    def keep(self, kind: str) -> None:
        """Share the data file of this kind with the parent version."""
        assert self.parent is not None
        self._files[kind] = self.parent.files[kind]

    def keep_all(self) -> None:
        """Share every data file with the parent version."""
        assert self.parent is not None
        self._files |= self.parent.files

    def discard(self, staged: Path) -> None:
        """Delete a staged file."""
        staged.unlink(missing_ok=True)
        self._staged.remove(staged)

    def commit(self, manifest: Manifest) -> None:
        """Make the sealed files the current version by renaming the manifest.

        Raises InputError if the manifest contains a value that cannot be stored.
        """
        raw = history.sealed(manifest, self.folder)
        sync(self.folder / "data")
        if self.parent is not None:
            earlier = self.folder / "manifests"
            earlier.mkdir(exist_ok=True)
            _write(earlier / manifest_name(self.parent), (self.folder / "manifest.json").read_bytes())
            sync(earlier)
        sync(self.folder)
        _write(self.folder / "manifest.json", raw)
        # The new version is committed, so nothing below may raise an error. The next writer completes the rest.
        sync(self.folder)
        sync(self.folder.parent)
        with suppress(OSError, StoreError):
            _forget(self.folder, history.KEPT_VERSIONS)
        self.current = manifest

    @property
    def files(self) -> dict[str, DataFile]:
        """Data files that have been sealed or kept so far, by kind."""
        return {kind: self._files[kind] for kind in SUFFIXES if kind in self._files}

    def abandon(self) -> None:
        """Remove the staged files. The next writer removes sealed files to which no manifest refers."""
        for path in self._staged:
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def write(folder: Path, wait: float | None = None) -> Iterator[Writer]:
    """Lock a folder and yield the writer of its next version.

    Waits up to ``wait`` seconds for other writers; ``wait`` defaults to :data:`lock.LOCK_WAIT`. If an exception is
    raised or the process is killed, the old version stays current. Raises StoreError if the folder contains other
    files, stays locked or cannot be written, or if the disk is full.
    """
    check_name(folder)
    own = ("data", "manifests", "lock")  # if the first version failed, only these and temporary files are left
    for name in (*own, "manifest.json"):
        if not lies_in(folder, folder / name):
            raise StoreError(f"{folder / name}: is a link that leads out of the index; nothing was changed")
    made: list[Path] = []
    try:
        made += [path for path in (folder, *folder.parents) if not path.exists()]
        if folder.is_file():
            raise StoreError(f"{folder}: is a file, not a folder; give another --out")
        others = [name for name in _names_in(folder) if name not in own and not TEMPORARY.fullmatch(name)]
        if others and not is_index(folder):
            raise StoreError(f"{folder}: is not an index and not empty; give an empty or new folder")
        with lock.locked(folder, folder, wait):
            try:
                parent = _current(folder)
                _tidy(folder, parent)
                writer = Writer(folder, parent)
                try:
                    yield writer
                except BaseException:
                    writer.abandon()
                    with suppress(StoreError):
                        _tidy(folder, _current(folder))  # an interrupted commit may still have succeeded
                    raise
                writer.abandon()
                _tidy(folder, writer.current)
            finally:
                if not is_index(folder):
                    _remove_own(folder)
    except OSError as error:
        raise StoreError(
            f"{error.filename2 or error.filename or folder}: cannot be written: {error.strerror or error}; "
            "nothing was changed"
        ) from error
    finally:
        with suppress(OSError):  # a folder that contains files of another writer is kept
            for path in made if not is_index(folder) else ():
                path.rmdir()


def _names_in(folder: Path) -> list[str]:
    """List a folder. Call this before :func:`is_index`, because another writer may create an index in between."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []


def _remove_own(folder: Path) -> None:
    """Remove the files that a failed first version left behind. Only call this while you hold the lock."""
    with suppress(OSError):
        for empty in (folder / "manifests", folder / "data"):
            if empty.exists():
                empty.rmdir()
        (folder / "lock").unlink()


def _current(folder: Path) -> Manifest | None:
    return read_manifest(folder) if is_index(folder) else None


def _tidy(folder: Path, current: Manifest | None) -> None:
    """Remove temporary files, and data files to which no manifest refers."""
    try:
        if current is not None:  # this file was archived for a version that was never committed
            (folder / "manifests" / manifest_name(current)).unlink(missing_ok=True)
        raws = [manifest_bytes(folder, path) for path in earlier_paths(folder)]
        names = [named_in(raw) for raw in raws] + [{file.name for file in current.data_files} if current else set()]
        if None in names:
            return  # a damaged manifest may refer to any of the files
        named = {folder / name for part in names for name in part or ()}
        paths = [*(folder / "data").iterdir(), *folder.glob(".*.tmp"), *folder.glob("manifests/.*.tmp")]
    except (OSError, StoreError):
        return
    for path in (path for path in paths if path not in named):
        if FILE_NAME.fullmatch(path.name) or TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):  # fails unless the folder is empty
        (folder / "manifests").rmdir()


def collect(folder: Path, keep: int = 1) -> tuple[list[int], int]:
    """Delete all versions except the last ``keep``, and the files that only the deleted versions use.

    Return the deleted version numbers and the number of freed bytes. If a reader still uses a deleted version, it can
    finish if the operating system allows removing open files. Raises UsageError if ``keep`` is below 1, and the errors
    of :func:`write`.
    """
    if keep < 1:
        raise UsageError(f"keep is {keep}: expected at least 1, because the current version is always kept")
    check_there(folder)
    with write(folder) as writer:
        before = _size(folder)
        gone = _forget(folder, keep)
        _tidy(folder, writer.current)
        return gone, before - _size(folder)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (*folder.glob("data/*"), *folder.glob("manifests/*")))


def _forget(folder: Path, keep: int) -> list[int]:
    """Remove the manifests of all but the last ``keep`` versions, and return the removed version numbers."""
    paths = earlier_paths(folder)
    gone = paths[: max(0, len(paths) + 1 - keep)]
    for path in gone:
        path.unlink()
    return [int(path.stem) for path in gone if path.stem.isdecimal()]


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
