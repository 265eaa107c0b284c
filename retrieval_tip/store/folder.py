"""Keep the versions of an index in a folder. See :mod:`store.versions`.

manifest.json             the current version, which is replaced with a single rename
manifests/000003.json     an earlier version
data/index-<digest>.faiss, data/keys-<digest>.npy ...
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import uuid
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_tip.errors import StoreError, first_line
from retrieval_tip.files import sha256_of
from retrieval_tip.store.files import LocalFiles
from retrieval_tip.store.labels import LABEL_SCHEMA
from retrieval_tip.store.manifest import SUFFIXES, DataFile, Manifest
from retrieval_tip.store.versions import Check, Versions, Writer, entry, manifest_name, sizes_of, write_header

CURRENT = "manifest.json"
DELETE = "delete earlier versions with index gc"
_ZEROS = bytes(1 << 20)


class FolderWriter(Writer):
    """The writer of a new version of an index folder, which can also write files that do not fit in memory."""

    store: FolderVersions

    def __init__(self, store: FolderVersions, parent: Manifest | None) -> None:
        check_name(store.folder)
        super().__init__(store, parent)
        self.folder = store.folder
        self._staged = set[Path]()  # files are sealed in several threads

    def stage(self, kind: str) -> Path:
        """Return a temporary path for a data file of this kind. Write the file there before you call :meth:`seal`."""
        path = self.folder / "data" / f".{kind}-{uuid.uuid4().hex}{SUFFIXES[kind]}.tmp"
        self._staged.add(path)
        return path

    def stage_array(
        self, kind: str, shape: tuple[int, int], dtype: npt.DTypeLike
    ) -> tuple[Path, npt.NDArray[np.floating]]:
        """Stage a writable memory-mapped array, and return its path and the array.

        The disk space is reserved in advance, because a full disk would otherwise cause a SIGBUS.
        """
        path = self.stage(kind)
        with path.open("wb") as file:
            write_header(file, shape, dtype)
            start = file.tell()
            size = math.prod(shape) * np.dtype(dtype).itemsize
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), start, size)
            else:  # on macOS, space is only reserved by writing
                for at in range(0, size, len(_ZEROS)):
                    file.write(_ZEROS[: size - at])
        return path, np.lib.format.open_memmap(path, mode="r+")

    def seal(self, kind: str, staged: Path, rows: int) -> Path:
        """Flush a staged file to disk, rename it by its digest, and return the new path."""
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        own = self.files[kind] = entry(kind, rows, staged.stat().st_size, sha256_of(staged))
        path = self.folder / own.name
        staged.replace(path)
        self._staged.discard(staged)
        return path

    def discard(self, staged: Path) -> None:
        """Delete a staged file."""
        staged.unlink(missing_ok=True)
        self._staged.discard(staged)

    def abandon(self) -> None:
        """Remove the staged files. Sealed files to which no manifest refers are removed by :meth:`Versions.tidy`."""
        for path in self._staged:
            with suppress(OSError):
                path.unlink(missing_ok=True)


class FolderVersions(Versions[FolderWriter]):
    """The versions of an index in a folder."""

    writer = FolderWriter
    own = ("data", "manifests", "lock", CURRENT)
    remedies = (DELETE, DELETE)

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = self.local = Path(folder)
        self.place = str(self.folder)
        self.files: LocalFiles = LocalFiles(self.folder, self.place)

    def exists(self) -> bool:
        """An unreadable folder counts as an index, so that it is not overwritten."""
        try:
            return (self.folder / CURRENT).is_file()
        except OSError as error:
            return error.errno != errno.ENAMETOOLONG

    def stamp(self) -> Hashable | None:
        try:
            status = (self.folder / CURRENT).stat()  # each version replaces this file
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def current(self) -> Manifest:
        check_name(self.folder)
        try:
            return self.parse(CURRENT)
        except FileNotFoundError:
            what = "no such folder" if not self.folder.exists() else f"not an index (no {CURRENT})"
            raise StoreError(f"{self}: {what}; make one with retrieval-tip index build SOURCE --out INDEX") from None

    def publish(self, writer: FolderWriter, manifest: Manifest, raw: bytes) -> None:
        """The current manifest is copied to ``manifests`` first."""
        self.files.flush("data")
        if writer.parent is not None:
            self.files.put(manifest_name(writer.parent.version), (self.folder / CURRENT).read_bytes())
        self.files.flush("manifests", "")
        self.files.put(CURRENT, raw)

    def manifest_names(self) -> list[str]:
        return [*super().manifest_names(), *([CURRENT] if self.exists() else [])]

    def tidy(self, current: Manifest | None) -> None:
        with suppress(OSError):
            if current is not None:  # this copy was made for a version that was never written
                self.files.delete([manifest_name(current.version)])
        super().tidy(current)
        with suppress(OSError):  # fails unless the folder is empty
            (self.folder / "manifests").rmdir()

    def has_text(self, manifest: Manifest) -> bool:
        shape = len(manifest.class_names), manifest.d
        return bool(read_array(self.folder, manifest.files["text"], shape).any())

    def read_labels(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        labels = read_labels(self.folder, manifest)
        return labels if columns is None else labels.select(list(columns))

    def tables(self, manifest: Manifest) -> dict[str, pa.Table]:
        self.check_files(manifest)
        curve = {"curve": read_curve(self.folder, manifest.files["curve"])} if "curve" in manifest.files else {}
        return {"labels": read_labels(self.folder, manifest)} | curve

    def facts(self, manifest: Manifest, earlier: list[Manifest]) -> tuple[npt.NDArray[np.int64], dict[str, object]]:
        Check(self.files, manifest, "fast").wait()
        labels = read_labels(self.folder, manifest)
        own = sizes_of(manifest)
        before = {name: size for old in earlier for name, size in sizes_of(old).items()}
        sizes: dict[str, object] = {
            "bytes": sum(own.values()),
            "bytes_of_earlier": sum(size for name, size in before.items() if name not in own),
        }
        return np.bincount(labels["class_id"].to_numpy(), minlength=len(manifest.class_names)), sizes


def read_array(
    folder: Path, file: DataFile, shape: tuple[int, int], dtypes: Sequence[npt.DTypeLike] = (np.float32, np.float16)
) -> npt.NDArray[np.floating]:
    """Memory-map a ``.npy`` file in copy-on-write mode, so that torch can share the memory.

    Raises StoreError if the file cannot be read or if its shape or dtype is wrong.
    """
    path = folder / file.name
    try:
        array: npt.NDArray[np.floating] = np.lib.format.open_memmap(path, mode="c")  # never unpickles
    except Exception as error:  # a damaged header can make numpy raise any error
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None
    if array.shape != shape or array.dtype not in dtypes:
        raise StoreError(f"{path}: an array of {array.dtype} {array.shape} does not match {shape} in the manifest")
    return array


def read_labels(folder: Path, manifest: Manifest) -> pa.Table:
    """Read the label store. Format 7 may have several segments. If one of them lacks a column, its values are null.

    Raises StoreError if the labels do not match the manifest.
    """
    tables = [_read_labels(folder / part.labels.name, part.labels.rows, manifest) for part in manifest.segments]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise StoreError(f"{folder}: label columns of its segments differ ({first_line(error)})") from None
    ranges = [pc.min_max(part["key_id"]).as_py() for part in tables]
    if ranges[-1]["max"] >= manifest.next_key_id:
        raise StoreError(
            f"{folder / 'manifest.json'}: its next_key_id is already in use; restore it, or build the index again"
        )
    if any(one["max"] >= next_one["min"] for one, next_one in itertools.pairwise(ranges)):
        raise StoreError(f"{folder}: key ids of its segments do not ascend; restore it, or build the index again")
    return table


def _read_labels(path: Path, rows: int, manifest: Manifest) -> pa.Table:
    table = _read_table(path)
    own = table.schema.names[: len(LABEL_SCHEMA)] == LABEL_SCHEMA.names and all(
        table.schema.field(i).type == LABEL_SCHEMA.field(i).type for i in range(len(LABEL_SCHEMA))
    )
    if not own or len(table) != rows or any(table[name].null_count for name in ("key_id", "class_id", "label")):
        raise StoreError(f"{path}: does not match the manifest's {rows} keys")
    ids = table["class_id"].to_numpy()
    if ids.min() < 0 or ids.max() >= len(manifest.class_names) or (ids[1:] < ids[:-1]).any():
        raise StoreError(f"{path}: class ids are out of range or not grouped by class")
    return table


def read_curve(folder: Path, file: DataFile) -> pa.Table:
    """Read the loss curve of a fine-tuned index, which has one row per epoch.

    Raises StoreError if it does not match the manifest.
    """
    table = _read_table(folder / file.name)
    if len(table) != file.rows:
        raise StoreError(f"{folder / file.name}: has {len(table)} rows instead of {file.rows}")
    return table


def _read_table(path: Path) -> pa.Table:
    try:
        # Do not pass a Python file: Arrow's threads may free its buffers after the interpreter has shut down.
        # Do not pass a path: a folder named x=1 would become a column x.
        with pa.OSFile(os.fsencode(path)) as file:
            table = pq.ParquetFile(file).read()
            table.validate(full=True)
            table.schema.names  # noqa: B018 - decodes the names, which may fail
            return table
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None


def check_name(folder: Path) -> None:
    """Raise StoreError if the name of a folder is not valid UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise StoreError(f"{shown}: the folder's name is not UTF-8, which FAISS needs; use another name") from None
