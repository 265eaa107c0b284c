"""A prediction: what an index answers to one query, and what the answer was made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from retrieval_tip.errors import counted
from retrieval_tip.report.html import table, tag

SHOWN_PREDICTIONS = 50
"""How many a notebook shows."""


@dataclass(frozen=True)
class Neighbour:
    """A key near a query: what it is, its ``affinity`` and its ``weight`` ``exp(-beta (1 - affinity))``."""

    key_id: int
    source: str
    label: str
    affinity: float
    weight: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one query.

    ``label`` and ``probability`` (softmax of the blended logits / temperature) of the winner; ``labels`` and
    ``probabilities`` of the ``top`` classes; ``text_logit`` and ``cache_logit`` are the two parts of the winner's logit
    (the latter with alpha, so that they add up to it); ``logits`` ``[c]`` float32 in the index's order, ``None`` where
    the classes are so many that only a shortlist was compared, which the probabilities are then over; the nearest
    ``neighbours``. ``keys``: how many of the keys settled the answer, where it was certified.
    """

    label: str
    probability: float
    labels: list[str]
    probabilities: list[float]
    text_logit: float
    cache_logit: float
    logits: npt.NDArray[np.float32] | None = field(compare=False)
    neighbours: list[Neighbour]
    keys: int | None = None

    def _repr_html_(self) -> str:
        """For notebooks: the classes, the two parts of the winner's logit, and the neighbours."""
        classes = zip(self.labels, (f"{probability:.4f}" for probability in self.probabilities), strict=True)
        caption = f"text {self.text_logit:.4g} + cache {self.cache_logit:.4g}"
        near = (
            (f"{key.affinity:.4f}", f"{key.weight:.1e}", key.label, key.source, key.key_id) for key in self.neighbours
        )
        columns = ("affinity", "weight", "label", "source", "key")
        return tag(
            "div",
            table(("class", "probability"), classes, caption, numbers=(1,)),
            table(columns, near, "nearest keys", numbers=(0, 1, 4)) if self.neighbours else None,
        )


class Predictions(list[Prediction]):
    """Predictions in the order of their queries: a list that notebooks show as a table."""

    def _repr_html_(self) -> str:
        """For notebooks: a row a prediction, the first :data:`SHOWN_PREDICTIONS`."""
        cut = f"; the first {SHOWN_PREDICTIONS}" if len(self) > SHOWN_PREDICTIONS else ""
        columns = ("query", "label", "probability", "text logit", "cache logit", "affinity", "nearest key")
        rows = []
        for place, prediction in enumerate(self[:SHOWN_PREDICTIONS]):
            key = prediction.neighbours[0] if prediction.neighbours else None
            near = (f"{key.affinity:.4f}", f"{key.label} ({key.source})") if key else ("-", "-")
            figures = (f"{prediction.probability:.4f}", f"{prediction.text_logit:.4g}", f"{prediction.cache_logit:.4g}")
            rows.append((place, prediction.label, *figures, *near))
        return table(columns, rows, counted(len(self), "prediction") + cut, numbers=(0, 2, 3, 4, 5))


@dataclass(frozen=True)
class Evidence:
    """What the answer to one query is made of: enough to weigh it anew, with another alpha, beta or k.

    ``feature`` ``[d]`` and ``text`` ``[c]``, its text logits, float32; of the ``m`` nearest keys, nearest first,
    ``key_ids``, ``class_ids`` int64 and ``affinities`` float32; ``counts`` ``[c]`` int64 and ``sums`` ``[c]`` float32:
    how many keys a class has, and the sum of the affinities to all of them. ``complete``: these are all keys.
    """

    feature: npt.NDArray[np.float32]
    text: npt.NDArray[np.float32]
    key_ids: npt.NDArray[np.int64]
    class_ids: npt.NDArray[np.int64]
    affinities: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float32]
    complete: bool


@dataclass(frozen=True)
class Certified:
    """Logits whose winners are those over all keys, by :meth:`CacheModel.certified`.

    ``text`` and ``cache`` ``[q, c]`` as :meth:`CacheModel.terms` gives them; ``keys`` ``[q]`` int64, how many of the
    nearest keys settled each query, ``n`` where it took all. After exact search that is proof; after approximate search
    it is evidence, and the winners agree with those over all keys as far as was looked.
    """

    text: Tensor
    cache: Tensor
    keys: Tensor
