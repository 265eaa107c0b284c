"""Find the shots that contributed most to an answer, and the shot that counted most against it.

Key ``i`` contributes ``w_i V_ic`` to class ``c``, which is its weight ``w_i = exp(-beta (1 - A_i))`` times its value. A
one-hot value is 1 for the class of the key, and 0 for other classes. Fitted values may be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """The retrieved keys of each query, as tensors of shape ``[q, k]``. By default, the nearest key comes first.

    Empty slots have affinity 0, row -1 and the class id ``c``.

    Attributes:
        affinity: the exact affinities, in float32.
        rows: the row numbers, which you can pass to :meth:`rows.Rows.described`.
        class_ids: the class ids.
    """

    affinity: Tensor
    rows: Tensor
    class_ids: Tensor

    def queries(self, selection: slice | Tensor) -> Nearest:
        """Return the keys of the queries in ``selection``."""
        return Nearest(*(column[selection] for column in self))

    def put(self, selection: Tensor, other: Nearest) -> None:
        """Replace the keys of the queries in ``selection``."""
        for column, replacement in zip(self, other, strict=True):
            column[selection] = replacement

    def ordered(self, by: Tensor) -> Nearest:
        """Sort the keys of each query by ``by``, largest first. Empty slots come last, and the sort is stable."""
        by = by.masked_fill(self.rows < 0, -torch.inf)
        return self.at(by.argsort(dim=1, descending=True, stable=True))

    def at(self, places: Tensor) -> Nearest:
        """Return the keys of each query at the given ``places``."""
        return Nearest(*(column.gather(1, places) for column in self))

    def first(self, number: int) -> Nearest:
        """Return the first ``number`` keys of each query."""
        return Nearest(*(column[:, :number] for column in self))

    def without(self, dropped: Tensor, n_classes: int) -> Nearest:
        """Return a copy that has empty slots where ``dropped`` is true."""
        return Nearest(
            self.affinity.masked_fill(dropped, 0),
            self.rows.masked_fill(dropped, -1),
            self.class_ids.masked_fill(dropped, n_classes),
        )

    @classmethod
    def joined(cls, parts: Sequence[Nearest], dim: int = 0) -> Nearest:
        """Concatenate the keys of consecutive queries, or different keys of the same queries if ``dim`` is 1."""
        return cls(*(torch.cat(column, dim=dim) for column in zip(*parts, strict=True)))


class Contributors(NamedTuple):
    """The shots that contributed most to the answers, and the shots that counted most against them.

    Attributes:
        supporting: the keys that contribute most to the winning class, largest contribution first.
        opposing: the key that has the most negative contribution. If no contribution is negative, it is the key that
            contributes most to the runner-up. The slot is empty if no key counts against the answer.
    """

    supporting: Nearest
    opposing: Nearest

    @classmethod
    def joined(cls, parts: Sequence[Contributors]) -> Contributors:
        """Concatenate the shots of consecutive queries."""
        return cls(*(Nearest.joined(near) for near in zip(*parts, strict=True)))

    @classmethod
    def among(
        cls, near: Nearest, winner: Tensor, rival: Tensor, n_classes: int, number: int
    ) -> Contributors:
        """Select ``number`` supporting shots and the opposing shot from the retrieved keys.

        ``winner`` and ``rival`` are their contributions to the winning class and to the runner-up.
        """
        there = near.rows >= 0
        nearest_first = near.affinity.masked_fill(~there, -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        near = near.at(nearest_first)
        there = there.gather(1, nearest_first)
        winner = winner.gather(1, nearest_first)
        rival = rival.gather(1, nearest_first)
        lowest, against = winner.masked_fill(~there, torch.inf).min(dim=1, keepdim=True)
        most, elsewhere = rival.masked_fill(~there, 0).max(dim=1, keepdim=True)
        opposing = near.at(torch.where(lowest < 0, against, elsewhere))
        return cls(
            near.ordered(winner).first(number),
            opposing.without((lowest >= 0) & (most <= 0), n_classes),
        )
