"""Find exemplars, which are typical keys of a class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from retrieval_tip.model import Index

KEYS, COMPARED = 1 << 15, 1 << 11
"""Largest numbers of keys to search for exemplars, and to compare for mean affinities."""


@dataclass(frozen=True)
class TypicalKeys:
    """The ids of the exemplars, and the mean affinities within a class (``own``) and between classes (``other``).

    A mean is ``None`` if there are no such pairs of keys.
    """

    key_ids: list[int]
    own: float | None
    other: float | None


def exemplars(index: Index) -> TypicalKeys:
    """Return the key of each class that is nearest to the class mean in the metric of the index.

    Only the first :data:`KEYS` keys are considered.
    """
    blocks, most = [], KEYS
    for block in index.retrieval.keys.numbered_blocks():
        keys, ids, rows = (part[:most].cpu() for part in block)
        blocks.append((keys.float(), ids, rows))
        most -= len(blocks[-1][0])
        if not most:
            break
    keys, ids, rows = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    c = len(index.class_names)
    means = torch.zeros(c, keys.shape[1]).index_add_(0, ids, keys)
    near = (keys * means[ids]).sum(dim=1)
    order = np.lexsort((near.numpy(), ids.numpy()))  # sorted by class, with the nearest key last
    best = order[np.flatnonzero(np.diff(ids.numpy()[order], append=c))]
    shown = index.rows.described(rows.numpy()[best], ["key_id"])["key_id"].to_pylist()
    step = max(1, len(keys) // COMPARED)
    affinities, same = keys[::step] @ keys[::step].T, ids[::step, None] == ids[None, ::step]
    pairs = affinities[same & ~torch.eye(len(same), dtype=torch.bool)], affinities[~same]
    own, other = (float(part.mean()) if part.numel() else None for part in pairs)
    return TypicalKeys(shown, own, other)
