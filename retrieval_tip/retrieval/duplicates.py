"""Find images that occur in two classes, which means that at least one of the labels is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retrieval_tip.arrays import BoolArray, FloatArray, IntArray, KeyArray, slices
from retrieval_tip.retrieval.keys import KEY_BLOCK
from retrieval_tip.store.labels import digest_codes
from retrieval_tip.wording import SHOWN, one_line

NEAR = 0.98
"""Lowest cosine at which two keys count as near-identical.

On 2999 Caltech101 images with lit-mini, this threshold finds 100 % of the copies saved at JPEG quality 75, 27 % of the
copies cropped by 1 %, and 19 % of the copies scaled to 75 %. Different images from two classes had a cosine of at most
0.82, or 0.92 with CLIP on nine foods.
"""

PAIRS = 1 << 28
"""Default maximum number of pairs to compare. Comparing all pairs of 16,000 keys takes 1 s on two cores."""

MOST = 1000
"""Default maximum number of pairs to return."""

BLOCK, MOST_ROWS = 1 << 21, 4096
"""Maximum number of pairs and of keys per block when all pairs are compared.

If all keys are alike, a block takes 300 MiB.
"""

TINY = 1e-12
"""Smaller norms are replaced by this one before a key is divided by its norm."""
KINDS = ("identical image", "identical feature", "near-identical")

Remain = Callable[[IntArray, IntArray], BoolArray]
Near = tuple[IntArray, IntArray, FloatArray]
"""Pairs of keys as two arrays of row numbers, and an array of their cosines."""


@dataclass(frozen=True)
class Duplicate:
    """Two keys that belong to different classes and show the same image. The ``other`` key has the higher key id.

    ``affinity`` is the cosine of the keys. ``kind`` is ``identical image`` if their content digests are equal,
    ``identical feature`` if their values are equal, and ``near-identical`` if their cosine is high.
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
    """Duplicates between classes.

    Attributes:
        pairs: the closest pairs. Identical images come first, followed by the other pairs in order of their affinity.
        total: the number of pairs that were found.
        compared: the method that was used. ``all`` compares every pair of keys. ``digests`` only finds identical
            images, and also identical features if ``fresh`` was ``None``.
    """

    pairs: list[Duplicate]
    total: int
    compared: str


def duplicates(
    keys: KeyArray,
    labels: pa.Table,
    fresh: Sequence[int] | IntArray | None = None,
    *,
    budget: int = PAIRS,
    most: int = MOST,
) -> Duplicates:
    """Find keys of different classes that show the same image. Duplicates within a class are ignored.

    Two keys are duplicates if their content digests are equal, or if ``cos(K_i, K_j) = K_i K_j / (|K_i| |K_j|)`` is at
    least :data:`NEAR`. All cosines are compared if there are at most ``budget`` pairs. Otherwise, features are only
    checked for equality, and only if ``fresh`` is ``None``.

    Args:
        keys: the keys, as a float32 or float16 array of shape ``[n, d]``.
        labels: the label store, which has one row per key and the columns ``key_id``, ``class_id``, ``label``,
            ``source`` and ``digest``.
        fresh: the rows of newly added keys. At least one key of each pair must be among them. Defaults to all keys.
        budget: the maximum number of pairs to compare, ``len(fresh) * n``.
        most: the maximum number of pairs to return.
    """
    n = int(keys.shape[0])
    class_ids = labels["class_id"].to_numpy().astype(np.int64)
    asked = np.arange(n) if fresh is None else np.unique(np.asarray(fresh, dtype=np.int64))
    new = np.zeros(n, dtype=bool)
    new[asked] = True
    images = digest_codes(labels, None if fresh is None else asked)
    a, b, total = _pairs_of_equal(images, class_ids, new, most)

    def remain(x: IntArray, y: IntArray) -> BoolArray:
        """Return which pairs have different classes, excluding identical images, which are already counted."""
        keep: BoolArray = (class_ids[x] != class_ids[y]) & (
            (images[x] != images[y]) | (images[x] < 0)
        )
        return keep

    compared = "digests"
    near_a = near_b = asked[:0]
    further = 0
    if len(asked) * n <= budget:
        compared = "all"
        near_a, near_b, further = _closest(_near(keys, asked, new, remain), most)
    elif fresh is None:
        features = _codes_of_equal(keys)
        near_a, near_b, further = _pairs_of_equal(features, class_ids, new, most + len(a))
        kept = remain(near_a, near_b)  # this drops identical images
        near_a = near_a[kept]
        near_b = near_b[kept]
        both = np.where((features < 0) | (images < 0), -1, features * (n + 1) + images)
        further -= _pairs_of_equal(both, class_ids, new, 0)[2]
    kinds = np.repeat([0, 2], [len(a), len(near_a)])[:most]
    a = np.concatenate([a, near_a])[:most]
    b = np.concatenate([b, near_b])[:most]
    return Duplicates(_describe(keys, labels, a, b, kinds), total + further, compared)


def describe_duplicates(duplicates: Duplicates) -> list[str]:
    """Format a warning that lists the first pairs and counts the others."""
    lines = []
    for pair in duplicates.pairs[:SHOWN]:
        shown = f"{pair.source} ({pair.label}) and {pair.other_source} ({pair.other_label})"
        line = one_line(f"{shown}: {pair.kind}")
        if pair.kind == KINDS[2]:
            line += f" (affinity {pair.affinity:.4f})"
        lines.append(line)
    left = duplicates.total - len(lines)
    return [*lines, f"and {left} more"] if left > 0 else lines


