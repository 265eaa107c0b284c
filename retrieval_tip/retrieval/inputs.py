"""The types of arrays of keys, and the validation of arguments that become arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_tip.arrays import FloatArray, IntArray, KeyArray
from retrieval_tip.backbones.base import Part, side_by_side
from retrieval_tip.data.feature_table import NORM_TOLERANCE
from retrieval_tip.errors import InputError
from retrieval_tip.wording import few

LONGEST_NAME = 1024
"""Maximum length of a new class name in characters."""

Labels = Sequence[str] | Sequence[int] | npt.NDArray[np.integer]
Features = KeyArray | Tensor
Join = Callable[[Sequence[FloatArray]], FloatArray]


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


StoredKeys = KeyArray | KeysInPlace
"""Keys that are in memory, memory-mapped, or read from their store."""


def matrix(features: Features, what: str) -> KeyArray:
    """Convert features to a finite float32 array of shape ``[n, d]``. float16 features keep their dtype.

    If the features are not valid, raises InputError with a message that refers to them as ``what``.
    """
    array = (
        features.detach().cpu().float().numpy()
        if isinstance(features, Tensor)
        else numbers(features, what)
    )
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{what}: shape {array.shape}; expected a non-empty array of shape [n, d]")
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{what}: {array.dtype}; expected floating-point numbers")
    with np.errstate(over="ignore"):  # overflow becomes infinity, which raises an error below
        array = array if array.dtype == np.float16 else array.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise InputError(f"{what}: row {int(bad[0])} contains NaN or infinity")
    return array


def are_several(features: object) -> TypeGuard[Sequence[Features]]:
    """Return whether these are the features of several encoders, and not the rows of one array."""
    return (
        isinstance(features, list | tuple)
        and bool(features)
        and all(np.ndim(array) == 2 for array in features)
    )


def parts_of(features: Features | Sequence[Features], blocks: Sequence[int]) -> tuple[Part, ...]:
    """Return the parts of features that come from several encoders, in a list of arrays or in one array."""
    widths = [int(part.shape[1]) for part in features] if are_several(features) else list(blocks)
    parts = tuple(
        Part(width, f"feature_{i}" if i > 1 else "feature") for i, width in enumerate(widths, 1)
    )
    return parts if len(parts) > 1 else ()


def joined(
    features: Features | Sequence[Features],
    parts: Sequence[Part],
    what: str,
    join: Join = side_by_side,
) -> Features:
    """Join features of several encoders, given as a list of arrays or side by side, after scaling each part to norm 1.

    Raises InputError if the widths do not match the ``parts``.
    """
    several = are_several(features)
    widths = [part.width for part in parts]
    if len(parts) < 2:
        return features[0] if several and len(features) == 1 else features  # type: ignore[return-value]
    matrices = [matrix(array, what) for array in features] if several else [matrix(features, what)]  # type: ignore[arg-type]
    if len(matrices) == 1 and matrices[0].shape[1] == sum(widths):
        matrices = np.split(matrices[0], np.cumsum(widths)[:-1], axis=1)
    if [array.shape[1] for array in matrices] != widths or len(
        {len(array) for array in matrices}
    ) > 1:
        raise InputError(
            f"{what}: shapes {', '.join(str(array.shape) for array in matrices)}; expected {widths} values"
        )
    scaled = []
    for array in matrices:
        # In float16 and float32, the squares of large values would overflow.
        norms = np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
        # A vector of zeros stays zero.
        scaled.append(array / norms.clip(1e-30))
    return join(scaled)


def scale_of(parts: Sequence[Part], shares: Sequence[float]) -> Tensor | None:
    """Return ``sqrt(e s_i)`` for each value of a feature of ``e`` encoders, ``[d]``, or ``None`` if all count equally.

    Features are scaled by it, so that an affinity is the mean of one affinity per encoder, weighted by the shares.
    """
    if len(set(shares)) < 2:
        return None
    factors = torch.tensor(shares) * len(shares)
    return factors.sqrt().repeat_interleave(torch.tensor([part.width for part in parts]))


def numbers(values: object, what: str) -> npt.NDArray[Any]:
    """Convert values to an array of numbers, or labels to an array. If that is impossible, raises InputError."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what}: rows have different lengths; pass an array") from None
    if what != "labels" and array.dtype.kind not in "fiu":
        raise InputError(f"{what}: {array.dtype}; expected floating-point numbers")
    return array


