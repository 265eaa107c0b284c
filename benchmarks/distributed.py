"""Both engines side by side: answers from Parquet to Parquet and their memory, images encoded, and Ray's start.

\b
    python benchmarks/distributed.py                          # 1,000,000 queries of 64 values, and the photographs
    python benchmarks/distributed.py --only classify --queries 100000
    python benchmarks/distributed.py --only encode --model ViT-B-32 --pretrained openai --images FOLDER

classify: a feature table of made queries (benchmarks/made.py) and an index of 16 keys a class; the real command writes
predictions as Parquet by each engine. Anonymous memory (not pages of files) of the command and of the processes below
it is sampled four times a second, on Linux: of the local engine the one process, of Ray's the command by itself, its
largest worker, and everything together with Ray's own processes. It is flat where it does not grow from the second
quarter of the time in which answers come to the last.

encode: the real command, without an encoding cache, on a folder of images; the start of interpreter, model and workers
is in the time, and told apart by a second run on few images.

start: until a Ray that is started here takes work, and until the first actor that holds torch answers.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import SEED, machine
from made import ROWS, Made

from retrieval_tip.data import images

MIB = 2**20
SHOTS = 16
SAMPLE_SECONDS = 0.25
FEW = 32
"""Images of the run that is taken off, for its start."""
SHARED = Path(__file__).resolve().parents[2] / "shared"
COMMAND = Path(sys.executable).with_name("retrieval-tip")

Measure = tuple[str, str, int, str, float, str]
"""Section, engine, number of items, what was measured, value, unit."""


@dataclass
class Watched:
    """A command that ran: its seconds, and anonymous memory in bytes: its own, its largest worker's, that of all."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    worker: list[int] = field(default_factory=list)
    every: list[int] = field(default_factory=list)


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes; 0 where it is gone or the system does not tell."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def watch(*command: object) -> Watched:
    """Run a command to its end, looking at its memory; its failure is ours."""
    found = Watched()
    start = time.perf_counter()
    said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with it
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=said)
    while process.poll() is None:
        try:
            below = psutil.Process(process.pid).children(recursive=True)
            workers = [anonymous(one.pid) for one in below if one.name().startswith("ray::")]
            others = sum(anonymous(one.pid) for one in below if not one.name().startswith("ray::"))
        except psutil.Error:
            continue
        own = anonymous(process.pid)
        found.times.append(time.perf_counter() - start)
        found.own.append(own)
        found.worker.append(max(workers, default=0))
        found.every.append(own + sum(workers) + others)
        time.sleep(SAMPLE_SECONDS)
    found.seconds = time.perf_counter() - start
    if process.returncode not in (0, 3):  # 3: done, but for some inputs
        said.seek(0)
        text = said.read().decode()
        said.close()
        raise click.ClickException(f"{' '.join(map(str, command))}: {process.returncode}: {text}")
    said.close()
    return found


def write_queries(path: Path, made: Made, n: int) -> None:
    """A feature table of ``n`` queries, a block at a time."""
    asked = made.classes(n, 2)
    schema = pa.schema([("id", pa.string()), ("label", pa.string()), ("feature", pa.list_(pa.float32(), made.d))])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, n, ROWS):
            ids = asked[start : start + ROWS]
            column = pa.FixedSizeListArray.from_arrays(pa.array(made.draw(ids, 3 + start).reshape(-1)), made.d)
            names = [f"query-{row}" for row in range(start, start + len(ids))]
            writer.write_table(pa.table([names, [f"class {i}" for i in ids], column], schema=schema))


def write_index(folder: Path, made: Made) -> Path:
    """An index of ``SHOTS`` keys a class, by the real command."""
    ids = np.arange(made.c * SHOTS) % made.c
    for name, rows, labels in (("keys", made.draw(ids, 1), ids), ("text", made.text, np.arange(made.c))):
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), made.d)
        names = [f"class {i}" for i in labels]
        numbers = [f"{name}-{i}" for i in range(len(names))]
        pq.write_table(pa.table({"id": numbers, "label": names, "feature": column}), folder / f"{name}.parquet")
    tables = (folder / "keys.parquet", "--text", folder / "text.parquet")
    watch(COMMAND, "-q", "index", "build", "--fit", "none", *tables, "--out", folder / "index", "--device", "cpu")
    return folder / "index"


