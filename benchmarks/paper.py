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
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from baselines import class_means, linear_probe
from common import SHARED, machine
from methods import Items, Method, Shots, cache_alone, closed, fine_tuned, paper, searched, zero_shot

from retrieval_tip import Encoder, EncodingCache, build_index, load_backbone, open_source
from retrieval_tip.backbones.base import PARTS
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data import datasets
from retrieval_tip.data.encoder import view_names
from retrieval_tip.data.shots import few_shot_split
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.evaluation.compare import SIGNIFICANT, mcnemar
from retrieval_tip.fit import search_hp
from retrieval_tip.fit.finetune import finetune, own_shots
from retrieval_tip.fit.trainer import VIEWS, Recipe
from retrieval_tip.report.curve import draw, half_width
from retrieval_tip.store.folder import read_manifest

HERE = Path(__file__).resolve().parent
SHOTS = (1, 2, 4, 8, 16)
RUN = ("protocol", "method", "shots", "seed")
METHODS: dict[str, Method] = {
    "zero-shot": zero_shot,
    "tip-adapter": searched,
    "cache-alone": cache_alone,
    "untouched": lambda shots: shots.cache,
    "paper-constants": paper,
    "closed-form": closed,
    "class-means": lambda shots: class_means(shots.cache),
    "linear-probe": lambda shots: linear_probe(shots.cache),
    "tip-adapter-f": fine_tuned,
}
PUBLISHED = ("zero-shot", "tip-adapter", "tip-adapter-f")
"""Methods whose published figures are printed."""
SLOW = ("linear-probe", "tip-adapter-f")
"""Methods that are not measured on feature tables."""
SCALES = {
    "ImageNet": (7.0, 3.0), "Caltech101": (12.0, 5.0), "OxfordPets": (7.0, 3.0), "StanfordCars": (20.0, 10.0),
    "Flowers102": (50.0, 50.0), "Food101": (10.0, 10.0), "FGVCAircraft": (30.0, 30.0), "SUN397": (12.0, 10.0),
    "DTD": (13.0, 13.0), "EuroSAT": (12.0, 10.0), "UCF101": (7.0, 3.0),
}  # fmt: skip
"""Largest beta and alpha of the published grid."""

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
    folder = place(name, root)
    train, test = (datasets.open_dataset(name, folder, part) for part in ("train", "test"))
    encoder = Encoder(backbone, cache=EncodingCache(EncodingCache.default_folder()), progress=True)
    out = work / f"{name}-{backbone.identity.fingerprint}"
    pool = build_index(train, out, encoder, templates=datasets.facts(name).templates, fit="none")
    try:
        val = Items.of(pool, datasets.open_dataset(name, folder, "val"), encoder)
    except RetrievalTipError:  # ImageNet has no validation part
        val = None
    whole = Shots(pool, train, encoder, 0, val=val)
    if options["protocol"] == "paper":
        if val is None:
            raise click.UsageError(f"{name}: protocol paper requires a validation part")
        whole = replace(whole, scales=SCALES[name])
    return list(measure(whole, out, Items.of(pool, test, encoder), options))


def table_rows(folder: Path, work: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure a dataset that consists of the feature tables train, test and text in a folder."""
    train, test = (open_source(folder / f"{part}.parquet") for part in ("train", "test"))
    out, encoder = work / folder.name, Encoder()
    pool = build_index(train, out, encoder, text=folder / "text.parquet", fit="none")
    options = options | {"methods": [method for method in options["methods"] if method not in SLOW]}
    return list(measure(Shots(pool, train, encoder, 0), out, Items.of(pool, test, encoder), options))


def measure(whole: Shots, out: Path, test: Items, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the accuracy for each number of shots, seed and method. Finished runs are kept next to the index."""
    results = out.with_name(f"{out.name}-{read_manifest(out).keys_digest[:12]}.jsonl")
    rows = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    done = {tuple(row[name] for name in RUN): row for row in map(json.loads, rows)}
    for number, seed in itertools.product(options["shots"], options["seeds"]):
        shots: Shots | None = None
        for method in options["methods"]:
            run = (options["protocol"], method, number, seed)
            if run not in done:
                shots = shots or drawn(whole, number, seed)
                start = time.perf_counter()
                answers = METHODS[method](shots).logits(test.features).argmax(dim=1).cpu().numpy()
                found = {"top1": float((answers == test.ids).mean()), "n": len(answers)}
                done[run] = dict(zip(RUN, run, strict=True)) | found | {"seconds": time.perf_counter() - start}
                with results.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(done[run])}\n")
            yield done[run]


def drawn(whole: Shots, number: int, seed: int) -> Shots:
    """Draw shots by the published rule, and with them the published validation images, unless all are used."""
    pool, val = whole.cache, whole.val
    if val is not None and whole.scales is None:
        labels = pool.class_ids.cpu().numpy()[np.argsort(pool.labels["key_id"].to_numpy(), kind="stable")]
        seen = few_shot_split(labels.tolist(), val.ids.tolist(), number, seed)[1]
        val = Items(val.features[seen], val.ids[seen], val.name)
    return replace(whole, cache=draw(pool, number, seed), seed=seed, val=val)


def print_rows(name: str, label: str, rows: list[dict[str, Any]], facts: list[dict[str, str]]) -> None:
    """Print the measured and published accuracy by number of shots."""
    click.echo(f"\n{name}, measured with {label}, {rows[0]['n']} test items; published: (RN50)")
    click.echo(f"{'':<24}" + "".join(f"{f'{shots} shots':>15}" for shots in SHOTS))
    for method in dict.fromkeys(row["method"] for row in rows):
        text = ""
        for shots in SHOTS:
            if own := [row["top1"] for row in rows if (row["method"], row["shots"]) == (method, shots)]:
                text += f"{100 * np.mean(own):>9.1f} +-{100 * (half_width(own) or 0):4.1f}"
        click.echo(f"{method:<24}{text}")
    for method in PUBLISHED:
        found = {row["shots"]: row["accuracy"] for row in facts if row["method"] == method}
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
    def of(cls, cache: CacheModel, items: Items) -> Score:
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
    answers = Items.of(cache, test, encoder)
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
    more, fewer = int((one.right & ~other.right).sum()), int((other.right & ~one.right).sum())
    if mcnemar(more, fewer) >= SIGNIFICANT:
        return "within chance" if more != fewer else ""
    return "up" if more > fewer else "down"


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
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, default=list(METHODS))
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
        try:
            backbone = backbone or load_backbone(model, pretrained)
            measured[name] = dataset_rows(name, root, work, backbone, options)
            print_rows(name, str(backbone.identity), measured[name], [r for r in facts if r["dataset"] == name])
        except (RetrievalTipError, click.UsageError) as error:
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
