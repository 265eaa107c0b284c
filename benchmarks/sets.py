"""Check the coverage and the size of sets of classes (``classify --coverage``) on test images.

The builds are those of ``estimates.py``, and the truth is the mean over the classes of all test images of a build. A
top-k that covers as much has the ``k`` most probable classes, with the smallest ``k`` that holds the right one as often
as the sets do. APS (Romano, Sesia and Candes, 2020) adds classes, most probable first, until the sum of their
probabilities reaches a threshold, and takes the last class at random. Its row and the row of the plain score before it
have the same held-out probabilities, of eight parts. The weights were chosen with seed 100.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from common import SHARED, machine
from estimates import TABLES, Drawn, drawn

from retrieval_tip import tip
from retrieval_tip.evaluation.held_out import HeldOut, held_out_probabilities
from retrieval_tip.fit import closed_form
from retrieval_tip.retrieval.sets import Scores
from retrieval_tip.settings import Ask

COVERAGES = (0.8, 0.9, 0.95)
KINDS = ("sets", "sets and the most probable class", "plain score, 8 parts", "APS, 8 parts")


def sums(p: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return 1 minus the score of APS of each class, for probabilities ``[q, c]``."""
    order = np.argsort(-p, axis=1)
    above = np.cumsum(np.take_along_axis(p, order, 1), 1)
    scores = np.empty_like(above)
    np.put_along_axis(scores, order, above, 1)
    return 1 - scores + draw.random((len(p), 1)) * p


def members(made: Drawn, held: HeldOut, coverage: float, p: np.ndarray, draw: np.random.Generator) -> list[np.ndarray]:
    """Return the sets of each of :data:`KINDS` as booleans ``[q, c]``. The test images have the probabilities ``p``."""
    sets = made.index.sets(Ask(coverage=coverage))
    assert sets is not None
    own = sets.members(torch.from_numpy(p)).numpy()
    found = [own, own | (p == p.max(1, keepdims=True))]
    weights = 1 / np.bincount(held.labels)[held.labels]
    for before, now in ((held.pred_probs, p), (sums(held.pred_probs, draw), sums(p, draw))):
        right = before[np.arange(len(before)), held.labels]
        rows = np.stack([right, weights / weights.sum(), held.labels], 1)
        found.append(now >= Scores(rows, made.index.settings).sets(coverage, np.ones(p.shape[1], bool)).least)
    return found


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--builds", default=60, show_default=True, help="Number of shapes.")
@click.option("--seed", default=1, show_default=True)
@click.option("--each", is_flag=True, help="Print the coverage and the size of the sets of every build.")
def main(shared: Path, builds: int, seed: int, each: bool) -> None:
    """Fit the shapes, and print the mean coverage and size of their sets."""
    torch.set_num_threads(1)
    draw, chance = np.random.default_rng(seed), np.random.default_rng(0)
    found: dict[tuple[float, str], list[tuple[float, ...]]] = {}
    for i in range(builds):
        made = drawn(TABLES[i % len(TABLES)], shared, draw)
        closed_form.fit(made.index)
        p = tip.probabilities(made.index.logits(made.features), made.index.settings.temperature).numpy()
        ranks = (p > p[np.arange(len(p)), made.truth][:, None]).sum(1)
        held = held_out_probabilities(made.index)
        tops = [made.balanced(ranks < k) for k in range(1, p.shape[1] + 1)]
        for coverage in COVERAGES:
            for kind, inside in zip(KINDS, members(made, held, coverage, p, chance), strict=True):
                covered = made.balanced(inside[np.arange(len(p)), made.truth])
                size, empty = (made.balanced(each) for each in (inside.sum(1), ~inside.any(1)))
                k = next((k for k, top in enumerate(tops, 1) if top >= covered - 1e-9), p.shape[1])
                found.setdefault((coverage, kind), []).append((covered, size, k, size < k, empty))
                if each and kind == KINDS[0]:
                    click.echo(f"{made.shape}: {coverage:g} {100 * covered:.1f} % {size:.2f} classes, top-{k}")
    click.echo(f"{machine()}; seed {seed}, {builds} builds; means\n")
    click.echo("| promised | | covered | classes in a set | top-k that covers as much | smaller in | empty sets |")
    click.echo("|---|---|--:|--:|--:|--:|--:|")
    for (coverage, kind), rows in found.items():
        covered, size, k, smaller, empty = np.mean(rows, axis=0)
        spread = np.std([row[0] for row in rows])
        cells = [f"{100 * covered:.1f} ± {100 * spread:.1f} %", f"{size:.2f}", f"{k:.2f}", f"{100 * smaller:.0f} %"]
        click.echo(f"| {100 * coverage:.0f} % | {kind} | {' | '.join(cells)} | {100 * empty:.1f} % |")


if __name__ == "__main__":
    main()
