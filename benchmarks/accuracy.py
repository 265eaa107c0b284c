"""Compare the accuracy, calibration and time of methods that use the same shots from real datasets.

If published keys are available, they are used as shots (with seed 1; each key is the mean of ten views). Otherwise,
shots are drawn by the published rule with seeds 1 to N, and each shot is encoded as one centre view. The exception is
DTD with 1 shot, which uses the published keys. All settings are selected using only the shots: alpha, beta and k of
Tip-Adapter by leave-one-out, and all other settings by cross-validation. Validation images are only used as shots or
queries. No setting is selected on the images that are scored.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from common import SHARED, machine

from retrieval_tip import CacheModel, Encoder, EncodingCache, build_index, load_backbone, open_source, tip
from retrieval_tip.backbones.base import unit
from retrieval_tip.data.sources import Source
from retrieval_tip.evaluation import baselines, sweep
from retrieval_tip.evaluation.calibration import expected_calibration_error
from retrieval_tip.fit import closed_form, search_hp
from retrieval_tip.fit.finetune import finetune, own_shots
from retrieval_tip.fit.trainer import Recipe

SHOTS = (1, 2, 4, 8, 16)
TEMPLATE = "a photo of a {}."
ALLOWED = 0.5
"""Maximum accepted gap between the default and the best rival, in points, for 2 or more shots."""


@dataclass(frozen=True)
class Shots:
    """Tip-Adapter with default settings over the shots of a run, and their source, which fine-tuning needs."""

    cache: CacheModel
    source: Source
    encoder: Encoder
    seed: int


Answering = CacheModel | baselines.Linear
Method = Callable[[Shots], Answering]


def zero_shot(shots: Shots) -> Answering:
    return shots.cache.with_settings(shots.cache.settings.override(alpha=0.0))


def paper(shots: Shots) -> Answering:
    return shots.cache.with_settings(shots.cache.settings.override(alpha=1.0, beta=5.5))


def searched(shots: Shots) -> Answering:
    choice = search_hp.search(shots.cache, search_hp.leave_one_out(shots.cache), cautious=True)
    return shots.cache.with_settings(choice.settings(shots.cache.settings))


def fine_tuned(shots: Shots) -> Answering:
    own = own_shots(shots.cache, shots.source)
    return finetune(shots.cache, own, shots.encoder, Recipe(seed=shots.seed)).cache


def closed(shots: Shots, metric: str | None = None, values: str | None = None) -> Answering:
    cache = copy.copy(shots.cache)
    closed_form.fit(cache, closed_form.Fit(metric=metric, values=values))
    return cache


DEFAULT, ZERO, SEARCHED, PROBE = "the default", "zero-shot", "Tip-Adapter searched", "linear probe"
FINE_TUNED = "Tip-Adapter-F"
METHODS: dict[str, Method] = {
    ZERO: zero_shot,
    "Tip-Adapter (1, 5.5)": paper,
    SEARCHED: searched,
    FINE_TUNED: fine_tuned,
    PROBE: lambda shots: baselines.linear_probe(shots.cache),
    "nearest class mean": lambda shots: baselines.class_means(shots.cache),
    "GDA": lambda shots: baselines.discriminant(shots.cache),
    "ProKeR's form": lambda shots: closed(shots, metric="none", values="solved"),
    DEFAULT: closed,
}
RIVALS = (ZERO, SEARCHED, PROBE)


@dataclass(frozen=True)
class Tables:
    """The feature tables of a dataset, which are files in a folder.

    ``keys`` contains one table for each of several numbers of shots. For other numbers, shots are drawn from ``pool``.
    If there is a ``text`` table, only its classes are used, and shots and test items of other classes are dropped.
    """

    title: str
    folder: str
    test: str
    text: str | None = None
    keys: Sequence[int] = ()
    pool: str = ""

    def encoder(self, shared: Path) -> Encoder:
        return Encoder()

    def file(self, shared: Path, name: str) -> Path:
        return shared / "data" / self.folder / f"{name}.parquet"

    def read(
        self, shared: Path, name: str, classes: Sequence[str] | None = None
    ) -> tuple[np.ndarray, list[Any], list[Any]]:
        """Return the features, labels and ids in a table. If classes are given, return only those of these classes."""
        table = pq.read_table(self.file(shared, name))
        if classes is not None:
            table = table.filter(pc.is_in(table["label"], pa.array(classes)))
        features = np.stack(table["feature"].to_numpy()).astype(np.float32)
        return unit(features), table["label"].to_pylist(), table["id"].to_pylist()

    def pool_of(self, number: int, shared: Path) -> tuple[CacheModel, Source]:
        """Return the keys from which ``number`` shots are drawn, and their table."""
        name = f"shots_{number}" if number in self.keys else self.pool
        weights, classes = None, sorted(set(self.read(shared, self.test)[1]))
        if self.text is not None:
            weights, classes, _ = self.read(shared, self.text)
        features, labels, ids = self.read(shared, name, classes)
        cache = CacheModel.from_features(features, labels, classes, weights, sources=ids, device="cpu")
        return cache, open_source(self.file(shared, name))

    def items(self, pool: CacheModel, shared: Path) -> sweep.Items:
        features, labels, _ = self.read(shared, self.test, pool.class_names)
        return sweep.Items(features, np.array([pool.class_names.index(label) for label in labels]), self.test)


@dataclass(frozen=True)
class Photographs:
    """The photos in a split file, which are encoded once by lit-mini."""

    title: str
    split: str

    @functools.cache  # noqa: B019 - instances live as long as the program
    def encoder(self, shared: Path) -> Encoder:
        backbone = load_backbone(f"local-dir:{shared / 'models/lit-mini'}", device="cpu")
        return Encoder(backbone, cache=EncodingCache(EncodingCache.default_folder()))

    @functools.cache  # noqa: B019
    def pool(self, shared: Path) -> CacheModel:
        train = open_source(shared / self.split, split="train")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "index"
            build_index(train, out, self.encoder(shared), templates=[TEMPLATE], fit="none", device="cpu")
            pool = CacheModel.load(out, device="cpu", precision="float32")
            return pool.take(np.arange(pool.n))  # copied to memory, because the folder is deleted

    def pool_of(self, number: int, shared: Path) -> tuple[CacheModel, Source]:
        return self.pool(shared), open_source(shared / self.split, split="train")

    def items(self, pool: CacheModel, shared: Path) -> sweep.Items:
        return sweep.encode(pool, open_source(shared / self.split, split="test"), self.encoder(shared))


CLIP = "OpenAI ViT-B/32"
DATASETS: dict[str, Tables | Photographs] = {
    "dtd": Tables(f"DTD test, with text, {CLIP}", "clip-vitb32/dtd", "test", "text", (1,), "val"),
    "cars": Tables(f"Stanford Cars val, with text, {CLIP}", "clip-vitb32/stanford_cars", "val", "text", SHOTS),
    "caltech": Tables(f"Caltech101 test, images only, {CLIP}", "clip-vitb32/caltech101", "test", None, SHOTS),
    "caltech-text": Tables(
        f"Caltech101 test, the 55 classes with text, {CLIP}", "clip-vitb32/caltech101", "test", "text_part", SHOTS
    ),
    "flowers": Tables(f"Flowers102 test, images only, {CLIP}", "clip-vitb32/oxford_flowers", "test", None, SHOTS),
    "food": Tables(f"9 classes of Food-101, with text, {CLIP}", "clip-food9", "test", "text", (), "train"),
    "photographs": Photographs(
        "Caltech101 photos, 100 classes with text, lit-mini", "data/caltech101/split_zhou_Caltech101.json"
    ),
}


def runs(
    name: str,
    shared: Path,
    shots: Sequence[int],
    seeds: int,
    methods: Sequence[str],
    done: set[Any],
    covered: float,
    tail: bool,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of shots, seed and method of a dataset, unless the row is already in ``done``."""
    dataset, items = DATASETS[name], None
    for number in shots:
        pool, source = dataset.pool_of(number, shared)
        items = items or dataset.items(pool, shared)
        only = (
            covered == 1 and not tail and set(np.bincount(pool.class_ids.numpy())) == {number}
        )  # each draw would be the same
        for seed in range(1, 2 if only else seeds + 1):
            cache = sweep.draw(pool, number, seed)
            cache = cache if covered == 1 else with_some_classes(cache, covered, seed)
            cache = with_long_tail(cache, number, seed) if tail else cache
            drawn = Shots(cache, source, dataset.encoder(shared), seed)
            for method in methods:
                run = (name, number, seed, method)
                without = (method == ZERO and not pool.has_text) or (method == SEARCHED and number < 2)
                if run in done or without:
                    continue
                start = time.process_time()
                answering = METHODS[method](drawn)
                seconds = time.process_time() - start
                yield (
                    dict(zip(RUN, run, strict=True))
                    | scores(answering, items, drawn.cache if tail else None)
                    | {"seconds": seconds}
                )


