"""Keys in several processes, each with a part of them in FAISS's memory, that answer together as one exact index.

Ray places the processes and starts one that died again, which then reads its part from the index folder anew. What is
written here is how their answers become one: neighbours are merged by affinity, sums by class are added.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.classifier import Classifier
from retrieval_tip.distributed.cluster import connected
from retrieval_tip.errors import RetrievalTipError, StoreError, UsageError, counted, first_line
from retrieval_tip.retrieval.keys import Keys, KeyStream
from retrieval_tip.retrieval.logits import Nearest, Retrieval, slices
from retrieval_tip.retrieval.segments import joined, runs, segments_of
from retrieval_tip.retrieval.vector_index import VectorIndex, faiss
from retrieval_tip.store import folder as store
from retrieval_tip.store.manifest import DataFile, Manifest

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Origin = tuple[str, int]
"""Where an answer is from: the digest of a shard's keys, and its process."""

BLOCK_BYTES = 1 << 24
"""Of queries that are asked at a time, and of what one shard answers: Ray's shared memory may be small."""
IN_FLIGHT = 2
"""Blocks of queries that the shards have at a time: they do not wait while answers are merged."""
PATIENCE = 120.0
"""Seconds without an answer after which it is said: a shard that ends whenever it starts is started for ever."""
READ_ROWS = 1 << 16
"""Keys that a shard reads at a time."""


def merged(parts: Sequence[tuple[FloatArray, IntArray]], k: int) -> tuple[FloatArray, IntArray]:
    """The ``k`` nearest of what was found in parts: affinities ``[q, k]`` float32, largest first, and rows, int64.

    Each part has affinities and rows ``[q, k_i]``, of rows that no other part has. Of equal affinities the lowest row
    comes first. Empty slots, row -1, come last and have the affinity that FAISS gives them, the least there is. Where
    the parts have fewer than ``k`` columns together, so has the answer.
    """
    affinity, rows = (np.hstack(column) for column in zip(*parts, strict=True))
    empty = rows < 0
    order = np.lexsort((rows, np.where(empty, np.inf, -affinity)), axis=1)[:, :k]
    affinity = np.where(empty, np.finfo(np.float32).min, affinity)
    return np.take_along_axis(affinity, order, 1), np.take_along_axis(rows, order, 1)


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a file of keys: first ``counts[0]`` of class ``classes[0]``, and so on."""

    file: DataFile
    start: int
    stop: int
    classes: IntArray
    counts: IntArray

    def __len__(self) -> int:
        return self.stop - self.start


def plan(files: Sequence[DataFile], class_ids: IntArray, shards: int) -> list[list[Piece]]:
    """What each of ``shards`` shards holds: as many keys as every other, or one more, in the order of the keys.

    ``files`` are those of the segments, ``class_ids`` ``[n]`` int64 the classes of all their keys. There are no more
    shards than keys.
    """
    n, shards = len(class_ids), min(shards, len(class_ids))
    bounds = [n * i // shards for i in range(shards + 1)]
    found: list[list[Piece]] = [[] for _ in range(shards)]
    at = 0
    for file in files:
        for own, first, last in zip(found, bounds[:-1], bounds[1:], strict=True):
            start, stop = max(first, at), min(last, at + file.rows)
            if start < stop:
                classes, counts = np.unique(class_ids[start:stop], return_counts=True)
                own.append(Piece(file, start - at, stop - at, classes, counts))
        at += file.rows
    return found


@dataclass(frozen=True)
class _Held:
    """What a shard has in memory, once: FAISS's vectors ``[m, d]``, of which ``keys`` is a view.

    The classes of the keys are counted from ``first``; ``digest`` is the SHA-256 of their values.
    """

    index: VectorIndex
    keys: Keys
    first: int
    digest: str


class Shard:
    """The keys of one part, in a process of its own: an actor of Ray.

    Every answer begins with where it is from, so that a shard that came back with other keys is noticed. Where the keys
    cannot be read every call raises StoreError; the next one tries again.
    """

    def __init__(self, folder: Path, pieces: Sequence[Piece], d: int, threads: int) -> None:
        self._folder, self._pieces, self._d = folder, pieces, d
        torch.set_num_threads(threads)
        faiss().omp_set_num_threads(threads)
        with suppress(RetrievalTipError):  # raised here it would end the actor, and the reason would be lost
            _ = self._held

    @cached_property
    def _held(self) -> _Held:
        index = faiss().IndexFlatIP(self._d)
        for piece in self._pieces:
            store.check_file(self._folder, piece.file, "fast")
            rows = store.read_array(self._folder, piece.file, (piece.file.rows, self._d))[piece.start : piece.stop]
            for part in runs(rows, READ_ROWS):
                self._add(index, rows[part])
        vectors = faiss().rev_swig_ptr(index.get_xb(), int(index.ntotal) * self._d).reshape(-1, self._d)
        first = min(int(piece.classes[0]) for piece in self._pieces)
        last = max(int(piece.classes[-1]) for piece in self._pieces)
        ids = np.concatenate([np.repeat(piece.classes - first, piece.counts) for piece in self._pieces])
        parts = np.split(vectors, np.cumsum([len(piece) for piece in self._pieces])[:-1])
        keys = Keys(joined(parts), ids, last - first + 1)
        return _Held(VectorIndex(index, "Flat", "cpu"), keys, first, hashlib.sha256(vectors).hexdigest())

    def _add(self, index: Any, rows: npt.NDArray[Any]) -> None:
        try:
            index.add(np.ascontiguousarray(rows, dtype=np.float32))
        except (RuntimeError, MemoryError):
            raise StoreError(f"{self._folder}: a shard's keys have no room in its machine's memory; use more") from None

    def origin(self) -> tuple[Origin]:
        """Where its answers are from; it has read its keys by then."""
        return ((self._held.digest, os.getpid()),)

    def search(self, features: FloatArray, k: int) -> tuple[Origin, FloatArray, IntArray]:
        """As :meth:`VectorIndex.search`, of the shard's own rows."""
        return *self.origin(), *self._held.index.search(features, k)

    def sums(self) -> tuple[Origin, int, FloatArray]:
        """The first of its classes, and the sums of its keys of that and the following ones, ``[p, d]``."""
        return *self.origin(), self._held.first, self._held.keys.sums.numpy()

    def cache_logits(self, features: FloatArray, beta: float) -> tuple[Origin, int, FloatArray]:
        """The first of its classes, and its part of the cache logits of that and the following ones, ``[q, p]``."""
        queries = torch.tensor(features)  # a copy: shared memory may not be written
        return *self.origin(), self._held.first, self._held.keys.cache_logits(queries, beta).numpy()


