"""Measure exact answers, encoding and fine-tuning on a GPU or a CPU, and print the results as a Markdown table.

After a warm-up turn, the sides take turns. Each is compared with the plain torch form, and with the matrix products
that it cannot avoid. Figures are medians. Peak memory is the largest amount of additional memory that torch allocated
on the GPU. Features are synthetic (benchmarks/made.py, seed 0). The plain form is the published one: answers are
affinities, an exponential and a one-hot product, and a step of fine-tuning uses autograd and torch.optim.AdamW.

\b
The goal on an H100 is to run the 20 fine-tuning epochs of the paper in less than 10 s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import encoding
import numpy as np
import pyarrow.parquet as pq
import torch
from common import (
    SEED,
    SHARED,
    against,
    clocked,
    machine,
    markdown,
    medians,
    sizes_option,
    take_turns,
)
from made import Made, rows
from throughput import Material, dense
from torch import Tensor
from torch.nn import functional

from retrieval_tip import Index, Reader, load_backbone, open_source
from retrieval_tip.backbones.base import resolve_device
from retrieval_tip.data.sources import Source
from retrieval_tip.fit.finetune import Trainer, finetune
from retrieval_tip.settings import Recipe, Settings

START, END = "<!-- measured by benchmarks/gpu.py -->", "<!-- to here -->"
HEAD = ("what", "side", "ms", "x as fast as plain", "x the products", "peak MiB")
AT_A_TIME = 1 << 30
"""Number of affinities per slice of the bare product."""
SETTINGS = Settings(alpha=1.0, beta=5.5, logit_scale=100.0)
RATE, EPS = 1e-3, 1e-4
VIEWS, INSTANCE = 4, 0.7
"""Number of views of a shot, and the share of a view that comes from its shot. The rest is noise."""

Size = tuple[int, int, int]
Step = Callable[[Tensor, Tensor], object]
Rows = Iterator[Sequence[str]]


def measured(
    what: str,
    runs: Mapping[str, Callable[[], object]],
    products: Mapping[str, str],
    device: str,
    rounds: int,
) -> Rows:
    """Measure the sides in turn, and yield the lines of the table. The first side is the plain form.

    ``products`` maps sides to the product with which they are compared. Other sides are compared with the first one.
    """
    on_gpu, peaks = device != "cpu", dict.fromkeys(runs, 0)

    def side(name: str, _: int) -> float:
        def whole() -> None:
            runs[name]()
            if on_gpu:
                torch.cuda.synchronize(device)

        before = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        try:
            seconds = clocked(whole)
        except torch.OutOfMemoryError:
            return float("inf")
        if on_gpu:
            peaks[name] = torch.cuda.max_memory_allocated(device) - before
        return seconds

    found = medians(take_turns(what, {name: partial(side, name) for name in runs}, rounds))
    plain = next(iter(found.values()))
    for name, seconds in found.items():
        if seconds == float("inf"):
            yield what, name, "out of memory", "", "", ""
            continue
        bare = found[products.get(name, next(iter(products.values())))]
        figures = f"{1e3 * seconds:.3g}", f"{plain / seconds:.3g}", f"{seconds / bare:.3g}"
        yield what, name, *figures, f"{peaks[name] / 2**20:,.0f}"


def product(keys: Tensor, f: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that computes the affinities of all queries in slices, which reuse the same memory."""
    keys, f = keys.to(dtype), f.to(dtype)
    step = max(1, AT_A_TIME // len(keys))
    memory = keys.new_empty(min(step, len(f)), len(keys))

    def run() -> None:
        for part in f.split(step):
            torch.mm(part, keys.T, out=memory[: len(part)])

    return run


def answers(size: Size, queries: Sequence[int], rounds: int, device: str) -> Rows:
    """Measure answers over all keys for each number of queries per call."""
    material = Material.make(size, max(queries), "Flat", device)
    cache, plain = material.index, dense(material.index)
    keys = torch.from_numpy(np.asarray(cache.keys)).to(device)
    for q in queries:
        f = material.features[:q]
        runs = {
            "plain form": partial(plain, f),
            "product alone": product(keys, f, torch.float32),
            "all keys": partial(cache.logits, f, "all"),
        }
        what = f"{size[0]:,} x {size[1]}, {q:,} queries"
        yield from measured(what, runs, {"all keys": "product alone"}, device, rounds)


def encodings(model: str, folder: Path, number: int, rounds: int, device: str) -> Rows:
    """Measure the encoding of photos on disk, and the encoding of as many pixels in memory with only the tower."""
    paths, plain = (
        encoding.chosen(folder, number),
        encoding.plain(model, device, encoding.PLAIN_BATCHES[0]),
    )
    runs: dict[str, Callable[[], object]] = {"plain loop of open_clip": lambda: plain(paths)}
    precisions = ("float32", "float16" if device != "cpu" else "bfloat16")
    for precision in precisions:
        backbone = load_backbone(model, device=device, precision=precision)
        runs[precision] = partial(encoding.ours(backbone), paths)
        pixels = torch.rand(min(backbone.batch_size, number), 3, *backbone.size)
        runs[f"tower alone, {precision}"] = partial(tower, backbone, pixels, number)
    products = {precision: f"tower alone, {precision}" for precision in precisions}
    yield from measured(f"encoding {number} photos", runs, products, device, rounds)


def tower(backbone: encoding.Backbone, pixels: Tensor, number: int) -> None:
    """Encode ``number`` photos, a batch at a time. All batches have the same pixels."""
    for start in range(0, number, len(pixels)):
        backbone.encode_images(pixels[: number - start])


@dataclass(frozen=True)
class Views:
    """Views of shots as an array of shape ``[n, v, d]``, and an index of their means."""

    views: np.ndarray
    index: Index

    @classmethod
    def make(cls, classes: int, shots: int, dim: int, device: str) -> Views:
        """Draw views of random shots."""
        made, ids = Made(classes, dim, SEED), np.repeat(np.arange(classes), shots)
        own = np.stack([made.draw(ids, 10 + view) for view in range(VIEWS)], axis=1)
        seen = INSTANCE**0.5 * made.draw(ids, 1)[:, None] + (1 - INSTANCE) ** 0.5 * own
        seen /= np.linalg.norm(seen, axis=2, keepdims=True)
        keys = seen.mean(axis=1)
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        names = [f"row {i}" for i in range(len(ids))]
        return cls(
            seen,
            Index.from_features(
                keys, ids, made.names, made.text, device=device, settings=SETTINGS, sources=names
            ),
        )

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draw features of shape ``[b, d]``, and their class ids of shape ``[b]``."""
        random = np.random.default_rng(SEED)
        at = random.choice(len(self.views), size, replace=False)
        views = torch.from_numpy(self.views[at, random.integers(0, VIEWS, size)]).to(
            self.index.device
        )
        return views, self.index.class_ids[torch.from_numpy(at).to(self.index.device)]

    def source(self, folder: Path) -> Source:
        """Write the views as a feature table. All views of a shot have the same id."""
        n, v, d = self.views.shape
        ids = np.repeat(np.arange(n), v)
        labels = np.array(self.index.class_names)[self.index.class_ids.cpu().numpy()][ids]
        table = rows(self.views.reshape(-1, d), labels).set_column(
            0, "id", [[f"row {i}" for i in ids]]
        )
        pq.write_table(table, folder / "views.parquet", compression="none")
        return open_source(folder / "views.parquet")


def plain_step(cache: Index) -> Step:
    """Return the published step."""
    adapter = torch.nn.Linear(cache.d, cache.n, bias=False)
    adapter.weight = torch.nn.Parameter(torch.from_numpy(np.array(cache.keys)).to(cache.device))
    values = functional.one_hot(cache.class_ids, len(cache.class_names)).float()
    weights, settings = cache.text_weights.T.contiguous(), cache.settings
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE, eps=EPS)

    def step(f: Tensor, ids: Tensor) -> float:
        affinity = adapter(f)
        cache_logits = ((-1) * (settings.beta - settings.beta * affinity)).exp() @ values
        loss = functional.cross_entropy(
            settings.logit_scale * f @ weights + cache_logits * settings.alpha, ids
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def products_of_step(cache: Index, batch: int) -> Step:
    """Return a step that only computes the affinities and the gradient of the keys."""
    keys = torch.from_numpy(np.array(cache.keys)).to(cache.device)
    affinity, gradient = keys.new_empty(batch, cache.n), torch.empty_like(keys)

    def step(f: Tensor, ids: Tensor) -> None:
        torch.mm(f, keys.T, out=affinity)
        torch.mm(affinity.T, f, out=gradient)

    return step


def training(size: Size, epochs: int, rounds: int, device: str) -> Rows:
    """Measure a fine-tuning step at the size used in the paper, and whole runs."""
    classes, shots, dim = size
    made = Views.make(classes, shots, dim, device)
    cache, batch = made.index, min(256, classes * shots)
    f, ids = made.batch(batch)
    step = partial(Trainer(cache, Recipe(lr=RATE)).step, lr=RATE)
    steps: dict[str, Step] = {"plain form, autograd": plain_step(cache), "a step": step}
    steps["two products"] = products_of_step(cache, batch)
    what = f"a step of fine-tuning, {cache.n:,} x {dim}, batch {batch}"
    runs = {name: partial(step, f, ids) for name, step in steps.items()}
    yield from measured(what, runs, {"a step": "two products"}, device, rounds)
    with tempfile.TemporaryDirectory() as folder:
        source = made.source(Path(folder))
        seconds = clocked(lambda: finetune(cache, source, Reader(), Recipe(epochs=epochs)))
        yield f"{epochs} epochs", "", f"{1e3 * seconds:.0f}", "", "", ""


def write(text: str, place: Path) -> None:
    """Replace the table in a page. If the page has no table, append the table."""
    page = place.read_text("utf-8") if place.exists() else "# How fast\n"
    before, _, rest = page.partition(START)
    place.write_text(
        f"{before.rstrip()}\n\n{START}\n\n{text}\n\n{END}{rest.partition(END)[2] or chr(10)}",
        "utf-8",
    )


SIZES = ((16_000, 1024, 1000), (1_000_000, 512, 1000))


@against
@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@sizes_option(SIZES)
@click.option("--queries", type=int, multiple=True, default=(1, 64, 50_000), show_default=True)
@click.option(
    "--training",
    "trained",
    type=(int, int, int),
    default=(1000, 16, 1024),
    show_default=True,
    help="Number of classes, shots and dimensions.",
)
@click.option("--epochs", default=20, show_default=True)
@click.option("--model", default=f"local-dir:{SHARED}/models/lit-mini", show_default=True)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=SHARED / "data/caltech101",
    show_default=True,
)
@click.option(
    "--photos",
    default=1024,
    show_default=True,
    help="Number of photos to encode. Use 0 for no photos.",
)
@click.option("--rounds", default=5, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Markdown page in which the table is inserted."
)
def main(
    device: str,
    sizes: Sequence[Size],
    queries: Sequence[int],
    trained: Size,
    epochs: int,
    model: str,
    folder: Path,
    photos: int,
    rounds: int,
    out: Path | None,
) -> None:
    """Measure all sides, and print or write the table."""
    device = resolve_device(device)
    lines: list[Sequence[str]] = []
    for size in sizes:
        lines += answers(size, queries, rounds, device)
    if photos:
        lines += encodings(model, folder, photos, rounds, device)
    lines += training(trained, epochs, rounds, device)
    table = f"{machine()}, median of {rounds}\n\n{markdown(HEAD, lines, left=2)}"
    click.echo(table)
    if out is not None:
        write(table, out)


if __name__ == "__main__":
    main()
