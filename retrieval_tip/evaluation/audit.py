"""Suspicious shots: those whose label the other shots contradict, and those that are in another class too.

Each key i is a query, and every key of the same image (:func:`images_of`), its own too, is hidden from it. Of the
``n_c`` keys of class c that are left, the score is the mean weight, so that no class gains by its number of shots::

    score(i, c) = 1 / n_c * sum over keys j of class c that are not hidden of exp(-beta (1 - K_i K_j))
    suggested   = argmax over c of score(i, c)             # or its own label (see audit)
    margin      = log(score(i, suggested) / score(i, own label))

at the beta that these keys have untouched (:func:`defaults.untouched_settings`), whatever the index's own: margins
grow with beta, and would mean something else in each index. Trained ``values`` are ignored: this is about whose
neighbours the shots are. A fitted index is judged by its raw keys (:func:`closed_form.unfitted`): its metric knows
each shot's own label, and would agree with a wrong one. A class without a key that is not hidden has no score. A
shot that is its class's only image cannot be judged: its suggestion, scores, margin and rank are null, and it is
listed only as a duplicate.

Everything is done a block at a time, so that memory stays flat. The formula is :mod:`tip`'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import UsageError
from retrieval_tip.fit.closed_form import unfitted
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.retrieval.duplicates import NEAR
from retrieval_tip.retrieval.keys import QUERY_BLOCK
from retrieval_tip.retrieval.logits import slices
from retrieval_tip.settings import KeysMet
from retrieval_tip.store.labels import digest_codes, images_of

ALL_PAIRS, MET = 1 << 33, 256
"""Affinities of an audit that meets all keys, at most (90,000 keys); the keys that it meets of more."""

VALUES = 1 << 23
"""Affinities of an audit at a time: 32 MiB of float32, and a few times that."""

LEAST = torch.finfo(torch.float32).tiny
"""A score that is lower, relative to the nearest key's weight, counts as this in a margin, which is 88 at most."""


CLEAR = 1.0
"""Margin above which a suggestion is clear: another class fits more than e times as well as the label."""


