"""Give one answer to all photos of a file, such as the frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch

from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.source import Source
from retrieval_tip.evaluation.held_out import answered, classified, hides, recognised
from retrieval_tip.model import Index
from retrieval_tip.predictions import Predictions
from retrieval_tip.settings import Ask

FileOf = Callable[[str], str]
"""Returns the file of a photo that shares its answer with the other photos of the file, or ``""``."""


def by_file(
    source: Source, blocks: Iterable[FeatureBlock], file_of: FileOf
) -> Iterator[tuple[str, FeatureBlock]]:
    """Yield the photos that share no answer as they come, with ``""``, and all photos of a file together."""
    names = source.sources if source.paths is None else source.paths
    current = ""
    waiting: list[FeatureBlock] = []
    for block in blocks:
        files = [file_of(names[position]) for position in block.positions]
        for file, run in groupby(range(len(files)), files.__getitem__):
            if waiting and file != current:
                yield current, FeatureBlock.joined(waiting)
                waiting = []
            current = file
            photos = block.take(np.array(list(run)))
            if file:
                waiting.append(photos)
            else:
                yield "", photos
    if waiting:
        yield current, FeatureBlock.joined(waiting)


def joint(index: Index, source: Source, block: FeatureBlock, ask: Ask = Ask()) -> Predictions:
    """Return one prediction for all photos of a file, from the mean of their probabilities.

    Each shot of the index is classified without itself. The other columns are those of the photo that has the highest
    probability of the answer, if possible among those with a match. The prediction is named by its position.
    """
    if hides(index):
        block = recognised(index, source.items["source"], block)
    rows = {position: row for row, position in enumerate(block.positions.tolist())}
    chances = torch.zeros(len(rows), len(index.class_names), dtype=torch.float64)
    unmatched = np.zeros(len(rows), dtype=bool)
    for answer in answered(index, block, replace(ask, neighbours=0)):
        own = [rows[position] for position in answer.block.positions.tolist()]
        chances[own] = answer.probabilities.cpu().double()
        matches = answer.predictions().written(["no_match"])["no_match"]
        unmatched[own] = matches.fill_null(False).to_numpy()
    mean = chances.mean(dim=0, keepdim=True)
    winner = chances[:, int(mean.argmax())].numpy()
    best = np.lexsort((winner, ~unmatched))[-1:]
    mixed = replace(block.take(best), mixed=mean)
    return Predictions.joined(answer.predictions() for answer in answered(index, mixed, ask))


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
        for file, block in by_file(source, reader.blocks(source), lambda path: files.get(path, "")):
            if file:
                answer = joint(index, source, block, ask)
                best = source.sources[int(answer.inputs[0])]
                joined.append((answer.named(pa.array([file], pa.string())), [best]))
            else:
                yield block

    asked = ((source.items["source"], photos(source)) for source in sources)
    for answers in classified(index, asked, ask):
        yield answers, [None] * len(answers)
        yield from joined
        joined.clear()
    yield from joined
