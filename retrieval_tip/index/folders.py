"""Build an index that is stored in a folder."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval_tip.fit import closed_form
from retrieval_tip.index.items import Material, warn, warn_of
from retrieval_tip.model import Index
from retrieval_tip.retrieval.arrays import KeyArray
from retrieval_tip.retrieval.duplicates import duplicates
from retrieval_tip.retrieval.keys import KEY_BLOCK, auto_for, index_over
from retrieval_tip.retrieval.rows import ArrayRows
from retrieval_tip.retrieval.vector_index import BY_CLASS
from retrieval_tip.store.versions import Versions, Writer


def create(folder: Versions, made: Material) -> Index:
    """Build the next version of a folder. The keys are sorted by class."""
    asked = made.plan.index or "Flat"
    order = np.argsort(made.ids, kind="stable")  # group the keys by class, so that row r of the index is item order[r]
    with folder.write() as writer:
        keys, kept, digests = _write_keys(writer, made, order)
        order = order[kept]
        ids, c = made.ids[order], len(made.words.class_names)
        factory, k = (asked, None) if asked != "auto" else auto_for(keys.shape, made.plan.dtype, c, made.device)
        vectors = index_over(keys, ids, c, factory if made.fit is None else BY_CLASS, device="cpu")
        rows = ArrayRows(keys, made.labels(order, digests))
        index = made.index(rows, rows.statistics(), k, vectors)
        warn_of(duplicates(keys, rows.labels))
        if made.fit is not None:
            fitted = closed_form.fit(index, made.fit, factory=factory)
            warn(fitted.warnings)
        index.commit(writer, "build")
    return index if made.device == index.device else Index.load(folder.folder, device=made.device, verify="fast")


def _write_keys(
    writer: Writer, made: Material, order: npt.NDArray[np.int64]
) -> tuple[KeyArray, npt.NDArray[np.int64], list[str | None]]:
    """Stream features into the file of keys. Return the keys, their positions in ``order`` and the image digests."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    blocks = made.blocks()
    first = next(blocks)
    shape = (len(order), first.features.shape[1])
    array = writer.stage_array("keys", shape, made.plan.dtype)
    present = np.zeros(len(order), dtype=bool)
    digests: list[str | None] = [None] * len(order)
    for block in itertools.chain([first], blocks):
        rows = place[block.positions]
        array[rows] = block.features
        present[rows] = True
        for row, digest in zip(rows.tolist(), block.digests, strict=True):
            digests[row] = digest
    kept = np.flatnonzero(present)
    if len(kept) < len(order):  # close the gaps that unreadable images left
        whole = writer.stage_array("keys", (len(kept), shape[1]), made.plan.dtype)
        for start in range(0, len(kept), KEY_BLOCK):
            whole[start : start + KEY_BLOCK] = array[kept[start : start + KEY_BLOCK]]
        Path(str(array.filename)).unlink()
        array = whole
    return writer.seal_array("keys", array), kept, [digests[row] for row in kept]
