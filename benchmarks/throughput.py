"""Classification against three limits: the plain dense form, the bare affinity product, and the FAISS search alone.

All sides of a table run in one process and take turns, after a turn that warms up; figures are medians, ratios are
between sides of the same table. Features are made (benchmarks/made.py), alpha and beta are what `index build` would
set, float32 unless said.

\b
(a) the plain dense form, as published: affinity = f @ keys.T;
    cache = ((-1) * (beta - beta * affinity)).exp() @ one_hot; logits = 100 * f @ W.T + cache * alpha.
    Above 16,384 keys it runs in blocks of so many, and over 256 queries a call.
(b) the bare product f @ keys.T into memory that is there already: the limit for exact answers.
(c) the FAISS search alone (for Classes: over the means of the classes, for as many as may be met).

The section `files` runs `retrieval-tip classify` of feature tables, Parquet to Parquet, beside that of another checkout
(--against FOLDER): rows a second beyond what a few rows take, so without the start of the interpreter.

Agreement is how often the answer is that of all keys, exact in float32; accuracy stands beside it. `auto` and Classes
answer all queries in one call, the other types of index some hundred a call, another part of the queries each turn.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from made import Made
from torch import Tensor

from retrieval_tip import CacheModel, Encoder, EncodingCache, build_index, load_backbone, open_source
from retrieval_tip.backbones.base import resolve_device
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.evaluation import sweep
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.retrieval.keys import index_over
from retrieval_tip.settings import Settings

SECTIONS = ("exact", "retrieval", "real", "files")
SEED = 0
DENSE_BLOCK = 16_384
DENSE_QUERIES = (1024, 256)
"""Queries a call of the plain dense form: with one block of keys, and with more."""
EXACT_QUERIES = 1000
AT_A_TIME = 1024
"""Queries a call where the answers of all keys are computed once."""
SINGLES = 8
SMALL, MIDDLE = 20_000, 200_000
"""Keys up to which graphs and compressed codes are built too, and up to which several k are tried."""
FEW = 32
"""Rows of the command whose time is taken off."""
KS = (16, 64, 256)
CLASSES_MET = (1, 2, 4, 16)

GOALS = {
    "exact": "16,000 x 1024: float32 at least 1.9 x (a) and at most 1.15 x (b); bfloat16 at least 3 x (a)",
    "retrieval": "16,000 x 1024: 8 x (a) at 99.5 % and 5 x at 99.9 %; 160,000 x 512: 50 x at 99.7 %; "
    "1,000,000 x 512: 300 x at 99.9 %; growth at most 2 x",
    "files": "1,000,000 rows against the version of 2026-11-25: 1.5 x, with --explain 4 x",
}

Ids = npt.NDArray[np.int64]
Run = Callable[[Tensor], Tensor | None]
Row = dict[str, Any]


def installed(name: str) -> str | None:
    """Its version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def facts(device: str) -> Row:
    """The machine and what runs on it: columns of every row."""
    cpu, known = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if known.exists():
        names = [line.partition(":")[2].strip() for line in known.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    packages = ("retrieval-tip", "torch", "numpy", "faiss-gpu", "faiss-cpu")
    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{name} {found}" for name in packages if (found := installed(name))),
        "seed": SEED,
        "date": str(datetime.date.today()),
    }


def machine_line(facts: Row) -> str:
    """The same for a reader."""
    return (
        f"{facts['date']}, {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']:.0f} GiB, {facts['threads']} "
        f"threads, device {facts['device']}, load before {os.getloadavg()[0]:.2f}, Python {platform.python_version()}, "
        f"{facts['versions']}, seed {facts['seed']}"
    )


def write_rows(path: Path, rows: Sequence[Row], facts: Row, schema: pa.Schema) -> None:
    """The measured rows, each with the machine."""
    pq.write_table(pa.Table.from_pylist([row | facts for row in rows], schema=schema), path)


