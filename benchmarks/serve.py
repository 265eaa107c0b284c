"""Requests a second and waiting times of ``retrieval-tip serve``, against a plain FastAPI handler without batching.

\b
    python benchmarks/serve.py                        # features and images at 1, 8 and 64 clients, seven minutes
    python benchmarks/serve.py --rounds 0 --bad       # what bad uploads are answered with, how soon, at what memory
    python benchmarks/serve.py --rounds 0 --soak 600  # ten minutes of load, the index replaced every 5 seconds

Ours is the real command. Plain is what one writes first: FastAPI under uvicorn without an access log, a ``def`` handler
in FastAPI's thread pool, a pydantic body, one CacheModel.classify a request (and for images one encode_images), the
same fields in the answer. Each is a process of its own, and so are the clients: connections over loopback that stay
open, each with one feature row (or one photograph) a request, and the next one once the answer is there. Both answer in
float32 with the index's own settings, and first have to agree on every request: labels, and probabilities within 1e-4.

Then they take turns, after a turn that warms up. Figures are medians over the turns, the ratio that of each turn's
rates; "processor" is what the server's process took of it, milliseconds a request, which other processes on the machine
disturb least. OMP_WAIT_POLICY is PASSIVE for both, as the command has it: in the plain one up to 40 threads have a team
of their own, and spin else.

Features are made (benchmarks/made.py), images are Caltech101's test part, for an index of its shots by lit-mini. Exit
status 1 where a request failed, answers differ, or a bad upload was not refused with 4xx within a second and --growth
MiB (the slow one has the server's time limit, and may be answered 503).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import click
import numpy as np
import psutil
import pyarrow as pa
import uvicorn
from fastapi import FastAPI, UploadFile
from made import Made
from pydantic import BaseModel
from scale import write_tables
from throughput import FACTS, SEED, Row, facts, installed, machine_line, write_rows

from retrieval_tip import CacheModel, Encoder, EncodingCache, build_index, load_backbone, open_source
from retrieval_tip.backbones.base import unit
from retrieval_tip.data.encoder import pixels_of
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.index import changes
from retrieval_tip.index.export import export_table, export_text
from retrieval_tip.predictions import Prediction
from retrieval_tip.store.writer import collect

GOAL = "at least 2 x at 64 clients for features"
WHATS = ("features", "images")
TOP = NEIGHBOURS = 5
PRECISION = "float32"
DIFFERENCE = 1e-4
"""Of probabilities, at most."""

REQUESTS = {"features": 256, "images": 64}
"""Different ones, which the clients go round."""

START_SECONDS, ANSWER_SECONDS = 180, 60
SOAK_CLIENTS = {"features": 8, "images": 1}
KEPT = 3
"""Versions of an index that is replaced; the files of those before go."""

MIB = 1 << 20
BOUNDARY = b"one-image"
SLOW_SECONDS = 2
"""The server's time limit where bad uploads are sent, and a slow one is given up."""

SCHEMA = pa.schema(
    [
        ("what", pa.string()),
        ("n", pa.int64()),
        ("d", pa.int32()),
        ("c", pa.int32()),
        ("index", pa.string()),
        ("k", pa.int64()),  # null is all
        ("clients", pa.int32()),
        ("side", pa.string()),
        ("requests", pa.int64()),
        ("requests_per_second", pa.float64()),
        ("ratio", pa.float64()),  # times as many as plain
        ("p50_ms", pa.float64()),
        ("p99_ms", pa.float64()),
        ("processor_ms", pa.float64()),  # of the server's process, a request
        *FACTS,
    ]
)


# The plain handler


class Body(BaseModel):
    """What the plain handler takes."""

    features: list[list[float]]


