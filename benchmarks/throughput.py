"""Compare classification with the plain dense form that was published, and with the bare affinity product.

All sides of a table run in one process, and take turns after a warm-up turn. Figures are medians. Features are
synthetic (benchmarks/made.py). Alpha and beta are set in the same way as by `index build`. All computations use float32
unless stated otherwise.

\b
plain dense form: affinity = f @ keys.T; cache = ((-1) * (beta - beta * affinity)).exp() @ one_hot;
    logits = 100 * f @ W.T + cache * alpha. If there are more than 16,384 keys, blocks of this size are used, with 256
    queries per call.
product alone: f @ keys.T into preallocated memory, which every exact answer requires.

Agreement is the share of answers that are equal to the answers over all keys in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import click
import common
import numpy as np
import torch
from common import SEED, against, clocked, machine, medians, show, take_turns
from made import Made
from torch import Tensor

from retrieval_tip import Index
from retrieval_tip.backbones.base import resolve_device
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.settings import Settings

SECTIONS = ("exact", "retrieval")
DENSE_BLOCK = 16_384
SINGLES = 8
"""Number of calls per turn when each call has a single query."""

Size = tuple[int, int, int]
Run = Callable[[Tensor], Tensor]


@dataclass
class Way:
    """A way to answer queries, in which ``run`` is called ``calls`` times per turn with ``batch`` queries per call."""

    run: Run
    queries: Tensor
    batch: int
    calls: int = 1
    answers: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, turn: int) -> float:
        """Return the seconds per query."""
        starts = range(0, len(self.queries) - self.batch + 1, self.batch)
        seconds = 0.0
        for call in range(self.calls):
            at = starts[(turn * self.calls + call) % len(starts)]
            found: list[Tensor] = []
            seconds += clocked(
                lambda f=self.queries[at : at + self.batch], found=found: found.append(self._run(f))
            )
            self.answers[at] = found[0].argmax(dim=1).cpu()
        return seconds / (self.batch * self.calls)

    def _run(self, f: Tensor) -> Tensor:
        logits = self.run(f)
        if f.is_cuda:
            torch.cuda.synchronize(f.device)
        return logits

    def right(self, expected: Tensor) -> float:
        """Return the percentage of answers that are equal to the expected answers."""
        hits = [
            (found == expected[at : at + len(found)]).float() for at, found in self.answers.items()
        ]
        return 100 * float(torch.cat(hits).mean())


def dense(cache: Index) -> Run:
    """Return the plain dense form. If there are many keys, it computes in blocks."""
    weights, alpha, beta, c = (
        cache.text_weights,
        cache.settings.alpha,
        cache.settings.beta,
        len(cache.class_names),
    )
    keys, ids = torch.from_numpy(cache.keys).to(cache.device), cache.class_ids[:, None]
    one_hot = torch.zeros(min(cache.n, DENSE_BLOCK), c, device=cache.device)
    whole = cache.n <= DENSE_BLOCK
    if whole:
        one_hot.scatter_(1, ids, 1)

    def run(f: Tensor) -> Tensor:
        logits = cache.settings.logit_scale * f @ weights.T
        for start in range(0, cache.n, DENSE_BLOCK):
            part = slice(start, min(start + DENSE_BLOCK, cache.n))
            values = one_hot[: part.stop - start]
            if not whole:
                values.scatter_(1, ids[part], 1)
            affinity = f @ keys[part].T
            logits = logits + ((-1) * (beta - beta * affinity)).exp() @ values * alpha
            if not whole:
                values.scatter_(1, ids[part], 0)
        return logits

    return run


def bare_product(cache: Index, batch: int, dtype: torch.dtype = torch.float32) -> Run:
    """Return the bare affinity product."""
    keys = torch.from_numpy(cache.keys).to(cache.device, dtype)
    affinity = torch.empty(batch, cache.n, dtype=dtype, device=cache.device)
    return lambda f: torch.mm(f.to(dtype), keys.T, out=affinity)


@dataclass(frozen=True)
class Material:
    """Keys and labelled queries. ``features``, of shape ``[q, d]``, are on the device."""

    index: Index
    features: Tensor
    ids: Tensor

    @classmethod
    def make(cls, size: Size, queries: int, index: str = "Flat", device: str = "cpu") -> Material:
        """Make features, and an index that contains them."""
        n, d, c = size
        made, ids = Made(c, d, SEED), np.arange(n) % c
        keys = made.draw(ids, 1)
        alpha, beta = untouched_settings(keys, ids)
        cache = Index.from_features(
            keys,
            ids,
            made.names,
            made.text,
            settings=Settings(alpha=alpha, beta=beta),
            index=index,
            device=device,
        )
        asked = made.classes(queries, 2)
        return cls(cache, torch.from_numpy(made.draw(asked, 3)).to(device), torch.from_numpy(asked))

    def other(self, index: str) -> Index:
        """Return an index of the same keys that has another index type."""
        cache = self.index
        settings = replace(cache.settings, k=None)
        return Index.from_features(
            cache.keys,
            cache.class_ids.cpu().numpy(),
            cache.class_names,
            cache.text_weights.cpu().numpy(),
            settings=settings,
            index=index,
            device=cache.device,
        )

    @property
    def title(self) -> str:
        """Size and settings of the index."""
        cache, (alpha, beta) = self.index, (self.index.settings.alpha, self.index.settings.beta)
        return f"{cache.n:,} x {cache.d}, {len(cache.class_names)} classes, alpha {alpha:.4g}, beta {beta:.4g}"

    def compare(
        self, section: str, ways: dict[str, Way], rounds: int, expected: Tensor | None = None
    ) -> None:
        """Measure the given ways in turn, and compare them with the first one."""
        title = f"{section}: {self.title}, medians of {rounds} turns"
        seconds = medians(take_turns(title, ways, rounds))
        plain = next(iter(ways))
        lines = []
        for name, way in ways.items():
            known = (
                way.queries is self.features and way.batch > 1 and not name.startswith("product")
            )
            base = f"{plain}, alone" if way.batch == 1 else plain
            line = {"way": name, "queries a call": way.batch, "us a query": 1e6 * seconds[name]}
            line |= {"x plain": seconds[base] / seconds[name]}
            line["agreement, %"] = way.right(expected) if known and expected is not None else None
            lines.append(line | {"top-1, %": way.right(self.ids) if known else None})
        show(title, lines)


def exact(size: Size, queries: int, rounds: int, device: str) -> None:
    """Measure answers that use all keys."""
    material = Material.make(size, queries, "Flat", device)
    cache, f = material.index, material.features
    ways = {
        "plain dense form": dense(cache),
        "product alone": bare_product(cache, queries),
        "k all, float32": lambda f: cache.logits(f, "all"),
    }
    expected = cache.logits(f, "all").argmax(dim=1).cpu()
    material.compare(
        "exact", {name: Way(call, f, queries) for name, call in ways.items()}, rounds, expected
    )


def retrieval(
    size: Size, queries: int, large: int, rounds: int, device: str, others: list[tuple[str, int]]
) -> None:
    """Measure `--index auto` and other index types with batches, large batches and single queries."""
    material = Material.make(size, queries, "auto", device)
    cache, f = material.index, material.features
    made, plain = Made(size[2], size[1], SEED), dense(cache)
    many = torch.from_numpy(made.draw(made.classes(large, 4), 5)).to(device)
    ways = {
        "plain dense form": Way(plain, f, min(queries, 1024 if cache.n <= DENSE_BLOCK else 256)),
        "plain dense form, alone": Way(plain, f, 1),
        "auto": Way(cache.logits, f, queries),
        "auto, alone": Way(cache.logits, f, 1, SINGLES),
        "auto, large batch": Way(cache.logits, many, large),
    }
    for factory, k in others:
        other = material.other(factory)
        ways[f"{factory}, k {k}"] = Way(
            lambda f, other=other, k=k: other.logits(f, k), f, min(queries, 256)
        )
    expected = torch.cat([cache.logits(part, "all").argmax(dim=1).cpu() for part in f.split(1024)])
    material.compare(
        f"retrieval, {cache.index_type}, k {cache.settings.k or 'all'}", ways, rounds, expected
    )


SIZES = ((16_000, 1024, 1000), (16_000, 512, 1000), (160_000, 512, 1000), (1_000_000, 512, 1000))
"""Numbers of keys, dimensions and classes."""
SIZE = (int, int, int)


@against
@click.command(help=__doc__)
@click.option(
    "--only",
    type=click.Choice(SECTIONS),
    multiple=True,
    help="Section to run; repeatable.  [default: all]",
)
@click.option("--exact-size", type=SIZE, default=SIZES[0], show_default=True)
@click.option(
    "--size",
    "sizes",
    type=SIZE,
    multiple=True,
    default=SIZES,
    help="Size for `retrieval`; repeatable.",
)
@click.option(
    "--index",
    "others",
    type=(str, int),
    multiple=True,
    metavar="FACTORY K",
    help="FAISS factory string and k to compare in `retrieval`. Can be repeated.",
)
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    help="Number of timed turns. `exact` uses twice this number.",
)
@click.option(
    "--queries", type=int, help="[default: 1000 for exact, 8192, and 4096 above 200,000 keys]"
)
@click.option(
    "--large-batch", default=32768, show_default=True, help="Batch size of the large batch."
)
@common.device_option
def main(
    only: tuple[str, ...],
    exact_size: Size,
    sizes: tuple[Size, ...],
    others: tuple[tuple[str, int], ...],
    rounds: int,
    queries: int | None,
    large_batch: int,
    device: str,
) -> None:
    """Run the sections, and print the results."""
    torch.manual_seed(SEED)
    device, chosen = resolve_device(device), only or SECTIONS
    click.echo(machine())
    if "exact" in chosen:
        exact(exact_size, queries or 1000, 2 * rounds, device)
    for size in sizes if "retrieval" in chosen else ():
        asked = queries or (8192 if size[0] <= 200_000 else 4096)
        retrieval(size, asked, large_batch, rounds, device, list(others))


if __name__ == "__main__":
    main()