def check_unit(f: Tensor) -> None:
    """Raise InputError if the norm of a query is not 1."""
    norms = torch.linalg.vector_norm(f, dim=1)
    wrong = ((norms - 1).abs() > NORM_TOLERANCE).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"features: row {row} has norm {float(norms[row]):.4g} instead of 1; divide each row by its norm "
            "(retrieval_tip.backbones.base.unit), or pass norms='keep' to use it as given"
        )


def names(names: Sequence[str]) -> list[str]:
    """Check class names and return them as a list.

    Raises InputError if there are no names, or if a name is empty or occurs twice.
    """
    result = list(names)
    if not result or not all(isinstance(name, str) and name for name in result):
        raise InputError("class_names: expected at least one name, each a non-empty string")
    if len(set(result)) < len(result):
        raise InputError(
            f"class_names: {next(n for n in result if result.count(n) > 1)!r} occurs twice"
        )
    return result


def ids_of(labels: Labels, class_names: Sequence[str], n: int) -> IntArray:
    """Convert labels to class ids. Each label is the name or the position of a class.

    If a label is not a class, raises InputError with a message that names the first invalid row.
    """
    array = numbers(labels, "labels")
    if array.shape != (n,):
        raise InputError(
            f"labels: shape {array.shape} does not match {n} keys; pass one label per key"
        )
    if np.issubdtype(array.dtype, np.integer):
        bad = np.flatnonzero((array < 0) | (array >= len(class_names)))
        ids = array.astype(np.int64)
    else:
        position = {name: i for i, name in enumerate(class_names)}
        ids = np.array([position.get(label, -1) for label in array.tolist()], dtype=np.int64)
        bad = np.flatnonzero(ids < 0)
    if bad.size:
        raise InputError(
            f"labels: row {int(bad[0])} is {array[bad].tolist()[0]!r}; expected one of the {len(class_names)} classes"
        )
    return ids


def text_weights(weights: Features | None, c: int, d: int) -> Tensor:
    """Copy text weights to a float32 tensor of shape ``[c, d]``. If they are ``None``, return zeros.

    Raises InputError if the shape is wrong.
    """
    if weights is None:
        return torch.zeros(c, d)
    return shaped(weights, "text_weights", (c, d), "one per class")


def renamed(class_names: Sequence[str], old: str, new: str) -> tuple[int, list[str]]:
    """Return the position of the class ``old``, and the list of class names after it is renamed to ``new``.

    If ``new`` is already a class, ``old`` is removed from the list. Raises InputError if ``old`` is not a class, or if
    ``new`` is not a valid name.
    """
    if old not in class_names:
        raise InputError(f"{old!r} is not a class of this index ({few(class_names)})")
    if not isinstance(new, str):
        raise InputError(f"class name {new!r}: expected text")
    if new != new.strip() or not new.isprintable() or not 0 < len(new) <= LONGEST_NAME:
        shown = new if len(new) <= LONGEST_NAME else f"{new[:20]}..."
        raise InputError(
            f"class name {shown!r}: expected 1 to {LONGEST_NAME:,} printable characters, and no white space at the "
            "beginning or at the end"
        )
    at = class_names.index(old)
    merged = new != old and new in class_names
    return at, [*class_names[:at], *([] if merged else [new]), *class_names[at + 1 :]]


def shaped(features: Features, what: str, shape: tuple[int, int], meaning: str) -> Tensor:
    """Convert features to a float32 tensor of this shape. Raises InputError if they do not have it."""
    array = matrix(features, what)
    check_shape(what, array.shape, shape, meaning)
    return torch.from_numpy(np.array(array, dtype=np.float32))


def check_shape(what: str, shape: Sequence[int], expected: tuple[int, int], meaning: str) -> None:
    """Raise InputError if ``what`` does not have the expected shape."""
    if tuple(shape) != expected:
        raise InputError(
            f"{what}: shape {tuple(shape)}; expected [{expected[0]}, {expected[1]}], {meaning}"
        )
