"""Features in clusters, one cluster for each class."""

from __future__ import annotations

import numpy as np
from numpy.random import default_rng
from tables import unit

C, D = 5, 16


def round_clusters(n, c, d, seed, spread=0.6):
    """Return unit rows around one centre per class, and their class ids, in turn."""
    generator = default_rng(seed)
    centres = default_rng(99).normal(size=(c, d))
    ids = np.arange(n) % c
    rows = centres[ids] + spread * generator.normal(size=(n, d)) * np.sqrt(d) / 2
    return unit(rows), ids


def clusters(shots, seed=0, spread=0.6, c=C, d=D):
    """Return unit features ``[c * shots, d]``, which vary most in a few uninformative directions, and class ids."""
    draw = default_rng(seed)
    means = default_rng(99).normal(size=(c, d))
    wide = np.ones(d)
    wide[: d // 4] = 4
    features = np.repeat(means, shots, 0) + spread * draw.normal(size=(c * shots, d)) * wide
    return unit(features), np.repeat(np.arange(c), shots)


def text_of(c=C, d=D, seed=99, noise=1.0):
    """Return text weights near the means of :func:`clusters`."""
    means = default_rng(seed).normal(size=(c, d))
    return unit(means + noise * default_rng(3).normal(size=means.shape))
