"""The answer by definition, in float64 with one-hot products, and random cases to compare with it."""

import numpy as np
import torch
from hypothesis import strategies as st
from made import Made
from tables import unit
from torch.utils._python_dispatch import TorchDispatchMode

from retrieval_tip import tip

betas = st.floats(0.1, 50)


def affinity(f, K):
    return np.asarray(f).astype(np.float64) @ np.asarray(K).astype(np.float64).T


def nearest(A, k):
    """Return a mask of the ``k`` keys with the largest affinity to each query."""
    return np.argsort(np.argsort(-A, axis=1, kind="stable"), axis=1) < (
        A.shape[1] if k is None else k
    )


def cache_logits(A, y, c, beta, V=None, met=None, *, tail=False):
    """Return ``exp(-beta (1 - A)) V`` over the keys in the mask ``met``, or over all keys.

    With a tail, every other key counts at the mean affinity of the other keys of its class.
    """
    met = np.ones(A.shape, dtype=bool) if met is None else np.broadcast_to(met, A.shape)
    if tail:
        for i in range(c):
            rest = ~met & (y == i)
            mean = (A * rest).sum(1) / np.maximum(rest.sum(1), 1)
            A = np.where(rest, mean[:, None], A)
    weights = np.exp(-beta * (1 - A)) * (met | tail)
    return weights @ (np.eye(c)[y] if V is None else V.astype(np.float64))


def parts(index, f, met=None, *, tail=False, beta=None):
    """Return the text and cache logits of queries, over the keys in the mask ``met``, or over all keys."""
    own = index.settings
    values = None if index.values is None else index.values.numpy()
    alone = cache_logits(
        affinity(f, index.keys),
        index.class_ids.numpy(),
        len(index.class_names),
        own.beta if beta is None else beta,
        values,
        met,
        tail=tail,
    )
    return own.logit_scale * affinity(f, index.text_weights), alone


def solved(K, y, c, beta, ridge):
    """Return the values that answer the keys' own classes, up to the ridge of each key."""
    gram = np.exp(-beta * (1 - affinity(K, K))) + np.diag(np.broadcast_to(ridge, len(K)))
    return np.linalg.solve(gram, np.eye(c)[y])


def scatter(K, y):
    """Return the mean outer product of the keys around the means of their classes."""
    K = np.asarray(K).astype(np.float64)
    apart = K - np.stack([K[y == i].mean(0) for i in y])
    return apart.T @ apart / len(K)


def discriminant(f, K, y, c):
    """Return ``f M^T + b``, from the means of the classes. Classes without keys get the mean of the others."""
    f = f.astype(np.float64)
    K = K.astype(np.float64)
    counts = np.bincount(y, minlength=c)
    some = counts > 0
    means = (np.eye(c)[y].T @ K)[some] / counts[some, None]
    squares = (means**2).sum(1)
    variance = max(0.0, (counts[some] * (1 - squares)).sum() / max(len(y) - some.sum(), 1))
    found = np.empty((len(f), c))
    found[:, some] = f @ means.T - (squares - variance / counts[some]) / 2
    found[:, ~some] = found[:, some].mean(1, keepdims=True)
    return found


class Case:
    """Random queries ``f [q, d]``, keys ``K [n, d]`` of classes ``y [n]``, text weights ``W`` and values ``V [n, c]``.

    Each class ``i`` has ``counts[i]`` keys around its mean.
    """

    def __init__(
        self, seed, counts, q=7, d=12, *, half=False, off_sphere=False, shuffled=False, spread=0.7
    ):
        self.rng = rng = np.random.default_rng(seed)
        self.c = len(counts)
        self.y = np.repeat(np.arange(len(counts)), counts)
        if shuffled:
            self.y = rng.permutation(self.y)
        means = rng.standard_normal((self.c, d))
        self.K = unit(means[self.y] + spread * rng.standard_normal((len(self.y), d)))
        if off_sphere:
            self.K = self.K * rng.uniform(0.5, 1.6, size=(len(self.y), 1)).astype(np.float32)
        if half:
            self.K = self.K.astype(np.float16)
        self.f = unit(means[rng.integers(self.c, size=q)] + spread * rng.standard_normal((q, d)))
        self.W = unit(means + spread * rng.standard_normal(means.shape))
        self.V = rng.standard_normal((len(self.y), self.c)).astype(np.float32)

    @property
    def A(self):
        return affinity(self.f, self.K)

    @property
    def queries(self):
        return torch.from_numpy(self.f)

    def tensors(self, dtype=torch.float64):
        return (
            torch.from_numpy(self.f).to(dtype),
            torch.from_numpy(self.K).to(dtype),
            torch.from_numpy(self.y),
        )

    def totals(self, dtype=torch.float64):
        f, K, y = self.tensors(dtype)
        sums = torch.from_numpy(np.eye(self.c)[self.y].T).to(dtype) @ K
        return tip.Totals.of(f, sums, torch.bincount(y, minlength=self.c))

    def retrieved(self, k, dtype=torch.float64):
        """Return affinities, class ids and rows of the ``k`` nearest keys of each query."""
        f, K, y = self.tensors(dtype)
        near, rows = tip.affinity(f, K).topk(min(k, len(y)), dim=1)
        return near, y[rows], rows

    def logits(self, beta, V=None, met=None, *, tail=False):
        return cache_logits(self.A, self.y, self.c, beta, V, met, tail=tail)


def cases(*, least_d=2, least_q=1, **options):
    """Draw small cases, in which some classes have no keys."""
    counts = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)
    q = st.integers(least_q, 8)
    d = st.integers(least_d, 10)
    return st.builds(Case, st.integers(0, 2**32 - 1), counts, q, d, **options)


def shots_like_clip(c, shots, d, queries):
    """Return keys, their class ids, text weights and queries, with cosines like CLIP's."""
    maker = Made(c=c, d=d)
    ids = np.repeat(np.arange(c), shots)
    return maker.draw(ids, 1), ids, maker.text, maker.draw(maker.classes(queries, 2), 3)


class Largest(TorchDispatchMode):
    """Largest number of values in any tensor that torch returned inside the context."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return result
