"""Measure large indexes with the real command.

\b
    python benchmarks/scale.py                                       # 1,000,000 x 512 of 10,000 classes, float16
    python benchmarks/scale.py --keys 10000000 --classes 100000 --folder /tmp     # 40 GB of disk
    python benchmarks/scale.py --keys 5000000 --store lance --folder /tmp         # the same in a LanceDB store
    python benchmarks/scale.py --fit auto --dtype float32 --classes 1000          # memory of a build with a fit

A feature table is made in blocks (benchmarks/made.py), and an index is built from it with `index build`.
The index is then opened in a new process, which classifies with the k of the index. Peak memory is the largest resident
set of each process, including memory-mapped pages. The anonymous part of this memory, which excludes file pages that
the system can reclaim, is measured by sampling.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import common
import numpy as np
from common import GIB, PROGRAM, SEED, against, clocked, launch, machine, record, show
from made import Made, write_tables

from retrieval_tip.index import places

LOGITS = 1 << 26
"""Maximum number of logits per call (256 MiB). Larger batches are divided into several calls."""
SINGLES = 16

Measure = tuple[str, float, str]


def place_of(folder: Path, store: str) -> str:
    """Return the place of the index."""
    return f"lance://{folder / 'index'}" if store == "lance" else str(folder / "index")


def answer(folder: Path, store: str, exact_queries: int) -> list[Measure]:
    """Open the index in a folder, and classify its queries. This function runs in a new process."""
    queries, ids, opened = np.load(folder / "queries.npy"), np.load(folder / "ids.npy"), []
    load = places.at(place_of(folder, store)).load
    opening = clocked(lambda: opened.append(load(device="cpu")))
    (cache,) = opened
    position = {name: i for i, name in enumerate(cache.class_names)}
    answers: list[int] = []

    def classify(features: np.ndarray) -> None:
        answers.extend(
            position[prediction.label] for prediction in cache.classify(features, neighbours=0)
        )

    first = clocked(lambda: classify(queries[:1]))
    batch = min(len(queries), max(1, LOGITS // len(cache.class_names)))
    classify(queries[:batch])  # warms up the index
    answers.clear()
    taken = [
        clocked(lambda at=at: classify(queries[at : at + batch]))
        for at in range(0, len(queries), batch)
    ]
    found, few, logits = np.array(answers), min(exact_queries, len(queries)), []
    singles = [
        clocked(lambda i=i: classify(queries[i : i + 1])) for i in range(min(SINGLES, len(queries)))
    ]
    exact = clocked(lambda: logits.append(cache.logits(queries[:few], "all")))
    expected = logits[0].argmax(dim=1).numpy()
    return [
        (
            f"opening {cache.index_type}, k {cache.settings.k or 'all'}, every byte checked",
            opening,
            "s",
        ),
        ("first query after opening", 1e3 * first, "ms"),
        (
            f"one query in a batch of {len(queries)} ({batch} per call)",
            1e6 * sum(taken) / len(queries),
            "us",
        ),
        ("a single query", 1e3 * statistics.median(singles), "ms"),
        (f"one query against all keys, {few} per call", 1e6 * exact / few, "us"),
        ("accuracy", 100 * float((found == ids).mean()), "%"),
        (
            f"accuracy with all keys, {few} queries",
            100 * float((expected == ids[:few]).mean()),
            "%",
        ),
        (
            "agreement with all keys, same queries",
            100 * float((found[:few] == expected).mean()),
            "%",
        ),
    ]


def large(
    folder: Path,
    store: str,
    size: tuple[int, int, int],
    queries: int,
    dtype: str,
    exact: int,
    options: list[object],
) -> Iterator[Measure]:
    """Make features, build an index from them, and classify queries."""
    n, d, c = size
    made = Made(c, d, SEED)
    write_tables(folder, made, n, dtype)
    asked = made.classes(queries, 2)
    np.save(folder / "ids.npy", asked)
    np.save(folder / "queries.npy", made.draw(asked, 3))
    del made
    gc.collect()
    table = folder / "table.parquet"
    text = (
        "--text",
        folder / "text.parquet",
        "--dtype",
        dtype,
        "--device",
        "cpu",
        "--out",
        place_of(folder, store),
    )
    build = launch(*PROGRAM, "-q", "index", "build", table, *text, *options)
    yield "building", build.seconds, "s"
    yield "building, peak resident", build.peak, "GiB"
    yield "building, peak anonymous", build.anonymous, "GiB"
    yield "feature table", table.stat().st_size / GIB, "GiB"
    table.unlink()  # frees its cached pages
    for part, bytes_ in sizes_of(folder / "index").items():
        yield part, bytes_ / GIB, "GiB"
    process = launch(
        sys.executable, __file__, "--answer", folder, "--store", store, "--exact-queries", exact
    )
    yield from map(tuple, json.loads(process.output))
    yield "answering, peak resident", process.peak, "GiB"
    yield "answering, peak anonymous", process.anonymous, "GiB"


def sizes_of(index: Path) -> dict[str, int]:
    """Return the total size of the files of an index by kind, in bytes."""
    sizes: dict[str, int] = {}
    for path in sorted(path for path in index.rglob("*") if path.is_file()):
        inner = path.relative_to(index).parts
        of_table = inner[0].endswith(".lance")
        name = (
            f"folder {inner[1]} of the table"
            if of_table
            else f"file of {path.name.partition('-')[0]}"
        )
        if inner[0] == "data" or of_table:
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


@against
@click.command(help=__doc__)
@click.option("--keys", default=1_000_000, show_default=True)
@click.option("--dim", default=512, show_default=True)
@click.option("--classes", default=10_000, show_default=True)
@click.option("--queries", default=4096, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True
)
@click.option("--index", default="auto", show_default=True)
@click.option(
    "--store", type=click.Choice(["folder", "lance"]), default="folder", show_default=True
)
@click.option("--fit", type=click.Choice(["none", "auto"]), default="none", show_default=True)
@click.option(
    "-k",
    type=int,
    help="Number of nearest keys to use per query.  [default: the setting of the index]",
)
@click.option(
    "--exact-queries", default=64, show_default=True, help="Number of queries against all keys."
)
@common.folder_option
@click.option("--answer", "to_answer", type=click.Path(path_type=Path), hidden=True)
def main(
    keys: int,
    dim: int,
    classes: int,
    queries: int,
    dtype: str,
    index: str,
    store: str,
    fit: str,
    k: int | None,
    exact_queries: int,
    folder: Path,
    to_answer: Path | None,
) -> None:
    """Run the measurements, and print the results. The hidden option runs the measured process."""
    if to_answer is not None:
        click.echo(json.dumps(answer(to_answer, store, exact_queries)))
        return
    click.echo(machine("lancedb"))
    need = (
        keys * dim * (2 * np.dtype(dtype).itemsize + 4)
    )  # the table, the keys, and an index that holds them
    if shutil.disk_usage(folder).free < need:
        raise click.ClickException(f"{folder}: needs {need / GIB:.1f} GiB of free space")
    options = ["--index", index, "--fit", fit, *(() if k is None else ("-k", k))]
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-scale-", dir=folder) as name:
        found = list(
            large(Path(name), store, (keys, dim, classes), queries, dtype, exact_queries, options)
        )
    title = f"{keys:,} keys x {dim} {dtype}, {classes:,} classes, {queries:,} queries"
    for what, value, _ in found:
        record(title, what, [value])
    show(title, [{"measure": what, "value": value, "unit": unit} for what, value, unit in found])


if __name__ == "__main__":
    main()
