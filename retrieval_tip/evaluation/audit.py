"""Which shots are suspicious: one image under two classes, and labels that the neighbours contradict.

Everything is done a block at a time, so that memory stays flat. The formula is :mod:`tip`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retrieval_tip import tip
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import InputError, UsageError, one_line
from retrieval_tip.retrieval.keys import KEY_BLOCK, QUERY_BLOCK, own_affinity
from retrieval_tip.retrieval.logits import slices
from retrieval_tip.store.labels import digest_codes, images_of

NEAR = 0.98
"""Cosine from which two keys are near-identical. Of 2999 Caltech101 photographs in lit-mini, JPEG copies of quality 75
reach it always and of quality 90 in 99.7 %, enlarged ones in 94 %, cropped by 1 % in 27 %, reduced to three quarters in
19 %; distinct photographs of two classes reach 0.82 at most (of one class 0.995: frames of a cartoon). In CLIP's
features of nine foods, distinct ones reach 0.92 between classes, and 0.974 within one."""

PAIRS = 1 << 28
"""Pairs of keys that are compared for a warning by the way: 16,000 keys with each other, in 1 s on two cores."""

MOST = 1000
"""Pairs of duplicates that are described."""

NEIGHBOURS = 32
"""Keys that a search is asked for, for each fresh one."""

ALL_PAIRS, MET = 1 << 33, 256
"""Affinities of an audit that meets all keys, at most (90,000 keys); the keys that it meets of more."""

VALUES = 1 << 23
"""Affinities of an audit at a time: 32 MiB of float32, and a few times that."""

LEAST = torch.finfo(torch.float32).tiny
"""A score that is lower, relative to the nearest key's weight, counts as this in a margin, which is 88 at most."""

KINDS = ("identical image", "identical feature", "near-identical")

IntArray = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Search = Callable[[Tensor, int], tuple[Any, Any]]


@dataclass(frozen=True)
class Duplicate:
    """Two keys of different classes that show the same: the one with the lower key id, and the ``other`` one.

    ``affinity`` is their cosine; ``kind`` is ``identical image`` (the content digests agree), ``identical feature``
    (each value does), or ``near-identical`` (the cosine is high).
    """

    key_id: int
    source: str
    label: str
    other_key_id: int
    other_source: str
    other_label: str
    affinity: float
    kind: str


@dataclass(frozen=True)
class Found:
    """Duplicates across classes, identical images first, then by affinity; and how they were looked for.

    ``pairs`` are the closest, ``total`` counts all that were found. ``compared`` is ``all`` (every pair of keys, and
    the total is exact), ``nearest`` (each fresh key with the nearest ones), or ``digests`` (identical images only and,
    where all keys were looked at, identical features).
    """

    pairs: list[Duplicate]
    total: int
    compared: str


