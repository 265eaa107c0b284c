"""Treat several arrays as a single array, so that an index can grow without copying its existing keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import InputError

IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.floating]
"""A float32 or float16 array of keys, of shape ``[n, d]``."""


class KeysInPlace(ABC):
    """Keys that do not fit in memory. You can read a few keys by row, or many keys in storage order."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: IntArray) -> KeyArray:
        """Return the keys at a few rows, in their stored dtype."""

    @abstractmethod
    def blocks(self, rows: IntArray) -> Iterator[tuple[KeyArray, IntArray]]:
        """Yield the keys at ``rows`` in blocks, and the row numbers of each block."""


class Segments:
    """Several arrays that behave like their concatenation. The arrays are not copied.

    A slice that lies within one array is a view, and all other selections are copies. Raises InputError if there are no
    arrays, or if their dtypes or row lengths differ.
    """

    def __init__(self, parts: Sequence[KeyArray]) -> None:
        if not parts or len({(part.shape[1:], part.dtype) for part in parts}) > 1 or parts[0].ndim != 2:
            raise InputError("segments: expected at least one array of shape [n, d], all with the same d and dtype")
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)]).astype(np.int64)
        self.dtype = self.parts[0].dtype
        self.shape = (int(self.starts[-1]), int(self.parts[0].shape[1]))

    @property
    def size(self) -> int:
        """Total number of values."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Total number of bytes."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | int | Sequence[int] | IntArray) -> KeyArray:
        """Return rows, which are selected by a slice, a number, several numbers or a mask, as in NumPy."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            first = int(np.searchsorted(self.starts, start, "right")) - 1
            slices = [
                part[max(start - at, 0) : max(stop - at, 0)]
                for part, at in zip(self.parts[first:], self.starts[first:-1].tolist(), strict=True)
                if at < stop
            ]
            return slices[0] if len(slices) == 1 else np.concatenate(slices or [self.parts[0][:0]])
        rows = np.asarray(rows) if np.size(rows) else np.empty(np.shape(rows), dtype=np.int64)
        rows = np.arange(len(self))[rows] if rows.dtype == bool else np.where(rows < 0, rows + len(self), rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row out of range for {len(self)} rows")
        out = np.empty((*rows.shape, self.shape[1]), dtype=self.dtype)
        for part, at in zip(self.parts, self.starts[:-1], strict=True):
            own = (rows >= at) & (rows < at + len(part))
            if own.any():
                out[own] = part[rows[own] - at]
        return out

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> KeyArray:
        if copy is False:
            raise ValueError("segments: cannot be converted to a single array without a copy")
        return np.concatenate(self.parts, dtype=dtype)


Keys = KeyArray | Segments | KeysInPlace
"""Keys that are in memory, memory-mapped, or read from their store."""


def segments_of(array: KeyArray | Segments) -> tuple[KeyArray, ...]:
    """Return the segments of ``array``. A plain array counts as one segment."""
    return array.parts if isinstance(array, Segments) else (array,)


def joined(parts: Sequence[KeyArray]) -> KeyArray | Segments:
    """Join arrays into segments. A single array is returned unchanged."""
    return parts[0] if len(parts) == 1 else Segments(parts)


def runs(array: KeyArray | Segments, size: int) -> Iterator[slice]:
    """Yield slices that cover ``array``. Each slice has at most ``size`` rows and lies within one segment."""
    at = 0
    for part in segments_of(array):
        for start in range(0, len(part), size):
            yield slice(at + start, at + min(start + size, len(part)))
        at += len(part)
