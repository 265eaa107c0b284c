"""Read the keys of a LanceDB table for queries.

A query can read all keys in blocks, the keys of a few classes, or the nearest keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.data.shots import spread
from retrieval_tip.errors import StoreError
from retrieval_tip.lance.key_table import CLASSES, FLAT, ROW, IntArray, KeyArray, KeyTable
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.retrieval.keys import SPREAD_CLASSES, SPREAD_KEYS, SPREAD_QUERIES, KeyStream
from retrieval_tip.retrieval.vector_index import Product

HELD_BYTES = 1 << 29
"""Maximum size in bytes of keys that stay in memory after the first read."""
PIECE = 1 << 26
"""Maximum size in bytes of the float32 keys of several classes that are read together."""
SPREAD_BYTES, SPREAD_LEAST = 1 << 28, 8
"""Maximum size in bytes of the sample for :meth:`KeyStream.slack`, and its minimum number of queries."""


class LanceKeys(KeyStream):
    """The keys of a table or their points, with their ``counts`` and ``sums`` per class.

    ``kind`` is the type of the table's index.
    """

    def __init__(
        self, table: KeyTable, counts: IntArray, sums: npt.NDArray[np.float64], kind: str, device: str,
        metric: tip.Metric | None,
    ) -> None:  # fmt: skip
        total = torch.from_numpy(counts.astype(np.float32)).to(device)
        super().__init__((int(counts.sum()), sums.shape[1]), total, device, metric)
        self.table, self._column, self._sums, self._counts = table, table.vector_column, sums, counts
        self.index_type = kind
        self.by_class, self.exact_search = kind == CLASSES, kind == FLAT

    @cached_property
    def sums(self) -> Tensor:
        """Per-class sums of the keys, of shape ``[c, d]``."""
        return torch.from_numpy(self._sums.astype(np.float32)).to(self.device)

    @cached_property
    def _held(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(self._read())

    def _read(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        n_read = 0
        for batch in self.table.scan(["class_id", self._column], with_rows=True):
            ids = self.table.class_ids(batch["class_id"], self.n_classes)
            keys, rows = self.table.matrix(batch[self._column]), batch[ROW].to_numpy().astype(np.int64)
            if (ids[1:] < ids[:-1]).any():
                order = np.argsort(ids, kind="stable")
                keys, ids, rows = keys[order], ids[order], rows[order]
            for start in range(0, len(ids), self.block):
                part = slice(start, start + self.block)
                block = (np.array(keys[part], dtype=np.float32), ids[part].copy(), rows[part].copy())
                yield tuple(torch.from_numpy(array).to(self.device) for array in block)  # type: ignore[misc]
            n_read += len(ids)
        if n_read != self.n:
            raise StoreError(f"{self.table.address}: has {n_read} rows instead of {self.n}; use another version")

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return iter(self._held) if self.n * self.d * 4 <= HELD_BYTES else self._read()

    def of_classes(self, class_ids: IntArray) -> Iterator[tuple[int, Tensor, Tensor]]:
        """See :meth:`keys.KeyStream.of_classes`.

        Small classes are read together, up to :data:`PIECE` bytes. The blocks of a larger class share a buffer.
        """
        counts, most = self._counts[class_ids], PIECE // (4 * self.d)
        ends, start = np.cumsum(counts), 0
        memory = np.empty((min(most, int(counts.sum())), self.d), dtype=np.float32)
        while start < len(class_ids):
            stop = int(np.searchsorted(ends, ends[start] - counts[start] + most, side="right"))
            if stop <= start:
                yield from ((start, keys, rows) for keys, rows in self._large(class_ids[start]))
            else:
                found = self._small(class_ids[start:stop], counts[start:stop], memory)
                yield from ((start + place, keys, rows) for place, keys, rows in found)
            start = max(stop, start + 1)

    def _large(self, class_id: int) -> Iterator[tuple[Tensor, Tensor]]:
        n_read = 0
        for _, keys, rows in self._batches([class_id]):
            yield self._tensors(np.array(keys, dtype=np.float32), rows)
            n_read += len(keys)
        self._check(n_read == self._counts[class_id])

    def _small(
        self, class_ids: IntArray, counts: IntArray, memory: npt.NDArray[np.float32]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each class with its position, keys and row numbers. The keys are written to ``memory``."""
        firsts, read = np.cumsum(counts) - counts, np.zeros_like(counts)
        held, numbers = memory[: counts.sum()], np.empty(counts.sum(), dtype=np.int64)
        for ids, keys, rows in self._batches(class_ids.tolist()):
            own = np.searchsorted(class_ids, ids)
            order, found = np.argsort(own, kind="stable"), np.bincount(own, minlength=len(counts))
            self._check((read + found <= counts).all())
            places = np.repeat(firsts + read - (np.cumsum(found) - found), found) + np.arange(len(own))
            held[places], numbers[places] = keys[order], rows[order]
            read += found
        self._check((read == counts).all())
        every, every_row = self._tensors(held, numbers)
        for place in np.flatnonzero(counts).tolist():
            part = slice(int(firsts[place]), int(firsts[place] + counts[place]))
            yield place, every[part], every_row[part]

    def _batches(self, class_ids: Sequence[int]) -> Iterator[tuple[IntArray, KeyArray, IntArray]]:
        for batch in self.table.scan(["class_id", self._column], "class_id", class_ids, with_rows=True):
            if len(batch):
                rows = batch[ROW].to_numpy().astype(np.int64)
                yield batch["class_id"].to_numpy(), self.table.matrix(batch[self._column]), rows

    def _check(self, whole: bool | np.bool_) -> None:
        if not whole:
            raise StoreError(f"{self.table.address}: its keys do not match the manifest; check it with index verify")

    def _tensors(self, keys: npt.NDArray[np.float32], numbers: IntArray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(keys).to(self.device), torch.from_numpy(numbers).to(self.device)

    def _sample(self) -> tuple[Tensor, Tensor]:
        number, key = SPREAD_QUERIES, 4 * self.d
        if self.n * key > SPREAD_BYTES:  # otherwise, all keys can be read cheaply
            number = int(np.clip(SPREAD_BYTES / (SPREAD_CLASSES * self.mean_count * key), SPREAD_LEAST, number))
        some = self.table.offsets(spread(self.n, number), ["class_id", self._column])
        keys = np.array(self.table.matrix(some[self._column]), dtype=np.float32)
        return self._tensors(keys, self.table.class_ids(some["class_id"], self.n_classes))

    def _spread(self, features: Tensor, classes: Tensor) -> Tensor:
        affinity = features.new_zeros(*classes.shape, SPREAD_KEYS)
        steps, asked = torch.arange(SPREAD_KEYS, device=self.device), classes.unique()
        for place, keys, _ in self.of_classes(asked.cpu().numpy()):
            query, slot = (classes == asked[place]).nonzero(as_tuple=True)
            affinity[query, slot] = tip.affinity(features[query], keys[len(keys) * steps // SPREAD_KEYS])
        return affinity

    def nearest(self, points: Tensor, k: int) -> Nearest:
        """Without an index, a query is compared with all keys."""
        k = min(k, self.n)
        if self.by_class:
            return self.nearest_by_class(points, k)
        if not self.exact_search:
            hits = self.table.search(points.cpu().numpy(), k, self.index_type)
            affinity, rows, ids = (torch.from_numpy(part).to(points.device) for part in hits)
            return Nearest(affinity, rows, ids.masked_fill_(rows < 0, self.n_classes))
        none = torch.empty(len(points), 0, dtype=torch.int64, device=self.device)
        best = Nearest(points.new_empty(len(points), 0), none, none)
        for keys, ids, rows in self.blocks():
            affinity, place = tip.affinity(points, keys).topk(min(k, len(keys)), dim=1)
            every = Nearest.joined([best, Nearest(affinity, rows[place], ids[place])], dim=1)
            best = every.at(every.affinity.topk(min(k, every.affinity.shape[1]), dim=1).indices)
        return best

    def _nearest_means(self, points: Tensor, number: int) -> Tensor:
        return Product(self.means).search(points, number)[1]
