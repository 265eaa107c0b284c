"""Compare one encoder with several in one index, on the same shots.

``accuracy.py --encoders`` uses all classes. The features come from the tables of ``two-encoders``, row by row. With
``weights``, the photos of Caltech101 are also encoded by lit-mini and by an EfficientNet-Lite0 from this file. Below 16
shots, shots are drawn with seeds 1 to N.

Run by itself, this script measures how well the shares are chosen if there are few photos. It draws 10 classes and
their shots (with 16 shots, only the classes), and fits indexes of one encoder and of several. Some combinations have a
useless part, which is named last: features that were projected to 32 values and got as much noise (*weak*), or that
belong to other photos (*shuffled*). The change is the difference to the part of the highest mean accuracy, in points.
With ``--before``, the tables also have the changes in the runs of another version.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import common
import numpy as np
import pyarrow.parquet as pq
from common import Run, add_runs, features_of, machine, markdown, read_runs
from methods import draw_shots

from retrieval_tip import EncodingCache, Index, Reader, load_backbone, open_source
from retrieval_tip.backbones.base import unit
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.folds import ranks_within

CLIP, RN50, LIT, LITE0 = "CLIP ViT-B/32", "CLIP RN50", "lit-mini", "EfficientNet-Lite0"
COLUMNS = {CLIP: "feature", RN50: "feature_rn50", LIT: "feature_lit", LITE0: "feature_lite0"}
PHOTOS, VAL = ("photos_16", "photos_test"), ("shots_16", "val")
JOINED = [
    (PHOTOS, (CLIP, LIT)),
    (PHOTOS, (CLIP, LITE0)),
    (PHOTOS, (LIT, LITE0)),
    (PHOTOS, (CLIP, LIT, LITE0)),
    (VAL, (CLIP, RN50)),
]
WEAK, SHUFFLED, VALUES = "weak", "shuffled", 32
"""Kinds of useless parts, and number of values of a weak one before it gets noise."""
MADE = [
    (PHOTOS, (CLIP, f"{WEAK} {LIT}")),
    (PHOTOS, (LIT, f"{WEAK} {CLIP}")),
    (PHOTOS, (LITE0, f"{WEAK} {LITE0}")),
    (PHOTOS, (CLIP, LIT, f"{WEAK} {LITE0}")),
    (VAL, (CLIP, f"{WEAK} {RN50}")),
    (PHOTOS, (CLIP, f"{SHUFFLED} {LIT}")),
    (PHOTOS, (LIT, f"{SHUFFLED} {CLIP}")),
    (PHOTOS, (LITE0, f"{SHUFFLED} {LITE0}")),
    (PHOTOS, (CLIP, LIT, f"{SHUFFLED} {LITE0}")),
    (VAL, (CLIP, f"{SHUFFLED} {RN50}")),
]
DRAWN = 10
"""Number of classes in a draw."""


@dataclass(frozen=True)
class Part:
    """The labels of shots or test items, and their features by encoder."""

    labels: np.ndarray
    features: dict[str, np.ndarray]


def of_table(file: Path) -> Part:
    table = pq.read_table(file)
    there = {name: column for name, column in COLUMNS.items() if column in table.column_names}
    features = {name: features_of(table, column) for name, column in there.items()}
    return Part(np.array(table["label"].to_pylist()), features)


def of_photos(shared: Path, part: str, weights: Path) -> Part:
    source = open_source(shared / "data/caltech101/split_zhou_Caltech101.json", split=part)
    models = {
        LIT: f"local-dir:{shared / 'models/lit-mini'}",
        LITE0: f"timm:tf_efficientnet_lite0@{weights}",
    }
    reader = Reader(
        load_backbone("+".join(models.values()), device="cpu"), cache=EncodingCache.default()
    )
    both = reader.encode(source).features
    ends = np.cumsum([one.dim for one in reader.backbone.parts])[:-1]  # type: ignore[union-attr]
    return Part(
        np.array(source.labels),
        dict(zip(models, map(unit, np.split(both, ends, axis=1)), strict=True)),
    )


def accuracy(
    shots: Part, test: Part, names: Sequence[str], number: int, seed: int
) -> tuple[float, tuple[float, ...]]:
    """Fit an index to shots of these encoders, and return its accuracy and the shares."""
    classes = sorted(set(shots.labels.tolist()))
    features = [shots.features[name] for name in names]
    pool = Index.from_features(features, shots.labels.tolist(), classes, device="cpu")
    index = pool if number >= pool.n / len(classes) else draw_shots(pool, number, seed)
    index, _ = closed_form.fit(index)
    ids = index.logits([test.features[name] for name in names]).argmax(1).cpu().numpy()
    return float((np.array(classes)[ids] == test.labels).mean()), index.shares


def rows(shots: Part, test: Part, names: Sequence[str], number: int, seeds: int) -> Iterator[str]:
    """Yield the cells of a row: each encoder alone, all joined, the gain, the shares, and the gain in reverse order."""
    draws = range(1, 2 if number == 16 else seeds + 1)
    alone = {
        name: [accuracy(shots, test, [name], number, seed)[0] for seed in draws] for name in names
    }
    joined = [accuracy(shots, test, names, number, seed) for seed in draws]
    mirrored = [accuracy(shots, test, names[::-1], number, seed) for seed in draws]
    yield from (f"{100 * statistics.mean(own):.1f}" for own in alone.values())
    best = max(map(statistics.mean, alone.values()))
    mean = statistics.mean(one for one, _ in joined)
    yield f"{100 * mean:.1f}"
    yield f"{100 * (mean - best):+.1f}"
    yield " ".join(f"{share:.2f}" for share in np.mean([shares for _, shares in joined], axis=0))
    yield f"{100 * (statistics.mean(one for one, _ in mirrored) - best):+.1f}"


def compare(shared: Path, shots: Sequence[int], seeds: int, weights: Path | None) -> None:
    """Print a table for each combination of encoders."""
    folder = shared / "data/two-encoders"
    parts = [
        (where, names, *(of_table(folder / f"{name}.parquet") for name in where))
        for where, names in JOINED
    ]
    if weights is not None:
        own = of_photos(shared, "train", weights), of_photos(shared, "test", weights)
        parts.append((("photos encoded here", ""), (LIT, LITE0), *own))
    for (name, _), names, own_shots, test in parts:
        heads = ["shots", *names, "joined", "gain", "shares", "gain, other order"]
        lines = (
            [number, *rows(own_shots, test, names, number, seeds)]
            for number in sorted(shots, reverse=True)
        )
        click.echo(f"\n{name}:\n\n{markdown(heads, lines, left=0)}")


def with_useless(part: Part, seed: int) -> Part:
    """Add the useless features that are made from those of each encoder, with noise that is drawn from a seed."""
    made = {}
    for number, (name, own) in enumerate(part.features.items()):
        noise, same = np.random.default_rng([seed, number]), np.random.default_rng(number)
        few = own @ same.normal(size=(own.shape[1], VALUES))
        few = unit(few - few.mean(0)) + noise.normal(size=few.shape) / VALUES**0.5
        made[f"{WEAK} {name}"] = unit(few).astype(np.float32)
        made[f"{SHUFFLED} {name}"] = own[noise.permutation(len(own))]
    return Part(part.labels, part.features | made)


def some_of(part: Part, rows: np.ndarray) -> Part:
    return Part(part.labels[rows], {name: own[rows] for name, own in part.features.items()})


def drawn(shots: Part, test: Part, number: int, seed: int) -> tuple[Part, Part]:
    """Draw :data:`DRAWN` classes and ``number`` shots of each, and return the shots and the test items."""
    chance = np.random.default_rng([number, seed])
    classes = chance.choice(np.unique(shots.labels), DRAWN, replace=False)
    rows = np.flatnonzero(np.isin(shots.labels, classes))
    _, ids = np.unique(shots.labels[rows], return_inverse=True)
    rows = rows[ranks_within(ids, chance) < number]
    return some_of(shots, rows), some_of(test, np.flatnonzero(np.isin(test.labels, classes)))


def measured(tables: dict[tuple[str, str], list[Part]], number: int, seed: int) -> Iterator[Run]:
    """Yield the accuracy and the shares of each combination, and the accuracy of each part alone."""
    for where, names in JOINED + MADE:
        shots, test = drawn(*tables[where], number, seed)
        joined, shares = accuracy(shots, test, names, number, seed)
        alone = [accuracy(shots, test, [name], number, seed)[0] for name in names]
        useless = any(name.startswith((WEAK, SHUFFLED)) for name in names)
        key = {"shots": number, "seed": seed, "names": " + ".join(names), "useless": useless}
        yield key | {"joined": joined, "shares": shares, "alone": alone}


def changes(runs: Sequence[Run], number: int, useless: bool) -> dict[str, np.ndarray]:
    """Return the changes of each combination in points, by draw."""
    found = {}
    own = [run for run in runs if (run["shots"], run["useless"]) == (number, useless)]
    for names in dict.fromkeys(run["names"] for run in own):
        rows = [run for run in own if run["names"] == names]
        best = np.mean([run["alone"] for run in rows], axis=0).argmax()
        found[names] = np.array([100 * (run["joined"] - run["alone"][best]) for run in rows])
    return found


def print_changes(runs: Sequence[Run], before: Sequence[Run]) -> None:
    """Print the changes over all combinations, and the mean change of each."""
    lines, single = [], []
    for number, useless in itertools.product(sorted({run["shots"] for run in runs}), (False, True)):
        both = [changes(side, number, useless) for side in (runs, before) if side]
        for title, found in zip(("now", "before"), both, strict=False):
            every, means = (
                np.concatenate(list(found.values())),
                [own.mean() for own in found.values()],
            )
            figures = (
                every.mean(),
                min(means),
                np.quantile(every, 0.01),
                sum(mean for mean in means if mean > 0),
            )
            kind = "useless part" if useless else "real parts"
            lines.append([number, kind, title, *(f"{figure:+.2f}" for figure in figures)])
        single += [
            [names, number, *(f"{found[names].mean():+.2f}" for found in both)] for names in both[0]
        ]
    heads = [
        "shots",
        "combinations with",
        "version",
        "mean",
        "lowest mean",
        "lowest 1 %",
        "sum of gains",
    ]
    click.echo(f"\n{markdown(heads, lines, left=0)}")
    single.sort(key=lambda line: line[0])
    titles = ["parts", "shots", "mean change", "before"][: len(single[0])]
    click.echo(f"\n{markdown(titles, single)}")


@click.command(help=__doc__)
@common.shared_option
@click.option("--shots", type=int, multiple=True, default=[1, 2, 4, 8, 16], show_default=True)
@click.option("--draws", default=20, show_default=True)
@click.option("--before", type=click.Path(path_type=Path), help="Results of another version.")
@common.results_option
def main(
    shared: Path, shots: tuple[int, ...], draws: int, before: Path | None, results: Path
) -> None:
    """Measure how well shares are chosen if there are few photos."""
    click.echo(f"{machine()}; {draws} draws of {DRAWN} classes.")
    done = {(run["shots"], run["seed"]) for run in read_runs(results)}
    folder = shared / "data/two-encoders"
    tables = {
        where: [with_useless(of_table(folder / f"{name}.parquet"), len(name)) for name in where]
        for where in (PHOTOS, VAL)
    }
    for seed, number in itertools.product(range(draws), shots):
        if (number, seed) not in done:
            add_runs(results, list(measured(tables, number, seed)))
    print_changes(
        *([run for run in read_runs(file) if run["seed"] < draws] for file in (results, before))
    )


if __name__ == "__main__":
    main()