def duplicates(
    keys: Any,
    labels: pa.Table,
    fresh: Sequence[int] | IntArray | None = None,
    *,
    least: float = NEAR,
    budget: int = PAIRS,
    search: Search | None = None,
    most: int = MOST,
) -> Found:
    """Pairs of keys of different classes that show the same; one image several times within a class is none.

    Two keys are duplicates where their content digests agree, or ``cos(K_i, K_j) = K_i K_j / (|K_i| |K_j|) >= least``.
    Digests are always compared. Cosines are, of every pair, while these are at most ``budget``; beyond it of each fresh
    key with its nearest, given a ``search``. Without one, features are compared bit by bit, and those of fresh keys are
    not: that would cost by what is there.

    Args:
        keys: ``[n, d]`` float32 or float16, an array or what slices and takes row numbers like one.
        labels: the label store, row by row: ``key_id``, ``class_id``, ``label``, ``source``, ``digest``.
        fresh: row numbers of the keys that were just added: only pairs with one of these count. ``None`` is all.
        least: cosine of near-identical keys.
        budget: pairs to compare at most, keys asked for times ``n``.
        search: from features ``[m, d]``, a float32 tensor on the CPU, and k, to affinities and rows of ``keys``
            ``[m, k]``, -1 for none: :meth:`CacheModel.nearest` of a cache that holds the fresh keys too.
        most: pairs to describe.

    Raises InputError where ``labels`` are not one a key, or ``fresh`` are no rows.
    """
    n = int(keys.shape[0])
    if len(labels) != n:
        raise InputError(f"labels: {len(labels)} rows for {n} keys")
    class_ids = labels["class_id"].to_numpy().astype(np.int64)
    asked = np.arange(n) if fresh is None else np.unique(np.asarray(fresh, dtype=np.int64))
    if asked.size and not 0 <= asked[0] <= asked[-1] < n:
        raise InputError(f"fresh: row {int(asked[0] if asked[0] < 0 else asked[-1])} is none of the {n} keys")
    new = np.zeros(n, dtype=bool)
    new[asked] = True
    images = digest_codes(labels, None if fresh is None else asked)
    a, b, total = _crossing(images, class_ids, new, most)

    def remain(x: IntArray, y: IntArray) -> Bools:
        """Which pairs are of different classes, and not of one image, which are counted already."""
        keep: Bools = (class_ids[x] != class_ids[y]) & ((images[x] != images[y]) | (images[x] < 0))
        return keep

    if len(asked) * n <= budget:
        compared, more = "all", _near(keys, asked, new, least, remain, most)
    elif fresh is not None and search is not None:
        compared, more = "nearest", _nearest(keys, asked, search, least, remain, most)
    elif fresh is not None:
        compared, more = "digests", (asked[:0], asked[:0], 0)
    else:
        features = _identical(keys, class_ids, new)
        x, y, every = _crossing(features, class_ids, new, most + len(a))  # where more are of one image, a is full
        kept = remain(x, y)
        both = np.where((features < 0) | (images < 0), -1, features * (n + 1) + images)
        compared, more = "digests", (x[kept], y[kept], every - _crossing(both, class_ids, new, 0)[2])
    kinds = np.repeat([0, 2], [len(a), len(more[0])])[:most]
    a, b = np.concatenate([a, more[0]])[:most], np.concatenate([b, more[1]])[:most]
    return Found(_described(keys, labels, a, b, kinds), total + more[2], compared)


def describe_duplicates(found: Found, limit: int = 5) -> list[str]:
    """Lines for a warning: the first ``limit`` pairs, and how many more there are."""
    lines = [
        one_line(f"{pair.source} ({pair.label}) and {pair.other_source} ({pair.other_label}): {pair.kind}")
        + (f" (affinity {pair.affinity:.4f})" if pair.kind == KINDS[2] else "")
        for pair in found.pairs[:limit]
    ]
    left = found.total - len(lines)
    return [*lines, f"and {left} more"] if left > 0 else lines


