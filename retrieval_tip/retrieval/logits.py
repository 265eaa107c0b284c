"""Compute the text and cache logits of queries, using all keys, whole classes, or only the nearest keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import slices
from retrieval_tip.errors import InputError
from retrieval_tip.retrieval.evidence import Contributors, Nearest
from retrieval_tip.retrieval.keys import QUERY_BLOCK, KeyStream
from retrieval_tip.retrieval.whole_classes import ClassBounds, promising
from retrieval_tip.settings import Settings

LOGITS = 1 << 25
"""Maximum number of logits in a block. In float32, they take 128 MiB."""

AFFINITIES = 1 << 23
"""Maximum number of affinities in memory to find the keys that contribute most. In float32, they take 32 MiB."""

LEAST_CLASSES = 2
"""Minimum number of classes that a query visits. With a single class, the logit of the runner-up would not be exact."""


@dataclass(frozen=True)
class AnswerTerms(tip.Terms):
    """The terms of the logits, and the ``shots`` that contributed to each answer, if they were already found."""

    shots: Contributors | None = None


@dataclass(frozen=True)
class Retrieval:
    """Keys of any kind and text weights, as queries meet them.

    Features must be on the device of the keys. In float64, the logits are computed in float64.
    """

    keys: KeyStream
    text: Tensor

    @cached_property
    def bounds(self) -> ClassBounds:
        """Bounds on the cache logits of classes whose keys have not been read."""
        return ClassBounds(self.keys)

    def answer(
        self, features: Tensor, settings: Settings, neighbours: int = 0
    ) -> tuple[AnswerTerms, Tensor]:
        """Return the terms of the logits, and the logits.

        By default, all keys are used. If ``k`` is set, about ``k`` keys are used, and the tail counts the other keys at
        their mean affinity. If each query retrieves its own keys, the result also includes ``neighbours`` shots for
        each answer. Otherwise, :meth:`contributors` finds them. Raises InputError if the logits overflow.
        """
        keys = self.keys
        points = self.keys.phi(features)
        text = tip.text_logits(features, self.text, settings.logit_scale)
        discriminant = keys.discriminant(points) if settings.gamma else None
        k = settings.k or keys.n
        cache = keys.cache_logits(points, settings.beta) if k >= keys.n else torch.empty_like(text)
        terms = AnswerTerms(text, cache, discriminant)
        if k < keys.n and not keys.by_class:
            terms = self._over_nearest(points, settings, k, neighbours, terms)
        else:
            if k < keys.n:
                self._over_classes(points, settings, k, terms)
            tip.log_cache(cache, settings.log_offset)
        logits = terms.logits(settings)
        if not torch.isfinite(logits).all():
            raise overflow(terms, settings)
        return terms, logits

    def _over_nearest(
        self, points: Tensor, settings: Settings, k: int, neighbours: int, terms: AnswerTerms
    ) -> AnswerTerms:
        """Fill ``terms`` with cache logits from the ``k`` nearest keys of each query, and find ``neighbours`` shots."""
        kept = []
        for block in slices(len(points), max(QUERY_BLOCK, LOGITS // max(k, self.keys.n_classes))):
            block_terms = terms.queries(block)
            near = self.keys.nearest(points[block], k)
            block_terms.cache.copy_(self._logits_over(near, points[block], settings))
            tip.log_cache(block_terms.cache, settings.log_offset)
            if neighbours:
                two = first_two(block_terms.logits(settings))
                winner, rival = (self._contributions(near, ids, settings.beta) for ids in two)
                kept.append(
                    Contributors.among(near, winner, rival, self.keys.n_classes, neighbours)
                )
        return replace(terms, shots=Contributors.joined(kept) if kept else None)

    def _contributions(self, near: Nearest, classes: Tensor, beta: float) -> Tensor:
        """Return each key's contribution to one class per query. A class id of -1 stands for no class."""
        if self.keys.values is None:
            values: Tensor = near.class_ids == classes[:, None]
        else:
            columns = classes[:, None]
            values = self.keys.values[near.rows.clamp_min(0), columns.clamp_min(0)]
            values = values.where(columns >= 0, 0)
        return tip.weight(near.affinity, beta) * values

    def contributors(
        self, points: Tensor, winner: Tensor, rival: Tensor, number: int, beta: float
    ) -> Contributors:
        """Find ``number`` shots that contributed most to each answer, if all keys or whole classes were used.

        ``winner`` and ``rival`` are the class ids of the answer and the runner-up. If there is no runner-up, its id is
        -1. If values are one-hot, the shots are the nearest keys of these classes. Otherwise, they can belong to any
        class.
        """
        number = min(number, self.keys.n)
        c = self.keys.n_classes
        keys = self.keys
        if keys.values is not None:
            supporting, opposing = self._extremes(keys.values, points, winner, number, beta)
            none = self._contributions(opposing, winner, beta)[:, 0] >= 0
            if none.any():
                rivals = rival[none]
                most, _ = self._extremes(keys.values, points[none], rivals.clamp_min(0), 1, beta)
                not_against = self._contributions(most, rivals, beta) <= 0
                opposing.put(none, most.without(not_against, c))
            return Contributors(supporting, opposing)
        supporting = keys.nearest_of_classes(points, winner[:, None], number)
        opposing = keys.nearest_of_classes(points, rival[:, None], 1)
        few = supporting.rows[:, -1] < 0
        if few.any():
            others = keys.nearest(points[few], number)
            others = others.without(others.class_ids == winner[few, None], c)
            filled = Nearest.joined([supporting.queries(few), others], dim=1)
            # With equal order, the stable sort only moves empty slots to the end.
            supporting.put(few, filled.ordered(torch.zeros_like(filled.affinity)).first(number))
        return Contributors(supporting, opposing)

    def _extremes(
        self, values: Tensor, points: Tensor, classes: Tensor, number: int, beta: float
    ) -> tuple[Nearest, Nearest]:
        """Return, for one class per query, the keys that contribute most and the key that contributes least."""
        most: list[Nearest] = []
        least: list[Nearest] = []
        for block in slices(len(points), max(1, min(QUERY_BLOCK, AFFINITIES // self.keys.n))):
            affinity = torch.cat(
                [tip.affinity(points[block], keys) for keys, *_ in self.keys.blocks()], dim=1
            )
            shares = tip.weight(affinity, beta).mul_(values.index_select(1, classes[block]).T)
            largest = shares.topk(number, dim=1).indices
            smallest = shares.argmin(1, keepdim=True)
            most.append(self.keys.described(affinity.gather(1, largest), largest))
            least.append(self.keys.described(affinity.gather(1, smallest), smallest))
        return Nearest.joined(most), Nearest.joined(least)

    def _over_classes(self, points: Tensor, settings: Settings, k: int, terms: AnswerTerms) -> None:
        """Fill ``terms`` with cache logits from the classes that can win, using about ``k`` keys per query."""
        keys = self.keys
        most = min(max(LEAST_CLASSES, round(k / keys.mean_count)), keys.n_classes)
        classes = torch.empty(len(points), most, dtype=torch.int64, device=keys.device)
        candidates = torch.empty(classes.shape, dtype=torch.bool, device=keys.device)
        size = QUERY_BLOCK  # whose logits fit in the CPU cache
        if keys.device != "cpu":
            size = max(size, LOGITS // keys.n_classes)
        for block in slices(len(points), size):
            at_means = terms.queries(block)
            self.bounds.count_at_means(points[block], at_means.cache, settings.beta)
            slack = self.bounds.slack(settings.beta)
            classes[block], candidates[block] = promising(at_means, settings, slack, most)
        if keys.values is not None:
            for block in slices(len(points), QUERY_BLOCK):
                every = int(keys.counts[classes[block]].sum(1).max())  # other values have no bounds
                near = keys.nearest_of_classes(points[block], classes[block], every)
                terms.cache[block] = self._logits_over(near, points[block], settings)
            return
        exact = keys.class_logits(points, classes, candidates, settings.beta)
        if settings.tail:
            exact = torch.where(candidates, exact, terms.cache.gather(1, classes))
        else:
            terms.cache.zero_()
        terms.cache.scatter_(1, classes, exact)

    def _logits_over(self, near: Nearest, points: Tensor, settings: Settings) -> Tensor:
        """Compute the cache logits from the retrieved keys of each query, and from the tail if it counts."""
        keys = self.keys
        tail = tip.Totals.of(points, keys.sums, keys.counts) if settings.tail else None
        values = None
        if keys.values is not None:
            values = tip.Values(
                keys.values, near.rows.clamp_min(0), keys.value_sums if tail else None
            )
        return tip.cache_logits(
            near.affinity, near.class_ids, keys.n_classes, settings.beta, tail, values
        )


def first_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the winning class and the runner-up of each query. If there is only one class, the runner-up is -1."""
    classes = logits.topk(min(2, logits.shape[1]), dim=1).indices
    winner = classes[:, 0]
    if classes.shape[1] == 1:
        return winner, torch.full_like(winner, -1)
    return winner, classes[:, 1]


def overflow(terms: tip.Terms, settings: Settings) -> InputError:
    """Return the error that says why logits are not finite."""
    if not torch.isfinite(terms.cache).all():
        return InputError(
            f"beta {settings.beta:g}: exp(beta (affinity - 1)) overflows for these keys; use a smaller beta"
        )
    return InputError(
        f"alpha {settings.alpha:g}, logit_scale {settings.logit_scale:g}: logits overflow; use smaller values"
    )