FACTS = [
    ("device", pa.string()),
    ("cpu", pa.string()),
    ("cores", pa.int32()),
    ("memory_gib", pa.float64()),
    ("threads", pa.int32()),
    ("versions", pa.string()),
    ("seed", pa.int32()),
    ("date", pa.string()),
]
SCHEMA = pa.schema(
    [
        ("section", pa.string()),
        ("data", pa.string()),
        ("n", pa.int64()),
        ("d", pa.int32()),
        ("c", pa.int32()),
        ("way", pa.string()),
        ("index", pa.string()),
        ("k", pa.int64()),  # null is all
        ("tail", pa.bool_()),
        ("precision", pa.string()),
        ("batch", pa.int64()),  # queries a call
        ("queries", pa.int64()),  # that agreement and accuracy are over
        ("microseconds", pa.float64()),  # a query
        ("ratio_dense", pa.float64()),  # times as fast as (a)
        ("ratio_gemm", pa.float64()),  # times as long as (b)
        ("search_share", pa.float64()),  # (c) in it
        ("ratio_against", pa.float64()),  # times as fast as the other checkout
        ("growth", pa.float64()),  # times as long as with the fewest keys
        ("agreement", pa.float64()),
        ("accuracy", pa.float64()),
        ("difference", pa.float64()),  # largest of a logit from exact float32
        *FACTS,
    ]
)


@dataclass
class Side:
    """One of those that take turns: ``run`` answers ``batch`` queries a call, ``calls`` times a turn.

    Of all queries, or of its ``own``, whose answers nobody knows.
    """

    run: Run
    batch: int
    calls: int = 1
    own: Tensor | None = None
    seconds: list[float] = field(default_factory=list)
    answers: dict[int, Tensor] = field(default_factory=dict)

    @property
    def microseconds(self) -> float:
        """Median of a query."""
        return 1e6 * statistics.median(self.seconds) / self.batch

    def right(self, expected: Tensor) -> float | None:
        """How often its answers are the expected ones, of all queries that it answered."""
        if not self.answers:
            return None
        hits = [(found == expected[at : at + len(found)]).float() for at, found in self.answers.items()]
        return float(torch.cat(hits).mean())

    @property
    def answered(self) -> int:
        """Queries that it answered."""
        return sum(map(len, self.answers.values()))


def take_turns(sides: Sequence[Side], features: Tensor, rounds: int) -> None:
    """Time the sides on the same queries; the first turn warms up, and counts only for the answers."""
    for turn in range(rounds + 1):
        for side in sides:
            queries = features if side.own is None else side.own
            starts = range(0, len(queries) - side.batch + 1, side.batch)
            for call in range(side.calls):
                at = starts[(turn * side.calls + call) % len(starts)]
                asked = queries[at : at + side.batch]
                synchronize(features)
                start = time.perf_counter()
                logits = side.run(asked)
                synchronize(features)
                if turn:
                    side.seconds.append(time.perf_counter() - start)
                if logits is not None and side.own is None:
                    side.answers[at] = logits.argmax(dim=1).cpu()


