"""Few-shot sampling by the rule of the field's published draws (CoOp, Tip-Adapter and their successors)."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from retrieval_tip.bounds import check_count, check_memory

VAL_SHOTS = 4
"""Validation draws at most this many images a class."""
ITEM_BYTES = 256
"""What a drawn item takes until it is a row of an index, without its feature: its position, path, label and digest."""


def few_shot(labels: Sequence[Hashable], shots: int, seed: int = 1) -> list[int]:
    """Positions of ``shots`` items a class, drawn by the published rule.

    Seed Python's generator with ``seed``; group the items by label, groups in order of first appearance and items in
    file order; draw ``random.sample(group, shots)`` from each, or ``random.choices`` (with replacement, so a position
    can repeat) where the group has fewer. The result is in the order of the draws, group after group.

    Raises UsageError if ``shots`` is not positive, too many, or more than memory holds.
    """
    return _draw(labels, shots, random.Random(seed))  # noqa: S311 - a published draw, not a secret


def few_shot_split(
    train: Sequence[Hashable], val: Sequence[Hashable], shots: int, seed: int = 1
) -> tuple[list[int], list[int]]:
    """Positions of the training and the validation shots of one published draw.

    The validation draw, ``min(shots, 4)`` a class, goes on with the generator that the training draw used.
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
