"""Few-shot methods that the benchmarks fit to the same shots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import baselines
import numpy as np
import torch

from retrieval_tip import Index, Reader
from retrieval_tip.arrays import DoubleArray
from retrieval_tip.data.source import few_shot
from retrieval_tip.data.sources import Source
from retrieval_tip.fit import closed_form, search_hp
from retrieval_tip.fit.finetune import finetune, shots_of
from retrieval_tip.fit.visible import Queries
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.settings import Recipe

STEPS = (200, 20)
"""Numbers of steps of the published grid for beta and alpha."""


def draw_shots(pool: Index, shots: int, seed: int) -> Index:
    """Return an index of ``shots`` keys per class, drawn from an unfitted ``pool`` by the published rule."""
    order = np.argsort(pool.labels["key_id"].to_numpy(), kind="stable")
    labels = pool.class_ids.cpu().numpy()[order].tolist()
    drawn = pool.take(np.sort(order[few_shot(labels, shots, seed)]))
    alpha, beta = untouched_settings(drawn.keys, drawn.class_ids.cpu().numpy())
    return drawn.with_settings(drawn.settings.override(alpha=alpha, beta=beta))


@dataclass(frozen=True)
class Items:
    """Labelled features of shape ``[m, d]``, their class ids of shape ``[m]``, and the name of their split."""

    features: np.ndarray
    ids: np.ndarray
    name: str

    @classmethod
    def of(cls, pool: Index, source: Source, reader: Reader) -> Items:
        """Encode a labelled source, using the class ids of the pool."""
        ids, encoded = pool.ids_of(source), reader.encode(source)
        return cls(encoded.features, ids[encoded.positions], source.name)


@dataclass(frozen=True)
class Shots:
    """Tip-Adapter with default settings over the shots of a run, and their source, which fine-tuning needs.

    ``prior`` is the scatter of other datasets, of shape ``[d, d]``. Settings are selected on ``val``, or on the shots.
    With ``scales``, they are selected on ``val`` from the published grid, whose largest beta and alpha are ``scales``.
    """

    index: Index
    source: Source
    reader: Reader
    seed: int
    prior: DoubleArray | None = None
    val: Items | None = None
    scales: tuple[float, float] | None = None

    @property
    def queries(self) -> Queries | None:
        """The validation items as queries."""
        val = self.val
        return None if val is None else Queries(val.features, val.ids, val.name)


Answering = Index | baselines.Linear
Method = Callable[[Shots], Answering]


def zero_shot(shots: Shots) -> Answering:
    return shots.index.with_settings(shots.index.settings.override(alpha=0.0))


def paper(shots: Shots) -> Answering:
    return shots.index.with_settings(shots.index.settings.override(alpha=1.0, beta=5.5))


def searched(shots: Shots) -> Answering:
    cache, queries = shots.index, shots.queries
    if shots.val is not None and shots.scales is not None:
        return search_grid(cache, shots.val, shots.scales)
    if queries is None:
        if min(filter(None, cache.counts)) < 2:  # a single shot cannot be held out
            return cache
        queries = Queries.leave_one_out(cache)
    return cache.with_settings(search_hp.search(cache, queries).settings(cache.settings))


def search_grid(cache: Index, val: Items, scales: tuple[float, float]) -> Index:
    """Search the published grid of beta and alpha. The first of several equally good settings is selected."""
    betas, alphas = (
        [0.1 + i * (s - 0.1) / n for i in range(n)] for s, n in zip(scales, STEPS, strict=True)
    )
    best, chosen, y = -1, cache.settings, torch.from_numpy(val.ids)
    for beta in betas:
        terms = cache.with_settings(cache.settings.override(beta=beta)).terms(val.features, "all")
        for alpha in alphas:
            right = int(((terms.text + alpha * terms.cache).argmax(dim=1).cpu() == y).sum())
            if right > best:
                best, chosen = right, cache.settings.override(alpha=alpha, beta=beta)
    return cache.with_settings(chosen)


def cache_alone(shots: Shots) -> Answering:
    text = torch.zeros_like(shots.index.text_weights)
    return searched(replace(shots, index=replace(shots.index, text_weights=text)))


def fine_tuned(shots: Shots) -> Answering:
    own = shots_of(shots.index, shots.source)
    return finetune(
        shots.index, own, shots.reader, Recipe(seed=shots.seed), val=shots.queries
    ).index


def closed(shots: Shots, asked: closed_form.FitRequest | None = None) -> Answering:
    return closed_form.fit(shots.index, asked)[0]