def synchronize(tensor: Tensor) -> None:
    """A GPU is waited for before the clock stops."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def dense(cache: CacheModel) -> Run:
    """(a), in blocks of keys where there are many."""
    weights, alpha, beta, c = cache.text_weights, cache.settings.alpha, cache.settings.beta, len(cache.class_names)
    keys = torch.from_numpy(cache.keys)
    keys = keys if cache.device == "cpu" else keys.to(cache.device)
    one_hot = torch.zeros(min(cache.n, DENSE_BLOCK), c, device=cache.device)
    whole = cache.n <= DENSE_BLOCK
    if whole:
        one_hot.scatter_(1, cache.class_ids[:, None], 1)

    def run(f: Tensor) -> Tensor:
        logits = cache.settings.logit_scale * f @ weights.T
        for start in range(0, cache.n, DENSE_BLOCK):
            block = keys[start : start + DENSE_BLOCK]
            ids = cache.class_ids[start : start + DENSE_BLOCK, None]
            values = one_hot[: len(block)]
            if not whole:
                values.scatter_(1, ids, 1)
            affinity = f @ block.T
            cache_logits = ((-1) * (beta - beta * affinity)).exp() @ values
            logits = logits + cache_logits * alpha
            if not whole:
                values.scatter_(1, ids, 0)
        return logits

    return run


def bare_product(cache: CacheModel, batch: int, dtype: torch.dtype) -> Run:
    """(b)."""
    keys = torch.from_numpy(cache.keys).to(cache.device, dtype)
    affinity = torch.empty(batch, cache.n, dtype=dtype, device=cache.device)

    def run(f: Tensor) -> None:
        torch.mm(f.to(dtype), keys.T, out=affinity)

    return run


def search_alone(cache: CacheModel, k: int) -> Run:
    """(c)."""
    number = max(1, round(k * present(cache) / cache.n)) if cache.index.by_class else k

    def run(f: Tensor) -> None:
        cache.index.search(f.cpu().numpy(), number)

    return run


def present(cache: CacheModel) -> int:
    """Classes that have a key."""
    return len(cache.class_ids.unique())


def answering(cache: CacheModel, k: int | None, tail: bool = True) -> Run:
    """The product, as a caller has it."""
    return lambda f: cache.logits(f, k, tail)


@dataclass(frozen=True)
class Material:
    """A cache and labelled queries, ``features`` ``[q, d]`` on the device."""

    cache: CacheModel
    features: Tensor
    ids: Tensor

    @classmethod
    def make(cls, size: tuple[int, int, int], queries: int, index: str, device: str) -> Material:
        """Made features; the cache is what ``from_features`` makes of them."""
        n, d, c = size
        made = Made(c, d, SEED)
        ids = np.arange(n) % c
        keys = made.draw(ids, 1)
        alpha, beta = untouched_settings(keys, ids)
        names = [f"class {i}" for i in range(c)]
        cache = CacheModel.from_features(
            keys, ids, names, made.text, settings=Settings(alpha=alpha, beta=beta), index=index, device=device
        )
        asked = made.classes(queries, 2)
        return cls(cache, torch.from_numpy(made.draw(asked, 3)).to(device), torch.from_numpy(asked))

    @property
    def columns(self) -> Row:
        """What every row says of it."""
        cache = self.cache
        return {"n": cache.n, "d": cache.d, "c": len(cache.class_names), "precision": "float32"}

    def with_index(self, factory: str) -> CacheModel:
        """The same keys under another index."""
        cache = self.cache
        if factory == cache.index.factory:
            return cache
        ids = cache.class_ids.cpu().numpy()
        return replace(
            cache,
            index=index_over(cache.keys, ids, len(cache.class_names), factory, cache.device),
            settings=cache.settings.override(k="all"),
        )

    def print_head(self) -> None:
        """The size and the settings."""
        cache = self.cache
        zero_shot = (self.features @ cache.text_weights.T).argmax(dim=1).cpu() == self.ids
        click.echo(
            f"{cache.n:,} keys x {cache.d}, {len(cache.class_names)} classes, {len(self.ids):,} queries, alpha "
            f"{cache.settings.alpha:.4g}, beta {cache.settings.beta:.4g}; "
            f"zero-shot {100 * float(zero_shot.float().mean()):.2f} %"
        )


def exact(size: tuple[int, int, int], queries: int, rounds: int, device: str) -> Iterator[Row]:
    """All keys."""
    material = Material.make(size, queries, "Flat", device)
    cache = material.cache
    halved = replace(cache, precision="bfloat16")
    sides = {
        ("(a) plain dense, one-hot", "float32"): Side(dense(cache), queries),
        ("(b) affinity product alone", "float32"): Side(bare_product(cache, queries, torch.float32), queries),
        ("exact", "float32"): Side(answering(cache, None), queries),
        ("exact", "bfloat16"): Side(answering(halved, None), queries),
        ("(b) affinity product alone", "bfloat16"): Side(bare_product(cache, queries, torch.bfloat16), queries),
    }
    take_turns(list(sides.values()), material.features, rounds)
    plain, bare, ours, *_ = sides.values()
    expected = ours.answers[0]
    reference = ours.run(material.features)
    click.echo(f"\nExact, k = all, medians of {rounds} turns")
    material.print_head()
    click.echo(
        f"{'way':<38}{'ms per 1000':>12}{'x as fast as (a)':>18}{'x as long as (b)':>18}{'agreement, %':>14}"
        f"{'top-1, %':>10}{'difference':>12}"
    )
    for (way, precision), side in sides.items():
        logits = side.run(material.features)
        row = material.columns | {
            "section": "exact",
            "data": "made",
            "way": way,
            "index": "Flat",
            "precision": precision,
            "batch": queries,
            "queries": queries,
            "microseconds": side.microseconds,
            "ratio_dense": plain.microseconds / side.microseconds,
            "ratio_gemm": side.microseconds / bare.microseconds,
            "agreement": side.right(expected),
            "accuracy": side.right(material.ids),
            "difference": None if logits is None else float((logits - reference).abs().max()),
        }
        click.echo(
            f"{f'{way}, {precision}':<38}{row['microseconds']:>12.1f}{row['ratio_dense']:>18.2f}"
            f"{row['ratio_gemm']:>18.2f}{percent(row['agreement']):>14}{percent(row['accuracy']):>10}"
            + ("-" if row["difference"] is None else f"{row['difference']:.2g}").rjust(12)
        )
        yield row
    click.echo(f"goals: {GOALS['exact']}")


def percent(share: float | None) -> str:
    """Of one."""
    return "-" if share is None else f"{100 * share:.2f}"


def whole_classes(n: int, c: int) -> list[int]:
    """Each k that is so many classes."""
    return sorted({max(1, round(n / c * met)) for met in CLASSES_MET if met < c})


def others(n: int, d: int, c: int, queries: int) -> Iterator[tuple[str, Sequence[int], int]]:
    """Types of index beside ``auto``: the factory, each k, and queries a call."""
    yield "Classes", whole_classes(n, c), queries
    lists = min(2 ** round(np.log2(n**0.5 / 2)), max(1, n // 40))
    batch = min(queries, 512 if n <= SMALL else 256 if n <= MIDDLE else 128)
    ks = [k for k in (KS if n <= SMALL else KS[1:] if n <= MIDDLE else KS[2:]) if k < n]
    if n <= MIDDLE:
        yield "Flat", ks, batch
    yield f"IVF{lists},Flat", ks, batch
    if n <= MIDDLE:
        yield f"IVF{lists},PQ{d // 8},RFlat", ks, batch
    if n <= SMALL:
        yield "HNSW32", ks, batch


def of_all(material: Material) -> tuple[Tensor, float]:
    """Answers of all keys to all queries, and microseconds a query."""
    side = Side(answering(material.cache, None), min(AT_A_TIME, len(material.ids)))
    answers = []
    for asked in material.features.split(side.batch):
        start = time.perf_counter()
        answers.append(side.run(asked).argmax(dim=1).cpu())
        side.seconds.append((time.perf_counter() - start) * side.batch / len(asked))
    return torch.cat(answers), side.microseconds


def retrieval(
    size: tuple[int, int, int], queries: int, large_batch: int, rounds: int, device: str, with_others: bool = True
) -> Iterator[Row]:
    """What `auto` chooses, other types of index and other k, with the tail and without."""
    material = Material.make(size, queries, "auto", device)
    n, d, c = size
    cache = material.cache
    dense_batch = min(queries, DENSE_QUERIES[n > DENSE_BLOCK])
    plain, plain_single = Side(dense(cache), dense_batch), Side(dense(cache), 1)
    ways: dict[tuple[str, str, int | None, bool | None], Side] = {
        ("(a) plain dense", "-", None, None): plain,
        ("(a) plain dense, single", "-", None, None): plain_single,
    }
    searches: dict[tuple[str, int, int], Side] = {}

    def try_all(
        way: str, of: CacheModel, k: int | None, batch: int, calls: int = 1, tails: Sequence[bool] = (True,)
    ) -> None:
        if k is None or k >= n:
            ways[way, of.index.factory, None, None] = Side(answering(of, None), batch, calls)
            return
        for tail in tails:
            ways[way, of.index.factory, k, tail] = Side(answering(of, k, tail), batch, calls)
        searches.setdefault((of.index.factory, k, batch), Side(search_alone(of, k), batch, calls))

    try_all("auto", cache, cache.settings.k, queries, tails=(True, False))
    try_all("auto, single", cache, cache.settings.k, 1, SINGLES)
    made = Made(c, d, SEED)
    many = torch.from_numpy(made.draw(made.classes(large_batch, 4), 5)).to(device)
    ways["auto, large batch", cache.index.factory, cache.settings.k, True] = Side(
        answering(cache, cache.settings.k), len(many), own=many
    )
    for factory, ks, batch in others(n, d, c, queries) if with_others else ():
        other = material.with_index(factory)
        for k in ks:
            try_all("k", other, k, batch, tails=(True, False))
    expected, exact_time = of_all(material)
    take_turns([*ways.values(), *searches.values()], material.features, rounds)
    click.echo(f"\nRetrieval, medians of {rounds} turns")
    material.print_head()
    print_columns()
    columns = material.columns | {"section": "retrieval", "data": "made"}
    yield printed(
        columns
        | {
            "way": "all",
            "index": cache.index.factory,
            "batch": min(AT_A_TIME, queries),
            "queries": queries,
            "microseconds": exact_time,
            "ratio_dense": plain.microseconds / exact_time,
            "agreement": 1.0,
            "accuracy": float((expected == material.ids).float().mean()),
        }
    )
    for (way, factory, k, tail), side in ways.items():
        found = searches.get((factory, k or n, side.batch))
        against = plain_single if side.batch == 1 else plain
        unknown = side.batch == 1 or side.own is not None
        yield printed(
            columns
            | {
                "way": way,
                "index": factory,
                "k": k,
                "tail": tail,
                "batch": side.batch,
                "queries": side.answered,
                "microseconds": side.microseconds,
                "ratio_dense": against.microseconds / side.microseconds,
                "search_share": found and found.microseconds / side.microseconds,
                "agreement": None if unknown else side.right(expected),  # of a few queries it says nothing
                "accuracy": None if unknown else side.right(material.ids),
            }
        )


def print_columns() -> None:
    """Of the tables of retrieval and of real features."""
    click.echo(
        f"{'way':<26}{'index':<22}{'k':>7}{'tail':>6}{'q a call':>10}{'us a query':>12}{'x (a)':>9}{'(c) in it':>11}"
        f"{'agreement, %':>14}{'top-1, %':>10}{'queries':>9}"
    )


def printed(row: Row) -> Row:
    """A line below :func:`print_columns`."""
    tail = {None: "-", True: "on", False: "off"}[row.get("tail")]
    share = row.get("search_share")
    click.echo(
        f"{row['way']:<26}{row['index']:<22}{row.get('k') or 'all':>7}{tail:>6}{row['batch']:>10}"
        f"{row['microseconds']:>12.1f}{row['ratio_dense']:>9.1f}{'-' if share is None else f'{share:.2f}':>11}"
        f"{percent(row['agreement']):>14}{percent(row['accuracy']):>10}{row['queries']:>9}"
    )
    return row


def growth(rows: Sequence[Row]) -> Iterator[Row]:
    """How a query of `auto` grows with the keys, all else alike."""
    by_size: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row["way"].startswith("auto") and row["tail"] is not False:
            by_size.setdefault((row["way"], row["d"], row["c"]), []).append(row)
    for (way, d, c), found in by_size.items():
        few, many = (choose(found, key=lambda row: row["n"]) for choose in (min, max))
        if few["n"] < many["n"]:
            times = many["microseconds"] / few["microseconds"]
            click.echo(
                f"growth of {way}, {d} values, {c} classes: {few['n']:,} to {many['n']:,} keys "
                f"({many['n'] / few['n']:.1f} x): {few['microseconds']:.1f} to {many['microseconds']:.1f} us a query, "
                f"{times:.2f} x"
            )
            yield many | {"section": "growth", "growth": times}


def real(data: Path, rounds: int, device: str) -> Iterator[Row]:
    """CLIP features of Food-101 and lit-mini's of Caltech101, one centre view a shot."""
    food, caltech = data / "data/clip-food9", data / "data/caltech101/split_zhou_Caltech101.json"
    model = data / "models/lit-mini"
    click.echo(f"\nReal features, medians of {rounds} turns, all queries in one call")
    with tempfile.TemporaryDirectory() as folder:
        if food.is_dir():
            train, test = (open_source(food / f"{part}.parquet") for part in ("train", "test"))
            pool = build_index(
                train, Path(folder) / "food", Encoder(), text=food / "text.parquet", fit="none", device=device
            )
            items = sweep.encode(pool, test, Encoder())
            yield from on_real("clip-food9, 16 shots", sweep.draw(pool, 16, 1), items, rounds)
            yield from on_real("clip-food9, all keys", pool, items, rounds)
        else:
            click.echo(f"clip-food9: skipped, no {food}")
        if caltech.is_file() and model.is_dir():
            try:
                backbone = load_backbone(f"local-dir:{model}")
                encoder = Encoder(backbone, cache=EncodingCache(EncodingCache.default_folder()))
                source, templates = open_source(caltech), ["a photo of a {}."]
                pool = build_index(
                    source, Path(folder) / "caltech", encoder, templates=templates, fit="none", device=device
                )
                items = sweep.encode(pool, open_source(caltech, split="test"), encoder)
            except RetrievalTipError as error:
                click.echo(f"Caltech101: skipped, {error}")
                return
            yield from on_real("Caltech101, lit-mini", pool, items, rounds)
        else:
            click.echo(f"Caltech101: skipped, no {caltech} or no {model}")


