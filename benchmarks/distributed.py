"""Compare the local engine with Ray. Both classify synthetic queries from Parquet to Parquet, and encode photos.

\b
    python benchmarks/distributed.py                          # 1,000,000 queries of 64 values, and the photos
    python benchmarks/distributed.py --queries 100000 --images FOLDER --model ViT-B-32 --pretrained openai

The real commands are timed, without an encoding cache. A second run on a few items measures the start-up time of the
interpreter, the model and the actors.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import machine
from made import ROWS, Made

from retrieval_tip.data import images
from retrieval_tip.data.tables import open_parquet, table_files

SHOTS, FEW = 16, 32
"""Number of keys per class of the index, and number of items in the run that measures only the start."""
SHARED = Path(__file__).resolve().parents[2] / "shared"
ENGINES = {"local": (".parquet", ()), "ray": (".parts", ("--engine", "ray"))}


def seconds(*command: object) -> float:
    """Time a command of the package. Raises ClickException if it fails.

    The exit status 3 is allowed, because it only means that some photos are unreadable.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "retrieval_tip", "-q", *map(str, command)], capture_output=True)
    if done.returncode not in (0, 3):
        raise click.ClickException(f"{' '.join(map(str, command))}: {done.stderr.decode()}")
    return time.perf_counter() - start


def write_table(path: Path, made: Made, ids: np.ndarray, rows: np.ndarray | None = None) -> Path:
    """Write a feature table that contains ``rows``, or queries of these classes, which are drawn block by block."""
    schema = pa.schema([("id", pa.string()), ("label", pa.string()), ("feature", pa.list_(pa.float32(), made.d))])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, len(ids), ROWS):
            some = ids[start : start + ROWS]
            values = made.draw(some, 3 + start) if rows is None else rows[start : start + ROWS]
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), made.d)
            names = [f"{path.stem}-{start + i}" for i in range(len(some))]
            writer.write_table(pa.table([names, [f"class {i}" for i in some], column], schema=schema))
    return path


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
    made, ids = Made(classes, dim), np.arange(classes)
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-distributed-") as place:
        out = Path(place)
        keys = write_table(out / "keys.parquet", made, ids.repeat(SHOTS))
        text = write_table(out / "text.parquet", made, ids, made.text)
        seconds("index", "build", "--fit", "none", keys, "--text", text, "--out", out / "index", "--device", "cpu")
        asked = [write_table(out / f"{n}.parquet", made, made.classes(n, 2)) for n in (queries, FEW)]
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
