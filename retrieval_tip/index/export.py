"""An index from one place to another, of whichever kind: a folder, or a LanceDB store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.errors import InputError
from retrieval_tip.index import places as stores
from retrieval_tip.lance.key_table import VERSION
from retrieval_tip.lance.lance_model import LanceModel
from retrieval_tip.retrieval.keys import KEY_BLOCK
from retrieval_tip.retrieval.segments import runs

if TYPE_CHECKING:
    from retrieval_tip.index.places import Model

BESIDE = ("settings", "templates", "backbone")
"""What an index has beside its keys, labels and classes."""


def copy(model: Model, target: stores.Store, what: str) -> int:
    """Write an opened index to a place that has none; returns its version. ``what`` is said of it in its history.

    Raises InputError for trained values or encoders, which a LanceDB store does not keep; StoreError as
    :func:`store.write`.
    """
    if not isinstance(target, stores.LanceStore):  # a folder keeps all that a model has, a table some of it
        model.save(str(target), what)
        return target.manifest().version
    if model.values is not None or model.tuned is not None:
        raise InputError(
            f"{target}: a LanceDB store keeps no trained values and no trained encoder; keep this index in a folder"
        )
    with target.write() as writer:
        text = model.text_weights.cpu().numpy()
        copied = LanceModel.create(writer, _stored_blocks(model), model.class_names, text, model.dtype)
        for name in BESIDE:
            setattr(copied, name, getattr(model, name))
        copied.provenance = {**model.provenance, "index": copied.provenance["index"]}
        assert model.next_key_id is not None
        copied.next_key_id = model.next_key_id
        copied.commit(what)
    return writer.number


def _stored_blocks(model: Model) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
    """Labels, and keys as they are stored, some at a time."""
    if isinstance(model, LanceModel):  # a column of this name is its own, and one of a folder's labels is refused
        yield from ((labels.drop_columns([VERSION]), keys) for labels, keys in model.stored_blocks())
        return
    for part in runs(model.keys, KEY_BLOCK):
        yield model.labels.slice(part.start, part.stop - part.start), model.keys[part]
