"""Store an index in LanceDB. The store consists of a LanceDB table and of objects next to the table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.data.tables import vectors
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index.places import Change, Store
from retrieval_tip.lance.key_table import CLASSES, FLAT, changed_meanwhile
from retrieval_tip.lance.versions import TableVersions, TableWriter, matrix
from retrieval_tip.settings import Dtype, Precision, Verify
from retrieval_tip.store.manifest import Manifest, Table
from retrieval_tip.store.versions import Origin

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.fit.closed_form import Fit, FormChoice
    from retrieval_tip.fit.folds import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.lance.rows import TableRows
    from retrieval_tip.model import Index

FEW_KEYS = 8192
"""Maximum number of keys in a new store for which all keys are compared to find images in two classes."""
MOST_HELD = 1 << 30
"""Maximum size in bytes of the keys and solved values that are held in memory."""


class LanceStore(TableVersions, Store):
    """A store that keeps the versions of an index in LanceDB. See :mod:`lance.versions` for details."""

    look_every = 2.0

    def movable(self) -> Path:
        raise InputError(f"{self}: only index folders can be renamed, duplicated or deleted; use index clone")

    def create(self, material: Material) -> Index:
        """Stream the keys into a table. If the index is fitted, the table may be rewritten with the points."""
        from retrieval_tip.index.items import warn, warn_of
        from retrieval_tip.lance.rows import TableRows, index_kind
        from retrieval_tip.model import Index
        from retrieval_tip.retrieval import inputs
        from retrieval_tip.retrieval.duplicates import duplicates

        asked = material.plan.index or "auto"
        index_kind(asked)
        with self.write() as writer:
            names, weights, templates, _ = material.words
            kind = asked if material.fit is None else FLAT
            rows = TableRows.create(writer, material.labelled_blocks(), len(names), material.plan.dtype, kind)
            statistics = rows.statistics()
            if weights is not None:
                wanted = len(names), rows.d
                inputs.check_shape(
                    "text_weights", weights.shape, wanted, "one per class, from the backbone of the keys"
                )
            index = Index(
                rows, list(names), inputs.text_weights(weights, len(names), rows.d), templates=templates,
                settings=material.settings(statistics, index_kind(asked, rows.n, len(names))[1]),
                backbone=material.backbone, provenance=material.described(statistics), built=material.built,
                parts=material.reader.parts, groups=material.groups,
            )  # fmt: skip
            material.warn_of_bare(rows.counts)
            if rows.n <= FEW_KEYS:
                few = rows.in_memory()
                warn_of(duplicates(few.keys, few.labels))
            change = TableChange(self, writer, index, rows)
            if material.fit is not None:
                warn(change.fit(material.fit, factory=asked).warnings)
            change.what = "build"
            change.commit()
        return self.load(device=material.device, version=index.version)

    def copy_from(self, index: Index, what: str) -> int:
        """Raises InputError if the index has trained values."""
        from retrieval_tip.lance.rows import TableRows

        if index.values is not None and index.fitted is None:
            raise InputError(f"{self}: a LanceDB store cannot hold trained values; use a folder")
        self.check_held(index)
        with self.write() as writer:
            metric = index.metric if index.values is None else None  # the table then contains the points
            c, blocks = len(index.class_names), index.rows.blocks()
            rows = TableRows.create(writer, blocks, c, index.dtype, metric=metric)
            return self.commit(writer, copy.copy(index), rows, what)

    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify | None = None,
        version: int | None = None,
    ) -> Index:
        """Products use float32. ``verify="full"`` checks every row, like :meth:`verify`.

        If the values were solved, all keys are read into memory. Otherwise, they are read block by block.
        """
        from retrieval_tip.backbones.base import resolve_device

        if precision in ("float16", "bfloat16"):
            raise UsageError(f"precision {precision}: a LanceDB store only supports float32; remove the option")
        device = resolve_device(device)

        def opened(manifest: Manifest) -> Index:
            if verify == "full":
                self.check(manifest)
            return self._index(manifest, device)[0]

        return self.opened(opened, version)

    def _index(self, manifest: Manifest, device: str, writer: TableWriter | None = None) -> tuple[Index, TableRows]:
        """Open a version, and return it together with the rows of its table, which a ``writer`` may edit."""
        import torch

        from retrieval_tip.lance.rows import TableRows
        from retrieval_tip.model import Index, described_by
        from retrieval_tip.retrieval.sets import Scores
        from retrieval_tip.store.contents import metric_of

        classes, metric = self.classes(manifest), self.array(manifest, "metric")
        rows = TableRows.opened(manifest, self, classes, writer)
        index = Index(
            rows, text_weights=torch.from_numpy(matrix(classes["text"])),
            metric=None if metric is None else metric_of(metric), **described_by(manifest, device),
        )  # fmt: skip
        values = self.array(manifest, "values")
        if values is not None:  # a query uses all keys
            arrays = rows.arrays()
            places = np.argsort(np.argsort(arrays.key_ids))
            kind = CLASSES if rows.kind == CLASSES else FLAT
            index = index.over(replace(arrays, values=torch.from_numpy(values[places])), kind)
        index.prior, index.stored = self.array(manifest, "prior"), Origin(self, manifest)
        scores = self.array(manifest, "scores")
        index.scores = None if scores is None else Scores(scores, index.settings)
        return index, rows

    def changed_by(self, writer: TableWriter) -> TableChange:
        assert writer.parent is not None
        return TableChange(self, writer, *self._index(writer.parent, "cpu", writer))

    def commit(self, writer: TableWriter, index: Index, rows: TableRows, what: str) -> int:
        """Make ``index``, whose table has the given ``rows``, the current version, and return its number.

        ``what`` is a short description for the history. Raises the errors of :meth:`editing.Editing.check_answers` and
        :meth:`Writer.commit`.
        """
        index.check_answers()
        kind, rows = rows.kind, rows.kept_up(writer.prunes)
        if rows.kind != kind:
            scores, index.settings = index.current_scores, index.settings.override(k=index.settings.k or rows.few)
            index.scores = scores and replace(scores, settings=index.settings)
        index.built = replace(index.built, auto_index=rows.automatic)
        text = index.text_weights.cpu().numpy()
        classes = {"label": pa.array(index.class_names, pa.string()), "keys": pa.array(rows.counts)}
        classes |= {"text": vectors(text), "sum": vectors(rows.totals)}
        classes |= {} if rows.points is None else {"point_sum": vectors(rows.points)}
        writer.put_table("classes", pa.table(classes))
        for kind, array in _arrays(index, rows):
            writer.put_array(kind, array)
        table = Table(rows.table.name, rows.table.version, rows.n)
        digests = writer.digests(table)
        stored = copy.copy(index)
        stored.set_rows(rows)
        manifest = stored.manifest_of(writer.number, writer.before, what, writer.files, table=table, digests=digests)
        writer.commit(manifest)
        index.stored = Origin(self, manifest)
        return manifest.version

    def check_held(self, index: Index) -> None:
        """Raise InputError if an index has solved values and does not fit in memory."""
        if index.values is not None and index.n * (index.d + len(index.class_names)) * 4 > MOST_HELD:
            raise InputError(
                f"{self}: {index.n:,} keys with solved values of {len(index.class_names):,} classes are too many for a "
                f"LanceDB store; fit one-hot values first (retrieval-tip fit {self} --values one-hot)"
            )

    def fit(self, asked: Fit, queries: Callable[[Index], Queries] | None) -> FormChoice:
        judged_by, version = None, None
        if queries is not None:
            index = self.load(device="cpu")
            judged_by, version = queries(index), index.version
        with self.change() as change:
            if version not in (None, change.index.version):
                raise changed_meanwhile(self.address)
            change.what = "fit"
            return change.fit(asked, judged_by)

    def verify(self) -> Index:
        """In a bucket, only the objects of earlier versions are checked, not their rows."""
        index = self.load(device="cpu", verify="full")
        assert index.manifest is not None
        self.check_earlier(index.manifest, index.manifest.digested)
        return index

    def check(self, manifest: Manifest) -> None:
        """Every row is checked, too, and that all parts are consistent."""
        from retrieval_tip.lance.rows import TableRows
        from retrieval_tip.store.contents import metric_of

        super().check(manifest)
        metric, rows = self.array(manifest, "metric"), TableRows.opened(manifest, self, self.classes(manifest))
        rows.check(None if metric is None else metric_of(metric))


class TableChange(Change):
    """A change of an index whose rows are in a table.

    The keys are in memory if the values are solved. The table then follows the edits at the end.
    """

    writer: TableWriter

    def __init__(self, store: LanceStore, writer: TableWriter, index: Index, rows: TableRows) -> None:
        super().__init__(index, writer)
        self.store, self._rows = store, rows
        self._factory: str | None = None

    @property
    def _table(self) -> TableRows:
        """The rows of the table. They lack the edits of an index in memory."""
        from retrieval_tip.lance.rows import TableRows

        return self.index.rows if isinstance(self.index.rows, TableRows) else self._rows

    def rebuild(self, index: str | None, dtype: Dtype | None) -> None:
        """Every row is rewritten, except removed ones."""
        own, solved = self.index, self.index.values is not None
        rows = self._rows = self._table.rewritten(None if solved else own.metric, index, dtype)
        if solved:
            own.rebuild(CLASSES if rows.kind == CLASSES else FLAT, dtype)
        else:
            own.set_rows(rows)
        if index is not None:
            own.settings = own.settings.override(k=rows.few)

    def fit(self, asked: Fit, validation: Queries | None = None, factory: str | None = None) -> FormChoice:
        """See :meth:`Change.fit`.

        All keys are loaded into memory if there are few enough for solved values. Otherwise, they are read in a few
        passes. ``factory`` is the new type of the index.
        """
        from retrieval_tip.fit import closed_form
        from retrieval_tip.retrieval.ridge import MOST_SOLVED

        rows = self._rows = self._table
        if rows.n > MOST_SOLVED:
            return closed_form.fit(self.index, asked, validation=validation, factory=factory)
        self._factory = factory
        if self.index.rows is rows:
            self.index.set_rows(rows.arrays())
        by_class = CLASSES if (factory or rows.kind) == CLASSES else None  # this type does not support solved values
        return closed_form.fit(self.index, asked, validation=validation, factory=by_class)

    def commit(self) -> None:
        from retrieval_tip.retrieval.rows import ArrayRows

        index, table = self.index, self._table
        if isinstance(index.rows, ArrayRows):
            self.store.check_held(index)
            table = table.following(index.rows, len(index.class_names))
            table = table.fitted(index.metric, index.values, self._factory, "cpu")
        self.store.commit(self.writer, index, table, self.what)


def _arrays(index: Index, rows: TableRows) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    from retrieval_tip.model import SUMS_FROM
    from retrieval_tip.store.contents import array_of

    size = rows.n * rows.d * np.dtype(rows.dtype).itemsize
    if rows.second is not None and rows.second.nbytes * SUMS_FROM <= size:
        yield "second", rows.second
    if index.prior is not None:
        yield "prior", index.prior
    if index.current_scores is not None:
        yield "scores", index.current_scores.rows
    if index.metric is not None:
        yield "metric", array_of(index.metric)
    if index.values is not None:
        yield "values", index.values.cpu().numpy()[np.argsort(index.labels["key_id"].to_numpy())]
