"""Simulate sessions of ``label``, and measure how far the estimated accuracy is from the truth.

A session labels up to 500 photos of 17 classes of a pool, or of 12 of the 15 classes of the pool that look alike most.
To find these, a classifier is fitted to half of the photos of the pool. Two classes look alike by the mean probability
that it gives each of them for photos of the other, among the other half. The two most similar classes come first, and
then the class that is most similar to all chosen ones, in turn.

Single photos come from the queue of ``label``, in batches of 5. After 65 single photos, the session is also continued
by reviewing 24 photos at a time, least certain first. The classifier is fitted after each batch. At each stage, the
number of wrong answers among the other photos is estimated and compared with the truth. A photo of a class that has no
label counts as wrong. A move is the change of the estimated accuracy by a batch of single photos, from 30 photos on.

"Done" means that less than 2 % of all photos are wrong at the upper end of the interval. "Stop" means that 20 more
single photos are expected to gain less than a point. It is compared with their true gain on photos that are unlabelled
afterwards.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import common
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from common import Run, add_runs, features_of, machine, markdown, read_runs
from label_less import CLIP, IntArray

from retrieval_tip import Index
from retrieval_tip.evaluation.held_out import probabilities_of
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling import queue
from retrieval_tip.labelling.pool import Pool, suggest_features
from retrieval_tip.labelling.progress import Estimate, estimate_rest, gain_of
from retrieval_tip.store.labels import PICKED

POOLS = {
    "dtd": (f"{CLIP}/dtd", ("val", "test"), "feature"),
    "flowers": (f"{CLIP}/oxford_flowers", ("val", "test"), "feature"),
    "caltech": (f"{CLIP}/caltech101", ("val", "test"), "feature"),
    "photos": ("two-encoders", ("photos_16", "photos_test"), "feature_lite0"),
}
"""The folder, the tables and the column of the features of each pool."""
LOOK, ALIKE, FEW = " alike", 15, 12
"""Suffix of a pool of classes that look alike, their number, and how many of them a session has."""
NAMES = [pool + look for pool in POOLS for look in ("", LOOK)]
CLASSES, MOST = 17, 500
SINGLE, MORE, SWITCH, REVIEWED, PAGE = (*range(25, 86, 5), 105), 20, 65, 240, 24
SIGNED, BATCH, MOVE = (30, 45, 60, 80), 5, 0.03
DONE, STOP, NUMBERS = 0.02, 0.01, ("wrong", "truth", "least_wrong", "most_wrong")


@cache
def pool_of(name: str, shared: Path) -> tuple[npt.NDArray[np.float32], IntArray, list[str]]:
    """Return the features and the class ids of all photos of a pool, and the names of its classes."""
    folder, names, column = POOLS[name]
    table = pa.concat_tables(
        [pq.read_table(shared / f"data/{folder}/{one}.parquet") for one in names]
    )
    found, ids = np.unique(table["label"].to_pylist(), return_inverse=True)
    return features_of(table, column), ids, found.tolist()


@cache
def alike_of(name: str, shared: Path) -> IntArray:
    """Return the classes of a pool that look alike, as the module docstring says."""
    features, ids, names = pool_of(name, shared)
    order, half = np.random.default_rng(0).permutation(len(ids)), len(ids) // 2
    known, asked = order[:half], order[half:]
    index = Index.from_features(features[known], ids[known], names, device="cpu")
    index, _ = closed_form.fit(index)
    given = probabilities_of(index, features[asked]).double().numpy()
    confused = np.stack([given[ids[asked] == one].mean(0) for one in range(len(names))])
    confused += confused.T
    np.fill_diagonal(confused, 0)
    chosen = list(np.unravel_index(confused.argmax(), confused.shape))
    while len(chosen) < ALIKE:
        confused[:, chosen] = 0
        chosen.append(confused[chosen].sum(0).argmax())
    return np.array(chosen)


def folder_of(name: str, shared: Path, draw: int) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Return the features and the class ids of the photos of a session. ``name`` may end with :data:`LOOK`."""
    pool = name.removesuffix(LOOK)
    features, ids, _ = pool_of(pool, shared)
    chance = np.random.default_rng(draw)
    if pool == name:
        own = chance.choice(ids.max() + 1, CLASSES, replace=False)
    else:
        own = chance.choice(alike_of(pool, shared), FEW, replace=False)
    rows = chance.permutation(np.flatnonzero(np.isin(ids, own)))[:MOST]
    return features[rows], ids[rows]