def with_some_classes(cache: CacheModel, covered: float, seed: int) -> CacheModel:
    """Return an index in which only a share of the classes has shots. The seed selects these classes.

    The other classes only have text.
    """
    c = len(cache.class_names)
    chosen = np.random.default_rng(seed).permutation(c)[: max(2, round(covered * c))]
    return cache.take(np.flatnonzero(np.isin(cache.class_ids.numpy(), chosen)))


def with_long_tail(cache: CacheModel, most: int, seed: int) -> CacheModel:
    """Return an index whose classes have 1 to ``most`` shots, evenly spread on a logarithmic scale."""
    draw, ids, c = np.random.default_rng(seed), cache.class_ids.numpy(), len(cache.class_names)
    numbers = np.round(most ** (draw.permutation(c) / (c - 1))).astype(int)
    rows = [draw.permutation(np.flatnonzero(ids == i))[: numbers[i]] for i in range(c)]
    return cache.take(np.sort(np.concatenate(rows)))


RUN = ("dataset", "shots", "seed", "method")


def scores(answering: Answering, items: sweep.Items, tail: CacheModel | None = None) -> dict[str, float]:
    """Return the accuracy and the expected calibration error.

    If ``tail`` is given, classes have different numbers of shots. In this case, the accuracy is the mean over all
    classes, and ``uneven`` is the same mean weighted by the number of shots of each class.
    """
    temperature = answering.settings.temperature if isinstance(answering, CacheModel) else 1.0
    confidence, ids = tip.probabilities(answering.logits(items.features), temperature).max(1)
    right = ids.cpu().numpy() == items.ids
    found = {"top1": float(right.mean()), "ece": expected_calibration_error(confidence.cpu().numpy(), right)}
    if tail is None:
        return found
    tested = np.unique(items.ids)
    per_class = [right[items.ids == i].mean() for i in tested]
    shots = np.bincount(tail.class_ids.numpy(), minlength=len(tail.class_names))[tested]
    return found | {"top1": float(np.mean(per_class)), "uneven": float(np.average(per_class, weights=shots))}


