"""Search for alpha and beta on validation images or on the shots themselves. Test labels are never used.

For a given beta, class y beats class j if and only if ``alpha (C_y - C_j) > text_j - text_y``. Each query is
therefore classified correctly on one interval of alpha. Counting these intervals gives the accuracy at every alpha, so
the best alpha is computed exactly and no grid is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from retrieval_tip.arrays import BoolArray, DoubleArray
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError
from retrieval_tip.fit.confidence import wilson
from retrieval_tip.fit.visible import Queries
from retrieval_tip.model import Index
from retrieval_tip.settings import Settings

BETAS = np.geomspace(0.1, 100, 31)
"""Betas to try. Neighbouring values differ by a factor of 1.26. Accuracy changes slowly on this scale."""


@dataclass(frozen=True)
class HyperparameterChoice:
    """The selected settings, together with the evidence for them.

    - ``interval``: the alphas that give the same validation ``accuracy``; ``alpha`` is the middle of the interval. The
      text alone is as good if it starts at 0, and the cache alone if it has no upper end.
    - ``best``: the highest accuracy that was found, which a cautious search may not select
    - ``zero_shot``: the accuracy at alpha 0
    - ``low``, ``high``: the 95 % confidence interval of the accuracy
    - ``warnings``: reasons why the selected settings may be unreliable
    """

    alpha: float
    beta: float
    accuracy: float
    best: float
    interval: tuple[float, float]
    zero_shot: float
    low: float
    high: float
    n: int
    source: str
    warnings: tuple[str, ...]

    def settings(self, before: Settings) -> Settings:
        """Return ``before`` with the selected alpha and beta, and reset what was fitted to the old ones."""
        beta_stays = self.beta == before.beta
        return replace(
            before,
            alpha=self.alpha,
            beta=self.beta,
            least_cache=before.least_cache if beta_stays else None,
            temperature=before.temperature if beta_stays and self.alpha == before.alpha else 1.0,
        )

    def provenance(self) -> dict[str, object]:
        """Return the record of the search for the manifest."""
        return {
            "chosen_on": self.source,
            "queries": self.n,
            "accuracy": round(self.accuracy, 6),
            "best": round(self.best, 6),
            "interval_95": [round(self.low, 6), round(self.high, 6)],
        }


def on_validation(index: Index, source: Source, reader: Reader) -> Queries:
    """Encode a labelled source as queries that see all keys.

    Raises InputError if a label is not a class of the index.
    """
    ids = index.ids_of(source)
    encoded = reader.encode(source)
    return Queries(encoded.features, ids[encoded.positions], source.name)


def apply(index: Index, choice: HyperparameterChoice) -> Index:
    """Return the index with the selected settings and their provenance."""
    kept = {name: value for name, value in index.provenance.items() if name != "temperature"}
    provenance = kept | {"alpha": "search-hp", "beta": "search-hp", "search": choice.provenance()}
    return index.with_settings(choice.settings(index.settings), chosen=True).altered(
        provenance=provenance
    )


def search(index: Index, queries: Queries) -> HyperparameterChoice:
    """Select the alpha and beta that give the highest accuracy on the queries, which use all keys.

    The settings of the index stay unless the best settings are significantly better (paired test, 95 %). Ties go to the
    widest interval of alpha, measured as a ratio. :data:`BETAS` are tried, or only the present beta if values were
    solved for it. If queries do not see all keys, the settings are valid for the whole index (see
    :meth:`visible.Visible.terms`).

    ``queries`` come from :func:`on_validation`, or are shots of the index without themselves. Raises InputError if
    there are none, or if their shape is not ``[q, d]``.
    """
    own_alpha = index.settings.alpha
    own_beta = index.settings.beta
    solved_values = index.fitted is not None and index.fitted.solved
    tried = sorted({own_beta, *(() if solved_values else BETAS.tolist())})
    low, high = _intervals(index, queries, tried)

    def hits(b: int, alpha: float) -> BoolArray:
        right: BoolArray = (low[b] < alpha) & (alpha < high[b])
        return right

    solved = [_best_alpha(*ends) for ends in zip(low, high, strict=True)]
    *_, b = max(
        # Among equals, the beta in the middle of the range wins.
        (right, _width(interval), -abs(b - len(solved) // 2), b)
        for b, (right, interval) in enumerate(solved)
    )
    interval = solved[b][1]
    # An interval without an upper end has no middle.
    alpha = 2 * interval[0] + 1 if interval[1] == math.inf else sum(interval) / 2
    best = chosen = hits(b, alpha)
    before = hits(tried.index(own_beta), own_alpha)
    if not _is_better(best, before):
        b = tried.index(own_beta)
        alpha = own_alpha
        interval = (own_alpha, own_alpha)
        chosen = before
    accuracy = float(chosen.mean())
    most = float(best.mean())
    n = len(chosen)
    rivals = {"text alone": hits(b, 0.0), "cache alone": high[b] == np.inf}
    warnings = []
    for name, rival in rivals.items():
        if accuracy > rival.mean() and not _is_better(chosen, rival):
            figure = f"{100 * rival.mean():.1f} %"
            warnings.append(
                f"{n} queries are too few to prefer these settings to {name} ({figure})"
            )
    if len(tried) > 1 and b in (0, len(tried) - 1):
        warnings.append(f"beta {tried[b]:.3g} is at the edge of the range that was tried")
    if most > accuracy:
        warnings.append(
            f"kept the settings ({100 * accuracy:.1f} %): with {n} queries, the best settings found "
            f"({100 * most:.1f} %) may be better by chance"
        )
    lower, upper = wilson(accuracy, n)
    return HyperparameterChoice(
        alpha,
        tried[b],
        accuracy=accuracy,
        best=most,
        interval=interval,
        low=lower,
        high=upper,
        n=n,
        zero_shot=float(rivals["text alone"].mean()),
        source=queries.name,
        warnings=tuple(warnings),
    )


def _is_better(hits: BoolArray, rival: BoolArray) -> bool:
    """Return whether settings are significantly more accurate than others on the same queries (95 %)."""
    more = hits.astype(np.float64) - rival
    return bool(more.mean() > 1.96 * more.std() / math.sqrt(len(more)))


def _intervals(
    index: Index, queries: Queries, betas: Sequence[float]
) -> tuple[DoubleArray, DoubleArray]:
    """Return the open intervals of alphas at which each query is right, as two arrays of shape ``[betas, q]``."""
    q = len(queries.ids)
    if not q:
        raise InputError(f"{queries.name}: there are no queries to select settings on")
    if queries.features.shape != (q, index.d):
        raise InputError(
            f"{queries.name}: features {queries.features.shape}; expected [{q}, {index.d}]"
        )
    low, high = np.empty((2, len(betas), q))
    for block, visible in queries.blocks(index):
        y = torch.from_numpy(queries.ids[block]).to(index.device)
        for b, terms in enumerate(visible.terms(betas)):
            low[b, block], high[b, block] = right_between(
                terms.text, terms.photos(index.settings), y
            )
    return low, high


def right_between(text: Tensor, cache: Tensor, y: Tensor) -> tuple[DoubleArray, DoubleArray]:
    """Return the open interval ``(low, high)`` of alphas at which each query is right. It is empty if ``low >= high``.

    ``text`` and ``cache`` have shape ``[q, c]``, and ``y`` has shape ``[q]``. Class y beats class j if
    ``alpha (C_y - C_j) > text_j - text_y``, which holds above a bound if the cache prefers y, and below a bound if it
    prefers j.
    """
    gain = (cache.gather(1, y[:, None]) - cache).double()
    lead = (text.gather(1, y[:, None]) - text).double()
    # Where gain is 0, this is infinite or NaN, and neither of the next lines uses it.
    bound = -lead / gain
    low = torch.where(gain > 0, bound, -torch.inf)
    high = torch.where(gain < 0, bound, torch.inf)
    is_own = torch.zeros_like(gain, dtype=torch.bool).scatter_(1, y[:, None], True)
    lost = ((gain == 0) & (lead <= 0) & ~is_own).any(dim=1)
    low = low.masked_fill(is_own, -torch.inf).amax(dim=1).masked_fill(lost, torch.inf)
    high = high.masked_fill(is_own, torch.inf).amin(dim=1).masked_fill(lost, -torch.inf)
    return low.cpu().numpy(), high.cpu().numpy()


def _best_alpha(low: DoubleArray, high: DoubleArray) -> tuple[int, tuple[float, float]]:
    """Return the number of right answers at the best alpha, and the widest interval of such alphas."""
    some = low < high
    starts = np.sort(low[some])
    stops = np.sort(high[some])
    ends = np.unique(
        np.concatenate([[0.0], starts[starts > 0], stops[(stops > 0) & (stops < np.inf)]])
    )
    # One alpha per gap, and one beyond.
    between = np.append((ends[:-1] + ends[1:]) / 2, ends[-1] * 2 + 1)
    right = np.searchsorted(starts, between) - np.searchsorted(stops, between)
    most = int(right.max())
    # Ends within a plateau do not split it.
    edges = np.diff((right == most).astype(int), prepend=0, append=0)
    plateau_starts = ends[edges[:-1] == 1].tolist()
    plateau_stops = np.append(ends, np.inf)[edges == -1].tolist()
    return most, max(zip(plateau_starts, plateau_stops, strict=True), key=_width)


def _width(interval: tuple[float, float]) -> float:
    """Return the ratio of the ends of an interval of alphas. It is infinite if the interval reaches 0 or infinity."""
    low, high = interval
    return math.inf if high == math.inf or low <= 0 else high / low
