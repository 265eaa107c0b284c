"""Answer the photos of a labelling session, so that a person can review them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieval_tip.labelling.groups import group, group_similarity
from retrieval_tip.labelling.labels import ASK, Label, SessionPhotos, guesses
from retrieval_tip.labelling.pool import Pool
from retrieval_tip.model import Index
from retrieval_tip.predictions import Predictions


@dataclass(frozen=True)
class Review:
    """The answers of a version to ``read`` photos, and groups of the numbers of similar ones without a match."""

    version: int | None
    read: list[int]
    predictions: Predictions
    groups: list[list[int]]

    def listed(
        self,
        photos: SessionPhotos,
        labels: Mapping[int, Label],
        visits: Mapping[int, tuple[int, list[int]]],
    ) -> dict[str, Any]:
        """Return the photos with their labels or answers, as :func:`routes.label_answers` describes them."""
        found = dict(zip(self.read, guesses(self.predictions), strict=True))
        found |= {
            photo: {"label": label.label, "guesses": [], "no_match": False}
            for photo, label in labels.items()
        }
        listed = []
        for photo in photos.own(found):
            visit, _ = visits.get(photo, (None, []))
            one = {"photo": photo, "name": photos.name(photo), "label": None, "visit": visit}
            listed.append(one | found[photo])
        rest = [[photo for photo in group if photo not in labels] for group in self.groups]
        return {
            "version": self.version,
            "read": len(self.read),
            "photos": listed,
            "groups": [group for group in rest if len(group) > 1],
        }

    def similar(self, photo: int) -> list[dict[str, Any]]:
        """Return what similar photos give to the answer to a photo (see :class:`predictions.Prediction`).

        There is nothing to return for a photo that was read later.
        """
        if photo not in self.read:
            return []
        return self.predictions[self.read.index(photo)].similar or []


def answers_to(
    index: Index, photos: SessionPhotos, read: list[int], smooth: bool, most: int
) -> Review:
    """Classify photos that have been read, and group the first ``most`` of those without a match."""
    pool = Pool([photos.name(photo) for photo in read], photos.rows(read, index), [])
    if smooth:
        answers, _ = pool.smoothed(index, ASK)
    else:
        answers = index.classify(pool.features, "keep", **vars(ASK))
    no_match = answers.written(["no_match"])["no_match"].fill_null(False).to_numpy()
    rows = np.flatnonzero(no_match)[:most]
    groups = list[list[int]]()
    if len(rows) > 1:
        found = group(pool.features[rows], group_similarity(index), index.metric)
        groups = [[read[row] for row in rows[own]] for own in found]
    return Review(index.version, read, answers, groups)
