"""Draw shots by the field's published rule (CoOp, Tip-Adapter and their successors)."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from retrieval_tip.bounds import check_count, check_memory

VAL_SHOTS = 4
"""Largest number of validation images a class."""
ITEM_BYTES = 256
"""Bytes of a drawn item without its feature: position, path, label and digest."""


def few_shot(labels: Sequence[Hashable], shots: int, seed: int = 1) -> list[int]:
    """Draw ``shots`` items a class by the published rule, and return their positions in the order of the draws.

    Seed Python's generator with ``seed``; group the items by label, groups in order of first appearance and items in
    file order; draw ``random.sample(group, shots)`` from each, or ``random.choices`` (with replacement) if the group
    has fewer.

    Raises UsageError if ``shots`` is not positive, too many, or more than memory holds.
    """
    return _draw(labels, shots, random.Random(seed))  # noqa: S311 - a published draw, not a secret


def few_shot_split(
    train: Sequence[Hashable], val: Sequence[Hashable], shots: int, seed: int = 1
) -> tuple[list[int], list[int]]:
    """Draw training and validation shots, and return their positions.

    The validation draw, ``min(shots, 4)`` a class, continues with the generator of the training draw.
    """
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
