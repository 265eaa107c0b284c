"""Edits of an index as values. :meth:`model.Index.edited` applies them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.arrays import FloatArray
from retrieval_tip.store.labels import LabelChanges


@dataclass(frozen=True, eq=False)
class NewKeys:
    """Keys to add to the classes of their ``labels``.

    Attributes:
        features: the keys, of shape ``[m, d]``.
        labels: a class name or a class id for each key.
        sources: the path or id of each key.
        digests: the SHA-256 of each image, or ``None``.
        views: the number of views of each key, or of all keys.
        extra: further columns of the label store.
        precision: the precision in which photos were encoded.
    """

    features: Any
    labels: Any
    sources: Sequence[str] | pa.ChunkedArray | None = None
    digests: Sequence[str | None] | None = None
    views: int | npt.NDArray[np.integer] = 1
    extra: pa.Table | None = None
    precision: str | None = None


@dataclass(frozen=True, eq=False)
class Edits:
    """A change of the keys and classes of an index. Its parts are applied in the order of the attributes.

    Attributes:
        classes: new classes, with their text weights of shape ``[d]`` if the index has text.
        add: keys to add.
        move: the new class of keys, by key id. A key becomes the last shot of its new class.
        remove: the ids of keys to remove.
        rename: the old and the new name of a class. If the new name exists, the classes are merged.
        drop: classes that leave if they have no keys.
        text: new text weights of shape ``[d]``, by class.
        templates: the templates of these text weights, or ``None`` if they stay the same.
    """

    classes: Mapping[str, FloatArray | None] = field(default_factory=dict)
    add: NewKeys | None = None
    move: Mapping[int, str] = field(default_factory=dict)
    remove: Collection[int] = ()
    rename: tuple[str, str] | None = None
    drop: Collection[str] = ()
    text: Mapping[str, FloatArray] = field(default_factory=dict)
    templates: Sequence[str] | None = None

    def label_changes(self, now: Mapping[int, str], next_key_id: int) -> LabelChanges:
        """Return the labels of added, moved and removed keys before and after, by key id.

        ``now`` has the labels of the moved and removed keys, and ``next_key_id`` is the id of the first new key.
        """
        added = () if self.add is None else self.add.labels
        new = {next_key_id + place: (None, label) for place, label in enumerate(added)}
        moved = {key_id: (now[key_id], label) for key_id, label in self.move.items()}
        return {**new, **moved, **{key_id: (now[key_id], None) for key_id in self.remove}}
