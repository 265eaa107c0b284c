"""Classify labelled photos of an index without their labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError, counted
from retrieval_tip.fit.folds import wilson, without_parts
from retrieval_tip.model import MOST_COPIED, Index
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.store.labels import images_of

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

SAME = 0.9999
"""Minimum cosine of two equal features, which may have been rounded to float16 or bfloat16."""


def photo_rows(index: Index, key_ids: Sequence[int]) -> IntArray:
    """Return the first row of each photo that has one of these key ids. Unknown ids are ignored."""
    rows = np.flatnonzero(np.isin(index.labels["key_id"].to_numpy(), np.asarray(key_ids, dtype=np.int64)))
    _, first = np.unique(images_of(index.labels)[rows], return_index=True)
    return rows[np.sort(first)]


class HeldOut(NamedTuple):
    """Held-out probabilities ``[n, c]`` of ``n`` photos, the class ids of their labels, and the id of a key of each.

    The first two are the ``pred_probs`` and ``labels`` of cleanlab.
    """

    pred_probs: npt.NDArray[np.float32]
    labels: IntArray
    key_ids: IntArray

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each answer is right."""
        possible = self.pred_probs[np.arange(len(self.labels)), self.labels] > 0
        right: npt.NDArray[np.bool_] = possible & (self.pred_probs.argmax(1) == self.labels)
        return right


def held_out_probabilities(index: Index, rows: IntArray | None = None) -> HeldOut:
    """Classify the photo of each row by all keys except the keys of photos in its own part.

    The metric and the values are refitted to the other keys, while alpha, beta and the temperature stay. The index does
    not change. Without text, a class that has no other key cannot win. If there are no other keys, all probabilities
    are 0. By default, all photos of the index are classified.

    Raises UsageError if the index has only one photo, unless ``rows`` are given.
    """
    if rows is None:
        rows = photo_rows(index, index.labels["key_id"].to_pylist())
        if len(rows) < 2:
            raise UsageError("held-out probabilities: the index has one photo; add more")
    probabilities = torch.zeros(len(rows), len(index.class_names))
    for part, others in without_parts(index, rows):
        probabilities[part] = probabilities_of(others, index.keys[rows[part]])
    labels = index.class_ids.cpu().numpy()[rows].astype(np.int64)
    return HeldOut(probabilities.numpy(), labels, index.labels["key_id"].to_numpy()[rows])


def probabilities_of(index: Index, features: Features) -> torch.Tensor:
    """Return probabilities of shape ``[q, c]``. Without text, a class that has no key cannot win."""
    logits = index.logits(features).cpu()
    if not index.has_text:  # the class would be unknown
        logits[:, np.array(index.counts) == 0] = -torch.inf
    return tip.probabilities(logits, index.settings.temperature)


class Threshold(NamedTuple):
    """A probability below which answers are set aside, so that few of the others are ``wrong``.

    ``kept`` of ``n`` held-out photos reach it. With 95 % confidence, at most the share ``highest`` of such answers is
    wrong.
    """

    probability: float
    wrong: float
    highest: float
    kept: int
    n: int

    def __str__(self) -> str:
        return (
            f"set aside answers below {100 * self.probability:.0f} %; of {counted(self.n, 'held-out photo')}, "
            f"{self.kept:,} reach it, and {100 * self.wrong:.1f} % of these are wrong (95 % sure: at most "
            f"{100 * self.highest:.1f} %)"
        )


def threshold_of(held: HeldOut, most: float) -> Threshold:
    """Return the lowest probability at which at most the share ``most`` of held-out photos is classified wrongly.

    Raises InputError if not even the most probable answers are good enough.
    """
    probability = held.pred_probs.max(1)
    order = np.argsort(-probability, kind="stable")
    wrong, number = np.cumsum(~held.right[order]), np.arange(1, len(order) + 1)
    last = np.append(np.diff(probability[order]) < 0, True)  # equal probabilities are on the same side
    good = np.flatnonzero((wrong <= most * number) & last)
    if not len(good):
        raise InputError(
            f"at most {100 * most:g} % wrong: no probability is high enough on held-out photos; label more"
        )
    kept, share = int(number[good[-1]]), float(wrong[good[-1]] / number[good[-1]])
    return Threshold(float(probability[order][good[-1]]), share, wilson(share, kept)[1], kept, len(order))


def without_themselves(
    index: Index, source: Source, blocks: Iterable[FeatureBlock]
) -> Iterator[tuple[Index, FeatureBlock]]:
    """Yield the items of a source, each with an index that does not contain it.

    Items that are not shots of ``index`` are yielded at once, with ``index``. The others follow, in the parts of
    :func:`folds.without_parts`. An item is a shot if a key has the same digest. A row of a feature table without a
    digest is a shot if a key has the same id and the same feature, because many tables number their rows.

    If the keys take more than :data:`model.MOST_COPIED` bytes, shots are left out, and a warning is logged.
    Raises InputError if the only photo of the index is an item, or if no item remains.
    """
    shots, parts, new = list[FeatureBlock](), list[IntArray](), 0
    for block in blocks:
        found = key_ids_of(index, source, block)
        new += int((found < 0).sum())
        yield index, block.take(np.flatnonzero(found < 0))
        shots.append(block.take(np.flatnonzero(found >= 0)))
        parts.append(found[found >= 0])
    if not sum(map(len, parts)):
        return
    block, key_ids = FeatureBlock.joined(shots), np.concatenate(parts)
    if 4 * index.n * index.d > MOST_COPIED:
        if not new:
            raise InputError(f"{source.name}: all photos are shots of this index; use other photos")
        known = f"{counted(len(key_ids), 'photo')} that are shots of this index"
        log.warning("%s: left out %s, which is too large to hide them", source.name, known)
        return
    model = index.in_memory()
    photos = images_of(model.labels)
    if photos.min() == photos.max():
        raise InputError(f"{source.name}: has the only photo of the index; add other photos to the index")
    rows = model.rows.in_memory().rows_of(key_ids)
    _, first, photo = np.unique(photos[rows], return_index=True, return_inverse=True)
    for part, others in without_parts(model, rows[first]):
        yield others, block.take(np.flatnonzero(np.isin(photo, part)))


def key_ids_of(index: Index, source: Source, block: FeatureBlock) -> IntArray:
    """Return the id of a key of each item that is a shot (see :func:`without_themselves`), and -1 for other items."""
    shots = index.having("digest", filter(None, block.digests))
    known = dict(zip(shots["digest"].to_pylist(), shots["key_id"].to_pylist(), strict=True))
    found = np.array([known.get(digest, -1) if digest else -1 for digest in block.digests], dtype=np.int64)
    names = source.items["source"].take(pa.array(block.positions)).to_pylist()
    places: dict[str, list[int]] = {}
    for place, (name, digest) in enumerate(zip(names, block.digests, strict=True)):
        if not digest:
            places.setdefault(name, []).append(place)
    if not places:
        return found
    rows = index.rows.of(index.having("source", places)["key_id"].to_pylist())
    for key_id, name, key in zip(rows.key_ids.tolist(), rows.labels["source"].to_pylist(), rows.keys, strict=True):
        own, key = np.array(places[name]), key.astype(np.float32)
        lengths = np.linalg.norm(block.features[own], axis=1) * np.linalg.norm(key)
        found[own[block.features[own] @ key >= SAME * lengths]] = key_id
    return found
