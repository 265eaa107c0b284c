"""Compare encoders on the same photos. Each encoder gets an index in a temporary folder."""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retrieval_tip.data.reader import Reader
from retrieval_tip.data.source import spread
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, Skipped, UsageError
from retrieval_tip.evaluation.compare import Alone
from retrieval_tip.evaluation.held_out import held_out_probabilities, photo_rows
from retrieval_tip.index.build import build_index

log = logging.getLogger(__name__)

TIMED = 64
"""Number of photos that are encoded to measure the speed."""
FASTER = 1.5
"""Minimum ratio of the speeds for which a less accurate encoder is recommended."""
PAIRED = 4
"""Number of the most accurate encoders that are tried in pairs."""
JUDGED = 4096
"""Maximum number of photos that are held out to compare encoders."""


@dataclass(frozen=True)
class EncoderTrial:
    """The estimated accuracy and the speed of an encoder.

    ``accuracy`` and its 95 % ``interval`` are those that a build prints, by cross-validation on the photos. ``right``
    maps the positions of held-out photos to whether the answers are right.
    """

    name: str
    accuracy: float
    interval: tuple[float, float]
    images_per_second: float
    right: dict[int, bool]


@dataclass(frozen=True)
class EncoderTrials:
    """The trials in the given order, the recommended one, and the photos that could not be read."""

    trials: Sequence[EncoderTrial]
    recommended: EncoderTrial
    skipped: Sequence[Skipped]

    def __str__(self) -> str:
        best = max(self.trials, key=lambda one: one.accuracy)
        if self.recommended is best:
            return f"recommended: {best.name}; it is the most accurate, and no much faster encoder is about as accurate"
        ratio = self.recommended.images_per_second / best.images_per_second
        return (
            f"recommended: {self.recommended.name}; it is {ratio:.1f} times as fast as {best.name}, and not "
            "significantly less accurate"
        )


def try_encoders(
    photos: Source,
    names: Sequence[str],
    opened: Callable[[str], AbstractContextManager[Reader]],
    device: str = "auto",
) -> EncoderTrials:
    """Fit an index of each encoder to labelled photos, and measure its accuracy and its speed.

    ``opened`` opens an encoder by its name. An encoder that has several names is tried once. Pairs of the
    :data:`PAIRED` most accurate encoders are tried as well. See :func:`recommended` for the recommendation.

    Raises UsageError if ``photos`` is a feature table, and InputError if no photo can be held out.
    """
    if photos.table is not None:
        raise UsageError(
            f"{photos.name}: has the features of one encoder; give photos to compare encoders"
        )
    trials = list[EncoderTrial]()
    skipped = list[Skipped]()
    seen = set[str]()
    for name in itertools.chain(names, _pairs(trials)):
        with (
            opened(name) as reader,
            tempfile.TemporaryDirectory(
                prefix="retrieval-tip-", ignore_cleanup_errors=True
            ) as folder,
        ):
            own = name if reader.backbone is None else reader.backbone.identity.fingerprint
            if own in seen:
                log.warning("%s: was tried under another name", name)
                continue
            seen.add(own)
            index = build_index(photos, Path(folder) / "index", reader, device=device).in_memory()
            fit = index.provenance["fit"]
            if fit["both"] is None:
                raise InputError(
                    f"{photos.name}: {fit['summary']}; give at least two photos per class"
                )
            rows = photo_rows(index)
            rows = rows[spread(len(rows), JUDGED)]
            answers = held_out_probabilities(index, rows).right
            right = dict(
                zip(index.labels["key_id"].to_numpy()[rows].tolist(), answers.tolist(), strict=True)
            )
            low, high = fit["interval_95"]
            trials.append(
                EncoderTrial(name, fit["both"], (low, high), _speed(photos, reader), right)
            )
            skipped += reader.skipped
    return EncoderTrials(trials, recommended(trials), list(dict.fromkeys(skipped)))


def _pairs(trials: Sequence[EncoderTrial]) -> Iterator[str]:
    """Yield the names of pairs of the best encoders, once all are tried."""
    best = sorted(trials, key=lambda one: -one.accuracy)[:PAIRED]
    yield from (f"{a.name}+{b.name}" for a, b in itertools.combinations(best, 2))


def recommended(trials: Sequence[EncoderTrial]) -> EncoderTrial:
    """Return the most accurate encoder, or the fastest one that is about as accurate and much faster.

    An encoder is much faster if it is at least :data:`FASTER` times as fast, and about as accurate if McNemar's test on
    the held-out photos finds no significant difference.
    """
    best = max(trials, key=lambda one: one.accuracy)
    fast = [
        one
        for one in trials
        if one.images_per_second >= FASTER * best.images_per_second and not _worse(one, best)
    ]
    return max(fast, key=lambda one: one.images_per_second, default=best)


def _worse(one: EncoderTrial, best: EncoderTrial) -> bool:
    """Return whether an encoder is significantly less accurate than the best one on the photos of both."""
    both = one.right.keys() & best.right.keys()
    right, right_of_best = (
        np.array([trial.right[at] for at in both], dtype=bool) for trial in (one, best)
    )
    return Alone.of(right, right_of_best).better == "b"


def _speed(photos: Source, reader: Reader) -> float:
    """Return how many photos are read and encoded per second, without the encoding cache."""
    few = photos.take(spread(len(photos), TIMED))
    bare = replace(reader, cache=None, skipped=[], done=Counter(), progress=False, empty=True)
    _count(bare, few)  # loads the encoder
    start = time.perf_counter()
    return _count(bare, few) / (time.perf_counter() - start)


def _count(reader: Reader, photos: Source) -> int:
    return sum(len(block.positions) for block in reader.blocks(photos))
