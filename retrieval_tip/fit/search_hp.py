"""Search for alpha and beta on validation images or on the shots themselves. Test labels are never used.

For a given beta, class y beats class j if and only if ``alpha (C_y - C_j) > text_j - text_y``. Each query is
therefore classified correctly on one interval of alpha. Counting these intervals gives the accuracy at every alpha, so
the best alpha is computed exactly and no grid is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError
from retrieval_tip.fit.folds import Queries
from retrieval_tip.fit.scatter import FloatArray
from retrieval_tip.model import Index
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.settings import Settings

BETAS = np.geomspace(0.1, 100, 31)
"""Betas to try. Neighbouring values differ by a factor of 1.26. Accuracy changes slowly on this scale."""
BOOTSTRAP = 1000

Part = Literal["both", "text", "cache"]


@dataclass(frozen=True)
class HyperparameterChoice:
    """The selected settings, together with the evidence for them.

    - ``interval``: the alphas that give the same validation ``accuracy``; ``alpha`` is the middle of the interval
    - ``part``: ``text`` if the interval reaches 0, ``cache`` if it has no upper end, and ``both`` otherwise
    - ``best``: the highest accuracy that was found, which a cautious search may not select
    - ``zero_shot``: the accuracy at alpha 0
    - ``cache_alone``: the best accuracy using only the cache, for any beta
    - ``low``, ``high``: the 95 % confidence interval of the accuracy, from a bootstrap over the queries
    - ``warnings``: reasons why the selected settings may be unreliable
    """

    alpha: float
    beta: float
    part: Part
    accuracy: float
    best: float
    interval: tuple[float, float]
    zero_shot: float
    cache_alone: float
    low: float
    high: float
    n: int
    source: str
    warnings: tuple[str, ...]

    def settings(self, before: Settings) -> Settings:
        """Return ``before`` with the selected alpha and beta, and reset what was fitted to the old ones."""
        beta_stays = self.beta == before.beta
        return replace(
            before, alpha=self.alpha, beta=self.beta, least_cache=before.least_cache if beta_stays else None,
            temperature=before.temperature if beta_stays and self.alpha == before.alpha else 1.0,
        )  # fmt: skip

    def provenance(self) -> dict[str, object]:
        """Return the record of the search for the manifest."""
        return {
            "chosen_on": self.source,
            "queries": self.n,
            "accuracy": round(self.accuracy, 6),
            "best": round(self.best, 6),
            "interval_95": [round(self.low, 6), round(self.high, 6)],
            "part": self.part,
        }


def on_validation(index: Index, source: Source, reader: Reader) -> Queries:
    """Encode a labelled source as queries that see all keys.

    Raises InputError if a label is not a class of the index.
    """
    ids = index.ids_of(source)
    encoded = reader.encode(source)
    return Queries(encoded.features, ids[encoded.positions], source.name)


def apply(index: Index, choice: HyperparameterChoice, folder: str | os.PathLike[str] | None = None) -> None:
    """Apply the selected settings to the index, and record their provenance.

    If ``folder`` is given, the settings are saved as a new version of the index.
    """
    index.settings = choice.settings(index.settings)
    kept = {name: value for name, value in index.provenance.items() if name != "temperature"}
    index.provenance = kept | {"alpha": "search-hp", "beta": "search-hp", "search": choice.provenance()}
    if folder is not None:
        index.save_settings(folder, "search-hp")


def search(
    index: Index, queries: Queries, *, betas: Sequence[float] | None = None, cautious: bool = True,
    kept: tuple[float, float] | None = None,
) -> HyperparameterChoice:  # fmt: skip
    """Select the alpha and beta that give the highest accuracy on the queries, which use all keys.

    Ties go to the widest interval of alpha, measured as a ratio. If queries do not see all keys, the settings are valid
    for the whole index (see :meth:`folds.Visible.terms`).

    Args:
        index: The index. Its own alpha, beta and k are ignored.
        queries: The queries, from :func:`on_validation`, or shots of the index without themselves.
        betas: The values of beta to try. Defaults to :data:`BETAS`, plus the untouched beta or the beta in ``kept``.
        cautious: Whether to keep the untouched settings (:mod:`defaults`) unless the best settings are significantly
            better (paired test, 95 %). This is useful when there are few queries.
        kept: The alpha and beta that a cautious search keeps instead of the untouched ones. For fine-tuned keys, these
            are the settings used in training. Defaults to the index's own settings if the index is fitted. This beta is
            always tried.

    Raises:
        InputError: if there are no queries, if their class ids are unknown, or if their shape is not ``[q, d]``.
        UsageError: if ``kept`` is invalid.
    """
    if kept is None and index.fitted is not None:
        kept = index.settings.alpha, index.settings.beta
        if betas is None and index.fitted.solved:  # solved values are only valid for one beta
            betas = [index.settings.beta]
    if kept is not None:
        index.settings.override(alpha=kept[0], beta=kept[1])  # validates
    stay = untouched_settings(index.vectors, index.class_ids.cpu().numpy()) if kept is None else kept
    always = {stay[1]} if betas is None or cautious or kept is not None else set()
    tried = _Tried.of(index, queries, sorted({*(BETAS if betas is None else betas), *always}))
    solved = [_best_alpha(low, high) for low, high in zip(tried.low, tried.high, strict=True)]
    *_, b = max((right, _width(interval), -abs(b - len(solved) // 2), b) for b, (right, interval) in enumerate(solved))
    interval = solved[b][1]
    alpha = 2 * interval[0] + 1 if interval[1] == math.inf else sum(interval) / 2
    best = tried.hits(b, alpha)
    if cautious:
        at = tried.betas.index(stay[1])
        more = best.astype(np.float64) - tried.hits(at, stay[0])
        if more.mean() <= 1.96 * more.std() / math.sqrt(len(more)):
            b, alpha, interval = at, stay[0], (stay[0], stay[0])
    accuracy, most = float(tried.hits(b, alpha).mean()), float(best.mean())
    warnings = [] if most <= accuracy else [
        f"kept the {'untouched ' if kept is None else ''}settings ({100 * accuracy:.1f} %): with {len(best)} queries, "
        f"the best settings found ({100 * most:.1f} %) may be better by chance"
    ]  # fmt: skip
    return tried.choice(b, alpha, interval, most, warnings)


@dataclass(frozen=True)
class _Tried:
    """The open intervals ``(low, high)`` of alphas at which each query is right, of shape ``[betas, q]``."""

    queries: Queries
    betas: Sequence[float]
    low: FloatArray
    high: FloatArray

    @classmethod
    def of(cls, index: Index, queries: Queries, betas: Sequence[float]) -> _Tried:
        q, c = len(queries.ids), len(index.class_names)
        if not q:
            raise InputError(f"{queries.name}: there are no queries to select settings on")
        if queries.features.shape != (q, index.d):
            raise InputError(f"{queries.name}: features {queries.features.shape}; expected [{q}, {index.d}]")
        if queries.ids.min() < 0 or queries.ids.max() >= c:
            raise InputError(f"{queries.name}: class ids outside 0 .. {c - 1}")
        low, high = np.empty((2, len(betas), q))
        for part, visible in queries.blocks(index):
            y = torch.from_numpy(queries.ids[part]).to(index.device)
            for b, terms in enumerate(visible.terms(betas)):
                low[b, part], high[b, part] = right_between(terms.text, terms.photos(index.settings), y)
        return cls(queries, betas, low, high)

    def hits(self, b: int, alpha: float) -> npt.NDArray[np.bool_]:
        hits: npt.NDArray[np.bool_] = (self.low[b] < alpha) & (alpha < self.high[b])
        return hits

    def choice(
        self, b: int, alpha: float, interval: tuple[float, float], best: float, warnings: Sequence[str]
    ) -> HyperparameterChoice:
        hits = self.hits(b, alpha)
        lower, upper = _bootstrap(hits.astype(np.float64))
        rivals = {"text alone": self.hits(b, 0.0), "cache alone": self.high[b] == np.inf}
        return HyperparameterChoice(
            alpha=alpha,
            beta=float(self.betas[b]),
            part="cache" if interval[1] == math.inf else "text" if interval[0] <= 0 < interval[1] else "both",
            accuracy=float(hits.mean()),
            best=best,
            interval=interval,
            zero_shot=float(rivals["text alone"].mean()),
            cache_alone=float((self.high == np.inf).mean(axis=1).max()),
            low=lower,
            high=upper,
            n=len(hits),
            source=self.queries.name,
            warnings=(*_warnings(hits, rivals, b, self.betas), *warnings),
        )


def right_between(text: Tensor, cache: Tensor, y: Tensor) -> tuple[FloatArray, FloatArray]:
    """Return the open interval ``(low, high)`` of alphas at which each query is right. It is empty if ``low >= high``.

    ``text`` and ``cache`` have shape ``[q, c]``, and ``y`` has shape ``[q]``. Class y beats class j if
    ``alpha (C_y - C_j) > text_j - text_y``, which holds above a bound if the cache prefers y, and below a bound if it
    prefers j.
    """
    gain = (cache.gather(1, y[:, None]) - cache).double()
    lead = (text.gather(1, y[:, None]) - text).double()
    bound = -lead / gain
    low = torch.where(gain > 0, bound, -torch.inf)
    high = torch.where(gain < 0, bound, torch.inf)
    own = torch.zeros_like(gain, dtype=torch.bool).scatter_(1, y[:, None], True)
    lost = ((gain == 0) & (lead <= 0) & ~own).any(dim=1)
    low = low.masked_fill(own, -torch.inf).amax(dim=1).masked_fill(lost, torch.inf)
    high = high.masked_fill(own, torch.inf).amin(dim=1).masked_fill(lost, -torch.inf)
    return low.cpu().numpy(), high.cpu().numpy()


def _best_alpha(low: FloatArray, high: FloatArray) -> tuple[int, tuple[float, float]]:
    """Return the number of right answers at the best alpha, and the widest interval of such alphas."""
    some = (low < high) & (high > 0)
    ends = np.unique(np.concatenate([[0.0], low[some & (low > 0)], high[some & (high < np.inf)]]))
    between = np.append((ends[:-1] + ends[1:]) / 2, ends[-1] * 2 + 1)  # one alpha per gap, and one beyond
    right = _count(low, high, between)
    most = int(right.max())
    upper = np.append(ends[1:], np.inf)
    gaps: list[tuple[float, float]] = []
    previous = -2
    for gap in np.flatnonzero(right == most).tolist():
        if gap == previous + 1:  # an end that does not change the count does not split a plateau
            gaps[-1] = (gaps[-1][0], float(upper[gap]))
        else:
            gaps.append((float(ends[gap]), float(upper[gap])))
        previous = gap
    return most, max(gaps, key=_width)


def _count(low: FloatArray, high: FloatArray, alphas: FloatArray) -> npt.NDArray[np.int64]:
    some = low < high
    begun = np.searchsorted(np.sort(low[some]), alphas, side="left")
    return begun - np.searchsorted(np.sort(high[some]), alphas, side="right")


def _width(interval: tuple[float, float]) -> float:
    """Return the ratio of the ends of an interval of alphas. It is infinite if the interval reaches 0 or infinity."""
    low, high = interval
    return math.inf if high == math.inf or low <= 0 else high / low


def _bootstrap(values: FloatArray) -> tuple[float, float]:
    drawn = np.random.default_rng(1).integers(0, len(values), (BOOTSTRAP, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _warnings(
    hits: npt.NDArray[np.bool_], rivals: dict[str, npt.NDArray[np.bool_]], b: int, betas: Sequence[float]
) -> Iterator[str]:
    if len(betas) > 1 and b in (0, len(betas) - 1):
        yield f"beta {betas[b]:.3g} is at the edge of the range that was tried"
    for name, rival in rivals.items():
        low, high = _bootstrap(hits.astype(np.float64) - rival)
        if low <= 0 < (hits.mean() - rival.mean()):
            yield (
                f"{len(hits)} queries are too few to prefer these settings to {name} "
                f"({100 * rival.mean():.1f} %; difference {100 * low:.1f} to {100 * high:.1f} points, 95 %)"
            )
