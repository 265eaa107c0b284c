"""Measure the cost of changes to an index, which is built from a feature table in Python.

\b
    python benchmarks/living.py                     # add 1000 keys to 1,000,000 x 512 of 1000 classes, index Classes
    python benchmarks/living.py --index IVF4000,Flat
    python benchmarks/living.py --keys 100000 --added 100 --index Flat --metric

Each addition opens the index, searches for duplicates in other classes, and commits a new version to disk. No images
are encoded, because the features are read from a table for both the build and the additions, which run in one process.
If there are several additions, their median is printed. Afterwards, removals are measured, and opening the index is
measured with and without verifying every byte.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from common import GIB, SEED, clocked, machine, show
from made import Made, rows, write_tables

from retrieval_tip import Index, Reader, build_index, open_source
from retrieval_tip.index import changes


@click.command(help=__doc__)
@click.option("--keys", type=click.IntRange(min=1), default=1_000_000, show_default=True)
@click.option("--added", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--index", default="auto", show_default=True)
@click.option("--metric", is_flag=True, help="Fit a metric, with one-hot values.")
@click.option("--times", type=click.IntRange(min=1), default=5, show_default=True, help="Number of additions.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=tempfile.gettempdir,
              help="Folder for temporary files.")  # fmt: skip
def main(keys: int, added: int, dim: int, classes: int, index: str, metric: bool, times: int, folder: Path) -> None:
    """Measure the build and the changes, and print the results."""
    if shutil.disk_usage(folder).free < 16 * keys * dim:  # the table, the keys, an index that holds them, a new version
        raise click.ClickException(f"{folder}: needs {16 * keys * dim / GIB:.1f} GiB of free space")
    click.echo(machine())
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-living-", dir=folder) as name:
        place, made = Path(name), Made(classes, dim, SEED)
        target, late = place / "index", place / "late.parquet"
        write_tables(place, made, keys)
        source, text = open_source(place / "table.parquet"), place / "text.parquet"
        fit = {"metric": "within", "values": "one-hot"} if metric else {"fit": "none"}
        built = {"text": text, "index": index, "device": "cpu"} | fit
        found["build"] = clocked(lambda: build_index(source, target, Reader(), **built))
        factory = Index.load(target, device="cpu", verify="fast").index.factory
        taken = []
        for number in range(times):
            ids = np.random.default_rng([SEED, number]).integers(classes, size=added)
            table = rows(made.draw(ids, 1000 + number), [made.names[i] for i in ids], f"late {number} ")
            pq.write_table(table, late)
            taken.append(clocked(lambda: changes.add(target, open_source(late), Reader())))
        found[f"add {added:,}"] = statistics.median(taken)
        for what, first in (("remove 10 added keys", keys), ("remove 10 original keys", 0)):
            found[what] = clocked(lambda at=first: changes.remove(target, key_ids=range(at, at + 10)))
        for verify in ("full", "fast"):
            found[f"open, {verify}"] = clocked(lambda how=verify: Index.load(target, device="cpu", verify=how))
    lines = [
        {"what": what, "seconds": value, "times in a build": found["build"] / value} for what, value in found.items()
    ]
    show(f"{keys:,} keys x {dim}, {classes:,} classes, index {factory}", lines)


if __name__ == "__main__":
    main()
