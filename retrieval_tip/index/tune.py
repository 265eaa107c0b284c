"""Find the cheapest index type and k whose answers agree with a search over all keys."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.model import Index
from retrieval_tip.retrieval.keys import index_over
from retrieval_tip.retrieval.vector_index import BY_CLASS, VectorIndex, lists_for

CLASSES = (1, 2, 4, 8, 16)
"""Numbers of whole classes per query to try for an index over classes."""
KEYS = (16, 64, 256)
"""Numbers of keys per query to try for an index over keys."""
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Search efforts to try. See :attr:`VectorIndex.effort` for their meaning."""

ROUNDS = 3
LEAST_QUERIES = 100


@dataclass(frozen=True)
class Trial:
    """A trial of one setting, with its cost and its agreement with a search over all keys.

    ``index`` is the index type, and ``effort`` is its :attr:`VectorIndex.effort`. ``k`` is ``None`` if all keys are
    used. ``agreement`` is the fraction of queries for which both searches predict the same class. ``microseconds`` is
    the median time per query in one batch. ``best`` is true if no cheaper setting agrees as often.
    """

    index: str
    effort: int | None
    k: int | None
    agreement: float
    microseconds: float
    best: bool = False


@dataclass(frozen=True)
class Tuning:
    """The result of tuning on ``n`` queries of ``source``, with the cheapest trial first.

    ``chosen`` is the selected trial, and ``index`` is the FAISS index of this trial, or ``None`` if it has none.
    """

    trials: list[Trial]
    chosen: Trial
    index: VectorIndex | None
    n: int
    source: str = ""

    def apply(self, index: Index, folder: str | os.PathLike[str] | None = None) -> None:
        """Apply the selected index type, effort and k to the ``index`` that was tuned, and record their provenance.

        If you give a ``folder``, a new version is written there with :meth:`Index.save`.
        """
        where = f"tuned on {self.source}, n={self.n}, agreement {self.chosen.agreement:.4g}"
        index.set_rows(replace(index.rows.in_memory(), index=self.index))
        index.settings = index.settings.override(k=self.chosen.k or "all", tail=True)
        index.provenance = index.provenance | {"index": where, "k": where}
        if folder is not None:
            index.save(folder, "tune")


def tune_on(
    index: Index, source: Source, reader: Reader, *, agreement: float = 0.999, factories: Sequence[str] = ()
) -> Tuning:
    """Call :func:`tune` with the images or features of a source."""
    features = reader.encode(source).features
    return replace(tune(index, features, agreement=agreement, factories=factories), source=source.name)


def tune(
    index: Index, features: npt.NDArray[np.float32], *, agreement: float = 0.999, factories: Sequence[str] = ()
) -> Tuning:
    """Find the cheapest index that predicts nearly the same classes as a search over all keys.

    The queries are ``features`` of shape ``[q, d]``; their labels are not needed. By default, ``Classes`` and an
    inverted file are tried. You can give other ``factories`` instead. Each index is tried with several numbers of keys
    and several efforts. A search over all keys is tried too. Its agreement is always 1.

    Raises UsageError if ``agreement`` is not between 0 and 1 or if FAISS does not support a factory. Raises InputError
    if there are fewer than 100 queries, which are too few to measure agreement.
    """
    if not 0 < agreement <= 1:
        raise UsageError(f"agreement is {agreement}: expected a fraction above 0 and at most 1")
    if len(features) < LEAST_QUERIES:
        raise InputError(f"{len(features)} queries are too few to tune on; give at least {LEAST_QUERIES}")
    f, rows = torch.from_numpy(np.ascontiguousarray(features)).to(index.device), index.rows.in_memory()
    winners, cost = _timed(index, f, None)
    effort = None if rows.index is None else rows.index.effort
    trials = {Trial(index.index_type, effort, None, 1.0, cost): rows.index}
    for factory in factories or _usual(index):
        search = index_over(rows.vectors, rows.class_ids, len(index.class_names), factory, index.device)
        other = replace(index, rows=replace(rows, index=search))
        for effort, k in _settings(other, search):
            search.effort = effort
            own_winners, taken = _timed(other, f, k)
            same = float((own_winners == winners).double().mean())
            trials[Trial(factory, effort, k, same, taken)] = search
    ordered = _frontier(list(trials))
    chosen = next(trial for trial in ordered if trial.agreement >= agreement)
    best = trials[replace(chosen, best=False)]
    if best is not None:
        best.effort = chosen.effort
    return Tuning(ordered, chosen, best, len(features))


def _usual(index: Index) -> list[str]:
    return [*([BY_CLASS] if len(index.class_names) > 1 else []), *([lists_for(index.n)] if index.n >= 1024 else [])]


def _settings(index: Index, search: VectorIndex) -> Iterator[tuple[int | None, int]]:
    if search.by_class:
        shots = index.n / len(index.class_names)
        ks = sorted({max(1, round(number * shots)) for number in CLASSES})
        yield from ((search.effort, k) for k in ks if k < index.n)
        return
    most = search.effort_limit
    efforts = [None] if most is None else [effort for effort in EFFORTS if effort <= most]
    yield from ((effort, k) for effort in efforts for k in KEYS if k < index.n)


def _timed(index: Index, f: torch.Tensor, k: int | None) -> tuple[torch.Tensor, float]:
    """Return the predicted class of each query, and the number of microseconds per query."""
    winners = _winners(index, f, k)  # warm up first
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        _winners(index, f, k)
        seconds.append(time.perf_counter() - start)
    return winners, statistics.median(seconds) / len(f) * 1e6


def _winners(index: Index, f: torch.Tensor, k: int | None) -> torch.Tensor:
    return index.logits(f, k or "all", tail=True).argmax(dim=1).cpu()


def _frontier(trials: list[Trial]) -> list[Trial]:
    """Sort trials by cost, and mark each trial that agrees more often than all cheaper trials."""
    ordered, highest = [], -1.0
    for trial in sorted(trials, key=lambda trial: (trial.microseconds, -trial.agreement)):
        ordered.append(replace(trial, best=trial.agreement > highest))
        highest = max(highest, trial.agreement)
    return ordered