def on_real(name: str, cache: CacheModel, items: sweep.Items, rounds: int) -> Iterator[Row]:
    """One data set, each index, each k."""
    features = torch.from_numpy(items.features).to(cache.device)
    material = Material(cache, features, torch.from_numpy(items.ids))
    queries = len(features)
    plain = Side(dense(cache), queries)
    ways: dict[tuple[str, str, int | None, bool | None], Side] = {
        ("(a) plain dense", "-", None, None): plain,
        ("all", "-", None, None): Side(answering(cache, None), queries),
    }
    of_classes = sorted({*KS, *whole_classes(cache.n, len(cache.class_names))})
    for factory, ks in (("Flat", KS), ("Classes", of_classes)):
        other = material.with_index(factory)
        for k in ks:
            for tail in (True, False) if k < cache.n else ():
                ways["k", factory, k, tail] = Side(answering(other, k, tail), queries)
    take_turns(list(ways.values()), features, rounds)
    expected = ways["all", "-", None, None].answers[0]
    click.echo(f"\n{name}")
    material.print_head()
    print_columns()
    for (way, factory, k, tail), side in ways.items():
        yield printed(
            material.columns
            | {
                "section": "real",
                "data": name,
                "way": way,
                "index": factory,
                "k": k,
                "tail": tail,
                "batch": queries,
                "queries": queries,
                "microseconds": side.microseconds,
                "ratio_dense": plain.microseconds / side.microseconds,
                "agreement": side.right(expected),
                "accuracy": side.right(material.ids),
            }
        )


