"""Photographs on disk to features, in images a second, against the plain open_clip loop.

Plain: one thread opens each file and applies open_clip's own transform, then encode_image on batches of 64 under
no_grad, with torch's default threads. The same with small batches says how much of the difference is their size. Ours:
Encoder without a cache. All sides in one run, taking turns; the ratio is the median over the rounds of the plain loop's
time by a side's, the cosine the smallest to the plain loop's feature of the same photograph.

Large photographs are made up: real ones enlarged, and mosaics of real ones at their own size, which have finer detail
than any camera's. They show what decoding JPEGs at a reduced size gains and changes.
"""

from __future__ import annotations

import datetime
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import open_clip
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from retrieval_tip import Encoder, load_backbone
from retrieval_tip.backbones.base import Backbone, unit
from retrieval_tip.data import images
from retrieval_tip.data.sources import of_images

GOAL = 1.3
"""So many times as fast as the plain loop on small photographs."""
PLAIN_BATCHES = 64, 4
"""What is usual, and what suits small towers on a CPU."""
QUALITY = 90

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Side:
    """One way from paths to unit features ``[n, d]``, on one set of photographs."""

    photographs: str
    name: str
    precision: str
    batch: int
    encode: Callable[[Sequence[str]], Array]


def plain(model: str, pretrained: str | None, device: str, batch: int) -> Callable[[Sequence[str]], Array]:
    """The loop of open_clip's own documentation."""
    network, _, transform = open_clip.create_model_and_transforms(model, pretrained, device=device)
    network.eval()

    def encode(paths: Sequence[str]) -> Array:
        features = []
        for start in range(0, len(paths), batch):
            pixels = torch.stack([transform(Image.open(path)) for path in paths[start : start + batch]])
            with torch.no_grad():
                features.append(network.encode_image(pixels.to(device)).cpu().numpy())
        return unit(np.concatenate(features))

    return encode


def ours(backbone: Backbone, batch: int | None = None, *, reduce: bool = True) -> Callable[[Sequence[str]], Array]:
    """A fresh Encoder each time."""
    return lambda paths: Encoder(backbone, batch_size=batch, reduce=reduce).encode(of_images(list(paths))).features


def chosen(folder: Path, number: int) -> list[str]:
    """So many photographs of a folder, the same ones each time."""
    found = [str(path) for path in images.find(folder)]
    if len(found) < number:
        raise click.UsageError(f"{folder}: {len(found)} photographs, {number} are needed")
    return random.Random(0).sample(found, number)


def make_large(paths: Sequence[str], number: int, size: tuple[int, int], folder: Path) -> list[str]:
    """Large JPEGs of small photographs: by turns one of them enlarged, and a mosaic of many."""
    made = []
    for turn in range(number):
        own = [Image.open(paths[(turn + place) % len(paths)]).convert("RGB") for place in range(64)]
        large = own[0].resize(size, Image.Resampling.LANCZOS)
        if turn % 2:
            left, top, height, place = 0, 0, 0, 0
            while top < size[1]:
                piece = own[place % len(own)]
                large.paste(piece, (left, top))
                left, height, place = left + piece.width, max(height, piece.height), place + 1
                if left >= size[0]:
                    left, top, height = 0, top + height, 0
        made.append(str(folder / f"{turn:03}.jpg"))
        large.save(made[-1], quality=QUALITY)
    return made


def measure(sides: Sequence[Side], photographs: dict[str, list[str]], rounds: int) -> pa.Table:
    """A row a side: the first one of the same photographs is what the others are compared with."""
    seconds: dict[Side, list[float]] = {side: [] for side in sides}
    features: dict[Side, Array] = {}
    for turn in range(rounds + 1):
        for side in sides:
            paths = photographs[side.photographs]
            start = time.perf_counter()
            features[side] = side.encode(paths[:4] if turn == 0 else paths)  # the first round warms up
            if turn:
                seconds[side].append(time.perf_counter() - start)
    rows = []
    for side, lasted in seconds.items():
        base = next(other for other in sides if other.photographs == side.photographs)
        number = len(photographs[side.photographs])
        rows.append(
            {
                "photographs": side.photographs,
                "number": number,
                "side": side.name,
                "precision": side.precision,
                "batch": side.batch,
                "images_per_second": number / statistics.median(lasted),
                "ratio": statistics.median(b / s for b, s in zip(seconds[base], lasted, strict=True)),
                "lowest_cosine": float((features[side] * features[base]).sum(axis=1).min()),
            }
        )
    return pa.Table.from_pylist(rows)


