"""Measure exact answers, encoding and a fine-tuning step on a GPU, and print the results as a Markdown table.

After a warm-up turn, each side is compared in the same run with the plain torch form, and with the matrix products that
it cannot avoid. Figures are medians. Peak memory is the largest amount of additional memory that torch allocated.
Features are synthetic (benchmarks/made.py, seed 0). The plain form of answers is the published form, which consists of
affinities, an exponential and a one-hot product.

\b
The goal on an H100 is to run the 20 fine-tuning epochs of the paper in less than 10 s.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import encoding
import finetune as steps
import numpy as np
import torch
from common import SHARED, clocked, machine
from throughput import Material, dense
from torch import Tensor

from retrieval_tip import Reader, load_backbone
from retrieval_tip.backbones.base import resolve_device
from retrieval_tip.fit.finetune import finetune
from retrieval_tip.settings import Recipe

START, END = "<!-- measured by benchmarks/gpu.py -->", "<!-- to here -->"
HEAD = ("what", "side", "ms", "x as fast as plain", "x the products", "peak MiB")
AT_A_TIME = 1 << 30
"""Number of affinities per slice of the bare product."""

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Figure:
    """Median seconds and peak bytes of a side. If the GPU ran out of memory, the number of seconds is infinite."""

    seconds: float
    peak: int


def measured(run: Callable[[], object], device: str, rounds: int) -> Figure:
    """Measure the time and memory of a side."""
    on_gpu, seconds, peak = device != "cpu", [], 0

    def whole() -> None:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)

    try:
        for _ in range(rounds + 1):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            seconds.append(clocked(whole))
            if on_gpu:
                peak = torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError:
        return Figure(float("inf"), 0)
    return Figure(statistics.median(seconds[1:]), peak)


def rows_of(what: str, sides: dict[str, Figure], plain: str, products: dict[str, str]) -> Iterator[Sequence[str]]:
    """Yield the lines of the table. ``products`` maps each side to the product with which it is compared."""
    for name, side in sides.items():
        if side.seconds == float("inf"):
            yield what, name, "out of memory", "", "", ""
            continue
        bare = products.get(name, next(iter(products.values())))
        ratios = sides[plain].seconds / side.seconds, side.seconds / sides[bare].seconds
        figures = [f"{1e3 * side.seconds:.3g}", *(f"{ratio:.3g}" if ratio < 1e9 else "" for ratio in ratios)]
        yield what, name, *figures, f"{side.peak / 2**20:,.0f}"


def product(keys: Tensor, f: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that computes the affinities of all queries in slices, which reuse the same memory."""
    keys, f = keys.to(dtype), f.to(dtype)
    step = max(1, AT_A_TIME // len(keys))
    memory = keys.new_empty(min(step, len(f)), len(keys))

    def run() -> None:
        for part in f.split(step):
            torch.mm(part, keys.T, out=memory[: len(part)])

    return run


def answers(size: Size, queries: Sequence[int], rounds: int, device: str) -> Iterator[Sequence[str]]:
    """Measure answers over all keys for each number of queries per call."""
    material = Material.make(size, max(queries), "Flat", device)
    cache, plain = material.index, dense(material.index)
    keys = torch.from_numpy(np.asarray(cache.keys)).to(device)
    for q in queries:
        f = material.features[:q]
        runs = {
            "plain form": lambda f=f: plain(f),
            "product alone": product(keys, f, torch.float32),
            "all keys": lambda f=f: cache.logits(f, "all"),
        }
        sides = {name: measured(run, device, rounds) for name, run in runs.items()}
        yield from rows_of(
            f"{size[0]:,} x {size[1]}, {q:,} queries", sides, "plain form", {"all keys": "product alone"}
        )


def encodings(model: str, folder: Path, number: int, rounds: int, device: str) -> Iterator[Sequence[str]]:
    """Measure the encoding of photos on disk, and the encoding of pixels in memory with only the tower."""
    paths, plain = encoding.chosen(folder, number), encoding.plain(model, None, device, encoding.PLAIN_BATCHES[0])
    sides = {"plain loop of open_clip": measured(lambda: plain(paths), device, rounds)}
    for precision in ("float32", "float16" if device != "cpu" else "bfloat16"):
        backbone = load_backbone(model, device=device, precision=precision)
        run = encoding.ours(backbone)
        sides[precision] = measured(lambda run=run: run(paths), device, rounds)
        pixels = torch.rand(backbone.batch_size, 3, *backbone.size)
        tower = measured(lambda own=backbone, pixels=pixels: own.encode_images(pixels), device, rounds)
        sides[f"tower alone, {precision}"] = Figure(tower.seconds * len(paths) / len(pixels), tower.peak)
    products = {"float32": "tower alone, float32"}
    yield from rows_of(f"encoding {len(paths)} photos", sides, next(iter(sides)), products)


def training(size: Size, epochs: int, rounds: int, device: str) -> Iterator[Sequence[str]]:
    """Measure a fine-tuning step at the size used in the paper, and whole runs."""
    classes, shots, dim = size
    material = steps.Material.make(classes, shots, dim, views=4, queries=16, device=device)
    cache, batch = material.index, min(256, classes * shots)
    f, ids = next(material.batches(batch))
    runs = {"plain form, autograd": steps.plain(cache), "two products, float32": steps.products(cache, batch)}
    runs |= {precision: steps.ours(cache, precision) for precision in ("float32", "bfloat16")}
    sides = {name: measured(lambda step=step: step(f, ids), device, rounds) for name, step in runs.items()}
    what = f"a step of fine-tuning, {cache.n:,} x {dim}, batch {batch}"
    yield from rows_of(what, sides, "plain form, autograd", {"float32": "two products, float32"})
    with tempfile.TemporaryDirectory() as folder:
        source = material.shots(Path(folder))
        for precision in ("float32", "bfloat16"):
            recipe = Recipe(epochs=epochs, batch=batch, precision=precision)
            seconds = clocked(lambda recipe=recipe: finetune(cache, source, Reader(), recipe))
            yield f"{epochs} epochs", precision, f"{1e3 * seconds:.0f}", "", "", ""


def write(text: str, place: Path) -> None:
    """Replace the table in a page. If the page has no table, append the table."""
    page = place.read_text("utf-8") if place.exists() else "# How fast\n"
    before, _, rest = page.partition(START)
    place.write_text(f"{before.rstrip()}\n\n{START}\n\n{text}\n\n{END}{rest.partition(END)[2] or chr(10)}", "utf-8")


SIZES = ((16_000, 1024, 1000), (1_000_000, 512, 1000))


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--size", "sizes", type=(int, int, int), multiple=True, default=SIZES, show_default=True,
              help="Number of keys, dimensions and classes.")  # fmt: skip
