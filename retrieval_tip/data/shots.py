"""Select items: shots by the published rule of CoOp, Tip-Adapter and their successors, or evenly spaced items."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import check_count, check_memory

VAL_SHOTS = 4  # largest number of validation images per class
ITEM_BYTES = 256  # estimated bytes per drawn item, for its position, path, label and digest


def few_shot(labels: Sequence[Hashable], shots: int, seed: int = 1) -> list[int]:
    """Draw ``shots`` items per class by the published rule, and return their positions in the order of the draw.

    Python's random generator is seeded with ``seed``. Items are grouped by label, in order of first appearance, and
    stay in file order within each group. From each group, items are drawn with ``random.sample(group, shots)``, or with
    ``random.choices`` (with replacement) if the group has fewer than ``shots`` items.

    Raises UsageError if ``shots`` is not positive or is too large, or if there is not enough memory.
    """
    return _draw(labels, shots, random.Random(seed))  # noqa: S311 - a published draw, not a secret


def few_shot_split(
    train: Sequence[Hashable], val: Sequence[Hashable], shots: int, seed: int = 1
) -> tuple[list[int], list[int]]:
    """Draw positions of training shots and ``min(shots, 4)`` validation shots per class with one generator."""
    generator = random.Random(seed)  # noqa: S311
    drawn = _draw(train, shots, generator)
    return drawn, _draw(val, min(shots, VAL_SHOTS), generator)


def _draw(labels: Sequence[Hashable], shots: int, generator: random.Random) -> list[int]:
    check_count("shots", shots)
    groups: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        groups.setdefault(label, []).append(position)
    check_memory(ITEM_BYTES * shots * len(groups), f"{shots} shots of {len(groups)} classes", "draw fewer shots")
    drawn: list[int] = []
    for group in groups.values():
        drawn += generator.sample(group, shots) if len(group) >= shots else generator.choices(group, k=shots)
    return drawn


def spread(n: int, m: int) -> npt.NDArray[np.int64]:
    """Return at most ``m`` evenly spaced positions out of ``n``, in ascending order."""
    return np.unique(np.linspace(0, n - 1, min(n, m)).round().astype(np.int64))
