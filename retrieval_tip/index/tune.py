"""The cheapest index, and number of keys that a query meets, whose answers agree with those over all keys."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.retrieval.keys import index_over
from retrieval_tip.retrieval.vector_index import BY_CLASS, VectorIndex, inner_factory, lists_for

CLASSES = (1, 2, 4, 8, 16)
"""Classes that a query may meet whole, of an index over classes."""
KEYS = (16, 64, 256)
"""Keys that a query meets, of an index over keys."""
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Lists that are probed, or candidates that are kept (:attr:`VectorIndex.effort`)."""

ROUNDS = 3
LEAST_QUERIES = 100


@dataclass(frozen=True)
class Trial:
    """One setting: how often its answers agree with those over all keys, and what a query costs.

    ``index`` and ``effort`` (:attr:`VectorIndex.effort`) as they were tried, ``k`` ``None`` for all keys; ``agreement``
    a fraction of the queries; ``microseconds`` a query, in one batch of all, median; ``best``: no setting agrees as
    often and costs less.
    """

    index: str
    effort: int | None
    k: int | None
    agreement: float
    microseconds: float
    best: bool = False


@dataclass(frozen=True)
class Tuning:
    """The ``trials``, cheapest first, and the ``chosen`` one with the index that it stands for.

    They were tried on ``n`` queries of ``source``.
    """

    trials: list[Trial]
    chosen: Trial
    index: VectorIndex
    n: int
    source: str = ""

    def apply(self, cache: CacheModel, folder: str | os.PathLike[str] | None = None) -> None:
        """Give the index of the ``cache`` that was tuned the chosen type, effort and k, and say where they come from.

        With a ``folder``, that becomes a new version of it; raises as :meth:`CacheModel.save`.
        """
        where = f"tuned on {self.source}, n={self.n}, agreement {self.chosen.agreement:.4g}"
        cache.index, cache.settings = self.index, cache.settings.override(k=self.chosen.k or "all", tail=True)
        cache.provenance = cache.provenance | {"index": where, "k": where}
        if folder is not None:
            cache.save(folder, "tune")


def tune_on(
    cache: CacheModel, source: Source, encoder: Encoder, *, agreement: float = 0.999, factories: Sequence[str] = ()
) -> Tuning:
    """Tune, as :func:`tune`, on the images or features of a source. What was added to the index is compacted first."""
    if cache.segments > 1:
        cache.compact()
    features = encoder.encode(source).features
    return replace(tune(cache, features, agreement=agreement, factories=factories), source=source.name)


def tune(
    cache: CacheModel,
    features: npt.NDArray[np.float32],
    *,
    agreement: float = 0.999,
    factories: Sequence[str] = (),
) -> Tuning:
    """Try indexes on queries ``[q, d]``, and choose the cheapest whose winners are those over all keys often enough.

    Tried are ``Classes`` and an inverted file, or ``factories``, each with several numbers of keys and efforts, with
    the tail, at the cache's own alpha and beta. All keys are a setting too, and always agree. Labels are not needed.

    Raises UsageError for an agreement outside of 0 to 1 and a factory that FAISS does not know; InputError for fewer
    than 100 queries, which cannot tell one agreement from another.
    """
    if not 0 < agreement <= 1:
        raise UsageError(f"agreement is {agreement}: expected a fraction above 0, at most 1")
    if len(features) < LEAST_QUERIES:
        raise InputError(f"{len(features)} queries to tune on: at least {LEAST_QUERIES} are needed to see disagreement")
    if cache.segments > 1:
        raise InputError("the index has segments beside it, which a new one would not be over; compact it first")
    f = torch.from_numpy(np.ascontiguousarray(features)).to(cache.device)
    winners, cost = _timed(cache, f, None)
    trials = {Trial(cache.index.factory, cache.index.effort, None, 1.0, cost): cache.index}
    for factory in factories or _usual(cache):
        ids = cache.class_ids.cpu().numpy()
        index = index_over(cache.met, ids, len(cache.class_names), factory, cache.device)
        other = replace(cache, index=index, version=None)
        for effort, k in _settings(other):
            index.effort = effort
            own_winners, taken = _timed(other, f, k)
            same = float((own_winners == winners).double().mean())
            trials[Trial(factory, effort, k, same, taken)] = index
    ordered = _frontier(list(trials))
    chosen = next(trial for trial in ordered if trial.agreement >= agreement)
    index = trials[replace(chosen, best=False)]
    index.effort = chosen.effort
    return Tuning(ordered, chosen, index, len(features))


def _usual(cache: CacheModel) -> list[str]:
    return [*([BY_CLASS] if len(cache.class_names) > 1 else []), *([lists_for(cache.n)] if cache.n >= 1024 else [])]


def _settings(cache: CacheModel) -> Iterator[tuple[int | None, int]]:
    """Efforts and numbers of keys that are worth trying with an index."""
    if inner_factory(cache.index.factory) is not None:
        shots = cache.n / len(cache.class_names)
        ks = sorted({max(1, round(number * shots)) for number in CLASSES})
        yield from ((cache.index.effort, k) for k in ks if k < cache.n)
        return
    most = cache.index.effort_limit
    efforts = [None] if most is None else [effort for effort in EFFORTS if effort <= most]
    yield from ((effort, k) for effort in efforts for k in KEYS if k < cache.n)


def _timed(cache: CacheModel, f: torch.Tensor, k: int | None) -> tuple[torch.Tensor, float]:
    """Winners ``[q]``, and microseconds a query."""
    winners = _winners(cache, f, k)  # the first time measures what is measured once
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        _winners(cache, f, k)
        seconds.append(time.perf_counter() - start)
    return winners, statistics.median(seconds) / len(f) * 1e6


def _winners(cache: CacheModel, f: torch.Tensor, k: int | None) -> torch.Tensor:
    return cache.logits(f, k or "all", tail=True).argmax(dim=1).cpu()


def _frontier(trials: list[Trial]) -> list[Trial]:
    """Cheapest first; the best are those that no cheaper one equals."""
    ordered, highest = [], -1.0
    for trial in sorted(trials, key=lambda trial: (trial.microseconds, -trial.agreement)):
        ordered.append(replace(trial, best=trial.agreement > highest))
        highest = max(highest, trial.agreement)
    return ordered
