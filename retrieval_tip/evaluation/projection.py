"""Keys in two dimensions, to look at: by principal components, or by t-SNE where scikit-learn is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.errors import UsageError

FloatArray = npt.NDArray[np.float32]

AXES, ITERATIONS = 8, 8
"""Axes that are looked for at once, and how often: then the first two are right to four digits, in a tenth of the time
that all of them take."""
FEWEST, REDUCED, PERPLEXITY = 5, 50, 30
"""Fewest keys for t-SNE, the principal components that it gets, and about how many neighbours it keeps together."""


@dataclass(frozen=True)
class Projection:
    """Some keys, by their ``key_ids`` and ``class_ids`` ``[m]`` int64, and where they are.

    ``places`` ``[m, 2]`` float32 are within -1 and 1, at one scale. ``explained``: the shares of the variance that the
    two axes hold, and ``axes`` ``[1 + d, 2]`` float32 place any feature ``f``: at ``axes[0] + f axes[1:]``. Both are
    ``None`` for t-SNE, whose axes mean nothing and which has no place for a new feature.
    """

    key_ids: npt.NDArray[np.int64]
    class_ids: npt.NDArray[np.int64]
    places: FloatArray
    explained: tuple[float, float] | None
    axes: FloatArray | None = None


Method = Literal["pca", "tsne"]


def methods() -> list[Method]:
    """List the methods that can be had here: ``pca``, and ``tsne`` with scikit-learn."""
    return ["pca", "tsne"] if importlib.util.find_spec("sklearn") else ["pca"]


def projected(cache: AnsweringIndex, method: Method = "pca", limit: int = 5000) -> Projection:
    """The keys ``K`` ``[n, d]`` in two dimensions: all of them, or ``limit`` spread evenly over the classes' order.

    ``pca``: ``(K - mean) v`` for the two eigenvectors ``v`` of the covariance with the largest eigenvalues; of each,
    the largest component is positive. ``tsne``: neighbours of a key stay its neighbours (van der Maaten and Hinton,
    2008), of the first principal components and begun from the first two, with a fixed seed; fewer than
    :data:`FEWEST` keys are placed by ``pca``. Raises UsageError for a method that is not there, or a limit below 1.
    """
    if method not in methods():
        raise UsageError(f"method {method!r}: expected one of {', '.join(methods())} (tsne needs scikit-learn)")
    if limit < 1:
        raise UsageError(f"limit is {limit}: at least 1 key is needed")
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
    with torch.random.fork_rng(devices=[]):  # the axes are found from random directions: always the same ones
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
