"""Compare the throughput and latency of ``retrieval-tip serve`` with those of a plain FastAPI handler.

\b
    python benchmarks/serve.py                        # features and images with 1, 8 and 64 clients
    python benchmarks/serve.py --against 2e1614f      # our servers of two versions, without the plain server
    python benchmarks/serve.py --rounds 0 --soak 600  # ten minutes of load; the index is replaced every 5 s

Our server is the real command. The plain server is what most people would write first. It does not use batches. It runs
FastAPI under uvicorn with no access log, and has a ``def`` handler in FastAPI's thread pool and a pydantic body. It
calls Index.classify once per request (and encode_images once for images), and its answers have the same fields.
Each server runs in its own process. Each client keeps a loopback connection open, sends one feature row or photo per
request, and waits for the answer before it sends the next request. Both servers answer in float32 with the settings of
the index. Before the measurement, their answers to all requests are compared: labels must be equal, and probabilities
must agree within 1e-4.

After a warm-up turn, the servers take turns. Figures are medians over the turns. "processor" is the CPU time of the
server in milliseconds per request, which is least affected by other processes. OMP_WAIT_POLICY is PASSIVE for both
servers, as in the command. Otherwise, the 40 threads of the plain server would spin, because each of them has its own
OpenMP team.

Features are synthetic (benchmarks/made.py). Images are the test part of Caltech101, and the index contains its shots,
encoded by lit-mini. The exit status is 1 if a request fails or the answers differ.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import click
import common
import numpy as np
import psutil
import uvicorn
from common import PROGRAM, SEED, TURNS, Side, against, machine, record, show, take_turns
from fastapi import Body, FastAPI, UploadFile
from made import Made, write_tables

from retrieval_tip import EncodingCache, Index, Reader, build_index, load_backbone, open_source
from retrieval_tip.backbones.base import unit
from retrieval_tip.backbones.loading import load_again
from retrieval_tip.data.cached_encoder import pixels_of
from retrieval_tip.index import changes

WHATS, KINDS = ("features", "images"), ("ours", "plain")
TOP = NEIGHBOURS = 5
DIFFERENCE = 1e-4
"""Maximum accepted difference between probabilities."""
REQUESTS = {"features": 256, "images": 64}
"""Number of different requests, which the clients send repeatedly."""
START_SECONDS, ANSWER_SECONDS = 180, 60
MIB = 1 << 20
VERSION = re.compile(rb'"version": *(\d+)')
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


# The plain handler


def plain(folder: Path, what: str, device: str, port: int) -> None:
    """Run the plain server. This function runs in a separate process."""
    cache = Index.load(folder, device=device)
    fields = (
        "label",
        "probability",
        "labels",
        "probabilities",
        "text_logit",
        "cache_logit",
        "neighbours",
        "opposing",
        "no_match",
    )
    app = FastAPI()

    def answer(names: list[str], features: np.ndarray) -> dict[str, object]:
        found = cache.classify(features, top=TOP, neighbours=NEIGHBOURS)
        results = [
            {"input": name} | {field: getattr(prediction, field) for field in fields}
            for name, prediction in zip(names, found, strict=True)
        ]
        return {"index": folder.name, "version": cache.version, "results": results, "skipped": []}

    if what == "features":

        @app.post("/v1/classify")
        def classify(features: list[list[float]] = Body(embed=True)) -> dict[str, object]:  # noqa: B008
            return answer(
                [f"row {i}" for i in range(len(features))], np.array(features, dtype=np.float32)
            )

    else:
        assert cache.backbone is not None
        backbone = load_again(cache.backbone, device=device, precision="float32")

        @app.post("/v1/classify")
        def classify_images(images: list[UploadFile]) -> dict[str, object]:
            pixels = [pixels_of(image.file.read(), backbone)[None] for image in images]
            features = np.concatenate([unit(backbone.encode_images(own)) for own in pixels])
            return answer([image.filename or "" for image in images], features)

    uvicorn.run(
        app, host="127.0.0.1", port=port, log_level="warning", access_log=False, backlog=1024
    )


# The servers, from outside


@dataclass
class Server:
    """A server that runs in a separate process."""

    port: int
    process: psutil.Process

    def processor(self) -> float:
        """Return the number of CPU seconds that the server has used."""
        found = self.process.cpu_times()
        return found.user + found.system


@contextmanager
def serving(kind: str, material: Material, device: str) -> Iterator[Server]:
    """Run the server ``ours`` or ``plain`` inside the context."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if kind == "ours":
        options = ("--port", str(port), "--device", device, "--precision", "float32")
        process = subprocess.Popen([*PROGRAM, "-q", "serve", str(material.index), *options])
    else:
        given = material.index, material.what, device, port
        process = multiprocessing.get_context("spawn").Process(target=plain, args=given)
        process.start()
    try:
        limit = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                found = psutil.Process(process.pid)
                if time.monotonic() > limit or found.status() == psutil.STATUS_ZOMBIE:
                    raise click.ClickException(f"{kind}: server did not start; see above") from None
                time.sleep(0.05)
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(30) if isinstance(process, subprocess.Popen) else process.join(30)


