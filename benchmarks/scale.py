"""Large caches through the real command, and the memory of classifying exactly. Exit status 1 above --limit GiB.

\b
    python benchmarks/scale.py                                       # 1,000,000 x 512 of 10,000 classes, float16
    python benchmarks/scale.py --keys 10000000 --classes 100000 --folder /tmp     # 40 GB of disk
    python benchmarks/scale.py --keys 5000000 --store lance --folder /tmp         # the same in a LanceDB store
    python benchmarks/scale.py --memory                              # 50,000 queries against 16,000 keys, exact

Without --memory: makes a feature table (benchmarks/made.py) a block at a time, builds an index from it with `index
build`, opens that in a fresh process and classifies with the index's own k. Peak memory is the largest resident set of
each process as the system counts it, memory-mapped pages included; how much of it was anonymous (not pages of files,
which the system takes back when it needs them) is sampled, on Linux. With --memory: peak memory beyond keys, queries
and text weights, interpreter and libraries included.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made import ROWS, Made
from throughput import FACTS, SEED, Row, facts, machine_line, write_rows

from retrieval_tip import CacheModel
from retrieval_tip.index import places as stores
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.settings import Settings

GIB = 2**30
LOGITS = 1 << 26
"""Logits that a call answers at most: 256 MiB; a batch of more is answered in several calls."""
SINGLES = 16

LAUNCH = """
import os, sys, time
pid, anonymous = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0
while True:
    found, status, usage = os.wait4(pid, os.WNOHANG)
    if found:
        break
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = [line.split() for line in file if line.startswith("RssAnon:")]
        anonymous = max([anonymous, *(int(line[1]) for line in lines)])
    except OSError:
        pass
    time.sleep(0.02)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss, anonymous)
"""
"""A small process between: Linux counts as a child's peak also what its parent held when it started the child."""

SCHEMA = pa.schema(
    [
        ("section", pa.string()),
        ("n", pa.int64()),
        ("d", pa.int32()),
        ("c", pa.int32()),
        ("dtype", pa.string()),
        ("index", pa.string()),
        ("k", pa.int64()),
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        *FACTS,
    ]
)


@dataclass(frozen=True)
class Finished:
    """A process: what it printed, its wall-clock seconds, and its peak memory in GiB, resident and anonymous."""

    output: str
    seconds: float
    peak: float
    anonymous: float | None


