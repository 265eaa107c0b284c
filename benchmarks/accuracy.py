"""Compare the accuracy, calibration and time of methods that use the same shots from real datasets.

If published keys are available, they are used as shots (with seed 1; each key is the mean of ten views). Otherwise,
shots are drawn by the published rule with seeds 1 to N, and each shot is encoded as one centre view. The exception is
DTD with 1 shot, which uses the published keys. All settings are selected using only the shots: alpha, beta and k of
Tip-Adapter by leave-one-out, and all other settings by cross-validation. Validation images are only used as shots or
queries. No setting is selected on the images that are scored.

A shape describes the shots. With ``even``, every class has the same number of shots. With ``covered-20``, only 20 % of
the classes have shots. With ``tail``, the classes have 1 to N shots. With ``one-of-500``, one class has up to 500.
With ``k-64`` and ``classes``, a query meets only some of the keys. With ``growth``, an index grows from 4 to N shots.
With ``wrong-10``, 10 % of the labels are wrong. With ``prior``, the scatter of the other datasets is used.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import common
import encoders
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from baselines import class_means, discriminant, linear_probe
from common import Run, add_runs, features_of, machine, markdown, read_runs, summary
from methods import (
    Answering,
    Items,
    Method,
    Shots,
    closed,
    draw_shots,
    fine_tuned,
    paper,
    searched,
    zero_shot,
)
from prior import TABLES, sums_of

from retrieval_tip import EncodingCache, Index, Reader, build_index, load_backbone, open_source, tip
from retrieval_tip.arrays import DoubleArray
from retrieval_tip.data.sources import Source
from retrieval_tip.data.writing import vectors
from retrieval_tip.evaluation.calibration import expected_calibration_error
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.scatter import pooled
from retrieval_tip.index import changes

SHOTS = (1, 2, 4, 8, 16)
TEMPLATE = "a photo of a {}."
STARTED, LARGE = 4, 500
"""Number of shots per class from which an index grows, and number of shots of the large class."""
SHOWN = 0.2
"""Smallest gap to list, in points."""


def grown(shots: Shots) -> Answering:
    """Build an index from the first shots of each class, and add one shot per class at a time."""
    cache = shots.index
    names, keys = np.array(cache.class_names), np.asarray(cache.keys[np.arange(cache.n)])
    with tempfile.TemporaryDirectory() as folder:

        def table(name: str, features: np.ndarray, labels: np.ndarray) -> Path:
            columns = {
                "id": [f"{name}-{i}" for i in range(len(labels))],
                "label": labels,
                "feature": vectors(features),
            }
            pq.write_table(pa.table(columns), f"{folder}/{name}.parquet")
            return Path(f"{folder}/{name}.parquet")

        ids = cache.class_ids.numpy()
        ranks, index = np.arange(cache.n) - np.searchsorted(ids, ids), Path(folder) / "index"
        first = open_source(table("first", keys[ranks < STARTED], names[ids[ranks < STARTED]]))
        text = table("text", cache.text_weights.numpy(), names) if cache.has_text else None
        build_index(
            first, index, Reader(), text=text, logit_scale=cache.settings.logit_scale, device="cpu"
        )
        for rank in range(STARTED, ranks.max() + 1):
            more = table(f"more-{rank}", keys[ranks == rank], names[ids[ranks == rank]])
            changes.add(index, open_source(more), Reader())
        return Index.load(index, device="cpu").in_memory()


DEFAULT, ZERO, PAPER, SEARCHED, PROBE = (
    "the default",
    "zero-shot",
    "Tip-Adapter (1, 5.5)",
    "Tip-Adapter searched",
    "linear probe",
)
FINE_TUNED, GDA, GROWN, WITH_PRIOR = (
    "Tip-Adapter-F",
    "GDA",
    "the default, grown",
    "the default, with a prior",
)
METHODS: dict[str, Method] = {
    ZERO: zero_shot,
    PAPER: paper,
    SEARCHED: searched,
    FINE_TUNED: fine_tuned,
    PROBE: lambda shots: linear_probe(shots.index),
    "nearest class mean": lambda shots: class_means(shots.index),
    GDA: lambda shots: discriminant(shots.index),
    "ProKeR's form": lambda shots: closed(
        shots, closed_form.FitRequest(metric="none", values="solved")
    ),
    DEFAULT: closed,
    GROWN: grown,
    WITH_PRIOR: lambda shots: closed(shots, closed_form.FitRequest(prior=shots.prior)),
}
COMPARED = (ZERO, PAPER, PROBE, GDA, DEFAULT)


@dataclass(frozen=True)
class Tables:
    """The feature tables of a dataset, which are files in a folder.

    ``keys`` contains one table for each of several numbers of shots. For other numbers, shots are drawn from ``pool``,
    or from the largest table of keys.
    If there is a ``text`` table, only its classes are used, and shots and test items of other classes are dropped.
    """

    title: str
    folder: str
    test: str
    text: str | None = None
    keys: Sequence[int] = ()
    pool: str = ""

    def reader(self, shared: Path) -> Reader:
        return Reader()

    def file(self, shared: Path, name: str) -> Path:
        return shared / "data" / self.folder / f"{name}.parquet"

    def read(
        self, shared: Path, name: str, classes: Sequence[str] | None = None
    ) -> tuple[np.ndarray, list[Any], list[Any]]:
        """Return the features, labels and ids in a table. If classes are given, return only those of these classes."""
        table = pq.read_table(self.file(shared, name))
        if classes is not None:
            table = table.filter(pc.is_in(table["label"], pa.array(classes)))
        return features_of(table), table["label"].to_pylist(), table["id"].to_pylist()

    def pool_of(self, number: int, shared: Path) -> tuple[Index, Source]:
        """Return the keys from which ``number`` shots are drawn, and their table."""
        name = self.pool or f"shots_{max(self.keys)}"
        name = f"shots_{number}" if number in self.keys else name
        weights, classes = None, sorted(set(self.read(shared, self.test)[1]))
        if self.text is not None:
            weights, classes, _ = self.read(shared, self.text)
        features, labels, ids = self.read(shared, name, classes)
        cache = Index.from_features(features, labels, classes, weights, sources=ids, device="cpu")
        return cache, open_source(self.file(shared, name))

    def items(self, pool: Index, shared: Path) -> Items:
        features, labels, _ = self.read(shared, self.test, pool.class_names)
        return Items(
            features, np.array([pool.class_names.index(label) for label in labels]), self.test
        )


@dataclass(frozen=True)
class Photos:
    """The photos in a split file, which are encoded once by lit-mini."""

    title: str
    split: str

    @functools.cache  # noqa: B019 - instances live as long as the program
    def reader(self, shared: Path) -> Reader:
        backbone = load_backbone(f"local-dir:{shared / 'models/lit-mini'}", device="cpu")
        return Reader(backbone, cache=EncodingCache(EncodingCache.default_folder()))

    @functools.cache  # noqa: B019
    def pool(self, shared: Path) -> Index:
        train = open_source(shared / self.split, split="train")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "index"
            build_index(
                train, out, self.reader(shared), templates=[TEMPLATE], fit="none", device="cpu"
            )
            pool = Index.load(out, device="cpu")
            return pool.take(np.arange(pool.n))  # copied to memory, because the folder is deleted

    def pool_of(self, number: int, shared: Path) -> tuple[Index, Source]:
        return self.pool(shared), open_source(shared / self.split, split="train")

    def items(self, pool: Index, shared: Path) -> Items:
        return Items.of(pool, open_source(shared / self.split, split="test"), self.reader(shared))


DATASETS: dict[str, Tables | Photos] = {
    "dtd": Tables("DTD", "clip-vitb32/dtd", "test", "text", (1,), "val"),
    "cars": Tables("Stanford Cars", "clip-vitb32/stanford_cars", "val", "text", SHOTS),
    "caltech": Tables("Caltech101, images only", "clip-vitb32/caltech101", "test", None, SHOTS),
    "caltech-text": Tables(
        "Caltech101, 55 classes with text", "clip-vitb32/caltech101", "test", "text_part", SHOTS
    ),
    "flowers": Tables("Flowers102, images only", "clip-vitb32/oxford_flowers", "test", None, SHOTS),
    "food": Tables("9 classes of Food-101", "clip-food9", "test", "text", (), "train"),
    "photos": Photos("Caltech101 photos, lit-mini", "data/caltech101/split_zhou_Caltech101.json"),
}


@dataclass(frozen=True)
class Shape:
    """How the shots of a run are drawn from the pool, given the number of shots and a seed.

    Unless it is ``random``, a pool that has just the number of shots has a single draw. If it is ``uneven``, classes
    have different numbers of shots. ``pool`` is the minimum number of shots of the pool, and ``method`` a further
    method to measure.
    """

    draw: Callable[[Index, int, int], Index]
    random: bool = True
    uneven: bool = False
    pool: int = 0
    method: str | None = None


def with_some_classes(pool: Index, number: int, seed: int, covered: float) -> Index:
    """Return an index in which only a share of the classes has shots. The other classes only have text."""
    cache, c = draw_shots(pool, number, seed), len(pool.class_names)
    chosen = np.random.default_rng(seed).permutation(c)[: max(2, round(covered * c))]
    return cache.take(np.flatnonzero(np.isin(cache.class_ids.numpy(), chosen)))


def with_long_tail(pool: Index, most: int, seed: int) -> Index:
    """Return an index whose classes have 1 to ``most`` shots, evenly spread on a logarithmic scale."""
    draw, c = np.random.default_rng(seed), len(pool.class_names)
    numbers = np.round(most ** (draw.permutation(c) / (c - 1))).astype(int)
    return _numbers_of(draw_shots(pool, most, seed), numbers, draw)


def with_one_large(pool: Index, number: int, seed: int) -> Index:
    """Return an index in which one class has up to :data:`LARGE` shots, and every other class has ``number``."""
    draw, numbers = np.random.default_rng(seed), np.full(len(pool.class_names), number)
    numbers[draw.integers(len(numbers))] = LARGE
    return _numbers_of(pool, numbers, draw)


def _numbers_of(cache: Index, numbers: np.ndarray, draw: np.random.Generator) -> Index:
    ids = cache.class_ids.numpy()
    rows = [draw.permutation(np.flatnonzero(ids == i))[:number] for i, number in enumerate(numbers)]
    return cache.take(np.sort(np.concatenate(rows)))


def with_wrong_labels(pool: Index, number: int, seed: int, wrong: float) -> Index:
    """Return an index in which a share of the shots has the label of another class."""
    cache, c, draw = (
        draw_shots(pool, number, seed),
        len(pool.class_names),
        np.random.default_rng(seed),
    )
    ids = cache.class_ids.numpy().copy()
    rows = draw.permutation(cache.n)[: round(wrong * cache.n)]
    ids[rows] = (ids[rows] + draw.integers(1, c, len(rows))) % c
    return _again(cache, ids)


def with_class_search(pool: Index, number: int, seed: int) -> Index:
    cache = draw_shots(pool, number, seed)
    return _again(cache, cache.class_ids.numpy(), "Classes")


def _again(cache: Index, ids: np.ndarray, index: str = "Flat") -> Index:
    keys, text = (
        np.asarray(cache.keys[np.arange(cache.n)]),
        cache.text_weights if cache.has_text else None,
    )
    return Index.from_features(
        keys,
        ids,
        cache.class_names,
        text,
        settings=cache.settings,
        index=index,
        device="cpu",
        sources=cache.labels["source"].to_pylist(),
    )


def with_k(pool: Index, number: int, seed: int, k: int) -> Index:
    cache = draw_shots(pool, number, seed)
    return cache.with_settings(cache.settings.override(k=k))


SHAPES: dict[str, Shape] = {
    "even": Shape(draw_shots, random=False),
    **{
        f"covered-{part}": Shape(functools.partial(with_some_classes, covered=part / 100))
        for part in (20, 50, 90)
    },
    "tail": Shape(with_long_tail, uneven=True),
    "one-of-500": Shape(with_one_large, uneven=True, pool=LARGE),
    "k-64": Shape(functools.partial(with_k, k=64), random=False),
    "classes": Shape(with_class_search, random=False),
    "growth": Shape(draw_shots, random=False, method=GROWN),
    **{
        f"wrong-{part}": Shape(functools.partial(with_wrong_labels, wrong=part / 100))
        for part in (5, 10, 20)
    },
    "prior": Shape(draw_shots, random=False, method=WITH_PRIOR),
}


@functools.cache
def prior_without(folder: str, shared: Path) -> DoubleArray:
    """Return the pooled scatter of all datasets except the one in ``folder``."""
    tables = [name for name in TABLES if Path(name).parent.name != Path(folder).name]
    return pooled([sums_of(shared / "data/clip-vitb32" / f"{name}.parquet") for name in tables])


RUN = ("shape", "dataset", "shots", "seed", "method")


def runs(
    shape: str,
    name: str,
    shared: Path,
    shots: Sequence[int],
    seeds: int,
    methods: Sequence[str],
    done: set[Any],
) -> Iterator[Run]:
    """Yield a row for each number of shots, seed and method of a dataset, unless the row is already in ``done``."""
    dataset, drawing, items, prior = DATASETS[name], SHAPES[shape], None, None
    if drawing.method == WITH_PRIOR:
        if isinstance(dataset, Photos):
            return  # no other dataset has the same encoder
        prior = prior_without(dataset.folder, shared)
    for number in shots:
        pool, source = dataset.pool_of(max(number, drawing.pool), shared)
        items = items or dataset.items(pool, shared)
        only = not drawing.random and set(np.bincount(pool.class_ids.numpy())) == {number}
        for seed in range(1, 2 if only else seeds + 1):
            drawn = Shots(
                drawing.draw(pool, number, seed), source, dataset.reader(shared), seed, prior
            )
            for method in methods:
                run = (shape, name, number, seed, method)
                without = (method == ZERO and not pool.has_text) or (
                    method == SEARCHED and number < 2
                )
                if run in done or without:
                    continue
                start = time.process_time()
                answering = METHODS[method](drawn)
                seconds = time.process_time() - start
                found = scores(answering, items, drawn.index if drawing.uneven else None)
                yield dict(zip(RUN, run, strict=True)) | found | {"seconds": seconds}


def scores(answering: Answering, items: Items, uneven: Index | None) -> dict[str, float]:
    """Return the accuracy, the expected calibration error, and the share of items that match no class.

    If ``uneven`` is given, classes have different numbers of shots. In this case, the accuracy is the mean over all
    classes, and ``uneven`` is the same mean weighted by the number of shots of each class.
    """
    temperature = answering.settings.temperature if isinstance(answering, Index) else 1.0
    confidence, ids = tip.probabilities(answering.logits(items.features), temperature).max(1)
    right = ids.cpu().numpy() == items.ids
    found = {
        "top1": float(right.mean()),
        "ece": expected_calibration_error(confidence.cpu().numpy(), right),
    }
    if isinstance(answering, Index) and (least := answering.settings.least_cache) is not None:
        strongest = answering.terms(torch.from_numpy(items.features)).strongest(
            answering.retrieval.keys.counts
        )
        found["no_match"] = float((strongest < least).double().mean())
    if uneven is None:
        return found
    tested = np.unique(items.ids)
    per_class = [right[items.ids == i].mean() for i in tested]
    shots = np.bincount(uneven.class_ids.numpy(), minlength=len(uneven.class_names))[tested]
    return found | {
        "top1": float(np.mean(per_class)),
        "uneven": float(np.average(per_class, weights=shots)),
    }


def cell(rows: Sequence[Run], column: str) -> str:
    """Return the mean of a column over all draws, with the standard error of an accuracy if draws differ."""
    values, form = (
        [row[column] for row in rows if column in row],
        {"ece": ".3f", "seconds": ".1f"}.get(column),
    )
    if not values or form is not None:
        return format(statistics.mean(values), form) if values and form else "-"
    mean, error = summary(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if error else "")


def print_table(title: str, rows: Sequence[Run], columns: Sequence[tuple[str, str, str]]) -> None:
    """Print a row for each dataset and number of shots. A column is a head, a method and a column of the results."""
    lines = []
    for (name, number), own in cells_of(rows).items():
        cells = [
            cell([row for row in own if row["method"] == method], column)
            for _, method, column in columns
        ]
        lines.append([DATASETS[name].title, number, *cells])
    click.echo(f"\n{title}\n\n{markdown(['', 'shots', *(head for head, *_ in columns)], lines)}")


def cells_of(rows: Sequence[Run]) -> dict[tuple[str, int], list[Run]]:
    """Return the rows of each dataset and number of shots, in the order of the datasets."""
    found: dict[tuple[str, int], list[Run]] = {}
    for row in sorted(rows, key=lambda row: (list(DATASETS).index(row["dataset"]), row["shots"])):
        found.setdefault((row["dataset"], row["shots"]), []).append(row)
    return found


def print_losses(rows: Sequence[Run]) -> None:
    """Print the cases in which another method is more accurate than the default, with the largest gap first."""
    found = []
    for (name, number), some in cells_of(rows).items():
        of = {
            method: {row["seed"]: 100 * row["top1"] for row in some if row["method"] == method}
            for method in {row["method"] for row in some} | {DEFAULT}
        }
        for method, own in of.items():
            gaps = [own[seed] - of[DEFAULT][seed] for seed in of[DEFAULT].keys() & own.keys()]
            if gaps and statistics.mean(gaps) > SHOWN:
                gap, error = summary(gaps)
                points = f"{gap:.1f}" + (f" ± {error:.1f}" if len(gaps) > 1 else "")
                found.append((gap, points, f"{DATASETS[name].title}, {number} shots", method))
    click.echo(
        f"\nMethods that are more than {SHOWN} points above {DEFAULT}:\n\n| points | where | method |\n|--:|---|---|"
    )
    for _, *cells in sorted(found, reverse=True):
        click.echo(f"| {' | '.join(cells)} |")


@click.command(help=__doc__)
@common.shared_option
@click.option("--shape", type=click.Choice(list(SHAPES)), default="even", show_default=True)
@click.option(
    "--dataset", "chosen", type=click.Choice(list(DATASETS)), multiple=True, help="[default: all]"
)
@click.option("--shots", type=int, multiple=True, default=SHOTS, show_default=True)
@click.option(
    "--method",
    "methods",
    type=click.Choice(list(METHODS)),
    multiple=True,
    help="[default: depends on the shape]",
)
@click.option(
    "--seeds", default=3, show_default=True, help="Number of random draws, if shots are drawn."
)
@click.option(
    "--finetune",
    "tuning",
    is_flag=True,
    help=f"Include {FINE_TUNED}: seconds for tables, minutes for photos.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="File with one JSON line per finished run. These runs are skipped. Runs of other methods are also "
    "printed.",
)
@click.option(
    "--encoders", "joined", is_flag=True, help="Compare one encoder with several (see encoders.py)."
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True),
    help="With --encoders, of EfficientNet-Lite0.",
)
def main(
    shared: Path,
    shape: str,
    chosen: tuple[str, ...],
    shots: tuple[int, ...],
    methods: tuple[str, ...],
    seeds: int,
    tuning: bool,
    results: Path | None,
    joined: bool,
    weights: Path | None,
) -> None:
    """Fit the indexes, classify the test items, and print the results."""
    click.echo(
        f"{machine()}; seeds 1 to {seeds}.\nAll settings are chosen on the shots alone. Top-1 in %, mean over draws ± "
        "standard error; ECE: expected calibration error in 15 bins; seconds: CPU time to fit."
    )
    if joined:
        encoders.compare(shared, shots, seeds, weights)
        return
    further = SHAPES[shape].method
    if not methods:
        asked = [
            method
            for method in METHODS
            if method not in (GROWN, WITH_PRIOR) and (tuning or method != FINE_TUNED)
        ]
        methods = tuple(asked if shape == "even" else COMPARED) + ((further,) if further else ())
    rows, names = read_runs(results), chosen or tuple(DATASETS)
    done = {tuple(row[name] for name in RUN) for row in rows}
    for name in names:
        for row in runs(shape, name, shared, shots, seeds, methods, done):
            rows.append(row)
            add_runs(results, [row])
    rows = [
        row
        for row in rows
        if row["shape"] == shape and row["dataset"] in names and row["shots"] in shots
    ]
    others = {row["method"]: None for row in rows if row["method"] not in METHODS}
    named = [method for method in METHODS if any(row["method"] == method for row in rows)] + list(
        others
    )
    fitted = [method for method in named if method in (DEFAULT, further)]
    top1 = [(method, method, "top1") for method in named]
    if shape == "even":
        print_table("Top-1 in %:", rows, top1)
        print_table("ECE:", rows, [(method, method, "ece") for method in named])
        print_table("No match, in %:", rows, [(method, method, "no_match") for method in fitted])
        largest = [row for row in rows if row["shots"] == max(shots)]
        print_table("Seconds:", largest, [(method, method, "seconds") for method in named])
    else:
        weighted = [
            (f"uneven test: {method}", method, "uneven") for method in named if SHAPES[shape].uneven
        ]
        eces = [(f"ECE: {method}", method, "ece") for method in fitted]
        no_match = [(f"no match: {method}", method, "no_match") for method in fitted]
        print_table(f"{shape}:", rows, top1 + eces + no_match + weighted)
    print_losses(rows)


if __name__ == "__main__":
    main()
