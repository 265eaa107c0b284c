"""Measure the time from the start of a command to its answer, for the help, one image and one feature row.

For comparison, `import torch` is also measured. Figures are medians over new processes, which take turns after a
warm-up turn. Two temporary indexes are used. One contains Caltech101 images that are encoded by --model, and the other
contains synthetic features (benchmarks/made.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import PROGRAM, SEED, Side, against, clocked, machine, medians, run, show, take_turns
from made import Made, rows

from retrieval_tip import Index

CLASSES = 100


def sides(
    folder: Path, image: Path, build: tuple[object, ...], keys: int, dim: int
) -> dict[str, Side]:
    """Return the commands to time, which use the indexes ``images`` and ``rows`` in a folder."""
    images, features = folder / "images", folder / "rows"
    large, row = f"one row of features, {keys:,} keys x {dim}", folder / "row.parquet"
    commands = {
        "--help": ("--help",),
        "index info": ("index", "info", images),
        "classify, an image that was encoded before": ("classify", images, image),
        "classify, a new image": ("classify", images, image, "--no-cache"),
        "index build, images that were encoded before": (*build, "--out", folder / "again"),
        f"classify, {large}": ("classify", features, row),
        f"classify, {large}, -k 64": ("classify", features, row, "-k", 64),
    }

    lines = {name: (*PROGRAM, *arguments) for name, arguments in commands.items()}
    lines["python -c 'import torch'"] = (sys.executable, "-c", "import torch")
    return {name: lambda _, line=line: clocked(lambda: run(*line)) for name, line in lines.items()}


@against
@click.command(help=__doc__)
@common.shared_option
@click.option(
    "--model",
    help="Encoder to use, named as on the command line.  [default: models/lit-mini in --shared]",
)
@click.option(
    "--images",
    default=CLASSES,
    show_default=True,
    help="Number of photos in the index of one per class.",
)
@click.option(
    "--keys", default=200_000, show_default=True, help="Number of keys in the index of features."
)
@click.option("--dim", default=512, show_default=True)
@click.option("--runs", default=5, show_default=True)
def main(shared: Path, model: str | None, images: int, keys: int, dim: int, runs: int) -> None:
    """Make the indexes, time the commands in turn, and print the table."""
    caltech = (shared / "data/caltech101").resolve()
    model = model or f"local-dir:{(shared / 'models/lit-mini').resolve()}"
    split = json.loads((caltech / "split_zhou_Caltech101.json").read_text(encoding="utf-8"))
    photos = caltech / "101_ObjectCategories"
    first = {name: str(photos / file) for file, _, name in reversed(split["train"])}
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-startup-") as name:
        folder = Path(name)
        table = pa.table({"path": list(first.values()), "label": list(first)}).slice(0, images)
        pq.write_table(table, folder / "shots.parquet")
        source, options = folder / "shots.parquet", ("--model", model, "--fit", "none")
        run(
            *PROGRAM,
            "-q",
            *(build := ("index", "build", source, *options)),
            "--out",
            folder / "images",
        )
        made, ids = Made(CLASSES, dim, SEED), np.arange(keys) % CLASSES
        Index.from_features(made.draw(ids, 1), ids, made.names, made.text, device="cpu").save(
            folder / "rows"
        )
        pq.write_table(rows(made.draw(ids[:1], 2), ["?"]), folder / "row.parquet")
        commands = sides(folder, photos / split["test"][0][0], build, keys, dim)
        found = take_turns(f"medians of {runs} processes", commands, runs)
    click.echo(f"{machine('openvino')}\nmodel {model}")
    show(
        f"medians of {runs} processes",
        [{"what": what, "seconds": value} for what, value in medians(found).items()],
    )


if __name__ == "__main__":
    main()
