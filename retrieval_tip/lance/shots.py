"""Fit an index in LanceDB. The keys are read in the order of a folder, either into memory or in a few passes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.errors import StoreError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import Fit, FormChoice
from retrieval_tip.fit.folds import Queries
from retrieval_tip.lance.draft import LanceDraft
from retrieval_tip.lance.key_table import CLASSES, VECTOR, IntArray, KeyTable
from retrieval_tip.retrieval.arrays import KeyArray, KeysInPlace
from retrieval_tip.retrieval.ridge import MOST_SOLVED
from retrieval_tip.settings import Fitted

LABELS = ("key_id", "class_id", "digest", "source")


class OrderedKeys(KeysInPlace):
    """The keys of a table in the same order as in a folder, sorted by class and then by key id.

    ``offsets`` are their positions in the table.
    """

    def __init__(self, table: KeyTable, d: int, offsets: IntArray) -> None:
        self.table, self.shape = table, (len(offsets), d)
        self._offsets, self._places = offsets, np.argsort(offsets)

    def __getitem__(self, places: IntArray) -> KeyArray:
        """See :meth:`KeysInPlace.__getitem__`."""
        offsets, where = np.unique(self._offsets[places], return_inverse=True)
        keys: KeyArray = self.table.matrix(self.table.offsets(offsets, [VECTOR])[VECTOR])[where]
        return keys

    def blocks(self, places: IntArray) -> Iterator[tuple[KeyArray, IntArray]]:
        """See :meth:`KeysInPlace.blocks`. The table is read once."""
        wanted, start = np.zeros(len(self), dtype=bool), 0
        wanted[self._offsets[places]] = True
        for batch in self.table.scan([VECTOR]):
            own = np.flatnonzero(wanted[start : start + len(batch)])
            if len(own):
                yield self.table.matrix(batch[VECTOR])[own], self._places[start + own]
            start += len(batch)


class TableShots:
    """An adapter that passes a draft to :func:`closed_form.fit`. Only the labels are held in memory."""

    curve: pa.Table | None = None

    def __init__(self, draft: LanceDraft) -> None:
        self.draft, table = draft, draft.table
        labels = table.read(LABELS)
        order = np.lexsort((labels["key_id"].to_numpy(), labels["class_id"].to_numpy()))
        if len(order) != draft.n:
            raise StoreError(f"{draft.store}: has {len(order)} rows instead of {draft.n}; use another version")
        self.labels: pa.Table = labels.take(pa.array(order))
        self.keys = OrderedKeys(table, draft.d, order)
        self.class_ids: Tensor = torch.from_numpy(self.labels["class_id"].to_numpy().astype(np.int64))
        self.n, self.class_names, self.sums = draft.n, draft.class_names, draft.sums
        self.text_weights, self.has_text, self.index_type = draft.text_weights, draft.has_text, draft.index_type
        self.settings, self.provenance, self.fitted = draft.settings, draft.provenance, draft.fitted
        self.prior, self.backbone = draft.prior, draft.backbone

    def set_fitted(
        self, metric: tip.Metric | None, values: Tensor | None, fitted: Fitted | None, factory: str | None = None
    ) -> None:
        """See :meth:`LanceDraft.set_fitted`. A table of this size cannot have solved values."""
        assert values is None
        self.draft.set_fitted(metric, fitted, factory)


def fit(draft: LanceDraft, asked: Fit, validation: Queries | None = None, factory: str | None = None) -> FormChoice:
    """Fit a draft. See :func:`closed_form.fit` for the arguments.

    All keys are loaded into memory if there are few enough for solved values. Otherwise, they are read in a few passes.
    """
    if draft.n > MOST_SOLVED:
        shots = TableShots(draft)
        choice = closed_form.fit(shots, asked, validation=validation, factory=factory)
        draft.settings, draft.provenance, draft.prior = shots.settings, shots.provenance, shots.prior
        return choice
    cache = draft.keys_in_memory()
    cache.sums, cache.prior = draft.sums, draft.prior
    by_class = CLASSES if (factory or draft.index_type) == CLASSES else None  # this type does not support solved values
    choice = closed_form.fit(cache, asked, validation=validation, factory=by_class)
    draft.settings, draft.provenance, draft.prior = cache.settings, cache.provenance, cache.prior
    draft.set_fitted(cache.metric, cache.fitted, factory, cache)
    return choice


def refit(draft: LanceDraft, beta: float) -> FormChoice:
    """See :meth:`Change.refit`."""
    shots = TableShots(draft)
    choice = closed_form.refit(shots, beta)
    draft.settings, draft.provenance, draft.fitted = shots.settings, shots.provenance, shots.fitted
    return choice
