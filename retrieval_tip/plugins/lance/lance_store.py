"""Store an index in LanceDB, as in :mod:`store.versions`. Each manifest names a version of the table.

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
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.arrays import IntArray
from retrieval_tip.data.writing import vectors
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import sha256_of, sync
from retrieval_tip.index.places import Store
from retrieval_tip.plugins.lance.bucket import OBJECT_BYTES, BucketFiles
from retrieval_tip.plugins.lance.key_table import CLASSES, FLAT, RESTORE, TABLE, VALUES, KeyTable
from retrieval_tip.settings import Dtype, Verify
from retrieval_tip.store import versions
from retrieval_tip.store.address import Address
from retrieval_tip.store.files import LocalFiles
from retrieval_tip.store.manifest import DataFile, Manifest, Table
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.versions import Origin, Writer, changed_meanwhile
from retrieval_tip.wording import command_line

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.index.items import BuildInputs
    from retrieval_tip.model import Index
    from retrieval_tip.plugins.lance.rows import TableRows
    from retrieval_tip.retrieval.rows import Rows

FEW_KEYS = 8192
"""Maximum number of keys in a new store for which all keys are compared to find images in two classes."""
MOST_HELD = 1 << 30
"""Maximum size in bytes of the keys and solved values that are held in memory."""
DIGESTED = ("data", "_deletions", "_indices")
"""Folders of a local table whose files have digests. LanceDB never reuses a file name in these folders."""
PRUNED_EVERY = 16
"""Number of versions after which the table is pruned. Pruning also merges all small fragments."""


class TableWriter(Writer):
    """The writer of the next version, with the ``table`` of its parent."""

    store: LanceStore

    def __init__(self, store: LanceStore, parent: Manifest | None) -> None:
        super().__init__(store, parent)
        self._before = store.table_files()
        self.prunes = (
            parent is not None
            and self.number % PRUNED_EVERY == 0
            and self.number > versions.KEPT_VERSIONS
        )
        self.table: KeyTable | None = None
        if parent is not None and parent.table is not None:
            store.check_engine(parent)
            self.table = KeyTable.at(store.address)
            if (
                self.table.version != parent.table.version
            ):  # drop the rows that interrupted writers left
                self.table.restore(parent.table.version)

    def digests(self, table: Table) -> dict[str, str]:
        """Return the names of a table version's files and their SHA-256."""
        engine = _engine_name(table)
        before = {} if self.parent is None else self.parent.digests
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

    def complete(self, manifest: Manifest) -> None:
        """See :meth:`Writer.complete`. A deleted version of the table is lost."""
        super().complete(manifest)
        self.store.table(manifest)

    def flush(self) -> None:
        """Flush the new files of a local table to disk."""
        new = [path for path, _ in self.store.table_files() - self._before]
        root = self.store.folder
        for path in new:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for folder in {
            folder for path in new for folder in path.parents if root in (folder, *folder.parents)
        }:
            sync(folder)