@click.option("--queries", type=int, multiple=True, default=(1, 64, 50_000), show_default=True)
@click.option("--training", "trained", type=(int, int, int), default=(1000, 16, 1024), show_default=True)
@click.option("--epochs", default=20, show_default=True)
@click.option("--model", default=f"local-dir:{SHARED}/models/lit-mini", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=SHARED / "data/caltech101", show_default=True)
@click.option("--photos", default=1024, show_default=True, help="Number of photos to encode. Use 0 for no photos.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Markdown page in which the table is inserted.")
def main(
    device: str, sizes: Sequence[Size], queries: Sequence[int], trained: Size, epochs: int, model: str, folder: Path,
    photos: int, rounds: int, out: Path | None,
) -> None:  # fmt: skip
    """Measure all sides, and print or write the table."""
    device = resolve_device(device)
    lines: list[Sequence[str]] = [HEAD, ("---",) * len(HEAD)]
    for size in sizes:
        lines += answers(size, queries, rounds, device)
    if photos:
        lines += encodings(model, folder, photos, rounds, device)
    lines += training(trained, epochs, rounds, device)
    table = "\n".join([f"{machine()}, median of {rounds}\n", *(f"| {' | '.join(line)} |" for line in lines)])
    click.echo(table)
    if out is not None:
        write(table, out)


if __name__ == "__main__":
    main()
