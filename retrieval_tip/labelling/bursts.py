"""Give one answer to all photos of a burst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.data.exif import UNKNOWN, Noting
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import check_memory
from retrieval_tip.model import Index, narrowest
from retrieval_tip.predictions import PREDICTIONS, Predictions, lists
from retrieval_tip.settings import Ask


def bursts(names: Sequence[str], times: Sequence[datetime | None], gap: float) -> npt.NDArray[np.int64]:
    """Return the number of the burst of each photo, counted from 1 in the order of the photos.

    A photo belongs to the burst of the previous photo in the same folder if it was taken at most ``gap`` seconds later.
    A photo without a time is a burst of its own.
    """
    taken = enumerate(zip(names, times, strict=True))
    dated = sorted((str(Path(name).parent), time, row) for row, (name, time) in taken if time)
    first = list(range(len(names)))  # the row of the earliest photo of each burst
    for (folder, time, row), (next_folder, next_time, next_row) in pairwise(dated):
        if folder == next_folder and (next_time - time).total_seconds() <= gap:
            first[next_row] = first[row]
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(row, len(numbers) + 1) for row in first], dtype=np.int64)


def classify_in_bursts(
    index: Index, sources: Sequence[Source], reader: Reader, noting: Noting, gap: float, ask: Ask = Ask()
) -> tuple[Predictions, pa.Array]:
    """Classify photos, and give all photos of a burst the mean of their probabilities.

    The encoder must read photos with ``noting``. Returns one prediction per photo, and the number of its burst (see
    :func:`bursts`). A burst has no match if none of its photos has one. Raises UsageError if the probabilities do
    not fit in memory.
    """
    total, c = sum(map(len, sources)), len(index.class_names)
    check_memory(12 * total * c, f"probabilities of {total:,} photos", "classify fewer photos at a time")
    names: list[str] = []
    no_match: list[bool] = []
    blocks: list[torch.Tensor] = []
    for source in sources:
        for answers in index.classify_source(source, reader, replace(ask, top=1, neighbours=0, logits=True)):
            table = answers.written(["input", "logits", "no_match"])
            logits = torch.tensor(table["logits"].combine_chunks().flatten().to_numpy()).reshape(-1, c)
            blocks.append(tip.probabilities(logits, index.settings.temperature))
            names += table["input"].to_pylist()
            no_match += table["no_match"].to_pylist()
    numbers = bursts(names, [noting.taken.get(name, UNKNOWN).taken_at for name in names], gap)
    rows = torch.from_numpy(numbers - 1)
    sums = torch.zeros(int(numbers.max()), c, dtype=torch.float64)
    for block, own in zip(blocks, rows.split([len(block) for block in blocks]), strict=True):
        sums.index_add_(0, own, block.double())
    means = sums / torch.bincount(rows)[:, None]
    chances, ranked = means.topk(min(ask.top, c), dim=1)
    classes = pa.array(index.class_names, pa.string())
    columns = {
        "label": classes.take(pa.array(ranked[:, 0].numpy())),
        "probability": pa.array(chances[:, 0].numpy()),
        "labels": lists(classes.take(pa.array(ranked.flatten().numpy())), ranked.shape[1]),
        "probabilities": lists(chances.numpy(), ranked.shape[1]),
    }
    if ask.at_least is not None and index.groups is not None:
        columns |= narrowest(means, index.class_names, index.groups, ask.at_least)
    if index.settings.least_cache is not None:
        known = torch.bincount(rows, 1 - torch.tensor(no_match, dtype=torch.float64))
        columns["no_match"] = pa.array((known == 0).numpy())
    shared = pa.table(columns, schema=pa.schema([(name, PREDICTIONS[name]) for name in PREDICTIONS if name in columns]))
    named = shared.take(pa.array(rows.numpy())).add_column(0, "input", pa.array(names, pa.string()))
    return Predictions(named), pa.array(numbers)
