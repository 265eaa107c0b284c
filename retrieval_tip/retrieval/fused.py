"""Sums by class over all keys on a GPU in two kernels: affinities and weights never leave the chip.

Keys are met in the order of their classes, each class filled up to whole runs of a few keys (:class:`Runs`). A program
of the first kernel takes a tile of queries and a tile of keys: it multiplies them, takes the exponential, adds up each
run in registers, and writes one number a run. The second adds the runs of each class, one after the other. No sum
depends on which program ends first, so the same question has the same answer, to the last bit, every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_RUN = 16
"""Keys of a run at most: as many as the field's largest number of shots."""

ALIKE = 8
"""Tiles of queries that meet a tile of keys one after the other, while it is in the GPU's cache."""


class Tiles(NamedTuple):
    """Queries, keys, and values of both that a program multiplies at a time, its warps, and loads under way."""

    queries: int
    keys: int
    values: int
    warps: int
    stages: int


FEW = 16
"""Queries up to which a tile holds as many: the keys are then read once, and nothing else takes time."""

TILES = {
    (torch.float16, True): Tiles(16, 128, 64, 4, 4),
    (torch.float32, True): Tiles(16, 64, 32, 4, 4),
    (torch.float16, False): Tiles(128, 128, 64, 8, 3),
    (torch.float32, False): Tiles(128, 64, 32, 8, 3),
}
"""By the dtype of features and keys, and whether there are few queries. None of them spills registers (test_fused)."""

WRITTEN = 1 << 28
"""Sums of runs that are in memory at a time: 1 GiB."""

ADDED = (64, 32)
"""Queries and classes of a program that adds runs."""


