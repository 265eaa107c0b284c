"""The sums that a metric is fitted from: they follow the keys of an index at the cost of what comes and goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 2048
"""Keys that are made float64 at a time."""

TOLERANCE, LEAST = 1e-9, 1e-8
"""Relative tolerances of :class:`Along`: of the largest such sum (above rounding error, below the effect of one key in
10^8), and of one key, for sums that stay however many keys are removed."""

LEFT = 1e-5
"""Share of the squares that must be left after a removal; with less, the rounding of the removed keys would show."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Blocks = Iterable[tuple[npt.NDArray[np.floating], IntArray]]


@dataclass(frozen=True, eq=False)
class Sums:
    """Of keys ``k_i`` ``[d]`` of classes ``y_i``: how many a class has, their sum, and that of their outer products.

    ``counts[j] = |{i: y_i = j}|`` ``[c]`` int64, ``sums[j] = sum_{y_i = j} k_i`` ``[c, d]`` and
    ``second = sum_i k_i k_i^T`` ``[d, d]``, float64. Each product of two float32 is exact in float64, so what was added
    can be taken away again, and leaves an error in the last digits of what was there. A change makes another value.
    """

    counts: IntArray
    sums: FloatArray
    second: FloatArray

    @classmethod
    def of(cls, blocks: Blocks, c: int, d: int) -> Sums:
        """Those of keys ``[b, d]`` float32 or float16 and their class ids ``[b]``, in blocks that are read once."""
        made = cls(np.zeros(c, np.int64), np.zeros((c, d)), np.zeros((d, d)))
        for keys, ids in blocks:
            made.count(keys, ids)
        return made

    def count(self, keys: npt.NDArray[np.floating], ids: IntArray, sign: int = 1) -> None:
        """Add keys ``[b, d]`` of class ids ``[b]`` here, or take them away (-1): to what nobody else has yet.

        In place, for of very many classes a copy is large.
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
        sums[counts == 0] = 0  # and not what rounding left
        return Sums(counts, sums, self.second - less.second)

    @property
    def nbytes(self) -> int:
        """Bytes of :meth:`to_array`."""
        c, d = len(self.counts), len(self.second)
        return 8 * (c + d) * (1 + d)

    def added(self, keys: npt.NDArray[np.floating], ids: IntArray) -> Sums:
        """With further keys ``[m, d]`` of class ids ``[m]``."""
        return self._counted(keys, ids, 1)

    def removed(self, keys: npt.NDArray[np.floating], ids: IntArray) -> Sums:
        """Without some of the keys ``[m, d]``, which are of class ids ``[m]``."""
        less = self._counted(keys, ids, -1)
        less.sums[less.counts == 0] = 0  # and not what rounding left
        return less

    def _counted(self, keys: npt.NDArray[np.floating], ids: IntArray, sign: int) -> Sums:
        other = Sums(np.array(self.counts), np.array(self.sums), np.array(self.second))
        other.count(keys, ids, sign)
        return other

    def outweighs(self, before: Sums) -> bool:
        """Whether enough is left of what was there before a removal, so that these are as good as summed anew."""
        return bool(self.second.trace() >= LEFT * before.second.trace())

    def moved(self, keys: npt.NDArray[np.floating], ids: IntArray, new_ids: IntArray) -> Sums:
        """Move some of the keys ``[m, d]`` from classes ``ids`` ``[m]`` to classes ``new_ids`` ``[m]``."""
        there = self.removed(keys, ids).added(keys, new_ids)
        return Sums(there.counts, there.sums, self.second)

    def widened(self, c: int) -> Sums:
        """With further classes, ``c`` in all, which have no key."""
        more = c - len(self.counts)
        return Sums(np.pad(self.counts, (0, more)), np.pad(self.sums, ((0, more), (0, 0))), self.second)

    def without(self, class_id: int) -> Sums:
        """Return the same sums without a class, which has no key."""
        return Sums(np.delete(self.counts, class_id), np.delete(self.sums, class_id, axis=0), self.second)

    def are_of(self, blocks: Blocks) -> bool:
        """Whether these are the sums of such keys, in blocks that are read once (:class:`Along`)."""
        along = Along(*self.sums.shape)
        for keys, ids in blocks:
            along.count(keys, ids)
        return along.has(self.counts, self.sums) and along.has_second(self.second)

    @classmethod
    def of_array(cls, array: FloatArray, c: int) -> Sums:
        """The inverse of :meth:`to_array`, of ``c`` classes; what is mapped from a disk stays there."""
        return cls(array[:c, 0].astype(np.int64), array[:c, 1:], array[c:, 1:])

    def to_array(self) -> FloatArray:
        """``[c + d, 1 + d]`` float64, sums of ``(1, k_i)`` of each class, then that of ``k_i (1, k_i)``."""
        return np.block([[self.counts[:, None], self.sums], [self.sums.sum(0)[:, None], self.second]])


class Along:
    """Keys as they are met along a random direction ``r``: whether sums are theirs, to rounding and beyond mere chance.

    That takes ``2 n d`` products where the sums took ``n d^2`` (Freivalds, 1977): ``sums r`` is the sum of each class's
    ``k_i . r``, and ``second r = sum_i k_i (k_i . r)``.
    """

    def __init__(self, c: int, d: int, least: float = 0.0) -> None:
        """``least``: how much sums may be off in any case, as a share of one key."""
        self._least = least
        self._direction = np.random.default_rng().standard_normal(d)
        self._counts, self._sums, self._second, self._squares = np.zeros(c, np.int64), np.zeros(c), np.zeros(d), 0.0

    def count(self, keys: npt.NDArray[np.floating], ids: IntArray) -> None:
        """Meet keys ``[b, d]`` of class ids ``[b]``."""
        wide = np.asarray(keys, np.float64)
        products = wide @ self._direction
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self._sums += np.bincount(ids, products, len(self._counts))
        self._squares += float(products @ products)
        self._second += products @ wide

    def has(self, counts: IntArray, sums: FloatArray) -> bool:
        """Whether these are the ``counts`` ``[c]`` and ``sums`` ``[c, d]`` of the keys of each class."""
        return np.array_equal(counts, self._counts) and self._fit(sums, self._sums, counts, 1.0)

    def has_second(self, second: FloatArray) -> bool:
        """Whether this is the sum of their outer products ``[d, d]``."""
        every = np.abs(second.diagonal())
        return self._fit(second, self._second, every, every / self._counts.sum())

    def _fit(self, known: FloatArray, found: FloatArray, every: IntArray | FloatArray, one: float | FloatArray) -> bool:
        """Whether sums are as found; by Cauchy and Schwarz they are at most ``(every sum_i (k_i . r)^2)^(1/2)``."""
        most = np.sqrt(every * self._squares)
        least = np.sqrt(one * self._squares / self._counts.sum())
        return bool((np.abs(known @ self._direction - found) <= TOLERANCE * most + self._least * least).all())