@dataclass
class Session:
    """The labelled photos of a folder, how they were picked, and the classifier fitted to them."""

    features: npt.NDArray[np.float32]
    ids: IntArray
    queue: queue.Queue
    labelled: list[int] = field(default_factory=list)
    picked: list[str] = field(default_factory=list)
    index: Index | None = None

    @property
    def rest(self) -> IntArray:
        return np.setdiff1d(np.arange(len(self.ids)), self.labelled)

    def suggest(self) -> None:
        pool = Pool(
            [str(row) for row in self.rest], self.features[self.rest], [None] * len(self.rest)
        )
        picks = [
            (int(name), "") for name in suggest_features(pool, queue.QUEUED, self.index).inputs
        ]
        self.queue.suggest(picks, set(self.labelled), len(self.labelled))

    def label(self, rows: Iterable[int], picked: Iterable[str]) -> None:
        self.labelled, self.picked = [*self.labelled, *rows], [*self.picked, *picked]
        names = [str(one) for one in self.ids[self.labelled]]
        index = Index.from_features(
            self.features[self.labelled], names, sorted(set(names)), device="cpu"
        )
        how = pa.array([self.picked[key_id] for key_id in index.labels["key_id"].to_pylist()])
        index.rows = replace(index.rows, labels=index.rows.labels.append_column(PICKED, how))
        index, _ = closed_form.fit(index)
        self.index = index

    def single(self, number: int) -> None:
        while len(self.labelled) < number:
            self.suggest()
            shown = self.queue.show(set(self.labelled))[: queue.FIXED]
            self.label([one.photo for one in shown], [one.picked for one in shown])

    def review(self) -> None:
        assert self.index is not None
        answers = self.index.classify(
            self.features[self.rest], neighbours=0, norms="keep", logits=False
        ).to_arrow()
        order = np.argsort(answers["probability"].to_numpy(), kind="stable")[:PAGE]
        self.label(self.rest[order].tolist(), ["reviewed"] * len(order))

    def right(self) -> npt.NDArray[np.bool_]:
        """Return whether the answer to each photo of the folder is right."""
        assert self.index is not None
        names = np.array(self.index.class_names).astype(int)
        return names[self.index.logits(self.features).argmax(1).numpy()] == self.ids

    def estimate(self) -> tuple[Estimate, float | None]:
        assert self.index is not None
        found = estimate_rest(self.index, range(len(self.picked)), self.features[self.rest])
        return found, gain_of(self.index, self.features[self.rest], found, MORE)


def stages(features: npt.NDArray[np.float32], ids: IntArray) -> Iterator[Run]:
    """Yield the estimate and the truth at each stage of a session."""
    session, before = (
        Session(features, ids, queue.Queue(len(ids))),
        dict[int, tuple[npt.NDArray[np.bool_], Any]](),
    )
    for number in SINGLE:
        session.single(number)
        right = session.right()
        if number - MORE in before:
            then, gain = before[number - MORE]
            true = float(right[session.rest].mean() - then[session.rest].mean())
            yield {"stage": "gain", "single": number - MORE, "gain": gain, "true": true}
        found, gain = session.estimate()
        yield stage("single", number, 0, session, found)
        before[number] = right, gain
        if number == SWITCH:
            other = copy.copy(session)
            for reviewed in range(PAGE, REVIEWED + 1, PAGE):
                if len(other.rest) <= PAGE:
                    break
                other.review()
                yield stage("reviewed", number, reviewed, other, other.estimate()[0])


def stage(name: str, single: int, reviewed: int, session: Session, found: Estimate) -> Run:
    right = session.right()[session.rest]
    numbers = {
        "single": single,
        "reviewed": reviewed,
        "photos": len(session.ids),
        "rest": len(right),
    }
    return {"stage": name} | numbers | {"truth": int((~right).sum())} | vars(found)


@click.command(help=__doc__)
@common.shared_option
@click.option("--pool", "pools", type=click.Choice(NAMES), multiple=True, default=NAMES)
@click.option("--draws", default=20, show_default=True)
@click.option(
    "--first",
    default=9,
    show_default=True,
    help="First draw. Draws 0 to 8 were used to choose settings.",
)
@common.results_option
def main(shared: Path, pools: tuple[str, ...], draws: int, first: int, results: Path) -> None:
    """Simulate labelling sessions, and print how often the interval contains the truth."""
    click.echo(f"{machine()}.\n")
    for name in pools:
        for draw in range(first, first + draws):
            key = {"pool": name, "draw": draw}
            if not any(key.items() <= run.items() for run in read_runs(results)):
                add_runs(results, [key | row for row in stages(*folder_of(name, shared, draw))])
    runs = read_runs(results)
    runs = [run for run in runs if run["pool"] in pools]
    for name in (*pools, "all"):
        show(name, [run for run in runs if name in (run["pool"], "all")])
    errors(pools, [run for run in runs if run["stage"] == "single"])


