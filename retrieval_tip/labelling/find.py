"""Find unlabelled photos by a text or by an example, and find near-identical photos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from retrieval_tip.backbones.prompts import DEFAULT_TEMPLATES
from retrieval_tip.data import images
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source, is_there, kind_of, of_images
from retrieval_tip.errors import InputError, UsageError, check_count
from retrieval_tip.files import suffix_of
from retrieval_tip.labelling.pool import MOST_PHOTOS, Pool
from retrieval_tip.labelling.suggest import points_of
from retrieval_tip.model import Index
from retrieval_tip.retrieval.duplicates import Duplicates, duplicates
from retrieval_tip.wording import show

FOUND = pa.schema({"rank": pa.int64(), "input": pa.string(), "similarity": pa.float64()})
"""The columns of search results."""
PAIRED = pa.schema(
    {"input": pa.string(), "other": pa.string(), "similarity": pa.float64(), "kind": pa.string()}
)
"""The columns of near-identical photos."""


def example_of(query: str) -> Source | None:
    """Return the source of a query that is an image or an item, or ``None`` if the query is a text."""
    if is_there(query) and kind_of(query) != "scheme":
        return of_images([query])
    if suffix_of(query) in images.extensions():
        raise InputError(f"{show(query)}: no such file; give an image file or a text")
    return None


def find_photos(
    sources: Sequence[Source], reader: Reader, query: str, n: int = 20, index: Index | None = None
) -> tuple[pa.Table, int]:
    """Return the ``n`` photos that are most similar to a query, and the number of photos that were searched.

    If the query is an image or an item, the similarity is the inner product in the metric of the index, or the cosine
    without an index, and copies of the image are left out. Otherwise, the query is a text. It is inserted into the
    prompt templates of the index, if there is one, and the similarity is the cosine. The table has the columns of
    ``FOUND``.
    The memory needed does not depend on the number of photos.
    """
    check_count("n", n)
    example = example_of(query)
    metric = None
    known = None
    if example is not None:
        block = reader.encode(example)
        metric = None if index is None else index.metric
        (known,) = block.digests
        target = points_of(block.features, metric)[0]
    else:
        templates = (index and index.templates) or DEFAULT_TEMPLATES
        backbone = reader.needed_backbone(sources[0])
        if not backbone.has_text:
            raise UsageError(
                f"{show(query)}: {backbone.identity.model} has no text encoder; give an image file"
            )
        target = torch.from_numpy(reader.text_weights([query], templates)[0])
    names = pa.array([], pa.string())
    best = torch.empty(0)
    total = 0
    for source in sources:
        for block in reader.blocks(source):
            similarity = torch.mv(points_of(block.features, metric), target)
            if known is not None:
                similarity[[digest == known for digest in block.digests]] = -torch.inf
            every = torch.cat([best, similarity])
            best, order = every.sort(descending=True, stable=True)
            order = order[: min(n, int((best > -torch.inf).sum()))]
            best = best[: len(order)]
            total = total + len(similarity)
            own = source.items["source"].take(pa.array(block.positions)).cast(pa.string())
            names = pa.concat_arrays([names, own.combine_chunks()]).take(pa.array(order.numpy()))
    return pa.table(
        [pa.array(range(1, len(best) + 1)), names, best.double().numpy()], schema=FOUND
    ), total


def find_duplicates(
    sources: Sequence[Source], reader: Reader, n: int = 20
) -> tuple[pa.Table, Duplicates]:
    """Return the ``n`` closest pairs of near-identical photos as a table, and the result of the comparison.

    The table has the columns ``input``, ``other``, ``similarity`` (the cosine of the features) and ``kind`` (see
    :class:`duplicates.Duplicate`). If there are more than ``MOST_PHOTOS``, only identical photos and identical features
    are found.
    """
    check_count("n", n)
    pool = Pool.of(sources, reader)
    rows = np.arange(len(pool.names))
    features = normalize(torch.from_numpy(pool.features)).numpy()
    labels = pa.table(
        {  # each photo is a class, because only photos of different classes are compared
            "key_id": rows,
            "class_id": rows,
            "label": pa.array(pool.names, pa.string()),
            "source": pa.array(pool.names, pa.string()),
            "digest": pa.array(pool.digests, pa.string()),
        }
    )
    found = duplicates(features, labels, budget=MOST_PHOTOS**2, most=n)
    pairs = [
        {
            "input": pair.source,
            "other": pair.other_source,
            "similarity": pair.affinity,
            "kind": pair.kind,
        }
        for pair in found.pairs
    ]
    return pa.Table.from_pylist(pairs, schema=PAIRED), found