def files(
    size: tuple[int, int, int], queries: int, rounds: int, device: str, against: Path | None, place: Path
) -> Iterator[Row]:
    """The command on feature tables."""
    material = Material.make(size, queries, "auto", device)
    material.cache.save(place / "index")
    for name, rows in (("few", FEW), ("many", queries)):
        flat = pa.array(material.features[:rows].cpu().numpy().reshape(-1))
        columns = {"id": [f"query-{row}" for row in range(rows)]}
        columns["feature"] = pa.FixedSizeListArray.from_arrays(flat, size[1])
        pq.write_table(pa.table(columns), place / f"{name}.parquet", compression="none")

    def seconds(checkout: Path, name: str, how: Sequence[str]) -> float:
        command = [sys.executable, "-m", "retrieval_tip", "-q", "classify", place / "index", place / f"{name}.parquet"]
        command += ["--output", place / f"{checkout.name}.parquet", "--device", device, *how]
        start = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        subprocess.run(
            list(map(str, command)), check=True, cwd=place, env=environment
        )  # not here: -m looks there first
        return time.perf_counter() - start

    checkouts = {"": Path(__file__).resolve().parents[1]} | ({" (against)": against.resolve()} if against else {})
    click.echo(f"\nclassify, Parquet to Parquet, {queries:,} rows, medians of {rounds} turns")
    material.print_head()
    for how in ((), ("--explain",), ("--format", "json")):
        turns = [
            [seconds(checkout, "many", how) - seconds(checkout, "few", how) for checkout in checkouts.values()]
            for _ in range(rounds)
        ]
        for side, name in enumerate(checkouts):
            microseconds = 1e6 * statistics.median(turn[side] for turn in turns) / (queries - FEW)
            ratio = statistics.median(turn[-1] / turn[side] for turn in turns) if against else None
            way = " ".join(("classify", *how)) + name
            shown = "" if ratio is None else f"{ratio:>8.2f} x"
            click.echo(f"{way:<40}{1e6 / microseconds:>12,.0f} rows/s{shown}")
            found = {"way": way, "queries": queries, "microseconds": microseconds, "ratio_against": ratio}
            yield material.columns | {"section": "files", "data": "made", "index": material.cache.index.factory} | found
    click.echo(f"goals: {GOALS['files']}")