def launch(*command: object) -> Finished:
    """Run a command; its failure is ours."""
    start = time.perf_counter()
    launched = [sys.executable, "-S", "-c", LAUNCH, *map(str, command)]
    output = subprocess.run(launched, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - start
    *printed, last = output.splitlines()
    status, peak, anonymous = map(int, last.split())
    if status:
        raise click.ClickException(f"{command[1]} ... failed with exit status {status}")
    resident = peak * (1 if sys.platform == "darwin" else 1024) / GIB
    return Finished("\n".join(printed), seconds, resident, anonymous * 1024 / GIB or None)


def write_tables(folder: Path, made: Made, n: int, dtype: str) -> None:
    """The keys, labels going round the classes so that none lies together, and the text weights."""
    value = pa.float16() if dtype == "float16" else pa.float32()
    schema = pa.schema([("id", pa.string()), ("label", pa.string()), ("feature", pa.list_(value, made.d))])
    names = np.array(class_names(made.c), dtype=object)

    def rows(prefix: str, start: int, ids: np.ndarray, features: np.ndarray) -> pa.Table:
        named = pa.array([f"{prefix} {start + row}" for row in range(len(ids))])
        values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1), value), made.d)
        return pa.table([named, pa.array(names[ids], pa.string()), values], schema=schema)

    with pq.ParquetWriter(folder / "table.parquet", schema, use_dictionary=["label"], compression="none") as writer:
        for start in range(0, n, ROWS):
            ids = np.arange(start, min(start + ROWS, n)) % made.c
            writer.write_table(rows("image", start, ids, made.draw(ids, 10 + start // ROWS, dtype)))
    text = made.text / np.linalg.norm(made.text, axis=1, keepdims=True)
    pq.write_table(rows("text", 0, np.arange(made.c), text.astype(dtype)), folder / "text.parquet")


def class_names(c: int) -> list[str]:
    """Names of the classes."""
    return [f"class {i:06d}" for i in range(c)]


def place_of(folder: Path, store: str) -> str:
    """Where the index is."""
    return f"lance://{folder / 'index'}" if store == "lance" else str(folder / "index")


def answer(folder: Path, store: str, exact_queries: int) -> Row:
    """In a fresh process: open the index below ``folder``, and classify its queries."""
    queries, ids = np.load(folder / "queries.npy"), np.load(folder / "ids.npy")
    start = time.perf_counter()
    cache = stores.at(place_of(folder, store)).load(device="cpu", precision="float32")
    opening = time.perf_counter() - start
    position = {name: i for i, name in enumerate(cache.class_names)}

    def seconds(features: np.ndarray) -> tuple[float, np.ndarray]:
        begun = time.perf_counter()
        found = cache.classify(features, k=cache.settings.k, tail=cache.settings.tail, neighbours=0)
        taken = time.perf_counter() - begun
        return taken, np.array([position[prediction.label] for prediction in found])

    first, _ = seconds(queries[:1])
    batch = min(len(queries), max(1, LOGITS // len(cache.class_names)))
    calls = [queries[at : at + batch] for at in range(0, len(queries), batch)]
    seconds(calls[0])  # warms up
    lasted, answers = zip(*(seconds(call) for call in calls), strict=True)
    singles = [seconds(queries[i : i + 1])[0] for i in range(min(SINGLES, len(queries)))]
    found = np.concatenate(answers)
    few = min(exact_queries, len(queries))
    start = time.perf_counter()
    expected = cache.logits(queries[:few], "all").argmax(dim=1).numpy()
    exact = time.perf_counter() - start
    return {
        "index": cache.index_type,
        "k": cache.settings.k,
        "opening": opening,
        "first": first,
        "batch": batch,
        "batched": 1e6 * sum(lasted) / len(queries),
        "single": 1e3 * statistics.median(singles),
        "exact": 1e6 * exact / few,
        "accuracy": float((found == ids).mean()),
        "exact_accuracy": float((expected == ids[:few]).mean()),
        "agreement": float((found[:few] == expected).mean()),
    }


def classify_exactly(n: int, d: int, c: int, queries: int) -> Row:
    """In a fresh process: the memory of exact answers."""
    made = Made(c, d, SEED)
    ids = np.arange(n) % c
    keys, asked = made.draw(ids, 1), made.classes(queries, 2)
    features, text = made.draw(asked, 3), made.text
    alpha, beta = untouched_settings(keys, ids)
    del made
    gc.collect()
    cache = CacheModel.from_features(
        keys, ids, class_names(c), text, settings=Settings(alpha=alpha, beta=beta), device="cpu"
    )
    start = time.perf_counter()
    found = cache.logits(features).argmax(dim=1).numpy()
    return {
        "inputs": (keys.nbytes + features.nbytes + text.nbytes) / GIB,
        "seconds": time.perf_counter() - start,
        "accuracy": float((found == asked).mean()),
    }


def large(folder: Path, given: dict[str, Any]) -> Iterator[tuple[str, float | None, str]]:
    """Make, build, answer; the measures. ``given`` learns what the index is."""
    n, d, c, dtype = (given[name] for name in ("keys", "dim", "classes", "dtype"))
    start = time.perf_counter()
    made = Made(c, d, SEED)
    write_tables(folder, made, n, dtype)
    asked = made.classes(given["queries"], 2)
    np.save(folder / "ids.npy", asked)
    np.save(folder / "queries.npy", made.draw(asked, 3))
    del made
    gc.collect()
    yield "making the table", time.perf_counter() - start, "s"
    command = Path(sys.executable).with_name("retrieval-tip")
    tables = (folder / "table.parquet", "--text", folder / "text.parquet")
    place = place_of(folder, given["store"])
    options = ("--dtype", dtype, "--index", given["index"], "--out", place, "--device", "cpu")
    met = () if given["k"] is None else ("-k", given["k"])
    build = launch(command, "-q", "index", "build", "--fit", given["fit"], *tables, *options, *met)
    table_size = (folder / "table.parquet").stat().st_size
    (folder / "table.parquet").unlink()  # so that its pages make room
    yield "building", build.seconds, "s"
    yield "building, peak resident", build.peak, "GiB"
    yield "building, of it anonymous", build.anonymous, "GiB"
    yield "feature table", table_size / GIB, "GiB"
    for part, size in sizes_of(folder / "index").items():
        yield part, size / GIB, "GiB"
    options = ("--store", given["store"], "--exact-queries", given["exact_queries"])
    process = launch(sys.executable, __file__, "--answer", folder, *options)
    found = json.loads(process.output)
    given["index"], given["k"] = found["index"], found["k"]
    yield "opening, every byte checked", found["opening"], "s"
    yield "first query after opening", 1e3 * found["first"], "ms"
    yield f"a query of a batch of {given['queries']} ({found['batch']} a call)", found["batched"], "us"
    yield "a single query", found["single"], "ms"
    yield f"a query against all keys, {given['exact_queries']} a call", found["exact"], "us"
    yield "accuracy", 100 * found["accuracy"], "%"
    yield f"accuracy with all keys, {given['exact_queries']} queries", 100 * found["exact_accuracy"], "%"
    yield "agreement with all keys, on them", 100 * found["agreement"], "%"
    yield "answering, peak resident", process.peak, "GiB"
    yield "answering, of it anonymous", process.anonymous, "GiB"


def sizes_of(index: Path) -> dict[str, int]:
    """Bytes of the files of an index, by what they are."""
    sizes: dict[str, int] = {}
    for path in sorted(path for path in index.rglob("*") if path.is_file()):
        inner = path.relative_to(index).parts
        of_table = inner[0].endswith(".lance")
        name = f"folder {inner[1]} of the table" if of_table else f"file of {path.name.partition('-')[0]}"
        if inner[0] == "data" or inner[0].endswith(".lance"):
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def exact_memory(given: dict[str, Any]) -> Iterator[tuple[str, float | None, str]]:
    """The measures of classifying exactly."""

    def classify(sizes: dict[str, int]) -> Finished:
        options = [f"--{name}={size}" for name, size in sizes.items()]
        return launch(sys.executable, __file__, "--classify-exactly", *options)

    process = classify({name: given[name] for name in ("keys", "dim", "classes", "queries")})
    few = classify({"keys": 64, "dim": 64, "classes": 8, "queries": 8})
    found = json.loads(process.output)
    yield "classifying exactly", found["seconds"], "s"
    yield "accuracy", 100 * found["accuracy"], "%"
    yield "interpreter and libraries: peak of 8 queries", few.peak, "GiB"
    yield "inputs: keys, queries, text weights", found["inputs"], "GiB"
    yield "peak resident", process.peak, "GiB"
    yield "peak resident beyond the inputs", process.peak - found["inputs"], "GiB"


DEFAULTS = {
    True: {"keys": 16_000, "dim": 1024, "classes": 1000, "queries": 50_000, "limit": 1.5},
    False: {"keys": 1_000_000, "dim": 512, "classes": 10_000, "queries": 4096, "limit": 24.0},
}
"""With ``--memory`` and without."""


def default(name: str) -> str:
    """For the help."""
    return f"[default: {DEFAULTS[False][name]:,}; with --memory {DEFAULTS[True][name]:,}]"


@click.command(help=__doc__)
@click.option("--memory", is_flag=True, help="Classify exactly, in float32, and count the memory.")
@click.option("--keys", type=click.IntRange(min=1), help=default("keys"))
@click.option("--dim", type=click.IntRange(min=1), help=default("dim"))
@click.option("--classes", type=click.IntRange(min=1), help=default("classes"))
@click.option("--queries", type=click.IntRange(min=1), help=default("queries"))
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option("--index", default="auto", show_default=True)
@click.option("--store", type=click.Choice(["folder", "lance"]), default="folder", show_default=True)
@click.option("--fit", type=click.Choice(["none", "auto"]), default="none", show_default=True)
@click.option("-k", type=click.IntRange(min=1), help="Nearest keys that a query meets.  [default: the index's]")
@click.option("--exact-queries", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=tempfile.gettempdir, help="For files.")
@click.option("--limit", type=float, help=f"GiB; more is exit status 1.  {default('limit')}")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Parquet file of the measures.")
@click.option("--answer", "to_answer", type=click.Path(path_type=Path), hidden=True)
@click.option("--classify-exactly", "to_classify", is_flag=True, hidden=True)
def main(memory: bool, folder: Path, out: Path | None, to_answer: Path | None, to_classify: bool, **given: Any) -> None:
    """Measure, print, write; the hidden options are the processes that are measured."""
    if to_answer is not None:
        click.echo(json.dumps(answer(to_answer, given["store"], given["exact_queries"])))
        return
    if to_classify:
        click.echo(json.dumps(classify_exactly(*(given[name] for name in ("keys", "dim", "classes", "queries")))))
        return
    given |= {name: value for name, value in DEFAULTS[memory].items() if given[name] is None}
    given["exact_queries"] = min(given["exact_queries"], given["queries"])
    if memory:
        given |= {"dtype": "float32", "index": "Flat", "k": None}
    known = facts("cpu")
    click.echo(machine_line(known))
    click.echo(f"{given['keys']:,} keys x {given['dim']} {given['dtype']}, {given['classes']:,} classes")
    measures = []

    def show(found: Iterator[tuple[str, float | None, str]]) -> None:
        for measure, value, unit in found:
            click.echo(f"{measure:<52}{'-' if value is None else f'{value:,.3f}':>14} {unit}")
            measures.append((measure, value, unit))

    if memory:
        show(exact_memory(given))
        checked = [value for name, value, _ in measures if name == "peak resident beyond the inputs"]
    else:
        size = np.dtype(given["dtype"]).itemsize
        need = given["keys"] * given["dim"] * (2 * size + 4)  # the table, the keys, and an index that holds them too
        if shutil.disk_usage(folder).free < need:
            raise click.ClickException(f"{folder}: {need / GIB:.1f} GiB of free space are needed")
        with tempfile.TemporaryDirectory(prefix="retrieval-tip-scale-", dir=folder) as name:
            show(large(Path(name), given))
        click.echo(f"index {given['index']}, k {given['k'] or 'all'}")
        # A store is for more than memory holds: what counts is answering. Building it maps the feature table.
        counted = "answering, peak resident" if given["store"] == "lance" else "peak resident"
        checked = [value for name, value, _ in measures if name.endswith(counted)]
    columns = {
        "section": "memory" if memory else "large",
        "n": given["keys"],
        "d": given["dim"],
        "c": given["classes"],
        "dtype": given["dtype"],
        "index": given["index"],
        "k": given["k"],
    }
    if out is not None:
        rows = [columns | dict(zip(("measure", "value", "unit"), found, strict=True)) for found in measures]
        write_rows(out, rows, known, SCHEMA)
    if max(checked) > given["limit"]:
        click.echo(f"above the limit of {given['limit']:g} GiB", err=True)
        raise SystemExit(1)
    click.echo(f"within the limit of {given['limit']:g} GiB")


if __name__ == "__main__":
    main()
