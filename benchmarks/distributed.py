"""Compare the local engine with Ray. Both encode photos.

\b
    python benchmarks/distributed.py
    python benchmarks/distributed.py --images FOLDER --model ViT-B-32@openai

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

from retrieval_tip.data import images

FEW = 32
"""Number of photos in the run that measures only the start."""
ENGINES = {"local": (".parquet", ()), "ray": (".parts", ("--ray", "local"))}


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
        click.echo(
            f"{name:<9}{engine:<6}{n:>10,} items{whole:>9.1f} s (start {start:.1f} s, then {rate:,.0f}/s)"
        )


@click.command(help=__doc__)
@click.option(
    "--images",
    "folder",
    type=click.Path(path_type=Path),
    show_default=True,
    default=SHARED / "data/caltech101/101_ObjectCategories",
)
@click.option("--model", default=f"local-dir:{SHARED / 'models/lit-mini'}", show_default=True)
def main(folder: Path, model: str) -> None:
    """Measure both engines, and print the results."""
    click.echo(machine("ray"))
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-distributed-") as place:
        out = Path(place)
        paths = [str(path) for path in images.find(folder)]
        for name, some in (("photos", paths), ("few", paths[:FEW])):
            pq.write_table(pa.table({"path": some}), out / f"{name}.parquet")
        model_options = ("--model", model, "--no-cache", "--out")
        sources = [
            ("encode", out / f"{name}.parquet", *model_options) for name in ("photos", "few")
        ]
        compare("encode", len(paths), *sources, out)


if __name__ == "__main__":
    main()
