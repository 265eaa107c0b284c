"""Find shots whose label contradicts the other shots, and shots that also appear in another class.

Each key i is used as a query against the other keys, except for the keys of the same image (:func:`images_of`). The
score of class c is the mean weight of its ``n_c`` visible keys, so that the number of shots does not matter::

    score(i, c) = 1 / n_c * sum over visible keys j of class c of exp(-beta (1 - K_i K_j))
    suggested   = argmax over c of score(i, c)             # or the shot's own label (see audit)
    margin      = log(score(i, suggested) / score(i, own label))

Beta is always the untouched beta (:func:`defaults.untouched_settings`), because margins grow with beta and would
otherwise not be comparable between indexes. Trained ``values`` are ignored. A fitted index is audited with its raw keys
(:func:`closed_form.unfitted`), because its metric was fitted to each shot's label and would confirm a wrong label.

A class that has no visible keys has no score. A shot that is the only image of its class cannot be scored. It is listed
only if it is a duplicate, in which case its suggestion and margin are null.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.fit.closed_form import unfitted
from retrieval_tip.fit.visible import Queries, Visible
from retrieval_tip.model import Index
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.retrieval.duplicates import NEAR
from retrieval_tip.store.labels import digest_codes, images_of

ALL_PAIRS, MET = 1 << 33, 256
"""Maximum number of affinities in an exact audit (90,000 keys), and number of nearest keys beyond this limit."""
AUDITED = 1 << 15
"""Maximum number of keys that the page and a report audit."""
LEAST = torch.finfo(torch.float32).tiny
"""Smallest score in a margin, relative to the weight of the nearest key. It limits margins to 88."""
CLEAR = 1.0
"""Margin above which a label looks wrong, because another class fits more than e times as well."""


def audit(index: Index, *, borderline: bool = False) -> pa.Table:
    """List shots that look mislabelled, and duplicates of shots in another class.

    A shot looks mislabelled if another class fits clearly better (:data:`CLEAR`). If ``borderline`` is set, shots that
    another class fits only slightly better are listed as well. For a shot that is only listed as a duplicate,
    ``suggested`` is its own label.

    This computes ``n^2`` affinities (3 s for 16,000 keys of 512 values on two cores). Beyond :data:`ALL_PAIRS`, the
    sums are limited to the :data:`MET` nearest keys.

    Returns a table, sorted by descending margin and then by key id, with these columns:

    - ``key_id``, ``source``, ``label``: the shot
    - ``suggested``, ``margin``: the suggested label, and how much better it fits
    - ``nearest_key_id``, ``nearest_source``, ``nearest_label``, ``nearest_affinity``: the nearest visible key
    - ``duplicate_of``: the closest retrieved key of another class that is a duplicate (see :data:`duplicates.NEAR`)
    """
    index = unfitted(index)
    parts = []
    near = MET if index.n**2 > ALL_PAIRS else None
    class_ids = index.class_ids.cpu().numpy()
    _, beta = untouched_settings(index.keys, class_ids)
    digests = torch.from_numpy(digest_codes(index.labels)).to(index.device)
    norms = torch.cat([keys.norm(dim=1) for keys, *_ in index.retrieval.keys.blocks()])
    norms = norms.clamp_min(LEAST)
    shots = Queries(np.asarray(index.vectors), class_ids, "its own shots", images_of(index.labels))
    for block, visible in shots.blocks(index, near):
        labels = index.class_ids[block]
        facts = {"row": torch.arange(block.start, block.stop, device=index.device)}
        facts |= _neighbours(visible, block, labels, norms, digests)
        facts |= _scores(visible, labels, facts["nearest_affinity"], beta, borderline=borderline)
        suspicious = ((facts["suggested"] != labels) & facts["judged"]) | (facts["twin"] >= 0)
        parts.append({name: column[suspicious].cpu().numpy() for name, column in facts.items()})
    columns = {name: np.concatenate([facts[name] for facts in parts]) for name in parts[0]}
    return _table(index, columns)


def _neighbours(
    visible: Visible, block: slice, labels: Tensor, norms: Tensor, digests: Tensor
) -> dict[str, Tensor]:
    """Return the nearest visible key of each shot, and its closest duplicate in another class, or row -1."""
    affinity = visible.affinity
    rows = visible.rows.clamp_min(0)
    unseen = -torch.inf
    cosine = affinity / norms[block, None] / norms[rows]
    digest = digests[block, None]
    same_image = (digest == digests[rows]) & (digest >= 0)
    cosine.masked_fill_(same_image, torch.inf)
    no_duplicate = (visible.ids == labels[:, None]) | (visible.rows < 0)
    closest, twin_at = cosine.masked_fill_(no_duplicate, unseen).max(dim=1)
    nearest, near_at = affinity.masked_fill(visible.unseen, unseen).max(dim=1)
    rows = rows.expand(len(labels), -1)
    near = rows.gather(1, near_at[:, None])[:, 0].where(nearest > unseen, -1)
    twin = rows.gather(1, twin_at[:, None])[:, 0].where(closest >= NEAR, -1)
    return {"near": near, "nearest_affinity": nearest, "twin": twin}


def _scores(
    visible: Visible, labels: Tensor, nearest: Tensor, beta: float, *, borderline: bool
) -> dict[str, Tensor]:
    """Return which shots can be scored, the label that fits each shot best, and how much better it fits."""
    lowest = torch.finfo(torch.float32).min
    shift = nearest.clamp_min(lowest)  # the nearest key has weight 1 at any beta
    weights = visible.affinity - (shift[:, None] - 1)
    weights = tip.weight(weights, beta, out=weights).masked_fill_(visible.unseen, 0)
    sums = tip.sum_by_class(weights, visible.ids, visible.counts.shape[1])
    scores = torch.where(visible.counts > 0, sums / visible.counts.clamp_min(1), -1)
    mine = scores.gather(1, labels[:, None])[:, 0]
    best, suggested = scores.max(dim=1)
    margin = best.clamp_min(LEAST).log() - mine.clamp_min(LEAST).log()
    stays = (mine >= best) if borderline else (margin <= CLEAR)
    return {
        "judged": mine >= 0,
        "suggested": labels.where(stays, suggested),
        "margin": margin.masked_fill(stays, 0),
    }


def _table(index: Index, shots: dict[str, npt.NDArray[Any]]) -> pa.Table:
    """Return the table of suspicious shots, sorted by descending margin. Row -1 means that there is no such key."""
    key_ids = index.labels["key_id"].to_numpy()
    names = pa.array(index.class_names, pa.string())
    order = np.lexsort((key_ids[shots["row"]], -np.where(shots["judged"], shots["margin"], 0)))
    shots = {name: column[order] for name, column in shots.items()}

    def described(name: str, column: str) -> pa.ChunkedArray:
        return index.labels[column].take(pa.array(shots[name], pa.int64(), mask=shots[name] < 0))

    def judgement(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array(shots[name], kind, mask=~shots["judged"])

    shot = {name: described("row", name) for name in ("key_id", "source", "label")}
    suggested = {
        "suggested": names.take(judgement("suggested", pa.int64())),
        "margin": judgement("margin", pa.float32()),
    }
    nearest = {f"nearest_{name}": described("near", name) for name in ("key_id", "source", "label")}
    affinity = pa.array(shots["nearest_affinity"], pa.float32(), mask=shots["near"] < 0)
    others = {"nearest_affinity": affinity, "duplicate_of": described("twin", "key_id")}
    return pa.table(shot | suggested | nearest | others)