class LanceStore(Store):
    """The versions of an index in LanceDB. Nothing is opened until a method is called."""

    look_every = 2.0
    writer = TableWriter
    own = (*Store.own, f"{TABLE}.lance")
    in_table = True

    def __init__(self, address: Address) -> None:
        self.address = address
        self.place = str(address)
        self.local = address.local
        self.folder = self.local or Path()
        self.files = (
            BucketFiles(address) if self.local is None else LocalFiles(self.local, self.place)
        )

    def publish(self, writer: TableWriter, manifest: Manifest, raw: bytes) -> None:
        assert manifest.table is not None
        table = KeyTable.at(self.address, manifest.table.version)
        there = table.rows if self.local is None else table.rows_on_disk()
        if there != manifest.n:
            raise changed_meanwhile(self)
        writer.flush()
        super().publish(writer, manifest, raw)

    def forget(self, keep: int, current: Manifest, prune: bool = True) -> list[int]:
        gone = super().forget(keep, current, prune)
        if not prune:
            return gone
        current = (
            self.manifest()
        )  # in a bucket, another writer may have restored a version before it was deleted
        tables = [
            manifest.table
            for manifest in (*self.earlier(current), current)
            if manifest.table is not None
        ]
        if len(tables) < len(self.names()):  # a version in an earlier format also needs its rows
            return gone
        KeyTable.at(self.address).prune(sorted({table.version for table in tables}))
        return gone

    def check_files(self, manifest: Manifest, known: Collection[DataFile] = ()) -> None:
        super().check_files(manifest, known)
        self.table(manifest)

    def classes(self, manifest: Manifest) -> pa.Table:
        """Return the label, the text weight and the key statistics of each class of a version."""
        file = manifest.files["classes"]
        return pq.read_table(self._checked(file.name, file.sha256))

    def _checked(self, name: str, sha256: str) -> io.BytesIO:
        try:
            raw = self.files.get(name, OBJECT_BYTES)
        except FileNotFoundError:
            raise StoreError(f"{self}/{name}: missing; {RESTORE}") from None
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise StoreError(
                f"{self}/{name}: damaged (its SHA-256 differs from the manifest's); {RESTORE}"
            )
        return io.BytesIO(raw)

    def table_files(self) -> set[tuple[Path, int]]:
        """Return the files of the table with their modification times. The set is empty for a bucket."""
        paths = [] if self.local is None else self.folder.glob(f"{TABLE}.lance/**/*")
        return {(path, path.stat().st_mtime_ns) for path in paths if path.is_file()}

    def table(self, manifest: Manifest) -> KeyTable:
        """Open the table of a version. Raises StoreError if it does not match the manifest."""
        assert manifest.table is not None
        self.check_engine(manifest)
        table = KeyTable.at(self.address, manifest.table.version)
        own = (
            table.vector_type == (manifest.d, VALUES[manifest.dtype])
            and table.has_points == manifest.has_points
        )
        if not own or table.rows != manifest.n:
            raise StoreError(
                f"{self}: its table does not match version {manifest.version}; go back to an earlier one"
            )
        return table

    def check_engine(self, manifest: Manifest) -> None:
        """Raise StoreError if LanceDB's own manifest of a version is missing or does not match its digest.

        LanceDB has no checksums, so a single flipped bit can make it panic and print a backtrace.
        """
        assert manifest.table is not None
        name = _engine_name(manifest.table)
        if name in manifest.digests:
            self._checked(name, manifest.digests[name])

    def read_labels(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        table = self.table(manifest)
        return table.read(table.label_columns if columns is None else columns)

    def facts(
        self, manifest: Manifest, earlier: list[Manifest]
    ) -> tuple[IntArray, dict[str, object]]:
        return self.classes(manifest)["keys"].to_numpy(), {
            "not_indexed": self.table(manifest).unindexed()
        }

    def create(self, material: BuildInputs) -> Index:
        """Stream the keys into a table. If the index is fitted, the table may be rewritten with the points."""
        from retrieval_tip.fit import closed_form
        from retrieval_tip.index.items import warn, warn_of
        from retrieval_tip.plugins.lance.rows import TableRows, index_kind
        from retrieval_tip.retrieval.duplicates import duplicates

        asked = material.plan["index"] or "auto"
        index_kind(asked)
        with self.write() as writer:
            writer.prunes |= writer.parent is None and material.fit is not None
            kind = asked if material.fit is None else FLAT
            c = len(material.words.class_names)
            blocks = material.labelled_blocks()
            rows = TableRows.create(self.address, writer, blocks, c, material.plan["dtype"], kind)
            index = material.index(rows, rows.statistics(), index_kind(asked, rows.n, c)[1])
            if rows.n <= FEW_KEYS:
                few = rows.in_memory()
                warn_of(duplicates(few.keys, few.labels))
            if material.fit is not None:
                index, choice = closed_form.fit(index, material.fit, factory=asked)
                warn(choice.warnings)
            factory = None if material.fit is None else asked
            return self.commit(writer, index, "build", factory).on(material.device)

    def copy_from(self, index: Index, what: str) -> Index:
        """Raises InputError if the index has trained values."""
        from retrieval_tip.plugins.lance.rows import TableRows

        if index.values is not None and index.fitted is None:
            raise InputError(f"{self}: a LanceDB store cannot hold trained values; use a folder")
        self.check_held(index)
        with self.write() as writer:
            metric = (
                index.metric if index.values is None else None
            )  # the table then contains the points
            c = len(index.class_names)
            blocks = index.rows.blocks()
            rows = TableRows.create(self.address, writer, blocks, c, index.dtype, metric=metric)
            self._committed(writer, index, rows, what)
        return self.load(device=index.device)

    def load(
        self, *, device: str = "auto", verify: Verify | None = None, version: int | None = None
    ) -> Index:
        """Open the current version, or an earlier version. ``verify="full"`` checks every row, like :meth:`verify`.

        If the values were solved, all keys are read into memory. Otherwise, they are read block by block.
        """
        from retrieval_tip.backbones.base import resolve_device

        device = resolve_device(device)

        def opened(manifest: Manifest) -> Index:
            if verify == "full":
                self.check(manifest)
            return self._index(manifest, device)

        return self.opened(opened, version)

    def _index(self, manifest: Manifest, device: str) -> Index:
        import torch

        from retrieval_tip.model import Index
        from retrieval_tip.plugins.lance.rows import TableRows
        from retrieval_tip.store.contents import metric_of

        classes = self.classes(manifest)
        files = manifest.files.items()
        held = {
            kind: np.load(self._checked(file.name, file.sha256))
            for kind, file in files
            if kind != "classes"
        }
        held["text"] = _matrix(classes["text"])
        if "metric" in held:
            held["metric"] = metric_of(held["metric"])
        counts = classes["keys"].to_numpy()
        none = np.zeros((0, 0))
        point_sums = None
        if "point_sum" in classes.column_names:
            point_sums = Sums(counts, _matrix(classes["point_sum"]), none)
        is_by_class = manifest.index == CLASSES  # earlier programs also used vector indexes
        rows = TableRows(
            table=self.table(manifest),
            known=Sums(counts, _matrix(classes["sum"]), held.get("second", none)),
            point_sums=point_sums,
            kind=CLASSES if is_by_class else FLAT,
            automatic=manifest.built.auto_index,
        )
        used: Rows = rows
        if "values" in held:  # a query uses all keys
            arrays = rows.arrays()
            places = np.argsort(np.argsort(arrays.key_ids))
            used = replace(arrays, values=torch.from_numpy(held["values"][places]))
        index = Index.of_version(used, manifest, device, held, factory=rows.kind)
        return index.altered(stored=Origin(self, manifest))

    def current(self, writer: TableWriter, base: Index | None) -> Index:
        assert writer.parent is not None
        assert writer.table is not None
        if base is not None and base.manifest == writer.parent:
            index = base.on("cpu")
        else:
            index = self._index(writer.parent, "cpu")
        table = replace(_table_of(index), table=writer.table, writer=writer)
        return index.altered(rows=_kept_in(table, index.rows))

    def rebuilt(self, index: Index, factory: str | None, dtype: Dtype | None) -> Index:
        """Every row is rewritten, except removed ones."""
        solved = index.values is not None
        metric = None if solved else index.metric
        table = _table_of(index).rewritten(metric, factory, dtype)
        made = index.rebuilt(table.kind, dtype) if solved else index
        made = made.altered(rows=_kept_in(table, made.rows))
        if factory is None:
            return made
        return made.altered(settings=made.settings.override(k=table.few))

    def commit(
        self, writer: TableWriter, index: Index, what: str, factory: str | None = None
    ) -> Index:
        """See :meth:`Store.commit`. Edits and fits of keys in memory are now made in the table.

        ``factory`` is the new type of its index. Raises the errors of :meth:`model.Index.check_answers` and of
        :meth:`Writer.commit`.
        """
        from retrieval_tip.plugins.lance.rows import TableRows
        from retrieval_tip.retrieval.rows import ArrayRows

        table: Rows = _table_of(index)
        if isinstance(index.rows, ArrayRows):
            self.check_held(index)
            for edit in index.rows.pending:
                table = edit(table)
            table = table.with_sums(index.rows.sums).fitted(
                index.metric, index.values, factory, "cpu"
            )
        assert isinstance(table, TableRows)
        return self._committed(writer, index, table, what)

    def _committed(self, writer: TableWriter, index: Index, rows: TableRows, what: str) -> Index:
        """Make ``index``, whose table has the given ``rows``, the current version, and return it as it is stored."""
        from retrieval_tip.model import SUMS_FROM
        from retrieval_tip.store.contents import write

        index.check_answers()
        kind = rows.kind
        rows = rows.kept_up(writer.prunes)
        built = replace(index.built, auto_index=rows.automatic)
        if rows.kind != kind:
            scores = index.current_scores
            settings = index.settings.override(k=index.settings.k or rows.few)
            index = index.altered(
                settings=settings, scores=scores and replace(scores, settings=settings)
            )
        classes = {
            "label": pa.array(index.class_names, pa.string()),
            "keys": pa.array(rows.known.counts),
            "text": vectors(index.text_weights.cpu().numpy()),
            "sum": vectors(rows.known.sums),
        }
        if rows.point_sums is not None:
            classes["point_sum"] = vectors(rows.point_sums.sums)
        held = index.fit_contents() | {"classes": pa.table(classes)}
        size = rows.n * rows.d * np.dtype(rows.dtype).itemsize
        second = rows.known.second
        if 0 < second.nbytes * SUMS_FROM <= size:
            held["second"] = second
        if index.values is not None:
            order = np.argsort(index.labels["key_id"].to_numpy())
            held["values"] = index.values[order]
        write({kind: own for kind, own in held.items() if own is not None}, writer, None)
        table = Table(TABLE, rows.table.version, rows.n)
        manifest = index.altered(built=built, rows=rows).manifest_of(
            writer, what, table, writer.digests(table)
        )
        writer.commit(manifest)
        rows = replace(rows, table=self.table(manifest), writer=None)  # pinned to this version
        kept = rows if index.values is None else _kept_in(rows, index.rows)
        return index.altered(built=built, stored=Origin(self, manifest), rows=kept)

    def check_held(self, index: Index) -> None:
        """Raise InputError if an index has solved values and does not fit in memory."""
        if (
            index.values is not None
            and index.n * (index.d + len(index.class_names)) * 4 > MOST_HELD
        ):
            raise InputError(
                f"{self}: {index.n:,} keys with solved values of {len(index.class_names):,} classes are too many for a "
                f"LanceDB store; fit one-hot values first ({command_line('fit', self, '--values', 'one-hot')})"
            )

    def verify(self) -> Index:
        """In a bucket, only the objects of earlier versions are checked, not their rows."""
        index = self.load(device="cpu", verify="full")
        assert index.manifest is not None
        self.check_earlier(index.manifest)
        return index

    def check(self, manifest: Manifest) -> None:
        """Every row is checked, too, and that all parts are consistent."""
        super().check(manifest)
        index = self._index(manifest, "cpu")
        _table_of(index).check(index.metric)


def _table_of(index: Index) -> TableRows:
    """Return the rows of the table that keeps an index."""
    from retrieval_tip.plugins.lance.rows import TableRows
    from retrieval_tip.retrieval.rows import ArrayRows

    table = index.rows.kept_in if isinstance(index.rows, ArrayRows) else index.rows
    assert isinstance(table, TableRows)
    return table


def _kept_in(table: TableRows, rows: Rows) -> Rows:
    """Return rows in memory that the table keeps, or the table itself if the keys are not in memory."""
    from retrieval_tip.retrieval.rows import ArrayRows

    return replace(rows, kept_in=table, pending=()) if isinstance(rows, ArrayRows) else table


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a column of vectors as an array that can be written to."""
    values: npt.NDArray[Any] = (
        column.combine_chunks().flatten().to_numpy().reshape(len(column), -1).copy()
    )
    return values


def _engine_name(table: Table) -> str:
    """Return the name of LanceDB's own manifest. LanceDB numbers its manifests in descending order."""
    return f"{table.name}.lance/_versions/{(1 << 64) - 1 - table.version:020d}.manifest"
