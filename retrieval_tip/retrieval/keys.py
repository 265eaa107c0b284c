"""Compute cache logits over all keys or over whole classes, from keys that are grouped by class.

The computation is done in blocks, so that memory usage does not grow with the number of keys and queries. The blocks
reuse memory, because allocating a page of memory takes as long as computing the sums in it. See :mod:`tip` for the
formula.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import FloatArray, IntArray, KeyArray, slices
from retrieval_tip.errors import InputError, warn_once
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.retrieval.vector_index import (
    BY_CLASS,
    FLAT_FACTORY,
    VectorIndex,
    auto_factory,
    exact_search,
    flat_search,
)

QUERY_BLOCK, KEY_BLOCK = 512, 2048
"""Maximum number of queries and keys in a block of affinities. A block takes 4 MiB, which fits in the CPU cache."""

GPU_BLOCKS = 8
"""On a GPU, both block sizes are multiplied by this factor."""

GATHERED = 1 << 23
"""Maximum number of values to gather at a time if each query has its own keys. In float32, they take 32 MiB."""

FEW = 8
"""If there are more queries per class than this, the rows of the matrix product are queries instead of keys."""

SAMPLE = 256
"""Maximum number of keys in :meth:`KeyStream.sample`."""

_COPYING = threading.Lock()


def room_on(device: str) -> int:
    """Return the number of bytes that torch can allocate on a GPU, including memory that it has already reserved."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def auto_for(
    shape: tuple[int, int], dtype: npt.DTypeLike, n_classes: int, device: str
) -> tuple[str, int | None]:
    """Select the factory and k for keys on ``device`` (see :func:`vector_index.auto_factory`).

    If all keys fit in GPU memory, ``Flat`` is fastest.
    """
    if device != "cpu" and shape[0] * shape[1] * np.dtype(dtype).itemsize < room_on(device) // 2:
        return FLAT_FACTORY, None
    return auto_factory(shape[0], n_classes)


def transformed(metric: tip.Metric | None, keys: KeyArray, device: str) -> KeyArray | None:
    """Apply a metric to keys, and return the points in the dtype of the keys. Return ``None`` if there is no metric."""
    if metric is None:
        return None
    points = np.empty(keys.shape, dtype=keys.dtype)
    for rows in slices(len(keys), KEY_BLOCK):
        block = torch.from_numpy(np.array(keys[rows], dtype=np.float32))
        points[rows] = metric(block.to(device)).cpu().numpy()
    return points