@click.command(help=__doc__)
@click.option("--model", default="local-dir:../shared/models/lit-mini", show_default=True)
@click.option("--pretrained")
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default="../shared/data/caltech101", show_default=True)
@click.option("--number", default=64, show_default=True, help="Photographs of the folder.")
@click.option("--large", default=32, show_default=True, help="Large photographs that are made; 0 leaves them out.")
@click.option("--size", type=(int, int), default=(4000, 3000), show_default=True, help="Of the large ones.")
@click.option("--bfloat16/--no-bfloat16", default=True, show_default=True, help="A row in this precision.")
@click.option(
    "--batch", "batches", type=int, multiple=True, help="A row of ours with this batch size; may be repeated."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="A Parquet file for the rows.")
def main(
    model: str,
    pretrained: str | None,
    device: str,
    folder: Path,
    number: int,
    large: int,
    size: tuple[int, int],
    bfloat16: bool,
    batches: tuple[int, ...],
    rounds: int,
    out: Path | None,
) -> None:
    """Measure, print, write."""
    backbone = load_backbone(model, pretrained, device=device, precision="float32")
    on = "cpu" if device == "auto" and not torch.cuda.is_available() else device.replace("auto", "cuda")
    best = backbone.batch_size
    usual, small = PLAIN_BATCHES
    looped, small_looped = (plain(model, pretrained, on, batch) for batch in PLAIN_BATCHES)
    sides = [
        Side("small", "plain loop", "float32", usual, looped),
        Side("small", "plain loop, small batches", "float32", small, small_looped),
        Side("small", "ours", "float32", best, ours(backbone)),
        *(Side("small", "ours", "float32", batch, ours(backbone, batch)) for batch in batches),
    ]
    if bfloat16:
        half = load_backbone(model, pretrained, device=device, precision="bfloat16")
        sides.append(Side("small", "ours", "bfloat16", half.batch_size, ours(half)))
        sides += [Side("small", "ours", "bfloat16", batch, ours(half, batch)) for batch in batches]
    with tempfile.TemporaryDirectory() as scratch:
        photographs = {"small": chosen(folder, number)}
        if large:
            photographs["large"] = make_large(photographs["small"], large, size, Path(scratch))
            sides += [
                Side("large", "plain loop", "float32", usual, looped),
                Side("large", "ours, whole decoding", "float32", best, ours(backbone, reduce=False)),
                Side("large", "ours, reduced decoding", "float32", best, ours(backbone)),
            ]
        before = os.getloadavg()[0]
        table = measure(sides, photographs, rounds)
    click.echo(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load before {before:.2f}, torch {torch.__version__}, open_clip {open_clip.__version__}, "
        f"Pillow {PIL.__version__}\n{backbone.identity} on {on}, median of {rounds} rounds, {number} photographs of "
        f"{folder}, {large} large ones of {size[0]} x {size[1]}"
    )
    click.echo(f"\n{'':<7}{'':<28}{'precision':<10}{'batch':>6}{'images/s':>10}{'x plain':>9}{'lowest cosine':>15}")
    for row in table.to_pylist():
        speed = f"{row['images_per_second']:>10.1f}{row['ratio']:>9.2f}{row['lowest_cosine']:>15.6f}"
        click.echo(f"{row['photographs']:<7}{row['side']:<28}{row['precision']:<10}{row['batch']:>6}{speed}")
    click.echo(f"{'goal, ours on small ones':<51}{f'at least {GOAL}':>19}")
    if out is not None:
        pq.write_table(table, out)


if __name__ == "__main__":
    main()
