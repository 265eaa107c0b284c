"""Print the tables and figures of the paper next to measured ones, if images and weights are available.

Published figures come from benchmarks/published.csv, which names their sources. They are for RN50 unless stated
otherwise. Measured figures are the mean top-1 accuracy over seeds 1 to N and its standard error, with one centre view
per shot. Use --protocol to determine how settings are selected. With honest, they are selected on the published
validation draw of min(shots, 4) images per class, or by leave-one-out if there is no validation part. With paper, the
published grid is searched on the whole validation part. If a run is interrupted, it resumes from --work.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from baselines import class_means, linear_probe
from common import SHARED, machine, summary
from methods import (
    Items,
    Method,
    Shots,
    cache_alone,
    closed,
    draw_shots,
    fine_tuned,
    paper,
    searched,
    zero_shot,
)

from retrieval_tip import EncodingCache, Reader, build_index, load_backbone, open_source
from retrieval_tip.data.source import Source, few_shot, of_images
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.store.versions import Versions

IMAGENET = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
DATASETS: dict[str, tuple[str, Sequence[str]]] = {
    "ImageNet": ("imagenet", IMAGENET),
    "Caltech101": ("caltech-101", ["a photo of a {}."]),
    "OxfordPets": ("oxford_pets", ["a photo of a {}, a type of pet."]),
    "StanfordCars": ("stanford_cars", ["a photo of a {}."]),
    "Flowers102": ("oxford_flowers", ["a photo of a {}, a type of flower."]),
    "Food101": ("food-101", ["a photo of {}, a type of food."]),
    "FGVCAircraft": ("fgvc_aircraft", ["a photo of a {}, a type of aircraft."]),
    "SUN397": ("sun397", ["a photo of a {}."]),
    "DTD": ("dtd", ["{} texture."]),
    "EuroSAT": ("eurosat", ["a centered satellite photo of {}."]),
    "UCF101": ("ucf101", ["a photo of a person doing {}."]),
}
"""The folder in CoOp's layout and the published prompts of each dataset."""
HERE = Path(__file__).resolve().parent
SHOTS = (1, 2, 4, 8, 16)
RUN = ("protocol", "method", "shots", "seed")
METHODS: dict[str, Method] = {
    "zero-shot": zero_shot,
    "tip-adapter": searched,
    "cache-alone": cache_alone,
    "untouched": lambda shots: shots.index,
    "paper-constants": paper,
    "closed-form": closed,
    "class-means": lambda shots: class_means(shots.index),
    "linear-probe": lambda shots: linear_probe(shots.index),
    "tip-adapter-f": fine_tuned,
}
PUBLISHED = ("zero-shot", "tip-adapter", "tip-adapter-f")
"""Methods whose published figures are printed."""
SLOW = ("linear-probe", "tip-adapter-f")
"""Methods that are not measured on feature tables."""
SCALES = {
    "ImageNet": (7.0, 3.0),
    "Caltech101": (12.0, 5.0),
    "OxfordPets": (7.0, 3.0),
    "StanfordCars": (20.0, 10.0),
    "Flowers102": (50.0, 50.0),
    "Food101": (10.0, 10.0),
    "FGVCAircraft": (30.0, 30.0),
    "SUN397": (12.0, 10.0),
    "DTD": (13.0, 13.0),
    "EuroSAT": (12.0, 10.0),
    "UCF101": (7.0, 3.0),
}
"""Largest beta and alpha of the published grid."""


def published() -> list[dict[str, str]]:
    """Read the published figures from published.csv."""
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def opened(name: str, root: Path, part: str) -> Source:
    """Open a part of a dataset, which is in its usual folder in root, or in a folder with its name."""
    folder = next(
        (root / one for one in (DATASETS[name][0], name.lower()) if (root / one).is_dir()), None
    )
    if folder is None:
        raise click.UsageError(f"no folder {DATASETS[name][0]} in {root}")
    if name == "ImageNet":  # results are reported on images/val
        names = dict(
            line.split(maxsplit=1) for line in (folder / "classnames.txt").read_text().splitlines()
        )
        photos = open_source(folder / "images" / {"train": "train", "test": "val"}[part])
        return of_images(photos.sources, photos.name, [names[label] for label in photos.labels])
    if name == "FGVCAircraft":
        lines = (folder / f"images_variant_{part}.txt").read_text().splitlines()
        numbers, labels = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
        return of_images(
            [f"{folder}/images/{number}.jpg" for number in numbers], f"{name} ({part})", labels
        )
    return open_source(next(folder.glob("split_zhou_*.json")), split=part)