class Size(click.ParamType):
    """Keys x values x classes."""

    name = "NxDxC"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        try:
            n, d, c = (int(part.replace(",", "").replace("_", "")) for part in value.split("x"))
        except ValueError:
            self.fail(f"{value!r} is not keys x values x classes, such as 16000x512x1000", param, ctx)
        return n, d, c


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="A section; repeat for more.  [default: all]")
@click.option("--exact-size", type=Size(), default="16000x1024x1000", show_default=True)
@click.option(
    "--sizes",
    type=Size(),
    multiple=True,
    default=("16000x1024x1000", "16000x512x1000", "160000x512x1000", "1000000x512x1000"),
    show_default=True,
    help="Of the retrieval section; repeat for more. Other types of index run at the first of each number of keys.",
)
@click.option("--rounds", default=3, show_default=True, help="Turns that are timed; exact takes twice as many.")
@click.option("--queries", type=int, help="[default: 1000 for exact, 8192, and 4096 above 200,000 keys]")
@click.option("--large-batch", default=32768, show_default=True,
              help="Queries a call of auto once more: the more, the less often a class's keys are read.")  # fmt: skip
@click.option("--files-size", type=Size(), default="1600x64x100", show_default=True)
@click.option("--rows", default=100_000, show_default=True, help="Of the section files.")
@click.option(
    "--against", type=click.Path(path_type=Path, exists=True), help="Another checkout, for the section files."
)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Parquet file of the rows.")
def main(
    only: tuple[str, ...],
    exact_size: tuple[int, int, int],
    sizes: tuple[tuple[int, int, int], ...],
    rounds: int,
    queries: int | None,
    large_batch: int,
    files_size: tuple[int, int, int],
    rows: int,
    against: Path | None,
    data: Path,
    device: str,
    out: Path | None,
) -> None:
    """Measure, print, write."""
    torch.manual_seed(SEED)
    device = resolve_device(device)
    known = facts(device)
    click.echo(machine_line(known))
    chosen, measured = only or SECTIONS, []
    if "exact" in chosen:
        measured += exact(exact_size, queries or EXACT_QUERIES, 2 * rounds, device)
    if "retrieval" in chosen:
        seen: set[int] = set()
        for size in sizes:
            asked = queries or (8192 if size[0] <= MIDDLE else 4096)
            measured += retrieval(size, asked, large_batch, rounds, device, with_others=size[0] not in seen)
            seen.add(size[0])
        measured += growth(measured)
        click.echo(f"goals: {GOALS['retrieval']}")
    if "real" in chosen:
        measured += real(data, rounds, device)
    if "files" in chosen:
        with tempfile.TemporaryDirectory() as folder:
            measured += files(files_size, rows, rounds, device, against, Path(folder))
    if out is not None:
        write_rows(out, measured, known, SCHEMA)


if __name__ == "__main__":
    main()
