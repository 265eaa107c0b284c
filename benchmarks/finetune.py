"""A step of fine-tuning keys against the plain form and against the two matrix products that it cannot do without.

Made features at the paper's ImageNet size. All sides in one run, taking turns, medians; every side gets the same fresh
batches. Plain: the published form, one-hot product and torch.optim.AdamW by autograd. Bare products: f K^T and
w^T f, in memory that is there already, and nothing else. Ours: Trainer.step. Then whole runs of finetune(), whose
accuracy on queries that it never saw has to be the same in both precisions.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import CacheModel, Encoder, open_source
from retrieval_tip.data.sources import Source
from retrieval_tip.fit.finetune import finetune
from retrieval_tip.fit.trainer import Recipe, Trainer, faster_precision
from retrieval_tip.settings import Settings, TrainingPrecision

ALPHA, BETA, SCALE = 1.0, 5.5, 100.0
RATE, EPS = 1e-3, 1e-4
FASTER, MORE = 2.8, 1.15
"""Goals in float32: so many times as fast as the plain form, and at most so many times the bare products."""
PAPER_SECONDS = 300
"""The paper's 20 epochs on an RTX 3090."""

COMMON, CLASS, NOISE = 0.52, 0.23, 0.25
"""Parts of an image's squared length: cosines are about 0.52, and 0.75 within a class, as CLIP's are."""
RANK = 32
"""Classes and noise lie in so many dimensions, so that classes overlap."""
TEXT_CLASS, AGREE = 0.1, 0.8
"""How much of a text weight is its class, and how well that agrees with the images' class."""
INSTANCE = 0.7
"""How much of the noise is the shot's; the rest is the view's."""

Array = npt.NDArray[np.float32]


def unit(rows: Array) -> Array:
    scaled: Array = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


