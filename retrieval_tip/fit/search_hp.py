"""Search for alpha, beta and k on validation images or on the shots themselves. Test labels are never used.

For a given beta and k, class y beats class j if and only if ``alpha (C_y - C_j) > text_j - text_y``. Each query is
therefore classified correctly on one interval of alpha. Counting these intervals gives the accuracy at every alpha, so
the best alpha is computed exactly and no grid is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.bounds import check_count
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.shots import VAL_SHOTS, few_shot, few_shot_split
from retrieval_tip.data.sources import Source, open_source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import replacing
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.retrieval.logits import slices
from retrieval_tip.settings import Settings
from retrieval_tip.store.labels import images_of

BETAS = np.geomspace(0.1, 100, 31)
"""Betas to try. Neighbouring values differ by a factor of 1.26. Accuracy changes slowly on this scale."""
SURFACE_ALPHAS = 41
BOOTSTRAP = 1000
GPU_AFFINITIES = 1 << 27
"""Affinities per block on a GPU. About eight arrays of this size exist at the same time (4 GiB)."""
QUERY_BLOCK = 1024
FLAT = 0.01
"""Largest difference from the best accuracy that counts as equal."""

FloatArray = npt.NDArray[np.float64]
Part = Literal["both", "text", "cache"]


@dataclass(frozen=True)
class Queries:
    """Validation queries, with ``features`` of shape ``[q, d]`` and class ``ids`` of shape ``[q]``.

    ``groups`` is an array of shape ``[n]`` with the group of each key. Query i does not see the keys whose group equals
    ``hidden[i]``. If ``hidden[i]`` is -1, query i sees all keys.
    """

    features: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    hidden: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    name: str


@dataclass(frozen=True)
class HyperparameterChoice:
    """The selected settings, together with the evidence for them.

    - ``interval``: the alphas that give the same validation ``accuracy``; ``alpha`` is the middle of the interval
    - ``part``: ``text`` if the interval reaches 0, ``cache`` if it has no upper end, and ``both`` otherwise
    - ``best``: the highest accuracy that was found, which a cautious search may not select
    - ``zero_shot``: the accuracy at alpha 0
    - ``cache_alone``: the best accuracy using only the cache, for any beta and k
    - ``low``, ``high``: the 95 % confidence interval of the accuracy, from a bootstrap over the queries
    - ``flat``: the fraction of the surface that is within one point of the best accuracy
    - ``warnings``: reasons why the selected settings may be unreliable
    - ``surface``: a table with the columns k (0 stands for all keys), beta, alpha and accuracy
    """

    alpha: float
    beta: float
    k: int | None
    part: Part
    accuracy: float
    best: float
    interval: tuple[float, float]
    zero_shot: float
    cache_alone: float
    low: float
    high: float
    flat: float
    n: int
    source: str
    warnings: tuple[str, ...]
    surface: pa.Table

    def settings(self, before: Settings) -> Settings:
        """Return ``before`` with the selected alpha, beta and k, and reset values that were fitted to the old ones."""
        least = before.least_cache if self.beta == before.beta else None
        return replace(before, alpha=self.alpha, beta=self.beta, k=self.k, temperature=1.0, least_cache=least)

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


def on_validation(cache: AnsweringIndex, source: Source, encoder: Encoder) -> Queries:
    """Encode a labelled source as queries that see all keys.

    Raises InputError if a label is not a class of the index.
    """
    ids = cache.ids_of(source)
    encoded = encoder.encode(source)
    return unseen(cache, encoded.features, ids[encoded.positions], source.name)


def unseen(cache: AnsweringIndex, features: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], name: str) -> Queries:
    """Return queries that see all keys, given their features of shape ``[q, d]`` and class ids of shape ``[q]``."""
    return Queries(features, ids, np.full(len(ids), -1), np.arange(cache.n), name)


def leave_one_out(cache: CacheModel) -> Queries:
    """Return the shots as queries that do not see the keys of their own image.

    Keys belong to the same image if they have the same content digest. If there are no digests, keys with the same
    source belong to the same image. Raises UsageError if a class has a single image, or if the values of the index were
    solved.
    """
    if cache.fitted is not None and cache.fitted.solved:
        raise UsageError(
            "leave-one-out: the values of this index were solved from all its shots; run retrieval-tip fit, which "
            "solves them again without each fold, or give --val SOURCE"
        )
    groups = images_of(cache.labels)
    ids = cache.class_ids.cpu().numpy()
    _, first = np.unique(groups, return_index=True)  # one query per image
    single = np.flatnonzero(np.bincount(ids[first], minlength=len(cache.class_names)) == 1)
    if single.size:
        raise UsageError(
            f"leave-one-out: class {cache.class_names[single[0]]!r} has one image; give every class at least 2, or "
            "give --val SOURCE"
        )
    features = np.asarray(cache.keys[first], dtype=np.float32)
    return Queries(features, ids[first], groups[first], groups, "its own shots, each held out in turn")


def validation_shots(
    cache: CacheModel, validation: Source, path: str | os.PathLike[str] | None = None, number: int | None = None
) -> list[int]:
    """Sample ``number`` validation shots per class, and return their positions.

    ``number`` defaults to ``min(shots, 4)``, or to 4 if the index does not record a number of shots. If ``path`` is the
    split file that the index's own shots were sampled from, the published validation sample is returned.
    """
    drawn, seed = cache.built.shots, cache.built.seed
    if number is None and drawn is not None and path is not None and Path(path).suffix.lower() == ".json":
        train = open_source(path, split="train")
        if train.name == cache.built.source:
            return few_shot_split(train.labels, validation.labels, drawn, seed)[1]
    return few_shot(validation.labels, number or min(drawn or VAL_SHOTS, VAL_SHOTS), seed)


def apply(cache: CacheModel, choice: HyperparameterChoice, folder: str | os.PathLike[str] | None = None) -> None:
    """Apply the selected settings to the index, record their provenance, and reset an outdated temperature.

    The temperature is kept if alpha and beta do not change. An index over classes keeps its k. If ``folder`` is given,
    the settings are saved as a new version of the index.
    """
    own, settings = cache.settings, choice.settings(cache.settings)
    if cache.index.by_class:
        settings = replace(settings, k=own.k)
    if (settings.alpha, settings.beta) == (own.alpha, own.beta):
        settings = replace(settings, temperature=own.temperature)  # was fitted to the same settings
    cache.settings = settings
    kept = {name: value for name, value in cache.provenance.items() if name != "temperature"}
    cache.provenance = kept | {"alpha": "search-hp", "beta": "search-hp", "search": choice.provenance()}
    if folder is not None:
        cache.save_settings(folder, "search-hp")


def write_surface(choice: HyperparameterChoice, path: str | os.PathLike[str]) -> None:
    """Write the accuracy surface as Parquet. Raises InputError if the file cannot be written."""
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:  # names may not be UTF-8
        pq.write_table(choice.surface, file)


def folds(cache: CacheModel, number: int) -> Queries:
    """Return the shots as queries that do not see the keys of their own fold. Each class has ``number`` folds."""
    check_count("folds", number, 2)
    loo = leave_one_out(cache)
    generator = np.random.default_rng(1)
    fold_of: dict[int, int] = {}
    for class_id in np.unique(loo.ids):
        images = generator.permutation(loo.hidden[loo.ids == class_id])
        start = int(generator.integers(number))
        fold_of |= {int(image): (start + i) % number for i, image in enumerate(images)}
    groups = np.array([fold_of[int(image)] for image in loo.groups])
    hidden = np.array([fold_of[int(image)] for image in loo.hidden])
    return Queries(loo.features, loo.ids, hidden, groups, f"its own shots in {number} folds")


def search(
    cache: CacheModel, queries: Queries, *, betas: Sequence[float] | None = None,
    ks: Sequence[int | None] | None = None, cautious: bool = False, kept: tuple[float, float] | None = None,
) -> HyperparameterChoice:  # fmt: skip
    """Select the alpha, beta and k that give the highest accuracy on the queries.

    Ties go to the widest interval of alpha, measured as a ratio, and then to ``k = all``. If a query only sees ``m`` of
    the ``n`` keys of a class, the sum over the class is multiplied by ``n / m``, so that the settings are valid for the
    whole index. If the values are trained, the weight of each visible key is scaled instead.

    Args:
        cache: The index. Its own alpha, beta and k are ignored.
        queries: Queries from :func:`on_validation`, :func:`leave_one_out` or :func:`folds`.
        betas: The values of beta to try. Defaults to :data:`BETAS`, plus the untouched beta or the beta in ``kept``.
        ks: The values of k to try, where ``None`` stands for all keys. Defaults to all keys and the powers of two up to
            half the number of keys. For an index over classes, only all keys are tried.
        cautious: Whether to keep the untouched settings (:mod:`defaults`) unless the best settings are significantly
            better (paired test, 95 %). This is useful when there are few queries.
        kept: The alpha and beta that a cautious search keeps instead of the untouched ones, with ``k = all``. For
            fine-tuned keys, these are the settings used in training. Defaults to the index's own settings if the index
            is fitted. This beta is always tried.

    Raises:
        InputError: if there are no queries, if their class ids are unknown, or if their shape is not ``[q, d]``.
        UsageError: if ``kept`` is invalid.
    """
    if kept is None and cache.fitted is not None:
        kept = cache.settings.alpha, cache.settings.beta
        if betas is None and cache.fitted.solved:  # solved values are only valid for one beta
            betas = [cache.settings.beta]
    if kept is not None:
        cache.settings.override(alpha=kept[0], beta=kept[1])  # validates
    stay = untouched_settings(cache.met, cache.class_ids.cpu().numpy()) if kept is None else kept
    always = {stay[1]} if betas is None or cautious or kept is not None else set()
    betas = sorted({*(BETAS if betas is None else betas), *always})
    if ks is None:
        ks = [] if cache.index.by_class else [2**i for i in range(cache.n.bit_length()) if 2**i <= cache.n // 2]
        ks = [None, *ks]
    elif cautious and None not in ks:
        ks = [None, *ks]
    tried = _Tried.of(cache, queries, betas, ks)
    solved = {(b, j): _best_alpha(tried.low[b, j], tried.high[b, j]) for b in range(len(betas)) for j in range(len(ks))}
    *_, b, j = max(
        (right, _width(interval), ks[j] is None, -abs(b - len(betas) // 2), b, j)
        for (b, j), (right, interval) in solved.items()
    )
    interval = solved[b, j][1]
    alpha = 2 * interval[0] + 1 if interval[1] == math.inf else sum(interval) / 2
    best = tried.hits(b, j, alpha)
    if cautious:
        at, every = betas.index(stay[1]), ks.index(None)
        more = best.astype(np.float64) - tried.hits(at, every, stay[0])
        if more.mean() <= 1.96 * more.std() / math.sqrt(len(more)):
            b, j, alpha, interval = at, every, stay[0], (stay[0], stay[0])
    accuracy, most = float(tried.hits(b, j, alpha).mean()), float(best.mean())
    warnings = [] if most <= accuracy else [
        f"kept the {'untouched ' if kept is None else ''}settings ({100 * accuracy:.1f} %): with {len(best)} queries, "
        f"the best settings found ({100 * most:.1f} %) may be better by chance; --greedy selects them"
    ]  # fmt: skip
    return tried.choice(b, j, alpha, interval, most, warnings)


@dataclass(frozen=True)
class _Tried:
    """The open intervals ``(low, high)`` of alphas at which each query is right, of shape ``[betas, ks, q]``."""

    queries: Queries
    betas: Sequence[float]
    ks: Sequence[int | None]
    low: FloatArray
    high: FloatArray

    @classmethod
    def of(cls, cache: CacheModel, queries: Queries, betas: Sequence[float], ks: Sequence[int | None]) -> Self:
        q, c = len(queries.ids), len(cache.class_names)
        if not q:
            raise InputError(f"{queries.name}: there are no queries to select settings on")
        if queries.features.shape != (q, cache.d):
            raise InputError(f"{queries.name}: features {queries.features.shape}; expected [{q}, {cache.d}]")
        if queries.ids.min() < 0 or queries.ids.max() >= c:
            raise InputError(f"{queries.name}: class ids outside 0 .. {c - 1}")
        low, high = np.empty((2, len(betas), len(ks), q))
        for part, text, y, caches in _blocks(cache, queries, betas, ks):
            for b, j, cache_logits in caches:
                low[b, j, part], high[b, j, part] = right_between(text, cache_logits, y)
        return cls(queries, betas, ks, low, high)

    def hits(self, b: int, j: int, alpha: float) -> npt.NDArray[np.bool_]:
        hits: npt.NDArray[np.bool_] = (self.low[b, j] < alpha) & (alpha < self.high[b, j])
        return hits

    def choice(
        self, b: int, j: int, alpha: float, interval: tuple[float, float], best: float, warnings: Sequence[str]
    ) -> HyperparameterChoice:
        hits, surface = self.hits(b, j, alpha), self.surface()
        lower, upper = _bootstrap(hits.astype(np.float64))
        rivals = {"text alone": self.hits(b, j, 0.0), "cache alone": self.high[b, j] == np.inf}
        accuracy = float(hits.mean())
        return HyperparameterChoice(
            alpha=alpha,
            beta=float(self.betas[b]),
            k=self.ks[j],
            part="cache" if interval[1] == math.inf else "text" if interval[0] <= 0 < interval[1] else "both",
            accuracy=accuracy,
            best=best,
            interval=interval,
            zero_shot=float(rivals["text alone"].mean()),
            cache_alone=float((self.high == np.inf).mean(axis=2).max()),
            low=lower,
            high=upper,
            flat=float((surface["accuracy"].to_numpy() >= accuracy - FLAT).mean()),
            n=len(hits),
            source=self.queries.name,
            warnings=(*_warnings(hits, rivals, b, self.betas), *warnings),
            surface=surface,
        )

    def surface(self) -> pa.Table:
        """Return the accuracy at alpha 0 and in logarithmic steps over the range in which it changes."""
        low, high = self.low, self.high
        ends = np.concatenate([low[(low > 0) & (low < np.inf)], high[(high > 0) & (high < np.inf)], [1.0]])
        first, last = np.quantile(ends, (0.01, 0.99))
        alphas = np.append(0.0, np.geomspace(first / 2, last * 2, SURFACE_ALPHAS - 1))
        betas, ks, q = low.shape
        right = np.stack([[_count(low[b, j], high[b, j], alphas) for b in range(betas)] for j in range(ks)])
        return pa.table(
            {
                "k": np.repeat([k or 0 for k in self.ks], betas * len(alphas)),
                "beta": np.tile(np.repeat(self.betas, len(alphas)), ks),
                "alpha": np.tile(alphas, ks * betas),
                "accuracy": right.reshape(-1) / q,
            }
        )


def _blocks(
    cache: CacheModel, queries: Queries, betas: Sequence[float], ks: Sequence[int | None]
) -> Iterator[tuple[slice, Tensor, Tensor, Iterator[tuple[int, int, Tensor]]]]:
    """Yield the slice, the text logits, the labels and the cache logits of each block of queries."""
    groups = torch.from_numpy(queries.groups).to(cache.device)
    size = QUERY_BLOCK if cache.device == "cpu" else max(1, min(QUERY_BLOCK, GPU_AFFINITIES // cache.n))
    for part in slices(len(queries.ids), size):
        f = torch.from_numpy(queries.features[part]).to(cache.device)
        hidden = torch.from_numpy(queries.hidden[part]).to(cache.device)
        points = cache.retrieval.points(f)
        affinity = torch.cat([tip.affinity(points, keys) for keys, _ in cache.key_blocks()], dim=1)
        affinity.masked_fill_(hidden[:, None] == groups[None, :], -torch.inf)
        text = tip.text_logits(f, cache.text_weights, cache.settings.logit_scale)
        y = torch.from_numpy(queries.ids[part]).to(cache.device)
        settings, caches = cache.settings, _caches(affinity, cache, betas, ks)
        average = _discriminant(points, affinity, cache) if settings.gamma else None
        terms = ((b, j, tip.Terms(text, tip.log_cache(own, settings.log_offset), average)) for b, j, own in caches)
        yield part, text, y, ((b, j, own.photos(settings)) for b, j, own in terms)


def _discriminant(points: Tensor, affinity: Tensor, cache: CacheModel) -> Tensor:
    """Return the discriminant, with the mean affinity of each class over the keys that are not hidden."""
    own, c = cache.retrieval.keys.discriminant, len(cache.class_names)
    seen = affinity > -torch.inf
    counts = tip.sum_by_class(seen.to(affinity.dtype), cache.class_ids, c)
    means = tip.sum_by_class(affinity.where(seen, 0), cache.class_ids, c) / counts.clamp_min(1)
    return torch.where(counts > 0, means + own.offsets, own(points))


def _caches(
    affinity: Tensor, cache: CacheModel, betas: Sequence[float], ks: Sequence[int | None]
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the cache logits for each beta and k. Hidden keys have an affinity of -inf."""
    ids, c = cache.class_ids, len(cache.class_names)
    seen = affinity > -torch.inf
    counts = tip.sum_by_class(seen.to(affinity.dtype), ids, c)
    every = torch.bincount(ids, minlength=c).to(affinity.dtype)
    made_up = torch.where(counts > 0, every / counts.clamp_min(1), 0)
    totals = tip.Totals(counts, tip.sum_by_class(affinity.where(seen, 0), ids, c))
    largest = max((k for k in ks if k is not None), default=0)
    highest, rows = affinity.topk(largest, dim=1) if largest else (affinity[:, :0], torch.empty(0))
    for j, k in enumerate(ks):
        near, near_ids, tail = affinity, ids, None
        if k is not None:
            filled = highest[:, :k] > -torch.inf
            near, near_ids, tail = highest[:, :k].where(filled, 0), torch.where(filled, ids[rows[:, :k]], c), totals
        if cache.values is None:
            for b, beta in enumerate(betas):
                yield b, j, made_up * tip.cache_logits(near, near_ids, c, beta, tail)
            continue
        counted = affinity
        if tail is not None:  # per-class sums do not include the values of the other keys
            _, mean = tail.rest(near, near_ids)
            counted = mean[:, ids].scatter_(1, rows[:, :k], near).masked_fill_(~seen, -torch.inf)
        factor = made_up[:, ids]
        for b, beta in enumerate(betas):
            yield b, j, tip.Values(cache.values).weighted(tip.weight(counted, beta).mul_(factor))


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
