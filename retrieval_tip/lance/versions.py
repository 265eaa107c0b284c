"""Keep the versions of an index in LanceDB. See :mod:`store.versions` for what is the same in a folder.

manifests/000003.json          the manifest of a version; the version with the highest number is current. Creating this
                               file commits the version, and only one of two writers can create it
data/classes-<digest>.parquet  the label, the text weight, the number of keys, and the sums of keys and points per class
data/second-<digest>.npy       the sum of the keys' outer products, which is used to fit a metric
data/metric-<digest>.npy, data/values-<digest>.npy  what a fit found; the values are sorted by key id
keys.lance/                    the table of keys and labels

LanceDB's own versions are not safe for commits. ``create_table(mode="overwrite")`` silently drops rows that are added
at the same time. With ``mode="create"`` on a local disk, both writers succeeded in 5 of 20 races.

A killed writer may leave table versions to which no manifest refers. The next writer starts from the table version in
the current manifest, so that no row is added twice. On a local disk, all new files of the table are flushed before the
manifest is created, because LanceDB does not flush them.

In a bucket, several processes can write at the same time. The first one that creates its manifest wins, and the others
have to run again. Each change of a table starts from the table version that the writer knows, so a manifest never
refers to rows of another writer.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Collection, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.errors import StoreError
from retrieval_tip.files import sha256_of, sync
from retrieval_tip.lance.key_table import RESTORE, VALUES, KeyTable, changed_meanwhile
from retrieval_tip.store import versions
from retrieval_tip.store.address import Address
from retrieval_tip.store.bucket import OBJECT_BYTES, BucketFiles
from retrieval_tip.store.files import LocalFiles
from retrieval_tip.store.manifest import DataFile, Manifest, Table
from retrieval_tip.store.versions import MANIFEST_BYTES, VERSIONS_TRIED, Files, Versions, Writer, manifest_name

TABLE = "keys"
DIGESTED = ("data", "_deletions", "_indices")
"""Folders of a local table whose files have digests. LanceDB never reuses a file name in these folders."""
PRUNED_EVERY = 16
"""Number of versions after which the table is pruned. Pruning also merges all small fragments."""


class TableWriter(Writer):
    """The writer of the next version, with the ``table`` of its parent.

    If ``prunes`` is set, table versions are pruned after the commit.
    """

    store: TableVersions

    def __init__(self, store: TableVersions, parent: Manifest | None) -> None:
        super().__init__(store, parent)
        self._before = store.table_files()
        self.prunes = parent is not None and self.number % PRUNED_EVERY == 0 and self.number > versions.KEPT_VERSIONS
        self.table: KeyTable | None = None
        if parent is not None and parent.table is not None:
            store.check_engine(parent)
            self.table = KeyTable.at(store.address, parent.table.name)
            if self.table.version != parent.table.version:  # drop the rows that interrupted writers left
                self.table.restore(parent.table.version)

    def digests(self, table: Table) -> dict[str, str]:
        """Return the names of a table version's files and their SHA-256."""
        engine, before = _engine_name(table), {} if self.parent is None else self.parent.digests
        files = {}
        with suppress(FileNotFoundError):  # another version of LanceDB may use a different name
            files[engine] = hashlib.sha256(self.store.files.get(engine, OBJECT_BYTES)).hexdigest()
        for path, changed in sorted(self.store.table_files()):
            name = path.relative_to(self.store.folder).as_posix()
            if name.split("/")[1] in DIGESTED:
                if (path, changed) not in self._before:
                    files[name] = sha256_of(path)
                elif name in before:
                    files[name] = before[name]
        return files

    def flush(self) -> None:
        """Flush the new files of a local table to disk."""
        new, root = [path for path, _ in self.store.table_files() - self._before], self.store.folder
        for path in new:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for folder in {folder for path in new for folder in path.parents if root in (folder, *folder.parents)}:
            sync(folder)


