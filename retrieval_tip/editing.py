"""Apply edits to the keys and classes of an index (see :meth:`model.Index.edited`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip.arrays import FloatArray, IntArray
from retrieval_tip.errors import InputError
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.retrieval.keys import Keys, transformed
from retrieval_tip.retrieval.rows import ArrayRows, Rows
from retrieval_tip.store.edits import Edits, NewKeys
from retrieval_tip.store.labels import label_table

if TYPE_CHECKING:
    from retrieval_tip.model import Index

MOST_EXPONENT = 80.0
"""Maximum exponent in the weight of a key. In float32, the exponential overflows just above 88."""


def apply(made: Index, edits: Edits) -> None:
    """Apply edits to an index that nobody else has. If this raises an error, the index must not be used."""
    if edits.classes:
        _append_classes(made, edits.classes)
    if edits.add is not None:
        _add(made, edits.add)
    if edits.move:
        _move(made, edits.move)
    if edits.remove:
        _remove(made, list(edits.remove))
    if edits.rename is not None:
        _rename(made, *edits.rename)
    if edits.drop:
        empty = [name for name in made.bare if name in edits.drop]
        drop_classes(
            made, np.array([made.class_names.index(name) for name in empty], dtype=np.int64)
        )
    if edits.text:
        _set_text(made, edits.text)
    if edits.templates is not None:
        made.templates = list(edits.templates)


def drop_classes(made: Index, class_ids: IntArray) -> None:
    """Drop classes that have no keys."""
    if not len(class_ids):
        return
    left = np.delete(np.arange(len(made.class_names)), class_ids)
    made.rows = made.rows.narrowed(class_ids, len(made.class_names))
    made.scores = None
    made.class_names, made.text_weights = (
        [made.class_names[i] for i in left],
        made.text_weights[left],
    )
    made.follow()


def _append_classes(made: Index, classes: Mapping[str, Features | None]) -> None:
    names = inputs.names(list(classes))
    if again := sorted(set(names) & set(made.class_names)):
        raise InputError(f"classes: {again[0]!r} already exists in the index")
    vectors = [weights for weights in classes.values() if weights is not None]
    if len(vectors) < len(names) and made.has_text:
        raise InputError(
            f"classes: {names[0]!r} has no text weight; pass one, because the index has text"
        )
    rows = np.stack(vectors) if vectors else None
    weights = inputs.text_weights(rows, len(names), made.d)
    made.class_names = [*made.class_names, *names]
    made.text_weights = torch.cat([made.text_weights, weights.to(made.text_weights)])
    made.rows = made.rows.widened(len(made.class_names))
    made.scores = None
    made.follow()


def _add(made: Index, new: NewKeys) -> None:
    """Add keys to existing classes.

    If the values were solved, they are solved again. In a large index, only the values of the new keys are solved (see
    :class:`ridge.Ridge`). If the values were trained, the new keys get one-hot rows.
    """
    matrix = inputs.matrix(new.features, "keys")
    if matrix.shape[1] != made.d:
        raise InputError(
            f"keys: each key has {matrix.shape[1]} values; the index requires {made.d}"
        )
    if np.abs(matrix).max() > np.finfo(made.dtype).max:
        raise InputError(f"keys: values are too large for the index's {made.dtype}")
    ids = inputs.ids_of(new.labels, made.class_names, len(matrix))
    assert made.next_key_id is not None
    key_ids = np.arange(made.next_key_id, made.next_key_id + len(matrix))
    labels = label_table(
        made.class_names,
        ids,
        new.sources,
        key_ids=key_ids,
        views=new.views,
        digests=new.digests,
        extra=new.extra,
    )
    matrix = np.asarray(matrix).astype(made.dtype)
    rows = ArrayRows(matrix, labels, points=transformed(made.metric, matrix, made.device))
    _check_lengths(made, rows.vectors)
    _hold(made, made.rows.added(replace(rows, values=_values_of(made, rows))))
    made.next_key_id += len(matrix)
    if new.precision is not None:
        before = made.provenance.get("precision") or {}
        precisions = sorted({*(before.get("keys") or "").split(", "), new.precision} - {""})
        made.provenance = made.provenance | {"precision": before | {"keys": ", ".join(precisions)}}


def _check_lengths(made: Index, keys: npt.NDArray[Any]) -> None:
    """Raise InputError if the weight of one of these keys or points could overflow for a query of unit norm."""
    longest = float(np.sqrt(np.einsum("ij,ij->i", keys, keys, dtype=np.float64).max()))
    if made.settings.beta * (longest - 1) > MOST_EXPONENT:
        raise InputError(
            f"beta {made.settings.beta:g}: exp(beta (affinity - 1)) overflows for a key of norm {longest:.4g}; "
            "scale the keys to norm 1 (norms unit)"
        )


def _values_of(made: Index, new: ArrayRows) -> Tensor | None:
    if made.values is None:
        return None
    if made.ridge is None:
        return functional.one_hot(torch.from_numpy(new.class_ids), len(made.class_names)).to(
            made.values
        )
    assert isinstance(made.retrieval.keys, Keys)
    return made.ridge.added(made.retrieval.keys, new.vectors, new.class_ids)


def _move(made: Index, labels: Mapping[int, str]) -> None:
    """Move keys to other classes, where they become the last shots."""
    wanted = dict(
        zip(
            labels,
            inputs.ids_of(list(labels.values()), made.class_names, len(labels)).tolist(),
            strict=True,
        )
    )
    moved = made.rows.of(list(wanted))
    class_ids = np.array([wanted[key_id] for key_id in moved.key_ids.tolist()], dtype=np.int64)
    changed = np.flatnonzero(moved.class_ids != class_ids)
    moved = moved.take(changed)
    class_ids = class_ids[changed]
    rows = made.rows
    if not moved.n:
        return
    if made.ridge is not None:
        assert isinstance(rows, ArrayRows)
        assert isinstance(made.retrieval.keys, Keys)
        rows = made.ridge.relabelled(
            made.retrieval.keys, rows, rows.rows_of(moved.key_ids), class_ids
        )
        moved = rows.of(moved.key_ids.tolist())
    _hold(made, rows.moved(moved, class_ids, made.class_names))


def _remove(made: Index, key_ids: Sequence[int]) -> None:
    """Remove keys by id. Classes that become empty are kept."""
    gone = made.rows.of(key_ids)
    if gone.n == made.n:
        raise InputError("remove: an index needs at least one key; delete the index instead")
    _hold(made, made.rows.replaced(gone, None))


def _rename(made: Index, old: str, new: str) -> None:
    """Rename a class, or merge it into the class ``new``, which keeps its own text weight.

    After a merge, the ids of all classes after ``old`` decrease by one.
    """
    class_id, names = inputs.renamed(made.class_names, old, new)
    if len(names) == len(made.class_names):
        made.class_names, made.rows = names, made.rows.renamed(class_id, new)
        made.groups = None if made.groups is None else made.groups.renamed(old, new)
        made.follow()
        return
    if isinstance(made.rows, ArrayRows) and made.values is not None:
        # The columns can be added, because solved values are linear in their targets.
        place = made.class_names.index(new)
        counts = made.counts
        values = made.values.clone()
        with_keys = [column for column in (class_id, place) if counts[column]]
        values[:, place] = values[:, with_keys or [place]].sum(1)
        made.rows = replace(made.rows, values=values)
        made.follow()
    if key_ids := made.find([old])["key_id"].to_pylist():
        _move(made, dict.fromkeys(key_ids, new))
    drop_classes(made, np.array([class_id]))


def _set_text(made: Index, text: Mapping[str, FloatArray]) -> None:
    weights = made.text_weights.clone()
    for name, row in text.items():
        weights[made.class_names.index(name)] = torch.from_numpy(row).to(weights)
    made.text_weights = weights
    made.scores = None
    made.follow()


def _hold(made: Index, rows: Rows) -> None:
    """Replace the rows, solve the values again, and fill the FAISS index with the new keys."""
    if isinstance(rows, ArrayRows):
        rows = rows if made.ridge is None else made.ridge.solved(rows)
        rows = rows.refilled(made.rows.index, len(made.class_names), made.device)
    made.rows = rows
    made.scores = None
    made.follow()
