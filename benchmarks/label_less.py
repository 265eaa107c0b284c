"""Compare ways to choose which photos to label, by the accuracy for the same number of labels.

Each draw takes a random 90 % of the pool. After 1, 2, 4 and 8 labels per class on average, the classifier is fitted in
closed form to all labels so far, and the next labels are chosen with it. The accuracy is measured on the test set, and
on the photos of the pool that are still unlabelled. The latter favours methods that label difficult photos. Without
text, a classifier only knows the classes that have a label, and all other classes count as mistakes.

Strategies of scikit-activeml are compared if it is installed. They see centred features. BADGE and Falcun require a
classifier, for which logistic regression is used.

The tables also show the share of the classes that have a label, and the share of the photos whose most similar photo
has the same class. Where the latter is small, a label says little about similar photos.

With ``--smooth``, suggested photos are labelled, and the answers to the other photos of the pool are compared with the
smoothed ones. The constants of ``labelling/smoothing.py`` were chosen on the pools ``DEVELOPED``.

``person.py`` counts the actions of a person instead of labels.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import common
import faiss
import numpy as np
import numpy.typing as npt
import torch
from accuracy import DATASETS, Tables
from common import Run, add_runs, machine, markdown, read_runs, summary
from matplotlib import style
from matplotlib.figure import Figure

from retrieval_tip import Index
from retrieval_tip.backbones.base import unit
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling.pool import Pool, suggest_features
from retrieval_tip.labelling.smoothing import smooth

LABELS, SHARE = (1, 2, 4, 8), 0.9
DROPPED, DROPOUTS = 0.75, 3
"""Share of dropped values, and number of answers with dropped values (Gupte et al.)."""
PARTS = ("test", "unlabelled")
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Round:
    """Features and class ids of the pool, the rows that are labelled or not, and the classifier fitted so far."""

    features: npt.NDArray[np.float32]
    ids: IntArray
    labelled: IntArray
    rest: IntArray
    n: int
    index: Index | None
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
    clusters = faiss.Kmeans(
        points.shape[1], now.n, niter=20, seed=now.seed, min_points_per_centroid=1
    )
    clusters.train(points)
    nearest = np.unique((clusters.centroids @ points.T).argmax(axis=1))
    others = np.random.default_rng(now.seed).permutation(np.delete(np.arange(len(points)), nearest))
    return now.rest[np.concatenate([nearest, others])[: now.n]]


def drop_query(now: Round) -> IntArray:
    """Choose as DropQuery does (Gupte et al., TMLR 2024), with the closed-form classifier.

    Candidates are photos for which most answers change if values of the features are dropped.
    """
    if now.index is None:
        return centres(now)
    features, chance = now.features[now.rest], np.random.default_rng(now.seed)
    answers = now.index.logits(features).argmax(1)
    changed = torch.zeros(len(features))
    for _ in range(DROPOUTS):
        kept = unit(features * (chance.random(features.shape) >= DROPPED))
        changed += now.index.logits(kept).argmax(1) != answers
    candidates = now.rest[changed.numpy() > DROPOUTS / 2]
    return centres(replace(now, rest=candidates if len(candidates) >= now.n else now.rest))


def of_skactiveml(name: str) -> Strategy:
    def choose(now: Round) -> IntArray:
        import skactiveml.pool
        from skactiveml.classifier import SklearnClassifier
        from sklearn.linear_model import LogisticRegression

        known = np.full(len(now.ids), np.nan)
        known[now.labelled] = now.ids[now.labelled]
        classes = range(now.ids.max() + 1)
        classifier = SklearnClassifier(
            LogisticRegression(max_iter=200), classes=classes, missing_label=np.nan
        )
        more = {"clf": classifier} if name in NEED_CLASSIFIER else {}
        own = {"n_classes": len(classes)} if name == "ProbCover" else {}
        strategy = getattr(skactiveml.pool, name)(random_state=now.seed, **own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return strategy.query(now.centred, known, batch_size=now.n, **more)

    return choose


NEED_CLASSIFIER = ("Badge", "Falcun")
STRATEGIES: dict[str, Strategy] = {
    "suggest": suggested,
    "random": at_random,
    "margin": margin,
    "cluster centres": centres,
    "DropQuery": drop_query,
}
if find_spec("skactiveml"):
    STRATEGIES |= {
        name: of_skactiveml(name)
        for name in ("MaxHerding", "TypiClust", "ProbCover", "Badge", "Falcun")
    }

CLIP = "clip-vitb32"
POOLS = {
    "dtd": Tables("DTD val without text", f"{CLIP}/dtd", "test", None, (), "val"),
    "dtd-text": Tables("DTD val with text", f"{CLIP}/dtd", "test", "text", (), "val"),
    "flowers": Tables("Flowers102 val", f"{CLIP}/oxford_flowers", "test", None, (), "val"),
    "caltech": Tables("Caltech101 val", f"{CLIP}/caltech101", "test", None, (), "val"),
    "cars": Tables(
        "Stanford Cars, 16 shots, test on val", f"{CLIP}/stanford_cars", "val", None, (), "shots_16"
    ),
    "photos": DATASETS["photos"],
}
DEVELOPED = {
    "cars-text": Tables(
        "Stanford Cars, 16 shots with text", f"{CLIP}/stanford_cars", "val", "text", (), "shots_16"
    ),
    "cars-val": Tables("Stanford Cars val", f"{CLIP}/stanford_cars", "val", None, (), "val"),
    "food": Tables("9 classes of Food-101", "clip-food9", "test", None, (), "train"),
    "food-small": Tables(
        "9 classes of Food-101, test photos", "clip-food9", "test", None, (), "test"
    ),
    "dtd-test": Tables("DTD test", f"{CLIP}/dtd", "test", None, (), "test"),
    "dtd-test-text": Tables("DTD test with text", f"{CLIP}/dtd", "test", "text", (), "test"),
    "flowers-test": Tables("Flowers102 test", f"{CLIP}/oxford_flowers", "test", None, (), "test"),
    "caltech-text": Tables(
        "Caltech101 test with text", f"{CLIP}/caltech101", "test", "text_part", (), "test"
    ),
}
ALL_POOLS = POOLS | DEVELOPED


def curve(
    pool: Index,
    test: tuple[npt.NDArray[np.float32], IntArray],
    choose: Strategy,
    draw: int,
    *,
    smoothing: bool = False,
) -> Run:
    """Label a random part of the pool in rounds, and return the accuracies in % after each round."""
    rows = np.sort(np.random.default_rng(draw).permutation(pool.n)[: int(SHARE * pool.n)])
    features, ids = np.asarray(pool.keys[rows], dtype=np.float32), pool.class_ids.numpy()[rows]
    labelled, index, seconds = np.empty(0, dtype=np.int64), None, 0.0
    accuracies: dict[str, list[float]] = {part: [] for part in (*PARTS, "classes", "smoothed")}
    for labels in LABELS:
        rest = np.setdiff1d(np.arange(len(ids)), labelled)
        n = min(labels * len(pool.class_names) - len(labelled), len(rest))
        start = time.perf_counter()
        chosen = np.asarray(
            choose(Round(features, ids, labelled, rest, n, index, draw)), dtype=np.int64
        )
        seconds += time.perf_counter() - start
        labelled, rest = np.concatenate([labelled, chosen]), np.setdiff1d(rest, chosen)
        index, known = fitted(pool, features[labelled], ids[labelled])
        for part, (queries, truth) in zip(PARTS, (test, (features[rest], ids[rest])), strict=True):
            right = known[index.logits(queries).argmax(1).numpy()] == truth
            accuracies[part].append(100 * float(right.mean()) if len(right) else float("nan"))
        if smoothing and len(rest):
            best = (
                smooth(index, [FeatureBlock.of(features)]).blocks[0].mixed[rest].argmax(1).numpy()
            )
            accuracies["smoothed"].append(100 * float((known[best] == ids[rest]).mean()))
        accuracies["classes"].append(100 * len(np.unique(ids[labelled])) / len(pool.class_names))
    return {**accuracies, "seconds": seconds, "alike": alike(features, ids)}


def show_smoothed(runs: Sequence[Run], pools: Sequence[str]) -> None:
    """Print how many points smoothing gains on the unlabelled photos."""
    rows, gains = [], []
    for name in pools:
        own = [run for run in runs if (run["pool"], run["strategy"]) == (name, "smooth")]
        for place, labels in enumerate(LABELS[:3]):
            alone, smoothed = (
                np.array([run[part][place] for run in own]) for part in ("unlabelled", "smoothed")
            )
            gain, error = summary((smoothed - alone).tolist())
            gains.append(gain)
            worst = f"{(smoothed - alone).min():+.2f}"
            rows.append(
                (name, labels, f"{alone.mean():.1f}", f"{gain:+.2f} ± {error:.2f}", worst, len(own))
            )
    click.echo(markdown(("pool", "labels per class", "alone", "gain", "worst draw", "draws"), rows))
    click.echo(
        f"\nMean gain {statistics.mean(gains):+.2f}, smallest gain of a cell {min(gains):+.2f}"
    )


def alike(features: npt.NDArray[np.float32], ids: IntArray) -> float:
    """Return the share of the photos whose most similar photo has the same class, in %."""
    points = unit(features - features.mean(axis=0))
    cosines = points @ points.T
    np.fill_diagonal(cosines, -2)
    return 100 * float((ids[cosines.argmax(axis=1)] == ids).mean())


def fitted(pool: Index, features: npt.NDArray[np.float32], ids: IntArray) -> tuple[Index, IntArray]:
    """Return an index that is fitted to labelled features, and the class ids of the pool that it knows."""
    known = np.arange(len(pool.class_names)) if pool.has_text else np.unique(ids)
    names, labels = [pool.class_names[i] for i in known], [pool.class_names[i] for i in ids]
    weights = pool.text_weights.numpy() if pool.has_text else None
    index = Index.from_features(features, labels, names, weights, device="cpu")
    index, _ = closed_form.fit(index)
    return index, known


def over_labels(runs: Sequence[Run], part: str) -> list[tuple[float, float]]:
    """Return the mean accuracy and its standard error for each number of labels."""
    return [summary(own) for own in zip(*(run[part] for run in runs), strict=True)]


def by_strategy(runs: Sequence[Run], pool: str) -> dict[str, list[Run]]:
    own = {
        name: [run for run in runs if (run["pool"], run["strategy"]) == (pool, name)]
        for name in STRATEGIES
    }
    return {name: some for name, some in own.items() if some}


def show(runs: Sequence[Run], pool: str) -> None:
    """Print the table of a pool."""
    heads = [
        "",
        *(f"{part}, {labels}" for part in PARTS for labels in LABELS),
        "classes",
        "s",
        "draws",
    ]
    own_runs, rows = by_strategy(runs, pool), []
    for name, own in own_runs.items():
        cells = [
            f"{mean:.1f} ± {error:.1f}" for part in PARTS for mean, error in over_labels(own, part)
        ]
        cells.append(" / ".join(f"{mean:.0f}" for mean, _ in over_labels(own, "classes")))
        rows.append(
            [name, *cells, f"{statistics.mean(run['seconds'] for run in own):.1f}", len(own)]
        )
    share = statistics.mean(run["alike"] for own in own_runs.values() for run in own)
    click.echo(
        f"\n**{ALL_POOLS[pool].title}**: {share:.0f} % of the photos are most similar to a photo of their class\n"
    )
    click.echo(markdown(heads, rows))


def draw_curves(runs: Sequence[Run], pools: Sequence[str]) -> Figure:
    """Plot the accuracy on the test set against the number of labels, with a panel for each pool."""
    across = min(3, len(pools))
    down = -(-len(pools) // across)
    figure = Figure(figsize=(4 * across, 3.4 * down + 0.8))
    drawn = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, pool in zip(drawn, pools, strict=False):
        for name, own in by_strategy(runs, pool).items():
            place = list(STRATEGIES).index(name)  # the same colour in every panel
            means, errors = zip(*over_labels(own, "test"), strict=True)
            look: dict[str, Any] = {
                "color": f"C{(place - 1) + (place > 1)}",
                "linewidth": 1.2,
            }  # C1 resembles the colour of suggest
            if name == "suggest":
                look = {"color": "#D55E00", "linewidth": 2.4, "zorder": 5}
            labels = [
                labels * 2 ** (0.03 * (place - 4)) for labels in LABELS
            ]  # prevents error bars from overlapping
            axes.errorbar(labels, means, yerr=errors, marker="o", markersize=3, label=name, **look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(LABELS, list(map(str, LABELS)))
        axes.minorticks_off()
        axes.set_title(POOLS[pool].title, size=10, weight="normal")
        axes.set(xlabel="labels per class on average", ylabel="test accuracy, %")
    for axes in drawn[len(pools) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "mean and standard error over draws", x=0.98, ha="right", fontsize=6.5, color="#8C8C8C"
    )
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside upper center", ncols=9)
    return figure


@click.command(help=__doc__)
@common.shared_option
@click.option(
    "--pool", "pools", type=click.Choice(list(ALL_POOLS)), multiple=True, default=list(POOLS)
)
@click.option(
    "--strategy",
    "strategies",
    type=click.Choice(list(STRATEGIES)),
    multiple=True,
    default=list(STRATEGIES),
)
@click.option("--smooth", "smoothing", is_flag=True, help="Compare answers with smoothed answers.")
@click.option("--draws", default=5, show_default=True)
@common.results_option
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="PNG or SVG file with the accuracy on the test sets.",
)
def main(
    shared: Path,
    pools: tuple[str, ...],
    strategies: tuple[str, ...],
    smoothing: bool,
    draws: int,
    results: Path,
    plot: Path | None,
) -> None:
    """Label the pools in rounds, and print the accuracies."""
    click.echo(f"{machine('scikit-activeml')}. Top-1 in %, mean ± standard error over draws.")
    strategies = ("smooth",) if smoothing else strategies
    for name in pools:
        done = {(run["pool"], run["strategy"], run["draw"]) for run in read_runs(results)}
        missing = [
            (name, way, draw)
            for draw in range(draws)
            for way in strategies
            if (name, way, draw) not in done
        ]
        if missing:
            pool, _ = ALL_POOLS[name].pool_of(0, shared)
            items = ALL_POOLS[name].items(pool, shared)
        for _, way, draw in missing:
            choose = STRATEGIES.get(way, suggested)
            run = curve(pool, (items.features, items.ids), choose, draw, smoothing=smoothing)
            add_runs(results, [{"pool": name, "strategy": way, "draw": draw} | run])
        if not smoothing:
            show(read_runs(results), name)
    if smoothing:
        show_smoothed(read_runs(results), pools)
    if plot is not None:
        with style.context(Path(__file__).with_name("plots.mplstyle"), after_reset=True):
            draw_curves(read_runs(results), pools).savefig(plot)


if __name__ == "__main__":
    main()
