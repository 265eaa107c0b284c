"""Sums that are used to fit a metric. When keys are changed, the sums are updated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from retrieval_tip.arrays import DoubleArray, IntArray, KeyArray, slices

BLOCK = 2048
"""Number of keys that are converted to float64 at a time."""

TOLERANCE, LEAST = 1e-9, 1e-8
"""Tolerances of :class:`SumCheck`.

The first tolerance is relative to the largest possible sum and smaller than the effect of one key in 10^8. The second
is relative to a single key and is used for sums from which many keys were removed.
"""

LEFT = 1e-5
"""Minimum share of the sum of squares that must remain after a removal, so that rounding errors stay negligible."""

Blocks = Iterable[tuple[KeyArray, IntArray]]


@dataclass(frozen=True, eq=False)
class Sums:
    """The number of keys and the sum of the keys of each class, and the sum of the outer products of all keys.

    For keys ``k_i`` of length ``d`` with class ids ``y_i``, ``counts[j] = |{i: y_i = j}|`` is an int64 array of shape
    ``[c]``. ``sums[j] = sum_{y_i = j} k_i`` and ``second = sum_i k_i k_i^T`` are float64 arrays of shapes ``[c, d]``
    and ``[d, d]``. Removing a key undoes its addition up to rounding errors. Every change except :meth:`count` returns
    a new object. If ``second`` is not known, it is empty and stays so.
    """

    counts: IntArray
    sums: DoubleArray
    second: DoubleArray

    @classmethod
    def of(cls, blocks: Blocks, c: int, d: int, second: bool = True) -> Sums:
        """Compute the sums of blocks of float32 or float16 keys and their class ids, by default with ``second``."""
        side = d if second else 0
        made = cls(np.zeros(c, np.int64), np.zeros((c, d)), np.zeros((side, side)))
        for keys, ids in blocks:
            made.count(keys, ids)
        return made

    def count(self, keys: KeyArray, ids: IntArray, sign: int = 1) -> None:
        """Add keys of shape ``[b, d]`` with their class ids in place, or remove them if ``sign`` is -1.

        Only use this while no other code holds a reference to the object.
        """
        for rows in slices(len(keys), BLOCK):
            block_ids = ids[rows]
            wide = np.array(keys[rows], np.float64)
            if (block_ids[1:] < block_ids[:-1]).any():
                order = np.argsort(block_ids, kind="stable")
                block_ids, wide = block_ids[order], wide[order]
            classes, first = np.unique(block_ids, return_index=True)
            self.counts[classes] += sign * np.diff(first, append=len(block_ids))
            self.sums[classes] += sign * np.add.reduceat(wide, first)
            if self.second.size:
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
        """Size in bytes of the array that :meth:`to_array` returns."""
        c = len(self.counts)
        d = len(self.second)
        return 8 * (c + d) * (1 + d)

    def added(self, keys: KeyArray, ids: IntArray, sign: int = 1) -> Sums:
        """Return the sums after adding keys of shape ``[m, d]``, or after removing them if ``sign`` is -1."""
        other = Sums(np.array(self.counts), np.array(self.sums), np.array(self.second))
        other.count(keys, ids, sign)
        other.sums[other.counts == 0] = 0  # clears rounding errors
        return other

    def outweighs(self, before: Sums) -> bool:
        """Return whether these sums are still accurate after keys were removed from ``before``."""
        return bool(self.second.trace() >= LEFT * before.second.trace())

    def widened(self, c: int) -> Sums:
        """Return the sums with empty classes appended, up to ``c`` classes."""
        more = c - len(self.counts)
        return Sums(
            np.pad(self.counts, (0, more)), np.pad(self.sums, ((0, more), (0, 0))), self.second
        )

    def without(self, class_ids: IntArray | int) -> Sums:
        """Return the sums after removing empty classes."""
        return Sums(
            np.delete(self.counts, class_ids), np.delete(self.sums, class_ids, axis=0), self.second
        )

    def are_of(self, blocks: Blocks) -> bool:
        """Check with :class:`SumCheck` that these are the sums of the keys in ``blocks``."""
        check = SumCheck(*self.sums.shape)
        for keys, ids in blocks:
            check.count(keys, ids)
        return check.has(self.counts, self.sums) and check.has_second(self.second)

    @classmethod
    def of_array(cls, array: DoubleArray, c: int) -> Sums:
        """Invert :meth:`to_array` for ``c`` classes. A memory-mapped ``array`` is not copied."""
        return cls(array[:c, 0].astype(np.int64), array[:c, 1:], array[c:, 1:])

    def to_array(self) -> DoubleArray:
        """Return the sums as a float64 array of shape ``[c + d, 1 + d]``.

        The first ``c`` rows are the per-class sums of ``(1, k_i)``. The other rows are the sum of ``k_i (1, k_i)``.
        """
        return np.block(
            [[self.counts[:, None], self.sums], [self.sums.sum(0)[:, None], self.second]]
        )


class SumCheck:
    """A probabilistic check of sums against keys along a random direction ``r`` (Freivalds, 1977).

    Row ``j`` of ``sums r`` is the sum of ``k_i . r`` over class ``j``, and ``second r = sum_i k_i (k_i . r)``. The
    check therefore takes ``2 n d`` products instead of ``n d^2``. Wrong sums only pass with negligible probability.
    """

    def __init__(self, c: int, d: int, least: float = 0.0) -> None:
        """Start a check. Errors up to ``least``, as a share of one key, are always tolerated."""
        self._least = least
        self._direction = np.random.default_rng().standard_normal(d)
        self._counts = np.zeros(c, np.int64)
        self._sums = np.zeros(c)
        self._second = np.zeros(d)
        self._squares = 0.0

    def count(self, keys: KeyArray, ids: IntArray) -> None:
        """Add a block of keys, of shape ``[b, d]``, with their class ids."""
        wide = np.asarray(keys, np.float64)
        products = wide @ self._direction
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self._sums += np.bincount(ids, products, len(self._counts))
        self._squares += float(products @ products)
        self._second += products @ wide

    def has(self, counts: IntArray, sums: DoubleArray) -> bool:
        """Return whether ``counts`` and ``sums`` match the keys that were added."""
        return np.array_equal(counts, self._counts) and self._fit(sums, self._sums, counts, 1.0)

    def has_second(self, second: DoubleArray) -> bool:
        """Return whether ``second`` is the sum of the outer products of the keys that were added."""
        every = np.abs(second.diagonal())
        return self._fit(second, self._second, every, every / self._counts.sum())

    def _fit(
        self,
        sums: DoubleArray,
        products: DoubleArray,
        every: IntArray | DoubleArray,
        single: float | DoubleArray,
    ) -> bool:
        """Compare sums, with a tolerance relative to their Cauchy-Schwarz bound ``(every sum_i (k_i . r)^2)^(1/2)``."""
        most = np.sqrt(every * self._squares)
        least = np.sqrt(single * self._squares / self._counts.sum())
        return bool(
            (
                np.abs(sums @ self._direction - products) <= TOLERANCE * most + self._least * least
            ).all()
        )
