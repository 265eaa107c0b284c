"""An index from one place to another, of whichever kind: a folder, or a LanceDB store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import InputError
from retrieval_tip.index import places as stores
from retrieval_tip.lance.key_table import VERSION
from retrieval_tip.lance.lance_model import TableModel
from retrieval_tip.retrieval.keys import KEY_BLOCK, index_over
from retrieval_tip.retrieval.segments import runs
from retrieval_tip.store import folder as store

if TYPE_CHECKING:
    from retrieval_tip.index.places import Model

BESIDE = ("settings", "templates", "backbone")
"""What an index has beside its keys, labels and classes."""


def copy(model: Model, target: stores.FolderStore | stores.LanceStore, what: str) -> int:
    """Write an opened index to a place that has none; returns its version. ``what`` is said of it in its history.

    Raises InputError for trained values or encoders, which a LanceDB store does not keep; StoreError as
    :func:`store.write`.
    """
    if isinstance(target, stores.FolderStore):
        return _copy_to_folder(model, target.folder, what)
    if isinstance(model, CacheModel) and (model.values is not None or model.tuned is not None):
        raise InputError(
            f"{target}: a LanceDB store keeps no trained values and no trained encoder; keep this index in a folder"
        )
    with target.write() as writer:
        text = model.text_weights.cpu().numpy()
        found = TableModel.create(writer, _stored_blocks(model), model.class_names, text, model.dtype)
        for name in BESIDE:
            setattr(found, name, getattr(model, name))
        found.provenance = {**model.provenance, "index": found.provenance["index"]}
        assert model.next_key_id is not None
        found.next_key_id = model.next_key_id
        found.commit(what)
    return writer.number


def _stored_blocks(model: Model) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
    """Labels, and keys as they are stored, some at a time."""
    if isinstance(model, TableModel):
        yield from ((labels.drop_columns([VERSION]), keys) for labels, keys in model.stored_blocks())
        return
    for part in runs(model.keys, KEY_BLOCK):
        yield model.labels.slice(part.start, part.stop - part.start), model.keys[part]


def _copy_to_folder(model: Model, folder: Path, what: str) -> int:
    if isinstance(model, TableModel):
        labels = model.labels.drop_columns([VERSION])
        with store.write(folder) as writer:
            order = np.lexsort((labels["key_id"].to_numpy(), labels["class_id"].to_numpy()))
            place = np.empty(len(order), dtype=np.int64)
            key_ids = labels["key_id"].to_numpy()
            by_id = np.argsort(key_ids)
            place[order] = np.arange(len(order))
            staged, array = writer.stage_array("keys", (model.n, model.d), model.dtype)
            for part, keys in model.stored_blocks():
                rows = by_id[np.searchsorted(key_ids[by_id], part["key_id"].to_numpy())]
                array[place[rows]] = keys
            array.flush()  # type: ignore[attr-defined]  # a memmap
            del array
            keys = np.load(writer.seal("keys", staged, model.n), mmap_mode="c")
            labels = labels.take(pa.array(order))
            ids = labels["class_id"].to_numpy().astype(np.int64)
            cache = CacheModel(
                keys=keys,
                labels=labels,
                class_names=model.class_names,
                text_weights=model.text_weights,
                index=index_over(keys, ids, len(model.class_names), "Flat", "cpu"),
                next_key_id=model.next_key_id,
                **{name: getattr(model, name) for name in (*BESIDE, "provenance")},
            )
            cache.commit(writer, what)
            assert cache.version is not None
            return cache.version
    model.save(folder, what)
    assert model.version is not None
    return model.version