# The clients


@dataclass
class Load:
    """Clients of a server, and their results. If ``seconds`` is not given, they send each request once."""

    port: int
    requests: list[bytes]
    clients: int
    seconds: float | None
    taken: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    answers: dict[int, dict[str, object]] = field(default_factory=dict)

    def run(self) -> Load:
        """Run all clients until they have finished."""
        asyncio.run(self._all())
        return self

    async def _all(self) -> None:
        numbers = range(len(self.requests))
        order = iter(numbers) if self.seconds is None else itertools.cycle(numbers)
        self.begun = time.perf_counter()
        tasks = [asyncio.create_task(self._client(order)) for _ in range(self.clients)]
        _, waiting = await asyncio.wait(tasks, timeout=(self.seconds or 0) + ANSWER_SECONDS)
        for task in waiting:
            self.failures.append(f"no answer within {ANSWER_SECONDS} s")
            task.cancel()
        self.lasted = time.perf_counter() - self.begun

    async def _client(self, order: Iterator[int]) -> None:
        """Send requests over one connection, and reconnect if the connection is lost."""
        writer, seen = None, 0
        while self.seconds is None or time.perf_counter() - self.begun < self.seconds:
            number = next(order, None)
            if number is None:
                break
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", self.port, limit=MIB
                    )
                start = time.perf_counter()
                writer.write(self.requests[number])
                head = await reader.readuntil(b"\r\n\r\n")
                length = LENGTH.search(head)
                body = await reader.readexactly(int(length[1]) if length else 0)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.failures.append(f"connection lost: {error}")
                writer = None
                continue
            version = VERSION.search(body)
            if head[9:12] != b"200" or version is None or int(version[1]) < seen:
                self.failures.append(f"{head[:15]!r} after version {seen}: {body[:300]!r}")
                continue
            seen = int(version[1])
            self.versions.add(seen)
            self.taken.append(time.perf_counter() - start)
            if self.seconds is None:
                self.answers[number] = json.loads(body)["results"][0]
        if writer is not None:
            writer.close()

    def wait(self, percent: float) -> float:
        """Return a percentile of the waiting times in milliseconds."""
        return 1000 * float(np.percentile(self.taken or [0.0], percent, method="higher"))

    def check(self, what: str) -> None:
        """Raise ClickException if a request failed."""
        if self.failures or not self.taken:
            lines = "\n".join(self.failures[:5])
            raise click.ClickException(
                f"{what}: {len(self.taken)} answers, {len(self.failures)} failures\n{lines}"
            )


# The requests