def plain(folder: Path, what: str, device: str) -> None:
    """In a process of its own: the server that one writes first."""
    cache = CacheModel.load(folder, device=device, precision=PRECISION)
    settings = {
        "alpha": cache.settings.alpha,
        "beta": cache.settings.beta,
        "k": cache.settings.k or "all",
        "tail": cache.settings.tail,
    }
    settings |= {"index": folder.name, "version": cache.version, "temperature": cache.settings.temperature}
    app = FastAPI()

    def classified(features: np.ndarray) -> list[Prediction]:
        return cache.classify(features, top=TOP, k=cache.settings.k, tail=cache.settings.tail, neighbours=NEIGHBOURS)

    def answer(names: Iterable[str], predictions: Iterable[Prediction]) -> dict[str, Any]:
        fields = (
            "label",
            "probability",
            "labels",
            "probabilities",
            "text_logit",
            "cache_logit",
            "neighbours",
            "opposing",
            "unlike",
        )
        results = [
            {"input": name} | {field: getattr(found, field) for field in fields}
            for name, found in zip(names, predictions, strict=True)
        ]
        return settings | {"results": results, "skipped": []}

    if what == "features":

        @app.post("/v1/classify")
        def classify(body: Body) -> dict[str, Any]:
            found = classified(np.array(body.features, dtype=np.float32))
            return answer((f"row {i}" for i in range(len(found))), found)

    else:
        assert cache.backbone is not None
        backbone = load_backbone(cache.backbone.model, cache.backbone.pretrained, device=device, precision=PRECISION)

        @app.post("/v1/classify")
        def classify_images(images: list[UploadFile]) -> dict[str, Any]:
            found = []
            for image in images:
                pixels = pixels_of(image.file.read(), backbone)
                found += classified(unit(backbone.encode_images(pixels[None])))
            return answer((image.filename or "" for image in images), found)

    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    click.echo(f"serving {what} at http://127.0.0.1:{listening.getsockname()[1]};", err=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listening])


# The clients