@dataclass(frozen=True)
class Runs:
    """Keys in the order of their classes, in runs of ``size``: what each class lacks to whole runs is empty.

    ``rows`` ``[r size]`` int32: the row of the key in each place, -1 where there is none. ``first`` ``[c + 1]`` int32:
    the runs of class ``c`` are ``first[c]:first[c + 1]``.
    """

    rows: Tensor
    first: Tensor
    size: int

    @property
    def number(self) -> int:
        """How many runs there are."""
        return len(self.rows) // self.size

    @classmethod
    def of(cls, class_ids: Tensor, n_classes: int) -> Runs:
        """Runs over keys of classes ``class_ids`` ``[n]``, of the length that costs least.

        To write a run and add it takes about as long as to multiply a key.
        """
        counts = torch.bincount(class_ids, minlength=n_classes)
        sizes = [LONGEST_RUN >> i for i in range(LONGEST_RUN.bit_length())]
        size = min(sizes, key=lambda size: int((-(-counts // size)).sum()) * (size + 1))
        first = torch.nn.functional.pad((-(-counts // size)).cumsum(0), (1, 0))
        order = class_ids.argsort(stable=True)
        ordered = class_ids[order]
        within = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[ordered]
        rows = torch.full((int(first[-1]) * size,), -1, dtype=torch.int32, device=order.device)
        rows[first[ordered] * size + within] = order.int()
        return cls(rows, first.int(), size)

    @classmethod
    def single(cls, n: int, device: torch.device) -> Runs:
        """Every key a run of its own, in the order of the keys."""
        rows = torch.arange(n + 1, dtype=torch.int32, device=device)
        return cls(rows[:n], rows, 1)


@triton.jit(do_not_specialize=["n_queries", "n_places"])  # type: ignore[untyped-decorator]
def add_within_runs(  # type: ignore[no-untyped-def]  # triton's own language
    features, keys, rows, common, sums, n_queries, n_places, d, beta,
    exact: tl.constexpr, run: tl.constexpr, alike: tl.constexpr,
    tile_q: tl.constexpr, tile_k: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """``sums[r, q]``, the weights of the keys of run r for query q."""
    tiles_q, tiles_k = tl.cdiv(n_queries, tile_q), tl.cdiv(n_places, tile_k)
    program, group = tl.program_id(0), alike * tiles_k
    before = program // group * alike
    together = tl.minimum(tiles_q - before, alike)
    query = (before + program % group % together) * tile_q + tl.arange(0, tile_q)
    tile = program % group // together
    place = tile * tile_k + tl.arange(0, tile_k)
    asked = query < n_queries
    row = tl.load(rows + place, mask=place < n_places, other=-1)
    held = row >= 0
    f = features + query[:, None].to(tl.int64) * d
    k = keys + row[None, :].to(tl.int64) * d
    affinity = tl.zeros((tile_q, tile_k), dtype=tl.float32)
    for start in range(0, d, tile_d):
        value = start + tl.arange(0, tile_d)
        some = value < d
        affinity = tl.dot(
            tl.load(f + value[None, :], mask=asked[:, None] & some[None, :], other=0.0),
            tl.load(k + value[:, None], mask=held[None, :] & some[:, None], other=0.0).to(features.dtype.element_ty),
            affinity, input_precision="tf32x3" if exact else "tf32",
        )  # fmt: skip
    affinity += tl.load(common + query, mask=asked, other=0.0)[:, None]
    weight = tl.where(held[None, :], tl.exp(beta * (affinity - 1)), 0.0)
    if run > 1:
        weight = tl.sum(tl.reshape(weight, (tile_q, tile_k // run, run)), axis=2)
    number = tile * (tile_k // run) + tl.arange(0, tile_k // run)
    tl.store(sums + number[None, :].to(tl.int64) * n_queries + query[:, None], weight,
             mask=asked[:, None] & (number * run < n_places)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["n_queries", "n_classes"])  # type: ignore[untyped-decorator]
def add_runs(  # type: ignore[no-untyped-def]
    sums, first, cache, n_queries, n_classes, tile_q: tl.constexpr, tile_c: tl.constexpr
):
    """``cache[q, c]``, the sum over the runs r of class c of ``sums[r, q]``, in their order."""
    query = tl.program_id(0) * tile_q + tl.arange(0, tile_q)
    column = tl.program_id(1) * tile_c + tl.arange(0, tile_c)
    asked, there = query < n_queries, column < n_classes
    at = tl.load(first + column, mask=there, other=0)
    end = tl.load(first + column + 1, mask=there, other=0)
    total = tl.zeros((tile_q, tile_c), dtype=tl.float32)
    for step in range(tl.max(end - at, axis=0)):
        run = at + step
        total += tl.load(sums + run[None, :].to(tl.int64) * n_queries + query[:, None],
                         mask=asked[:, None] & (run < end)[None, :], other=0.0)  # fmt: skip
    tl.store(cache + query[:, None].to(tl.int64) * n_classes + column[None, :], total,
             mask=asked[:, None] & there[None, :])  # fmt: skip


def cache_logits(
    features: Tensor,
    keys: Tensor,
    runs: Runs,
    beta: float,
    common: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Cache logits ``[q, c]`` float32: ``exp(-beta (1 - A))`` summed over the keys of each class, in a fixed order.

    ``features`` ``[q, d]`` and ``keys`` ``[n, d]`` float32 or float16, contiguous and on one GPU, multiplied in the
    precision of the features and summed in float32, ``A = f K^T + common`` with ``common`` ``[q]`` float32 what was
    taken out of all keys; float32 products are made of three in the tensor cores' own precision, to float32 rounding.
    With ``values`` ``[n, c]`` float32 ``runs`` are :meth:`Runs.single`, and the weights are multiplied by them.
    """
    features, q = features.contiguous(), len(features)
    if common is None:
        common = features.new_zeros(q, dtype=torch.float32)
    cache = common.new_empty(q, len(runs.first) - 1 if values is None else values.shape[1])
    step = max(1, WRITTEN // runs.number)
    memory = common.new_empty(runs.number * min(step, q))
    for start in range(0, q, step):
        part = slice(start, min(start + step, q))
        sums = memory[: runs.number * (part.stop - start)].view(runs.number, -1)
        run_sums(features[part], keys, runs, beta, common[part], sums)
        if values is None:
            class_sums(sums, runs, cache[part])
        else:
            torch.mm(sums.T, values, out=cache[part])
    return cache


def run_sums(features: Tensor, keys: Tensor, runs: Runs, beta: float, common: Tensor, out: Tensor) -> None:
    """Put the sums over the keys of each run ``[r, q]`` into ``out``; of single keys these are the weights."""
    q, d = features.shape
    tiles = TILES[features.dtype, q <= FEW]
    grid = (triton.cdiv(q, tiles.queries) * triton.cdiv(len(runs.rows), tiles.keys),)
    with torch.cuda.device_of(features):  # Triton launches on the current one
        add_within_runs[grid](
            features, keys, runs.rows, common, out, q, len(runs.rows), d, beta,
            exact=features.dtype == torch.float32, run=runs.size, alike=ALIKE,
            tile_q=tiles.queries, tile_k=tiles.keys, tile_d=tiles.values,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def class_sums(sums: Tensor, runs: Runs, out: Tensor) -> None:
    """Put ``sums`` ``[r, q]``, added over the runs of each class in their order, into ``out`` ``[q, c]``."""
    q, c = out.shape
    with torch.cuda.device_of(out):
        grid = (triton.cdiv(q, ADDED[0]), triton.cdiv(c, ADDED[1]))
        add_runs[grid](sums, runs.first, out, q, c, tile_q=ADDED[0], tile_c=ADDED[1])
