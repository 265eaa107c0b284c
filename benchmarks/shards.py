"""Keys in shards against keys in one process, on this machine: what an answer costs, and what the death of a shard.

\b
    python benchmarks/shards.py                     # 200,000 x 512 of 1000 classes, float16, 1 process and 2 shards
    python benchmarks/shards.py --shards 8 --ray-address HOST:PORT --folder /shared     # machines that share a folder

Each call answers all queries at once; the fastest of five counts. One process has all cores, shards have them
together. In the middle of the last call a shard is killed, on this machine only: it takes a start of Python and reading
a part of the keys more, and its answers have to be the same. Memory is what a shard has beyond files.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
from made import Made
from scale import GIB, class_names
from throughput import FACTS, SEED, facts, machine_line, write_rows

from retrieval_tip import CacheModel
from retrieval_tip.classifier import Classifier
from retrieval_tip.distributed.cluster import connected
from retrieval_tip.distributed.faiss_shards import sharded

WAYS: list[tuple[str, int | None, bool]] = [("k 64, tail", 64, True), ("k 64", 64, False), ("all", None, True)]
SCHEMA = pa.schema(
    [
        ("n", pa.int64()),
        ("d", pa.int32()),
        ("c", pa.int32()),
        ("queries", pa.int32()),
        ("shards", pa.int32()),
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        *FACTS,
    ]
)


def fastest(run: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest call."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def anonymous(process: int) -> float:
    """GiB of memory of a process that are no pages of files, on Linux."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / GIB


def answers(cache: Classifier, queries: np.ndarray, k: int | None, tail: bool) -> np.ndarray:
    """The class of each query."""
    found: np.ndarray = cache.logits(queries, k, tail).argmax(dim=1).numpy()
    return found


def calls(cache: Classifier, queries: np.ndarray) -> Iterator[tuple[str, float]]:
    """Seconds of a call, by how many keys it meets."""
    for name, k, tail in WAYS:
        answers(cache, queries[:64], k, tail)  # warms up
        yield name, fastest(lambda k=k, tail=tail: answers(cache, queries, k, tail))


def measure(
    folder: Path, queries: np.ndarray, shards: int, address: str | None
) -> Iterator[tuple[int, str, float, str]]:
    """The measures: how many shards (0: one process), what, and its value and unit."""
    start = time.perf_counter()
    cache = CacheModel.load(folder, device="cpu", precision="float32", verify="fast")
    yield 0, "opening", time.perf_counter() - start, "s"
    for name, seconds in calls(cache, queries):
        yield 0, name, seconds, "s"
    expected = {name: answers(cache, queries, k, tail) for name, k, tail in WAYS}
    start = time.perf_counter()
    with connected(address):
        yield shards, "starting Ray" if address is None else "joining Ray", time.perf_counter() - start, "s"
        start = time.perf_counter()
        with sharded(cache, shards) as found:
            yield shards, "opening", time.perf_counter() - start, "s"
            for name, seconds in calls(found, queries):
                yield shards, name, seconds, "s"
            for name, k, tail in WAYS:
                same = (answers(found, queries, k, tail) == expected[name]).mean()
                yield shards, f"{name}, same answers", 100 * float(same), "%"
            if address is None:
                yield shards, "memory of a shard", max(map(anonymous, found.index.processes())), "GiB"
                victim = found.index.processes()[0]
                os.kill(victim, signal.SIGSTOP)  # it has the question and does not answer, until it is gone
                threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
                start = time.perf_counter()
                same = (answers(found, queries, 64, True) == expected["k 64, tail"]).mean()
                yield shards, "k 64, tail, a shard killed", time.perf_counter() - start, "s"
                yield shards, "k 64, tail, a shard killed, same answers", 100 * float(same), "%"


@click.command(help=__doc__)
@click.option("--keys", type=click.IntRange(min=64), default=200_000, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--queries", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--shards", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--ray-address", metavar="HOST:PORT", help="Head of a Ray cluster.  [default: a Ray that is started here]"
)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=tempfile.gettempdir, help="For files.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Parquet file of the measures.")
def main(
    keys: int,
    dim: int,
    classes: int,
    queries: int,
    shards: int,
    ray_address: str | None,
    folder: Path,
    out: Path | None,
) -> None:
    """Measure, print, write."""
    known = facts("cpu")
    click.echo(machine_line(known))
    click.echo(f"{queries:,} queries, {keys:,} x {dim} keys of {classes:,} classes, float16")
    columns = {"n": keys, "d": dim, "c": classes, "queries": queries}
    rows = []
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-shards-", dir=folder) as name:
        made, place = Made(classes, dim, SEED), Path(name) / "index"
        ids = np.sort(np.arange(keys) % classes)
        CacheModel.from_features(
            made.draw(ids, 1, np.float16), ids, class_names(classes), made.text, device="cpu"
        ).save(place)
        asked = made.draw(made.classes(queries, 2), 3)
        for number, what, value, unit in measure(place, asked, shards, ray_address):
            click.echo(f"{f'{number} shards' if number else '1 process':<12}{what:<42}{value:>9.3f} {unit}")
            rows.append(columns | {"shards": number, "measure": what, "value": value, "unit": unit})
    if out is not None:
        write_rows(out, rows, known, SCHEMA)


if __name__ == "__main__":
    main()
