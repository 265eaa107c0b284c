"""One index is one folder: immutable data files and a manifest that names them.

Readers see the old version or the new one, never half of one.

manifest.json             the current version, replaced by one rename
manifests/000003.json     earlier versions
data/keys-<digest>.npy    data/index-<digest>.faiss    data/labels-<digest>.parquet    data/text-<digest>.npy
lock                      held by the process that writes
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import duckdb
import filelock
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.errors import InputError, StoreError, UsageError

FORMAT = "retrieval-tip index"
FORMAT_VERSION = 1
KEPT_VERSIONS = 2
"""The current version and the one before; the files of older ones are collected by the next writer."""
KINDS = {"keys": ".npy", "index": ".faiss", "labels": ".parquet", "text": ".npy"}
LABEL_SCHEMA = pa.schema(
    [
        ("key_id", pa.int64()),
        ("class_id", pa.int32()),
        ("label", pa.string()),
        ("source", pa.string()),
        ("shot", pa.int32()),
        ("views", pa.int32()),
        ("digest", pa.string()),
        ("added_at", pa.timestamp("us", "UTC")),
    ]
)
"""Columns of the label store; row i describes row i of the keys. A table's further columns follow."""

_FILE_NAME = re.compile(r"data/(keys|index|labels|text)-[0-9a-f]{16}\.(npy|faiss|parquet)")