class Load:
    """Clients of one server, and what they have seen of it.

    They ask for so many seconds, or without ``seconds`` each request once, whose answers are kept.
    """

    def __init__(self, port: int, folder: str, clients: int, seconds: float | None) -> None:
        self.port, self.clients, self.seconds = port, clients, seconds
        self.requests = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
        numbers = range(len(self.requests))
        self._order = iter(numbers) if seconds is None else itertools.cycle(numbers)
        self.taken: list[float] = []
        self.failures: list[str] = []
        self.versions: set[int] = set()
        self.answers: dict[int, str] = {}
        self.begun = self.last = 0.0

    def next(self) -> int | None:
        """The next request, by number."""
        over = self.seconds is not None and time.perf_counter() - self.begun >= self.seconds
        return None if over else next(self._order, None)

    async def run(self) -> Row:
        """All clients at once, to the end: what they have seen."""
        self.begun = self.last = time.perf_counter()
        tasks = [asyncio.create_task(self._client()) for _ in range(self.clients)]
        _, waiting = await asyncio.wait(tasks, timeout=(self.seconds or 0) + ANSWER_SECONDS)
        for task in waiting:
            self.failures.append(f"no answer within {ANSWER_SECONDS} s")
            task.cancel()
        taken = sorted(self.taken) or [0.0]
        return {
            "requests": len(self.taken),
            "seconds": self.last - self.begun,
            "p50_ms": 1000 * taken[len(taken) // 2],
            "p99_ms": 1000 * taken[-(-99 * len(taken) // 100) - 1],
            "failures": len(self.failures),
            "reasons": self.failures[:5],
            "versions": sorted(self.versions),
            "answers": self.answers,
        }

    async def _client(self) -> None:
        """Connect again where the connection was lost."""
        loop = asyncio.get_running_loop()
        while (number := self.next()) is not None:
            try:
                done: asyncio.Future[None] = loop.create_future()
                await loop.create_connection(lambda at=number, end=done: Client(self, at, end), "127.0.0.1", self.port)
                await done
            except OSError as error:
                self.failures.append(f"cannot connect: {error}")
                await asyncio.sleep(0.05)


class Client(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
    VERSION = re.compile(rb'"version": *(\d+)')

    def __init__(self, load: Load, number: int, done: asyncio.Future[None]) -> None:
        self._load, self._number, self._done = load, number, done
        self._seen, self._size = b"", 0
        self._version = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # for TCP it is one
        self._transport = transport
        self._ask(self._number)

    def _ask(self, number: int | None) -> None:
        self._number = number
        if number is None:
            self._transport.close()
            return
        self._seen, self._size = b"", 0
        self._begun = time.perf_counter()
        self._transport.write(self._load.requests[number])

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if not self._size:
            head = self._seen.find(b"\r\n\r\n")
            if head < 0:
                return
            length = self.LENGTH.search(self._seen, 0, head)
            self._size = head + 4 + (int(length[1]) if length else 0)
        if len(self._seen) >= self._size:
            self._answered()

    def _answered(self) -> None:
        load, now = self._load, time.perf_counter()
        load.last = now
        body = self._seen[self._seen.find(b"\r\n\r\n") + 4 :]
        version = self.VERSION.search(body)
        if self._seen[9:12] != b"200" or version is None:
            load.failures.append(f"{self._seen[:12]!r} {body[:300]!r}")
        elif int(version[1]) < self._version:
            load.failures.append(f"version {int(version[1])} after version {self._version}")
        else:
            self._version = int(version[1])
            load.versions.add(self._version)
            load.taken.append(now - self._begun)
            if load.seconds is None and self._number is not None:
                load.answers[self._number] = body.decode()
        self._ask(load.next())

    def connection_lost(self, error: Exception | None) -> None:
        if self._number is not None:
            self._load.failures.append(f"the connection was lost: {error or 'closed'}")
        if not self._done.done():
            self._done.set_result(None)


def clients() -> None:
    """In a process of its own: the loads that come as lines of JSON, those of a line at once."""
    try:
        import uvloop
    except ImportError:  # not on Windows
        new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    else:
        new_loop = uvloop.new_event_loop

    async def together(loads: list[Load]) -> list[Row]:
        return await asyncio.gather(*(load.run() for load in loads))

    gc.freeze()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        for line in sys.stdin:
            print(json.dumps(runner.run(together([Load(**given) for given in json.loads(line)]))), flush=True)


# What replaces an index


class Replaced:
    """One index, whose next version each call of :meth:`next` makes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._cache = folder, CacheModel.load(folder, device="cpu", precision=PRECISION)
        self._table, self._text = (folder.parent / f"{folder.name}-{what}.parquet" for what in ("keys", "text"))
        export_table(self._cache, self._table)
        export_text(self._cache, self._text)
        self._added: list[int] = []
        self._types = itertools.cycle(("Classes", "Flat"))
        self._kinds = itertools.cycle((self._add, self._relabel, self._remove, self._rebuild, self._build))

    def next(self) -> str:
        """Make it; what it is."""
        kind = next(self._kinds)
        kind()
        collect(self._folder, KEPT)
        return kind.__name__[1:]

    def _add(self) -> None:
        self._added = changes.add(self._folder, open_source(self._table), Encoder(norms="keep"), shots=1).key_ids

    def _relabel(self) -> None:
        changes.relabel(self._folder, self._cache.class_names[-1], key_ids=self._added[:10])

    def _remove(self) -> None:
        changes.remove(self._folder, key_ids=self._added)

    def _rebuild(self) -> None:
        changes.rebuild(self._folder, index=next(self._types))

    def _build(self) -> None:
        cache = self._cache
        settings = {
            "alpha": cache.settings.alpha,
            "beta": cache.settings.beta,
            "k": cache.settings.k,
            "logit_scale": cache.settings.logit_scale,
        }
        settings |= {"index": cache.index.factory, "text": self._text, "device": "cpu"}
        build_index(open_source(self._table), self._folder, Encoder(norms="keep"), fit="none", **settings)


def replace(folders: Sequence[Path], seconds: float, every: float) -> None:
    """In a process of its own: replace indexes for so long, all of them each time; prints what was done."""
    indexes = [Replaced(folder) for folder in folders]
    print("ready", flush=True)
    sys.stdin.readline()
    begun, done = time.monotonic(), []
    for number in range(1, int(seconds / every) + 1):
        time.sleep(max(0.0, begun + number * every - time.monotonic()))
        if time.monotonic() - begun > seconds:
            break
        kinds = [index.next() for index in indexes]
        done.append(kinds[0])
    print(json.dumps(done), flush=True)


# The processes, from outside


class Process:
    """One that runs beside this one; it is ended at the end of the block."""

    def __init__(self, log: Path, *command: object) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            )

    @classmethod
    def of_own(cls, log: Path, kind: str, *given: object) -> Self:
        """One of this file."""
        return cls(log, __file__, "--process", json.dumps([kind, *given], default=str))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, what: object) -> Any:
        """Send a line of JSON; the one that comes back."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._failed()
        return json.loads(self.line())

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() or self._failed()

    def _failed(self) -> NoReturn:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        raise click.ClickException(f"{self.log.stem} failed:\n{self.log.read_text()}")


class Server(Process):
    """One that says where it serves."""

    @classmethod
    def of_ours(cls, log: Path, folders: Sequence[Path], device: str, *options: object) -> Self:
        """The real command."""
        return cls(
            log, "-m", "retrieval_tip", "serve", *folders, "--port", 0, "--device", device, "--precision", PRECISION,
            *options,
        )  # fmt: skip

    @cached_property
    def port(self) -> int:
        """Where it listens, once it does."""
        limit = time.monotonic() + START_SECONDS
        while (found := re.search(r"serving .* at http://127\.0\.0\.1:(\d+);", self.log.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > limit:
                self._failed()
            time.sleep(0.02)
        return int(found[1])

    @property
    def said(self) -> list[str]:
        """What it logged beside where it is."""
        return [line for line in self.log.read_text().splitlines() if not line.startswith("serving ")]

    def processor(self) -> float:
        """Processor seconds so far."""
        found = psutil.Process(self.process.pid).cpu_times()
        return found.user + found.system

    def memory(self) -> tuple[float, float]:
        """Resident MiB, and of these anonymous ones: not of files, which the system can take back."""
        found = psutil.Process(self.process.pid).memory_info()
        return found.rss / MIB, (found.rss - getattr(found, "shared", 0)) / MIB


# What is asked


def request(content_type: str, body: bytes, target: str) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def of_feature(row: np.ndarray, target: str) -> bytes:
    """A feature as JSON, as Python writes it."""
    return request("application/json", json.dumps({"features": [row.tolist()]}).encode(), target)


def of_image(data: bytes, target: str) -> bytes:
    """An image as a form."""
    return request(f"multipart/form-data; boundary={BOUNDARY.decode()}", form(data, "photograph.jpg"), target)


def form(data: bytes, name: str) -> bytes:
    """The body of it."""
    part = b'--%s\r\nContent-Disposition: form-data; name="images"; filename="%s"\r\n' % (BOUNDARY, name.encode())
    return part + b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--%s--\r\n" % BOUNDARY


@dataclass
class Material:
    """An index, and a folder with a file a request."""

    what: str
    index: Path
    requests: Path

    @classmethod
    def features(cls, place: Path, given: Row) -> Material:
        """Made ones."""
        c, found = given["classes"], cls("features", place / "made", place / "features")
        made = Made(c, given["dim"], SEED)
        write_tables(place, made, given["keys"], "float32")
        source, settings = open_source(place / "table.parquet"), {"index": given["index"], "k": given["k"]}
        build_index(source, found.index, Encoder(), text=place / "text.parquet", device="cpu", **settings)
        (place / "table.parquet").unlink()
        rows = made.draw(made.classes(REQUESTS["features"], 2), 3)
        found.write(of_feature(row, found.target) for row in rows)
        return found

    @classmethod
    def images(cls, place: Path, shared: Path, shots: int) -> Material | None:
        """Caltech101 by lit-mini; ``None``, which is said, where they are not there."""
        split, model = shared / "data/caltech101/split_zhou_Caltech101.json", shared / "models/lit-mini"
        if missing := [path for path in (split, model) if not path.exists()]:
            click.echo(f"images: skipped, no {missing[0]}")
            return None
        found = cls("images", place / "caltech", place / "images")
        try:
            encoder = Encoder(
                load_backbone(f"local-dir:{model}"), cache=EncodingCache(EncodingCache.default_folder()), seed=1
            )
            build_index(
                open_source(split), found.index, encoder, shots=shots, templates=["a photo of a {}."], device="cpu"
            )
            paths = open_source(split, split="test").paths
        except RetrievalTipError as error:
            click.echo(f"images: skipped, {error}")
            return None
        assert paths is not None
        chosen = [paths[at] for at in np.linspace(0, len(paths) - 1, REQUESTS["images"]).astype(int)]
        found.write(of_image(Path(path).read_bytes(), found.target) for path in chosen)
        return found

    @property
    def target(self) -> str:
        """What is asked."""
        return f"/v1/classify?index={self.index.name}"

    def write(self, requests: Iterable[bytes]) -> None:
        """A file each."""
        self.requests.mkdir()
        for number, one in enumerate(requests):
            (self.requests / f"{number:04}").write_bytes(one)

    def first(self) -> bytes:
        """A request that is well-formed."""
        return (self.requests / "0000").read_bytes()

    def load(self, server: Server, clients: int, seconds: float | None) -> Row:
        """What clients are to do."""
        return {"port": server.port, "folder": str(self.requests), "clients": clients, "seconds": seconds}

    @cached_property
    def columns(self) -> Row:
        """What every row says of it."""
        cache = CacheModel.load(self.index, device="cpu", verify="fast")
        c = len(cache.class_names)
        return {
            "what": self.what,
            "n": cache.n,
            "d": cache.d,
            "c": c,
            "index": cache.index.factory,
            "k": cache.settings.k,
        }


# The three measurements


@dataclass
class Side:
    """One of the two servers, at one number of clients."""

    server: Server
    turns: list[Row] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Requests a second, of each turn."""
        return [turn["requests"] / turn["seconds"] for turn in self.turns]

    def median(self, name: str) -> float:
        """Over the turns."""
        return statistics.median(turn[name] for turn in self.turns)


def compare(material: Material, place: Path, asking: Process, given: Row) -> Iterator[Row]:
    """Both servers on the same requests, at each number of clients."""
    what, device = material.what, given["device"]
    with (
        Server.of_ours(place / f"ours, {what}", [material.index], device) as ours,
        Server.of_own(place / f"plain, {what}", "plain", material.index, what, device) as plain,
    ):
        servers = {"ours": ours, "plain": plain}
        print_head(material)
        click.echo(agreement(material, servers, asking, max(given["clients"])))
        print_columns()
        for number in given["clients"]:
            sides = {name: Side(server) for name, server in servers.items()}
            for turn in range(given["rounds"] + 1):
                for name, side in sides.items():
                    before = side.server.processor()
                    (seen,) = asking.ask([material.load(side.server, number, given["seconds"])])
                    check(f"{what}, {name}, {number} clients", seen)
                    if turn:
                        seconds = side.server.processor() - before
                        side.turns.append(seen | {"processor_ms": 1000 * seconds / seen["requests"]})
            pairs = zip(sides["ours"].rates(), sides["plain"].rates(), strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            print_row(what, number, sides["ours"], sides["plain"], ratio)
            for name, side in sides.items():
                yield material.columns | {
                    "clients": number,
                    "side": name,
                    "requests": sum(turn["requests"] for turn in side.turns),
                    "requests_per_second": statistics.median(side.rates()),
                    "ratio": ratio if name == "ours" else 1.0,
                    "p50_ms": side.median("p50_ms"),
                    "p99_ms": side.median("p99_ms"),
                    "processor_ms": side.median("processor_ms"),
                }


def check(what: str, seen: Row) -> None:
    """A load without a failure."""
    if seen["failures"] or not seen["requests"]:
        lines = "\n".join(seen["reasons"])
        raise click.ClickException(f"{what}: {seen['requests']} answers, {seen['failures']} failures\n{lines}")


def agreement(material: Material, servers: dict[str, Server], asking: Process, clients: int) -> str:
    """Ask both every request; a line that says that they agree."""
    results: dict[str, list[Row]] = {}
    for name, server in servers.items():
        (seen,) = asking.ask([material.load(server, clients, None)])
        check(f"{material.what}, {name}", seen)
        answers = [json.loads(seen["answers"][str(number)]) for number in range(REQUESTS[material.what])]
        results[name] = [answer["results"][0] for answer in answers]
    ours, plain = results["ours"], results["plain"]
    pairs = list(zip(ours, plain, strict=True))
    difference = max(np.abs(np.subtract(a["probabilities"], b["probabilities"])).max() for a, b in pairs)
    differ = sum(a["label"] != b["label"] or a.keys() != b.keys() for a, b in pairs)
    line = f"{material.what}: {len(pairs)} requests, {differ} answers differ, probabilities by {difference:.1e} at most"
    if differ or difference > DIFFERENCE:
        raise click.ClickException(line)
    return line


def print_head(material: Material) -> None:
    """The size and the settings."""
    columns = material.columns
    click.echo(
        f"\n{material.what}: {columns['n']:,} keys x {columns['d']}, {columns['c']:,} classes, {columns['index']}, "
        f"k {columns['k'] or 'all'}, top {TOP}, {NEIGHBOURS} neighbours"
    )


def print_columns() -> None:
    """Of the table."""
    click.echo(
        f"{'what':<10}{'clients':>8}{'requests/s':>12}{'plain':>10}{'ratio':>8}{'p50, ms':>10}{'plain':>10}"
        f"{'p99, ms':>10}{'plain':>10}{'processor':>11}{'plain':>8}"
    )


def print_row(what: str, number: int, ours: Side, plain: Side, ratio: float) -> None:
    """A row of it."""
    rates = (statistics.median(side.rates()) for side in (ours, plain))
    waits = (side.median(name) for name in ("p50_ms", "p99_ms") for side in (ours, plain))
    processor = f"{ours.median('processor_ms'):>11.2f}{plain.median('processor_ms'):>8.2f}"
    columns = "".join(f"{value:>{width}.1f}" for value, width in zip(rates, (12, 10), strict=True))
    click.echo(f"{what:<10}{number:>8}{columns}{ratio:>8.2f}{''.join(f'{value:>10.2f}' for value in waits)}{processor}")


@dataclass(frozen=True)
class Bad:
    """An upload that is to be refused: its parts, with which ``statuses``, within so many seconds."""

    name: str
    parts: Callable[[], Iterable[bytes]]
    statuses: range = range(400, 500)
    seconds: float = 1.0


def bad_uploads(photograph: bytes) -> list[Bad]:
    """All of them, for a server that answers within :data:`SLOW_SECONDS`."""

    def whole(data: bytes) -> Callable[[], list[bytes]]:
        return lambda: [of_image(data, "/v1/classify")]

    def large(header: str, framed: Callable[[bytes], bytes]) -> Callable[[], Iterator[bytes]]:
        head = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\n{header}\r\n\r\n"
        start, end = form(b"|", "large.jpg").split(b"|")
        middle = itertools.repeat(framed(bytes(1_000_000)), 200)
        return lambda: itertools.chain([head.encode(), framed(start)], middle, [framed(end), framed(b"")])

    def slow() -> Iterator[bytes]:
        yield b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        yield b"Content-Length: 1000\r\n\r\n"
        for _ in range(1000):
            yield b" "
            time.sleep(0.1)

    length = 200_000_000 + len(form(b"", "large.jpg"))
    return [
        Bad("a text file", whole(b"these are words\n" * 1000)),
        Bad("a truncated JPEG", whole(photograph[: len(photograph) // 3])),
        Bad("a PNG of 30,000 x 30,000", whole(png(30_000, 30_000))),
        Bad("200 MB, said before", large(f"Content-Length: {length}", lambda data: data)),
        Bad("200 MB, not said", large("Transfer-Encoding: chunked", chunk)),
        Bad("a slow one", slow, range(400, 504), SLOW_SECONDS + 1.0),
    ]


def chunk(data: bytes) -> bytes:
    """Of a body whose length is not said."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def png(width: int, height: int) -> bytes:
    """A file of a few kilobytes that claims a size; its rows are black, as far as they go."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(5_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


def upload(port: int, parts: Iterable[bytes]) -> tuple[int, float]:
    """Status (0: none came) and seconds until it; what is left is sent on, as far as the server takes it."""
    status = b""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        answered = threading.Event()

        def send() -> None:
            with suppress(OSError):
                for part in parts:
                    connection.sendall(part)
                    if answered.is_set() and len(part) < MIB // 2:  # a slow one
                        return

        sender = threading.Thread(target=send)
        begun = time.perf_counter()
        sender.start()
        with suppress(OSError):
            status = connection.recv(65536)[9:12]
        seconds = time.perf_counter() - begun
        answered.set()
        sender.join(10)
        return int(status or 0), seconds


@contextmanager
def most_memory(server: Server) -> Iterator[list[float]]:
    """The most resident MiB during the block, and those before it."""
    before, over = server.memory()[0], threading.Event()
    seen = [before, before]

    def look() -> None:
        while not over.wait(0.002):
            seen[1] = max(seen[1], server.memory()[0])

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def refuse(material: Material, place: Path, given: Row) -> bool:
    """Bad uploads, one after the other: whether all were refused as they should be."""
    photograph = material.first().split(b"\r\n\r\n", 2)[2].rpartition(b"\r\n--")[0]
    good = True
    print_head(material)
    options = ("--timeout", SLOW_SECONDS)
    with Server.of_ours(place / "ours, bad uploads", [material.index], given["device"], *options) as server:
        upload(server.port, [material.first()])
        click.echo(f"{'bad upload':<28}{'status':>8}{'seconds':>10}{'memory, MiB':>14}{'growth':>10}")
        for bad in bad_uploads(photograph):
            with most_memory(server) as memory:
                status, seconds = upload(server.port, bad.parts())
            before, most = memory
            right = status in bad.statuses and seconds <= bad.seconds and most - before <= given["growth"]
            mark = "" if right else "  not as it should be"
            click.echo(f"{bad.name:<28}{status:>8}{seconds:>10.3f}{most:>14.0f}{most - before:>10.1f}{mark}")
            good &= right
        status, seconds = upload(server.port, [material.first()])
        click.echo(f"{'then a photograph':<28}{status:>8}{seconds:>10.3f}{server.memory()[0]:>14.0f}")
    return good and status == 200


def soak(materials: Sequence[Material], place: Path, asking: Process, given: Row) -> bool:
    """Load while the indexes are replaced: whether no request failed, and new versions were served."""
    seconds, folders = given["soak"], [material.index for material in materials]
    for material in materials:
        print_head(material)
    with (
        Server.of_ours(place / "ours, soaked", folders, given["device"]) as server,
        Process.of_own(place / "replacing", "replace", folders, seconds, given["every"]) as replacing,
        ThreadPoolExecutor(2) as pool,
    ):
        loads = [material.load(server, SOAK_CLIENTS[material.what], seconds) for material in materials]
        replacing.line()
        begun, samples, shown = time.monotonic(), [], 0
        answering, replaced = pool.submit(asking.ask, loads), pool.submit(replacing.ask, "begin")
        click.echo(f"{'seconds':<10}{'memory, MiB':>14}{'anonymous':>14}")
        while not answering.done():
            samples.append((time.monotonic() - begun, *server.memory()))
            if samples[-1][0] >= shown * given["sample"]:
                click.echo(f"{samples[-1][0]:<10.0f}{samples[-1][1]:>14.1f}{samples[-1][2]:>14.1f}")
                shown += 1
            time.sleep(min(1.0, seconds / 20))
        done = replaced.result()
        said = server.said
    good = True
    for material, seen in zip(materials, answering.result(), strict=True):
        click.echo(
            f"{material.what}: {seen['requests']:,} requests, {seen['failures']} failures, "
            f"{len(seen['versions'])} versions seen ({min(seen['versions'], default=0)} to "
            f"{max(seen['versions'], default=0)}), "
            f"p50 {seen['p50_ms']:.1f} ms, p99 {seen['p99_ms']:.1f} ms"
        )
        good &= not seen["failures"] and len(seen["versions"]) > (len(done) > 1)
        for reason in seen["reasons"]:
            click.echo(f"  {reason}")
    kinds = ", ".join(f"{done.count(kind)} {kind}" for kind in dict.fromkeys(done))
    click.echo(f"replaced {len(done)} times: {kinds}")
    warm = seconds / 4
    late = np.array([sample for sample in samples if sample[0] >= warm] or samples[-1:])
    slopes = [float(np.polyfit(late[:, 0], late[:, i], 1)[0]) * 60 if len(late) > 2 else 0.0 for i in (1, 2)]
    lowest, highest = late[:, 1].min(), late[:, 1].max()
    click.echo(
        f"memory after {warm:.0f} s: {lowest:.0f} to {highest:.0f} MiB, slope {slopes[0]:+.2f} MiB a minute, of the "
        f"anonymous {slopes[1]:+.2f}"
    )
    for line in said:
        click.echo(f"the server said: {line}")
    return good


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(WHATS), multiple=True, help="Repeat for more.  [default: both]")
@click.option("--keys", type=click.IntRange(min=1), default=16_000, show_default=True)
@click.option("--d", "--dim", "dim", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option("--index", default="Flat", show_default=True)
@click.option("-k", type=click.IntRange(min=1), help="Nearest keys that a feature meets.  [default: all]")
@click.option("--shared", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--shots", type=click.IntRange(min=1), default=16, show_default=True, help="Of the index for images.")
@click.option("--clients", type=click.IntRange(min=1), multiple=True, default=(1, 8, 64), show_default=True,
              help="Repeat for more.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0.05), default=5.0, show_default=True, help="Of a turn.")
@click.option("--rounds", type=click.IntRange(min=0), default=5, show_default=True,
              help="Turns that are timed; 0: no timings.")  # fmt: skip
@click.option("--bad", is_flag=True, help="Bad uploads, too, where there are images.")
@click.option("--growth", type=float, default=64.0, show_default=True, help="MiB that a bad upload may take.")
@click.option("--soak", type=click.FloatRange(min=1), metavar="SECONDS", help="Load while the index is replaced, too.")
@click.option("--every", type=click.FloatRange(min=0.1), default=5.0, show_default=True, metavar="SECONDS",
              help="Between two versions.")  # fmt: skip
@click.option("--sample", type=click.FloatRange(min=0.1), default=30.0, show_default=True, metavar="SECONDS",
              help="Between two lines of memory.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=tempfile.gettempdir, help="For files.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Parquet file of the timings.")
@click.option("--process", hidden=True)
def main(process: str | None, folder: Path, out: Path | None, **given: Any) -> None:
    """Measure, print, write; the hidden option is the processes that take part."""
    if process is not None:
        kind, *arguments = json.loads(process)
        if kind == "plain":
            plain(Path(arguments[0]), *arguments[1:])
        elif kind == "replace":
            replace([Path(path) for path in arguments[0]], *arguments[1:])
        else:
            clients()
        return
    known = facts("cpu")
    known["versions"] += "".join(f", {name} {installed(name)}" for name in ("fastapi", "uvicorn"))
    known["device"] = given["device"]
    click.echo(machine_line(known))
    chosen, rows, good = given["only"] or WHATS, [], True
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retrieval-tip-serve-", dir=folder)))
        asking = stack.enter_context(Process.of_own(place / "clients", "clients"))
        found = [
            Material.features(place, given) if "features" in chosen else None,
            Material.images(place, given["shared"], given["shots"]) if "images" in chosen else None,
        ]
        materials = [material for material in found if material is not None]
        if given["rounds"]:
            for material in materials:
                rows += compare(material, place, asking, given)
            click.echo(f"goal: {GOAL}")
        if given["bad"]:
            good &= all(refuse(material, place, given) for material in materials if material.what == "images")
        if given["soak"] is not None and materials:
            good &= soak(materials, place, asking, given)
    if out is not None:
        write_rows(out, rows, known, SCHEMA)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
