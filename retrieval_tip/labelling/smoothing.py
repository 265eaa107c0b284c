"""Smooth the answers to the photos of a folder over similar photos of the same folder.

Photos that look alike often show the same class. With the probabilities ``P(x)`` of each photo alone::

    Q(x) = (1 - w) P(x) + w sum_j a_j P(j),    a_j = s_j^4 / sum_i s_i^4,    s_j = max(0, cos(phi(x), phi(j)))

where ``j`` are the 5 most similar photos of the folder in the metric, without copies. This is one step of label
propagation (Zhou et al., NIPS 2003). The sum is linear, so each photo gives a known part of a probability. Labelled
photos choose the weight. Each of them is held out, and the photos similar to it are classified without it::

    w = argmax  sum_i log Q(i)[y_i] - (w - m)^2 / (2 0.1^2),    m = 0.6 / sqrt(n / c + 3 t)

with ``n / c`` labelled photos per class, and ``t = 1`` if the index has text. If similar photos mislead, ``w`` is 0.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from retrieval_tip import tip
from retrieval_tip.arrays import FloatArray, slices
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.data.source import spread
from retrieval_tip.evaluation.held_out import SAME, HeldOutAnswers, photo_rows, probabilities_of
from retrieval_tip.fit.visible import without_folds
from retrieval_tip.labelling.suggest import BLOCK, points_of
from retrieval_tip.machine import check_memory
from retrieval_tip.model import Index
from retrieval_tip.predictions import SIMILAR, lists
from retrieval_tip.settings import Ask, Settings
from retrieval_tip.wording import counted

NEAR, POWER, EXPECTED, SPREAD, TEXT = 5, 4, 0.6, 0.1, 3
"""The constants of the formulas. They were chosen on other photos than those of benchmarks/accuracy.md."""
WEIGHTS, LEAST = torch.arange(15) / 20, 1e-3
"""The weights to choose from, and what is added to each probability, so that one wrong label does not decide."""
MOST_HELD, MOST_NEAR = 2048, 4096
"""Maximum numbers of photos to hold out, and of photos of the folder that help others. They are evenly spaced."""


class Smoothing(NamedTuple):
    """The photos of a folder as ``blocks`` that have smoothed probabilities, and what smoothing changed, in ``words``.

    ``similar`` is the column of :data:`PREDICTIONS`. ``held`` has the smoothed probabilities of held-out photos.
    """

    blocks: list[FeatureBlock]
    words: str
    similar: pa.ListArray
    held: HeldOutAnswers


class _Mix(NamedTuple):
    """The weight, and the similar photos ``near`` with their ``shares``, for one index, settings and photos."""

    opened: weakref.ref[Index]
    settings: Settings
    digest: bytes
    weight: float
    held: HeldOutAnswers
    near: Tensor
    shares: Tensor


_LAST = deque[_Mix](maxlen=1)


def smooth(
    index: Index, blocks: Sequence[FeatureBlock], ask: Ask = Ask(), names: Sequence[str] = ()
) -> Smoothing:
    """Smooth the answers to the photos of a folder. Raises UsageError if the probabilities do not fit in memory."""
    m = sum(len(block.positions) for block in blocks)
    c = len(index.class_names)
    check_memory(
        12 * m * (c + index.d), f"probabilities of {m:,} photos", "classify fewer photos at a time"
    )
    opened = index
    index = index.in_memory().with_settings(ask.settings(index.settings))
    alone = torch.cat([own.probabilities.cpu() for own in index.answers(blocks, Ask(neighbours=0))])
    features = blocks[0].features
    if len(blocks) > 1:
        features = np.concatenate([block.features for block in blocks])
    mix = _mix_of(opened, index, features)
    weight, held = mix.weight, mix.held
    near = torch.cat([torch.arange(m)[:, None], mix.near], dim=1)
    shares = torch.cat([1 - weight * mix.shares.sum(1, keepdim=True), weight * mix.shares], dim=1)
    mixed = embedding_bag(near, alone, per_sample_weights=shares, mode="sum")
    before = alone.argmax(1)
    after = mixed.argmax(1)
    chosen = f"Similar photos count {100 * weight:.0f} %, chosen on {counted(len(held.labels), 'held-out photo')}"
    words = f"{chosen}; they changed {int((after != before).sum()):,} of {counted(m, 'answer')}"
    labels = np.array(index.class_names)[before.numpy()]
    gives = shares * alone[near, after[:, None]]
    at = pa.array(near.flatten().numpy())
    named = (names or [str(row) for row in range(m)], labels)
    columns = [pa.array(one, pa.string()).take(at) for one in named] + [
        pa.array(gives.double().flatten().numpy())
    ]
    similar = lists(pa.StructArray.from_arrays(columns, fields=list(SIMILAR)), near.shape[1])
    parts = mixed.split([len(block.positions) for block in blocks])
    mixed_blocks = [replace(block, mixed=part) for block, part in zip(blocks, parts, strict=True)]
    return Smoothing(mixed_blocks, words, similar, held)


def _mix_of(opened: Index, index: Index, features: FloatArray) -> _Mix:
    """Return how to mix the answers to the photos of a folder. ``index`` is ``opened`` with the settings of a question.

    The last result is kept, because a person reviews the answers and then sorts the photos.
    """
    digest = hashlib.sha256(np.ascontiguousarray(features).data).digest()
    for mix in tuple(_LAST):
        if mix.opened() is opened and (mix.settings, mix.digest) == (index.settings, digest):
            return mix
    some = spread(len(features), MOST_NEAR)
    weight, held = _chosen(index, features[some])
    near, shares = _near(features, features[some], index.metric)
    near = torch.from_numpy(some)[near]
    mix = _Mix(weakref.ref(opened), index.settings, digest, weight, held, near, shares)
    _LAST.append(mix)
    return mix


def _near(
    features: FloatArray, folder: FloatArray, metric: tip.Metric | None
) -> tuple[Tensor, Tensor]:
    """Return the most similar photos of a folder and their shares, which sum to 1, or to 0 if no photo is similar."""
    others = points_of(folder, metric)
    found = []
    for part in slices(len(features), BLOCK):  # all points at once would take as much memory again
        cosines = points_of(features[part], metric) @ others.T
        found.append(cosines.masked_fill_(cosines >= SAME, 0).topk(min(NEAR, len(folder))))
    powers = torch.cat([near.values for near in found]).clamp_min_(0).double().pow_(POWER)
    shares = powers / powers.sum(1, keepdim=True).clamp_min(torch.finfo(powers.dtype).tiny)
    return torch.cat([near.indices for near in found]), shares.float()


def _chosen(index: Index, folder: FloatArray) -> tuple[float, HeldOutAnswers]:
    """Choose the weight on labelled photos, and return it with their smoothed probabilities."""
    ids = index.class_ids.cpu()
    every = photo_rows(index)
    rows = every[spread(len(every), MOST_HELD)]
    photos = len(every) / len(ids.unique())
    own, given = torch.zeros(2, len(rows), len(index.class_names))
    for part, others in without_folds(index, rows):
        keys = np.asarray(index.keys[rows[part]], dtype=np.float32)
        near, shares = _near(keys, folder, others.metric)
        used, places = near.unique(return_inverse=True)
        own[part] = probabilities_of(others, keys)
        answers = probabilities_of(others, folder[used.numpy()])
        given[part] = embedding_bag(places, answers, per_sample_weights=shares, mode="sum")
        given[part] += (1 - shares.sum(1, keepdim=True)) * own[part]
    labels = ids[rows][:, None]
    likely = own.gather(1, labels) * (1 - WEIGHTS) + given.gather(1, labels) * WEIGHTS
    expected = EXPECTED / (photos + TEXT * index.has_text) ** 0.5
    weight = WEIGHTS[
        ((likely + LEAST).log().sum(0) - ((WEIGHTS - expected) / SPREAD) ** 2 / 2).argmax()
    ]
    key_ids = index.labels["key_id"].to_numpy()[rows]
    return float(weight), HeldOutAnswers(
        own.lerp(given, float(weight)).numpy(), labels[:, 0].numpy(), key_ids
    )