@dataclass(frozen=True)
class Material:
    """An index, and the requests that are sent to it."""

    what: str
    index: Path
    requests: list[bytes]

    @classmethod
    def features(
        cls, place: Path, keys: int, dim: int, classes: int, index: str, k: int | None
    ) -> Material:
        """Make an index of synthetic features, and queries for it."""
        made, folder = Made(classes, dim, SEED), place / "made"
        write_tables(place, made, keys)
        source = open_source(place / "table.parquet")
        options = {"text": place / "text.parquet", "index": index, "k": k, "fit": "none"}
        build_index(source, folder, Reader(), device="cpu", **options)
        asked = made.draw(made.classes(REQUESTS["features"], 2), 3)
        bodies = [json.dumps({"features": [row.tolist()]}).encode() for row in asked]
        return cls(
            "features", folder, [_request("application/json", body, folder.name) for body in bodies]
        )

    @classmethod
    def images(cls, place: Path, shared: Path) -> Material:
        """Make an index of Caltech101 with lit-mini."""
        split, folder = shared / "data/caltech101/split_zhou_Caltech101.json", place / "caltech"
        backbone = load_backbone(f"local-dir:{shared / 'models/lit-mini'}")
        reader = Reader(backbone, cache=EncodingCache(EncodingCache.default_folder()), seed=1)
        template = ["a photo of a {}."]
        build_index(open_source(split), folder, reader, templates=template, device="cpu")
        paths = open_source(split, split="test").paths or ()
        chosen = [
            paths[at] for at in np.linspace(0, len(paths) - 1, REQUESTS["images"]).astype(int)
        ]
        part = b'--image\r\nContent-Disposition: form-data; name="images"; filename="photo.jpg"\r\n'
        part += b"Content-Type: application/octet-stream\r\n\r\n"
        bodies = [part + Path(path).read_bytes() + b"\r\n--image--\r\n" for path in chosen]
        return cls(
            "images",
            folder,
            [_request("multipart/form-data; boundary=image", b, folder.name) for b in bodies],
        )

    @property
    def title(self) -> str:
        """Size and settings of the index."""
        cache = Index.load(self.index, device="cpu", verify="fast")
        return (
            f"{self.what}: {cache.n:,} keys x {cache.d}, {len(cache.class_names):,} classes, {cache.index_type}, "
            f"k {cache.settings.k or 'all'}, top {TOP}, {NEIGHBOURS} neighbours"
        )


def _request(content_type: str, body: bytes, index: str) -> bytes:
    """Return the bytes of an HTTP request."""
    head = f"POST /v1/classify?index={index} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# The two measurements


def compare(
    material: Material, clients: tuple[int, ...], seconds: float, rounds: int, device: str
) -> None:
    """Measure our server, and the plain one unless versions are compared, for each number of clients."""
    what, kinds = material.what, KINDS[:1] if TURNS else KINDS
    with ExitStack() as running:
        servers = {kind: running.enter_context(serving(kind, material, device)) for kind in kinds}
        click.echo(f"\n{material.title}")
        if len(servers) > 1:
            click.echo(agreement(material, servers, max(clients)))
        lines: list[dict[str, object]] = []
        for number in clients:
            title, figures = (
                f"{what}, {number} clients",
                {kind: list[dict[str, float]]() for kind in kinds},
            )
            sides: dict[str, Side] = {
                kind: partial(turn, server, material, number, seconds, figures[kind])
                for kind, server in servers.items()
            }
            taken = take_turns(title, sides, rounds)
            for kind, turns in figures.items():
                line = {
                    "clients": number,
                    "server": kind,
                    "requests/s": 1 / statistics.median(taken[kind]),
                }
                line["ratio"] = statistics.median(
                    a / b for a, b in zip(taken[kinds[-1]], taken[kind], strict=True)
                )
                for figure in turns[0]:
                    values = [own[figure] for own in turns[1:]]  # the first turn was a warm-up
                    line[figure] = statistics.median(values)
                    record(title, f"{kind}, {figure}", values)
                lines.append(line)
        show(f"{what}, medians of {rounds} turns", lines)


def turn(
    server: Server,
    material: Material,
    clients: int,
    seconds: float,
    figures: list[dict[str, float]],
    _: int,
) -> float:
    """Send requests to a server, add its figures, and return the seconds per request."""
    before, sent = server.processor(), Load(server.port, material.requests, clients, seconds).run()
    sent.check(f"{material.what}, {clients} clients")
    processor = 1000 * (server.processor() - before) / len(sent.taken)
    figures.append({"p50, ms": sent.wait(50), "p99, ms": sent.wait(99), "processor, ms": processor})
    return sent.lasted / len(sent.taken)


def agreement(material: Material, servers: dict[str, Server], clients: int) -> str:
    """Send every request to each server, and describe how well their answers agree.

    Raises ClickException if the answers differ.
    """
    found: list[dict[int, dict[str, Any]]] = []
    for server in servers.values():
        sent = Load(server.port, material.requests, clients, None).run()
        sent.check(material.what)
        found.append(sent.answers)
    pairs = [(found[0][number], found[-1][number]) for number in range(len(material.requests))]
    difference = max(
        np.abs(np.subtract(a["probabilities"], b["probabilities"])).max() for a, b in pairs
    )
    differ = sum(a["label"] != b["label"] for a, b in pairs)
    line = f"{len(pairs)} requests: {differ} labels differ, probabilities differ by at most {difference:.1e}"
    if differ or difference > DIFFERENCE:
        raise click.ClickException(line)
    return line


