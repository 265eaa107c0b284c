"""Give one answer to all photos of a file, such as the frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow.compute as pc
import torch

from retrieval_tip.arrays import IntArray
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.data.source import Source
from retrieval_tip.evaluation.held_out import answered, hides, recognised
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


def mean_of_groups(index: Index, block: FeatureBlock, groups: IntArray, ask: Ask) -> FeatureBlock:
    """Return photos that answer with the mean of the probabilities of their group.

    ``groups`` has the number of the group of each photo. Photos with the key id of a shot are classified without it.
    """
    rows = torch.from_numpy(groups)
    placed = replace(block, positions=np.arange(len(groups)))
    sums = torch.zeros(int(groups.max()) + 1, len(index.class_names), dtype=torch.float64)
    for answer in answered(index, placed, replace(ask, neighbours=0)):
        sums.index_add_(0, rows[answer.block.positions], answer.probabilities.cpu().double())
    return replace(block, mixed=(sums / torch.bincount(rows)[:, None])[rows])


def joint(index: Index, source: Source, block: FeatureBlock, ask: Ask) -> FeatureBlock:
    """Return the photo of a file that matches best, which answers with the mean of all probabilities."""
    if hides(index):
        block = recognised(index, source.items["source"], block)
    mixed = mean_of_groups(index, block, np.zeros(len(block.positions), dtype=np.int64), ask)
    answers = answered(index, mixed, replace(ask, neighbours=0))
    table = Predictions.joined(answer.predictions() for answer in answers).in_order().to_arrow()
    logits = pc.add(table["text_logit"], table["cache_logit"])
    return mixed.take(np.argmax(logits.to_numpy(), keepdims=True))


def one_of_each(
    index: Index,
    blocks: Iterable[tuple[Source, FeatureBlock]],
    file_of: Callable[[str], str],
    ask: Ask,
) -> Iterator[FeatureBlock]:
    """Yield photos in order, but only the :func:`joint` photo of each file."""
    for source, file, block in by_file(blocks, file_of):
        yield joint(index, source, block, ask) if file else block
