"""Keys of different classes that show the same image, or nearly the same: one of their labels is wrong, or both are.

Keys are read a block at a time, so that memory stays flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retrieval_tip.errors import InputError, one_line
from retrieval_tip.retrieval.keys import KEY_BLOCK, QUERY_BLOCK, own_affinity
from retrieval_tip.retrieval.logits import slices
from retrieval_tip.retrieval.segments import KeyArray, Keys, KeysInPlace, Segments
from retrieval_tip.retrieval.vector_index import faiss
from retrieval_tip.store.labels import digest_codes

NEAR = 0.98
"""Cosine from which two keys are near-identical. Of 2999 Caltech101 photographs in lit-mini, JPEG copies of quality 75
reach it always and of quality 90 in 99.7 %, enlarged ones in 94 %, cropped by 1 % in 27 %, reduced to three quarters in
19 %; distinct photographs of two classes reach 0.82 at most (of one class 0.995: frames of a cartoon). In CLIP's
features of nine foods, distinct ones reach 0.92 between classes, and 0.974 within one."""

PAIRS = 1 << 28
"""Pairs of keys that are compared for a warning by the way: 16,000 keys with each other, in 1 s on two cores."""

MOST = 1000
"""Pairs of duplicates that are described."""

BLOCK = 128
"""Keys that meet the others at a time: where 16,000 are all alike, their pairs take 300 MiB."""

NEIGHBOURS = 32
"""Keys that a search is asked for, for each fresh one."""

KINDS = ("identical image", "identical feature", "near-identical")

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Search = Callable[[Tensor, int], tuple[Tensor, Tensor | IntArray]]
Remain = Callable[[IntArray, IntArray], Bools]
Near = tuple[IntArray, IntArray, FloatArray]
"""Pairs, as two arrays of rows, and their cosines."""


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
class Duplicates:
    """Duplicates across classes, identical images first, then by affinity; and how they were looked for.

    ``pairs`` are the closest, ``total`` counts all that were found. ``compared`` is ``all`` (every pair of keys, and
    the total is exact), ``nearest`` (each fresh key with the nearest ones), or ``digests`` (identical images only and,
    where all keys were looked at, identical features).
    """

    pairs: list[Duplicate]
    total: int
    compared: str


def duplicates(
    keys: Keys,
    labels: pa.Table,
    fresh: Sequence[int] | IntArray | None = None,
    *,
    least: float = NEAR,
    budget: int = PAIRS,
    search: Search | None = None,
    most: int = MOST,
) -> Duplicates:
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
            ``[m, k]``, -1 for none: ``CacheModel.nearest`` of a cache that holds the fresh keys too.
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
    a, b, total = _equal(images, class_ids, new, most)

    def remain(x: IntArray, y: IntArray) -> Bools:
        """Which pairs are of different classes, and not of one image, which are counted already."""
        keep: Bools = (class_ids[x] != class_ids[y]) & ((images[x] != images[y]) | (images[x] < 0))
        return keep

    compared, more = "digests", (asked[:0], asked[:0], 0)
    if len(asked) * n <= budget:
        compared, more = "all", _closest(_near(keys, asked, new, least, remain), most)
    elif fresh is not None and search is not None:
        compared, more = "nearest", _closest([_nearest(keys, asked, search, least, remain)], most)
    elif fresh is None and not isinstance(keys, KeysInPlace):
        features = _identical(keys)
        x, y, every = _equal(features, class_ids, new, most + len(a))  # where more are of one image, a is full
        kept = remain(x, y)
        both = np.where((features < 0) | (images < 0), -1, features * (n + 1) + images)
        more = x[kept], y[kept], every - _equal(both, class_ids, new, 0)[2]
    kinds = np.repeat([0, 2], [len(a), len(more[0])])[:most]
    a, b = np.concatenate([a, more[0]])[:most], np.concatenate([b, more[1]])[:most]
    return Duplicates(_described(keys, labels, a, b, kinds), total + more[2], compared)


def describe_duplicates(duplicates: Duplicates, limit: int = 5) -> list[str]:
    """Lines for a warning: the first ``limit`` pairs, and how many more there are."""
    lines = [
        one_line(f"{pair.source} ({pair.label}) and {pair.other_source} ({pair.other_label}): {pair.kind}")
        + (f" (affinity {pair.affinity:.4f})" if pair.kind == KINDS[2] else "")
        for pair in duplicates.pairs[:limit]
    ]
    left = duplicates.total - len(lines)
    return [*lines, f"and {left} more"] if left > 0 else lines


def _equal(codes: IntArray, class_ids: IntArray, new: Bools, most: int) -> tuple[IntArray, IntArray, int]:
    """Pairs of rows of one code (but -1) and two classes, at least one of them new: ``most`` of them, and the count.

    Sorted by code and class, the partners of a row are a run: from the end of its class to the end of its code; where
    it is not new itself, the new ones of them. (A join in duckdb is no shorter, takes 0.1 s to begin, and seconds where
    one image stands in 100,000 rows.)
    """
    rows = np.flatnonzero((codes >= 0) & np.isin(codes, codes[new]))
    rows = rows[np.lexsort((class_ids[rows], codes[rows]))]
    code = np.unique(codes[rows], return_inverse=True)[1]
    both = code * (class_ids.max(initial=0) + 1) + class_ids[rows]
    first, last = (np.searchsorted(numbers, numbers, side="right") for numbers in (both, code))
    before = np.concatenate([[0], np.cumsum(new[rows])])  # new rows before each
    count = np.where(new[rows], last - first, before[last] - before[first])
    pairs: list[tuple[int, int]] = []
    for at in np.flatnonzero(count)[:most]:
        partners = rows[first[at] : last[at]]
        partners = partners if new[rows[at]] else partners[new[partners]]
        pairs += [(rows[at], partner) for partner in partners[: most - len(pairs)]]
    a, b = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return a, b, int(count.sum())


def _identical(keys: KeyArray | Segments) -> IntArray:
    """A number a key that agrees for keys of equal bytes, -1 where no other key has them.

    Sums of their words modulo 2^64 cost as little as reading the keys, but may agree by chance: such keys are hashed.
    """
    n, width = int(keys.shape[0]), math.gcd(8, int(keys.shape[1]) * keys.dtype.itemsize)
    words = (np.ascontiguousarray(keys[part]).view(f"u{width}") for part in slices(n, KEY_BLOCK))
    sums = np.concatenate([block.sum(axis=1, dtype=np.uint64) for block in words])
    _, codes, times = np.unique(sums, return_inverse=True, return_counts=True)
    rows, exact, numbers = np.flatnonzero(times[codes] > 1), np.full(n, -1), dict[bytes, int]()
    for part in slices(len(rows), KEY_BLOCK):
        for row, key in zip(rows[part].tolist(), keys[rows[part]], strict=True):
            exact[row] = numbers.setdefault(blake2b(key.tobytes(), digest_size=16).digest(), len(numbers))
    return exact


def _unit(keys: Keys, rows: IntArray) -> Tensor:
    """Some keys ``[m, d]`` float32, scaled to norm 1: fine-tuned ones are not."""
    return normalize(torch.from_numpy(np.asarray(keys[rows], dtype=np.float32)), dim=-1)


def _near(keys: Keys, asked: IntArray, new: Bools, least: float, remain: Remain) -> Iterator[Near]:
    """Pairs of a row that is asked for and any other of cosine above ``least``, of those that ``remain``, in blocks.

    The rows that are asked for come first, and each row meets those of them that come before it.
    """
    order = np.concatenate([asked, np.flatnonzero(~new)])
    index = faiss().IndexFlatIP(int(keys.shape[1]))
    for part in slices(len(order), BLOCK):
        block = _unit(keys, order[part]).numpy()
        index.add(block[: max(0, len(asked) - part.start)])
        limits, cosine, places = index.range_search(block, least)
        own = np.repeat(np.arange(part.start, part.stop), np.diff(limits.astype(np.int64)))
        x, y = order[places], order[own]
        kept = (places < own) & remain(x, y)
        yield x[kept], y[kept], cosine[kept]


def _nearest(keys: Keys, asked: IntArray, search: Search, least: float, remain: Remain) -> Near:
    """Pairs of a row that is asked for and one near it of cosine at least ``least``, of those that ``remain``."""
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
    every, first = np.unique(np.concatenate(pairs), axis=0, return_index=True)  # two fresh keys may find each other
    return every[:, 0], every[:, 1], np.concatenate(cosines)[first]


def _closest(blocks: Iterable[Near], most: int) -> tuple[IntArray, IntArray, int]:
    """The ``most`` pairs of the highest cosine, highest first, and how many there are."""
    total, a, b = 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    cosine = np.empty(0, dtype=np.float32)
    for x, y, near in blocks:
        total += len(x)
        a, b, cosine = np.concatenate([a, x]), np.concatenate([b, y]), np.concatenate([cosine, near])
        best = np.lexsort((b, a, -cosine))[:most]
        a, b, cosine = a[best], b[best], cosine[best]
    return a, b, total


def _described(keys: Keys, labels: pa.Table, a: IntArray, b: IntArray, kinds: IntArray) -> list[Duplicate]:
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
