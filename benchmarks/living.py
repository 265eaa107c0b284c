"""What a change costs: building an index from a feature table, and adding to it, through the library.

\b
    python benchmarks/living.py                     # 1000 keys to 1,000,000 x 512 of 1000 classes, index Classes
    python benchmarks/living.py --index IVF4000,Flat

Each addition is one new version on disk: it opens the index, encodes nothing (the features are in a table), looks for
duplicates in other classes, and commits. The build is of the same kind of table. Both run in one process; additions are
repeated, and the median counts. Then what a removal, a relabelling, and opening cost, every byte checked or not.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
from made import Made
from scale import GIB, class_names, write_tables
from throughput import FACTS, SEED, facts, machine_line, write_rows

from retrieval_tip import CacheModel, Encoder, build_index, open_source
from retrieval_tip.index import changes

SCHEMA = pa.schema(
    [
        ("n", pa.int64()),
        ("added", pa.int64()),
        ("d", pa.int32()),
        ("c", pa.int32()),
        ("index", pa.string()),
        ("measure", pa.string()),
        ("seconds", pa.float64()),
        *FACTS,
    ]
)


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.option("--keys", type=click.IntRange(min=1), default=1_000_000, show_default=True)
@click.option("--added", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--index", default="auto", show_default=True)
@click.option("--times", type=click.IntRange(min=1), default=5, show_default=True, help="Additions.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=tempfile.gettempdir, help="For files.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Parquet file of the measures.")
def main(keys: int, added: int, dim: int, classes: int, index: str, times: int, folder: Path, out: Path | None) -> None:
    """Measure, print, write."""
    if shutil.disk_usage(folder).free < 16 * keys * dim:  # the table, the keys, an index that holds them, and once more
        raise click.ClickException(f"{folder}: {16 * keys * dim / GIB:.1f} GiB of free space are needed")
    known = facts("cpu")
    click.echo(machine_line(known))
    measures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-living-", dir=folder) as name:
        place = Path(name)
        made = Made(classes, dim, SEED)
        write_tables(place, made, keys, "float32")
        target = place / "index"

        def build() -> CacheModel:
            source = open_source(place / "table.parquet")
            return build_index(
                source, target, Encoder(), text=place / "text.parquet", index=index, fit="none", device="cpu"
            )

        measures["build"] = timed(build)
        factory = CacheModel.load(target, device="cpu", verify="fast").index.factory
        taken = []
        for number in range(times):
            ids = np.random.default_rng([SEED, number]).integers(classes, size=added)
            features = made.draw(ids, 1000 + number)
            labels = np.array(class_names(classes), dtype=object)[ids]
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), dim)
            rows = {"id": [f"late {number} {i}" for i in range(added)], "label": labels.tolist(), "feature": values}
            pa.parquet.write_table(pa.table(rows), place / "late.parquet")
            taken.append(timed(lambda: changes.add(target, open_source(place / "late.parquet"), Encoder())))
        measures["add"] = statistics.median(taken)
        late = [keys + i for i in range(10)]
        measures["remove 10 of those added"] = timed(lambda: changes.remove(target, key_ids=late))
        measures["remove 10 of the first"] = timed(lambda: changes.remove(target, key_ids=range(10)))
        for verify in ("fast", "full"):
            measures[f"open, {verify}"] = timed(lambda how=verify: CacheModel.load(target, device="cpu", verify=how))
    click.echo(f"{added:,} keys to {keys:,} x {dim}, {classes:,} classes, index {factory}")
    for measure, seconds in measures.items():
        click.echo(f"{measure:<28}{seconds:>10.3f} s{measures['build'] / seconds:>10.1f} times in a build")
    if out is not None:
        columns = {"n": keys, "added": added, "d": dim, "c": classes, "index": factory}
        rows = [columns | {"measure": measure, "seconds": seconds} for measure, seconds in measures.items()]
        write_rows(out, rows, known, SCHEMA)


if __name__ == "__main__":
    main()
