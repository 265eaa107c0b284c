"""Measure the cost of changes to an index, which is built from a feature table in Python.

\b
    python benchmarks/living.py                     # add 1000 keys to 1,000,000 x 512 of 1000 classes, index Classes
    python benchmarks/living.py --index IVF4000,Flat
    python benchmarks/living.py --keys 100000 --added 100 --index Flat --metric

Each addition opens the index, searches for duplicates in other classes, and commits a new version to disk. No images
are encoded, because the features are read from a table for both the build and the additions, which run in one process.
Afterwards, removals are measured, and opening the index with and without verifying every byte. Figures are medians.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

import click
import common
import numpy as np
import pyarrow.parquet as pq
from common import GIB, SEED, against, clocked, machine, medians, show, take_turns
from made import Made, rows, write_tables

from retrieval_tip import Index, Reader, build_index, open_source
from retrieval_tip.index import changes


@against
@click.command(help=__doc__)
@click.option("--keys", type=click.IntRange(min=1), default=1_000_000, show_default=True)
@click.option("--added", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--index", default="auto", show_default=True)
@click.option("--metric", is_flag=True, help="Fit a metric, with one-hot values.")
@click.option(
    "--times", type=click.IntRange(min=1), default=5, show_default=True, help="Number of turns."
)
@common.folder_option
def main(
    keys: int,
    added: int,
    dim: int,
    classes: int,
    index: str,
    metric: bool,
    times: int,
    folder: Path,
) -> None:
    """Measure the build and the changes, and print the results."""
    if (
        shutil.disk_usage(folder).free < 16 * keys * dim
    ):  # the table, the keys, an index that holds them, a new version
        raise click.ClickException(f"{folder}: needs {16 * keys * dim / GIB:.1f} GiB of free space")
    click.echo(machine())
    title, made = f"{keys:,} keys x {dim}, {classes:,} classes", Made(classes, dim, SEED)
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-living-", dir=folder) as name:
        target, late, text = (Path(name) / own for own in ("index", "late.parquet", "text.parquet"))
        write_tables(Path(name), made, keys)
        source = open_source(Path(name) / "table.parquet")
        fit = {"metric": "within", "values": "one-hot"} if metric else {"fit": "none"}
        built = {"text": text, "index": index, "device": "cpu"} | fit

        def build(_: int) -> float:
            return clocked(lambda: build_index(source, target, Reader(), **built))

        def add(turn: int) -> float:
            ids = np.random.default_rng([SEED, turn]).integers(classes, size=added)
            table = rows(made.draw(ids, 1000 + turn), [made.names[i] for i in ids], f"late {turn} ")
            pq.write_table(table, late)
            return clocked(lambda: changes.add(target, open_source(late), Reader()))

        def remove(turn: int, first: int) -> float:
            return clocked(
                lambda: changes.remove(
                    target, key_ids=range(first + 10 * turn, first + 10 * turn + 10)
                )
            )

        def load(_: int, verify: str) -> float:
            return clocked(lambda: Index.load(target, device="cpu", verify=verify))

        sides = {
            "remove 10 added keys": partial(remove, first=keys),
            "remove 10 original keys": partial(remove, first=0),
            **{f"open, {verify}": partial(load, verify=verify) for verify in ("full", "fast")},
        }
        taken = take_turns(title, {"build": build}, 1, warm=0)
        taken |= take_turns(title, {f"add {added:,}": add}, times, warm=0)
        taken |= take_turns(title, sides, times, warm=0)
        factory = Index.load(target, device="cpu", verify="fast").index_type
    found = medians(taken)
    show(
        f"{title}, index {factory}",
        [
            {"what": what, "seconds": value, "times in a build": found["build"] / value}
            for what, value in found.items()
        ],
    )


if __name__ == "__main__":
    main()
