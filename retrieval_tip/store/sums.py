"""Sums that a metric is fitted from, updated in proportion to the keys that a change adds or removes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 2048
"""Keys converted to float64 at a time."""

TOLERANCE, LEAST = 1e-9, 1e-8
"""Tolerances of :class:`Along`, relative to the largest possible sum (above rounding error, below the effect of one key
in 10^8), and to a single key, for sums from which many keys were removed."""

LEFT = 1e-5
"""Minimum share of the squares left after a removal; below it, rounding errors of the removed keys matter."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Blocks = Iterable[tuple[npt.NDArray[np.floating], IntArray]]


@dataclass(frozen=True, eq=False)
class Sums:
    """Number and sum of the keys ``k_i`` ``[d]`` per class ``y_i``, and the sum of all their outer products.

    ``counts[j] = |{i: y_i = j}|`` ``[c]`` int64, ``sums[j] = sum_{y_i = j} k_i`` ``[c, d]`` and
    ``second = sum_i k_i k_i^T`` ``[d, d]``, float64. Products of two float32 values are exact in float64, so a removal
    undoes an addition up to an error in the last digits. A change returns a new value.
    """

    counts: IntArray
    sums: FloatArray
    second: FloatArray

    @classmethod
    def of(cls, blocks: Blocks, c: int, d: int) -> Sums:
        """Sum blocks of keys ``[b, d]`` float32 or float16 and class ids ``[b]``, each read once."""
        made = cls(np.zeros(c, np.int64), np.zeros((c, d)), np.zeros((d, d)))
        for keys, ids in blocks:
            made.count(keys, ids)
        return made

    def count(self, keys: npt.NDArray[np.floating], ids: IntArray, sign: int = 1) -> None:
        """Add keys ``[b, d]`` of class ids ``[b]`` in place, or remove them (``sign`` -1).

        Only for a value that is not shared yet. In place, because with many classes a copy is large.
        """
        for start in range(0, len(keys), BLOCK):
            own, wide = ids[start : start + BLOCK], np.array(keys[start : start + BLOCK], np.float64)
            if (own[1:] < own[:-1]).any():
                order = np.argsort(own, kind="stable")
                own, wide = own[order], wide[order]
            classes, first = np.unique(own, return_index=True)
            self.counts[classes] += sign * np.diff(first, append=len(own))
            self.sums[classes] += sign * np.add.reduceat(wide, first)
            self.second[:] += sign * (wide.T @ wide)

    @property
    def n(self) -> int:
        """Number of keys."""
        return int(self.counts.sum())

    def __sub__(self, less: Sums) -> Sums:
        counts, sums = self.counts - less.counts, self.sums - less.sums
        sums[counts == 0] = 0  # clears rounding errors
        return Sums(counts, sums, self.second - less.second)

    @property
    def nbytes(self) -> int:
        """Size of :meth:`to_array` in bytes."""
        c, d = len(self.counts), len(self.second)
        return 8 * (c + d) * (1 + d)

    def added(self, keys: npt.NDArray[np.floating], ids: IntArray, sign: int = 1) -> Sums:
        """Add keys ``[m, d]`` of class ids ``[m]``, or remove them (``sign`` -1)."""
        other = Sums(np.array(self.counts), np.array(self.sums), np.array(self.second))
        other.count(keys, ids, sign)
        other.sums[other.counts == 0] = 0  # clears rounding errors
        return other

    def removed(self, keys: npt.NDArray[np.floating], ids: IntArray) -> Sums:
        """Remove keys ``[m, d]`` of class ids ``[m]``."""
        return self.added(keys, ids, -1)

    def outweighs(self, before: Sums) -> bool:
        """Return whether enough is left after a removal from ``before`` for these sums to be accurate."""
        return bool(self.second.trace() >= LEFT * before.second.trace())

    def moved(self, keys: npt.NDArray[np.floating], ids: IntArray, new_ids: IntArray) -> Sums:
        """Move keys ``[m, d]`` from classes ``ids`` ``[m]`` to classes ``new_ids`` ``[m]``."""
        moved = self.removed(keys, ids).added(keys, new_ids)
        return Sums(moved.counts, moved.sums, self.second)

    def widened(self, c: int) -> Sums:
        """Add empty classes, up to ``c`` in all."""
        more = c - len(self.counts)
        return Sums(np.pad(self.counts, (0, more)), np.pad(self.sums, ((0, more), (0, 0))), self.second)

    def without(self, class_id: int) -> Sums:
        """Remove an empty class."""
        return Sums(np.delete(self.counts, class_id), np.delete(self.sums, class_id, axis=0), self.second)

    def are_of(self, blocks: Blocks) -> bool:
        """Return whether these are the sums of the keys in ``blocks``, each read once (:class:`Along`)."""
        along = Along(*self.sums.shape)
        for keys, ids in blocks:
            along.count(keys, ids)
        return along.has(self.counts, self.sums) and along.has_second(self.second)

    @classmethod
    def of_array(cls, array: FloatArray, c: int) -> Sums:
        """Invert :meth:`to_array` for ``c`` classes; a memory-mapped ``array`` is not copied."""
        return cls(array[:c, 0].astype(np.int64), array[:c, 1:], array[c:, 1:])

    def to_array(self) -> FloatArray:
        """Return ``[c + d, 1 + d]`` float64: the sum of ``(1, k_i)`` for each class, then of ``k_i (1, k_i)``."""
        return np.block([[self.counts[:, None], self.sums], [self.sums.sum(0)[:, None], self.second]])


class Along:
    """Probabilistic check of sums against keys, along a random direction ``r`` (Freivalds, 1977).

    It takes ``2 n d`` products instead of ``n d^2``: row ``j`` of ``sums r`` is the sum of ``k_i . r`` over class
    ``j``, and ``second r = sum_i k_i (k_i . r)``. Wrong sums pass only by chance; rounding errors are tolerated.
    """

    def __init__(self, c: int, d: int, least: float = 0.0) -> None:
        """``least``: error that is always tolerated, as a share of one key."""
        self._least = least
        self._direction = np.random.default_rng().standard_normal(d)
        self._counts, self._sums, self._second, self._squares = np.zeros(c, np.int64), np.zeros(c), np.zeros(d), 0.0

    def count(self, keys: npt.NDArray[np.floating], ids: IntArray) -> None:
        """Add keys ``[b, d]`` of class ids ``[b]``."""
        wide = np.asarray(keys, np.float64)
        products = wide @ self._direction
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self._sums += np.bincount(ids, products, len(self._counts))
        self._squares += float(products @ products)
        self._second += products @ wide

    def has(self, counts: IntArray, sums: FloatArray) -> bool:
        """Return whether ``counts`` ``[c]`` and ``sums`` ``[c, d]`` match the keys."""
        return np.array_equal(counts, self._counts) and self._fit(sums, self._sums, counts, 1.0)

    def has_second(self, second: FloatArray) -> bool:
        """Return whether ``second`` ``[d, d]`` is the sum of the keys' outer products."""
        every = np.abs(second.diagonal())
        return self._fit(second, self._second, every, every / self._counts.sum())

    def _fit(self, known: FloatArray, found: FloatArray, every: IntArray | FloatArray, one: float | FloatArray) -> bool:
        """Compare sums; by Cauchy-Schwarz, they are at most ``(every sum_i (k_i . r)^2)^(1/2)``."""
        most = np.sqrt(every * self._squares)
        least = np.sqrt(one * self._squares / self._counts.sum())
        return bool((np.abs(known @ self._direction - found) <= TOLERANCE * most + self._least * least).all())
