"""Compare orders in which a person reviews answers, by the actions until 95 and 98 % of all photos are right.

All photos of a pool are a folder. After two single photos per class from the queue of ``label``, the person reviews
screens of 24 photos, and the classifier is fitted whenever there are a tenth more labels. A photo is right if its label
or, without one, its answer is its true class. One action confirms the right answers of a screen. One click corrects a
photo if its true class is among the next two answers. Several photos of a screen are selected and get a class, which is
one more action. They are selected with one rectangle, or each by a click: the tables show both.

Except for "least certain", a screen shows the photos of the class with the largest sum of scores. "Purest groups" have
one answer, and the score is its probability. "Doubtful groups" use the probability that it is wrong. "Other class"
shows the photos that most probably belong to a class that is not their answer.

"Clusters" is the rule of MorphoCluster (Schröder et al., 2020) without single photos. HDBSCAN clusters the photos
without a label. The members are sorted by their distance to the centre. By doubling and bisection of pages, the person
finds the first photo of another class, and clicks on it. The photos before it get the class of the cluster, without
mistakes. All other
photos without a label are sorted by the distance to the same centre, and the person does the same with them. The
smallest cluster has 32, 16, 8, 4 and 2 photos in turn. The remaining photos are reviewed, least certain first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import common
import numpy as np
import numpy.typing as npt
from common import Run, add_runs, machine, markdown, read_runs
from label_less import IntArray
from label_progress import PAGE, Session, pool_of

from retrieval_tip import Index
from retrieval_tip.backbones.base import unit
from retrieval_tip.evaluation.held_out import probabilities_of
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling.queue import Queue

SINGLE, GROWTH, GOALS = 2, 1.1, (0.95, 0.98)
SMALLEST = (32, 16, 8, 4, 2)
Chances = npt.NDArray[np.float64]
Order = Callable[[Chances], IntArray]
"""Type of a function that chooses the rows of a screen by the probabilities, of shape ``[m, c]``."""


def least_certain(chances: Chances) -> IntArray:
    return chances.max(1).argsort(kind="stable")[:PAGE]


def largest(scores: Chances) -> IntArray:
    """Return the rows of a screen for the class with the largest sum of scores, without negative scores."""
    rows = np.argsort(-scores, axis=0, kind="stable")[:PAGE]
    best = np.take_along_axis(scores, rows, axis=0)
    label = best.clip(0).sum(0).argmax()
    return rows[best[:, label] >= 0, label]


def is_answer(chances: Chances) -> npt.NDArray[np.bool_]:
    return np.arange(chances.shape[1]) == chances.argmax(1)[:, None]


ORDERS: dict[str, Order] = {
    "least certain": least_certain,
    "purest groups": lambda chances: largest(np.where(is_answer(chances), chances, -1)),
    "doubtful groups": lambda chances: largest(np.where(is_answer(chances), 1 - chances, -1)),
    "other class": lambda chances: largest(np.where(is_answer(chances), -1, chances)),
}


class Folder:
    """Photos, their labels, or -1, and their probabilities when the classifier knew ``learned`` labels.

    ``actions`` are counted with a rectangle that selects photos, and with a click on each of them.
    """

    def __init__(
        self, features: npt.NDArray[np.float32], ids: IntArray, labelled: Sequence[int] = ()
    ) -> None:
        self.features, self.ids, self.learned = features, ids, 0
        self.actions = np.full(2, len(labelled))
        self.chances: Chances = np.zeros((len(ids), ids.max() + 1))
        self.labels = np.where(np.isin(np.arange(len(ids)), labelled), ids, -1)
        self.learn()

    @property
    def rest(self) -> IntArray:
        return np.flatnonzero(self.labels < 0)

    @property
    def wrong(self) -> int:
        answers = np.where(self.labels < 0, self.chances.argmax(1), self.labels)
        return int((answers != self.ids).sum())

    def learn(self) -> None:
        rows = np.flatnonzero(self.labels >= 0)
        known, own = np.unique(self.labels[rows], return_inverse=True)
        if len(known) < 2 or len(rows) < GROWTH * self.learned:
            return
        names = known.astype(str)
        index = Index.from_features(self.features[rows], names[own], names.tolist(), device="cpu")
        index, _ = closed_form.fit(index)
        self.chances = np.zeros_like(self.chances)
        self.chances[:, known] = probabilities_of(index, self.features)
        self.learned = len(rows)

    def screens(self, order: Order) -> Iterator[None]:
        """Review screens until all photos have a label."""
        while len(self.rest):
            shown = self.rest[order(self.chances[self.rest])]
            best = np.argsort(-self.chances[shown], axis=1, kind="stable")[:, :3]
            truth = self.ids[shown]
            wrong = truth != best[:, 0]
            self.actions[:] += not wrong.all()
            for label in np.unique(truth[wrong]):
                offered = best[wrong & (truth == label)] == label
                clicks = len(offered) + int(not offered.any(axis=1).all())
                self.actions += (min(clicks, 2), clicks)
            self.labels[shown] = truth
            self.learn()
            yield

    def clusters(self) -> Iterator[None]:
        """Name and grow clusters, then review the remaining photos."""
        from sklearn.cluster import HDBSCAN

        points = unit(self.features - self.features.mean(axis=0))
        for smallest in SMALLEST:
            rest = self.rest
            if len(rest) < smallest:
                break
            names = HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(points[rest])
            for name in np.argsort(-np.bincount(names + 1)[1:]):
                members = rest[(names == name) & (self.labels[rest] < 0)]
                if len(members) > 1:
                    self.name(points, members)
                    self.learn()
                    yield
        yield from self.screens(least_certain)

    def name(self, points: npt.NDArray[np.float32], members: IntArray) -> None:
        """Give a cluster a class, and the same class to other photos that are near its centre."""
        nearest = np.argsort(-points @ points[members].mean(axis=0))
        inside = nearest[np.isin(nearest, members)]
        label = np.bincount(self.ids[inside[:PAGE]]).argmax()
        self.actions += 1
        for photos in (inside, nearest):
            photos = photos[self.labels[photos] < 0]
            number, looks = accepted(self.ids[photos] == label)
            self.actions += looks
            if number < 2:
                break
            self.labels[photos[:number]] = label


def accepted(right: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Return how many photos are before the first wrong one, and the actions to find it by doubling and bisection."""
    number = int(np.append(right, False).argmin())
    return number, 1 + 2 * (number // PAGE).bit_length()


def figures(folder: Folder, steps: Iterator[None]) -> Run:
    """Return the wrong answers before the review, and the actions until each goal."""
    run: Run = {"wrong": folder.wrong}
    for goal in GOALS:
        while folder.wrong > (1 - goal) * len(folder.ids):
            next(steps)
        for way, actions in zip(("rectangle", "clicks"), folder.actions.tolist(), strict=True):
            run[f"{goal:.0%}, {way}"] = actions
    return run


def reviews(features: npt.NDArray[np.float32], ids: IntArray) -> Iterator[Run]:
    """Yield the figures of each order."""
    session = Session(features, ids, Queue(len(ids)))
    session.single(SINGLE * len(np.unique(ids)))
    for name, order in ORDERS.items():
        folder = Folder(features, ids, session.labelled)
        yield {"order": name} | figures(folder, folder.screens(order))
    folder = Folder(features, ids)
    yield {"order": "clusters"} | figures(folder, folder.clusters())


@click.command(help=__doc__)
@common.shared_option
@click.option("--photos", type=int, help="Most photos of a pool.")
@click.option("--draws", default=1, show_default=True)
@common.results_option
def main(shared: Path, photos: int | None, draws: int, results: Path) -> None:
    """Review the pools in each order, and print the actions."""
    click.echo(machine("scikit-learn"))
    for pool in ("caltech", "flowers", "dtd"):
        features, ids = pool_of(pool, shared)
        for draw in range(draws):
            key = {"pool": pool, "draw": draw, "photos": photos or len(ids)}
            if not any(key.items() <= run.items() for run in read_runs(results)):
                rows = np.random.default_rng(draw).permutation(len(ids))[:photos]
                add_runs(results, [key | run for run in reviews(features[rows], ids[rows])])
        runs = [run for run in read_runs(results) if run["pool"] == pool]
        click.echo(f"\n{markdown(list(runs[0]), [run.values() for run in runs], left=1)}")


if __name__ == "__main__":
    main()
