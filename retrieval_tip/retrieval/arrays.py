"""Arrays of keys, in memory or in their store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
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


Keys = KeyArray | KeysInPlace
"""Keys that are in memory, memory-mapped, or read from their store."""