class World:
    """Classes to draw images of."""

    def __init__(self, classes: int, dim: int, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._common, other = unit(self._normal(2, dim))
        self._basis = np.linalg.qr(self._normal(dim, RANK))[0].T / np.sqrt(RANK, dtype=np.float32)
        of_class = self._normal(classes, RANK)
        self._centres = of_class @ self._basis
        named = (AGREE * of_class + np.sqrt(1 - AGREE**2) * self._normal(classes, RANK)) @ self._basis
        self.text = unit(np.sqrt(1 - TEXT_CLASS) * other + np.sqrt(TEXT_CLASS) * named)

    def images(self, ids: npt.NDArray[np.int64], views: int) -> Array:
        """Unit features ``[m, v, d]`` of views of images of these classes."""
        noise = np.sqrt(INSTANCE) * self._normal(len(ids), 1, RANK)
        noise = noise + np.sqrt(1 - INSTANCE) * self._normal(len(ids), views, RANK)
        centres = np.sqrt(COMMON) * self._common + np.sqrt(CLASS) * self._centres[ids][:, None]
        return unit(centres + (np.sqrt(NOISE) * noise) @ self._basis)

    def _normal(self, *shape: int) -> Array:
        return self._random.standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class Material:
    """Views ``[n, v, d]`` of shots of classes ``ids`` ``[n]``, the index of their means, and queries that are none."""

    views: Array
    ids: npt.NDArray[np.int64]
    cache: CacheModel
    queries: Array
    query_ids: npt.NDArray[np.int64]

    @classmethod
    def make(
        cls, classes: int, shots: int, dim: int, views: int, queries: int, index: str = "Flat", device: str = "cpu"
    ) -> Material:
        world = World(classes, dim)
        ids = np.repeat(np.arange(classes), shots)
        seen = np.concatenate([world.images(part, views) for part in np.array_split(ids, max(1, len(ids) // 4096))])
        cache = CacheModel.from_features(
            unit(seen.mean(axis=1)),
            ids,
            [f"class {i}" for i in range(classes)],
            world.text,
            settings=Settings(alpha=ALPHA, beta=BETA, logit_scale=SCALE),
            index=index,
            device=device,
            sources=[str(i) for i in range(len(ids))],
        )
        asked = np.arange(queries) % classes
        return cls(seen, ids, cache, world.images(asked, 1)[:, 0], asked)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For ever: features ``[b, d]`` and class ids ``[b]``."""
        random = np.random.default_rng(1)
        while True:
            rows = random.choice(len(self.ids), size, replace=False)
            views = self.views[rows, random.integers(0, self.views.shape[1], size)]
            yield torch.from_numpy(views), torch.from_numpy(self.ids[rows])

    def shots(self, folder: Path) -> Source:
        """The views as a feature table."""
        n, v, d = self.views.shape
        names = self.cache.class_names
        table = pa.table(
            {
                "id": [str(i) for i in range(n) for _ in range(v)],
                "label": [names[i] for i in self.ids for _ in range(v)],
                "feature": pa.FixedSizeListArray.from_arrays(self.views.reshape(-1), d),
            }
        )
        pq.write_table(table, folder / "views.parquet", compression="none")
        return open_source(folder / "views.parquet")

    def accuracy(self, cache: CacheModel, alpha: float | None = None) -> float:
        """Percent of the queries."""
        terms = cache.terms(self.queries)
        text, alone = terms.text, terms.cache
        logits = text + (cache.settings.alpha if alpha is None else alpha) * alone
        return 100 * float((logits.argmax(dim=1) == torch.from_numpy(self.query_ids)).float().mean())


Step = Callable[[Tensor, Tensor], object]


def plain(cache: CacheModel) -> Step:
    """The published step."""
    adapter = torch.nn.Linear(cache.d, cache.n, bias=False)
    adapter.weight = torch.nn.Parameter(torch.from_numpy(np.array(cache.keys)).to(cache.device))
    values = functional.one_hot(cache.class_ids, len(cache.class_names)).float()
    weights = cache.text_weights.T.contiguous()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE, eps=EPS)

    def step(f: Tensor, ids: Tensor) -> float:
        affinity = adapter(f)
        cache_logits = ((-1) * (BETA - BETA * affinity)).exp() @ values
        loss = functional.cross_entropy(SCALE * f @ weights + cache_logits * ALPHA, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def products(cache: CacheModel, batch: int, dtype: torch.dtype) -> Step:
    """Affinities and the keys' gradient, without anything between them."""
    keys = torch.from_numpy(np.array(cache.keys)).to(cache.device, dtype)
    affinity, gradient = keys.new_empty(batch, cache.n), torch.empty_like(keys)

    def step(f: Tensor, ids: Tensor) -> None:
        f = f.to(dtype)
        torch.mm(f, keys.T, out=affinity)
        torch.mm(affinity.T, f, out=gradient)

    return step


def ours(cache: CacheModel, precision: TrainingPrecision) -> Step:
    found = Trainer(cache, Recipe(lr=RATE, eps=EPS, precision=precision), None)
    return lambda f, ids: found.step(f, ids, RATE)


def times(sides: Mapping[str, Step], material: Material, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each side, which take turns; two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    batches = material.batches(batch)
    for turn in range(rounds + 2):
        f, ids = next(batches)
        for name, step in sides.items():
            start = time.perf_counter()
            step(f, ids)
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(lasted) for name, lasted in seconds.items()}


PLAIN, BARE, BARE16 = "plain, one-hot and autograd", "two bare products", "two bare products, bfloat16"
OURS, OURS16 = "ours, float32", "ours, bfloat16"


def print_step(material: Material, batch: int, rounds: int) -> dict[str, float]:
    """A step of every side."""
    cache = material.cache
    sides = {
        PLAIN: plain(cache),
        BARE: products(cache, batch, torch.float32),
        OURS: ours(cache, "float32"),
        OURS16: ours(cache, "bfloat16"),
        BARE16: products(cache, batch, torch.bfloat16),
    }
    found = times(sides, material, batch, rounds)
    click.echo(f"\nOne step, median of {rounds}")
    click.echo(f"{'':<30}{'ms':>9}{'x as fast as plain':>20}{'x bare products':>17}")
    for name, seconds in found.items():
        ratios = f"{found[PLAIN] / seconds:>20.2f}{seconds / found[BARE]:>17.2f}"
        click.echo(f"{name:<30}{1e3 * seconds:>9.1f}{ratios}")
    click.echo(f"{'goals, ours in float32':<30}{'':>9}{f'at least {FASTER}':>20}{f'at most {MORE}':>17}")
    return found


def print_runs(material: Material, batch: int, epochs: int) -> dict[str, float]:
    """Whole runs in both precisions."""
    cache = material.cache
    click.echo(f"\n{epochs} epochs, {material.views.shape[1]} cached views a shot, {len(material.queries)} queries")
    click.echo(f"{'':<30}{'seconds':>9}{'loss':>9}{'top-1, %':>10}")
    found = {"zero-shot": material.accuracy(cache, 0.0), "training-free": material.accuracy(cache)}
    for name, accuracy in found.items():
        click.echo(f"{name:<30}{'':>18}{accuracy:>10.2f}")
    with tempfile.TemporaryDirectory() as folder:
        shots = material.shots(Path(folder))
        for precision in ("float32", "bfloat16"):
            recipe = Recipe(epochs=epochs, batch=batch, lr=RATE, eps=EPS, precision=precision, settings="own")
            start = time.perf_counter()
            tuned = finetune(cache, shots, Encoder(), recipe)
            whole = time.perf_counter() - start
            found[precision] = material.accuracy(tuned.cache)
            loss = tuned.curve["loss"][-1].as_py()
            name = f"fine-tuned, {precision}"
            click.echo(f"{name:<30}{whole:>9.1f}{loss:>9.4f}{found[precision]:>10.2f}")
    click.echo(f"{'paper, RTX 3090, 20 epochs':<30}{PAPER_SECONDS:>9}")
    return found


@click.command(help=__doc__)
@click.option("--classes", default=1000, show_default=True)
@click.option("--shots", default=16, show_default=True)
@click.option("--dim", default=1024, show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--queries", default=5000, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Steps of each side that are timed.")
@click.option("--epochs", default=20, show_default=True, help="Of the whole runs; 0 leaves them out.")
def main(
    classes: int,
    shots: int,
    dim: int,
    batch: int,
    views: int,
    queries: int,
    rounds: int,
    epochs: int,
) -> None:
    """Time, train, print."""
    click.echo(
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"load before {os.getloadavg()[0]:.2f}: {classes * shots} keys x {dim}, {classes} classes, batch {batch}"
    )
    material = Material.make(classes, shots, dim, views, queries)
    print_step(material, batch, rounds)
    click.echo(f"--precision auto chooses {faster_precision(material.cache, batch)}")
    if epochs:
        print_runs(material, batch, epochs)


if __name__ == "__main__":
    main()
