"""Compare ways to choose which photos to label, by the accuracy for the same number of labels.

Each draw takes a random 90 % of the pool. After 1, 2, 4 and 8 labels per class on average, the classifier is fitted in
closed form to all labels so far, and the next labels are chosen with it. The accuracy is measured on the test set, and
on the photos of the pool that are still unlabelled. The latter favours methods that label difficult photos. Without
text, a classifier only knows the classes that have a label, and all other classes count as mistakes.

Strategies of scikit-activeml are compared if it is installed. They see centred features. Two of them require a
classifier, for which logistic regression is used.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import faiss
import numpy as np
import numpy.typing as npt
from accuracy import DATASETS, Tables
from common import SHARED, machine

from retrieval_tip import CacheModel
from retrieval_tip.backbones.base import unit
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling.photos import Pool, suggest_features

LABELS, SHARE = (1, 2, 4, 8), 0.9
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Round:
    """Features and class ids of the pool, the rows that are labelled or not, and the classifier fitted so far."""

    features: npt.NDArray[np.float32]
    ids: IntArray
    labelled: IntArray
    rest: IntArray
    n: int
    index: CacheModel | None
    seed: int

    @property
    def centred(self) -> npt.NDArray[np.float32]:
        return unit(self.features - self.features.mean(axis=0))


Strategy = Callable[[Round], Sequence[int] | IntArray]


def at_random(now: Round) -> IntArray:
    return np.random.default_rng(now.seed).permutation(now.rest)[: now.n]


def suggested(now: Round) -> IntArray:
    pool = Pool([str(row) for row in now.rest], now.features[now.rest], [None] * len(now.rest))
    return np.array([int(name) for name in suggest_features(pool, now.n, now.index).inputs])


def margin(now: Round) -> IntArray:
    """Choose the smallest margins, or random photos before the first fit."""
    if now.index is None:
        return at_random(now)
    best = now.index.logits(now.features[now.rest]).topk(2).values
    return now.rest[(best[:, 0] - best[:, 1]).argsort()[: now.n].numpy()]


def centres(now: Round) -> IntArray:
    """Choose the photo that is nearest to the centre of each k-means cluster of the unlabelled photos."""
    points = now.centred[now.rest]
    clusters = faiss.Kmeans(points.shape[1], now.n, niter=20, seed=now.seed, min_points_per_centroid=1)
    clusters.train(points)
    nearest = np.unique((clusters.centroids @ points.T).argmax(axis=1))
    others = np.random.default_rng(now.seed).permutation(np.delete(np.arange(len(points)), nearest))
    return now.rest[np.concatenate([nearest, others])[: now.n]]


def of_skactiveml(name: str) -> Strategy:
    def choose(now: Round) -> IntArray:
        import skactiveml.pool
        from skactiveml.classifier import SklearnClassifier
        from sklearn.linear_model import LogisticRegression

        known = np.full(len(now.ids), np.nan)
        known[now.labelled] = now.ids[now.labelled]
        classes = range(now.ids.max() + 1)
        classifier = SklearnClassifier(LogisticRegression(max_iter=200), classes=classes, missing_label=np.nan)
        more = {"clf": classifier} if name in ("Badge", "Falcun") else {}
        own = {"n_classes": len(classes)} if name == "ProbCover" else {}
        strategy = getattr(skactiveml.pool, name)(random_state=now.seed, **own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return strategy.query(now.centred, known, batch_size=now.n, **more)

    return choose


STRATEGIES: dict[str, Strategy] = {
    "suggest": suggested, "random": at_random, "margin": margin, "cluster centres": centres,
}  # fmt: skip
if find_spec("skactiveml"):
    STRATEGIES |= {name: of_skactiveml(name) for name in ("MaxHerding", "TypiClust", "ProbCover", "Badge", "Falcun")}

CLIP = "clip-vitb32"
POOLS = {
    "dtd": Tables("DTD val without text", f"{CLIP}/dtd", "test", None, (), "val"),
    "dtd-text": Tables("DTD val with text", f"{CLIP}/dtd", "test", "text", (), "val"),
    "flowers": Tables("Flowers102 val", f"{CLIP}/oxford_flowers", "test", None, (), "val"),
    "caltech": Tables("Caltech101 val", f"{CLIP}/caltech101", "test", None, (), "val"),
    "cars": Tables("Stanford Cars, 16 shots, test on val", f"{CLIP}/stanford_cars", "val", None, (), "shots_16"),
    "photographs": DATASETS["photographs"],
}


def curve(pool: CacheModel, test: tuple[npt.NDArray[np.float32], IntArray], choose: Strategy, seed: int) -> list[float]:
    """Return the accuracies on the test set, those on the unlabelled photos, and the seconds of all choices."""
    rows = np.sort(np.random.default_rng(seed).permutation(pool.n)[: int(SHARE * pool.n)])
    features, ids = np.asarray(pool.keys[rows], dtype=np.float32), pool.class_ids.numpy()[rows]
    weights = pool.text_weights.numpy() if pool.has_text else None
    labelled, index, seconds = np.empty(0, dtype=np.int64), None, 0.0
    tested, unlabelled = [], []
    for labels in LABELS:
        rest = np.setdiff1d(np.arange(len(ids)), labelled)
        n = min(labels * len(pool.class_names) - len(labelled), len(rest))
        start = time.perf_counter()
        chosen = np.asarray(choose(Round(features, ids, labelled, rest, n, index, seed)), dtype=np.int64)
        seconds += time.perf_counter() - start
        labelled = np.concatenate([labelled, chosen])
        known = np.arange(len(pool.class_names)) if weights is not None else np.unique(ids[labelled])
        names = [pool.class_names[i] for i in known]
        own = [pool.class_names[i] for i in ids[labelled]]
        index = CacheModel.from_features(features[labelled], own, names, weights, device="cpu")
        closed_form.fit(index)
        for on, (queries, truth) in ((tested, test), (unlabelled, (features[rest], ids[rest]))):
            kept = slice(None) if on is tested else ~np.isin(rest, chosen)
            right = known[index.logits(queries[kept]).argmax(1).numpy()] == truth[kept]
            on.append(100 * float(right.mean()) if len(right) else float("nan"))
    return [*tested, *unlabelled, seconds]


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--pool", "pools", type=click.Choice(list(POOLS)), multiple=True, default=list(POOLS))
@click.option("--strategy", "strategies", type=click.Choice(list(STRATEGIES)), multiple=True, default=list(STRATEGIES))
@click.option("--draws", default=5, show_default=True)
def main(shared: Path, pools: tuple[str, ...], strategies: tuple[str, ...], draws: int) -> None:
    """Label the pools in rounds, and print the accuracies."""
    click.echo(f"{machine('scikit-activeml')}; {draws} draws. Top-1 in %, mean ± standard error.")
    for name in pools:
        pool, _ = POOLS[name].pool_of(0, shared)
        items = POOLS[name].items(pool, shared)
        heads = [f"{part}, {labels}" for part in ("test", "unlabelled") for labels in LABELS]
        click.echo(f"\n**{POOLS[name].title}**\n\n| | {' | '.join(heads)} | s |\n|---{'|--:' * (len(heads) + 1)}|")
        for strategy in strategies:
            runs = [curve(pool, (items.features, items.ids), STRATEGIES[strategy], seed) for seed in range(draws)]
            *figures, seconds = zip(*runs, strict=True)
            spread = [statistics.stdev(part) / draws**0.5 if draws > 1 else 0 for part in figures]
            cells = [f"{statistics.mean(part):.1f} ± {se:.1f}" for part, se in zip(figures, spread, strict=True)]
            click.echo(f"| {strategy} | {' | '.join(cells)} | {statistics.mean(seconds):.1f} |")


if __name__ == "__main__":
    main()
