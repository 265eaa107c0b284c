"""Measure how often the true accuracy of the unlabelled photos lies inside the interval that the labelling page shows.

Labels arrive in rounds of 5: four photos come from ``suggest``, and one is drawn at random from the unlabelled photos.
Before the first fit and after every 25 labels, the next photos are suggested. At 50, 100 and 200 labels, the
accuracy of the unlabelled photos is estimated from the random photos and compared with the true accuracy. "Held out"
shows the same for the share of right answers to random photos, without a correction. Without text, a photo of a class
that has no label counts as a mistake. The gain that is predicted for doubling the labels is compared
with the true gain on all photos that are still unlabelled afterwards.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import SHARED, machine
from label_less import POOLS, SHARE, IntArray, fitted, read_runs

from retrieval_tip import Index
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.labelling.photos import Pool, suggest_features
from retrieval_tip.labelling.progress import estimate_rest, gain_of

CHECKED, BATCH, ROUND = (50, 100, 200), 25, 5


def session(pool: Index, draw: int) -> Iterator[dict[str, Any]]:
    """Label a random part of the pool, and yield the estimate and the truth at each number of labels."""
    chance = np.random.default_rng(draw)
    rows = chance.permutation(pool.n)[: int(SHARE * pool.n)]
    features, ids = np.asarray(pool.keys[rows], dtype=np.float32), pool.class_ids.numpy()[rows]
    labelled, random, index = np.empty(0, dtype=np.int64), [], None
    before: tuple[float, float | None, IntArray] | None = None
    while len(labelled) < CHECKED[-1]:
        rest = np.setdiff1d(np.arange(len(ids)), labelled)
        if len(rest) < 2 * BATCH:
            return
        drawn = chance.choice(rest, BATCH // ROUND, replace=False)
        random += list(range(len(labelled), len(labelled) + len(drawn)))
        left = np.setdiff1d(rest, drawn)
        names = [str(row) for row in left]
        picks = suggest_features(Pool(names, features[left], [None] * len(left)), BATCH - len(drawn), index)
        labelled = np.concatenate([labelled, drawn, np.array([int(name) for name in picks.inputs])])
        index, known = fitted(pool, features[labelled], ids[labelled])
        if len(labelled) not in CHECKED:
            continue
        start = time.perf_counter()
        rest = np.setdiff1d(rest, labelled)
        estimate = estimate_rest(index, random, features[rest])
        gain = gain_of(index, random, estimate, len(labelled))
        seconds = time.perf_counter() - start
        right = known[index.logits(features).argmax(1).numpy()] == ids
        yield {
            "labels": len(labelled), "truth": float(right[rest].mean()), "low": estimate.low, "high": estimate.high,
            "accuracy": estimate.accuracy, "right": estimate.right, "n": estimate.n, "seconds": seconds,
            "predicted": None if before is None else before[1],
            "gain": None if before is None else float(right[rest].mean() - before[2][rest].mean()),
        }  # fmt: skip
        before = len(labelled), gain, right


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--pool", "pools", type=click.Choice(list(POOLS)), multiple=True, default=list(POOLS))
@click.option("--draws", default=20, show_default=True)
@click.option("--first", default=10, show_default=True, help="First draw. Draws 0 to 9 were used to choose settings.")
@click.option("--results", type=click.Path(path_type=Path), required=True, help="File of runs, one per line.")
def main(shared: Path, pools: tuple[str, ...], draws: int, first: int, results: Path) -> None:
    """Simulate labelling sessions, and print how often the interval contains the truth."""
    click.echo(f"{machine()}. Accuracies in %.\n")
    for name in pools:
        done = {run["draw"] for run in read_runs(results) if run["pool"] == name}
        missing = [draw for draw in range(first, first + draws) if draw not in done]
        if missing:
            pool, _ = POOLS[name].pool_of(0, shared)
        for draw in missing:
            with results.open("a") as file:
                file.writelines(json.dumps({"pool": name, "draw": draw} | row) + "\n" for row in [*session(pool, draw)])
    heads = ("labels", "random", "inside", "estimate", "truth", "width", "inside, held out", "held out")
    heads += ("predicted gain", "true gain", "s")
    click.echo(f"| | {' | '.join(heads)} |\n|---{'|--:' * len(heads)}|")
    runs = read_runs(results)
    for name in (*pools, "all"):
        for labels in CHECKED:
            if own := [run for run in runs if run["labels"] == labels and name in (run["pool"], "all")]:
                click.echo(f"| {POOLS[name].title if name in POOLS else 'all'} | {' | '.join(cells_of(own))} |")


def cells_of(runs: list[dict[str, Any]]) -> list[str]:
    """Return the cells of a row of the table."""

    def mean(values: Iterable[float], digits: int = 1) -> str:
        some = list(values)
        return f"{statistics.mean(some):.{digits}f}" if some else ""

    held_out = [(run, run["right"] / run["n"]) for run in runs]
    inside = sum(run["low"] <= run["truth"] <= run["high"] for run in runs)
    alone = sum(low <= run["truth"] <= high for run, share in held_out for low, high in [wilson(share, run["n"])])
    known = [run for run in runs if run["predicted"] is not None]
    return [
        str(runs[0]["labels"]), mean((run["n"] for run in runs), 0), f"{inside} of {len(runs)}",
        mean(100 * run["accuracy"] for run in runs), mean(100 * run["truth"] for run in runs),
        mean((100 * (run["high"] - run["low"]) for run in runs), 0), f"{alone} of {len(runs)}",
        mean(100 * share for _, share in held_out), mean(100 * run["predicted"] for run in known),
        mean(100 * run["gain"] for run in known), mean(run["seconds"] for run in runs),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
