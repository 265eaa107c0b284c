"""Answer photos of a labelling session, and group those without a match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval_tip.labelling.groups import group, threshold_of
from retrieval_tip.labelling.labels import NONE
from retrieval_tip.model import Index

FloatArray = npt.NDArray[np.float32]

GUESSES = 3
"""Maximum number of guesses per photo."""
MOST_GROUPED = 4096
"""Maximum number of photos without a match that are grouped."""


@dataclass(frozen=True)
class Guessed:
    """The most probable classes of a photo with their probabilities, and whether the photo resembles no shot."""

    chances: Mapping[str, float]
    unlike: bool

    @property
    def rows(self) -> list[dict[str, object]]:
        """The classes as a server returns them."""
        return [{"label": label, "probability": chance} for label, chance in self.chances.items()][:GUESSES]

    @property
    def named(self) -> Guessed:
        """The guess without the class ``NONE``, which has a key of its own while single photos are labelled."""
        return Guessed({label: chance for label, chance in self.chances.items() if label != NONE}, self.unlike)


def guesses(index: Index, features: FloatArray) -> list[Guessed]:
    """Return the most probable classes of each photo, most probable first."""
    answers = index.classify(features, "keep", top=GUESSES + 1, neighbours=0, logits=False).to_arrow()
    unlike = answers["unlike"].to_pylist() if "unlike" in answers.column_names else [False] * len(answers)
    pairs = map(zip, answers["labels"].to_pylist(), answers["probabilities"].to_pylist())
    return [Guessed(dict(own), one) for own, one in zip(pairs, unlike, strict=True)]


def unknown_groups(index: Index, features: FloatArray, found: Sequence[Guessed]) -> list[list[int]]:
    """Return the rows of similar photos without a match, largest group first (see :func:`groups.group`)."""
    rows = np.flatnonzero([one.unlike for one in found])[:MOST_GROUPED]
    if len(rows) < 2:
        return []
    return [rows[own].tolist() for own in group(features[rows], threshold_of(index), index.metric)]
