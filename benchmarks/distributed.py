"""Compare the local engine with Ray. Both classify synthetic queries from Parquet to Parquet, and encode photos.

\b
    python benchmarks/distributed.py                          # 1,000,000 queries of 64 values, and the photos
    python benchmarks/distributed.py --queries 100000 --images FOLDER --model ViT-B-32 --pretrained openai

The real commands are timed, without an encoding cache. A second run on a few items measures the start-up time of the
interpreter, the model and the actors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from common import PROGRAM, SHARED, clocked, machine, run
from made import Made, rows, write_tables

from retrieval_tip.data import images
from retrieval_tip.data.tables import open_parquet, table_files

SHOTS, FEW = 16, 32
"""Number of keys per class of the index, and number of items in the run that measures only the start."""
ENGINES = {"local": (".parquet", ()), "ray": (".parts", ("--engine", "ray"))}


def seconds(*command: object) -> float:
    """Time a command of the package."""
    return clocked(lambda: run(*PROGRAM, "-q", *command))


def compare(name: str, n: int, every: Sequence[object], few: Sequence[object], out: Path) -> None:
    """Print the times and rates of a command with both engines.

    ``every`` and ``few`` are complete commands except for the name of the output.
    """
    for engine, (suffix, more) in ENGINES.items():
        start = seconds(*few, out / f"{name}-few{suffix}", *more)
        whole = seconds(*every, out / f"{name}{suffix}", *more)
        rate = (n - FEW) / max(whole - start, 1e-9)
        click.echo(f"{name:<9}{engine:<6}{n:>10,} items{whole:>9.1f} s (start {start:.1f} s, then {rate:,.0f}/s)")


@click.command(help=__doc__)
@click.option("--queries", type=click.IntRange(min=FEW + 1), default=1_000_000, show_default=True)
@click.option("--dim", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--classes", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--images", "folder", type=click.Path(path_type=Path), show_default=True,
              default=SHARED / "data/caltech101/101_ObjectCategories")  # fmt: skip
@click.option("--model", default=f"local-dir:{SHARED / 'models/lit-mini'}", show_default=True)
@click.option("--pretrained")
def main(queries: int, dim: int, classes: int, folder: Path, model: str, pretrained: str | None) -> None:
    """Measure both engines, and print the results."""
    click.echo(machine("ray"))
    made = Made(classes, dim)
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-distributed-") as place:
        out = Path(place)
        write_tables(out, made, SHOTS * classes)
        built = ("--text", out / "text.parquet", "--out", out / "index", "--device", "cpu", "--fit", "none")
        seconds("index", "build", out / "table.parquet", *built)
        asked = [out / f"{number}.parquet" for number in (queries, FEW)]
        ids = made.classes(queries, 2)
        table = rows(made.draw(ids, 3), [made.names[i] for i in ids])
        for path, some in zip(asked, (table, table.slice(0, FEW)), strict=True):
            pq.write_table(some, path, compression="none")
        options = ("--format", "parquet", "--out")
        compare("classify", queries, *([("classify", out / "index", one, *options) for one in asked]), out)
        tables = [pa.concat_tables([open_parquet(file).read(["input", "label"]) for file in table_files(out / name)])
                  for name in ("classify.parquet", "classify.parts")]  # fmt: skip
        click.echo(f"classify: inputs and labels {'agree' if tables[0].equals(tables[1]) else 'differ'}")
        paths = [str(path) for path in images.find(folder)]
        for name, some in (("photos", paths), ("few", paths[:FEW])):
            pq.write_table(pa.table({"path": some}), out / f"{name}.parquet")
        model_options = ("--model", model, *(("--pretrained", pretrained) if pretrained else ()), "--no-cache", "--out")
        sources = [("encode", out / f"{name}.parquet", *model_options) for name in ("photos", "few")]
        compare("encode", len(paths), *sources, out)


if __name__ == "__main__":
    main()
