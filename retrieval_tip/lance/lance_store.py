"""Store an index in LanceDB. The store consists of a LanceDB table and of objects next to the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index.stores import Change, Store, VersionWriter
from retrieval_tip.lance.key_table import changed_meanwhile
from retrieval_tip.lance.versions import LanceVersions
from retrieval_tip.settings import Precision, Verify
from retrieval_tip.store.manifest import Manifest

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.answering import AnsweringIndex
    from retrieval_tip.fit.closed_form import Fit, FormChoice
    from retrieval_tip.fit.folds import Queries
    from retrieval_tip.index.items import Material

FEW_KEYS = 8192
"""Maximum number of keys in a new store for which all keys are compared to find images in two classes."""


class LanceStore(LanceVersions, Store):
    """A store that keeps the versions of an index in LanceDB. See :mod:`lance.versions` for details."""

    look_every = 2.0

    @property
    def local(self) -> Path | None:  # type: ignore[override]  # read-only
        return self.address.local

    def stamp(self) -> Hashable:
        return time.monotonic_ns()

    def create(self, material: Material) -> AnsweringIndex:
        """Stream the keys into a table. If the index is fitted, the table may be rewritten with the points."""
        from retrieval_tip.index.items import warn, warn_of
        from retrieval_tip.lance import shots
        from retrieval_tip.lance.draft import LanceDraft, index_kind, labelled_blocks
        from retrieval_tip.lance.key_table import FLAT
        from retrieval_tip.lance.lance_model import load
        from retrieval_tip.retrieval.duplicates import duplicates

        index = material.plan.index or "auto"
        index_kind(index)
        with self.write() as writer:
            names, weights, templates, _ = material.words
            rows = labelled_blocks(material)
            draft = LanceDraft.create(
                writer, rows, names, weights, material.plan.dtype, index if material.fit is None else FLAT
            )
            statistics = draft.statistics()
            draft.settings = material.settings(statistics, index_kind(index, draft.n, len(names))[1])
            draft.templates, draft.backbone = templates, material.backbone
            draft.provenance = material.described(statistics)
            draft.built = replace(material.built, auto_index=draft.built.auto_index)
            material.warn_of_bare(draft.classes.counts)
            if draft.n <= FEW_KEYS:
                kept = draft.keys_in_memory()
                warn_of(duplicates(kept.keys, kept.labels))
            if material.fit is not None:
                warn(shots.fit(draft, material.fit, factory=index).warnings)
            draft.commit("build")
        return load(self, material.device, draft.version)

    def copy_from(self, model: AnsweringIndex, what: str) -> int:
        """See :meth:`Store.copy_from`. Raises InputError if the index has trained values."""
        from retrieval_tip.lance.draft import LanceDraft

        if model.values is not None and model.fitted is None:
            raise InputError(f"{self}: a LanceDB store cannot hold trained values; use a folder")
        assert model.next_key_id is not None
        with self.write() as writer:
            draft = LanceDraft.create(
                writer,
                model.stored_blocks(),
                model.class_names,
                model.text_weights.cpu().numpy(),
                model.dtype,
                metric=model.metric if model.values is None else None,  # the table then contains the points
            )
            draft.settings, draft.templates, draft.backbone = model.settings, model.templates, model.backbone
            draft.provenance, draft.metric, draft.fitted = model.provenance, model.metric, model.fitted
            if model.values is not None:
                draft.check_held(draft.n)
                draft.solved = model.in_memory()
            draft.built = replace(model.built, auto_index=draft.built.auto_index)
            draft.next_key_id = model.next_key_id
            draft.commit(what)
        return writer.number

    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify | None = None,
        version: int | None = None,
    ) -> AnsweringIndex:
        """See :meth:`Store.load`. Products use float32. ``verify="full"`` checks every row, like :meth:`verify`."""
        from retrieval_tip.lance.lance_model import check, load

        if precision in ("float16", "bfloat16"):
            raise UsageError(f"precision {precision}: a LanceDB store only supports float32; remove the option")
        if verify == "full":
            self.opened(lambda manifest: check(self, manifest, set()), version)
        return load(self, device, version)

    @contextmanager
    def change(self) -> Iterator[Change]:
        from retrieval_tip.lance.draft import LanceDraft
        from retrieval_tip.lance.lance_change import LanceChange, SolvedChange

        self.manifest()  # do not create a store if there is no index
        with self.write() as writer:
            draft = LanceDraft.changing(writer)
            assert writer.parent is not None
            values = self.array(writer.parent, "values")
            change = LanceChange(draft) if values is None else SolvedChange(draft, values)
            yield change
            if change.what:
                change.commit()

    def fit(self, asked: Fit, queries: Callable[[AnsweringIndex], Queries] | None) -> FormChoice:
        judged_by, version = None, None
        if queries is not None:
            model = self.load(device="cpu")
            judged_by, version = queries(model), model.version
        with self.change() as change:
            if version not in (None, change.cache.version):
                raise changed_meanwhile(self.address)
            change.what = "fit"
            return change.fit(asked, judged_by)

    def restore(self, writer: VersionWriter, old: Manifest, new: Manifest) -> None:
        writer.commit(new)
        if not self.keeps(old):  # another process has deleted it meanwhile, and maybe also its rows
            self.withdraw(new)
            raise changed_meanwhile(self.address)

    def has_text(self, manifest: Manifest) -> bool:
        return bool(self.classes(manifest).text.any())

    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        return self.table(manifest).read(columns)

    def verify(self) -> AnsweringIndex:
        from retrieval_tip.lance.lance_model import verify

        return verify(self)

    def check(self, manifest: Manifest) -> None:
        from retrieval_tip.lance.lance_model import check

        check(self, manifest, set())
