"""Compare encoders on the same photos. Each encoder gets an index in a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import UsageError
from retrieval_tip.evaluation.compare import Compared, Side, compare
from retrieval_tip.index.build import build_index


@contextmanager
def trial(shots: Source, encoder: Encoder, device: str = "auto") -> Iterator[AnsweringIndex]:
    """Build an index that is fitted to labelled photos, as :func:`build.build_index` does, and remove it afterwards.

    Raises UsageError if ``shots`` is a feature table, because its features belong to a single encoder.
    """
    if shots.table is not None:
        raise UsageError(f"{shots.name}: has the features of one encoder; give photos to compare encoders")
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-") as folder:
        yield build_index(shots, Path(folder) / "index", encoder, device=device)


def compare_encoders(
    a: tuple[str, Encoder], b: tuple[str, Encoder], shots: Source, source: Source, device: str = "auto"
) -> Compared:
    """Fit an index of each encoder to the same shots, and compare their answers to a source.

    ``a`` and ``b`` are the names and the encoders. See :func:`compare.compare` for the comparison and its errors.
    """
    (name_a, encoder_a), (name_b, encoder_b) = a, b
    with trial(shots, encoder_a, device) as first, trial(shots, encoder_b, device) as second:
        return compare(Side(name_a, first, encoder_a), Side(name_b, second, encoder_b), source)
