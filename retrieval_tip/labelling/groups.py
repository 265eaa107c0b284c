"""Group photos without a match, so that each group can be named at once.

Photos are merged by average linkage: the two groups whose photos are most similar on average are merged, until no two
groups reach the threshold. The similarity is the inner product ``phi(x) phi(y)^T`` in the metric of the index, and the
threshold lies halfway between shots of the same class and shots of different classes.

Photos that are far from all shots resemble each other for this reason alone: among flowers, all clothes look alike. So
the mean of each group is subtracted, as the metric subtracts the mean of the known classes, and its photos are grouped
again. Almost all photos of several classes are then in parts again, but few photos of one class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.arrays import FloatArray, IntArray, slices
from retrieval_tip.errors import UsageError
from retrieval_tip.evaluation.held_out import classified
from retrieval_tip.labelling.pool import MOST_KEYS, Pool
from retrieval_tip.labelling.suggest import points_of
from retrieval_tip.machine import check_memory
from retrieval_tip.model import Index
from retrieval_tip.predictions import PREDICTIONS, Predictions
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.settings import Ask

MOST = 8192
"""Number of photos that are compared with each other, which takes 256 MiB. If there are more, a sample is drawn."""
LEAST = 4
"""Number of photos that are worth naming at once. A smaller part of a group does not show that the group is mixed."""
BLOCK = 4096
"""Number of other photos that are compared with the groups at a time."""


def group(features: Features, threshold: float, metric: tip.Metric | None = None) -> list[IntArray]:
    """Group features by average linkage, and return the rows of each group, largest group first.

    A mixed group is replaced by its parts. A feature that is similar to no other feature is in no group. If there are
    more than ``MOST`` features, a random sample is grouped. Each other feature then joins the group that it is most
    similar to on average, if that similarity reaches the threshold.

    ``features`` have the shape ``[m, d]``. Two groups are merged if their average similarity is at least ``threshold``
    (see :func:`group_similarity`). Without a ``metric``, the similarity is the cosine.
    """
    raw = inputs.matrix(features, "features")
    m, d = raw.shape
    check_memory(
        4 * (2 * m * d + min(m, MOST) ** 2),
        f"{m:,} photos without a match",
        "classify fewer at a time",
    )
    points = points_of(raw, metric).numpy()
    order = np.random.default_rng(0).permutation(m) if m > MOST else np.arange(m)
    sample = np.sort(order[:MOST])
    others = np.sort(order[MOST:])
    linked = [
        one
        for rows in _linked(points[sample], threshold)
        for one in _parts(points, sample[rows], threshold)
    ]
    groups = [rows for rows in linked if len(rows) > 1]
    if groups and len(others):
        centres = np.stack([points[rows].mean(axis=0) for rows in groups])
        for part in slices(len(others), BLOCK):
            similarity = points[others[part]] @ centres.T
            best = np.where(similarity.max(axis=1) >= threshold, similarity.argmax(axis=1), -1)
            groups = [
                np.append(rows, others[part][best == place]) for place, rows in enumerate(groups)
            ]
    return sorted(map(np.sort, groups), key=lambda rows: (-len(rows), rows[0]))


def _parts(points: FloatArray, rows: IntArray, threshold: float) -> list[IntArray]:
    """Return the parts of a group if most of its rows are in several large parts, or else the group itself."""
    own = points_of(points[rows] - points[rows].mean(axis=0), None).numpy()
    parts = [rows[part] for part in _linked(own, threshold)]
    large = [len(part) for part in parts if len(part) >= LEAST]
    if len(large) < 2 or 2 * sum(large) < len(rows):
        return [rows]
    return [one for part in parts for one in _parts(points, part, threshold)]


def _linked(points: FloatArray, threshold: float) -> Iterator[Sequence[int]]:
    """Yield the rows of each group, including groups of one.

    The mean similarity of two groups is ``sums[a, b] / (counts[a] counts[b])``. Merging two groups never makes the
    result more similar to a third group than both were, so groups that are each other's best partner can be merged in
    any order (nearest-neighbour chains, Murtagh, 1983), and a group without a partner is complete.
    """
    sums = points @ points.T
    counts = np.ones(len(points), dtype=np.float32)
    left = np.ones(len(points), dtype=bool)
    members = [[row] for row in range(len(points))]
    chain: list[int] = []
    while left.any():
        last = chain[-1] if chain else int(left.argmax())
        means = np.where(left, sums[last] / (counts[last] * counts), -np.inf)
        means[last] = -np.inf
        best = int(means.argmax())
        before = chain[-2] if len(chain) > 1 else best
        best = (
            before if means[before] == means[best] else best
        )  # otherwise, ties could form a circle
        if not means[best] >= threshold:
            left[last] = False
            chain = chain[:-1]
            yield members[last]
        elif len(chain) > 1 and best == before:
            sums[best] += sums[last]
            sums[:, best] = sums[best]  # a copy keeps the matrix exactly symmetric
            counts[best] += counts[last]
            members[best] += members[last]
            left[last] = False
            chain = chain[:-2]
        else:
            chain = [*(chain or [last]), best]


def group_similarity(index: Index) -> float:
    """Return the mean of two similarities: between shots of the same class, and between shots of different classes.

    The former is the mean over all classes that have two shots, or 1 without such a class. The latter is the mean over
    all pairs, or 0 if it is negative or there is one class. The metric subtracts the mean of the known classes, which
    makes these classes dissimilar to each other, but not to new classes. If there are very many shots, a sample is
    used.
    """
    keys, described = index.rows.some(MOST_KEYS)
    points = points_of(keys, index.metric).double()
    ids = torch.from_numpy(described["class_id"].to_numpy().astype(np.int64))
    c = len(index.class_names)
    sums = torch.zeros(c, points.shape[1], dtype=torch.float64).index_add_(0, ids, points)
    n = torch.bincount(ids, minlength=c).double()
    squares = (sums * sums).sum(1)
    some = n > 1
    same = float(((squares - n) / (n * (n - 1)))[some].mean()) if some.any() else 1.0
    pairs = float(n.sum() ** 2 - (n * n).sum())
    other = float((sums.sum(0) ** 2).sum() - squares.sum()) / pairs if pairs else 0.0
    return (same + max(other, 0.0)) / 2


def group_no_match(index: Index, features: FloatArray, answers: Predictions) -> Predictions:
    """Add the column ``group`` to the answers for features of shape ``[q, d]``.

    The groups of photos without a match are numbered from 1, largest first. Other photos, and photos that are similar
    to no other photo without a match, have no group. Raises UsageError if the index is not fitted.
    """
    check_fitted(index)
    table = answers.to_arrow()
    no_match = np.flatnonzero(table["no_match"].to_numpy())
    numbers = np.zeros(len(table), dtype=np.int64)
    if len(no_match):
        for number, rows in enumerate(
            group(features[no_match], group_similarity(index), index.metric), 1
        ):
            numbers[no_match[rows]] = number
    column = pa.array(numbers, PREDICTIONS["group"], mask=numbers == 0)
    return Predictions(table.append_column("group", column))


def check_fitted(index: Index, name: str = "group_no_match") -> None:
    """Raise UsageError, which begins with ``name``, if an index does not know which photos have no match."""
    if index.settings.least_cache is None:
        raise UsageError(
            f"{name}: the index does not know which images have no match; fit it first"
        )


def classify_in_groups(index: Index, pool: Pool, ask: Ask) -> Predictions:
    """Classify photos as :func:`held_out.classified` does, and group the photos without a match."""
    answers = Predictions.joined(
        classified(index, [(pa.chunked_array([pool.names]), [pool.block])], ask)
    )
    return group_no_match(index, pool.features, answers)
