"""Check what ``classify --coverage`` and ``sort --at-most-wrong`` promise, on test images.

The builds are those of ``estimates.py``. Photos without a match have no set, and count apart. The coverage is a mean
over the classes. A top-k that covers as much has the ``k`` most probable classes, with the smallest ``k`` that holds
the right one as often as the sets do. The weights of the sets were chosen with seed 100.

``sort`` puts a photo into the folder of a class if it has a match and the answer is probable enough. The share of wrong
answers has weights, so that classes are as frequent as among the shots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import common
import numpy as np
import torch
from accuracy import DATASETS
from common import machine, markdown
from estimates import TABLES, Drawn, drawn

from retrieval_tip import tip
from retrieval_tip.evaluation.held_out import held_out_probabilities, threshold_of
from retrieval_tip.fit import closed_form
from retrieval_tip.settings import Ask

COVERAGES, WRONG = (0.8, 0.9, 0.95), (0.01, 0.02, 0.05)
COVERED = (
    "builds",
    "promised",
    "covered",
    "builds below",
    "a tenth of the classes, at most",
    "photos without a match",
    "covered there",
    "classes in a set",
    "top-k",
    "empty sets",
)
PLACED = (
    "builds",
    "promised",
    "wrong",
    "builds above",
    "builds above the printed bound",
    "sorted photos",
)
Row = tuple[float, ...]


def covered(made: Drawn, p: torch.Tensor, matched: np.ndarray) -> Iterator[Row]:
    """Yield the figures of :data:`COVERED` for each promise, from 0 to 1."""
    truth = made.truth
    ranks, some = (
        (p > p[torch.arange(len(p)), truth][:, None]).sum(1).numpy(),
        replace(made, truth=truth[matched]),
    )
    tops = [some.balanced(ranks[matched] < k) for k in range(1, p.shape[1] + 1)]
    for coverage in COVERAGES:
        sets = made.index.sets(Ask(coverage=coverage))
        assert sets is not None
        inside = sets.members(p).numpy()
        own, sizes = inside[np.arange(len(p)), truth], inside[matched].sum(1)
        share, classes = (
            some.balanced(own[matched]),
            [own[matched & (truth == i)].mean() for i in set(some.truth)],
        )
        k = next((k for k, top in enumerate(tops, 1) if top >= share - 1e-9), p.shape[1])
        without = own[~matched].mean() if not matched.all() else np.nan
        figures = share, share < coverage, np.quantile(classes, 0.1), 1 - matched.mean(), without
        yield *figures, some.balanced(sizes), k, some.balanced(sizes == 0)


def placed(made: Drawn, p: torch.Tensor, matched: np.ndarray) -> Iterator[Row]:
    """Yield the figures of :data:`PLACED` for each promise, from 0 to 1."""
    held, (top, found), truth = (
        held_out_probabilities(made.index),
        (part.numpy() for part in p.max(1)),
        made.truth,
    )
    weights = np.array(made.index.counts)[truth] / np.bincount(truth)[truth]
    for most in WRONG:
        threshold = threshold_of(held, most)
        kept = matched & (top >= threshold.probability)
        wrong = float(np.average((found != truth)[kept], weights=weights[kept]))
        yield wrong, wrong > most, wrong > threshold.highest, kept.mean()


def mean_rows(
    promises: Row, builds: dict[str, list[list[Row]]], parts: list[str]
) -> Iterator[list[str]]:
    """Yield a line for each promise and data set. A part is formatted with the mean, or printed as mean ± deviation."""
    every = {"all": [rows for own in builds.values() for rows in own], **builds}
    for i, promise in enumerate(promises):
        for name, own in every.items():
            values = np.array([rows[i] for rows in own])
            cells = [
                part.format(100 * np.nanmean(x), 100 * np.std(x), int(np.nansum(x)), np.nanmean(x))
                for part, x in zip(parts, values.T, strict=True)
            ]
            yield [name, str(len(own)), f"{100 * promise:.0f}", *cells]


@click.command(help=__doc__)
@common.shared_option
@click.option("--builds", default=120, show_default=True, help="Number of shapes.")
@click.option("--seed", default=1, show_default=True)
def main(shared: Path, builds: int, seed: int) -> None:
    """Fit the shapes, and print means over the builds of each dataset."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(seed)
    sets: dict[str, list[list[Row]]] = {DATASETS[name].title: [] for name in TABLES}
    thresholds: dict[str, list[list[Row]]] = {name: [] for name in sets}
    for i in range(builds):
        name = TABLES[i % len(TABLES)]
        made = drawn(name, shared, draw)
        made = replace(made, index=closed_form.fit(made.index)[0])
        table = made.index.classify(made.features, neighbours=0, logits=False).to_arrow()
        matched = ~np.array(table["no_match"].fill_null(False))
        p = tip.probabilities(made.index.logits(made.features), made.index.settings.temperature)
        sets[DATASETS[name].title].append([*covered(made, p, matched)])
        thresholds[DATASETS[name].title].append([*placed(made, p, matched)])
    click.echo(f"{machine()}; seed {seed}, {builds} builds; means ± standard deviations in %\n")
    share, number, mean = "{0:.1f}", "{2}", "{3:.2f}"
    parts = ["{0:.1f} ± {1:.1f}", number, share, share, share, mean, mean, share]
    click.echo(markdown(("", *COVERED), mean_rows(COVERAGES, sets, parts)) + "\n")
    parts = ["{0:.1f} ± {1:.1f}", number, number, share]
    click.echo(markdown(("", *PLACED), mean_rows(WRONG, thresholds, parts)))


if __name__ == "__main__":
    main()
