"""Give one answer to all photos of a file, such as the frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from retrieval_tip.arrays import IntArray
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.source import Source
from retrieval_tip.evaluation.held_out import answered, classified, hides, recognised
from retrieval_tip.model import Index
from retrieval_tip.predictions import Predictions
from retrieval_tip.settings import Ask

Photos = tuple[Source, str, FeatureBlock]
"""Some photos of a source: all of a file, or such without a file (``""``)."""


def by_file(
    blocks: Iterable[tuple[Source, FeatureBlock]], file_of: Callable[[str], str]
) -> Iterator[Photos]:
    """Yield the photos of each file together, and others as they come. ``file_of`` returns the file of a photo."""
    pieces = _pieces(blocks, file_of)
    for (_, file), group in groupby(pieces, lambda piece: (id(piece[0]), piece[1])):
        if file:
            sources, _, parts = zip(*group, strict=True)
            yield sources[0], file, FeatureBlock.joined(parts)
        else:
            yield from group


def _pieces(
    blocks: Iterable[tuple[Source, FeatureBlock]], file_of: Callable[[str], str]
) -> Iterator[Photos]:
    for source, block in blocks:
        paths = source.paths
        files = [file_of(paths[position]) if paths else "" for position in block.positions]
        for file, run in groupby(range(len(files)), files.__getitem__):
            yield source, file, block.take(np.array(list(run)))


def answer_groups(index: Index, block: FeatureBlock, groups: IntArray, ask: Ask) -> Predictions:
    """Answer in order, with the mean of the probabilities of each group of photos.

    ``groups`` has the number of the group of each photo. A group has no match if none of its photos has one. Photos
    with the key id of a shot are classified without it.
    """
    rows = torch.from_numpy(groups)
    block = replace(block, positions=np.arange(len(groups)))
    sums = torch.zeros(int(groups.max()) + 1, len(index.class_names), dtype=torch.float64)
    for answer in answered(index, block, replace(ask, neighbours=0)):
        sums.index_add_(0, rows[answer.block.positions], answer.probabilities.cpu().double())
    block = replace(block, mixed=(sums / torch.bincount(rows)[:, None])[rows])
    answers = Predictions.joined(answer.predictions() for answer in answered(index, block, ask))
    table = answers.in_order().to_arrow()
    if index.settings.least_cache is not None:
        matching = np.bincount(groups, ~table["no_match"].to_numpy())
        column = pa.array((matching == 0)[groups])
        table = table.drop_columns("no_match").append_column("no_match", column)
    return Predictions(table)


def joint(
    index: Index, source: Source, block: FeatureBlock, ask: Ask = Ask()
) -> tuple[Predictions, int]:
    """Return one prediction for all photos of a file (see :func:`answer_groups`), and a position in the source.

    It is the position of the photo that matches the answer best, which the other columns of the prediction describe.
    """
    if hides(index):
        block = recognised(index, source.items["source"], block)
    groups = np.zeros(len(block.positions), dtype=np.int64)
    table = answer_groups(index, block, groups, ask).to_arrow()
    logits = pc.add(table["text_logit"], table["cache_logit"])
    best = int(np.argmax(logits.to_numpy()))
    return Predictions(table.slice(best, 1)), int(block.positions[best])


def classify_files(
    index: Index,
    sources: Sequence[Source],
    reader: Reader,
    files: Mapping[str, str],
    ask: Ask = Ask(),
) -> Iterator[tuple[Predictions, list[str | None]]]:
    """Classify photos, and give all photos of a file one answer (see :func:`joint`).

    ``files`` has the name of the file of each photo that shares its answer. Yields predictions and the best photo of
    each file, or ``None`` for other photos. A file follows the photos that were read with it.
    """
    reader = reader.for_queries(index.parts, index.shares)
    joined: list[tuple[Predictions, list[str | None]]] = []

    def photos(source: Source) -> Iterator[FeatureBlock]:
        blocks = ((source, block) for block in reader.blocks(source))
        for _, file, block in by_file(blocks, lambda path: files.get(path, "")):
            if file:
                answer, best = joint(index, source, block, ask)
                named = answer.named(pa.array([file], pa.string()))
                joined.append((named, [source.items["source"][best].as_py()]))
            else:
                yield block

    asked = ((source.items["source"], photos(source)) for source in sources)
    for answers in classified(index, asked, ask):
        yield answers, [None] * len(answers)
        yield from joined
        joined.clear()
    yield from joined
