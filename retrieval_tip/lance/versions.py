"""Manage the versions of an index in LanceDB. Manifests and class tables are objects next to the LanceDB table.

Readers see either the old version or the new version, never a mixture of the two.

manifests/000003.json          the manifest of a version; the version with the highest number is current. Creating this
                               object commits the version, and only one of two writers can create it
data/classes-<digest>.parquet  the label, the text weight, the number of keys, and the sums of keys and points per class
data/second-<digest>.npy       the sum of the keys' outer products, which is used to fit a metric
data/metric-<digest>.npy       the metric of a fitted index
data/values-<digest>.npy       the solved values of a fitted index, sorted by key id
keys.lance/                    the table of keys and labels; each manifest refers to a version of the table
lock                           locked by the process that is writing, unless the store is in a bucket

LanceDB's own versions are not safe for commits. ``create_table(mode="overwrite")`` silently drops rows that are added
at the same time. With ``mode="create"`` on a local disk, both writers succeeded in 5 of 20 races.

A killed writer may leave table versions to which no manifest refers. The next writer starts from the table version in
the current manifest, so that no row is added twice. On a local disk, all new files of the table are flushed before the
manifest is created, because LanceDB does not flush them.

In a bucket, several processes can write at the same time. The first one that creates its manifest wins, and the others
have to run again. Each change of a table starts from the table version that the writer knows, so a manifest never
refers to rows of another writer. Objects to which no manifest refers may belong to a version that is being written, so
they are only deleted after :data:`UNFINISHED`.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.data.tables import vectors
from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.files import sha256_of, sync
from retrieval_tip.lance.address import Address
from retrieval_tip.lance.key_table import RESTORE, VALUES, KeyTable, changed_meanwhile
from retrieval_tip.lance.objects import Objects, flush
from retrieval_tip.retrieval.arrays import KeyArray
from retrieval_tip.store import history
from retrieval_tip.store.folder import MANIFEST_BYTES, VERSIONS_TRIED
from retrieval_tip.store.lock import locked
from retrieval_tip.store.manifest import SUFFIXES, DataFile, Manifest, Table
from retrieval_tip.store.query import TIMEOUT, ask

T = TypeVar("T")

TABLE = "keys"
DIGESTED = ("data", "_deletions", "_indices")
"""Folders of a local table whose files have digests. LanceDB never reuses a file name in these folders."""
PRUNED_EVERY = 16
"""Number of versions after which the table is pruned. Pruning also merges all small fragments."""
UNFINISHED = datetime.timedelta(hours=1)
"""Age after which an object in a bucket to which no manifest refers is considered left over by a killed writer."""
OBJECT_BYTES = 1 << 34
"""Maximum size of an object in bytes. A million classes with 1024 values each take less."""

_MANIFEST = re.compile(r"(\d{6,12})\.json")


@dataclass(frozen=True)
class Classes:
    """The name, the text weight and the key statistics of each class.

    ``text`` is a float32 array of shape ``[c, d]``. ``counts`` is the number of keys per class, in int64. ``sums`` are
    the per-class sums of the keys, a float64 array of shape ``[c, d]``, and ``points`` are the sums of their points.
    """

    names: list[str]
    text: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    points: npt.NDArray[np.float64] | None = None

    def to_bytes(self) -> bytes:
        """Convert the classes to a Parquet file."""
        columns = {"label": pa.array(self.names, pa.string()), "keys": pa.array(self.counts, pa.int64())}
        columns |= {"text": vectors(self.text), "sum": vectors(self.sums)}
        table = pa.table(columns if self.points is None else columns | {"point_sum": vectors(self.points)})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, raw: bytes, d: int) -> Classes:
        """Invert :meth:`to_bytes`. ``d`` is the length of the features."""
        table = pq.read_table(io.BytesIO(raw))

        def matrix(name: str) -> npt.NDArray[np.float64]:
            values: npt.NDArray[np.float64] = table[name].combine_chunks().flatten().to_numpy().reshape(-1, d).copy()
            return values

        points = matrix("point_sum") if "point_sum" in table.column_names else None
        text, counts = matrix("text").astype(np.float32), table["keys"].to_numpy().astype(np.int64)
        return cls(table["label"].to_pylist(), text, counts, matrix("sum"), points)


class TableWriter:
    """The exclusive writer of the next version. Use :meth:`LanceVersions.write` to get one."""

    def __init__(self, store: LanceVersions, parent: Manifest | None) -> None:
        self.store, self.parent = store, parent
        self._files = store.table_files()
        self._creations = 0
        self.table: KeyTable | None = None
        if parent is not None and parent.table is not None:
            store.check_engine(parent)
            self.table = KeyTable.latest(store.address, parent.table.name)
            if self.table.version != parent.table.version:  # drop the rows that interrupted writers left
                self.table.restore(parent.table.version)

    @property
    def number(self) -> int:
        """Number of the version that is being written."""
        return (self.parent.version if self.parent else 0) + 1

    def create(self, rows: Iterator[pa.RecordBatch], schema: pa.Schema) -> KeyTable:
        """Write a table with the given rows. Earlier versions are not affected."""
        self.table = KeyTable.create(self.store.address, TABLE, rows, schema)
        self._creations += 1
        return self.table

    @property
    def prunes(self) -> bool:
        """Whether to prune table versions after this commit, for example if a first build wrote the table twice."""
        if self.parent is None:
            return self._creations > 1
        return self.number % PRUNED_EVERY == 0 and len(self.store.versions()) >= history.KEPT_VERSIONS

    def put(self, kind: str, raw: bytes, rows: int) -> DataFile:
        """Write a data file as an object, unless the parent version already has the same file."""
        digest = hashlib.sha256(raw).hexdigest()
        entry = DataFile(f"data/{kind}-{digest[:16]}{SUFFIXES[kind]}", rows, len(raw), digest)
        if self.parent is None or self.parent.files.get(kind) != entry:
            self.store.objects.put(entry.name, raw)
        return entry

    def put_array(self, kind: str, array: KeyArray | npt.NDArray[np.float64]) -> DataFile:
        """Write an array as an object. See :meth:`put` for details."""
        sink = io.BytesIO()
        np.save(sink, np.ascontiguousarray(array), allow_pickle=False)
        return self.put(kind, sink.getvalue(), len(array))

    def commit(self, manifest: Manifest) -> None:
        """Make this the current version. The old version remains current until the new manifest is created.

        Raises InputError if the manifest contains a value that cannot be stored. Raises StoreError if another writer
        committed first, if rows of the table are missing, or if the table cannot be flushed.
        """
        address, objects = self.store.address, self.store.objects
        raw = history.sealed(manifest, address)
        assert manifest.table is not None
        if KeyTable.at(address, manifest.table.name, manifest.table.version).rows != manifest.n:
            raise changed_meanwhile(address)
        self._flush()
        name = _name(manifest.version)
        # The object may exist even if the server's answer was lost. Its content shows which writer created it.
        if not objects.create(name, raw) and objects.get(name, MANIFEST_BYTES) != raw:
            raise changed_meanwhile(address)

    def digests(self, table: Table) -> dict[str, str]:
        """Return the names of a table version's files and their SHA-256."""
        engine, before = _engine_name(table), {} if self.parent is None else self.parent.digests
        files = {}
        with suppress(FileNotFoundError):  # another version of LanceDB may use a different name
            files[engine] = hashlib.sha256(self.store.objects.get(engine)).hexdigest()
        for path, changed in sorted(self.store.table_files()):
            name = path.relative_to(self.store.root).as_posix()
            if name.split("/")[1] in DIGESTED:
                if (path, changed) not in self._files:
                    with self._on_disk("read"):
                        files[name] = sha256_of(path)
                elif name in before:
                    files[name] = before[name]
        return files

    @contextmanager
    def _on_disk(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StoreError(f"{self.store}: its table cannot be {what}: {reason}; nothing changed") from None

    def _flush(self) -> None:
        new = [path for path, _ in self.store.table_files() - self._files]
        with self._on_disk("flushed"):
            for path in new:
                flush(path)
        root = self.store.root
        for folder in {folder for path in new for folder in path.parents if root in (folder, *folder.parents)}:
            sync(folder)


class LanceVersions:
    """The versions of an index in LanceDB. Nothing is opened until a method is called."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.objects = Objects(address)

    def __str__(self) -> str:
        return str(self.address)

    def exists(self) -> bool:
        """Return whether the store contains an index, even a damaged one."""
        return bool(self.versions())

    def versions(self) -> list[int]:
        """Return the numbers of the kept versions, oldest first."""
        matches = (_MANIFEST.fullmatch(name.rpartition("/")[2]) for name in self.objects.names("manifests"))
        return sorted(int(match[1]) for match in matches if match)

    def manifest(self, version: int | None = None) -> Manifest:
        """Return the current manifest, or an earlier manifest. Raises StoreError if it is missing or damaged."""
        for _ in range(VERSIONS_TRIED):
            there = self.versions()
            if not there:
                raise StoreError(f"{self}: no index; build one with retrieval-tip index build SOURCE --store {self}")
            if version is not None and version not in there:
                raise StoreError(f"{self}: no version {version}; choose from {', '.join(map(str, there))}")
            try:
                return self._read(version or there[-1])
            except FileNotFoundError:  # the version was just deleted
                continue
        raise self._too_fast()

    def _read(self, version: int) -> Manifest:
        name = _name(version)
        raw = self.objects.get(name, MANIFEST_BYTES)
        manifest = Manifest.from_bytes(raw, f"{self}/{name}", "restore it, or go back to an earlier version")
        if manifest.table is None or manifest.version != version:
            raise StoreError(f"{self}/{name}: is the manifest of another index; restore it")
        return manifest

    def classes(self, manifest: Manifest) -> Classes:
        """Return the classes of a version. Raises StoreError if the file is missing or damaged."""
        file = manifest.files["classes"]
        return Classes.from_bytes(self._checked(file.name, file.sha256), manifest.d)

    def array(self, manifest: Manifest, kind: str) -> npt.NDArray[Any] | None:
        """Return an array of a version, or ``None`` if the version does not have it.

        ``kind`` is ``second``, ``metric`` or ``values``. The arrays have the shapes ``[d, d]``, ``[1 + d, d]`` and
        ``[n, c]``. Raises StoreError if the file is missing or damaged.
        """
        file = manifest.files.get(kind)
        return None if file is None else np.load(io.BytesIO(self._checked(file.name, file.sha256)))

    def check_objects(self, manifest: Manifest) -> None:
        """Raise StoreError if an object of a version is missing or damaged."""
        for file in manifest.data_files:
            self._checked(file.name, file.sha256)

    def _checked(self, name: str, sha256: str) -> bytes:
        try:
            raw = self.objects.get(name, OBJECT_BYTES)
        except FileNotFoundError:
            raise StoreError(f"{self}/{name}: missing; {RESTORE}") from None
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise self._damaged(name)
        return raw

    @property
    def root(self) -> Path:
        """The folder of the store, if it is on a local disk."""
        return self.address.local or Path()

    def table_files(self) -> set[tuple[Path, int]]:
        """Return the files of the table with their modification times. The set is empty for a bucket."""
        paths = [] if self.address.local is None else self.root.glob(f"{TABLE}.lance/**/*")
        return {(path, path.stat().st_mtime_ns) for path in paths if path.is_file()}

    def table(self, manifest: Manifest) -> KeyTable:
        """Open the table of a version. Raises StoreError if it does not match the manifest."""
        assert manifest.table is not None
        self.check_engine(manifest)
        table = KeyTable.at(self.address, manifest.table.name, manifest.table.version)
        own = table.vector_type == (manifest.d, VALUES[manifest.dtype]) and table.has_points == manifest.has_points
        if not own or table.rows != manifest.n:
            raise StoreError(f"{self}: its table does not match version {manifest.version}; go back to an earlier one")
        return table

    def check_engine(self, manifest: Manifest) -> None:
        """Raise StoreError if LanceDB's own manifest of a version is missing or does not match its digest.

        LanceDB has no checksums, so a single flipped bit can make it panic and print a backtrace.
        """
        assert manifest.table is not None
        name = _engine_name(manifest.table)
        if name in manifest.digests:
            self._checked(name, manifest.digests[name])

    def check_files(self, manifest: Manifest, seen: set[tuple[str, str]]) -> None:
        """Check the files of a local table against their digests, except files that were already ``seen``.

        Missing files are skipped, because LanceDB reports a missing file when it needs the file. Raises StoreError if a
        file is damaged.
        """
        files = {} if self.address.local is None else manifest.digests
        for name, digest in files.items() - seen:
            try:
                if sha256_of(self.root / name) != digest:
                    raise self._damaged(name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreError(f"{self}/{name}: cannot be read: {error.strerror}") from None
            seen.add((name, digest))

    def _damaged(self, name: str) -> StoreError:
        return StoreError(f"{self}/{name}: damaged (its SHA-256 differs from the manifest's); {RESTORE}")

    @contextmanager
    def write(self, wait: float | None = None) -> Iterator[TableWriter]:
        """Yield a writer of the next version. A store on a local disk is locked in the meantime.

        Waits up to ``wait`` seconds for the lock; ``wait`` defaults to :data:`lock.LOCK_WAIT`. If an exception is
        raised or the process is killed, the current version stays in place. Raises StoreError if the store stays locked
        or is not writable.
        """
        with nullcontext() if self.address.local is None else self._locked(self.address.local, wait):
            yield TableWriter(self, self.manifest() if self.exists() else None)

    @contextmanager
    def _locked(self, place: Path, wait: float | None) -> Iterator[None]:
        own = {"manifests", "data", "lock", f"{TABLE}.lance"}
        if place.exists() and not (place.is_dir() and {entry.name for entry in place.iterdir()} <= own):
            raise StoreError(f"{self}: holds other files; give an empty or new folder")
        with locked(place, self.address, wait):
            for unfinished in place.glob("*/.*.tmp*"):
                with suppress(OSError):  # removes temporary files of a killed writer
                    unfinished.unlink()
            yield

    def opened(self, read: Callable[[Manifest], T], version: int | None = None) -> T:
        """Call ``read`` with the manifest of the current version or an earlier version, and return the result.

        If a writer deletes the version in the meantime, the call is repeated.
        """
        for _ in range(VERSIONS_TRIED):
            manifest = self.manifest(version)
            try:
                return read(manifest)
            except StoreError:
                if self.keeps(manifest):
                    raise
        raise self._too_fast()

    def keeps(self, manifest: Manifest) -> bool:
        """Return whether a version still exists. Writers delete the manifest of a version first."""
        return manifest.version in self.versions()

    def withdraw(self, manifest: Manifest) -> None:
        """Delete the manifest of a version that cannot be read."""
        self.objects.delete([_name(manifest.version)])

    def _too_fast(self) -> StoreError:
        return StoreError(f"{self}: keeps changing while it is opened; try again")

    def history(self) -> pa.Table:
        """Return the kept versions as a table with the columns of :data:`labels.VERSIONS_SCHEMA`, oldest first.

        The column ``bytes`` does not include the LanceDB table.
        """
        current = self.manifest()
        return history.history_table(self.earlier(current), current)

    def earlier(self, current: Manifest) -> list[Manifest]:
        """Return the manifests of earlier versions, oldest first."""
        manifests = []
        for version in self.versions():
            if version < current.version:
                try:
                    manifests.append(self._read(version))
                except FileNotFoundError:  # the version was just deleted
                    continue
        return manifests

    def describe(self) -> dict[str, object]:
        """Return the facts that ``index info`` prints."""
        manifest, counts, unindexed = self.opened(
            lambda manifest: (manifest, self.classes(manifest).counts, self.table(manifest).unindexed())
        )
        return history.described(self, manifest, self.earlier(manifest), counts, not_indexed=unindexed)

    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        """See :func:`folder.query`. The table ``labels`` is read into memory, but the keys are not."""
        labels = self.opened(lambda manifest: (table := self.table(manifest)).read(table.label_columns))
        return ask({"labels": labels, "versions": self.history()}, sql, predictions, timeout)

    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        """Delete all versions except the last ``keep``, and the data that only the deleted versions use.

        Return the numbers of the deleted versions and the size of the deleted objects in bytes. A reader that still has
        a deleted version open will fail. Raises UsageError if ``keep`` is below 1.
        """
        if keep < 1:
            raise UsageError(f"keep is {keep}: give at least 1, because the current version is always kept")
        self.manifest()
        with self.write():
            return self._forget(keep)

    def _forget(self, keep: int, prune: bool = True) -> tuple[list[int], int]:
        there = self.versions()
        gone, kept = there[:-keep], [self._read(version) for version in there[-keep:]]
        self.objects.delete([_name(version) for version in gone])
        # In a bucket, another writer may have restored a version before its manifest was deleted.
        kept += [self._read(version) for version in self.versions() if version > there[-1]]
        named = {file.name for manifest in kept for file in manifest.data_files}
        age = UNFINISHED if self.address.local is None else datetime.timedelta()
        strays = {name: size for name, size in self.objects.sizes("data", age).items() if name not in named}
        self.objects.delete(strays)
        tables = [manifest.table for manifest in kept if manifest.table is not None]
        if prune:
            KeyTable.latest(self.address, tables[-1].name).prune(sorted({entry.version for entry in tables}))
        return gone, sum(strays.values())

    def forget_old(self, prune: bool) -> None:
        """Delete all but the last :data:`history.KEPT_VERSIONS` versions, and ``prune`` the table if requested."""
        if prune or len(self.versions()) > history.KEPT_VERSIONS:
            self._forget(history.KEPT_VERSIONS, prune=prune)


def _name(version: int) -> str:
    return f"manifests/{version:06d}.json"


def _engine_name(table: Table) -> str:
    """Return the name of LanceDB's own manifest. LanceDB numbers its manifests in descending order."""
    return f"{table.name}.lance/_versions/{(1 << 64) - 1 - table.version:020d}.manifest"
