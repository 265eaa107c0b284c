"""Projections of keys to two dimensions: by principal components, or t-SNE with scikit-learn."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.bounds import check_count
from retrieval_tip.errors import UsageError

FloatArray = npt.NDArray[np.float32]

AXES, ITERATIONS = 8, 8
"""Axes and iterations of the randomised SVD: the first two axes are right to four digits in a tenth of the time."""
FEWEST, REDUCED, PERPLEXITY = 5, 50, 30
"""Smallest number of keys for t-SNE, its input dimensions, and its perplexity."""


@dataclass(frozen=True)
class Projection:
    """Keys in the plane, by their ``key_ids`` and ``class_ids`` ``[m]`` int64.

    ``places`` ``[m, 2]`` float32 lie within -1 and 1, with equal scales. ``explained`` is the share of variance along
    each axis. ``axes`` ``[1 + d, 2]`` float32 place a new feature ``f`` at ``axes[0] + f axes[1:]``. Both are ``None``
    for t-SNE, which cannot place new features.
    """

    key_ids: npt.NDArray[np.int64]
    class_ids: npt.NDArray[np.int64]
    places: FloatArray
    explained: tuple[float, float] | None
    axes: FloatArray | None = None


Method = Literal["pca", "tsne"]


def methods() -> list[Method]:
    """Return the available methods: ``pca``, and ``tsne`` with scikit-learn."""
    return ["pca", "tsne"] if importlib.util.find_spec("sklearn") else ["pca"]


def projected(cache: AnsweringIndex, method: Method = "pca", limit: int = 5000) -> Projection:
    """Project keys ``K`` ``[n, d]`` to two dimensions: all of them, or ``limit`` keys spread evenly over the classes.

    ``pca`` is ``(K - mean) v`` for the two eigenvectors ``v`` of the covariance with the largest eigenvalues, signed so
    that the largest component is positive. ``tsne`` (van der Maaten and Hinton, 2008) starts from the first two of
    :data:`REDUCED` principal components, with a fixed seed; fewer than :data:`FEWEST` keys use ``pca``. Raises
    UsageError for an unavailable method, or a limit below 1.
    """
    if method not in methods():
        raise UsageError(f"method {method!r}: give one of {', '.join(methods())} (tsne needs scikit-learn)")
    check_count("limit", limit)
    features, labels = cache.some(limit)
    keys = features.astype(np.float32)
    if method == "pca" or len(keys) < FEWEST:
        places, explained, axes = _principal(keys)
    else:
        places, explained, axes = _tsne(keys), None, None
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    places = places - middle
    largest = float(np.abs(places).max()) or 1.0
    key_ids, class_ids = (labels[name].to_numpy().astype(np.int64) for name in ("key_id", "class_id"))
    if axes is not None:
        axes = (np.concatenate([axes[:1] - middle, axes[1:]]) / largest).astype(np.float32)
    return Projection(key_ids, class_ids, (places / largest).astype(np.float32), explained, axes)


def _principal(keys: FloatArray) -> tuple[FloatArray, tuple[float, float], FloatArray]:
    mean = keys.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = torch.from_numpy(keys - mean)
    with torch.random.fork_rng(devices=[]):  # a fixed seed makes the axes repeatable
        torch.manual_seed(0)
        _, scale, axes = torch.svd_lowrank(centred, q=min(AXES, *centred.shape), niter=ITERATIONS)
    axes = torch.nn.functional.pad(axes, (0, max(0, 2 - axes.shape[1])))[:, :2]
    axes = axes * torch.where(axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) < 0, -1, 1)
    total = float(centred.square().sum())
    first, second = ([*scale.square().tolist(), 0.0][i] / total if total else 0.0 for i in (0, 1))
    places: FloatArray = (centred @ axes).numpy()
    return places, (first, second), np.concatenate([-mean[None] @ axes.numpy(), axes.numpy()])


def _tsne(keys: FloatArray) -> FloatArray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(REDUCED, *keys.shape), random_state=0).fit_transform(keys)
    perplexity = min(PERPLEXITY, (len(keys) - 1) / 3)
    places: FloatArray = TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(reduced)
    return places