def quarters(watched: Watched, values: list[int], engine: str, first: float) -> tuple[float, float, float]:
    """MiB of ``values``: medians in the second and the last quarter of the time in which answers come, and the peak.

    That is while there is a worker, and here from ``first`` on.
    """
    every = zip(watched.times, watched.worker, values, strict=True)
    later = [value for t, worker, value in every if (worker > 0 if engine == "ray" else t >= first)]
    second, last = later[len(later) // 4 : len(later) // 2], later[3 * len(later) // 4 :]
    both = [statistics.median(part) / MIB if part else float("nan") for part in (second, last)]
    return both[0], both[1], max(values) / MIB


def classify(folder: Path, given: dict[str, Any]) -> Iterator[Measure]:
    """Predictions of made queries from Parquet to Parquet."""
    n, made = given["queries"], Made(given["classes"], given["dim"], SEED)
    write_queries(folder / "queries.parquet", made, n)
    index = write_index(folder, made)
    asked = (COMMAND, "-q", "classify", index, folder / "queries.parquet", "--format", "parquet", "--output")
    few = folder / "few.parquet"
    write_queries(few, made, FEW)
    for engine, out, more in (
        ("local", folder / "local.parquet", ()),
        ("ray", folder / "parts", ("--engine", "ray")),
    ):
        begun = watch(COMMAND, "-q", "classify", index, few, "--format", "parquet", "--output", f"{out}-few", *more)
        found = watch(*asked, out, *more)
        parts = sorted(out.glob("part-*")) if out.is_dir() else [out]
        rows = sum(pq.ParquetFile(part).metadata.num_rows for part in parts)
        if rows != n:
            raise click.ClickException(f"{out}: {rows} rows instead of {n}")
        yield "classify", engine, n, "whole command", found.seconds, "s"
        yield "classify", engine, n, f"of it start and end: the same with {FEW} queries", begun.seconds, "s"
        yield "classify", engine, n, "rate beyond that", n / max(found.seconds - begun.seconds, 1e-9), "queries/s"
        held = [("command", found.own)] + ([("largest worker", found.worker)] if engine == "ray" else [])
        for what, values in [*held, ("all processes", found.every)]:
            second, last, peak = quarters(found, values, engine, begun.seconds / 2)
            yield "classify", engine, n, f"anonymous memory, {what}: second quarter", second, "MiB"
            yield "classify", engine, n, f"anonymous memory, {what}: last quarter", last, "MiB"
            yield "classify", engine, n, f"anonymous memory, {what}: peak", peak, "MiB"
    local, ray = pq.ParquetFile(folder / "local.parquet"), sorted((folder / "parts").glob("part-*"))
    same = agreement(local, ray)
    yield "classify", "both", n, "queries with the same label", 100 * same, "%"


def agreement(local: pq.ParquetFile, parts: list[Path]) -> float:
    """The fraction of rows in which two engines give the same label for the same input."""
    columns = ["input", "label"]
    one = local.read(columns=columns)
    other = pa.concat_tables([pq.ParquetFile(part).read(columns=columns) for part in parts])
    if not one["input"].equals(other["input"]):
        raise click.ClickException("the two engines have answered other inputs, or in another order")
    return float(np.mean(one["label"].to_numpy() == other["label"].to_numpy()))


def encode(folder: Path, given: dict[str, Any]) -> Iterator[Measure]:
    """Images to features by each engine."""
    found = [str(path) for path in images.find(given["images"])]
    number = given["number"] or len(found)
    every = (found * -(-number // len(found)))[:number]
    for name, paths in (("images", every), ("few", every[:FEW])):
        pq.write_table(pa.table({"path": paths}), folder / f"{name}.parquet")
    model = ("--model", given["model"]) + (("--pretrained", given["pretrained"]) if given["pretrained"] else ())
    for engine, suffix, more in (("local", ".parquet", ()), ("ray", "", ("--engine", "ray"))):
        seconds = [
            watch(COMMAND, "-q", "encode", folder / f"{name}.parquet", *model, "--no-cache", *more,
                  "--out", folder / f"encoded-{engine}-{name}{suffix}").seconds
            for name in ("few", "images")
        ]  # fmt: skip
        yield "encode", engine, number, "whole command", seconds[1], "s"
        yield "encode", engine, number, f"of it start and end: the same with {FEW} images", seconds[0], "s"
        beyond = (number - FEW) / max(seconds[1] - seconds[0], 1e-9)
        yield "encode", engine, number, "rate beyond that", beyond, "images/s"


def start(_: Path, given: dict[str, Any]) -> Iterator[Measure]:
    """A Ray of one's own, from nothing."""
    from retrieval_tip.distributed.cluster import connected

    def answer() -> int:
        import torch

        return torch.get_num_threads()

    begun = time.perf_counter()
    with connected() as ray:
        yield "start", "ray", 1, "until it takes work, its import included", time.perf_counter() - begun, "s"
        begun = time.perf_counter()
        ray.get(ray.remote(num_cpus=1)(answer).remote())
        yield "start", "ray", 1, "first process with torch", time.perf_counter() - begun, "s"
        begun = time.perf_counter()
    yield "start", "ray", 1, "until it has ended", time.perf_counter() - begun, "s"


SECTIONS = {"classify": classify, "encode": encode, "start": start}


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(list(SECTIONS)), multiple=True, help="Repeat for more.  [default: all]")
@click.option("--queries", type=click.IntRange(min=1), default=1_000_000, show_default=True)
@click.option("--dim", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--classes", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--images", type=click.Path(path_type=Path), default=SHARED / "data/caltech101/101_ObjectCategories",
              show_default=True)  # fmt: skip
@click.option("--number", type=click.IntRange(min=1), help="Images to encode.  [default: as many as there are]")
@click.option("--model", default=f"local-dir:{SHARED / 'models/lit-mini'}", show_default=True)
@click.option("--pretrained")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=tempfile.gettempdir, help="For files.")
def main(only: tuple[str, ...], folder: Path, **given: Any) -> None:
    """Measure and print."""
    click.echo(machine("ray"))
    for name in only or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="retrieval-tip-distributed-", dir=folder) as place:
            for section, engine, n, measure, value, unit in SECTIONS[name](Path(place), given):
                click.echo(f"{section:<9}{engine:<6}{n:>10,}  {measure:<56}{value:>12,.2f} {unit}")


if __name__ == "__main__":
    main()
