"""Classify labelled photos of an index without their labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.answers import AnswerBlock
from retrieval_tip.arrays import BoolArray, FloatArray, IntArray, slices
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit.confidence import wilson
from retrieval_tip.fit.visible import without_folds
from retrieval_tip.model import MOST_COPIED, QUERY_VALUES, Index
from retrieval_tip.predictions import Predictions
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.settings import Ask
from retrieval_tip.store.labels import images_of
from retrieval_tip.wording import counted

log = logging.getLogger(__name__)


UNHIDDEN = "which is too large to hide them or has no other photo"
WINDOW = 8192
"""Number of items of a source that are answered at once if there are shots among them."""
SAME = 0.9999
"""Minimum cosine of two equal features, which may have been rounded to float16 or bfloat16."""


def photo_rows(index: Index, key_ids: Sequence[int] | None = None) -> IntArray:
    """Return the first row of each photo that has one of these key ids, all by default. Unknown ids are ignored."""
    every = index.labels["key_id"].to_numpy()
    rows = np.flatnonzero(
        np.isin(every, every if key_ids is None else np.asarray(key_ids, dtype=np.int64))
    )
    _, first = np.unique(images_of(index.labels)[rows], return_index=True)
    return rows[np.sort(first)]


class HeldOutAnswers(NamedTuple):
    """Held-out probabilities ``[n, c]`` of ``n`` photos, the class ids of their labels, and the id of a key of each.

    The first two are the ``pred_probs`` and ``labels`` of cleanlab.
    """

    pred_probs: FloatArray
    labels: IntArray
    key_ids: IntArray

    @property
    def right(self) -> BoolArray:
        """Whether each answer is right."""
        possible = self.pred_probs[np.arange(len(self.labels)), self.labels] > 0
        right: BoolArray = possible & (self.pred_probs.argmax(1) == self.labels)
        return right


def held_out_probabilities(index: Index, rows: IntArray | None = None) -> HeldOutAnswers:
    """Classify the photo of each row by all keys except the keys of photos in its own fold.

    The metric and the values are refitted to the other keys, while alpha, beta and the temperature stay. The index does
    not change. Without text, a class that has no other key cannot win. If there are no other keys, all probabilities
    are 0. By default, all photos of the index are classified.

    Raises UsageError if the index has only one photo, unless ``rows`` are given.
    """
    if rows is None:
        rows = photo_rows(index)
        if len(rows) < 2:
            raise UsageError("held-out probabilities: the index has one photo; add more")
    probabilities = torch.zeros(len(rows), len(index.class_names))
    for fold, others in without_folds(index, rows):
        probabilities[fold] = probabilities_of(others, index.keys[rows[fold]])
    labels = index.class_ids.cpu().numpy()[rows].astype(np.int64)
    return HeldOutAnswers(probabilities.numpy(), labels, index.labels["key_id"].to_numpy()[rows])


def probabilities_of(index: Index, features: Features) -> torch.Tensor:
    """Return probabilities of shape ``[q, c]``. Without text, a class that has no key cannot win."""
    size = max(1, QUERY_VALUES // index.d)
    parts = [index.logits(features[rows]).cpu() for rows in slices(len(features), size)]
    logits = torch.cat(parts) if parts else torch.empty(0, len(index.class_names))
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
            f"Of {counted(self.n, 'example')}, each classified by the others, {self.kept:,} reach the limit of "
            f"{100 * self.probability:.0f} %, {round(self.wrong * self.kept):,} of these wrong. If the other photos "
            f"are like them, at most {100 * self.highest:.1f} % of those that reach it are wrong (95 % sure)"
        )


def threshold_of(held: HeldOutAnswers, most: float) -> Threshold:
    """Return the lowest probability at which at most the share ``most`` of held-out photos is classified wrongly.

    Raises InputError if not even the most probable answers are good enough.
    """
    probability = held.pred_probs.max(1)
    order = np.argsort(-probability, kind="stable")
    wrong = np.cumsum(~held.right[order])
    number = np.arange(1, len(order) + 1)
    last = np.append(
        np.diff(probability[order]) < 0, True
    )  # equal probabilities are on the same side
    good = np.flatnonzero((wrong <= most * number) & last)
    if not good.size:
        raise InputError(
            f"at most {100 * most:g} % wrong: no probability is high enough on held-out photos; label more"
        )
    lowest = good[-1]
    kept = int(number[lowest])
    share = float(wrong[lowest] / number[lowest])
    highest = wilson(share, kept)[1]
    return Threshold(float(probability[order][lowest]), share, highest, kept, len(order))


def judged(
    index: Index,
    source: Source,
    reader: Reader,
    ask: Ask,
    blocks: Iterable[FeatureBlock] | None = None,
) -> Iterator[AnswerBlock]:
    """Classify a source, whose items may be encoded as ``blocks`` already (see :func:`answered`).

    If shots cannot be hidden, a warning is logged. Raises InputError if no item remains.
    """
    total = shots = 0
    if blocks is None:
        blocks = reader.for_queries(index.parts, index.shares).blocks(source)
    for block in _windows(index, source.items["source"], blocks):
        total = total + len(block.positions)
        shots = shots + int(block.shots.sum())
        yield from answered(index, block, ask)
    if shots and not hides(index):
        if shots == total:
            raise InputError(
                f"{source.name}: all photos are shots of this index, {UNHIDDEN}; use other photos"
            )
        left = counted(shots, "photo")
        log.warning(f"{source.name}: left out {left} that are shots of this index, {UNHIDDEN}")


def classify_sources(
    index: Index, sources: Iterable[Source], reader: Reader, ask: Ask = Ask()
) -> Iterator[Predictions]:
    """Classify images or feature tables while reading them (see :func:`classified`).

    Unreadable items are skipped and listed in ``reader.skipped``.
    """
    reader = reader.for_queries(index.parts, index.shares)
    return classified(
        index, ((source.items["source"], reader.blocks(source)) for source in sources), ask
    )


def classified(
    index: Index, asked: Iterable[tuple[pa.ChunkedArray, Iterable[FeatureBlock]]], ask: Ask = Ask()
) -> Iterator[Predictions]:
    """Classify named items in order, each shot without itself (see :func:`answered`), and warn if there are shots.

    ``asked`` has the names of the items of each source, and their features. If shots cannot be hidden, they are not
    looked for. Raises the errors of :meth:`model.Index.logits`.
    """
    total = 0
    shots = 0
    looks = hides(index)
    for names, blocks in asked:
        for block in _windows(index, names, blocks) if looks else blocks:
            total = total + len(block.positions)
            shots = shots + int(block.shots.sum())
            answers: Iterator[Predictions]
            answers = (answer.predictions() for answer in answered(index, block, ask))
            if block.shots.any():
                answers = iter([Predictions.joined(answers).in_order()])
            for predictions in answers:
                yield predictions.named(names.take(predictions.positions))
    if shots:
        log.warning(known_shots(shots, total))


def known_shots(shots: int, total: int, of: str = "this index") -> str:
    """Say how many photos are shots of an index."""
    return f"{shots:,} of {counted(total, 'photo')} are shots of {of}; each was classified without itself"


def _windows(
    index: Index, names: pa.ChunkedArray, blocks: Iterable[FeatureBlock]
) -> Iterator[FeatureBlock]:
    """Yield items in order, with the key ids of shots. A shot waits for others, which need the same fold.

    Items with mixed probabilities do not wait.
    """
    waiting: list[FeatureBlock] = []
    for block in blocks:
        if waiting and block.mixed is not None:
            yield FeatureBlock.joined(waiting)
            waiting = []
        waiting.append(recognised(index, names, block))
        if (
            block.mixed is not None
            or not waiting[0].shots.any()
            or sum(len(waiting_block.positions) for waiting_block in waiting) >= WINDOW
        ):
            yield FeatureBlock.joined(waiting)
            waiting = []
    if waiting:
        yield FeatureBlock.joined(waiting)


def answered(index: Index, block: FeatureBlock, ask: Ask) -> Iterator[AnswerBlock]:
    """Classify the items of a block that are not shots, and then each shot with an index that lacks it.

    The shots are split into the folds of :func:`visible.without_folds`. Without some shots, sets stay the same.
    Shots that cannot be hidden are left out (see :func:`hides`).
    """
    is_shot = block.shots
    yield from index.answers([block.take(np.flatnonzero(~is_shot))], ask)
    if is_shot.any() and hides(index):
        shots = block.take(np.flatnonzero(is_shot))
        model = index.in_memory()
        rows = model.rows.in_memory().rows_of(np.asarray(shots.key_ids))
        for fold, others in without_folds(model, rows):
            yield from others.altered(scores=index.scores).answers([shots.take(fold)], ask)


def hides(index: Index) -> bool:
    """Return whether shots of an index can be hidden: it has several photos and at most ``MOST_COPIED`` bytes."""
    small = 4 * index.n * index.d <= MOST_COPIED
    return small and len(np.unique(images_of(index.rows.columns("digest", "source")))) > 1


def recognised(index: Index, every: pa.ChunkedArray, block: FeatureBlock) -> FeatureBlock:
    """Return a block with the key ids of its shots. ``every`` has the names of all items of the source.

    An item is a shot if a key has the same digest. A row of a feature table without a digest is a shot if a key has the
    same id and the same feature, because many tables number their rows.
    """
    shots = index.having("digest", filter(None, block.digests))
    key_id_of = dict(zip(shots["digest"].to_pylist(), shots["key_id"].to_pylist(), strict=True))
    key_ids = np.array([key_id_of.get(digest, -1) for digest in block.digests], dtype=np.int64)
    names = every.take(pa.array(block.positions)).to_pylist()
    places: dict[str, list[int]] = {}
    for place, (name, digest) in enumerate(zip(names, block.digests, strict=True)):
        if not digest:
            places.setdefault(name, []).append(place)
    if not places:
        return replace(block, key_ids=key_ids)
    rows = index.rows.of(index.having("source", places)["key_id"].to_pylist())
    for key_id, name, key in zip(
        rows.key_ids.tolist(), rows.labels["source"].to_pylist(), rows.keys, strict=True
    ):
        same_name = np.array(places[name])
        key = key.astype(np.float32)
        lengths = np.linalg.norm(block.features[same_name], axis=1) * np.linalg.norm(key)
        key_ids[same_name[block.features[same_name] @ key >= SAME * lengths]] = key_id
    return replace(block, key_ids=key_ids)
