"""Types of arrays, and their blocks."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
KeyArray = npt.NDArray[np.floating]
"""Stored keys, in float32 or float16."""


def slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices that split ``n`` rows into blocks of at most ``size``."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
