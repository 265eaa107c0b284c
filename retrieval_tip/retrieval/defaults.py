"""Default values of alpha and beta for any backbone and any number of shots.

The paper's alpha of 1 and beta of 5.5 work well for CLIP features and 16 shots. However, the cache term grows with the
number of shots, and the spread of the affinities depends on the backbone. The defaults are therefore expressed relative
to both quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import UsageError
from retrieval_tip.retrieval.inputs import StoredKeys
from retrieval_tip.settings import Normalize, check_choice

UNTOUCHED = {"both": (0.7, 1.0), "none": (1.0, 5.5)}
"""Default alpha and beta in each unit. For ``none``, they come from the paper. Both are equivalent at 16 shots."""

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


def measure(keys: StoredKeys, class_ids: npt.NDArray[np.int64]) -> Statistics | None:
    """Measure the affinities between keys of different classes.

    Returns ``None`` if there is only one class, or if all affinities are equal.
    """
    rows = np.arange(len(keys))
    if len(keys) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(len(keys), SAMPLE, replace=False))
    sample = keys[rows].astype(np.float32)
    other = (sample @ sample.T)[class_ids[rows][:, None] != class_ids[rows][None, :]]
    if not other.size or not float(other.std(dtype=np.float64)) > 1e-6:
        return None
    shots = len(class_ids) / len(np.unique(class_ids))
    return Statistics(float(other.mean(dtype=np.float64)), float(other.std(dtype=np.float64)), shots)


def untouched_settings(keys: StoredKeys, class_ids: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the default alpha and beta for the given keys and their class ids."""
    return plain_settings(None, None, "both", measure(keys, class_ids))


def plain_settings(
    alpha: float | None, beta: float | None, normalize: Normalize, statistics: Statistics | None
) -> tuple[float, float]:
    """Convert alpha and beta from the units of ``normalize`` to the units of equation 6 in the paper.

    With ``both``, affinities are standardised as ``A' = (A - mean) / std``, and a key has the weight
    ``exp(beta A')``. The cache is divided by the number of shots per class plus :data:`DOUBT`::

        beta_plain  = beta / std
        alpha_plain = alpha exp(beta_plain (1 - mean)) / (shots + 4)

    If alpha or beta is ``None``, it defaults to a value for these units, or to the value in the paper if there are no
    statistics. A default beta is limited by :data:`STEEPEST`, so that the logits of keys with unit norm fit in float32.

    Raises UsageError if ``normalize`` is unknown, or if alpha or beta is given and there are no statistics.
    """
    check_choice("normalize", normalize, Normalize)
    if statistics is None and normalize != "none":
        if alpha is not None or beta is not None:
            raise UsageError(f"normalize {normalize!r}: requires distinct keys from at least two classes; use none")
        normalize = "none"
    alpha, chosen = UNTOUCHED[normalize][0] if alpha is None else alpha, beta is None
    beta = UNTOUCHED[normalize][1] if beta is None else beta
    if statistics is None or normalize == "none":
        return alpha, beta
    beta /= statistics.std
    if chosen and beta * (1 - statistics.mean) > STEEPEST:
        beta = STEEPEST / (1 - statistics.mean)
    try:
        alpha *= math.exp(beta * (1 - statistics.mean))
    except OverflowError:
        raise UsageError(f"beta {beta * statistics.std:g}: too large for these affinities; lower it") from None
    return alpha / (statistics.shots + DOUBT), beta
