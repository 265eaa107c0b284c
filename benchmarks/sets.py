"""Check the coverage and the size of sets of classes (``classify --coverage``) on test images.

The builds are those of ``estimates.py``, and the truth is the mean over the classes of all test images of a build. A
top-k that covers as much has the ``k`` most probable classes, with the smallest ``k`` that holds the right one as often
as the sets do. The weights of the sets were chosen with seed 100.
"""

from __future__ import annotations

from pathlib import Path

import click
import common
import numpy as np
import torch
from common import machine, markdown
from estimates import TABLES, drawn

from retrieval_tip import tip
from retrieval_tip.fit import closed_form
from retrieval_tip.settings import Ask

COVERAGES = (0.8, 0.9, 0.95)
HEADS = ("promised", "covered", "classes in a set", "top-k that covers as much", "smaller in", "empty sets")


@click.command(help=__doc__)
@common.shared_option
@click.option("--builds", default=60, show_default=True, help="Number of shapes.")
@click.option("--seed", default=1, show_default=True)
def main(shared: Path, builds: int, seed: int) -> None:
    """Fit the shapes, and print the mean coverage and size of their sets."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(seed)
    found: dict[float, list[tuple[float, ...]]] = {coverage: [] for coverage in COVERAGES}
    for i in range(builds):
        made = drawn(TABLES[i % len(TABLES)], shared, draw)
        closed_form.fit(made.index)
        p = tip.probabilities(made.index.logits(made.features), made.index.settings.temperature)
        ranks = (p > p[torch.arange(len(p)), made.truth][:, None]).sum(1).numpy()
        tops = [made.balanced(ranks < k) for k in range(1, p.shape[1] + 1)]
        for coverage, rows in found.items():
            sets = made.index.sets(Ask(coverage=coverage))
            assert sets is not None
            inside = sets.members(p).numpy()
            covered = made.balanced(inside[np.arange(len(p)), made.truth])
            size, empty = made.balanced(inside.sum(1)), made.balanced(~inside.any(1))
            k = next((k for k, top in enumerate(tops, 1) if top >= covered - 1e-9), p.shape[1])
            rows.append((covered, size, k, size < k, empty))
    click.echo(f"{machine()}; seed {seed}, {builds} builds; means\n")
    lines = []
    for coverage, rows in found.items():
        covered, size, k, smaller, empty = np.mean(rows, axis=0)
        spread = f"{100 * covered:.1f} ± {100 * np.std([row[0] for row in rows]):.1f} %"
        cells = (f"{size:.2f}", f"{k:.2f}", f"{100 * smaller:.0f} %", f"{100 * empty:.1f} %")
        lines.append((f"{100 * coverage:.0f} %", spread, *cells))
    click.echo(markdown(HEADS, lines))


if __name__ == "__main__":
    main()