class TableVersions(Versions):
    """The versions of an index in LanceDB. Nothing is opened until a method is called."""

    writer = TableWriter
    own = ("data", "manifests", "lock", f"{TABLE}.lance")
    in_table = True
    remedies = ("restore it, or go back to an earlier version",)

    def __init__(self, address: Address) -> None:
        self.address, self.place, self.local = address, str(address), address.local
        self.folder = self.local or Path()
        self.files: Files = BucketFiles(address) if self.local is None else LocalFiles(self.local, self.place)

    def exists(self) -> bool:
        return bool(self.numbers())

    def stamp(self) -> Hashable:
        return time.monotonic_ns()

    def current(self) -> Manifest:
        for _ in range(VERSIONS_TRIED):
            if not (there := self.numbers()):
                raise StoreError(f"{self}: no index; build one with retrieval-tip index build SOURCE --out {self}")
            with suppress(FileNotFoundError):  # the version was just deleted
                return self.read(there[-1])
        raise self.too_fast()

    def publish(self, writer: TableWriter, manifest: Manifest, raw: bytes) -> None:
        assert manifest.table is not None
        table = KeyTable.at(self.address, manifest.table.name, manifest.table.version)
        if (table.rows if self.local is None else table.rows_on_disk()) != manifest.n:
            raise changed_meanwhile(self.address)
        writer.flush()
        self.files.flush("data", "")
        name = manifest_name(manifest.version)
        created = self.files.create(name, raw)
        with suppress(FileNotFoundError):  # it may exist because the server's answer was lost; its content shows whose
            created = created or self.files.get(name, MANIFEST_BYTES) == raw
        if not created:
            raise changed_meanwhile(self.address)
        if writer.restored is not None and not self.keeps(writer.restored):
            self.files.delete([name])  # another process has deleted the version meanwhile, and maybe also its rows
            raise changed_meanwhile(self.address)

    def forget_old(self, writer: TableWriter, current: Manifest) -> None:
        if writer.prunes:
            self.forget(versions.KEPT_VERSIONS, current)
        elif self.surplus(current, versions.KEPT_VERSIONS):
            super().forget(versions.KEPT_VERSIONS, current)

    def forget(self, keep: int, current: Manifest) -> list[int]:
        gone = super().forget(keep, current)
        current = self.current()  # in a bucket, another writer may have restored a version before it was deleted
        tables = [manifest.table for manifest in (*self.earlier(current), current) if manifest.table is not None]
        KeyTable.at(self.address, tables[-1].name).prune(sorted({table.version for table in tables}))
        return gone

    def manifest_names(self) -> list[str]:
        return list(map(manifest_name, self.numbers()))

    def tidy(self, current: Manifest | None) -> None:
        self.remove_unnamed()

    def check_files(self, manifest: Manifest, known: Collection[DataFile] = ()) -> None:
        super().check_files(manifest, known)
        self.table(manifest)

    def classes(self, manifest: Manifest) -> pa.Table:
        """Return the label, the text weight and the key statistics of each class of a version.

        Raises StoreError if the file is missing or damaged.
        """
        file = manifest.files["classes"]
        return pq.read_table(io.BytesIO(self._checked(file.name, file.sha256)))

    def array(self, manifest: Manifest, kind: str) -> npt.NDArray[Any] | None:
        """Return an array of a version, or ``None`` if the version does not have it.

        ``kind`` is ``second``, ``prior``, ``scores``, ``metric`` or ``values``. The arrays have the shapes ``[d, d]``,
        ``[d, d]``, ``[m, 3]``, ``[1 + d, d]`` and ``[n, c]``. Raises StoreError if the file is missing or damaged.
        """
        file = manifest.files.get(kind)
        return None if file is None else np.load(io.BytesIO(self._checked(file.name, file.sha256)))

    def _checked(self, name: str, sha256: str) -> bytes:
        try:
            raw = self.files.get(name, OBJECT_BYTES)
        except FileNotFoundError:
            raise StoreError(f"{self}/{name}: missing; {RESTORE}") from None
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise StoreError(f"{self}/{name}: damaged (its SHA-256 differs from the manifest's); {RESTORE}")
        return raw

    def table_files(self) -> set[tuple[Path, int]]:
        """Return the files of the table with their modification times. The set is empty for a bucket."""
        paths = [] if self.local is None else self.folder.glob(f"{TABLE}.lance/**/*")
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

    def has_text(self, manifest: Manifest) -> bool:
        return bool(matrix(self.classes(manifest)["text"]).any())

    def read_labels(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        table = self.table(manifest)
        return table.read(table.label_columns if columns is None else columns)

    def tables(self, manifest: Manifest) -> dict[str, pa.Table]:
        return {"labels": self.read_labels(manifest)}

    def facts(self, manifest: Manifest, earlier: list[Manifest]) -> tuple[npt.NDArray[np.int64], dict[str, object]]:
        return self.classes(manifest)["keys"].to_numpy(), {"not_indexed": self.table(manifest).unindexed()}


def matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a column of vectors as an array that can be written to."""
    values: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1).copy()
    return values


def _engine_name(table: Table) -> str:
    """Return the name of LanceDB's own manifest. LanceDB numbers its manifests in descending order."""
    return f"{table.name}.lance/_versions/{(1 << 64) - 1 - table.version:020d}.manifest"
