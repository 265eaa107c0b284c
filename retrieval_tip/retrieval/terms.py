"""The terms of the logits, and the one place that adds them up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.evidence import Contributors
from retrieval_tip.settings import Settings


@dataclass(frozen=True)
class Terms:
    """Terms of the logits of ``q`` queries: ``text`` and ``cache`` (after the link, without alpha), ``[q, c]`` each.

    ``settled`` ``[q]`` bool: no key that the query did not meet can change its winner; ``None`` if it met all keys, or
    nobody asked. ``keys`` ``[q]`` int64: how many keys settled each query, if that was certified. ``shots``: the shots
    behind each answer, if computing the terms already found them.
    """

    text: Tensor
    cache: Tensor
    settled: Tensor | None = None
    keys: Tensor | None = None
    shots: Contributors | None = None

    def logits(self, settings: Settings, slack: float = 0.0) -> Tensor:
        """Return the logits ``[q, c]``: ``text + alpha * cache``.

        With ``slack``, an upper bound of them for a cache that may be larger by this fraction.
        """
        return tip.blend(self.text, self.cache, settings.alpha * (1 + slack))

    def queries(self, part: slice) -> Terms:
        """Return the terms of some of the queries."""
        settled, keys = (None if column is None else column[part] for column in (self.settled, self.keys))
        shots = None if self.shots is None else self.shots.queries(part)
        return Terms(self.text[part], self.cache[part], settled, keys, shots)
