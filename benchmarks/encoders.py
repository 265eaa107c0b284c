"""Compare one encoder with several in one index, on the same shots. ``accuracy.py --encoders`` runs it.

The features come from the tables of ``two-encoders``, row by row. With ``weights``, the photos of Caltech101 are also
encoded by lit-mini and by an EfficientNet-Lite0 from this file. Below 16 shots, shots are drawn with seeds 1 to N.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from common import features_of, markdown
from methods import draw_shots

from retrieval_tip import EncodingCache, Index, Reader, load_backbone, open_source
from retrieval_tip.backbones.base import unit
from retrieval_tip.fit import closed_form

CLIP, RN50, LIT, LITE0 = "CLIP ViT-B/32", "CLIP RN50", "lit-mini", "EfficientNet-Lite0"
COLUMNS = {CLIP: "feature", RN50: "feature_rn50", LIT: "feature_lit", LITE0: "feature_lite0"}
PHOTOS, VAL = ("photos_16", "photos_test"), ("shots_16", "val")
JOINED = [
    (PHOTOS, (CLIP, LIT)), (PHOTOS, (CLIP, LITE0)), (PHOTOS, (LIT, LITE0)), (PHOTOS, (CLIP, LIT, LITE0)),
    (VAL, (CLIP, RN50)),
]  # fmt: skip


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
    models = {LIT: f"local-dir:{shared / 'models/lit-mini'}", LITE0: f"timm:tf_efficientnet_lite0@{weights}"}
    reader = Reader(load_backbone("+".join(models.values()), device="cpu"), cache=EncodingCache.at(None))
    both = reader.encode(source).features
    ends = np.cumsum([one.dim for one in reader.backbone.parts])[:-1]  # type: ignore[union-attr]
    return Part(np.array(source.labels), dict(zip(models, map(unit, np.split(both, ends, axis=1)), strict=True)))


def accuracy(shots: Part, test: Part, names: Sequence[str], number: int, seed: int) -> tuple[float, tuple[float, ...]]:
    """Fit an index to shots of these encoders, and return its accuracy and the shares."""
    classes = sorted(set(shots.labels.tolist()))
    features = [shots.features[name] for name in names]
    pool = Index.from_features(features, shots.labels.tolist(), classes, device="cpu")
    index = pool if number >= pool.n / len(classes) else draw_shots(pool, number, seed)
    closed_form.fit(index)
    ids = index.logits([test.features[name] for name in names]).argmax(1).cpu().numpy()
    return float((np.array(classes)[ids] == test.labels).mean()), index.shares


def rows(shots: Part, test: Part, names: Sequence[str], number: int, seeds: int) -> Iterator[str]:
    """Yield the cells of a row: each encoder alone, all joined, the gain, the shares, and the gain in reverse order."""
    draws = range(1, 2 if number == 16 else seeds + 1)
    alone = {name: [accuracy(shots, test, [name], number, seed)[0] for seed in draws] for name in names}
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
    parts = [(where, names, *(of_table(folder / f"{name}.parquet") for name in where)) for where, names in JOINED]
    if weights is not None:
        own = of_photos(shared, "train", weights), of_photos(shared, "test", weights)
        parts.append((("photos encoded here", ""), (LIT, LITE0), *own))
    for (name, _), names, own_shots, test in parts:
        heads = ["shots", *names, "joined", "gain", "shares", "gain, other order"]
        lines = ([number, *rows(own_shots, test, names, number, seeds)] for number in sorted(shots, reverse=True))
        click.echo(f"\n{name}:\n\n{markdown(heads, lines, left=0)}")
