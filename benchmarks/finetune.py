"""Compare a fine-tuning step of keys with the plain form, and with the two matrix products that it cannot avoid.

Features are synthetic (benchmarks/made.py) and have the size of ImageNet in the paper. After two warm-up turns, all
sides take turns on the same batches. Figures are medians. The plain side is the published form, which uses a one-hot
product, autograd and torch.optim.AdamW. The side with two products computes f K^T and w^T f into preallocated memory.
Our side is Trainer.step. Afterwards, finetune() is run in both precisions, and its accuracy on unseen queries is
printed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from common import SEED, Side, against, clocked, machine, medians, show, take_turns
from made import Made, rows
from torch import Tensor
from torch.nn import functional

from retrieval_tip import Index, Reader, open_source
from retrieval_tip.data.sources import Source
from retrieval_tip.fit.finetune import Trainer, finetune
from retrieval_tip.settings import Recipe, Settings

ALPHA, BETA, SCALE = 1.0, 5.5, 100.0
RATE, EPS = 1e-3, 1e-4
INSTANCE = 0.7
"""Share of a view that comes from its shot. The rest is noise that is specific to the view."""

Array = npt.NDArray[np.float32]
Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Material:
    """Views of shots as an array of shape ``[n, v, d]``, their class ids, an index of their means, and queries."""

    views: Array
    ids: npt.NDArray[np.int64]
    index: Index
    queries: Array
    query_ids: npt.NDArray[np.int64]

    @classmethod
    def make(cls, classes: int, shots: int, dim: int, views: int, queries: int, device: str = "cpu") -> Material:
        """Draw views, shots and queries at random."""
        made, ids, asked = Made(classes, dim, SEED), np.repeat(np.arange(classes), shots), np.arange(queries) % classes
        own = np.stack([made.draw(ids, 10 + view) for view in range(views)], axis=1)
        seen = INSTANCE**0.5 * made.draw(ids, 1)[:, None] + (1 - INSTANCE) ** 0.5 * own
        seen /= np.linalg.norm(seen, axis=2, keepdims=True)
        keys = seen.mean(axis=1)
        cache = Index.from_features(
            keys / np.linalg.norm(keys, axis=1, keepdims=True), ids, made.names, made.text, device=device,
            settings=Settings(alpha=ALPHA, beta=BETA, logit_scale=SCALE), sources=[f"row {i}" for i in range(len(ids))],
        )  # fmt: skip
        return cls(seen, ids, cache, made.draw(asked, 2), asked)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of features, of shape ``[b, d]``, and class ids, of shape ``[b]``, indefinitely."""
        random = np.random.default_rng(SEED)
        while True:
            at = random.choice(len(self.ids), size, replace=False)
            views = self.views[at, random.integers(0, self.views.shape[1], size)]
            yield torch.from_numpy(views).to(self.index.device), torch.from_numpy(self.ids[at]).to(self.index.device)

    def shots(self, folder: Path) -> Source:
        """Write the views as a feature table. All views of a shot have the same id."""
        n, v, d = self.views.shape
        table = rows(self.views.reshape(-1, d), [self.index.class_names[i] for i in np.repeat(self.ids, v)])
        table = table.set_column(0, "id", [[f"row {i}" for i in np.repeat(np.arange(n), v)]])
        pq.write_table(table, folder / "views.parquet", compression="none")
        return open_source(folder / "views.parquet")

    def right(self, logits: npt.ArrayLike) -> float:
        """Return the accuracy in percent."""
        return 100 * float((np.asarray(logits).argmax(axis=1) == self.query_ids).mean())


def plain(cache: Index) -> Step:
    """Return the published step."""
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


def products(cache: Index, batch: int, dtype: torch.dtype = torch.float32) -> Step:
    """Return a step that only computes the affinities and the gradient of the keys."""
    keys = torch.from_numpy(np.array(cache.keys)).to(cache.device, dtype)
    affinity, gradient = keys.new_empty(batch, cache.n), torch.empty_like(keys)

    def step(f: Tensor, ids: Tensor) -> None:
        f = f.to(dtype)
        torch.mm(f, keys.T, out=affinity)
        torch.mm(affinity.T, f, out=gradient)

    return step


def ours(cache: Index, precision: str) -> Step:
    """Return the step of this package."""
    trainer = Trainer(cache, Recipe(lr=RATE, eps=EPS, precision=precision))
    return lambda f, ids: trainer.step(f, ids, RATE)


def steps(material: Material, batch: int) -> dict[str, Step]:
    """Return the step of each side."""
    cache = material.index
    return {
        "plain, one-hot and autograd": plain(cache),
        "two products": products(cache, batch),
        "ours, float32": ours(cache, "float32"),
        "ours, bfloat16": ours(cache, "bfloat16"),
        "two products, bfloat16": products(cache, batch, torch.bfloat16),
    }


def print_steps(material: Material, batch: int, rounds: int) -> None:
    """Time the steps of all sides in turn."""
    sides, batches = steps(material, batch), material.batches(batch)
    given = [next(batches) for _ in range(rounds + 2)]
    turns: dict[str, Side] = {
        name: lambda turn, step=step: clocked(lambda: step(*given[turn])) for name, step in sides.items()
    }
    title = f"a step, median of {rounds}"
    found = medians(take_turns(title, turns, rounds, warm=2))
    slow, bare = list(found.values())[:2]
    lines = [
        {"side": name, "ms": 1e3 * seconds, "x as fast as plain": slow / seconds, "x the two products": seconds / bare}
        for name, seconds in found.items()
    ]
    show(title, lines)


def print_runs(material: Material, batch: int, epochs: int) -> None:
    """Train an index in both precisions."""
    cache = material.index
    lines: list[dict[str, object]] = [
        {
            "run": "zero-shot",
            "seconds": None,
            "top-1, %": material.right(material.queries @ cache.text_weights.numpy().T),
        },
        {"run": "training-free", "seconds": None, "top-1, %": material.right(cache.logits(material.queries))},
    ]
    title = f"{epochs} epochs, {material.views.shape[1]} cached views a shot, {len(material.queries)} queries"
    with tempfile.TemporaryDirectory() as folder:
        shots = material.shots(Path(folder))

        def train(precision: str) -> None:
            recipe = Recipe(epochs=epochs, batch=batch, lr=RATE, eps=EPS, precision=precision)
            tuned = finetune(cache, shots, Reader(), recipe)
            lines.append(
                {"run": f"fine-tuned, {precision}", "top-1, %": material.right(tuned.index.logits(material.queries))}
            )

        for precision in ("float32", "bfloat16"):
            taken = take_turns(title, {precision: lambda _, how=precision: clocked(lambda: train(how))}, 1, warm=0)
            lines[-1]["seconds"] = taken[precision][0]
    show(title, lines)


@against
@click.command(help=__doc__)
@click.option("--classes", default=1000, show_default=True)
@click.option("--shots", default=16, show_default=True)
@click.option("--dim", default=1024, show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--queries", default=5000, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Number of timed steps of each side.")
@click.option("--epochs", default=20, show_default=True, help="Number of epochs of the whole runs. Use 0 for no runs.")
def main(
    classes: int, shots: int, dim: int, batch: int, views: int, queries: int, rounds: int, epochs: int
) -> None:  # fmt: skip
    """Time the steps, train the indexes, and print the results."""
    click.echo(machine())
    material = Material.make(classes, shots, dim, views, queries)
    click.echo(f"{material.index.n} keys x {dim}, {classes} classes, batch {batch}")
    print_steps(material, batch, rounds)
    if epochs:
        print_runs(material, batch, epochs)


if __name__ == "__main__":
    main()
