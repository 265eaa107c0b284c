"""Arrays of keys, in memory or in their store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_tip.backbones.base import Part

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


def scale_of(parts: Sequence[Part], shares: Sequence[float]) -> Tensor | None:
    """Return ``sqrt(e s_i)`` for each value of a feature of ``e`` encoders, ``[d]``, or ``None`` if all count equally.

    Features are scaled by it, so that an affinity is the mean of those of the encoders, weighted by their shares.
    """
    if len(set(shares)) < 2:
        return None
    factors = torch.tensor(shares) * len(shares)
    return factors.sqrt().repeat_interleave(torch.tensor([part.width for part in parts]))


Keys = KeyArray | KeysInPlace
"""Keys that are in memory, memory-mapped, or read from their store."""
