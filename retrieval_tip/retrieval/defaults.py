"""Default values of alpha and beta for any backbone and any number of shots.

The paper's alpha of 1 and beta of 5.5 work well for CLIP features and 16 shots. However, the cache term grows with the
number of shots, and the spread of the affinities depends on the backbone. The defaults are therefore expressed relative
to both quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from retrieval_tip.arrays import IntArray
from retrieval_tip.retrieval.inputs import StoredKeys

PAPER = 1.0, 5.5
"""Alpha and beta in the paper."""

ALPHA = 0.7
"""Default alpha for standardised affinities, which is equivalent to the paper's at 16 shots."""

DOUBT = 4
"""Number of pseudo-shots added to each class, so that a few shots have less weight (selected on validation data)."""

STEEPEST = 60.0
"""Upper limit for the exponent ``beta (1 - mean)`` of a default. It prevents overflow for near-identical images."""

SAMPLE = 4096
"""Maximum number of keys whose affinities are measured."""


@dataclass(frozen=True)
class Statistics:
    """The mean and standard deviation of affinities between classes, and the mean number of shots per class."""

    mean: float
    std: float
    shots: float


def measure(keys: StoredKeys, class_ids: IntArray) -> Statistics | None:
    """Measure the affinities between keys of different classes.

    Returns ``None`` if there is only one class, or if all affinities are equal.
    """
    rows = np.arange(len(keys))
    if len(keys) > SAMPLE:
        # With a fixed seed, the same keys get the same defaults.
        rows = np.sort(np.random.default_rng(0).choice(len(keys), SAMPLE, replace=False))
    sample = keys[rows].astype(np.float32)
    other = (sample @ sample.T)[class_ids[rows][:, None] != class_ids[rows][None, :]]
    if not other.size or not float(other.std(dtype=np.float64)) > 1e-6:
        return None
    shots = len(class_ids) / len(np.unique(class_ids))
    return Statistics(
        float(other.mean(dtype=np.float64)), float(other.std(dtype=np.float64)), shots
    )


def untouched_settings(keys: StoredKeys, class_ids: IntArray) -> tuple[float, float]:
    """Return the default alpha and beta for the given keys and their class ids."""
    return default_settings(measure(keys, class_ids))


def default_settings(
    statistics: Statistics | None, alpha: float | None = None, beta: float | None = None
) -> tuple[float, float]:
    """Return alpha and beta, in the units of equation 6 in the paper. A missing one gets its default.

    The defaults standardise affinities as ``A' = (A - mean) / std``, and a key has the weight ``exp(A')``. The cache is
    divided by the number of shots per class plus :data:`DOUBT`::

        beta  = 1 / std
        alpha = 0.7 exp(beta (1 - mean)) / (shots + 4)

    Exponents are limited by :data:`STEEPEST`, so that the logits of keys with unit norm fit in float32. Without
    statistics, the defaults are those of the paper.
    """
    if statistics is None:
        return PAPER[0] if alpha is None else alpha, PAPER[1] if beta is None else beta
    apart = 1 - statistics.mean
    if beta is None:
        beta = 1 / statistics.std
        beta = STEEPEST / apart if beta * apart > STEEPEST else beta
    if alpha is None:
        alpha = ALPHA * math.exp(min(beta * apart, STEEPEST)) / (statistics.shots + DOUBT)
    return alpha, beta