def _pairs_of_equal(
    codes: IntArray, class_ids: IntArray, new: BoolArray, most: int
) -> tuple[IntArray, IntArray, int]:
    """Return up to ``most`` pairs of rows with equal codes and different classes, and the total number of pairs.

    Rows with code -1 are ignored, and at least one row of each pair is new. A join in duckdb would take 0.1 s to start,
    and several seconds if one image occurs in 100,000 rows.
    """
    rows = np.flatnonzero((codes >= 0) & np.isin(codes, codes[new]))
    rows = rows[np.lexsort((class_ids[rows], codes[rows]))]
    code = np.unique(codes[rows], return_inverse=True)[1]
    both = code * (class_ids.max(initial=0) + 1) + class_ids[rows]
    first, last = (np.searchsorted(numbers, numbers, side="right") for numbers in (both, code))
    before = np.concatenate([[0], np.cumsum(new[rows])])  # the number of new rows before each row
    count = np.where(new[rows], last - first, before[last] - before[first])
    pairs: list[tuple[int, int]] = []
    for at in np.flatnonzero(count)[:most]:
        partners = rows[first[at] : last[at]]
        partners = partners if new[rows[at]] else partners[new[partners]]
        pairs += [(rows[at], partner) for partner in partners[: most - len(pairs)]]
    a, b = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return a, b, int(count.sum())


def _codes_of_equal(keys: KeyArray) -> IntArray:
    """Return a code for each key, which only identical keys share. Unique keys have the code -1."""
    n = int(keys.shape[0])
    width = math.gcd(8, int(keys.shape[1]) * keys.dtype.itemsize)
    integers = (
        np.ascontiguousarray(keys[block]).view(f"u{width}") for block in slices(n, KEY_BLOCK)
    )
    sums = np.concatenate([block.sum(axis=1, dtype=np.uint64) for block in integers])
    _, codes, times = np.unique(sums, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(times[codes] > 1)  # equal sums are rare, so few keys are hashed
    exact = np.full(n, -1)
    numbers = dict[bytes, int]()
    for block in slices(len(rows), KEY_BLOCK):
        for row, key in zip(rows[block].tolist(), keys[rows[block]], strict=True):
            digest = blake2b(key.tobytes(), digest_size=16).digest()
            exact[row] = numbers.setdefault(digest, len(numbers))
    return exact


def _unit(keys: KeyArray, rows: IntArray) -> Tensor:
    """Return the keys at ``rows`` as float32, scaled to norm 1."""
    return normalize(torch.from_numpy(np.asarray(keys[rows], dtype=np.float32)), dim=-1)


def _near(keys: KeyArray, asked: IntArray, new: BoolArray, remain: Remain) -> Iterator[Near]:
    """Compare ``asked`` rows with all rows, and yield blocks of near-identical pairs."""
    fresh = _unit(keys, asked).T
    n = int(keys.shape[0])
    number = np.where(new, np.cumsum(new) - 1, len(asked))  # the place of each row in ``asked``
    size = max(1, min(MOST_ROWS, BLOCK // max(1, len(asked))))
    for block in slices(n, size):
        others = torch.from_numpy(np.require(keys[block], np.float32, ["W"]))
        cosine = (others @ fresh).div_(others.norm(dim=1, keepdim=True).clamp_min_(TINY))
        rows, places = (cosine >= NEAR).nonzero(as_tuple=True)
        near = cosine[rows, places].numpy()
        x = places.numpy()
        y = rows.numpy() + block.start
        kept = (x < number[y]) & remain(asked[x], y)  # so that two asked rows are one pair
        yield asked[x[kept]], y[kept], near[kept]


def _closest(blocks: Iterable[Near], most: int) -> tuple[IntArray, IntArray, int]:
    """Return the ``most`` pairs with the highest cosines, and the total number of pairs."""
    total = 0
    a = np.empty(0, dtype=np.int64)
    b = np.empty(0, dtype=np.int64)
    cosine = np.empty(0, dtype=np.float32)
    for x, y, near in blocks:
        total += len(x)
        kept = near >= (cosine[-1] if 0 < len(cosine) == most else NEAR)
        a = np.concatenate([a, x[kept]])
        b = np.concatenate([b, y[kept]])
        cosine = np.concatenate([cosine, near[kept]])
        best = np.lexsort((b, a, -cosine))[:most]
        a = a[best]
        b = b[best]
        cosine = cosine[best]
    return a, b, total


def _describe(
    keys: KeyArray, labels: pa.Table, a: IntArray, b: IntArray, kinds: IntArray
) -> list[Duplicate]:
    cosine = torch.einsum("nd,nd->n", _unit(keys, a).double(), _unit(keys, b).double()).numpy()
    equal = (np.asarray(keys[a]) == np.asarray(keys[b])).all(axis=1)
    kinds = np.where((kinds == 2) & equal, 1, kinds)
    key_ids = labels["key_id"].to_numpy()
    swap = key_ids[a] > key_ids[b]
    first = np.where(swap, b, a)
    second = np.where(swap, a, b)
    order = np.lexsort((key_ids[second], key_ids[first], -cosine, kinds))
    described = labels.select(["key_id", "source", "label"])
    others = described.rename_columns([f"other_{name}" for name in described.column_names])
    rows = described.take(pa.array(first[order])).to_pylist()
    other_rows = others.take(pa.array(second[order])).to_pylist()
    figures = zip(cosine[order].tolist(), kinds[order].tolist(), strict=True)
    return [
        Duplicate(**row, **other, affinity=affinity, kind=KINDS[kind])
        for row, other, (affinity, kind) in zip(rows, other_rows, figures, strict=True)
    ]
