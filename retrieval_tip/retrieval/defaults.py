"""Default alpha and beta for any backbone and any number of shots.

The paper's alpha 1 and beta 5.5 suit CLIP's cosines and 16 shots. But the cache term grows with the number of shots,
and the spread of affinities depends on the backbone. Constants in units of both carry over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import UsageError
from retrieval_tip.retrieval.segments import Keys
from retrieval_tip.settings import Normalize, check_choice

UNTOUCHED = {"both": (0.7, 1.0), "shots": (20.0, 5.5), "affinity": (0.035, 1.0), "none": (1.0, 5.5)}
"""Default alpha and beta of each form: the paper's for ``none``; the others agree with each other at 16 shots."""

DOUBT = 4
"""Pseudo-shots added to each class, so that a few shots weigh less (chosen on validation data)."""

STEEPEST = 60.0
"""Largest exponent ``beta (1 - mean)`` of a default. Nearly identical images would exceed it and overflow float32."""

SAMPLE = 4096
"""Maximum number of keys to measure affinities on."""


@dataclass(frozen=True)
class Statistics:
    """``mean`` and ``std`` of affinities between classes, and the mean number of ``shots`` per class."""

    mean: float
    std: float
    shots: float


def measure(keys: Keys, class_ids: npt.NDArray[np.int64]) -> Statistics | None:
    """Measure keys ``[n, d]`` of class ids ``[n]``; ``None`` for a single class or constant affinities."""
    rows = np.arange(len(keys))
    if len(keys) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(len(keys), SAMPLE, replace=False))
    sample = keys[rows].astype(np.float32)
    other = (sample @ sample.T)[class_ids[rows][:, None] != class_ids[rows][None, :]]
    if not other.size or not float(other.std(dtype=np.float64)) > 1e-6:
        return None
    shots = len(class_ids) / len(np.unique(class_ids))
    return Statistics(float(other.mean(dtype=np.float64)), float(other.std(dtype=np.float64)), shots)


def untouched_settings(keys: Keys, class_ids: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return default alpha and beta for keys ``[n, d]`` of class ids ``[n]``."""
    return plain_settings(None, None, "both", measure(keys, class_ids))


def plain_settings(
    alpha: float | None, beta: float | None, normalize: Normalize, statistics: Statistics | None
) -> tuple[float, float]:
    """Convert alpha and beta from the units of ``normalize`` to those of the paper's equation 6.

    ``affinity`` standardises affinities, ``A' = (A - mean) / std``, so that a key's weight is ``exp(beta A')``.
    ``shots`` divides the cache by the shots per class plus :data:`DOUBT`. ``both`` does both::

        beta_plain  = beta / std
        alpha_plain = alpha exp(beta_plain (1 - mean)) / (shots + 4)

    ``None`` takes the form's default, or the paper's if there are no statistics. A default beta is limited
    (:data:`STEEPEST`), so that logits of unit-norm keys fit float32.

    Raises UsageError for an unknown form, or if given settings need statistics and there are none.
    """
    check_choice("normalize", normalize, Normalize)
    if statistics is None and normalize != "none":
        if alpha is not None or beta is not None:
            raise UsageError(f"normalize {normalize!r}: needs distinct keys of at least two classes; use none")
        normalize = "none"
    alpha, chosen = UNTOUCHED[normalize][0] if alpha is None else alpha, beta is None
    beta = UNTOUCHED[normalize][1] if beta is None else beta
    if statistics is None or normalize == "none":
        return alpha, beta
    if normalize in ("both", "affinity"):
        beta /= statistics.std
        if chosen and beta * (1 - statistics.mean) > STEEPEST:
            beta = STEEPEST / (1 - statistics.mean)
        try:
            alpha *= math.exp(beta * (1 - statistics.mean))
        except OverflowError:
            raise UsageError(f"beta {beta * statistics.std:g}: too large for these affinities; lower it") from None
    if normalize in ("both", "shots"):
        alpha /= statistics.shots + DOUBT
    return alpha, beta
