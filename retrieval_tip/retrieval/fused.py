"""Sums by class over all keys on a GPU in one kernel: affinities and weights never leave the chip.

A program takes a tile of queries and a tile of keys: it multiplies them, takes the exponential, sums by class within
the tile, as a product with a one-hot tile made on the spot, and writes only that. Keys are grouped by class, so a
tile of keys has few classes, and these follow one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Queries, keys, and values of both that are multiplied at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _sum_by_class(  # type: ignore[no-untyped-def]  # triton's own language
    features, keys, ranks, common, out, n_queries, n_keys, d, n_classes, beta,
    exact: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    here = tl.arange(0, tile)
    query = tl.program_id(0) * tile + here
    key = tl.program_id(1) * tile + here
    asked, held = query < n_queries, key < n_keys
    affinity = tl.zeros((tile, tile), dtype=tl.float32)
    for start in range(0, d, tile):
        value = start + here
        f = tl.load(features + query[:, None].to(tl.int64) * d + value[None, :],
                    mask=asked[:, None] & (value[None, :] < d), other=0.0)  # fmt: skip
        k = tl.load(keys + key[None, :].to(tl.int64) * d + value[:, None],
                    mask=held[None, :] & (value[:, None] < d), other=0.0)  # fmt: skip
        affinity = tl.dot(f, k, affinity, input_precision="tf32x3" if exact else "tf32")
    affinity += tl.load(common + query, mask=asked, other=0.0)[:, None]
    weight = tl.where(held[None, :], tl.exp(beta * (affinity - 1)), 0.0)
    rank = tl.load(ranks + key, mask=held, other=-1)
    column = tl.load(ranks + tl.program_id(1) * tile) + here
    one_hot = (rank[:, None] == column[None, :]).to(tl.float32)
    sums = tl.dot(weight, one_hot, input_precision="tf32x3")
    tl.atomic_add(out + query[:, None].to(tl.int64) * n_classes + column[None, :], sums,
                  mask=asked[:, None] & (column[None, :] <= tl.max(rank, axis=0)))  # fmt: skip


def add_by_class(features: Tensor, keys: Tensor, ranks: Tensor, common: Tensor, beta: float, out: Tensor) -> None:
    """Add ``exp(-beta (1 - A))`` of each key to the column of its class: ``out[q, ranks[i]] += weight[q, i]``.

    ``features`` ``[q, d]`` and ``keys`` ``[n, d]`` of one dtype, float32 or float16, ``A = f K^T + common`` with
    ``common`` ``[q]`` float32 what was taken out of all keys. ``ranks`` ``[n]`` int32 ascend without a gap: the classes
    that have keys, numbered through. ``out`` ``[q, c]`` float32; all contiguous and on one GPU. Sums are float32;
    float32 products are made of three in the tensor cores' own precision, to float32 rounding.
    """
    grid = (triton.cdiv(len(features), TILE), triton.cdiv(len(keys), TILE))
    exact = features.dtype == torch.float32
    sizes = (len(features), len(keys), features.shape[1], out.shape[1])
    _sum_by_class[grid](features, keys, ranks, common, out, *sizes, beta, exact=exact, tile=TILE)
