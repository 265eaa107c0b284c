"""Print the tables and figures of the paper next to measured ones, if images and weights are available.

Published figures come from benchmarks/published.csv, which names their sources. They are for RN50 unless stated
otherwise. Measured figures are the mean top-1 accuracy over seeds 1 to N and half the width of its 95 % confidence
interval (Student's t), with one centre view per shot. Use --protocol to determine how settings are selected. With
honest, they are selected on the published validation draw of min(shots, 4) images per class, or by leave-one-out if
there is no validation part. With paper, the published grid is searched on the whole validation part. If a run is
interrupted, it resumes from --work.

With --table 1, the parts of Table 1 are fine-tuned on Caltech101 instead. In every row, training uses the same alpha
and beta until the last epoch, and the test part is then classified with them. The test part is also classified with
alpha, beta and k that are selected on the validation part. No setting is selected on the test part. Encoders are
trained for fewer epochs than in the paper; the number of epochs is printed.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import SHARED, machine

from retrieval_tip import Encoder, EncodingCache, build_index, load_backbone, open_source
from retrieval_tip.backbones.base import PARTS
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data import datasets
from retrieval_tip.data.encoder import view_names
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.evaluation import sweep
from retrieval_tip.evaluation.compare import differ
from retrieval_tip.fit import search_hp
from retrieval_tip.fit.finetune import finetune, own_shots
from retrieval_tip.fit.trainer import VIEWS, Recipe
from retrieval_tip.store.folder import read_manifest

HERE = Path(__file__).resolve().parent
SHOTS = (1, 2, 4, 8, 16)
PAPER = {"zero-shot": "zero-shot", "tip-adapter": "tip-adapter", "tip-adapter-f": "tip-adapter-f"}
"""Name of the published method for each measured method."""

TABLE_1 = "Caltech101"
TRAINED = ("", "keys", "values", "keys+values", "visual", "text", "visual+text")
SETTINGS = (50.0, 1.0)
"""Alpha and beta for every row of Table 1, from a coarse grid on the validation part (see lit-mini's MODEL.md)."""
EPOCHS = {"visual": 2, "visual+text": 2, "text": 5}
"""Numbers of epochs that differ from the paper's 20 epochs, because an encoder takes minutes per epoch on two cores."""
TEMPLATE = "a photo of a {}."


def published() -> list[dict[str, str]]:
    """Read the published figures from published.csv."""
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def place(name: str, root: Path) -> Path:
    """Return the folder of a dataset, which is its usual folder in root, a folder with its name, or root itself."""
    facts = datasets.facts(name)
    found = (root / folder for folder in (facts.folder, name.lower()) if (root / folder).is_dir())
    return next(found, root)


def dataset_rows(name: str, root: Path, work: Path, backbone: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure a dataset that consists of photos."""
    facts, folder = datasets.facts(name), place(name, root)
    with_cache = EncodingCache(EncodingCache.default_folder())
    encoder = Encoder(backbone, cache=with_cache, progress=True)
    train = datasets.open_dataset(name, folder, "train")
    out = work / f"{name}-{backbone.identity.fingerprint}"
    pool = build_index(train, out, encoder, templates=facts.templates, fit="none")
    test = sweep.encode(pool, datasets.open_dataset(name, folder, "test"), encoder)
    try:
        val = sweep.encode(pool, datasets.open_dataset(name, folder, "val"), encoder)
    except RetrievalTipError:  # ImageNet has no validation part
        val = None
    options = options | {"views": (train, encoder)}
    return list(measure(pool, out, test, val, facts.scale, options))


def table_rows(folder: Path, work: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure a dataset that consists of the feature tables train, test and text in a folder."""
    train, test = (open_source(folder / f"{part}.parquet") for part in ("train", "test"))
    out = work / folder.name
    pool = build_index(train, out, Encoder(), text=folder / "text.parquet", fit="none")
    items = sweep.encode(pool, test, Encoder())
    options = options | {"methods": [method for method in options["methods"] if method in sweep.PLAIN]}
    return list(measure(pool, out, items, None, sweep.PAPER_SCALES, options))


def measure(
    pool: CacheModel,
    out: Path,
    test: sweep.Items,
    val: sweep.Items | None,
    scales: tuple[float, float],
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield the results for each number of shots, seed and method. They are stored next to the index."""
    digest = read_manifest(out).keys_digest
    results = out.with_suffix(".parquet")
    yield from sweep.sweep(pool, digest, test, results, val=val, scales=scales, **options)


def print_rows(name: str, label: str, rows: list[dict[str, Any]], facts: list[dict[str, str]]) -> None:
    """Print the measured and published accuracy by number of shots."""
    click.echo(f"\n{name}, measured with {label}, {rows[0]['n']} test items; published: (RN50)")
    click.echo(f"{'':<24}" + "".join(f"{f'{shots} shots':>15}" for shots in SHOTS))
    lines = sweep.summary(rows)
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {line["shots"]: line for line in lines if line["method"] == method}
        text = "".join(
            f"{100 * cell['top1']:>9.1f} +-{100 * (cell['half'] or 0):4.1f}" for cell in map(cells.get, SHOTS) if cell
        )
        click.echo(f"{method:<24}{text}")
    for method, other in PAPER.items():
        found = {row["shots"]: row["accuracy"] for row in facts if row["method"] == other}
        if found:
            cells = [found.get(str(shots), found.get("0", "-")) for shots in SHOTS]
            click.echo(f"{f'{method} (RN50)':<24}" + "".join(f"{cell:>9}      " for cell in cells))


def print_published(table: str, title: str, why: str, facts: list[dict[str, str]]) -> None:
    """Print the rows of the paper that are not measured, and the reason."""
    click.echo(f"\n{title}: {why}")
    for row in facts:
        if row["table"] == table:
            parameters = row["parameters_millions"] and f"{row['parameters_millions']} M parameters"
            trained = row["trained"] and f"trained: {row['trained']}"
            parts = (row["backbone"], row["method"], trained, parameters, row["train_time"])
            click.echo(f"  published {row['accuracy']:>10}  {', '.join(filter(None, parts))}")


def finetuning(root: Path, work: Path, model: str, pretrained: str | None, facts: list[dict[str, str]]) -> None:
    """Print Table 1, with measured and published figures for each combination of trained parts."""
    folder = place(TABLE_1, root)
    train, val, test = (datasets.open_dataset(TABLE_1, folder, part) for part in ("train", "val", "test"))
    backbone = load_backbone(model, pretrained, device="cpu")
    encoder = Encoder(backbone, cache=EncodingCache(work / "encodings"), progress=True)
    alpha, beta = SETTINGS
    out = work / f"{TABLE_1}-table-1-{backbone.identity.fingerprint}"
    start = time.perf_counter()
    index = build_index(train, out, encoder, shots=16, templates=[TEMPLATE], alpha=alpha, beta=beta, device="cpu")
    shots = own_shots(index, train)
    encoder.encode_views(shots, view_names(1, VIEWS))
    encoding = time.perf_counter() - start
    click.echo(
        f"\nTable 1, fine-tuned parts. Published: ImageNet, RN50, 20 epochs, RTX 3090. Here: {TABLE_1}, "
        f"{len(index.class_names)} classes, {index.n} shots, {len(test)} test images, {backbone.identity};\n"
        f"alpha {alpha:g}, beta {beta:g}, all keys; {VIEWS} cached views per shot (visual: new ones); seconds of "
        f"training\n(plus {encoding:.0f} s for encoding); loss of the last epoch; tuned: with settings chosen on "
        f"{len(val)} validation images afterwards"
    )
    click.echo(
        f"{'trained':<13}{'epochs':>7}{'parameters':>12}{'seconds':>9}{'loss':>7}{'val':>6}{'test':>6}"
        f"{'':>6} {'here':<13}{'tuned':>6}{'alpha':>7}{'beta':>6}{'k':>5}{'published':>11}{'time':>12}  there"
    )
    by = {row["trained"]: row for row in facts if row["table"] == "1"}
    none: Score | None = None
    for trained in TRAINED:
        found, row = finetuned(index, shots, val, test, encoder, trained), by[trained]
        none = none or found.test
        change = found.test.percent - none.percent
        here = "collapsed" if found.collapsed else compared(found.test, none)
        there = direction(by[""]["accuracy"], row["accuracy"])
        click.echo(
            f"{trained or 'none':<13}{found.epochs:>7}{found.parameters:>12,}{found.seconds:>9.1f}{found.loss:>7.3f}"
            f"{100 * found.val:>6.1f}{found.test.percent:>6.1f}{change:>+6.1f} {here:<13}"
            f"{found.tuned.percent:>6.1f}{found.tuned.alpha:>7.1f}{found.tuned.beta:>6.2f}{found.tuned.k or 'all':>5}"
            f"{row['accuracy']:>11}{row['train_time']:>12}  {there}"
        )


@dataclass(frozen=True)
class Score:
    """Settings of an index. ``right`` tells for each test item whether the index classifies it correctly."""

    right: np.ndarray
    alpha: float
    beta: float
    k: int | None

    @classmethod
    def of(cls, cache: CacheModel, items: sweep.Items) -> Score:
        found = cache.logits(items.features, cache.settings.k).argmax(dim=1).cpu().numpy()
        return cls(found == items.ids, cache.settings.alpha, cache.settings.beta, cache.settings.k)

    @property
    def percent(self) -> float:
        return 100 * float(self.right.mean())


@dataclass(frozen=True)
class Finetuned:
    """One row of Table 1.

    ``val`` and ``test`` use the training settings, and ``tuned`` uses settings that are selected after training.
    """

    epochs: int
    parameters: int
    seconds: float
    loss: float
    collapsed: bool
    val: float
    test: Score
    tuned: Score


def finetuned(index: CacheModel, shots: Source, val: Source, test: Source, encoder: Encoder, trained: str) -> Finetuned:
    """Train one combination of parts until the last epoch."""
    cache, parts, epochs = index, tuple(filter(None, trained.split("+"))), 0
    seconds, loss, collapsed = 0.0, math.nan, False
    if parts:
        epochs = EPOCHS.get(trained, 20)
        recipe = Recipe(parts, epochs=epochs, views=None if "visual" in parts else VIEWS, settings="own")
        tuned = finetune(index, shots, encoder, recipe)
        cache, collapsed, last = tuned.cache, tuned.collapsed is not None, tuned.curve.to_pylist()[-1]
        seconds, loss = last["seconds"], last["loss"]
        if "visual" in parts:
            encoder = Encoder(tuned.backbone, progress=True)
    queries = search_hp.on_validation(cache, val, encoder)
    right = cache.logits(queries.features).argmax(dim=1).cpu().numpy() == queries.ids
    answers = sweep.encode(cache, test, encoder)
    as_trained = Score.of(cache, answers)
    choice = search_hp.search(cache, queries, cautious=True, kept=SETTINGS)
    chosen = replace(cache, settings=cache.settings.override(alpha=choice.alpha, beta=choice.beta, k=choice.k))
    parameters = sum(size_of(part, index, encoder) for part in parts)
    return Finetuned(epochs, parameters, seconds, loss, collapsed, right.mean(), as_trained, Score.of(chosen, answers))


def size_of(part: str, index: CacheModel, encoder: Encoder) -> int:
    """Return the number of parameters of a part."""
    if part in PARTS:
        return sum(parameter.numel() for parameter in encoder.backbone.parameters(part))
    return int(index.keys.size) if part == "keys" else index.n * len(index.class_names)


def compared(one: Score, other: Score) -> str:
    """Return whether the accuracy on the same items went up or down, or may have changed by chance (95 %)."""
    change = int(one.right.sum()) - int(other.right.sum())
    if not differ(one.right, other.right):
        return "within chance" if change else ""
    return "up" if change > 0 else "down"


def direction(before: str, after: str) -> str:
    """Return whether a published accuracy went up or down."""
    if after == "collapsed":
        return after
    return "up" if float(after) > float(before) else "down" if float(after) < float(before) else ""


@click.command(help=__doc__)
@click.option("--root", type=click.Path(path_type=Path), default=SHARED / "data", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("indexes/paper"), show_default=True)
@click.option("--model", default=f"local-dir:{SHARED}/models/lit-mini", show_default=True)
@click.option("--pretrained")
@click.option(
    "--dataset", "chosen", multiple=True, help="Dataset to measure. Can be repeated.  [default: all available]"
)
@click.option("--seeds", default=3, show_default=True)
@click.option("--shots", type=int, multiple=True, default=SHOTS, show_default=True)
@click.option("--method", "methods", type=click.Choice(list(sweep.METHODS)), multiple=True, default=sweep.METHODS)
@click.option("--protocol", type=click.Choice(["honest", "paper"]), default="honest", show_default=True)
@click.option(
    "--table", type=click.Choice(["1"]), help="Only run this table of the paper, whose fine-tuning takes minutes."
)
def main(root: Path, work: Path, model: str, pretrained: str | None, chosen: tuple[str, ...], **given: Any) -> None:
    """Run all rows that can be measured, and list the others."""
    facts = published()
    click.echo(machine("open_clip_torch"))
    if given["table"]:
        work.mkdir(parents=True, exist_ok=True)
        finetuning(root, work, model, pretrained, facts)
        return
    click.echo(f"protocol {given['protocol']}, seeds 1 to {given['seeds']}")
    options = {name: given[name] for name in ("protocol", "shots")} | {"seeds": range(1, given["seeds"] + 1)}
    options["methods"] = given["methods"]
    work.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    missing: list[str] = []
    backbone = None
    for name in chosen or datasets.names():
        lacking = datasets.check(name, place(name, root))
        if lacking:
            missing.append(f"{name}: {lacking[0]}")
            continue
        try:
            backbone = backbone or load_backbone(model, pretrained)
            measured[name] = dataset_rows(name, root, work, backbone, options)
            print_rows(name, str(backbone.identity), measured[name], [r for r in facts if r["dataset"] == name])
        except RetrievalTipError as error:
            missing.append(f"{name}: {error}")
    food = root / "clip-food9"
    if food.is_dir() and not chosen and given["protocol"] == "honest":
        measured["clip-food9"] = table_rows(food, work, options)
        print_rows("clip-food9", "the features of its tables", measured["clip-food9"], [])
    print_published("1", "Table 1, fine-tuned parts (16 shots, ImageNet)", "run it with --table 1", facts)
    print_published("2", "Table 2, ImageNet", "not run; needs ImageNet and ViT-L/14", facts)
    if missing:
        click.echo("\nNot run:")
        for line in missing:
            click.echo(f"  {line}")


if __name__ == "__main__":
    main()
