"""Changes of an index in LanceDB: of the rows of its table or, if the values were solved, of all keys in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from retrieval_tip.fit.closed_form import Fit, FormChoice
from retrieval_tip.fit.folds import Queries
from retrieval_tip.index.folders import FolderChange
from retrieval_tip.index.stores import Change
from retrieval_tip.lance import shots
from retrieval_tip.lance.draft import LanceDraft
from retrieval_tip.lance.key_table import CLASSES, FLAT
from retrieval_tip.lance.lance_model import solved
from retrieval_tip.retrieval.duplicates import Duplicates
from retrieval_tip.settings import Dtype


class LanceChange(Change):
    """A change of a :class:`LanceDraft` that becomes the next version of its store."""

    cache: LanceDraft

    def rebuild(self, index: str | None, dtype: Dtype | None) -> None:
        """See :meth:`Change.rebuild`."""
        self.cache.rewrite(index, dtype)

    def refit(self, beta: float) -> FormChoice:
        """See :meth:`Change.refit`."""
        return shots.refit(self.cache, beta)

    def fit(self, asked: Fit, validation: Queries | None = None) -> FormChoice:
        """See :meth:`Change.fit`."""
        return shots.fit(self.cache, asked, validation)

    def duplicates_of(self, key_ids: Sequence[int]) -> Duplicates:
        """See :meth:`Change.duplicates_of`."""
        return self.cache.duplicates_of(key_ids)

    def commit(self) -> None:
        """Write the next version."""
        self.cache.commit(self.what)


class SolvedChange(FolderChange):
    """A change of an index with solved ``values``, which is read into memory. The draft follows it at the end."""

    def __init__(self, draft: LanceDraft, values: npt.NDArray[np.float32]) -> None:
        self.draft = draft
        super().__init__(solved(draft, values))
        draft.solved = self.cache

    def rebuild(self, index: str | None, dtype: Dtype | None) -> None:
        """See :meth:`Change.rebuild`."""
        self.draft.rewrite(index, dtype)
        self.cache.rebuild(CLASSES if self.draft.index_type == CLASSES else FLAT, dtype)
        self.cache.settings, self.cache.built = self.draft.settings, self.draft.built

    def commit(self) -> None:
        """Write the next version."""
        self.draft.follow(self.cache)
        self.draft.commit(self.what)
        self.cache.version = self.draft.version
