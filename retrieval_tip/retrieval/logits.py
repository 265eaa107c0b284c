"""Text and cache logits of queries: over all keys, whole classes, or the nearest keys, as the index has it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.certify import certificate, promising, settled, uncertain
from retrieval_tip.retrieval.evidence import Contributors, Largest, Nearest
from retrieval_tip.retrieval.keys import QUERY_BLOCK, Keys, KeyStream
from retrieval_tip.retrieval.vector_index import VectorIndex
from retrieval_tip.settings import Settings

LOGITS = 1 << 25
"""Logits that are computed for one purpose at a time: 128 MiB of float32."""

LEAST_CLASSES = 2
"""Classes that a query may meet whole at least: with one, only the answer's own logit would be right."""

CLOSE = 1e-3
"""Times beta, the relative error of cache logits that half precision may bring; closer answers are not left to it.
Six times the root mean square on features like CLIP's: a weight is off by beta times what its affinity is."""


def slices(q: int, size: int) -> Iterator[slice]:
    """``q`` queries, so many at a time."""
    return (slice(start, min(start + size, q)) for start in range(0, q, size))


@dataclass(frozen=True)
class AnswerTerms(tip.Terms):
    """Terms, and what retrieval knows of how they came about.

    ``settled`` ``[q]`` bool: no key that the query did not meet can change its winner; ``None`` if it met all keys, or
    nobody asked. ``keys`` ``[q]`` int64: how many keys settled each query, if that was certified. ``shots``: the shots
    behind each answer, if computing the terms already found them.
    """

    settled: Tensor | None = None
    keys: Tensor | None = None
    shots: Contributors | None = None

    def queries(self, part: slice) -> AnswerTerms:
        """Return the answers to some of the queries."""
        settled, keys = (None if column is None else column[part] for column in (self.settled, self.keys))
        shots = None if self.shots is None else self.shots.queries(part)
        return AnswerTerms(self.text[part], self.cache[part], settled, keys, shots)


