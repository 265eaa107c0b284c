"""Seconds from the shell to the answer: help, one image, one feature row; and where those of one image go.

Every figure is the median over fresh processes, which take turns. Indexes are made in a temporary folder: one of images
of Caltech101, with the encoder that --model names, and one of random features.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip import CacheModel
from retrieval_tip.cli.output import table_lines
from retrieval_tip.doctor import faiss_distributions

PACKAGES = ("retrieval-tip", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "numpy", "pyarrow")
CLASSES = 100
PROGRAM = (sys.executable, "-m", "retrieval_tip")

PARTS = """
import time
began, marks = time.time(), {}
import contextlib, importlib, json, sys

@contextlib.contextmanager
def part(name):
    start = time.perf_counter()
    yield
    marks[name] = time.perf_counter() - start

started, folder, image = float(sys.argv[1]), sys.argv[2], sys.argv[3]
marks["interpreter"] = began - started
with part("import click and the command line"):
    from retrieval_tip.cli.program import start_lightly
start_lightly()
for package in ("numpy", "pyarrow.parquet", "torch", "faiss"):
    with part(f"import {package}"):
        importlib.import_module(package)
with part("import the rest of the index"):
    from retrieval_tip import CacheModel, Encoder, load_backbone, open_inputs
with part("open the index, every byte hashed"):
    cache = CacheModel.load(folder, device="cpu")
for package in ("torchvision", "transformers", "timm", "open_clip"):
    with part(f"import {package}"), contextlib.suppress(ImportError):
        importlib.import_module(package)
with part("load the model"):
    backbone = load_backbone(cache.backbone.model, cache.backbone.pretrained, device="cpu")
with part("weights digest"):
    backbone.identity
with part("encode the image"):
    features = Encoder(backbone).encode(next(iter(open_inputs([image])))).features
with part("retrieve and answer"):
    cache.classify(features)
print(json.dumps(marks | {"ended": time.time()}))
"""
"""The parts of the classification of one image, one after another; the command overlaps hashing with imports."""


def seconds(*arguments: object) -> float:
    """Seconds that a command takes; its failure is ours."""
    command = [*PROGRAM, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lasted = time.perf_counter() - start
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}: {done.stderr}")
    return lasted


def parts(index: Path, image: Path) -> dict[str, float]:
    """Seconds of each part of the classification of an image in a fresh process."""
    command = [sys.executable, "-c", PARTS, str(time.time()), str(index), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise click.ClickException(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found | {"ended": ended - found["ended"]}


def make_features(folder: Path, keys: int, dim: int) -> tuple[Path, Path]:
    """An index of random unit rows, and a table of one."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((keys, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"class {number}" for number in range(CLASSES)]
    CacheModel.from_features(rows, np.arange(keys) % CLASSES, names, rows[:CLASSES], device="cpu").save(folder / "rows")
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows[0]), dim)
    pq.write_table(pa.table({"id": ["row"], "feature": column}), folder / "row.parquet")
    return folder / "rows", folder / "row.parquet"


def _machine() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{platform.system()} {platform.machine()}, {next(iter(names), platform.processor())}, {os.cpu_count()} cores"
    )


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in (*PACKAGES, *faiss_distributions()):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True), default=Path("../shared"), show_default=True)
@click.option("--model", help="As of the command line.  [default: models/lit-mini in --data]")
@click.option("--pretrained")
@click.option("--images", default=CLASSES, show_default=True, help="Keys of the index of images, one a class.")
@click.option("--keys", default=200_000, show_default=True, help="Keys of the index of features.")
@click.option("--dim", default=512, show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Parquet file for the table.")
def main(
    data: Path, model: str | None, pretrained: str | None, images: int, keys: int, dim: int, runs: int, out: Path | None
) -> None:
    """Make the indexes, time the commands in turn, print the table."""
    caltech = (data / "data/caltech101").resolve()
    model = model or f"local-dir:{(data / 'models/lit-mini').resolve()}"
    split = json.loads((caltech / "split_zhou_Caltech101.json").read_text(encoding="utf-8"))
    photos = caltech / "101_ObjectCategories"
    first = {name: photos / file for file, _, name in reversed(split["train"])}
    image = photos / split["test"][0][0]
    lasted: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-startup-") as name:
        folder = Path(name)
        table = pa.table({"path": [str(path) for path in first.values()], "label": list(first)}).slice(0, images)
        pq.write_table(table, folder / "shots.parquet")
        chosen = ("--model", model, *(("--pretrained", pretrained) if pretrained else ()))
        cache = ("--cache", folder / "cache")
        seconds(
            "-q",
            "index",
            "build",
            "--fit",
            "none",
            folder / "shots.parquet",
            *chosen,
            *cache,
            "--out",
            folder / "images",
        )
        rows, row = make_features(folder, keys, dim)
        large = f"{keys:,} keys x {dim}"
        commands = {
            "--help": ("--help",),
            "index info": ("index", "info", folder / "images"),
            "classify one image, not encoded before": (
                "classify",
                folder / "images",
                image,
                "--cache",
                folder / "empty",
            ),
            "classify one image, in the encoding cache": ("classify", folder / "images", image, *cache),
            f"classify one feature row, {large}": ("classify", rows, row),
            f"classify one feature row, {large}, -k 64": ("classify", rows, row, "-k", 64),
        }
        for turn in range(runs + 1):
            found = {what: seconds(*arguments) for what, arguments in commands.items()}
            shutil.rmtree(folder / "empty")
            found |= parts(folder / "images", image)
            for what, value in found.items() if turn else ():  # the first round fills caches
                lasted.setdefault("end the interpreter" if what == "ended" else what, []).append(value)
    facts = {
        "date": f"{datetime.date.today()}",
        "machine": _machine(),
        "versions": _versions(),
        "model": f"{model} {pretrained or ''}".strip(),
    }
    for what, value in facts.items():
        click.echo(f"{what:<9} {value}")
    found_rows = [
        {"what": what, "seconds": statistics.median(values), "least": min(values), "runs": len(values)}
        for what, values in lasted.items()
    ]
    for line in table_lines(found_rows, ["what", "seconds", "least", "runs"]):
        click.echo(line)
    if out is not None:
        pq.write_table(pa.Table.from_pylist([row | facts for row in found_rows]), out)


if __name__ == "__main__":
    main()
