"""Choose the cheapest index and k whose answers agree with those over all keys."""

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
"""Whole classes to try per query, for an index over classes."""
KEYS = (16, 64, 256)
"""Keys to try per query, for an index over keys."""
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Lists probed or candidates kept (:attr:`VectorIndex.effort`)."""

ROUNDS = 3
LEAST_QUERIES = 100


@dataclass(frozen=True)
class Trial:
    """One setting: how often it agrees with the answers over all keys, and what a query costs.

    ``index`` and ``effort`` (:attr:`VectorIndex.effort`) are the tried ones; ``k`` is ``None`` for all keys.
    ``agreement`` is a fraction of the queries, and ``microseconds`` the median time per query, in one batch. ``best``
    means that no cheaper setting agrees as often.
    """

    index: str
    effort: int | None
    k: int | None
    agreement: float
    microseconds: float
    best: bool = False


@dataclass(frozen=True)
class Tuning:
    """The ``trials`` on ``n`` queries of ``source``, cheapest first, and the ``chosen`` one with its index."""

    trials: list[Trial]
    chosen: Trial
    index: VectorIndex
    n: int
    source: str = ""

    def apply(self, cache: CacheModel, folder: str | os.PathLike[str] | None = None) -> None:
        """Give the tuned ``cache`` the chosen index type, effort and k, and record their origin.

        With a ``folder``, write a new version there; raises as :meth:`CacheModel.save`.
        """
        where = f"tuned on {self.source}, n={self.n}, agreement {self.chosen.agreement:.4g}"
        cache.index, cache.settings = self.index, cache.settings.override(k=self.chosen.k or "all", tail=True)
        cache.provenance = cache.provenance | {"index": where, "k": where}
        if folder is not None:
            cache.save(folder, "tune")


def tune_on(
    cache: CacheModel, source: Source, encoder: Encoder, *, agreement: float = 0.999, factories: Sequence[str] = ()
) -> Tuning:
    """Tune on the images or features of a source, as :func:`tune`. Merges segments of the index first."""
    if cache.segments > 1:
        cache.compact()
    features = encoder.encode(source).features
    return replace(tune(cache, features, agreement=agreement, factories=factories), source=source.name)


def tune(
    cache: CacheModel, features: npt.NDArray[np.float32], *, agreement: float = 0.999, factories: Sequence[str] = ()
) -> Tuning:
    """Try indexes on queries ``[q, d]``, and choose the cheapest whose winners agree with those over all keys.

    Tries ``Classes`` and an inverted file, or the given ``factories``, each with several numbers of keys and efforts.
    All use the tail and the cache's own alpha and beta. All keys are a setting too, and always agree. Labels are not
    needed.

    Raises UsageError for an ``agreement`` outside 0 to 1 or a factory that FAISS does not know. Raises InputError for
    fewer than 100 queries, which are too few to measure agreement.
    """
    if not 0 < agreement <= 1:
        raise UsageError(f"agreement is {agreement}: expected a fraction above 0, at most 1")
    if len(features) < LEAST_QUERIES:
        raise InputError(f"{len(features)} queries to tune on: give at least {LEAST_QUERIES}")
    if cache.segments > 1:
        raise InputError("the index has several segments; merge them first (index compact)")
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
    if inner_factory(cache.index.factory) is not None:
        shots = cache.n / len(cache.class_names)
        ks = sorted({max(1, round(number * shots)) for number in CLASSES})
        yield from ((cache.index.effort, k) for k in ks if k < cache.n)
        return
    most = cache.index.effort_limit
    efforts = [None] if most is None else [effort for effort in EFFORTS if effort <= most]
    yield from ((effort, k) for effort in efforts for k in KEYS if k < cache.n)


def _timed(cache: CacheModel, f: torch.Tensor, k: int | None) -> tuple[torch.Tensor, float]:
    """Return the winners ``[q]``, and microseconds per query."""
    winners = _winners(cache, f, k)  # warm-up
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        _winners(cache, f, k)
        seconds.append(time.perf_counter() - start)
    return winners, statistics.median(seconds) / len(f) * 1e6


def _winners(cache: CacheModel, f: torch.Tensor, k: int | None) -> torch.Tensor:
    return cache.logits(f, k or "all", tail=True).argmax(dim=1).cpu()


def _frontier(trials: list[Trial]) -> list[Trial]:
    """Sort trials by cost, and mark the best: those that no cheaper one equals."""
    ordered, highest = [], -1.0
    for trial in sorted(trials, key=lambda trial: (trial.microseconds, -trial.agreement)):
        ordered.append(replace(trial, best=trial.agreement > highest))
        highest = max(highest, trial.agreement)
    return ordered
