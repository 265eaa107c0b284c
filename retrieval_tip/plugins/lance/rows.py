"""The keys of an index and their labels as rows of a LanceDB table, which may not fit in memory.

The tail is computed from per-class statistics. If a query uses all keys, they are read block by block. An index in a
folder gives the same answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import IntArray, KeyArray
from retrieval_tip.data.source import spread
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.plugins.lance.key_table import (
    CLASSES,
    FLAT,
    POINT,
    RESTORE,
    ROW,
    UNINDEXED,
    VALUES,
    VECTOR,
    KeyTable,
    grouped,
    literal,
    rows_of,
)
from retrieval_tip.retrieval.duplicates import Duplicates, duplicates
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.retrieval.inputs import KeysInPlace
from retrieval_tip.retrieval.keys import SAMPLE, KeyStream, transformed
from retrieval_tip.retrieval.rows import FRESH_PAIRS, ArrayRows, Rows
from retrieval_tip.retrieval.vector_index import auto_k
from retrieval_tip.retrieval.whole_classes import SPREAD_CLASSES
from retrieval_tip.settings import Dtype
from retrieval_tip.store.address import Address
from retrieval_tip.store.labels import LABEL_SCHEMA
from retrieval_tip.store.sums import LEAST, SumCheck, Sums
from retrieval_tip.store.versions import Writer
from retrieval_tip.wording import command_line

MOST_TAKEN = 1 << 29
"""Maximum size in bytes of the keys that are copied from a table into memory."""
MOVED = {"float32": 1e-4, "float16": 4e-3}
"""Tolerance for the difference between a stored and a computed point, by dtype."""
MOST_ASKED, NEIGHBOURS = 512, 4
"""Maximum number of new keys to compare with their neighbours, and the number of neighbours per key."""
INDEX_FROM = 50_000
"""Minimum number of keys for which an index is faster than a comparison with every key."""
HELD_BYTES = 1 << 29
"""Maximum size in bytes of keys that stay in memory after the first read."""
PIECE = 1 << 24
"""Maximum size in bytes of the float32 keys of several classes that are read together."""
SPREAD_BYTES, SPREAD_LEAST = 1 << 28, 8
"""Maximum size in bytes of the sample for :meth:`whole_classes.ClassBounds.slack`, and its minimum number of keys."""

Block = tuple[Tensor, Tensor, Tensor]


class OrderedKeys(KeysInPlace):
    """A column of keys or points in the same order as in a folder, sorted by class and then by key id.

    ``offsets`` are their positions in the table.
    """

    def __init__(self, table: KeyTable, column: str, d: int, offsets: IntArray) -> None:
        self.table = table
        self.column = column
        self.shape = (len(offsets), d)
        self._offsets = offsets
        self._places = np.argsort(offsets)

    def __getitem__(self, places: IntArray) -> KeyArray:
        offsets, where = np.unique(self._offsets[places], return_inverse=True)
        keys: KeyArray = self.table.matrix(self.table.offsets(offsets, [self.column])[self.column])[
            where
        ]
        return keys

    def blocks(self, places: IntArray) -> Iterator[tuple[KeyArray, IntArray]]:
        """The table is read once."""
        wanted = np.zeros(len(self), dtype=bool)
        start = 0
        wanted[self._offsets[places]] = True
        for batch in self.table.scan([self.column]):
            own = np.flatnonzero(wanted[start : start + len(batch)])
            if len(own):
                yield self.table.matrix(batch[self.column])[own], self._places[start + own]
            start += len(batch)


class LanceKeys(KeyStream):
    """The keys of a table or their points, with their ``sums``.

    ``kind`` is the type of the table's index.
    """

    def __init__(
        self, table: KeyTable, sums: Sums, kind: str, device: str, metric: tip.Metric | None
    ) -> None:
        total = torch.from_numpy(sums.counts.astype(np.float32)).to(device)
        super().__init__((sums.n, sums.sums.shape[1]), total, device, metric)
        self.table = table
        self._column = table.vector_column
        self._sums = sums.sums
        self._counts = sums.counts
        self.index_type = kind

    @cached_property
    def sums(self) -> Tensor:
        """Per-class sums of the keys, of shape ``[c, d]``."""
        return torch.from_numpy(self._sums.astype(np.float32)).to(self.device)

    @cached_property
    def _held(self) -> list[Block]:
        return list(self._read())

    def _read(self) -> Iterator[Block]:
        n_read = 0
        for block in self._grouped():
            yield from zip(*(column.split(self.block) for column in block), strict=True)
            n_read += len(block[1])
        if n_read != self.n:
            raise StoreError(
                f"{self.table.address}: has {n_read} rows instead of {self.n}; use another version"
            )

    def blocks(self) -> Iterator[Block]:
        return iter(self._held) if self.n * self.d * 4 <= HELD_BYTES else self._read()

    def of_classes(self, class_ids: IntArray) -> Iterator[tuple[int, Tensor, Tensor]]:
        """See :meth:`keys.KeyStream.of_classes`. Classes are read together, unless they are too large."""
        most = PIECE // (4 * self.d)
        counts = self._counts[class_ids]
        read = np.zeros_like(counts)
        pieces = np.cumsum(counts) // most
        for piece in np.unique(pieces):
            own = pieces == piece
            for keys, ids, rows in self._grouped(
                class_ids[own].tolist(), at_once=counts[own].sum() <= 2 * most
            ):
                present, sizes = ids.unique_consecutive(return_counts=True)
                places = np.searchsorted(class_ids, present.cpu().numpy())
                read[places] += sizes.cpu().numpy()
                parts = (column.split(sizes.tolist()) for column in (keys, rows))
                yield from zip(places.tolist(), *parts, strict=True)
        if (read != counts).any():
            raise StoreError(
                f"{self.table.address}: its keys do not match the manifest; check it with index verify"
            )

    def _grouped(
        self, class_ids: Sequence[int] | None = None, *, at_once: bool = False
    ) -> Iterator[Block]:
        """Yield keys, their class ids and their row numbers in batches that are grouped by class."""
        where = () if class_ids is None else ("class_id", class_ids)
        found: Iterable[pa.RecordBatch | pa.Table] = self.table.scan(
            ["class_id", self._column], *where, with_rows=True
        )
        if at_once and (batches := list(found)):
            found = [pa.Table.from_batches(batches)]
        for batch in found:
            ids = self.table.class_ids(batch["class_id"], self.n_classes)
            keys = self.table.matrix(batch[self._column])
            rows = batch[ROW].to_numpy().astype(np.int64)
            if (ids[1:] < ids[:-1]).any():
                order = np.argsort(ids, kind="stable")
                keys = keys[order]
                ids = ids[order]
                rows = rows[order]
            keys = np.array(keys, dtype=np.float32)  # Arrow's are read-only
            yield tuple(torch.from_numpy(array).to(self.device) for array in (keys, ids, rows))  # type: ignore[misc]

    def sample(self) -> tuple[Tensor, Tensor]:
        number = SAMPLE
        key = 4 * self.d
        if self.n * key > SPREAD_BYTES:  # otherwise, all keys can be read cheaply
            number = int(
                np.clip(
                    SPREAD_BYTES / (SPREAD_CLASSES * self.mean_count * key), SPREAD_LEAST, number
                )
            )
        some = self.table.offsets(spread(self.n, number), ["class_id", self._column])
        keys = np.array(self.table.matrix(some[self._column]), dtype=np.float32)
        ids = self.table.class_ids(some["class_id"], self.n_classes)
        return torch.from_numpy(keys).to(self.device), torch.from_numpy(ids).to(self.device)

    def nearest(self, points: Tensor, k: int) -> Nearest:
        """Without an index, a query is compared with all keys."""
        k = min(k, self.n)
        if self.by_class:
            return self.nearest_by_class(points, k)
        none = torch.empty(len(points), 0, dtype=torch.int64, device=self.device)
        best = Nearest(points.new_empty(len(points), 0), none, none)
        for keys, ids, rows in self.blocks():
            affinity, place = tip.affinity(points, keys).topk(min(k, len(keys)), dim=1)
            every = Nearest.joined([best, Nearest(affinity, rows[place], ids[place])], dim=1)
            best = every.at(every.affinity.topk(min(k, every.affinity.shape[1]), dim=1).indices)
        return best


@dataclass(frozen=True, kw_only=True, eq=False)
class TableRows(Rows):
    """The rows of a table, with sums of their classes. Edits write to the table, so keep only their result.

    Attributes:
        table: the version of the table.
        known: the number of keys and their sum per class. The sum of the outer products may not be known.
        point_sums: the same for the points, if the table contains points.
        kind: the type of the table's index.
        automatic: whether the type was chosen automatically.
        writer: the writer of the next version, or ``None`` if the rows are only read.
    """

    table: KeyTable
    known: Sums
    point_sums: Sums | None = None
    kind: str = FLAT
    automatic: bool = False
    writer: Writer | None = None

    @classmethod
    def create(
        cls,
        address: Address,
        writer: Writer,
        blocks: Iterable[tuple[pa.Table, KeyArray]],
        n_classes: int,
        dtype: Dtype = "float32",
        index: str = "auto",
        *,
        metric: tip.Metric | None = None,
    ) -> TableRows:
        """Stream blocks of labels and keys into a table, and build its index.

        Each block is a label table (see :func:`labels.label_table`) and an array of keys of shape ``[b, d]``. If you
        give a ``metric``, the table also contains the points of the keys.
        """
        index_kind(index)
        ahead = iter(blocks)
        labels, keys = next(ahead)
        writer.begin()
        d = keys.shape[1]
        sums = Sums.of([], n_classes, d)
        point_sums = None if metric is None else Sums.of([], n_classes, d, False)
        extra = list(labels.schema)[len(LABEL_SCHEMA) :]
        check_columns(extra)
        vectors = [VECTOR] if metric is None else [VECTOR, POINT]
        schema = pa.schema(
            [
                *LABEL_SCHEMA,
                *extra,
                *(pa.field(name, pa.list_(VALUES[dtype], d)) for name in vectors),
            ]
        )

        def rows() -> Iterator[pa.RecordBatch]:
            for part, own in itertools.chain([(labels, keys)], ahead):
                ids = part["class_id"].to_numpy().astype(np.int64)
                with np.errstate(over="ignore"):  # an overflow is rejected below
                    own = own.astype(dtype)
                if not np.isfinite(own).all():
                    raise InputError(f"keys: some values are too large for {dtype}; use float32")
                points = transformed(metric, own, "cpu")
                sums.count(own, ids)
                if points is not None and point_sums is not None:
                    point_sums.count(points, ids)
                yield from rows_of(part, own, points).cast(schema).to_batches()

        table = KeyTable.create(address, grouped(rows()), schema)
        made = cls(table=table, known=sums, point_sums=point_sums, writer=writer)
        return made.indexed(index)

    @property
    def n(self) -> int:
        return self.known.n

    @property
    def d(self) -> int:
        return int(self.known.sums.shape[1])

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.known.counts)

    @cached_property
    def dtype(self) -> Dtype:
        return "float16" if self.table.vector_type[1] == pa.float16() else "float32"

    @cached_property
    def _order(self) -> tuple[IntArray, IntArray]:
        """The positions of the rows in the table, in the order of a folder, and their class ids."""
        ids = self.table.read(["key_id", "class_id"])
        class_ids = self.table.class_ids(ids["class_id"], self.n_classes)
        order = np.lexsort((ids["key_id"].to_numpy(), class_ids))
        if len(order) != self.n:
            raise StoreError(
                f"{self.table.address}: has {len(order)} rows instead of {self.n}; use another version"
            )
        return order, class_ids[order]

    @cached_property
    def keys(self) -> OrderedKeys:  # type: ignore[override]
        return OrderedKeys(self.table, VECTOR, self.d, self._order[0])

    @property
    def vectors(self) -> OrderedKeys:
        return OrderedKeys(self.table, self.table.vector_column, self.d, self._order[0])

    @cached_property
    def labels(self) -> pa.Table:
        """The label store as a table in memory, which takes about 150 bytes per key."""
        return self.columns(*self.table.label_columns)

    @property
    def class_ids(self) -> IntArray:
        return self._order[1]

    @property
    def sums(self) -> Sums | None:  # type: ignore[override]  # derived
        return self.known if self.known.second.size else None

    def with_sums(self, sums: Sums | None) -> TableRows:
        return (
            self if sums is None else replace(self, known=replace(self.known, second=sums.second))
        )

    def stream(self, n_classes: int, device: str, metric: tip.Metric | None) -> LanceKeys:
        return LanceKeys(self.table, self.point_sums or self.known, self.kind, device, metric)

    def columns(self, *names: str) -> pa.Table:
        return self.table.read(names).take(pa.array(self._order[0]))

    def described(self, rows: IntArray, columns: Sequence[str]) -> pa.Table:
        return self.table.take(rows, columns)

    def some(self, m: int) -> tuple[KeyArray, pa.Table]:
        some = self.table.offsets(spread(self.n, m), ["key_id", "class_id", VECTOR])
        return self.table.matrix(some[VECTOR]), some.select(["key_id", "class_id"])

    def where(
        self, column: str, values: Sequence[int | str], columns: Sequence[str] = ()
    ) -> pa.Table:
        return self.table.read(columns or self.table.label_columns, column, values)

    def blocks(
        self, columns: Sequence[str] = (), class_ids: IntArray | None = None
    ) -> Iterator[tuple[pa.Table, KeyArray]]:
        """The blocks are in the order of the table."""
        where = () if class_ids is None else ("class_id", class_ids.tolist())
        for batch in self.table.scan([*(columns or self.table.label_columns), VECTOR], *where):
            yield (
                pa.Table.from_batches([batch]).drop_columns([VECTOR]),
                self.table.matrix(batch[VECTOR]),
            )

    def of(self, key_ids: Sequence[int]) -> ArrayRows:
        rows = self.table.read(
            self.table.schema.names, "key_id", list(dict.fromkeys(key_ids))
        ).sort_by("key_id")
        missing = sorted(set(key_ids) - set(rows["key_id"].to_pylist()))
        if missing:
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
        points = self.table.matrix(rows[POINT]) if self.table.has_points else None
        return ArrayRows(
            self.table.matrix(rows[VECTOR]), rows.select(self.table.label_columns), points=points
        )

    def take(self, rows: IntArray) -> ArrayRows:
        self._check_taken(len(rows))
        return ArrayRows(self.keys[rows], self.labels.take(pa.array(rows)))

    def in_memory(self) -> ArrayRows:
        self._check_taken(self.n)
        return self.arrays()

    def arrays(self) -> ArrayRows:
        """Return the rows with all keys in memory, however large."""
        labels, keys = zip(*self.blocks(), strict=True)
        order = self._order[0]
        labels = pa.concat_tables(labels).take(pa.array(order))
        return ArrayRows(np.concatenate(keys)[order], labels, sums=self.sums, kept_in=self)

    def _check_taken(self, n: int) -> None:
        if n * self.d * 4 > MOST_TAKEN:
            place = self.table.address
            raise UsageError(
                f"{place}: {n:,} keys are too many to load into memory; choose fewer (--where), or copy the "
                f"index into a folder: {command_line('index', 'clone', place, 'DIR')}"
            )

    def written(self, writer: Writer) -> ArrayRows:
        places = np.argsort(self._order[0])
        start = 0
        array = writer.stage_array("keys", (self.n, self.d), self.dtype)
        for _, keys in self.blocks():
            array[places[start : start + len(keys)]] = keys
            start += len(keys)
        return ArrayRows(writer.seal_array("keys", array), self.labels)

    def duplicates_of(self, key_ids: Sequence[int], keys: KeyStream) -> Duplicates:
        """Only neighbours of the keys and keys with the same digests are read."""
        asked = self.of(key_ids[:MOST_ASKED])
        near = keys.nearest(keys.phi(torch.from_numpy(asked.keys.astype(np.float32))), NEIGHBOURS)
        rows = np.unique(near.rows[near.rows >= 0].numpy())
        digests = self.where("key_id", key_ids)["digest"].drop_null().unique().to_pylist()
        same = self.table.read(["key_id"], "digest", digests)["key_id"].to_numpy()
        some = np.unique(
            np.concatenate([self.described(rows, ["key_id"])["key_id"].to_numpy(), same, key_ids])
        )
        compared = self.of(some.tolist())
        fresh = np.flatnonzero(np.isin(compared.key_ids, asked.key_ids))
        pairs = duplicates(compared.keys, compared.labels, fresh, budget=FRESH_PAIRS)
        return pairs if asked.n == len(key_ids) else replace(pairs, compared="digests")

    def replaced(self, gone: ArrayRows | None, new: ArrayRows | None) -> TableRows:
        if new is not None:
            check_columns(list(new.labels.schema)[len(LABEL_SCHEMA) :])
            known = {field.name: field.type for field in self.table.schema}
            for name, kind in zip(new.labels.schema.names, new.labels.schema.types, strict=True):
                if known.get(name, kind) != kind:
                    raise InputError(
                        f"labels: column {name!r} is {kind}, but {known[name]} in the index; convert it"
                    )
        sums = self.known
        points = self.point_sums
        if gone is not None:
            self._changed.delete(gone.key_ids.tolist())
        if new is not None:
            own = new.take(np.argsort(new.class_ids, kind="stable"))
            new_points = own.points if self.table.has_points else None
            self._changed.append(rows_of(own.labels, own.keys, new_points))
        for part, sign in ((gone, -1), (new, 1)):
            if part is not None:
                sums = sums.added(part.keys, part.class_ids, sign)
                if points is not None and part.points is not None:
                    points = points.added(part.points, part.class_ids, sign)
        return replace(self, known=sums, point_sums=points)

    def renamed(self, class_id: int, name: str) -> TableRows:
        if self.known.counts[class_id]:
            self._changed.change(f"class_id = {class_id}", "label", literal(name))
        return replace(self)

    def widened(self, n_classes: int) -> TableRows:
        return self._with_sums(lambda sums: sums.widened(n_classes))

    def narrowed(self, class_ids: IntArray, n_classes: int) -> TableRows:
        for class_id in sorted(class_ids.tolist(), reverse=True):
            if self.known.counts[class_id + 1 :].any():
                self._changed.change(f"class_id > {class_id}", "class_id", "class_id - 1")
        return self._with_sums(lambda sums: sums.without(class_ids))

    def _with_sums(self, change: Callable[[Sums], Sums]) -> TableRows:
        points = self.point_sums
        if points is not None:
            points = change(points)
        return replace(self, known=change(self.known), point_sums=points)

    def fitted(
        self, metric: tip.Metric | None, values: Tensor | None, factory: str | None, device: str
    ) -> TableRows:
        """With one-hot values, the table is rewritten with the points of the keys."""
        if metric is not None and values is None:
            return self.rewritten(metric, factory)
        rows = self
        moved = self.table.has_points
        if moved:
            self._changed.drop_points()
            rows = replace(self, point_sums=None)
        return rows.indexed(factory or self.asked) if moved or factory is not None else rows

    def rewritten(
        self,
        metric: tip.Metric | None,
        factory: str | None = None,
        dtype: Dtype | None = None,
    ) -> TableRows:
        """Rewrite every row and the index, so that the files of this version do not contain removed rows.

        You can change the index type with ``factory`` and the dtype of the keys with ``dtype``. With a ``metric``, the
        table also contains the points.
        """
        writer = self.writer
        table = self.table
        assert writer is not None
        if writer.parent is not None:  # damaged rows must not get valid sums and digests
            writer.store.check(writer.parent)
        before = replace(self, table=KeyTable.at(table.address, table.version))  # pinned meanwhile
        return self.create(
            table.address,
            writer,
            before.blocks(),
            self.n_classes,
            dtype or self.dtype,
            factory or self.asked,
            metric=metric,
        )

    @property
    def asked(self) -> str:
        """The type of the index as it was asked for."""
        return "auto" if self.automatic else self.kind

    def indexed(self, asked: str) -> TableRows:
        """Build the index of the table."""
        kind, _ = index_kind(asked, self.n, self.n_classes)
        self._changed.build_index(kind)
        return replace(self, kind=kind, automatic=asked == "auto")

    def kept_up(self, prunes: bool) -> TableRows:
        """Update the index if needed, because unindexed rows slow down every search."""
        if prunes:  # otherwise pruning would merge fragments in a separate version
            self._merge()
        if self.kind == FLAT and self.automatic and self.n >= INDEX_FROM:
            return self.indexed("auto")
        if self.kind != FLAT and self.table.unindexed() >= UNINDEXED:
            self._merge()
        return self

    def _merge(self) -> None:
        writer = self.writer
        if (
            writer is not None and writer.parent is not None
        ):  # damaged rows must not get valid digests
            writer.store.check_files(writer.parent)
        self._changed.optimize()

    @property
    def _changed(self) -> KeyTable:
        """The table, which is about to be changed by the writer."""
        assert self.writer is not None
        self.writer.begin()
        return self.table

    @property
    def few(self) -> int | None:
        """The number of keys per query that goes with an automatic index."""
        return index_kind(self.asked, self.n, self.n_classes)[1]

    def check(self, metric: tip.Metric | None) -> None:
        """Raise StoreError if a row is damaged or does not match the statistics or the metric."""
        place = self.table.address
        c = self.n_classes
        of_keys = SumCheck(c, self.d, LEAST)
        of_points = SumCheck(c, self.d, LEAST)
        for batch in self.table.scan(self.table.schema.names):
            ids = self.table.class_ids(batch["class_id"], c)
            keys = self.table.matrix(batch[VECTOR])
            of_keys.count(keys, ids)
            if self.table.has_points:
                points = self.table.matrix(batch[POINT])
                expected = transformed(metric, keys, "cpu")
                if expected is None or not np.allclose(points, expected, atol=MOVED[self.dtype]):
                    raise StoreError(
                        f"{place}: points do not match their keys; run index set --index auto"
                    )
                of_points.count(points, ids)
        known = self.known
        moved = self.point_sums
        fit = of_keys.has(known.counts, known.sums)
        if not fit or (moved is not None and not of_points.has(moved.counts, moved.sums)):
            raise StoreError(f"{place}: keys do not match the sums of their classes; {RESTORE}")
        if self.sums is not None and not of_keys.has_second(known.second):
            raise StoreError(
                f"{place}: keys do not match the sum of their products; fit the index again"
            )


def index_kind(factory: str, n: int = 0, c: int = 1) -> tuple[str, int | None]:
    """Return the index type for a requested ``factory``, and the number of keys per query to use with it.

    You can request ``auto``, ``Flat`` or ``Classes``. For ``n`` keys of ``c`` classes, ``auto`` selects ``Classes``
    and the keys of 8 classes if there are many keys. Raises UsageError for any other type.
    """
    if factory == "auto":
        return (FLAT, None) if n < INDEX_FROM else (CLASSES, auto_k(n, c))
    if factory not in (FLAT, CLASSES):
        raise UsageError(f"index {factory!r}: give auto, {FLAT} or {CLASSES} for a LanceDB store")
    return factory, None


def check_columns(columns: Iterable[pa.Field]) -> None:
    """Raise InputError if the name of an extra column is reserved or is not allowed."""
    for column in columns:
        if (
            column.name in (VECTOR, "")
            or column.name.startswith("_")
            or set(".`") & set(column.name)
        ):
            raise InputError(
                f"column {column.name!r}: a LanceDB store reserves {VECTOR} and names that begin with _, "
                "and does not allow dots or backticks; rename or remove it"
            )
