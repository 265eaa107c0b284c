"""Count how many unknown classes become a group in which they are the majority (``classify --group-no-match``).

Each draw chooses 7 unknown classes and 30 known classes at random, or as many as there are. The classifier is fitted to
16 shots of each known class. It classifies 210 test photos of known classes and 8 test photos of each unknown class. A
class can only become a group if at least two of its photos have no match, so the number of such classes is an upper
bound.

With ``--far food --each 80``, the unknown classes are those of another dataset with the same encoder, with 80 photos
each. They are far from all known classes. The purity is the share of the photos in the five largest groups, which the
page shows, that belong to the majority of their group.
"""

from __future__ import annotations

from pathlib import Path

import click
import common
import numpy as np
from common import machine, markdown, summary
from label_less import DEVELOPED, POOLS, IntArray
from methods import Items

from retrieval_tip import Index
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling.groups import group_no_match

UNKNOWN, KNOWN, FAMILIAR, SHOTS, SHOWN = 7, 30, 210, 16, 5
HEADS = (
    "",
    "groups",
    "unknown classes found",
    "upper bound",
    "known photos without a match",
    "purity, %",
    "draws with 6 or more",
)
DATASETS = {name: POOLS[name] for name in ("photos", "flowers", "caltech", "dtd", "cars")}
DATASETS["food"] = DEVELOPED["food"]


def drawn(draw: np.random.Generator, ids: IntArray, classes: IntArray, each: int) -> IntArray:
    return np.concatenate([draw.permutation(np.flatnonzero(ids == c))[:each] for c in classes])


def trial(pool: Index, items: Items, far: Items | None, each: int, seed: int) -> tuple[float, ...]:
    """Return the numbers of groups, of unknown classes that are the majority of a group, of unknown classes that could
    be, and of photos of known classes without a match, and the purity of the largest groups in %.
    """
    draw, features, ids = np.random.default_rng(seed), items.features, items.ids
    if far is None:
        enough = np.flatnonzero(np.bincount(ids) >= each)
        unknown, known = np.split(draw.permutation(enough)[: UNKNOWN + KNOWN], [UNKNOWN])
    else:
        known = draw.permutation(np.unique(ids))[:KNOWN]
        unknown = draw.permutation(np.unique(far.ids))[:UNKNOWN] + len(pool.class_names)
        features, ids = (
            np.concatenate([features, far.features]),
            np.append(ids, far.ids + len(pool.class_names)),
        )
    own = pool.class_ids.numpy()
    shots = drawn(draw, own, known, SHOTS)
    index = Index.from_features(pool.keys[shots], own[shots], pool.class_names, device="cpu")
    index, _ = closed_form.fit(index)
    familiar = drawn(draw, ids, known, -(-FAMILIAR // len(known)))[:FAMILIAR]
    rows = np.concatenate([familiar, drawn(draw, ids, unknown, each)])
    answers = group_no_match(
        index, features[rows], index.classify(features[rows], neighbours=0)
    ).to_arrow()
    numbers, no_match = (answers[name].to_numpy() for name in ("group", "no_match"))
    found, truth, most = set(), ids[rows], 0
    for number in range(1, int(np.nanmax(numbers, initial=0)) + 1):
        classes, sizes = np.unique(truth[numbers == number], return_counts=True)
        found |= set(classes[2 * sizes > sizes.sum()]) & set(unknown)
        most += int(sizes.max()) * (number <= SHOWN)
    possible = sum(int((no_match & (truth == c)).sum() > 1) for c in unknown)
    familiar_ones = int((no_match & np.isin(truth, known)).sum())
    purity = 100 * most / max(1, int((numbers <= SHOWN).sum()))
    return int(np.nanmax(numbers, initial=0)), len(found), possible, familiar_ones, purity


@click.command(help=__doc__)
@common.shared_option
@click.option(
    "--pool", "pools", type=click.Choice(list(DATASETS)), multiple=True, default=list(DATASETS)
)
@click.option("--far", type=click.Choice(list(DATASETS)), help="Dataset of the unknown classes.")
@click.option(
    "--each", default=8, show_default=True, help="Number of photos of each unknown class."
)
@click.option("--draws", default=20, show_default=True)
def main(shared: Path, pools: tuple[str, ...], far: str | None, each: int, draws: int) -> None:
    """Print the numbers of groups and of unknown classes."""
    click.echo(f"{machine()}; {draws} draws of {UNKNOWN} unknown classes, mean ± standard error.\n")
    rows, others = (
        [],
        None if far is None else DATASETS[far].items(DATASETS[far].pool_of(0, shared)[0], shared),
    )
    for name in pools:
        pool, _ = DATASETS[name].pool_of(0, shared)
        items = DATASETS[name].items(pool, shared)
        runs = list(
            zip(*(trial(pool, items, others, each, seed) for seed in range(draws)), strict=True)
        )
        cells = ["{:.1f} ± {:.1f}".format(*summary(part)) for part in runs]
        rows.append((DATASETS[name].title, *cells, sum(n >= UNKNOWN - 1 for n in runs[1])))
    click.echo(markdown(HEADS, rows))


if __name__ == "__main__":
    main()