@dataclass(frozen=True)
class DataFile:
    """One immutable file of an index: its place below the folder, rows, bytes and SHA-256."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about one version of an index but the arrays."""

    version: int
    parent: int | None
    created_at: str
    created_by: str
    n: int
    d: int
    dtype: str
    class_names: list[str]
    templates: list[str]
    logit_scale: float
    alpha: float
    beta: float
    k: int | None
    tail: bool
    index: str
    backbone: dict[str, Any] | None
    provenance: dict[str, Any]
    files: dict[str, DataFile] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON whose last entry is the SHA-256 of the rest: no byte can change unseen."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)
        return _seal(body)

    @classmethod
    def from_bytes(cls, raw: bytes, name: str) -> Manifest:
        """The inverse of :meth:`to_bytes`. Raises StoreError for anything missing, changed or of another format."""
        damaged = f"{name}: damaged"
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{damaged} (not JSON: {error}); restore it, or rebuild the index") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise StoreError(f"{name}: not the manifest of a retrieval-tip index")
        if isinstance(body.get("format_version"), int) and body["format_version"] > FORMAT_VERSION:
            raise StoreError(
                f"{name}: index format {body['format_version']}, this program reads up to {FORMAT_VERSION}; "
                f"it was written by {body.get('created_by', 'a newer version')}: install that"
            )
        if _seal({key: value for key, value in body.items() if key != "sha256"}) != raw:
            raise StoreError(f"{damaged} (its own checksum does not fit); restore it, or rebuild the index")
        try:
            return cls._checked({key: body[key] for key in (f.name for f in fields(cls))})
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{damaged} ({error!r})") from None

    @classmethod
    def _checked(cls, body: dict[str, Any]) -> Manifest:
        def need(condition: bool, what: str) -> None:
            if not condition:
                raise ValueError(what)

        def whole(value: object, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        def real(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        need(whole(body["version"], 1), "version")
        need(body["parent"] is None or whole(body["parent"], 1), "parent")
        need(all(isinstance(body[key], str) for key in ("created_at", "created_by", "dtype", "index")), "text")
        need(whole(body["n"], 1) and whole(body["d"], 1), "n or d")
        need(body["dtype"] in ("float32", "float16"), "dtype")
        for key in ("class_names", "templates"):
            need(isinstance(body[key], list) and all(isinstance(text, str) for text in body[key]), key)
        need(len(set(body["class_names"])) == len(body["class_names"]) > 0, "class_names")
        need(all(real(body[key]) for key in ("logit_scale", "alpha", "beta")), "alpha, beta or logit_scale")
        need(body["k"] is None or whole(body["k"], 1), "k")
        need(isinstance(body["tail"], bool), "tail")
        need(body["backbone"] is None or isinstance(body["backbone"], dict), "backbone")
        need(isinstance(body["provenance"], dict) and isinstance(body["files"], dict), "provenance or files")
        files = {kind: DataFile(**entry) for kind, entry in body["files"].items()}
        need(files.keys() == KINDS.keys(), "files")
        for kind, file in files.items():
            matches = _FILE_NAME.fullmatch(file.name) is not None and file.name.startswith(f"data/{kind}-")
            need(matches and whole(file.rows, 1) and whole(file.bytes, 1), f"files.{kind}")
            need(file.name.endswith(f"{file.sha256[:16]}{KINDS[kind]}") and len(file.sha256) == 64, f"files.{kind}")
        return cls(**(body | {"files": files}))


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return json.dumps(dict(body) | {"sha256": digest}, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index (in whatever state)."""
    return (folder / "manifest.json").is_file()


def read_manifest(folder: Path) -> Manifest:
    """The current version of an index. Raises StoreError where the folder is not one, or the manifest is damaged."""
    path = folder / "manifest.json"
    try:
        return Manifest.from_bytes(path.read_bytes(), str(path))
    except FileNotFoundError:
        what = "no such folder" if not folder.exists() else "not an index (no manifest.json)"
        raise StoreError(f"{folder}: {what}; make one with retrieval-tip index build SOURCE --out {folder}") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every data file with the manifest's size and SHA-256. Raises StoreError naming the first bad one."""

    def check(file: DataFile) -> str | None:
        path = folder / file.name
        try:
            if path.stat().st_size != file.bytes:
                return f"{path}: damaged (has {path.stat().st_size:,} bytes, the manifest says {file.bytes:,})"
            if _sha256(path) != file.sha256:
                return f"{path}: damaged (its SHA-256 is not the manifest's)"
        except FileNotFoundError:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
        return None

    with ThreadPoolExecutor(len(manifest.files)) as pool:
        for problem in pool.map(check, manifest.files.values()):
            if problem:
                raise StoreError(f"{problem}; restore it, or build the index again")


def read_array(folder: Path, file: DataFile, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """A ``.npy`` file of an index, memory-mapped (copy on write, so that torch takes it without a copy)."""
    path = folder / file.name
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from None
    if array.shape != shape or array.dtype not in (np.float32, np.float16):
        raise StoreError(f"{path}: {array.dtype} {array.shape} does not fit the manifest ({shape})")
    return array


def read_labels(folder: Path, manifest: Manifest) -> pa.Table:
    """The label store as a table. Raises StoreError where it does not describe the manifest's keys and classes."""
    path = folder / manifest.files["labels"].name
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if table.schema.names[: len(LABEL_SCHEMA)] != LABEL_SCHEMA.names or len(table) != manifest.n:
        raise StoreError(f"{path}: does not describe the {manifest.n} keys of the manifest")
    ids = table["class_id"].to_numpy()
    if ids.min() < 0 or ids.max() >= len(manifest.class_names) or (ids[1:] < ids[:-1]).any():
        raise StoreError(f"{path}: class ids are out of range or not grouped by class")
    return table


def describe(folder: Path) -> dict[str, Any]:
    """What ``index info`` prints: the manifest, the keys a class, and the space on disk."""
    manifest = read_manifest(folder)
    ids = read_labels(folder, manifest)["class_id"].to_numpy()
    counts = np.bincount(ids, minlength=len(manifest.class_names))
    facts = asdict(manifest)
    files = facts.pop("files")
    return (
        {"folder": str(folder)}
        | facts
        | {
            "k": manifest.k or "all",
            "classes": len(manifest.class_names),
            "keys_per_class": {
                "least": int(counts.min()),
                "median": float(np.median(counts)),
                "most": int(counts.max()),
            },
            "bytes": sum(file["bytes"] for file in files.values()),
            "files": {kind: file["name"] for kind, file in files.items()},
            "earlier_versions": [earlier.version for earlier in earlier_manifests(folder)],
        }
    )


def query(folder: Path, sql: str) -> pa.Table:
    """The answer of a SELECT over the label store, table ``labels``; ``class_counts`` is a view of it.

    duckdb runs in memory, without access to any file but the label store, and with its configuration locked.

    Raises UsageError where the statement is not one SELECT or duckdb refuses it; StoreError where the index is damaged.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    path = str(folder / manifest.files["labels"].name).replace("'", "''")
    with duckdb.connect(":memory:") as database:
        for setting in ("autoinstall_known_extensions", "autoload_known_extensions", "python_enable_replacements"):
            database.execute(f"SET {setting} = false")
        database.execute(f"SET allowed_paths = ['{path}']")
        database.execute("SET enable_external_access = false")
        database.execute(f"CREATE VIEW labels AS SELECT * FROM read_parquet('{path}')")  # noqa: S608 - quoted above
        database.execute(
            "CREATE VIEW class_counts AS SELECT class_id, label, count(*) AS keys FROM labels "
            "GROUP BY class_id, label ORDER BY class_id"
        )
        database.execute("SET lock_configuration = true")
        try:
            statements = duckdb.extract_statements(sql)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                raise UsageError("query: expected one SELECT; the label store is read-only here")
            result: pa.Table = database.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise UsageError(f"query: {str(error).splitlines()[0]}") from None
    return result


class Writer:
    """A new version of an index folder in the making. Make one with :func:`write`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent = read_manifest(folder) if is_index(folder) else None
        self._staged: list[Path] = []
        self._files: dict[str, DataFile] = {}

    def stage(self, kind: str) -> Path:
        """A place to write the data file of this kind, to be closed by :meth:`seal`."""
        path = self.folder / "data" / f".{kind}-{uuid.uuid4().hex}{KINDS[kind]}.tmp"
        self._staged.append(path)
        return path

    def stage_array(self, kind: str, shape: tuple[int, int], dtype: npt.DTypeLike) -> tuple[Path, npt.NDArray[Any]]:
        """A writable memory-mapped array, its disk space reserved first (a full disk must not end in SIGBUS)."""
        path = self.stage(kind)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            size = math.prod(shape) * np.dtype(dtype).itemsize
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), start, size)
            else:
                file.truncate(start + size)
        return path, np.lib.format.open_memmap(path, mode="r+")

    def seal(self, kind: str, staged: Path, rows: int) -> Path:
        """Flush a staged file to disk and move it to the name that its content gives it."""
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        digest = _sha256(staged)
        entry = DataFile(f"data/{kind}-{digest[:16]}{KINDS[kind]}", rows, staged.stat().st_size, digest)
        place = self.folder / entry.name
        staged.replace(place)
        self._staged.remove(staged)
        self._files[kind] = entry
        return place

    def discard(self, staged: Path) -> None:
        """Give up a staged file."""
        staged.unlink(missing_ok=True)
        self._staged.remove(staged)

    def commit(self, manifest: Manifest) -> None:
        """Make the sealed files the current version. Until the last rename the old version stands."""
        raw = manifest.to_bytes()
        _sync(self.folder / "data")
        if self.parent is not None:
            earlier = self.folder / "manifests"
            earlier.mkdir(exist_ok=True)
            _write(earlier / f"{self.parent.version:06d}.json", self.parent.to_bytes())
            _sync(earlier)
        _write(self.folder / "manifest.json", raw)
        _sync(self.folder)
        for path in sorted(self.folder.glob("manifests/*.json"))[: 1 - KEPT_VERSIONS]:
            path.unlink()

    @property
    def files(self) -> dict[str, DataFile]:
        """The data files that were sealed."""
        return {kind: self._files[kind] for kind in KINDS}

    def abandon(self) -> None:
        """Remove what is staged; what is sealed but in no manifest is collected."""
        for path in self._staged:
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def write(folder: Path) -> Iterator[Writer]:
    """Write a new version of an index, alone: another writer is refused.

    An exception, or a kill at any moment, leaves the version that was there; a folder that was not there is removed
    again. Raises StoreError: the folder is something else, is locked, cannot be written, or the disk is full.
    """
    if folder.is_file():
        raise StoreError(f"{folder}: is a file; an index is a folder, give another --out")
    existed = folder.is_dir()
    if existed and not is_index(folder) and any(entry.name not in _OWN for entry in os.scandir(folder)):
        raise StoreError(f"{folder}: a folder with other things in it; give an empty or new one")
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            _collect(folder)
            writer = Writer(folder)
            try:
                yield writer
            finally:
                writer.abandon()
                _collect(folder)
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; nothing was changed"
        ) from error
    finally:
        if not existed and not is_index(folder):
            shutil.rmtree(folder, ignore_errors=True)


_OWN = ("data", "manifests", "lock")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """The lock is the system's, so it ends with the process that holds it; the file's text says who that is."""
    path = folder / "lock"
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with suppress(OSError):
            raise StoreError(
                f"{folder}: is being written by {path.read_text() or 'another process'}; try later"
            ) from None
        raise StoreError(f"{folder}: is being written by another process; try later") from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


def earlier_manifests(folder: Path) -> list[Manifest]:
    """The earlier versions that are kept, oldest first. Raises StoreError where one is damaged."""
    return [Manifest.from_bytes(path.read_bytes(), str(path)) for path in sorted((folder / "manifests").glob("*.json"))]


def _collect(folder: Path) -> None:
    """Remove what an interrupted writer left: data files that no kept manifest names, and temporary files."""
    try:
        manifests = [*earlier_manifests(folder), *([read_manifest(folder)] if is_index(folder) else [])]
    except StoreError:
        return  # what a damaged manifest names is not known, so everything stays
    named = {folder / file.name for manifest in manifests for file in manifest.files.values()}
    leftovers = [path for path in (folder / "data").iterdir() if path not in named]
    leftovers += [*folder.glob(".*.tmp"), *(folder / "manifests").glob(".*.tmp")]
    for path in leftovers:
        if path.name.endswith(".tmp") or _FILE_NAME.fullmatch(f"data/{path.name}"):
            with suppress(OSError):
                path.unlink()


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a small ``.npy`` file."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def write_labels(path: Path, table: pa.Table) -> None:
    """Write the label store. Raises InputError where a further column has a type that Parquet cannot hold."""
    try:
        pq.write_table(table, path)
    except pa.ArrowException as error:
        raise InputError(f"labels: a column cannot be kept ({str(error).splitlines()[0]})") from None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Flush a folder's entries, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
