"""Simulate sessions of ``label``, and measure whether the number of wrong answers lies inside its interval.

A session labels up to 500 photos of 17 classes. Single photos come from the
queue of ``label``, in batches of 5. After 65 single photos, the session is also continued by reviewing 24 photos at a
time, least certain first. The classifier is fitted after each batch. At each stage, the number of wrong answers among
the other photos is estimated and compared with the truth. A photo of a class that has no label counts as wrong.

"Done" means that less than 2 % of all photos are wrong at the upper end of the interval. "Stop" means that 20 more
single photos are expected to gain less than a point. It is compared with their true gain on photos that are unlabelled
afterwards.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import common
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from common import Run, add_runs, features_of, machine, markdown, read_runs
from label_less import CLIP, IntArray

from retrieval_tip import Index
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling import queue
from retrieval_tip.labelling.photos import Pool, suggest_features
from retrieval_tip.labelling.progress import Estimate, estimate_rest, gain_of
from retrieval_tip.store.labels import PICKED

POOLS = {
    "dtd": (f"{CLIP}/dtd", ("val", "test"), "feature"),
    "flowers": (f"{CLIP}/oxford_flowers", ("val", "test"), "feature"),
    "caltech": (f"{CLIP}/caltech101", ("val", "test"), "feature"),
    "photos": ("two-encoders", ("photos_16", "photos_test"), "feature_lite0"),
}
"""The folder, the tables and the column of the features of each pool."""
CLASSES, MOST = 17, 500
SINGLE, MORE, SWITCH, REVIEWED, PAGE = (25, 45, 65, 85, 105), 20, 65, 240, 24
DONE, STOP, NUMBERS = 0.02, 0.01, ("wrong", "truth", "least_wrong", "most_wrong")


def folder_of(name: str, shared: Path, draw: int) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Return the features and the class ids of the photos of a session."""
    folder, names, column = POOLS[name]
    table = pa.concat_tables([pq.read_table(shared / f"data/{folder}/{one}.parquet") for one in names])
    classes, ids = np.unique(table["label"].to_pylist(), return_inverse=True)
    chance = np.random.default_rng(draw)
    own = chance.choice(len(classes), CLASSES, replace=False)
    rows = chance.permutation(np.flatnonzero(np.isin(ids, own)))[:MOST]
    return features_of(table, column)[rows], ids[rows]


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
        pool = Pool([str(row) for row in self.rest], self.features[self.rest], [None] * len(self.rest))
        picks = [(int(name), "") for name in suggest_features(pool, queue.QUEUED, self.index).inputs]
        self.queue.suggest(picks, set(self.labelled), len(self.labelled))

    def label(self, rows: Iterable[int], picked: Iterable[str]) -> None:
        self.labelled, self.picked = [*self.labelled, *rows], [*self.picked, *picked]
        names = [str(one) for one in self.ids[self.labelled]]
        index = Index.from_features(self.features[self.labelled], names, sorted(set(names)), device="cpu")
        how = pa.array([self.picked[key_id] for key_id in index.labels["key_id"].to_pylist()])
        index.rows = replace(index.rows, labels=index.rows.labels.append_column(PICKED, how))
        closed_form.fit(index)
        self.index = index

    def single(self, number: int) -> None:
        while len(self.labelled) < number:
            self.suggest()
            shown = self.queue.show(set(self.labelled))[: queue.FIXED]
            self.label([one.photo for one in shown], [one.picked for one in shown])

    def review(self) -> None:
        assert self.index is not None
        answers = self.index.classify(self.features[self.rest], neighbours=0, norms="keep", logits=False).to_arrow()
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
    session, before, gain = Session(features, ids, queue.Queue(len(ids))), np.empty(0), None
    for number in SINGLE:
        session.single(number)
        right = session.right()
        if len(before):
            true = float(right[session.rest].mean() - before[session.rest].mean())
            yield {"stage": "gain", "single": number - MORE, "gain": gain, "true": true}
        found, gain = session.estimate()
        yield stage("single", number, 0, session, found)
        before = right
        if number == SWITCH:
            other = copy.copy(session)
            for reviewed in range(PAGE, REVIEWED + 1, PAGE):
                other.review()
                yield stage("reviewed", number, reviewed, other, other.estimate()[0])


def stage(name: str, single: int, reviewed: int, session: Session, found: Estimate) -> Run:
    right = session.right()[session.rest]
    numbers = {"single": single, "reviewed": reviewed, "photos": len(session.ids), "rest": len(right)}
    return {"stage": name} | numbers | {"truth": int((~right).sum())} | vars(found)


@click.command(help=__doc__)
@common.shared_option
@click.option("--pool", "pools", type=click.Choice(list(POOLS)), multiple=True, default=list(POOLS))
@click.option("--draws", default=5, show_default=True)
@click.option("--first", default=9, show_default=True, help="First draw. Draws 0 to 8 were used to choose settings.")
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
    for name in (*pools, "all"):
        show(name, [run for run in runs if name in (run["pool"], "all") and run["pool"] in pools])


def show(name: str, runs: Sequence[Run]) -> None:
    """Print the tables of a pool."""
    heads = ("single", "reviewed", "random", "truth inside", "wrong, estimated", "wrong", "interval", "accuracy in %")
    rows = []
    places = sorted({(run["single"], run["reviewed"]) for run in runs if run["stage"] != "gain"})
    counted = [run for run in runs if run["stage"] != "gain"]
    for own in [*([run for run in counted if (run["single"], run["reviewed"]) == at] for at in places), counted]:
        inside = sum(run["least_wrong"] <= run["truth"] <= run["most_wrong"] for run in own)
        wrong, truth, least, most = (statistics.mean(run[one] for run in own) for one in NUMBERS)
        accuracy = 100 * statistics.mean(1 - run["truth"] / run["rest"] for run in own)
        at = (own[0]["single"], own[0]["reviewed"], own[0]["n"]) if own is not counted else ("all", "", "")
        cells = (*at, f"{inside} of {len(own)}", f"{wrong:.1f}", f"{truth:.1f}", f"{least:.0f} to {most:.0f}")
        rows.append((*cells, f"{accuracy:.1f}"))
    click.echo(f"\n**{name}**\n\n{markdown(heads, rows, left=0)}")
    sessions = {(run["pool"], run["draw"]) for run in counted}
    ends = [run for run in counted if run["single"] <= SWITCH and run["most_wrong"] < DONE * run["photos"]]
    done = list({(run["pool"], run["draw"]): run for run in reversed(ends)}.values())  # the first of each session
    labelled = sorted(run["photos"] - run["rest"] for run in done)
    right = sum(run["truth"] < DONE * run["photos"] for run in done)
    click.echo(f"\nDone: {len(done)} of {len(sessions)} sessions, after {labelled} photos; {right} below {DONE:.0%}")
    gains = [run for run in runs if run["stage"] == "gain"]
    stops = [run for run in gains if run["gain"] < STOP]
    good, little = sum(run["true"] < 1.5 * STOP for run in stops), sum(run["true"] < STOP for run in gains)
    error = statistics.mean((run["gain"] - run["true"]) ** 2 for run in gains) ** 0.5
    click.echo(
        f"Stop: {len(stops)} of {len(gains)} times, {good} with a true gain below 1.5 points; in {little}, it was "
        f"below a point. Root mean square error of the gain: {100 * error:.1f} points"
    )


if __name__ == "__main__":
    main()