def soak(material: Material, seconds: float, every: float, device: str) -> bool:
    """Send requests while the index is replaced. Return whether all requests succeeded and new versions were served."""
    apart = multiprocessing.get_context("spawn")
    ready = apart.Barrier(2)
    replacing = apart.Process(target=replace, args=(material.index, seconds, every, ready))
    with serving("ours", material, device) as server:
        sizes: list[float] = []
        watching = threading.Thread(target=watch, args=(server, seconds, sizes))
        replacing.start()
        ready.wait(START_SECONDS)
        watching.start()
        sent = Load(server.port, material.requests, 8, seconds).run()
        watching.join()
        replacing.join()
    click.echo(
        f"{len(sent.taken):,} requests, {len(sent.failures)} failures, {len(sent.versions)} versions seen"
    )
    click.echo(
        f"p50 {sent.wait(50):.1f} ms, p99 {sent.wait(99):.1f} ms, {min(sizes):.0f} to {max(sizes):.0f} MiB"
    )
    for reason in sent.failures[:5]:
        click.echo(f"  {reason}")
    return not sent.failures and len(sent.versions) > 1 and replacing.exitcode == 0


def replace(folder: Path, seconds: float, every: float, ready: Barrier) -> None:
    """Repeatedly remove, add and relabel shots, rebuild the index and build it again. Runs in a separate process."""
    table, text, reader, added = (
        folder.parent / "table.parquet",
        folder.parent / "text.parquet",
        Reader(),
        [0],
    )
    source = open_source(table)
    ready.wait()
    begun = time.monotonic()
    for number in itertools.count():
        time.sleep(max(0.0, begun + (number + 1) * every - time.monotonic()))
        if time.monotonic() - begun > seconds:
            break
        match number % 5:
            case 0:
                changes.remove(folder, where="shot = 0")
            case 1:  # the other shots of the source are skipped
                added = list(changes.add(folder, source, reader).key_ids)
            case 2:
                changes.relabel(folder, source.class_names[-1], key_ids=added[:10])
            case 3:
                changes.rebuild(folder, index="Classes" if number % 2 else "Flat")
            case 4:
                build_index(source, folder, reader, fit="none", text=text, device="cpu")
    click.echo(f"replaced {number} times")


def watch(server: Server, seconds: float, sizes: list[float]) -> None:
    """Sample the resident memory of the server in MiB twenty times."""
    for _ in range(20):
        time.sleep(seconds / 20)
        sizes.append(server.process.memory_info().rss / MIB)


@against
@click.command(help=__doc__)
@click.option(
    "--only", type=click.Choice(WHATS), multiple=True, help="Kind of requests.  [default: both]"
)
@click.option("--keys", type=click.IntRange(min=1), default=16_000, show_default=True)
@click.option("--dim", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option("--index", default="Flat", show_default=True)
@click.option(
    "-k",
    type=click.IntRange(min=1),
    help="Number of nearest keys to use per query.  [default: all]",
)
@common.shared_option
@click.option(
    "--clients",
    type=int,
    multiple=True,
    default=(1, 8, 64),
    show_default=True,
    help="Clients; repeatable.",
)
@click.option(
    "--seconds", type=float, default=1.0, show_default=True, help="Length of a turn, in seconds."
)
@click.option(
    "--rounds", default=5, show_default=True, help="Number of timed turns. Use 0 for no turns."
)
@click.option(
    "--soak",
    "soaked",
    type=float,
    metavar="SECONDS",
    help="Length of a test with replaced indexes.",
)
@click.option(
    "--every",
    type=float,
    default=5.0,
    show_default=True,
    help="Number of seconds between index versions.",
)
@common.device_option
@common.folder_option
def main(
    only: tuple[str, ...],
    keys: int,
    dim: int,
    classes: int,
    index: str,
    k: int | None,
    shared: Path,
    clients: tuple[int, ...],
    seconds: float,
    rounds: int,
    soaked: float | None,
    every: float,
    device: str,
    folder: Path,
) -> None:
    """Measure the servers, and print the results."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    click.echo(machine("fastapi", "uvicorn"))
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-serve-", dir=folder) as name:
        for what in only or WHATS:
            features = (keys, dim, classes, index, k)
            made = (
                Material.features(Path(name), *features)
                if what == "features"
                else Material.images(Path(name), shared)
            )
            if rounds:
                compare(made, clients, seconds, rounds, device)
            if soaked is not None and what == "features" and not soak(made, soaked, every, device):
                raise SystemExit(1)


if __name__ == "__main__":
    main()