@dataclass(frozen=True, kw_only=True)
class Retrieval(ABC):
    """Keys and what finds them, with the settings of the method: see :class:`answering.AnsweringIndex`.

    Features ``[q, d]`` are float32 on the device of the keys, which are ``phi(K)`` where there is a ``metric``: then
    ``points`` are ``phi(f)``, else ``f``. Logits may overflow here.
    """

    keys: KeyStream
    text_weights: Tensor
    settings: Settings
    metric: tip.Metric | None = None

    def points(self, features: Tensor) -> Tensor:
        """``phi(f)``: where queries lie among the keys, ``[q, d]``."""
        return features if self.metric is None else self.metric(features)

    @property
    @abstractmethod
    def by_class(self) -> bool:
        """Whether queries meet whole classes."""

    @abstractmethod
    def nearest(self, points: Tensor, k: int) -> Nearest:
        """The ``k`` nearest keys of each query."""

    def terms(self, features: Tensor, *, certify: bool = False, neighbours: int = 0) -> AnswerTerms:
        """Return text and cache logits by the settings: over all keys, or about ``k``, the rest at its mean (tail).

        With ``certify``, also which queries are settled. With ``neighbours``, also the shots behind each answer, if a
        query meets keys of its own; else :meth:`contributors` finds them.
        """
        settings, points = self.settings, self.points(features)
        if settings.k is not None and settings.k < self.keys.n:
            return self._meet(features, points, settings.k, certify, neighbours)
        text = tip.text_logits(features, self.text_weights, settings.logit_scale)
        return AnswerTerms(text, tip.log_cache(self._cache_over_all(points, text), settings.log_offset))

    def _cache_over_all(self, points: Tensor, text: Tensor) -> Tensor:
        """Cache logits over all keys ``[q, c]``; in float32 where half precision might change the answer."""
        beta = self.settings.beta
        products = self.keys.products(beta, len(points))
        cache = self.keys.cache_logits(points, beta, products=products)
        if products != torch.float32 and len(points):
            terms, error = AnswerTerms(text, cache), min(1.0, CLOSE * beta)
            parts = self._parts(len(points))
            close = torch.cat([uncertain(terms.queries(part), self.settings, error) for part in parts])
            cache[close] = self.keys.cache_logits(points[close], beta, products=torch.float32)
        return cache

    def _parts(self, q: int) -> Iterator[slice]:
        """``q`` queries, as many at a time as a processor's cache holds the logits of; a GPU has no such limit."""
        return slices(q, QUERY_BLOCK if self.keys.device == "cpu" else max(QUERY_BLOCK, LOGITS // self.keys.n_classes))

    def _meet(self, features: Tensor, points: Tensor, k: int, certify: bool, neighbours: int) -> AnswerTerms:
        """Return terms over about ``k`` keys, with ``neighbours`` shots behind each answer if the keys are at hand."""
        settings, text = self.settings, features.new_empty(len(features), self.keys.n_classes)
        done = torch.ones(len(text), dtype=torch.bool, device=text.device)
        terms = AnswerTerms(text, torch.empty_like(text), done)
        if self.by_class:
            self._meet_classes(features, points, k, terms, done if certify else None)
            tip.log_cache(terms.cache, settings.log_offset)
            return terms
        kept = []
        for part in slices(len(features), max(QUERY_BLOCK, LOGITS // max(k, self.keys.n_classes))):
            own = terms.queries(part)
            tip.text_logits(features[part], self.text_weights, settings.logit_scale, out=own.text)
            near = self.nearest(points[part], k)
            totals = tip.Totals.of(points[part], self.keys.sums, self.keys.counts) if settings.tail or certify else None
            own.cache.copy_(self._over(near, totals if settings.tail else None))
            if certify and totals is not None:
                done[part] = certificate(own, near, totals, settings)
            tip.log_cache(own.cache, settings.log_offset)
            if neighbours:
                winner, rival = (self._contributions(near, classes) for classes in first_two(own.logits(settings)))
                kept.append(Contributors.among(near, winner, rival, self.keys.n_classes, neighbours))
        return replace(terms, shots=Contributors.joined(kept) if kept else None)

    def _contributions(self, near: Nearest, classes: Tensor) -> Tensor:
        """Return what keys ``[q, k]`` contribute to one class of each query, ``classes`` ``[q]``; -1 is no class."""
        return tip.weight(near.affinity, self.settings.beta) * (near.class_ids == classes[:, None])

    def contributors(self, points: Tensor, winner: Tensor, rival: Tensor, number: int) -> Contributors:
        """Return the shots behind answers over all keys, or over whole classes: ``number`` of each query.

        ``winner`` and ``rival`` ``[q]`` int64: the answer and the runner-up, -1 if there is none. One-hot values: the
        nearest keys of these two classes. If the answer's class has fewer keys, the nearest others follow.
        """
        number, c = min(number, self.keys.n), self.keys.n_classes
        own, opposing = (self.nearest_of_classes(points, ids[:, None], m) for ids, m in ((winner, number), (rival, 1)))
        few = own.rows[:, -1] < 0
        if few.any():
            others = self.nearest(points[few], number)
            others = others.without(others.class_ids == winner[few, None], c)
            filled = Nearest.beside([own.queries(few), others])
            own.put(few, filled.ordered(torch.zeros_like(filled.affinity)).first(number))
        return Contributors(own, opposing)

    def nearest_of_classes(self, points: Tensor, classes: Tensor, k: int) -> Nearest:
        """Return the ``k`` nearest keys of each query among those of its ``classes`` ``[q, m]``; -1 is no class."""
        shape, device = (len(points), k), points.device
        best = Nearest(
            torch.full(shape, -torch.inf, device=device),
            torch.full(shape, -1, device=device),
            torch.full(shape, self.keys.n_classes, device=device),
        )
        ids, order = classes.reshape(-1).sort()
        asked, counts = ids.unique_consecutive(return_counts=True)
        queries = (order // max(1, classes.shape[1])).split(counts.tolist())
        if len(asked) and asked[0] < 0:
            asked, queries = asked[1:], queries[1:]
        for place, keys, rows in self.keys.numbered_of_classes(asked.cpu().numpy()):
            for query in queries[place].split(QUERY_BLOCK):
                affinity, near = tip.affinity(points[query], keys).topk(min(k, len(keys)), dim=1)
                found = Nearest(affinity, rows[near], asked[place].expand(near.shape))
                both = Nearest.beside([best.queries(query), found])
                kept = both.at(both.affinity.topk(k, dim=1).indices)
                best.put(query, kept)
        return replace(best, affinity=best.affinity.masked_fill(best.rows < 0, 0))

    def _meet_classes(self, features: Tensor, points: Tensor, k: int, terms: AnswerTerms, done: Tensor | None) -> None:
        """Fill ``terms`` with logits over the keys of the classes that can win, about ``k`` at most.

        First come all queries' classes: the more queries meet a class at once, the less often its keys are read.
        """
        settings, keys = self.settings, self.keys
        slack, most = keys.slack(settings.beta), min(self._most(k), keys.n_classes)
        classes = torch.empty(len(features), most, dtype=torch.int64, device=keys.device)
        met = torch.empty(classes.shape, dtype=torch.bool, device=keys.device)
        for part in self._parts(len(features)):
            own = terms.queries(part)
            tip.text_logits(features[part], self.text_weights, settings.logit_scale, out=own.text)
            tip.affinity(points[part], keys.means, out=own.cache)
            tip.at_mean(keys.counts, own.cache, settings.beta, out=own.cache)
            classes[part], met[part] = promising(own, settings, slack, most)
            if done is not None:
                done[part] = settled(own, settings, slack, classes[part])
        self._over_classes(points, terms.cache, classes, met)

    def _over_classes(self, points: Tensor, cache: Tensor, classes: Tensor, met: Tensor) -> None:
        """Put logits over the keys of ``classes`` ``[q, p]``, where ``met``, into ``cache``, till then at means."""
        exact = self.keys.class_logits(points, classes, met, self.settings.beta)
        _put(cache, classes, met, exact, self.settings.tail)

    def _most(self, k: int) -> int:
        """The number of classes that hold about ``k`` keys."""
        return max(LEAST_CLASSES, round(k / self.keys.mean_count))

    def _near_classes(self, points: Tensor, k: int) -> Tensor:
        """The classes ``[q, m]`` with the nearest means, that hold four times ``k`` keys; -1 is none."""
        number = min(self.keys.n_classes, max(8, round(4 * k / self.keys.mean_count)))
        near = self._nearest_means(points, number)
        while number < self.keys.n_classes and (self._held(near) < k).any():
            number = min(self.keys.n_classes, 4 * number)  # these have no keys, or few
            near = self._nearest_means(points, number)
        return near

    @abstractmethod
    def _nearest_means(self, points: Tensor, number: int) -> Tensor:
        """The classes ``[q, number]`` with the nearest means."""

    def _held(self, classes: Tensor) -> Tensor:
        """Keys that classes ``[q, m]`` hold together; -1 is none."""
        return self.keys.counts[classes.clamp_min(0)].where(classes >= 0, 0).sum(1)

    def _over(self, near: Nearest, tail: tip.Totals | None) -> Tensor:
        """Cache logits ``[q, c]`` over keys of each query's own."""
        return tip.cache_logits(near.affinity, near.class_ids, self.keys.n_classes, self.settings.beta, tail)


@dataclass(frozen=True, kw_only=True)
class IndexRetrieval(Retrieval):
    """Of keys in one memory, or mapped to it, by a FAISS index over them or over the means of their classes.

    ``values`` ``[n, c]`` is what each key gives to each class, where that is not 1 to its own.
    """

    keys: Keys
    index: VectorIndex
    values: Tensor | None = None

    def double(self) -> IndexRetrieval:
        """Return a retrieval that computes in float64; the keys stay as they are."""
        values = None if self.values is None else self.values.double()
        metric = None if self.metric is None else self.metric.double()
        return replace(self, text_weights=self.text_weights.double(), values=values, metric=metric)

    def _cache_over_all(self, points: Tensor, text: Tensor) -> Tensor:
        if self.values is None:
            return super()._cache_over_all(points, text)
        return self.keys.cache_logits(points, self.settings.beta, self.values)

    @property
    def by_class(self) -> bool:
        """Whether queries meet whole classes."""
        return self.index.by_class

    def _over_classes(self, points: Tensor, cache: Tensor, classes: Tensor, met: Tensor) -> None:
        keys, settings = self.keys, self.settings
        if self.values is None:
            super()._over_classes(points, cache, classes, met)
            return
        for part in slices(len(points), QUERY_BLOCK):
            rows = keys.rows_of(classes[part], torch.ones_like(met[part]))  # what keys give to others has no bound
            totals = tip.Totals.of(points[part], keys.sums, keys.counts) if settings.tail else None
            cache[part] = self._over(self._described(keys.affinity(points[part], rows), rows), totals)

    def _described(self, affinity: Tensor, rows: Tensor) -> Nearest:
        """Keys by row, with their class ids; empty slots, row -1, have the id ``c`` and affinity 0."""
        empty = rows < 0
        ids = self.keys.class_ids[rows.clamp_min(0)].masked_fill_(empty, self.keys.n_classes)
        return Nearest(affinity.masked_fill(empty, 0), rows, ids)

    def _over(self, near: Nearest, tail: tip.Totals | None) -> Tensor:
        """Cache logits ``[q, c]`` over keys of each query's own."""
        values = None
        if self.values is not None:
            values = tip.Values(
                self.values, near.rows.clamp_min(0), self.keys.value_sums(self.values) if tail else None
            )
        return tip.cache_logits(near.affinity, near.class_ids, self.keys.n_classes, self.settings.beta, tail, values)

    def _contributions(self, near: Nearest, classes: Tensor) -> Tensor:
        if self.values is None:
            return super()._contributions(near, classes)
        own = self.values[near.rows.clamp_min(0), classes.clamp_min(0)[:, None]]
        return tip.weight(near.affinity, self.settings.beta) * own.where(classes[:, None] >= 0, 0)

    def contributors(self, points: Tensor, winner: Tensor, rival: Tensor, number: int) -> Contributors:
        """Return the shots behind answers over all keys; with fitted values any key may count most."""
        if self.values is None:
            return super().contributors(points, winner, rival, number)
        supporting, opposing = self._extremes(points, winner, min(number, self.keys.n))
        none = self._contributions(opposing, winner)[:, 0] >= 0
        if none.any():
            most, _ = self._extremes(points[none], rival[none].clamp_min(0), 1)
            nothing = self._contributions(most, rival[none]) <= 0
            opposing.put(none, most.without(nothing, self.keys.n_classes))
        return Contributors(supporting, opposing)

    def _extremes(self, points: Tensor, classes: Tensor, number: int) -> tuple[Nearest, Nearest]:
        """Return the ``number`` keys that contribute most to ``classes`` ``[q]``, and the one that does least."""
        assert self.values is not None
        asked, own = classes.unique(return_inverse=True)
        most, least = (Largest.none(len(points), m, self.keys.device) for m in (number, 1))
        start = 0
        for keys, _ in self.keys.blocks():
            values = self.values[start : start + len(keys), asked].T.contiguous()  # those of a query are one row
            for part in slices(len(points), QUERY_BLOCK):
                affinity = tip.affinity(points[part], keys)
                given = tip.weight(affinity, self.settings.beta).mul_(values[own[part]])
                most.add(part, given, affinity, start)
                least.add(part, given.neg_(), affinity, start)
            start += len(keys)
        return self._described(most.affinity, most.rows), self._described(least.affinity, least.rows)

    def nearest(self, points: Tensor, k: int) -> Nearest:
        """The ``k`` nearest keys: affinities are to the keys themselves, also where the index compresses them.

        A GPU that has the keys finds them among all as fast as an exact index does, or one over classes.
        """
        if (self.index.exact_search or self.index.by_class) and (found := self.keys.nearest(points, k)) is not None:
            return self._described(*found)
        if self.index.by_class:
            return self._nearest_of_classes(points, k)
        affinity, rows = self.index.search_tensor(points, k)
        return self._described(affinity if self.index.exact_affinity else self.keys.affinity(points, rows), rows)

    def _nearest_of_classes(self, points: Tensor, k: int) -> Nearest:
        """The nearest keys among those of the classes with the nearest means (:meth:`_near_classes`)."""
        k = min(k, self.keys.n)
        near = self._near_classes(points, k)
        step = max(1, (1 << 22) // max(1, round(near.shape[1] * self.keys.mean_count)))
        parts: list[tuple[Tensor, Tensor]] = []
        for f, own in zip(points.split(step), near.split(step), strict=True):
            rows = self.keys.rows_of(own.clamp_min(0), own >= 0)
            affinity = self.keys.affinity(f, rows).masked_fill_(rows < 0, -torch.inf)
            nearest, place = affinity.topk(min(k, rows.shape[1]), dim=1)
            fill = (0, k - nearest.shape[1])
            parts.append(
                (torch.nn.functional.pad(nearest, fill), torch.nn.functional.pad(rows.gather(1, place), fill, value=-1))
            )
        affinity = torch.cat([nearest for nearest, _ in parts])
        rows = torch.cat([place for _, place in parts])
        return self._described(affinity, rows)

    def _nearest_means(self, points: Tensor, number: int) -> Tensor:
        return self.index.search_tensor(points, number)[1]


def first_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the winning class and the runner-up of each query, ``[q]`` each; -1 if there is only one class."""
    classes = logits.topk(min(2, logits.shape[1]), dim=1).indices
    return classes[:, 0], classes[:, 1] if classes.shape[1] > 1 else torch.full_like(classes[:, 0], -1)


def _put(cache: Tensor, places: Tensor, met: Tensor, exact: Tensor, tail: bool) -> None:
    """Put logits ``[q, p]`` of classes that were met in their ``places`` of ``cache`` ``[q, c]``, all at their mean.

    Without a ``tail``, every other one becomes 0.
    """
    if tail:
        exact = torch.where(met, exact, cache.gather(1, places))
    else:
        cache.zero_()
    cache.scatter_(1, places, exact)
