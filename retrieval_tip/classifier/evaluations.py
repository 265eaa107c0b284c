"""The methods of a classifier that measure its accuracy and check its labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import pyarrow as pa

from retrieval_tip.classifier.opened import OpenIndex, check_place
from retrieval_tip.data.sources import open_items
from retrieval_tip.evaluation.audit import audit
from retrieval_tip.evaluation.compare import Compared, Side, compare
from retrieval_tip.evaluation.evaluate import Evaluation, evaluate
from retrieval_tip.settings import AskOptions, KeysMet

if TYPE_CHECKING:
    from retrieval_tip.report.report import WrittenReport


class MeasuredClassifier(OpenIndex):
    """An open index whose answers and labels you can check."""

    def evaluate(self, test: Any, *, abstain: float | None = None, **asked: Unpack[AskOptions]) -> Evaluation:
        """Classify labelled test photos, and return the accuracy and other metrics.

        ``test`` is a labelled source, or a dataset as for ``from_images``. If a source has a test split, only this
        split is used. For the other arguments, see :func:`evaluate.evaluate`.
        """
        source, encoder = self._labelled(test, "test")
        encoder = replace(encoder, skipped=[])
        return evaluate(self.cache, source, encoder, abstain=abstain, **asked)

    def compare(self, other: str | os.PathLike[str] | OpenIndex, test: Any) -> Compared:
        """Compare this classifier (A) with another classifier or index (B) on the same photos.

        ``test`` can be the same as for :meth:`evaluate`. A source may also be unlabelled. See :func:`compare.compare`.
        """
        if not isinstance(other, OpenIndex):
            other = OpenIndex.load(check_place("other", other), device=self.cache.device)
        if isinstance(test, str | os.PathLike):
            source, read = open_items(test, split="test"), self.encoder.read
        else:
            source, encoder = self._labelled(test, "test")
            read = encoder.read
        names = self._saved_at() or "this classifier", other._saved_at() or "the other classifier"
        a, b = (
            Side(name, one.cache, replace(one.encoder, read=read, skipped=[]))
            for name, one in zip(names, (self, other), strict=True)
        )
        return compare(a, b, source)

    def audit(self, *, k: KeysMet = None, borderline: bool = False) -> pa.Table:
        """List shots that look mislabelled, most suspicious first (see :func:`audit.audit`).

        To correct labels, pass a mapping from ``key_id`` to the right label to ``relabel``.
        """
        return audit(self.cache.in_memory(), k=k, borderline=borderline)

    def report(
        self,
        out: str | os.PathLike[str],
        test: Any,
        *,
        shots: Sequence[int] | None = None,
        seeds: int = 3,
        curves: bool = True,
    ) -> WrittenReport:
        """Write an accuracy report as a single HTML file to ``out``.

        ``test`` can be the same as for :meth:`evaluate`. For the other arguments, see :func:`report.write_report`.
        """
        from retrieval_tip.report.report import write_report

        source, encoder = self._labelled(test, "test")
        encoder = replace(encoder, skipped=[])
        return write_report(self.cache.in_memory(), source, encoder, out, shots=shots, seeds=seeds, curves=curves)
