"""Measure how much the most similar photos of a folder help with the answers to its unlabelled photos.

A random 90 % of each pool is labelled in rounds of suggestions, as in ``label_less.py``. After 1, 2 and 4 labels per
class on average, the table shows the accuracy on all other photos, and how much smoothing changes it (see
``labelling/smoothing.py``). The settings of smoothing were chosen with draws 0 and 1 of the first three pools, and the
largest weight with all draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from accuracy import Tables
from common import SHARED, machine
from encoders import LITE0, of_table
from label_actions import FOLDERS
from label_less import POOLS, SHARE, Round, fitted, suggested

from retrieval_tip import Index
from retrieval_tip.labelling.smoothing import smoothed

LABELS = (1, 2, 4)
NAMES = ("dtd", "flowers", "caltech", "photos")


def pool_of(name: str, shared: Path) -> Index:
    pool = POOLS[name]
    if isinstance(pool, Tables):
        return pool.pool_of(0, shared)[0]
    part = of_table(shared / "data/two-encoders/photos_16.parquet")
    return Index.from_features(
        part.features[LITE0], part.labels.tolist(), np.unique(part.labels).tolist(), device="cpu"
    )


def session(pool: Index, draw: int) -> Iterator[tuple[float, float, float]]:
    """Yield the accuracy in %, its change by smoothing, and the weight of the nearest photos, after each round."""
    rows = np.sort(np.random.default_rng(draw).permutation(pool.n)[: int(SHARE * pool.n)])
    features, ids = np.asarray(pool.keys[rows], dtype=np.float32), pool.class_ids.numpy()[rows]
    rest, labelled, index = np.arange(len(ids)), np.empty(0, dtype=np.int64), None
    for labels in LABELS:
        n = min(labels * len(pool.class_names) - len(labelled), len(rest))
        chosen = np.asarray(suggested(Round(features, ids, labelled, rest, n, index, draw)))
        labelled, rest = np.concatenate([labelled, chosen]), np.setdiff1d(rest, chosen)
        labelled = labelled[np.argsort(ids[labelled], kind="stable")]  # the order of the keys
        index, known = fitted(pool, features[labelled], ids[labelled])
        keys = dict(zip(labelled.tolist(), index.labels["key_id"].to_pylist(), strict=True))
        probabilities, weight = smoothed(index, features, keys)
        answers = index.logits(features[rest]).argmax(1).numpy(), probabilities[rest].argmax(1)
        before, after = (100 * float((known[own] == ids[rest]).mean()) for own in answers)
        yield before, after - before, weight


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--draws", default=4, show_default=True)
def main(shared: Path, draws: int) -> None:
    """Print a table with a row per pool."""
    click.echo(f"{machine()}. Top-1 in %, change by smoothing in points, mean weight.\n")
    click.echo(f"| | {' | '.join(f'{n} per class' for n in LABELS)} |\n|---{'|--:' * len(LABELS)}|")
    changes = []
    for name in NAMES:
        pool = pool_of(name, shared)
        runs = zip(*(session(pool, draw) for draw in range(draws)), strict=True)
        means = [[statistics.mean(column) for column in zip(*run, strict=True)] for run in runs]
        changes += [change for _, change, _ in means]
        cells = [f"{before:.1f} {change:+.1f} ({weight:.2f})" for before, change, weight in means]
        click.echo(f"| {FOLDERS[name]} | {' | '.join(cells)} |")
    click.echo(f"\nMean change {statistics.mean(changes):+.2f}, least {min(changes):+.2f}")


if __name__ == "__main__":
    main()
