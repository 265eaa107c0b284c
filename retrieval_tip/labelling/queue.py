"""Order photos for labelling.

Four of five photos are suggestions. The fifth is drawn at random, so that the labelled photos include typical ones. All
of them estimate the accuracy on the unlabelled photos (see :mod:`labelling.progress`).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import numpy as np

Picked = Literal["random", "suggested", "similar", "reviewed"]
"""How a photo was chosen.

``similar`` photos resemble a photo that was labelled at the same time. ``reviewed`` photos were labelled because a
person looked at their answers.
"""

RANDOM_EVERY = 5
"""One photo in this number is drawn at random."""
FIXED, QUEUED = 5, 15
"""Number of photos at the front that new suggestions do not replace, and length of the queue."""


@dataclass(frozen=True)
class Queued:
    """The number of a photo, how it was chosen, and why it was suggested."""

    photo: int
    picked: Picked
    why: str | None = None


class Queue:
    """Queue of unlabelled photos. Until photos are suggested, all photos are drawn at random.

    ``order`` is a random order of all photos.
    """

    def __init__(self, photos: Sequence[int]) -> None:
        self.order: list[int] = np.random.default_rng(0).permutation(photos).tolist()
        self._queue: list[Queued] = []
        self._skipped: list[int] = []

    def add(self, photo: int) -> None:
        """Add a photo at a random place."""
        place = random.Random(photo).randint(0, len(self.order))  # noqa: S311 - no secret
        self.order = [*self.order[:place], photo, *self.order[place:]]

    def show(self, taken: Collection[int]) -> list[Queued]:
        """Return the next photos, without the photos that are ``taken``. Skipped photos come last."""
        self._queue = [one for one in self._queue if one.photo not in taken]
        self._queue += [
            Queued(photo, "random") for photo in self._drawn(taken, QUEUED - len(self._queue))
        ]
        return list(self._queue)

    def suggest(
        self, picks: Iterable[tuple[int, str]], taken: Collection[int], labelled: int
    ) -> None:
        """Replace all photos but the first ``FIXED`` by suggested and random photos.

        Each pick is a photo and the reason for suggesting it. ``labelled`` is the number of photos from the queue that
        are labelled by now. It determines the places of the random photos.
        """
        self._queue = self.show(taken)[:FIXED]
        wanted = [Queued(photo, "suggested", why) for photo, why in picks if photo not in taken]
        for place in range(labelled + len(self._queue), labelled + QUEUED):
            wanted = [one for one in wanted if not self._has(one.photo)]
            if wanted and place % RANDOM_EVERY != RANDOM_EVERY - 1:
                self._queue.append(wanted[0])
            else:
                self._queue += [Queued(photo, "random") for photo in self._drawn(taken, 1)]

    def skip(self, photo: int) -> None:
        """Move a photo behind all photos that are not skipped."""
        self._queue = [one for one in self._queue if one.photo != photo]
        self._skipped = [one for one in self._skipped if one != photo] + [photo]

    def put_first(self, one: Queued) -> None:
        """Move a photo to the front."""
        self._skipped = [photo for photo in self._skipped if photo != one.photo]
        self._queue = [one, *(other for other in self._queue if other.photo != one.photo)]

    def _has(self, photo: int) -> bool:
        return any(one.photo == photo for one in self._queue)

    def _drawn(self, taken: Collection[int], number: int) -> Iterator[int]:
        skipped = set(self._skipped)
        in_order = chain((photo for photo in self.order if photo not in skipped), self._skipped)
        return islice(
            (photo for photo in in_order if photo not in taken and not self._has(photo)),
            max(0, number),
        )
