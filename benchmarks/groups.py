"""Count how many unknown classes become a group in which they are the majority (``classify --group-no-match``).

Each draw chooses 7 unknown classes and 30 known classes at random, or as many as there are. The classifier is fitted to
16 shots of each known class. It classifies 210 test photos of known classes and 8 test photos of each unknown class. A
class can only become a group if at least two of its photos have no match, so the number of such classes is an upper
bound.
"""

from __future__ import annotations

from pathlib import Path

import click
import common
import numpy as np
import numpy.typing as npt
from common import machine, markdown, summary
from label_less import DEVELOPED, POOLS, IntArray

from retrieval_tip import Index
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling.groups import group_no_match

UNKNOWN, KNOWN, EACH, FAMILIAR, SHOTS = 7, 30, 8, 210, 16
HEADS = ("", "groups", "unknown classes found", "upper bound", "known photos without a match", "draws with 6 or more")
DATASETS = {name: POOLS[name] for name in ("photos", "flowers", "caltech", "dtd", "cars")}
DATASETS["food"] = DEVELOPED["food"]


def drawn(draw: np.random.Generator, ids: IntArray, classes: IntArray, each: int) -> IntArray:
    return np.concatenate([draw.permutation(np.flatnonzero(ids == c))[:each] for c in classes])


def trial(pool: Index, features: npt.NDArray[np.float32], ids: IntArray, seed: int) -> tuple[int, int, int, int]:
    """Return the numbers of groups, of unknown classes that are the majority of a group, of unknown classes that could
    be, and of photos of known classes without a match.
    """
    draw = np.random.default_rng(seed)
    enough = np.flatnonzero(np.bincount(ids) >= EACH)
    unknown, known = np.split(draw.permutation(enough)[: UNKNOWN + KNOWN], [UNKNOWN])
    own = pool.class_ids.numpy()
    shots = drawn(draw, own, known, SHOTS)
    index = Index.from_features(pool.keys[shots], own[shots], pool.class_names, device="cpu")
    closed_form.fit(index)
    familiar = drawn(draw, ids, known, -(-FAMILIAR // len(known)))[:FAMILIAR]
    rows = np.concatenate([familiar, drawn(draw, ids, unknown, EACH)])
    answers = group_no_match(index, features[rows], index.classify(features[rows], neighbours=0)).to_arrow()
    numbers, no_match = (answers[name].to_numpy() for name in ("group", "no_match"))
    found, truth = set(), ids[rows]
    for number in range(1, int(np.nanmax(numbers, initial=0)) + 1):
        classes, sizes = np.unique(truth[numbers == number], return_counts=True)
        found |= set(classes[2 * sizes > sizes.sum()]) & set(unknown)
    possible = sum(int((no_match & (truth == c)).sum() > 1) for c in unknown)
    return int(np.nanmax(numbers, initial=0)), len(found), possible, int((no_match & np.isin(truth, known)).sum())


@click.command(help=__doc__)
@common.shared_option
@click.option("--pool", "pools", type=click.Choice(list(DATASETS)), multiple=True, default=list(DATASETS))
@click.option("--draws", default=20, show_default=True)
def main(shared: Path, pools: tuple[str, ...], draws: int) -> None:
    """Print the numbers of groups and of unknown classes."""
    click.echo(f"{machine()}; {draws} draws of {UNKNOWN} unknown classes, mean ± standard error.\n")
    rows = []
    for name in pools:
        pool, _ = DATASETS[name].pool_of(0, shared)
        items = DATASETS[name].items(pool, shared)
        runs = list(zip(*(trial(pool, items.features, items.ids, seed) for seed in range(draws)), strict=True))
        cells = ["{:.1f} ± {:.1f}".format(*summary(part)) for part in runs]
        rows.append((DATASETS[name].title, *cells, sum(n >= UNKNOWN - 1 for n in runs[1])))
    click.echo(markdown(HEADS, rows))


if __name__ == "__main__":
    main()
