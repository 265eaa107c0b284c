"""Give one answer to all photos of a burst."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise

import numpy as np
import pyarrow as pa

from retrieval_tip.arrays import IntArray
from retrieval_tip.data.exif import UNKNOWN, ExifRecorder
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.labelling.clips import mean_of_groups
from retrieval_tip.labelling.pool import Pool
from retrieval_tip.machine import check_memory
from retrieval_tip.model import Index
from retrieval_tip.predictions import Predictions
from retrieval_tip.settings import Ask

VISIT = 10.0
"""Maximum number of seconds between two photos of a visit, as in docs/camera-traps.md."""


def bursts(names: Sequence[str], times: Sequence[datetime | None], gap: float) -> IntArray:
    """Return the number of the burst of each photo, counted from 1 in the order of the photos.

    A photo belongs to the burst of the previous photo in the same folder if it was taken at most ``gap`` seconds later.
    A photo without a time is a burst of its own.
    """
    taken = enumerate(zip(names, times, strict=True))
    # pathlib takes seconds for 50,000 names
    dated = sorted((os.path.dirname(name), time, row) for row, (name, time) in taken if time)  # noqa: PTH120
    first = list(range(len(names)))  # the row of the earliest photo of each burst
    for (folder, time, row), (next_folder, next_time, next_row) in pairwise(dated):
        if folder == next_folder and (next_time - time).total_seconds() <= gap:
            first[next_row] = first[row]
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(row, len(numbers) + 1) for row in first], dtype=np.int64)


def visits_of(
    paths: Mapping[int, str], times: Mapping[int, datetime], clips: Mapping[int, str]
) -> dict[int, tuple[int, list[int]]]:
    """Return the number of the visit of each photo, and all its photos, by the number of the photo.

    The photos of a visit are in the same folder, and each was taken at most ``VISIT`` seconds after the one before.
    The frames of a video, whose files are ``clips``, are a visit. Photos that are alone in their visit are left out.
    """
    photos = sorted(times)
    numbers = bursts([paths[photo] for photo in photos], [times[photo] for photo in photos], VISIT)
    together = defaultdict[int, list[int]](list)
    for photo, number in zip(photos, numbers.tolist(), strict=True):
        together[number].append(photo)
    first = len(together) + 1
    videos = {file: number for number, file in enumerate(dict.fromkeys(clips.values()), first)}
    for photo, file in clips.items():
        together[videos[file]].append(photo)
    return {
        photo: (number, some)
        for number, some in together.items()
        if len(some) > 1
        for photo in some
    }


def classify_in_bursts(
    index: Index,
    sources: Sequence[Source],
    reader: Reader,
    noting: ExifRecorder,
    gap: float,
    ask: Ask = Ask(),
) -> tuple[Predictions, pa.Array]:
    """Classify photos, and give all photos of a burst the mean of their probabilities.

    The sources must load photos with ``noting``. Returns one prediction per photo, and the number of its burst (see
    :func:`bursts`). A burst has no match if none of its photos has one. Raises UsageError if the probabilities do
    not fit in memory.
    """
    pool = Pool.of(sources, reader)
    total = len(pool.names)
    c = len(index.class_names)
    check_memory(
        16 * total * c, f"probabilities of {total:,} photos", "classify fewer photos at a time"
    )
    numbers = bursts(
        pool.names, [noting.taken.get(name, UNKNOWN).taken_at for name in pool.names], gap
    )
    groups = numbers - 1
    ask = replace(ask, neighbours=0)
    block = mean_of_groups(index, FeatureBlock.of(pool.features), groups, ask)
    answers = Predictions.joined(own.predictions() for own in index.answers([block], ask))
    table = answers.named(pa.array(pool.names, pa.string())).to_arrow()
    if index.settings.least_cache is not None:
        known = np.bincount(groups, ~table["no_match"].to_numpy())
        table = table.drop_columns("no_match").append_column(
            "no_match", pa.array((known == 0)[groups])
        )
    return Predictions(table), pa.array(numbers)