def audit(cache: CacheModel, *, k: KeysMet = None, borderline: bool = False) -> pa.Table:
    """List the shots that look mislabelled, and those that are in another class too, most suspicious first.

    A shot looks mislabelled if another class fits clearly better (:data:`CLEAR`), or better at all with ``borderline``.
    Any other shot that is listed is suggested its own label.

    ``k = "all"`` meets all keys: exact, ``n^2`` affinities (16,000 keys of 512 take 3 s on two cores). With a number
    the sum is over so many nearest by the cache's index, and the others count 0. ``None`` is all up to
    :data:`ALL_PAIRS` affinities, else :data:`MET`.

    Returns a table with the columns key_id, source, label, suggested, own_score, suggested_score, margin, rank (of its
    own label, 1 is the highest score), nearest_key_id, nearest_source, nearest_label, nearest_affinity (of the nearest
    key that is not hidden) and duplicate_of: the key id of the closest key of another class that it met and that has
    the same digest or a cosine of at least :data:`duplicates.NEAR`. Sorted by falling margin, then by key id. Raises
    UsageError where ``k`` is below 1.
    """
    cache = unfitted(cache)
    n, c, device, met = cache.n, len(cache.class_names), cache.device, _keys_met(cache.n, k)
    images, digests = images_of(cache.labels), digest_codes(cache.labels)
    members = np.split(np.argsort(images, kind="stable"), np.cumsum(np.bincount(images))[:-1])  # of each image
    class_ids, counts = cache.class_ids.cpu().numpy(), np.array(cache.counts, dtype=np.float32)
    _, beta = untouched_settings(cache.keys, class_ids)
    image, digest = (torch.from_numpy(x).to(device) for x in (images, digests))
    norms = torch.cat([keys.norm(dim=1) for keys, _ in cache.key_blocks()]).clamp_min(LEAST)
    parts = []
    for part in slices(n, max(1, min(QUERY_BLOCK, VALUES // max(c, min(met or n, n))))):
        f = torch.from_numpy(np.asarray(cache.met[part], dtype=np.float32)).to(device)
        own = cache.class_ids[part]
        affinity, rows = _met(cache, f, met)
        empty, rows = rows < 0, rows.clamp_min(0)
        ids = cache.class_ids[rows].masked_fill(empty, c)
        cosine = affinity / norms[part, None] / norms[rows]
        cosine.masked_fill_((digest[part, None] == digest[rows]) & (digest[part, None] >= 0), torch.inf)
        closest, twin = cosine.masked_fill_((ids == own[:, None]) | empty, -torch.inf).max(dim=1)
        unseen = (image[part, None] == image[rows]) | empty
        nearest, near = affinity.masked_fill(unseen, -torch.inf).max(dim=1)
        shift = nearest.clamp_min(torch.finfo(torch.float32).min)[:, None]  # the nearest counts 1, whatever beta
        weights = tip.weight(affinity.sub_(shift - 1), beta, out=affinity).masked_fill_(unseen, 0)
        hidden = [np.bincount(class_ids[members[i]], minlength=c) for i in images[part]]
        left = torch.from_numpy(counts - np.array(hidden, dtype=np.float32)).to(device)
        scores = torch.where(left > 0, tip.sum_by_class(weights, ids, c) / left.clamp_min(1), -1)
        mine = scores.gather(1, own[:, None])
        best, suggested = scores.max(dim=1)
        margin = best.clamp_min(LEAST).log() - mine[:, 0].clamp_min(LEAST).log()
        stays = (mine[:, 0] >= best) if borderline else (margin <= CLEAR)
        suggested, best, margin = (
            own.where(stays, suggested),
            mine[:, 0].where(stays, best),
            margin.masked_fill(stays, 0),
        )
        judged = mine[:, 0] >= 0
        suspicious = ((suggested != own) & judged) | (closest >= NEAR)
        scale = tip.weight(shift[:, 0], beta)
        columns = {
            "row": torch.arange(part.start, part.stop, device=device),
            "judged": judged,
            "suggested": suggested,
            "own_score": mine[:, 0] * scale,
            "suggested_score": best * scale,
            "margin": margin,
            "rank": (scores > mine).sum(dim=1) + 1,
            "near": rows.expand(len(f), -1).gather(1, near[:, None])[:, 0].where(nearest > -torch.inf, -1),
            "nearest_affinity": nearest,
            "twin": rows.expand(len(f), -1).gather(1, twin[:, None])[:, 0].where(closest >= NEAR, -1),
        }
        parts.append({name: column[suspicious].cpu().numpy() for name, column in columns.items()})
    return _table(cache, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _keys_met(n: int, k: KeysMet) -> int | None:
    """How many keys each of ``n`` meets, ``None`` for all. Raises UsageError where ``k`` is below 1."""
    if k is None:
        return MET if n**2 > ALL_PAIRS else None
    if k != "all" and k < 1:
        raise UsageError(f"k is {k}: expected a whole number of keys, at least 1, or all")
    return None if k == "all" else k


def _met(cache: CacheModel, features: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Affinities to the ``k`` nearest keys ``[q, k]``, and their rows; of all keys, the rows are ``[n]``.

    Those to all keys lie in memory by key: sums by class are then runs over the queries.
    """
    if k is not None:
        near = cache.retrieval.nearest(features, k)
        return near.affinity, near.rows
    out = features.new_empty(cache.n, len(features))
    at = 0
    for keys, _ in cache.key_blocks():
        tip.affinity(keys, features, out=out[at : at + len(keys)])
        at += len(keys)
    return out.T, torch.arange(cache.n, device=cache.device)


def _table(cache: CacheModel, shots: dict[str, npt.NDArray[Any]]) -> pa.Table:
    """Suspicious shots by row, described, most suspicious first; row -1 is none."""
    key_ids, names = cache.labels["key_id"].to_numpy(), pa.array(cache.class_names, pa.string())
    judged = shots["judged"]
    order = np.lexsort((key_ids[shots["row"]], -np.where(judged, shots["margin"], 0)))
    shots = {name: column[order] for name, column in shots.items()}
    unjudged = ~shots["judged"]

    def described(name: str, column: str) -> pa.ChunkedArray:
        rows = shots[name]
        return cache.labels[column].take(pa.array(rows, pa.int64(), mask=rows < 0))

    def judgement(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array(shots[name], kind, mask=unjudged)

    return pa.table(
        {
            "key_id": described("row", "key_id"),
            "source": described("row", "source"),
            "label": described("row", "label"),
            "suggested": names.take(judgement("suggested", pa.int64())),
            "own_score": judgement("own_score", pa.float32()),
            "suggested_score": judgement("suggested_score", pa.float32()),
            "margin": judgement("margin", pa.float32()),
            "rank": judgement("rank", pa.int64()),
            "nearest_key_id": described("near", "key_id"),
            "nearest_source": described("near", "source"),
            "nearest_label": described("near", "label"),
            "nearest_affinity": pa.array(shots["nearest_affinity"], pa.float32(), mask=shots["near"] < 0),
            "duplicate_of": described("twin", "key_id"),
        }
    )
