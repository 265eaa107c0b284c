"""Show keys in two dimensions, by principal components or by t-SNE (requires scikit-learn), and typical keys."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from retrieval_tip.arrays import FloatArray, IntArray
from retrieval_tip.errors import UsageError, check_count
from retrieval_tip.model import Index
from retrieval_tip.retrieval.keys import transformed

AXES, ITERATIONS = 8, 8
"""Axes and iterations of the randomised SVD. It computes the first two axes to four digits in a tenth of the time."""
FEWEST, REDUCED, PERPLEXITY = 5, 50, 30
"""Smallest number of keys for which t-SNE is used, number of its input dimensions, and its perplexity."""
EXEMPLARS = 1 << 15
"""Largest number of keys to search for exemplars."""


Method = Literal["pca", "tsne"]


@dataclass(frozen=True)
class Projection:
    """The positions of keys in the plane, and the method that found them.

    ``key_ids`` and ``class_ids`` are int64 arrays of shape ``[m]``. ``places`` is a float32 array of shape ``[m, 2]``.
    Its values are from -1 to 1, with the same scale on both axes.
    """

    method: Method
    key_ids: IntArray
    class_ids: IntArray
    places: FloatArray


def methods() -> list[Method]:
    """Return the available methods, which are ``pca`` and, if scikit-learn is installed, ``tsne``."""
    return ["pca", "tsne"] if importlib.util.find_spec("sklearn") else ["pca"]


def projected(index: Index, method: Method = "pca", limit: int = 5000) -> Projection:
    """Project the keys of an index to two dimensions.

    If the index has more than ``limit`` keys, ``limit`` keys are drawn evenly from the classes. The method ``pca``
    computes ``(K - mean) v``, where ``K`` is the matrix of keys and ``v`` are the two eigenvectors of the covariance
    with the largest eigenvalues. The largest component of each eigenvector is positive. ``tsne`` (van der Maaten and
    Hinton, 2008) is computed from :data:`REDUCED` principal components, starting from the first two, with a fixed seed.
    If there are fewer than :data:`FEWEST` keys, ``pca`` is used instead. Raises UsageError if the method is not
    available or the limit is below 1.
    """
    if method not in methods():
        raise UsageError(
            f"method {method!r}: give one of {', '.join(methods())} (tsne requires scikit-learn)"
        )
    check_count("limit", limit)
    features, labels = index.rows.some(limit)
    keys = features.astype(np.float32)
    method = method if len(keys) >= FEWEST else "pca"
    places = _principal(keys) if method == "pca" else _tsne(keys)
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    largest = float(np.abs(places - middle).max()) or 1.0
    key_ids, class_ids = (
        labels[name].to_numpy().astype(np.int64) for name in ("key_id", "class_id")
    )
    return Projection(method, key_ids, class_ids, ((places - middle) / largest).astype(np.float32))


def _principal(keys: FloatArray) -> FloatArray:
    centred = torch.from_numpy(keys - keys.mean(axis=0, dtype=np.float64).astype(np.float32))
    with torch.random.fork_rng(devices=[]):  # a fixed seed makes the axes reproducible
        torch.manual_seed(0)
        _, _, axes = torch.svd_lowrank(centred, q=min(AXES, *centred.shape), niter=ITERATIONS)
    missing = max(0, 2 - axes.shape[1])
    axes = torch.nn.functional.pad(axes, (0, missing))[:, :2]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1, 1)
    return (centred @ axes).numpy()


def _tsne(keys: FloatArray) -> FloatArray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(REDUCED, *keys.shape), random_state=0).fit_transform(keys)
    perplexity = min(PERPLEXITY, (len(keys) - 1) / 3)
    places: FloatArray = TSNE(
        perplexity=perplexity, init="pca", random_state=0, n_jobs=1
    ).fit_transform(reduced)
    return places


def exemplars(index: Index) -> list[int]:
    """Return the id of the key of each class that is nearest to the class mean in the metric of the index.

    If there are more than :data:`EXEMPLARS` keys, a sample is used.
    """
    keys, described = index.rows.some(EXEMPLARS)
    points = transformed(index.metric, keys, index.device)
    x = torch.from_numpy((keys if points is None else points).astype(np.float32))
    ids = described["class_id"].to_numpy()
    sums = torch.zeros(len(index.class_names), x.shape[1])
    sums.index_add_(0, torch.tensor(ids), x)
    affinity = (x * sums[ids]).sum(1).numpy()
    order = np.lexsort((affinity, ids))  # sorted by class, with the nearest key last
    last = np.flatnonzero(np.diff(ids[order], append=-1))
    key_ids: list[int] = described["key_id"].take(order[last]).to_pylist()
    return key_ids