class KeyStream(ABC):
    """Base class for the keys of an index as queries meet them, read in blocks from any store.

    ``counts`` is the number of keys per class, as a float32 tensor. If there is a ``metric``, the keys are ``phi(K)``,
    and queries are compared as ``phi(f)``. Without a metric, ``phi`` returns its argument. ``values``, of shape
    ``[n, c]``, replace the one-hot values. ``means`` is a function that returns the class means. If ``by_class`` is
    true, a search visits all keys of some classes.
    """

    index_type = FLAT_FACTORY

    def __init__(
        self,
        shape: tuple[int, int],
        counts: Tensor,
        device: str,
        metric: tip.Metric | None = None,
        values: Tensor | None = None,
        means: Callable[[], FloatArray] | None = None,
    ) -> None:
        self.n, self.d = shape
        self.counts = counts
        self.n_classes = len(counts)
        self.device = device
        self.metric = metric
        self.values = values
        self._known_means = means
        self.phi: Callable[[Tensor], Tensor] = metric or (lambda features: features)
        times = 1 if device == "cpu" else GPU_BLOCKS
        self.queries, self.block = QUERY_BLOCK * times, min(self.n, KEY_BLOCK * times)

    @property
    def by_class(self) -> bool:
        return self.index_type == BY_CLASS

    @abstractmethod
    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield blocks of float32 keys, their class ids and their row numbers, on the device.

        Each block is grouped by class and has at most :data:`KEY_BLOCK` keys, or :data:`GPU_BLOCKS` times as many on a
        GPU. Blocks may share memory, so do not keep them.
        """

    @cached_property
    def mean_count(self) -> float:
        """Mean number of keys per class. Empty classes are not counted."""
        return self.n / int((self.counts > 0).sum())

    @cached_property
    def sums(self) -> Tensor:
        """Sum of the keys in each class, of shape ``[c, d]``. It is needed to compute the tail."""
        if self._known_means is not None:
            return self.means * self.counts[:, None]
        return self.class_sums(self.blocks(), self.d)

    @cached_property
    def means(self) -> Tensor:
        """Mean of the keys in each class, of shape ``[c, d]``. It is not normalised, and is 0 for empty classes."""
        if self._known_means is not None:
            return torch.from_numpy(self._known_means()).to(self.device)
        return self.sums / self.counts.clamp_min(1)[:, None]

    @cached_property
    def discriminant(self) -> tip.Discriminant:
        """The discriminant of the class means."""
        return tip.Discriminant.of(self.sums, self.counts)

    def class_sums(self, blocks: Iterable[Sequence[Tensor]], columns: int) -> Tensor:
        """Sum blocks of rows per class in float64, and return the sums as float32."""
        sums = torch.zeros(self.n_classes, columns, dtype=torch.float64, device=self.device)
        for rows, ids, *_ in blocks:
            if self.device != "cpu":  # on a GPU, the loop below would launch a kernel per class
                tip.add_rows(sums, ids, rows.double())
                continue
            present, counts = ids.unique_consecutive(return_counts=True)
            if len(rows) < 16 * len(present):
                sums.index_add_(0, ids, rows.double())
                continue
            for class_id, class_rows in zip(
                present.tolist(), rows.split(counts.tolist()), strict=True
            ):  # 6 times faster
                sums[class_id] += class_rows.sum(0, dtype=torch.float64)
        return sums.float()

    @abstractmethod
    def of_classes(self, class_ids: IntArray) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield blocks with the position of their class in ``class_ids``, its keys and their row numbers.

        ``class_ids`` must be in ascending order. There may be several blocks per class. See :meth:`blocks`.
        """

    @abstractmethod
    def nearest(self, points: Tensor, k: int) -> Nearest:
        """Find the ``k`` nearest keys of each query. Affinities are exact, even if the index is compressed."""

    def nearest_by_class(self, points: Tensor, k: int) -> Nearest:
        """Find the ``k`` nearest keys of each query among the classes with the nearest means.

        These classes hold about ``4 k`` keys.
        """
        k = min(k, self.n)
        number = min(self.n_classes, max(8, round(4 * k / self.mean_count)))
        near = exact_search(self.means, points, number)[1]
        # The nearest classes may be empty or small.
        while number < self.n_classes and (self.counts[near].sum(1) < k).any():
            number = min(self.n_classes, 4 * number)
            near = exact_search(self.means, points, number)[1]
        return self.nearest_of_classes(points, near, k)

    def nearest_of_classes(self, points: Tensor, classes: Tensor, k: int) -> Nearest:
        """Find the ``k`` nearest keys of each query within its own ``classes``, where -1 stands for no class."""
        best = Nearest(
            points.new_full((len(points), k), -torch.inf),
            torch.full((len(points), k), -1, device=self.device),
            torch.full((len(points), k), self.n_classes, device=self.device),
        )
        ids, order = classes.reshape(-1).sort()
        asked, counts = ids.unique_consecutive(return_counts=True)
        queries = (order // max(1, classes.shape[1])).split(counts.tolist())
        if len(asked) and asked[0] < 0:
            asked, queries = asked[1:], queries[1:]
        for place, keys, rows in self.of_classes(asked.cpu().numpy()):
            for query in queries[place].split(QUERY_BLOCK):
                affinity, near = tip.affinity(points[query], keys).topk(min(k, len(keys)), dim=1)
                candidates = Nearest(affinity, rows[near], asked[place].expand(near.shape))
                both = Nearest.joined([best.queries(query), candidates], dim=1)
                best.put(query, both.at(both.affinity.topk(k, dim=1).indices))
        # Until now, -inf has kept empty slots last.
        return best._replace(affinity=best.affinity.masked_fill(best.rows < 0, 0))

    @property
    def value_sums(self) -> Tensor:
        """Per-class sums of the values, of shape ``[c, c]``. They are needed to compute the tail."""
        raise NotImplementedError

    def described(self, affinity: Tensor, rows: Tensor) -> Nearest:
        """Look up the class ids of keys by row. Empty slots get the class id ``c`` and affinity 0."""
        raise NotImplementedError

    def class_logits(
        self, features: Tensor, classes: Tensor, candidates: Tensor, beta: float
    ) -> Tensor:
        """Compute the exact cache logits of each query for its own ``classes``, all of shape ``[q, p]``.

        Where ``candidates`` is false, the logit is 0 and no key is read.
        """
        query, slot = candidates.nonzero(as_tuple=True)
        ids, order = classes[query, slot].sort()
        query, slot = query[order], slot[order]
        sums = features.new_zeros(len(ids))
        groups, counts = ids.unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        ends = counts.cumsum(0).tolist()
        # At least one key at a time must fit, with all queries of its class.
        memory = features.new_empty(max([QUERY_BLOCK * KEY_BLOCK, *sizes]))
        for place, block, _ in self.of_classes(groups.cpu().numpy()):
            size = sizes[place]
            pairs = slice(ends[place] - size, ends[place])
            queries = features[query[pairs]]
            for keys in block.float().split(max(1, len(memory) // size)):
                rows, columns = (keys, queries) if size <= FEW else (queries, keys)
                affinity = tip.affinity(
                    rows, columns, out=memory[: size * len(keys)].view(len(rows), len(columns))
                )
                sums[pairs] += tip.weight(affinity, beta, out=affinity).sum(0 if size <= FEW else 1)
        logits = features.new_zeros(classes.shape)
        logits[query, slot] = sums
        return logits

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return at most :data:`SAMPLE` evenly spaced keys, and their class ids."""
        raise NotImplementedError

    def cache_logits(self, points: Tensor, beta: float) -> Tensor:
        """Compute cache logits over all keys, ``C[:, c] = sum over i of exp(-beta (1 - A[:, i])) V_ic``.

        ``points`` must be on the device, and their dtype is the dtype of the sums. The result has the shape ``[q, c]``.
        """
        values = self.values
        parts = []
        memory = points.new_empty(self.block * min(self.queries, len(points)))
        for queries in points.split(self.queries):
            row = 0
            sums = points.new_zeros(self.n_classes, len(queries))  # transposed: contiguous memory
            for keys, ids, *_ in self.blocks():
                affinity = memory[: len(keys) * len(queries)].view(len(keys), len(queries))
                tip.affinity(keys.to(queries.dtype), queries, out=affinity)
                weights = tip.weight(affinity, beta, out=affinity)
                if values is None:
                    tip.add_rows(sums, ids, weights)
                else:
                    sums.T.addmm_(weights.T, values[row : row + len(ids)].to(queries.dtype))
                row += len(ids)
            parts.append(sums.T)
        return torch.cat(parts)


class Keys(KeyStream):
    """Keys that are in memory or memory-mapped, in float32 or float16, and grouped by class.

    Raises InputError if the class ids are not in ascending order.
    """

    def __init__(
        self,
        array: KeyArray,
        class_ids: IntArray,
        n_classes: int,
        device: str = "cpu",
        index: VectorIndex | None = None,
        metric: tip.Metric | None = None,
        values: Tensor | None = None,
    ) -> None:
        if len(class_ids) != len(array) or (class_ids[1:] < class_ids[:-1]).any():
            raise InputError("labels: keys are not grouped by class; build the index again")
        self.array = array
        self.index = index
        means = None
        if index is not None:
            self.index_type = index.factory
            means = index.vectors if index.by_class else None
            if index.n != (n_classes if index.by_class else len(array)):
                raise InputError(
                    f"index: has {index.n} vectors for {len(array)} keys of {n_classes} classes"
                )
        counts = np.bincount(class_ids, minlength=n_classes)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.class_ids = torch.from_numpy(np.require(class_ids, np.int64, ["W"])).to(
            device
        )  # Arrow's is read-only
        total = torch.from_numpy(counts.astype(np.float32)).to(device)
        super().__init__(
            (int(array.shape[0]), int(array.shape[1])), total, device, metric, values, means
        )
        self._numbers = torch.arange(self.n, device=device)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        ready = self.held.dtype == torch.float32 and self.held.is_cpu == (self.device == "cpu")
        converted = torch.empty(0 if ready else self.block, self.d, device=self.device)
        columns = (
            column.split(self.block) for column in (self.held, self.class_ids, self._numbers)
        )
        for keys, ids, numbers in zip(*columns, strict=True):
            yield keys if ready else converted[: len(keys)].copy_(keys), ids, numbers

    @cached_property
    def held(self) -> Tensor:
        """All keys as one tensor, which is on a GPU if it fits in half of its free memory."""
        with _COPYING:  # another thread may be faster
            return self._held

    @cached_property
    def _held(self) -> Tensor:
        held = torch.from_numpy(np.asarray(self.array))
        if self.device == "cpu":
            return held
        if held.nbytes < room_on(self.device) // 2:
            return held.to(self.device)
        warn_once(f"{self.device}: keys exceed half of its free memory, so each call copies them")
        return held

    def nearest(self, points: Tensor, k: int) -> Nearest:
        """Without an index, all keys are compared. On a GPU, this is also faster than an index over classes."""
        if self.index is None and self.device == "cpu" and self.array.dtype == np.float32:
            return self.described(*flat_search(self.array, points, min(k, self.n)))
        if self.index is None or (self.by_class and not self.held.is_cpu):
            return self.described(*exact_search(self.held, points, min(k, self.n)))
        if self.by_class:
            return self.nearest_by_class(points, k)
        affinity, rows = self.index.search_tensor(points, k)
        if not self.index.exact_affinity:
            affinity = self.affinity(points, rows)
        return self.described(affinity, rows)

    def described(self, affinity: Tensor, rows: Tensor) -> Nearest:
        empty = rows < 0
        ids = self.class_ids[rows.clamp_min(0)].masked_fill_(empty, self.n_classes)
        return Nearest(affinity.masked_fill(empty, 0), rows, ids)

    @cached_property
    def value_sums(self) -> Tensor:
        assert self.values is not None
        blocks = zip(self.values.split(KEY_BLOCK), self.class_ids.split(KEY_BLOCK), strict=True)
        return self.class_sums(blocks, self.n_classes)

    def of_classes(self, class_ids: IntArray) -> Iterator[tuple[int, Tensor, Tensor]]:
        for place, class_id in enumerate(class_ids.tolist()):
            first, last = self.starts[class_id : class_id + 2].tolist()
            for start in range(first, last, self.block):
                rows = slice(start, min(start + self.block, last))
                yield place, self.held[rows].to(self.device), self._numbers[rows]

    def affinity(self, features: Tensor, rows: Tensor) -> Tensor:
        """Return the affinities between each query and the keys at its own ``rows``. The affinity of row -1 is 0."""
        step = max(1, GATHERED // max(1, rows.shape[1] * features.shape[1]))
        blocks = zip(features.split(step), rows.clamp_min(0).split(step), strict=True)
        affinity = torch.cat(
            [
                torch.einsum("qd,qkd->qk", queries, self._gathered(near_rows))
                for queries, near_rows in blocks
            ]
        )
        return affinity.masked_fill_(rows < 0, 0)

    def _gathered(self, rows: Tensor) -> Tensor:
        return self.held[rows.to(self.held.device)].to(self.device).float()

    def sample(self) -> tuple[Tensor, Tensor]:
        number = min(self.n, SAMPLE)
        # From 16,777,220 keys on, float32 would round the last row to n.
        places = torch.linspace(0, self.n - 1, number, dtype=torch.float64, device=self.device)
        rows = places.long()
        return self._gathered(rows), self.class_ids[rows]