def audit(cache: CacheModel, *, k: int | Literal["all"] | None = None) -> pa.Table:
    """The shots whose label the other shots contradict, and those that are in another class too, worst first.

    Each key i is a query, and every key of the same image (:func:`images_of`), its own too, is hidden from it. Of the
    ``n_c`` keys of class c that are left, the score is the mean weight, so that no class gains by its number of shots::

        score(i, c) = 1 / n_c * sum over keys j of class c that are not hidden of exp(-beta (1 - K_i K_j))
        suggested   = argmax over c of score(i, c)             # its own label where that is as high
        margin      = log(score(i, suggested) / score(i, own label))

    at the cache's beta. Trained ``values`` are ignored: this is about whose neighbours the shots are. A class without a
    key that is not hidden has no score. A shot that is its class's only image cannot be judged: its suggestion, scores,
    margin and rank are null, and it is listed only as a duplicate.

    ``k = "all"`` meets all keys: exact, ``n^2`` affinities (16,000 keys of 512 take 3 s on two cores). With a number
    the sum is over so many nearest by the cache's index, and the others count 0. ``None`` is all up to
    :data:`ALL_PAIRS` affinities, else :data:`MET`.

    Returns a table with the columns key_id, source, label, suggested, own_score, suggested_score, margin, rank (of its
    own label, 1 is the highest score), nearest_key_id, nearest_source, nearest_label, nearest_affinity (of the nearest
    key that is not hidden) and duplicate_of: the key id of the closest key of another class that it met and that has
    the same digest or a cosine of at least :data:`NEAR`. Sorted by falling margin, then by key id. Raises UsageError
    where ``k`` is below 1.
    """
    if k is None and cache.n**2 > ALL_PAIRS:
        k = MET
    met = k if isinstance(k, int) else None
    if met is not None and met < 1:
        raise UsageError(f"k is {k}: expected a whole number of keys, at least 1, or all")
    n, c, device = cache.n, len(cache.class_names), cache.device
    images, digests = images_of(cache.labels), digest_codes(cache.labels)
    hidden = _Hidden(images, cache.class_ids.cpu().numpy(), c)
    image, digest = (torch.from_numpy(x).to(device) for x in (images, digests))
    norms = torch.cat([keys.norm(dim=1) for keys, _ in cache.key_blocks()]).clamp_min(LEAST)
    parts = []
    for part in slices(n, max(1, min(QUERY_BLOCK, VALUES // max(c, min(met or n, n))))):
        f = torch.from_numpy(np.asarray(cache.keys[part], dtype=np.float32)).to(device)
        own = cache.class_ids[part]
        if met is None:
            affinity, rows = _to_all(cache, f), torch.arange(n, device=device)
        else:
            affinity, found = cache.nearest(f, met)
            rows = torch.from_numpy(found).to(device)
        empty, rows = rows < 0, rows.clamp_min(0)
        ids = cache.class_ids[rows].masked_fill(empty, c)
        cosine = affinity / norms[part, None] / norms[rows]
        cosine.masked_fill_((digest[part, None] == digest[rows]) & (digest[part, None] >= 0), torch.inf)
        closest, twin = cosine.masked_fill_((ids == own[:, None]) | empty, -torch.inf).max(dim=1)
        unseen = (image[part, None] == image[rows]) | empty
        nearest, near = affinity.masked_fill(unseen, -torch.inf).max(dim=1)
        shift = nearest.clamp_min(torch.finfo(torch.float32).min)[:, None]  # the nearest counts 1, whatever beta
        weights = tip.weight(affinity.sub_(shift - 1), cache.settings.beta, out=affinity).masked_fill_(unseen, 0)
        left = torch.from_numpy(hidden.left(part)).to(device)
        scores = torch.where(left > 0, tip.sum_by_class(weights, ids, c) / left.clamp_min(1), -1)
        mine = scores.gather(1, own[:, None])
        best, suggested = scores.max(dim=1)
        suggested = torch.where(mine[:, 0] >= best, own, suggested)
        judged = mine[:, 0] >= 0
        suspicious = ((suggested != own) & judged) | (closest >= NEAR)
        scale = tip.weight(shift[:, 0], cache.settings.beta)
        columns = {
            "row": torch.arange(part.start, part.stop, device=device),
            "judged": judged,
            "suggested": suggested,
            "own_score": mine[:, 0] * scale,
            "suggested_score": best * scale,
            "margin": best.clamp_min(LEAST).log() - mine[:, 0].clamp_min(LEAST).log(),
            "rank": (scores > mine).sum(dim=1) + 1,
            "near": rows.expand(len(f), -1).gather(1, near[:, None])[:, 0].where(nearest > -torch.inf, -1),
            "nearest_affinity": nearest,
            "twin": rows.expand(len(f), -1).gather(1, twin[:, None])[:, 0].where(closest >= NEAR, -1),
        }
        parts.append({name: column[suspicious].cpu().numpy() for name, column in columns.items()})
    return _table(cache, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _to_all(cache: CacheModel, features: Tensor) -> Tensor:
    """Affinities ``[q, n]`` to every key, in memory by key: sums by class are then runs over the queries."""
    out = features.new_empty(cache.n, len(features))
    at = 0
    for keys, _ in cache.key_blocks():
        tip.affinity(keys, features, out=out[at : at + len(keys)])
        at += len(keys)
    return out.T


class _Hidden:
    """What is left of each class where the keys of one image are hidden."""

    def __init__(self, images: IntArray, class_ids: IntArray, n_classes: int) -> None:
        self._images, self._class_ids = images, class_ids
        self._counts = np.bincount(class_ids, minlength=n_classes).astype(np.float32)
        self._order = np.argsort(images, kind="stable")
        ordered = images[self._order]
        self._first, self._last = (np.searchsorted(ordered, images, side) for side in ("left", "right"))

    def left(self, part: slice) -> npt.NDArray[np.float32]:
        """Keys of each class that some queries, themselves keys, are left with: ``[q, c]``."""
        first, size = self._first[part], self._last[part] - self._first[part]
        query = np.repeat(np.arange(len(size)), size)
        within = np.arange(len(query)) - np.repeat(np.cumsum(size) - size, size)
        left = np.tile(self._counts, (len(size), 1))
        np.subtract.at(left, (query, self._class_ids[self._order[first[query] + within]]), 1)
        return left


def _table(cache: CacheModel, found: dict[str, npt.NDArray[Any]]) -> pa.Table:
    """Suspicious shots by row, described, most suspicious first; row -1 is none."""
    key_ids, names = cache.labels["key_id"].to_numpy(), pa.array(cache.class_names, pa.string())
    judged = found["judged"]
    order = np.lexsort((key_ids[found["row"]], -np.where(judged, found["margin"], 0)))
    found = {name: column[order] for name, column in found.items()}
    unjudged = ~found["judged"]

    def described(name: str, column: str) -> Any:
        rows = found[name]
        return cache.labels[column].take(pa.array(rows, pa.int64(), mask=rows < 0))

    def judgement(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array(found[name], kind, mask=unjudged)

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
            "nearest_affinity": pa.array(found["nearest_affinity"], pa.float32(), mask=found["near"] < 0),
            "duplicate_of": described("twin", "key_id"),
        }
    )


def _crossing(codes: IntArray, class_ids: IntArray, new: Bools, most: int) -> tuple[IntArray, IntArray, int]:
    """Pairs of rows of one code (but -1) and two classes, at least one of them new: ``most`` of them, and the count.

    Sorted by code and class, the partners of a row are a run: from the end of its class to the end of its code. Of
    those, a row that is not new pairs with the new ones.
    """
    rows = np.flatnonzero((codes >= 0) & np.isin(codes, codes[new]))
    if not len(rows):
        return rows, rows, 0
    rows = rows[np.lexsort((class_ids[rows], codes[rows]))]
    another = np.diff(codes[rows]) != 0
    last, first = _run_ends(another), _run_ends(another | (np.diff(class_ids[rows]) != 0))
    is_new = new[rows]
    news, before = np.flatnonzero(is_new), np.concatenate([[0], np.cumsum(is_new)])
    count = np.where(is_new, last - first, before[last] - before[first])
    ends = np.cumsum(count)
    total = int(count.sum())
    number = np.arange(min(total, most))
    at = np.searchsorted(ends, number, side="right")
    within = number - (ends[at] - count[at])
    among = news[np.minimum(before[first[at]] + within, len(news) - 1)]
    return rows[at], rows[np.where(is_new[at], first[at] + within, among)], total


def _run_ends(changes: Bools) -> IntArray:
    """For each of ``len(changes) + 1`` rows, where its run ends; between which rows a new one begins is given."""
    ends = np.append(np.flatnonzero(changes) + 1, len(changes) + 1)
    return np.repeat(ends, np.diff(ends, prepend=0))


def _identical(keys: Any, class_ids: IntArray, new: Bools) -> IntArray:
    """A number a key that agrees for keys of equal bytes; -1 where no key of another class, or no new one, has them.

    A sum of products modulo 2^64 costs as little as reading the keys, but may collide: what it finds is hashed well.
    """
    n, size = int(keys.shape[0]), int(keys.shape[1]) * keys.dtype.itemsize
    width = math.gcd(8, size)
    odd = np.random.default_rng(0).integers(0, 1 << 63, size // width, dtype=np.uint64) * 2 + 1
    sums = [
        np.einsum("nw,w->n", np.ascontiguousarray(keys[part]).view(f"u{width}"), odd) for part in slices(n, KEY_BLOCK)
    ]
    _, codes = np.unique(np.concatenate(sums), return_inverse=True)
    low, high = np.full(n, n + class_ids.max(initial=0)), np.full(n, -1)
    np.minimum.at(low, codes, class_ids)
    np.maximum.at(high, codes, class_ids)
    rows = np.flatnonzero(((low < high) & (np.bincount(codes[new], minlength=n) > 0))[codes])
    exact, numbers = np.full(n, -1), dict[bytes, int]()
    for part in slices(len(rows), KEY_BLOCK):
        for row, key in zip(rows[part].tolist(), keys[rows[part]], strict=True):
            exact[row] = numbers.setdefault(blake2b(key.tobytes(), digest_size=16).digest(), len(numbers))
    return exact


def _unit(keys: Any, rows: IntArray) -> Tensor:
    """Some keys ``[m, d]`` float32, scaled to norm 1: fine-tuned ones are not."""
    return normalize(torch.from_numpy(np.asarray(keys[rows], dtype=np.float32)), dim=-1)


def _near(
    keys: Any,
    asked: IntArray,
    new: Bools,
    least: float,
    remain: Callable[[IntArray, IntArray], Bools],
    most: int,
) -> tuple[IntArray, IntArray, int]:
    """The closest pairs of a row that is asked for and any row, of those that ``remain``; and how many there are."""
    n, total = len(new), 0
    queries = _unit(keys, asked)
    a, b, closest = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    for columns in slices(n, KEY_BLOCK):
        block = _unit(keys, np.arange(columns.start, columns.stop))
        for part in slices(len(asked), QUERY_BLOCK):
            if asked[part][0] >= columns.stop - 1 and new[columns].all():
                break  # those pairs come the other way round
            cosine = tip.affinity(queries[part], block)
            at, column = (cosine >= least).nonzero(as_tuple=True)
            x, y = asked[part][at.numpy()], column.numpy() + columns.start
            kept = ((x < y) | ~new[y]) & remain(x, y)
            total += int(kept.sum())
            a, b = np.concatenate([a, x[kept]]), np.concatenate([b, y[kept]])
            closest = np.concatenate([closest, cosine[at, column].numpy()[kept]])
            if len(a) > most:
                a, b, closest = _closest(a, b, closest, most)
    a, b, _ = _closest(a, b, closest, most)
    return a, b, total


def _closest(
    a: IntArray, b: IntArray, cosine: npt.NDArray[np.float32], most: int
) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
    """The ``most`` pairs of the highest cosine, highest first."""
    best = np.lexsort((b, a, -cosine))[:most]
    return a[best], b[best], cosine[best]


def _nearest(
    keys: Any, asked: IntArray, search: Search, least: float, remain: Callable[[IntArray, IntArray], Bools], most: int
) -> tuple[IntArray, IntArray, int]:
    """The closest pairs of a row that is asked for and one near it, of those that ``remain``; and how many."""
    pairs, cosines = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.float32)]
    for part in slices(len(asked), QUERY_BLOCK):
        features = torch.from_numpy(np.asarray(keys[asked[part]], dtype=np.float32))
        rows = torch.as_tensor(search(features, NEIGHBOURS)[1]).cpu()
        cosine = own_affinity(normalize(features), rows, lambda few: _unit(keys, few.numpy()))
        at, column = ((cosine >= least) & (rows >= 0)).nonzero(as_tuple=True)
        x, y = asked[part][at.numpy()], rows[at, column].numpy()
        kept = remain(x, y)
        pairs.append(np.sort(np.stack([x[kept], y[kept]], axis=1), axis=1))
        cosines.append(cosine[at, column].numpy()[kept])
    found, first = np.unique(np.concatenate(pairs), axis=0, return_index=True)  # two fresh keys may find each other
    a, b, _ = _closest(found[:, 0], found[:, 1], np.concatenate(cosines)[first], most)
    return a, b, len(found)


def _described(keys: Any, labels: pa.Table, a: IntArray, b: IntArray, kinds: IntArray) -> list[Duplicate]:
    """Pairs of rows, described; those of a high cosine are told apart from those of equal values."""
    cosine = torch.einsum("nd,nd->n", _unit(keys, a).double(), _unit(keys, b).double()).numpy()
    kinds = np.where((kinds == 2) & (np.asarray(keys[a]) == np.asarray(keys[b])).all(axis=1), 1, kinds)
    key_ids = labels["key_id"].to_numpy()
    swap = key_ids[a] > key_ids[b]
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    order = np.lexsort((key_ids[b], key_ids[a], -cosine, kinds))
    described = labels.select(["key_id", "source", "label"])
    one, other = (described.take(pa.array(rows[order])).to_pylist() for rows in (a, b))
    return [
        Duplicate(**x, **{f"other_{name}": value for name, value in y.items()}, affinity=value, kind=KINDS[kind])
        for x, y, value, kind in zip(one, other, cosine[order].tolist(), kinds[order].tolist(), strict=True)
    ]
