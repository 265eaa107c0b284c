"""Sets of classes that hold the right one for a given share of many photos.

A fit stores the probability that each held-out photo gives to its own class. A set has the classes whose probability is
at least a threshold, which enough of these photos reach (conformal prediction with the score ``1 - p``; Sadinle, Lei
and Wasserman, 2019). Folds have classified these photos, and not the whole index, so the coverage is measured and not
proven. It is a mean over photos like the shots, and lower for difficult classes and photos without a match.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip.arrays import BoolArray, DoubleArray
from retrieval_tip.settings import Settings
from retrieval_tip.wording import counted, few


@dataclass(frozen=True, eq=False)
class Scores:
    """The held-out photos of a fit as ``rows`` ``[m, 3]``, and the ``settings`` that the fit found.

    A row has the probability of the photo's own class, the weight of the photo if its set lacks this class, and the
    class id. The weights sum to 1 or less, because an index with all shots lacks fewer than its folds do.
    """

    rows: DoubleArray
    settings: Settings

    def sets(self, coverage: float, named: BoolArray) -> Sets:
        """Return the sets that hold the right class of the share ``coverage`` of held-out photos.

        A class without a held-out photo is in every set, unless it is ``named`` (``[c]``), so that its text ranks it.
        With fewer than ``1 / (1 - coverage)`` held-out photos, every set has all classes.
        """
        photos = len(self.rows)
        lost = 1 - coverage
        always = ~np.isin(np.arange(len(named)), self.rows[:, 2]) & ~named
        # In floating point, 10 (1 - 0.9) is below 1.
        if photos * lost < 1 - 1e-9:
            return Sets(coverage, photos, 0.0, always)
        probabilities, weights, _ = self.rows[np.argsort(self.rows[:, 0])].T
        number = int((photos * np.cumsum(weights) + 1 <= lost * (photos + 1) + 1e-9).sum())
        return Sets(coverage, photos, float(np.append(probabilities, np.inf)[number]), always)


@dataclass(frozen=True, eq=False)
class Sets:
    """A rule for sets of classes: those whose probability is at ``least`` this, and some that are ``always`` in a set.

    It follows from the ``coverage`` and the number of held-out ``photos``. ``always`` has the shape ``[c]``.
    """

    coverage: float
    photos: int
    least: float
    always: BoolArray

    def members(self, probabilities: Tensor) -> Tensor:
        """Return which classes are in the set of each query, as booleans of shape ``[q, c]``."""
        return (probabilities >= self.least) | torch.from_numpy(self.always).to(
            probabilities.device
        )

    def column(self, probabilities: Tensor, class_names: Sequence[str]) -> pa.Array:
        """Return the classes in the set of each query, most probable first."""
        members = self.members(probabilities)
        sizes = members.sum(1)
        ranked = probabilities.masked_fill(~members, -1).topk(int(sizes.max()), dim=1).indices
        there = torch.arange(ranked.shape[1], device=sizes.device) < sizes[:, None]
        ends = np.concatenate([[0], sizes.cumsum(0).cpu().numpy()]).astype(np.int32)
        names = pa.array(class_names, pa.string()).take(pa.array(ranked[there].cpu().numpy()))
        return pa.ListArray.from_arrays(pa.array(ends), names)

    def cautions(self, class_names: Sequence[str]) -> Iterator[str]:
        """Yield a warning if sets have more classes because photos are missing."""
        untested = [class_names[i] for i in np.flatnonzero(self.always).tolist()]
        if self.least == 0:
            few_photos = counted(self.photos, "held-out photo", "does", "do")
            yield f"coverage {self.coverage:g}: {few_photos} not suffice, so every set has all classes; add photos"
        elif untested:
            some = (
                f"{counted(len(untested), 'class', 'has', 'have')} no photo that could be held out"
            )
            yield f"coverage: {some}, so every set has {'it' if len(untested) == 1 else 'them'}: {few(untested)}"