def errors(pools: Sequence[str], runs: Sequence[Run]) -> None:
    """Print the errors of the estimated accuracy and its moves by pool."""
    heads = (
        "",
        *(f"error at {number}" for number in SIGNED),
        "root mean square",
        "truth inside",
        "width",
        "moves",
    )
    rows = []
    for name in (*pools, "all"):
        own = {
            (run["pool"], run["draw"], run["single"]): run
            for run in runs
            if name in (run["pool"], "all")
        }
        error = {
            at: 100 * (run["accuracy"] - 1 + run["truth"] / run["rest"]) for at, run in own.items()
        }
        signed = [
            statistics.mean(value for at, value in error.items() if at[2] == number)
            for number in SIGNED
        ]
        some = [run for at, run in own.items() if at[2] in SIGNED]
        rms = statistics.mean(error[at] ** 2 for at in own if at[2] in SIGNED) ** 0.5
        inside = sum(run["least_wrong"] <= run["truth"] <= run["most_wrong"] for run in some)
        width = 100 * statistics.mean(run["high"] - run["low"] for run in some)
        later = [
            (run, own.get((pool, draw, at + BATCH)))
            for (pool, draw, at), run in own.items()
            if at >= SIGNED[0]
        ]
        moves = [
            abs(run["accuracy"] - after["accuracy"]) <= MOVE
            for run, after in later
            if after is not None
        ]
        cells = [f"{value:+.1f}" for value in signed]
        rows.append(
            (
                name,
                *cells,
                f"{rms:.1f}",
                f"{inside} of {len(some)}",
                f"{width:.0f}",
                f"{100 * np.mean(moves):.0f}",
            )
        )
    click.echo(
        f"\nEstimated accuracy, in points; moves of at most {100 * MOVE:.0f} points in %\n\n{markdown(heads, rows)}"
    )


def show(name: str, runs: Sequence[Run]) -> None:
    """Print the tables of a pool."""
    heads = (
        "single",
        "reviewed",
        "truth inside",
        "wrong, estimated",
        "wrong",
        "interval",
        "accuracy in %",
    )
    rows = []
    places = sorted({(run["single"], run["reviewed"]) for run in runs if run["stage"] != "gain"})
    counted = [run for run in runs if run["stage"] != "gain"]
    for own in [
        *([run for run in counted if (run["single"], run["reviewed"]) == at] for at in places),
        counted,
    ]:
        inside = sum(run["least_wrong"] <= run["truth"] <= run["most_wrong"] for run in own)
        wrong, truth, least, most = (statistics.mean(run[one] for run in own) for one in NUMBERS)
        accuracy = 100 * statistics.mean(1 - run["truth"] / run["rest"] for run in own)
        at = (own[0]["single"], own[0]["reviewed"]) if own is not counted else ("all", "")
        cells = (
            *at,
            f"{inside} of {len(own)}",
            f"{wrong:.1f}",
            f"{truth:.1f}",
            f"{least:.0f} to {most:.0f}",
        )
        rows.append((*cells, f"{accuracy:.1f}"))
    click.echo(f"\n**{name}**\n\n{markdown(heads, rows, left=0)}")
    sessions = {(run["pool"], run["draw"]) for run in counted}
    ends = [
        run
        for run in counted
        if run["single"] <= SWITCH and run["most_wrong"] < DONE * run["photos"]
    ]
    done = list(
        {(run["pool"], run["draw"]): run for run in reversed(ends)}.values()
    )  # the first of each session
    labelled = sorted(run["photos"] - run["rest"] for run in done)
    right = sum(run["truth"] < DONE * run["photos"] for run in done)
    click.echo(
        f"\nDone: {len(done)} of {len(sessions)} sessions, after {labelled} photos; {right} below {DONE:.0%}"
    )
    gains = [run for run in runs if run["stage"] == "gain"]
    stops = [run for run in gains if run["gain"] < STOP]
    good, little = (
        sum(run["true"] < 1.5 * STOP for run in stops),
        sum(run["true"] < STOP for run in gains),
    )
    error = statistics.mean((run["gain"] - run["true"]) ** 2 for run in gains) ** 0.5
    click.echo(
        f"Stop: {len(stops)} of {len(gains)} times, {good} with a true gain below 1.5 points; in {little}, it was "
        f"below a point. Root mean square error of the gain: {100 * error:.1f} points"
    )


if __name__ == "__main__":
    main()