def mean(rows: Sequence[dict[str, Any]], column: str, **of: Any) -> float | None:
    """Return the mean of a column over all seeds."""
    values = [row[column] for row in rows if all(row[name] == value for name, value in of.items())]
    return statistics.mean(values) if values else None


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def percent(value: float | None) -> str:
    return cell(None if value is None else 100 * value, ".1f")


def print_table(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the accuracy and calibration of each method by number of shots.

    Also print the time that each method takes for the largest number of shots.
    """
    shots = sorted({row["shots"] for row in rows})
    seeds = [f"{number}: {len({row['seed'] for row in rows if row['shots'] == number})}" for number in shots]
    click.echo(f"\n**{DATASETS[name].title}** (draws of {', '.join(seeds)})\n")
    heads = [f"top-1, {number}" if number == shots[0] else str(number) for number in shots]
    heads += [f"ECE, {number}" if number == shots[0] else str(number) for number in shots]
    tail = "uneven" in rows[0]
    heads += [f"uneven test, {shots[-1]}"] if tail else []
    click.echo(f"| | {' | '.join(heads)} | s at {shots[-1]} |\n|---{'|--:' * (len(heads) + 1)}|")
    for method in [method for method in METHODS if any(row["method"] == method for row in rows)]:
        cells = [percent(mean(rows, "top1", shots=number, method=method)) for number in shots]
        cells += [cell(mean(rows, "ece", shots=number, method=method), ".3f") for number in shots]
        cells += [percent(mean(rows, "uneven", shots=shots[-1], method=method))] if tail else []
        seconds = cell(mean(rows, "seconds", shots=shots[-1], method=method), ".1f")
        click.echo(f"| {method} | {' | '.join(cells)} | {seconds} |")


def losses(rows: Sequence[dict[str, Any]]) -> list[tuple[float, str]]:
    """Return the gap between the default and the best rival for each dataset and number of shots, in points.

    The largest gap comes first. Only runs that have 2 or more shots are included.
    """
    found = []
    for name, number in sorted({(row["dataset"], row["shots"]) for row in rows if row["shots"] > 1}):
        of = {"dataset": name, "shots": number}
        own = mean(rows, "top1", method=DEFAULT, **of)
        rivals = {method: mean(rows, "top1", method=method, **of) for method in RIVALS}
        there = {method: 100 * value for method, value in rivals.items() if value is not None}
        if own is None or not there:
            continue
        best = max(there, key=lambda method: there[method])
        where = f"{DATASETS[name].title}, {number} shots: {DEFAULT} {100 * own:.1f}, {best} {there[best]:.1f}"
        found.append((there[best] - 100 * own, where))
    return sorted(found, reverse=True)


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--dataset", "chosen", type=click.Choice(list(DATASETS)), multiple=True, help="[default: all]")
@click.option("--shots", type=int, multiple=True, default=SHOTS, show_default=True)
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="[default: all]")
@click.option("--seeds", default=3, show_default=True, help="Number of random draws, if shots are drawn.")
@click.option(
    "--finetune", "tuning", is_flag=True, help=f"Include {FINE_TUNED}: seconds for tables, minutes for photos."
)
@click.option("--covered", default=1.0, show_default=True, help="Share of classes that have shots.")
@click.option(
    "--tail", is_flag=True, help="Give the classes from 1 to --shots shots. The accuracy is then the mean over classes."
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="File with one JSON line per finished run. These runs are skipped.",
)
def main(
    shared: Path,
    chosen: tuple[str, ...],
    shots: tuple[int, ...],
    methods: tuple[str, ...],
    seeds: int,
    tuning: bool,
    covered: float,
    tail: bool,
    results: Path | None,
) -> None:
    """Fit the indexes, classify the test items, and print the results."""
    click.echo(
        f"{machine()}; seeds 1 to {seeds}.\nAll settings are chosen on the shots alone. Top-1 in %, mean over draws; "
        "ECE: expected calibration error in 15 bins; s: CPU seconds to fit, including the choice of settings."
    )
    methods = methods or tuple(method for method in METHODS if tuning or method != FINE_TUNED)
    every: list[dict[str, Any]] = []
    if results is not None and results.exists():
        every = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    done = {tuple(row[name] for name in RUN) for row in every}
    rows = []
    for name in chosen or DATASETS:
        for row in runs(name, shared, shots, seeds, methods, done, covered, tail):
            every.append(row)
            if results is not None:
                with results.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(row)}\n")
        own = [row for row in every if row["dataset"] == name and row["shots"] in shots and row["method"] in methods]
        if own:
            print_table(name, own)
        rows += own
    found = losses(rows)
    if found:
        click.echo(
            f"\nGap of {DEFAULT} to the best of {', '.join(RIVALS)}, from 2 shots on (accepted: {ALLOWED} points):\n"
        )
        click.echo("| points | where |\n|--:|---|")
        for points, where in [found[0], *(pair for pair in found[1:] if pair[0] > ALLOWED)]:
            click.echo(f"| {points:.1f} | {where} |")


if __name__ == "__main__":
    main()