class ShardedIndex:
    """Keys ``[n, d]`` that are held by actors of Ray, a part each: search of the nearest, and sums over classes.

    :func:`sharded` makes it. Every question raises StoreError where a shard that had to be started again finds its file
    missing or changed, and where the shards were closed.
    """

    def __init__(self, ray: Any, folder: Path, plans: Sequence[Sequence[Piece]], d: int) -> None:
        """Start the shards, and return when each has read its keys.

        Raises UsageError where the cluster has too little memory, StoreError for a file that is not as it was written.
        """
        self._ray, self._folder, self.d = ray, folder, d
        self._rows = np.cumsum([0, *(sum(map(len, pieces)) for pieces in plans)])
        self.n = int(self._rows[-1])
        sizes = [4 * d * number for number in np.diff(self._rows).tolist()]
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        check_room(sizes, [int(node.get("memory", 0)) for node in nodes])
        threads = max(1, int(sum(node.get("CPU", 0) for node in nodes)) // len(plans))
        forever = {"max_restarts": -1, "max_task_retries": -1}
        actor = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", **forever)(Shard)
        self._shards = [
            actor.options(memory=size).remote(folder, pieces, d, threads)
            for size, pieces in zip(sizes, plans, strict=True)
        ]
        self._origins: list[Origin | None] = [None] * len(plans)
        try:
            self.processes()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the shards."""
        for shard in self._shards:
            self._ray.kill(shard, no_restart=True)

    def processes(self) -> list[int]:
        """The process of each shard, by its id on its machine."""
        self._answers([shard.origin.remote() for shard in self._shards])
        return [origin[1] for origin in self._origins if origin is not None]

    def search(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Affinities ``[q, k]`` float32, largest first, and rows ``[q, k]`` int64 of the k nearest of all keys.

        ``features`` ``[q, d]`` float32. It is what one ``Flat`` index over all keys finds (rounding aside: its last bit
        is the processor's); of equal affinities the lowest row comes first. ``k`` is cut to the number of keys.
        """
        k = int(min(k, self.n))
        affinity = np.empty((len(features), k), dtype=np.float32)
        rows = np.empty((len(features), k), dtype=np.int64)
        for part, answers in self._asked("search", features, 12 * k, k):
            offsets = self._rows[:-1].tolist()
            found = [(near, np.where(own < 0, own, own + at)) for (near, own), at in zip(answers, offsets, strict=True)]
            affinity[part], rows[part] = merged(found, k)
        return affinity, rows

    def cache_logits(self, features: FloatArray, beta: float, n_classes: int) -> FloatArray:
        """Cache logits ``[q, c]`` float32 of queries ``[q, d]`` over every key: :meth:`keys.KeyStream.cache_logits`."""
        out = np.zeros((len(features), n_classes), dtype=np.float32)
        for part, answers in self._asked("cache_logits", features, 4 * n_classes, beta):
            for first, found in answers:
                out[part, first : first + found.shape[1]] += found
        return out

    def sums(self, n_classes: int) -> FloatArray:
        """Sum of the keys of each class ``[c, d]`` float32, those of the shards added in float64."""
        total = np.zeros((n_classes, self.d))
        for first, found in self._answers([shard.sums.remote() for shard in self._shards]):
            total[first : first + len(found)] += found
        return total.astype(np.float32)

    def _asked(
        self, method: str, features: FloatArray, width: int, argument: float
    ) -> Iterator[tuple[slice, list[tuple[Any, ...]]]]:
        """What every shard answers, for some queries at a time; an answer has ``width`` bytes a query at most."""
        size = max(1, BLOCK_BYTES // max(width, 4 * self.d))
        waiting: deque[tuple[slice, list[Any]]] = deque()
        for part in slices(len(features), size):
            block = self._ray.put(np.ascontiguousarray(features[part], dtype=np.float32))  # once, for all shards
            waiting.append((part, [getattr(shard, method).remote(block, argument) for shard in self._shards]))
            if len(waiting) == IN_FLIGHT:
                first, calls = waiting.popleft()
                yield first, self._answers(calls)
        for part, calls in waiting:
            yield part, self._answers(calls)

    def _answers(self, calls: list[Any]) -> list[tuple[Any, ...]]:
        """What the shards answer, in their order; raises what they raise."""
        try:
            _, late = self._ray.wait(calls, num_returns=len(calls), timeout=PATIENCE)
            if late:
                log.warning(
                    "%d of %d shards did not answer in %.0f s: they work, read their keys again, or wait for room "
                    "(ray status and ray list actors say which)", len(late), len(calls), PATIENCE,
                )  # fmt: skip
            found = self._ray.get(calls)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RetrievalTipError):
                raise error.cause from None
            raise StoreError(f"{self._folder}: a shard failed ({first_line(error.cause or error)})") from None
        except self._ray.exceptions.RayError as error:
            raise StoreError(f"{self._folder}: a shard is gone ({first_line(error)}); open the index again") from None
        for number, (origin, *_) in enumerate(found):
            before = self._origins[number] or origin
            if origin[0] != before[0]:
                raise StoreError(
                    f"{self._folder}: the keys of shard {number} are not those that it had when it was opened; "
                    "restore them, go back to a version before it, or build the index again"
                )
            if origin[1] != before[1]:
                log.warning("shard %d was started again: its process %d had ended", number, before[1])
            self._origins[number] = origin
        return [tuple(answer) for _, *answer in found]


def check_room(sizes: Sequence[int], memories: Sequence[int]) -> None:
    """Raise UsageError where shards of these bytes would wait for ever for machines of these ``memories``."""
    if max(sizes) > max(memories, default=0) or sum(sizes) > sum(memories):
        raise UsageError(
            f"shards are {len(sizes)}: the keys take {sum(sizes) / 1e9:,.1f} GB, {max(sizes) / 1e9:,.1f} GB a "
            f"shard; the Ray cluster has {counted(len(memories), 'machine')} with {sum(memories) / 1e9:,.1f} GB for "
            "its work together; give more shards, or add machines"
        )


class ShardedKeys(KeyStream):
    """Keys that are in shards; only :meth:`blocks` reads them here, from the index folder."""

    def __init__(self, cache: CacheModel, index: ShardedIndex) -> None:
        super().__init__((cache.n, cache.d), cache.retrieval.keys.counts, cache.device)
        self._cache, self._index = cache, index

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`KeyStream.blocks`, from the folder."""
        return self._cache.key_blocks()

    @cached_property
    def sums(self) -> Tensor:
        """Sum of the keys of each class ``[c, d]``, added up by the shards."""
        return torch.from_numpy(self._index.sums(self.n_classes)).to(self.device)

    def cache_logits(
        self, features: Tensor, beta: float, values: Tensor | None = None, products: torch.dtype | None = None
    ) -> Tensor:
        """Cache logits ``[q, c]`` over every key, by the shards; their products are float32, whatever is asked for."""
        found = self._index.cache_logits(features.cpu().numpy(), beta, self.n_classes)
        return torch.from_numpy(found).to(features.device)


@dataclass(frozen=True, kw_only=True)
class ShardRetrieval(Retrieval):
    """Of keys in shards; ``class_ids`` ``[n]`` int64 are those of all keys."""

    index: ShardedIndex
    class_ids: Tensor

    def nearest(self, features: Tensor, k: int) -> Nearest:
        """The ``k`` nearest keys of each query: affinities float32, rows int64, class ids, ``[q, k]`` each."""
        affinity, rows = (torch.from_numpy(x).to(features.device) for x in self.index.search(features.cpu().numpy(), k))
        empty = rows < 0
        ids = self.class_ids[rows.clamp_min(0)].masked_fill_(empty, self.keys.n_classes)
        return Nearest(affinity.masked_fill(empty, 0), rows, ids)


class ShardedCache(Classifier):
    """The classifier of an index folder, whose keys are in shards; it answers, and cannot be changed.

    Settings are its own. Make it with :func:`sharded`.
    """

    def __init__(self, cache: CacheModel, index: ShardedIndex) -> None:
        for name in Classifier.__annotations__:
            setattr(self, name, getattr(cache, name))
        self.index, self._cache, self._keys = index, cache, ShardedKeys(cache, index)

    @property
    def n(self) -> int:
        """Number of keys."""
        return self.index.n

    @property
    def d(self) -> int:
        """Length of a feature."""
        return self.index.d

    @property
    def dtype(self) -> str:
        """Of the stored keys; shards hold them as float32."""
        return self._cache.dtype

    @property
    def retrieval(self) -> ShardRetrieval:
        """What finds the keys, with the settings as they are now."""
        return ShardRetrieval(
            keys=self._keys,
            index=self.index,
            class_ids=self._cache.class_ids,
            text_weights=self.text_weights,
            settings=self.settings,
        )

    @property
    def index_type(self) -> str:
        """``Flat``, whatever the index of the folder is."""
        return "Flat"

    @property
    def exact_search(self) -> bool:
        """The nearest keys are always found."""
        return True

    @property
    def manifest(self) -> Manifest | None:
        """That of the version that this was loaded from."""
        return self._cache.manifest

    @property
    def place(self) -> str | None:
        """Folder that this was loaded from."""
        return self._cache.place

    def reload(self) -> ShardedCache:
        """Itself. Raises UsageError where there is a newer version: shards hold the one that they were opened with."""
        if self._cache.reload() is not self._cache:
            raise UsageError(f"{self.place}: has a newer version; close the shards and open it again")
        return self

    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Columns of the label store of some keys, by row ``[m]``."""
        return self._cache.described(rows, columns)

    def every_row(self) -> npt.NDArray[np.int64]:
        """The rows of all keys ``[n]``."""
        return self._cache.every_row()

    def some(self, m: int) -> tuple[npt.NDArray[Any], pa.Table]:
        """See :meth:`classifier.Classifier.some`."""
        return self._cache.some(m)

    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        """See :meth:`classifier.Classifier.find`."""
        return self._cache.find(labels, source, key_ids)


@contextmanager
def sharded(cache: CacheModel, shards: int, address: str | None = None) -> Iterator[ShardedCache]:
    """The classifier ``cache``, loaded from a folder, with its keys in ``shards`` actors of Ray, as long as the block.

    Each actor reads its part of the keys from the folder, which every machine of the cluster must have under the same
    path, into a ``Flat`` index of its own; here none is read. The answers are those of ``cache`` with a ``Flat`` index,
    with as many keys as are asked for, rounding aside. An actor that dies is started again, and answers what it was
    asked; meanwhile the question waits. ``address`` is that of a cluster, by default a Ray is started here
    (:func:`cluster.connected`).

    Raises UsageError without Ray, where the cluster has too little memory, or for a cache that was fine-tuned with
    values or does not hold just what its folder does; StoreError for a file that is not as it was written.
    """
    if shards < 1:
        raise UsageError(f"shards is {shards}: at least 1 has to hold the keys")
    if cache.values is not None:
        raise UsageError(
            "shards: this index was fine-tuned with values, what each key gives to every class, and shards hold none; "
            "use it without shards"
        )
    folder, files = _files_of(cache)
    plans = plan(files, cache.class_ids.cpu().numpy(), shards)
    with connected(address) as ray:
        index = ShardedIndex(ray, folder, plans, cache.d)
        try:
            yield ShardedCache(cache, index)
        finally:
            index.close()


def _files_of(cache: CacheModel) -> tuple[Path, list[DataFile]]:
    """The folder and the files that the keys of a cache are mapped from."""
    if cache.folder is not None and cache.manifest is not None:
        folder = cache.folder.resolve()
        files = [segment.keys for segment in cache.manifest.segments]
        mapped = [getattr(part, "filename", None) for part in segments_of(cache.keys)]
        if mapped == [folder / file.name for file in files]:
            return folder, files
    raise UsageError(
        "shards: they read the keys from an index folder, and this index has others, for it was never saved, was "
        "changed since it was loaded, or is a part of one; load it from its folder"
    )
