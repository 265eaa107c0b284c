"""Queries that are shots of an index, and do not see themselves.

:class:`Queries` hides keys from queries, but keeps the fit. :func:`without_folds` fits an index without some photos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import IntArray, KeyArray, slices
from retrieval_tip.errors import UsageError
from retrieval_tip.fit.folds import Folds
from retrieval_tip.fit.forms import Form
from retrieval_tip.model import Index
from retrieval_tip.retrieval.keys import QUERY_BLOCK
from retrieval_tip.retrieval.rows import ArrayRows
from retrieval_tip.store.labels import images_of

FOLDS, MANY_KEYS = 8, 4096
"""Number of folds of the photos in :func:`without_folds`, and number of keys above which it is halved. The fit is
repeated for each fold.
"""
VALUES = 1 << 23
"""Number of affinities of :class:`Queries` in memory at a time. They take 32 MiB in float32."""


@dataclass(frozen=True)
class Queries:
    """Labelled queries, with ``features`` of shape ``[q, d]`` and class ``ids`` of shape ``[q]``.

    If they are shots, ``images`` has the image of each (see :func:`labels.images_of`), whose keys it does not see.
    """

    features: KeyArray
    ids: IntArray
    name: str
    images: IntArray | None = None

    @classmethod
    def leave_one_out(cls, index: Index) -> Self:
        """Return the shots as queries that do not see the keys of their own image.

        Raises UsageError if a class has a single image, or if the values of the index were solved.
        """
        if index.fitted is not None and index.fitted.solved:
            raise UsageError(
                "leave-one-out: the values of this index were solved from all its shots; run retrieval-tip fit INDEX, "
                "which solves them again without each fold, or give --val SOURCE"
            )
        images = images_of(index.labels)
        ids = index.class_ids.cpu().numpy()
        _, first = np.unique(images, return_index=True)  # one query per image
        single = np.flatnonzero(np.bincount(ids[first], minlength=len(index.class_names)) == 1)
        if single.size:
            raise UsageError(
                f"leave-one-out: class {index.class_names[single[0]]!r} has one image; give every class at least 2, or "
                "give --val SOURCE"
            )
        features = np.asarray(index.keys[first], dtype=np.float32)
        return cls(features, ids[first], "its own shots, each held out in turn", images[first])

    def blocks(self, index: Index, k: int | None = None) -> Iterator[tuple[slice, Visible]]:
        """Yield the queries in blocks, with the keys that they see: all, or those among the ``k`` nearest."""
        c = len(index.class_names)
        every = index.class_ids.cpu().numpy()
        images = None if self.images is None else images_of(index.labels)
        most = max(c, index.n if k is None else min(k, index.n))
        for block in slices(len(self.ids), max(1, min(QUERY_BLOCK, VALUES // most))):
            features = torch.from_numpy(np.asarray(self.features[block], dtype=np.float32)).to(
                index.device
            )
            retrieval = index.retrieval
            points = retrieval.keys.phi(features)
            counts = retrieval.keys.counts.expand(len(features), -1)
            if k is None:
                rows = torch.arange(index.n, device=index.device)
                affinity = torch.cat(
                    [tip.affinity(keys, points) for keys, *_ in retrieval.keys.blocks()]
                ).T
                unseen = affinity.new_zeros(1, 1, dtype=torch.bool)
            else:
                near = retrieval.keys.nearest(points, k)
                affinity = near.affinity
                rows = near.rows
                unseen = near.rows < 0
            if self.images is not None and images is not None:
                hidden, place = np.unique(self.images[block], return_inverse=True)
                # For images above all hidden ones, searchsorted returns len(hidden).
                at = np.searchsorted(hidden, images).clip(max=len(hidden) - 1)
                is_hidden = hidden[at] == images
                gone = np.bincount(
                    at[is_hidden] * c + every[is_hidden], minlength=len(hidden) * c
                ).reshape(-1, c)[place]
                counts = counts - torch.from_numpy(gone).to(counts)
                shown = torch.from_numpy(images).to(index.device)[rows]
                unseen = unseen | (
                    shown == torch.from_numpy(self.images[block]).to(index.device)[:, None]
                )
            yield block, Visible(index, features, points, affinity, rows, unseen, counts)


@dataclass(frozen=True)
class Visible:
    """The ``affinity`` ``[q, m]`` of queries to the keys at some ``rows``, which of them are ``unseen``, and counts.

    ``rows`` has the shape ``[m]``, or ``[q, m]`` if each query has its own keys, where -1 stands for no key. ``counts``
    ``[q, c]`` are the numbers of visible keys of each class, whether they are among the rows or not.
    """

    index: Index
    features: Tensor
    points: Tensor
    affinity: Tensor
    rows: Tensor
    unseen: Tensor
    counts: Tensor

    @property
    def ids(self) -> Tensor:
        """The class ids of the keys, or ``c`` in an empty slot."""
        ids = self.index.class_ids[self.rows.clamp_min(0)]
        return ids.masked_fill(self.rows < 0, len(self.index.class_names))

    def terms(self, betas: Sequence[float]) -> Iterator[tip.Terms]:
        """Yield the terms of the logits over all visible keys, for each beta.

        If a query sees ``m`` of the ``n`` keys of a class, their weights are multiplied by ``n / m``, so that settings
        for these terms suit the whole index. The discriminant has the offsets of all keys.
        """
        retrieval = self.index.retrieval
        ids = self.ids
        c = len(self.index.class_names)
        settings = self.index.settings
        values = retrieval.keys.values
        of_all_keys = retrieval.keys.discriminant
        text = tip.text_logits(self.features, retrieval.text, settings.logit_scale)
        factor = torch.where(self.counts > 0, retrieval.keys.counts / self.counts.clamp_min(1), 0)
        discriminant = None
        if settings.gamma:
            means = tip.sum_by_class(
                self.affinity.masked_fill(self.unseen, 0), ids, c
            ) / self.counts.clamp_min(1)
            discriminant = torch.where(
                self.counts > 0, means + of_all_keys.offsets, of_all_keys(self.points)
            )
        for beta in betas:
            weights = tip.weight(self.affinity, beta).masked_fill_(self.unseen, 0)
            if values is None:
                cache = tip.sum_by_class(weights, ids, c) * factor
            else:
                cache = tip.Values(values).weighted(weights.mul_(factor[:, ids]))
            yield tip.Terms(text, tip.log_cache(cache, settings.log_offset), discriminant)


def without_folds(
    index: Index, rows: IntArray, kept: IntArray | None = None
) -> Iterator[tuple[IntArray, Index]]:
    """Split photos into at most :data:`FOLDS` folds, and yield each fold with an index that lacks its photos.

    ``rows`` has a key of each photo, and a fold is given as positions in ``rows``. It has few photos of the same
    class. The index has those of the ``kept`` keys, all by default, that show none of its photos. Its metric and values
    are refitted to these keys, unless they were trained, and it has the settings of ``index``. It compares a query with
    every key, unless ``index`` is of the type ``Classes``. A fold is left out if no key remains.
    """
    folds = Folds.of(index)
    fitted = index.fitted
    ids = folds.ids.numpy()
    images = folds.images
    kept = np.arange(index.n) if kept is None else kept
    # Other types would be built, and some trained, for every fold.
    factory = index.index_type if index.retrieval.keys.by_class else "Flat"
    number = min(FOLDS if index.n <= MANY_KEYS else FOLDS // 2, len(rows))
    order = folds.order_of(torch.from_numpy(rows)).numpy()
    for place in range(number):
        fold = order[place::number]
        others = kept[~np.isin(images[kept], images[rows[fold]])]
        if not len(others):
            continue
        others = others[np.argsort(ids[others], kind="stable")]
        metric = index.metric
        values = None if index.values is None else index.values[torch.from_numpy(others)]
        if fitted is not None:
            metric, values = folds.fitted(
                Form.of(fitted, index.settings.beta), torch.from_numpy(others), place
            )
        left = ArrayRows(
            np.asarray(index.keys[others]), index.labels.take(pa.array(others)), values
        )
        yield fold, replace(index, rows=left, metric=metric, factory=factory)