def dataset_rows(
    name: str, root: Path, work: Path, backbone: Any, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure a dataset that consists of photos."""
    train, test = (opened(name, root, part) for part in ("train", "test"))
    reader = Reader(backbone, cache=EncodingCache(EncodingCache.default_folder()), progress=True)
    out = work / f"{name}-{backbone.identity.fingerprint}"
    pool = build_index(train, out, reader, templates=DATASETS[name][1], fit="none")
    val = None if name == "ImageNet" else Items.of(pool, opened(name, root, "val"), reader)
    whole = Shots(pool, train, reader, 0, val=val)
    if options["protocol"] == "paper":
        if val is None:
            raise click.UsageError(f"{name}: protocol paper requires a validation part")
        whole = replace(whole, scales=SCALES[name])
    return list(measure(whole, out, Items.of(pool, test, reader), options))


def table_rows(folder: Path, work: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure a dataset that consists of the feature tables train, test and text in a folder."""
    train, test = (open_source(folder / f"{part}.parquet") for part in ("train", "test"))
    out, reader = work / folder.name, Reader()
    pool = build_index(train, out, reader, text=folder / "text.parquet", fit="none")
    options = options | {"methods": [method for method in options["methods"] if method not in SLOW]}
    return list(measure(Shots(pool, train, reader, 0), out, Items.of(pool, test, reader), options))


def measure(
    whole: Shots, out: Path, test: Items, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the accuracy for each number of shots, seed and method. Finished runs are kept next to the index."""
    results = out.with_name(
        f"{out.name}-{Versions(out).manifest().files['keys'].sha256[:12]}.jsonl"
    )
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
                done[run] = (
                    dict(zip(RUN, run, strict=True))
                    | found
                    | {"seconds": time.perf_counter() - start}
                )
                with results.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(done[run])}\n")
            yield done[run]


def drawn(whole: Shots, number: int, seed: int) -> Shots:
    """Draw shots by the published rule, and with them the published validation images, unless all are used."""
    pool, val = whole.index, whole.val
    if val is not None and whole.scales is None:
        labels = pool.class_ids.cpu().numpy()[
            np.argsort(pool.labels["key_id"].to_numpy(), kind="stable")
        ]
        generator = random.Random(seed)
        few_shot(labels.tolist(), number, generator)
        seen = few_shot(val.ids.tolist(), min(number, 4), generator)
        val = Items(val.features[seen], val.ids[seen], val.name)
    return replace(whole, index=draw_shots(pool, number, seed), seed=seed, val=val)


def print_rows(
    name: str, label: str, rows: list[dict[str, Any]], facts: list[dict[str, str]]
) -> None:
    """Print the measured and published accuracy by number of shots."""
    click.echo(f"\n{name}, measured with {label}, {rows[0]['n']} test items; published: (RN50)")
    click.echo(f"{'':<24}" + "".join(f"{f'{shots} shots':>15}" for shots in SHOTS))
    for method in dict.fromkeys(row["method"] for row in rows):
        text = ""
        for shots in SHOTS:
            if own := [
                row["top1"] for row in rows if (row["method"], row["shots"]) == (method, shots)
            ]:
                text += "{:>9.1f} +-{:4.1f}".format(*(100 * one for one in summary(own)))
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


@click.command(help=__doc__)
@click.option("--root", type=click.Path(path_type=Path), default=SHARED / "data", show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("indexes/paper"), show_default=True
)
@click.option("--model", default=f"local-dir:{SHARED}/models/lit-mini", show_default=True)
@click.option(
    "--dataset",
    "chosen",
    type=click.Choice(list(DATASETS)),
    multiple=True,
    help="[default: all available]",
)
@click.option("--seeds", default=3, show_default=True)
@click.option("--shots", type=int, multiple=True, default=SHOTS, show_default=True)
@click.option(
    "--method", "methods", type=click.Choice(list(METHODS)), multiple=True, default=list(METHODS)
)
@click.option(
    "--protocol", type=click.Choice(["honest", "paper"]), default="honest", show_default=True
)
def main(root: Path, work: Path, model: str, chosen: tuple[str, ...], **given: Any) -> None:
    """Run all rows that can be measured, and list the others."""
    facts = published()
    click.echo(machine("open_clip_torch"))
    click.echo(f"protocol {given['protocol']}, seeds 1 to {given['seeds']}")
    options = {name: given[name] for name in ("protocol", "shots")} | {
        "seeds": range(1, given["seeds"] + 1)
    }
    options["methods"] = given["methods"]
    work.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    missing: list[str] = []
    backbone = None
    for name in chosen or DATASETS:
        try:
            backbone = backbone or load_backbone(model)
            measured[name] = dataset_rows(name, root, work, backbone, options)
            print_rows(
                name,
                str(backbone.identity),
                measured[name],
                [r for r in facts if r["dataset"] == name],
            )
        except (OSError, RetrievalTipError, click.UsageError) as error:
            missing.append(f"{name}: {error}")
    food = root / "clip-food9"
    if food.is_dir() and not chosen and given["protocol"] == "honest":
        measured["clip-food9"] = table_rows(food, work, options)
        print_rows("clip-food9", "the features of its tables", measured["clip-food9"], [])
    print_published("1", "Table 1, fine-tuned parts (16 shots, ImageNet)", "run table1.py", facts)
    print_published("2", "Table 2, ImageNet", "not run; needs ImageNet and ViT-L/14", facts)
    if missing:
        click.echo("\nNot run:")
        for line in missing:
            click.echo(f"  {line}")


if __name__ == "__main__":
    main()
