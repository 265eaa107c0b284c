"""Give one answer to all photos of a file, such as the frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.compute as pc
import torch

from retrieval_tip.arrays import IntArray
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.data.source import Source, items_in, read_item, spread
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation.held_out import answered, hides, recognised
from retrieval_tip.files import suffix_of
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
            first, *others = run
            yield source, file, block.take(slice(first, first + len(others) + 1))  # not a copy


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
    return best_of_groups(index, block, np.zeros(len(block.positions), dtype=np.int64), ask)


def best_of_groups(index: Index, block: FeatureBlock, groups: IntArray, ask: Ask) -> FeatureBlock:
    """Return the photo of each group that matches best, with the mean (see :func:`mean_of_groups`), by group number."""
    mixed = mean_of_groups(index, block, groups, ask)
    answers = answered(index, mixed, replace(ask, neighbours=0))
    table = Predictions.joined(answer.predictions() for answer in answers).in_order().to_arrow()
    logits = pc.add(table["text_logit"], table["cache_logit"]).to_numpy()
    order = np.lexsort((-logits, groups))
    _, first = np.unique(groups[order], return_index=True)
    return mixed.take(order[first])


def one_of_each(
    index: Index,
    blocks: Iterable[tuple[Source, FeatureBlock]],
    file_of: Callable[[str], str],
    ask: Ask,
) -> Iterator[FeatureBlock]:
    """Yield photos in order, but only the :func:`joint` photo of each file."""
    for source, file, block in by_file(blocks, file_of):
        yield joint(index, source, block, ask) if file else block


def frames_in(name: str, data: bytes, most: int, most_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Yield the names and the encoded images of at most ``most`` evenly spaced photos of a file in memory.

    ``name`` is the name of the file. There are fewer photos if these do not fit into ``most_bytes``. Raises InputError
    if no photo can be read.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, f"file{suffix_of(name)}")
        file.write_bytes(data)
        items = items_in(str(file))
        with suppress(InputError):
            most = max(1, min(most, most_bytes // len(read_item(items[0]))))
        reason: InputError | None = InputError("contains no photos")
        for place in spread(len(items), most).tolist():
            try:
                image = read_item(items[place])
            except InputError as error:
                reason = reason and error
                continue
            most_bytes -= len(image)
            if most_bytes < 0 and reason is None:
                break
            reason = None
            yield name + items[place].removeprefix(str(file)), image
        if reason:
            raise reason
