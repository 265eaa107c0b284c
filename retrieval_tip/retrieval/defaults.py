"""Settings that work untouched: alpha and beta in units of the shots themselves, for any backbone and number of shots.

The paper's alpha 1 and beta 5.5 fit CLIP's cosines and 16 shots. The cache term grows with the shots, and how far
affinities spread is the backbone's: two constants in their units carry from one to the other.
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
"""alpha and beta of each form; ``none`` is the paper's, the others agree with each other at 16 shots."""

DOUBT = 4
"""Shots that a class is credited with beside its own: a mean over few is trusted less (chosen on validation data)."""

STEEPEST = 60.0
"""Exponent ``beta (1 - mean)`` of a default, at most: beyond, where images are nearly the same, float32 overflows."""

SAMPLE = 4096
"""Keys that the affinities are measured on, at most."""


@dataclass(frozen=True)
class Statistics:
    """Affinities between keys of different classes, ``mean`` and ``std``, and the mean number of ``shots`` a class."""

    mean: float
    std: float
    shots: float


def measure(keys: Keys, class_ids: npt.NDArray[np.int64]) -> Statistics | None:
    """Statistics of keys ``[n, d]`` with these class ids; ``None`` where all are of one class or nothing spreads."""
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
    """Alpha and beta of an index over these keys where nothing else is asked for."""
    return plain_settings(None, None, "both", measure(keys, class_ids))


def plain_settings(
    alpha: float | None, beta: float | None, normalize: Normalize, statistics: Statistics | None
) -> tuple[float, float]:
    """Alpha and beta of the method's own formula (equation 6) for settings in the units of a form.

    ``affinity`` standardises affinities, ``A' = (A - mean) / std``, so that a key counts ``exp(beta A')``; ``shots``
    divides the cache by the shots a class (and :data:`DOUBT` more). Both only move constants::

        beta_plain  = beta / std
        alpha_plain = alpha exp(beta_plain (1 - mean)) / (shots + 4)

    ``None`` is the form's own default, with which float32 holds the logits of keys of unit norm (:data:`STEEPEST`).
    Without statistics the paper's settings are taken where none are given.

    Raises UsageError for an unknown form, and where statistics are missing for given settings.
    """
    check_choice("normalize", normalize, Normalize)
    if statistics is None and normalize != "none":
        if alpha is not None or beta is not None:
            raise UsageError(f"normalize {normalize!r}: needs keys of at least two classes that differ; use none")
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
            raise UsageError(f"beta {beta * statistics.std:g}: too large in units of these affinities") from None
    if normalize in ("both", "shots"):
        alpha /= statistics.shots + DOUBT
    return alpha, beta
