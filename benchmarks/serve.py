"""Compare the throughput and latency of ``retrieval-tip serve`` with those of a plain FastAPI handler.

\b
    python benchmarks/serve.py                        # features and images with 1, 8 and 64 clients, seven minutes
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path

import click
import numpy as np
import psutil
import pyarrow.parquet as pq
import uvicorn
from common import PROGRAM, SEED, SHARED, Side, against, machine, record, show, take_turns
from fastapi import Body, FastAPI, UploadFile
from made import Made, rows, write_tables

from retrieval_tip import EncodingCache, Index, Reader, build_index, load_backbone, open_source
from retrieval_tip.backbones.base import unit
from retrieval_tip.data.reader import pixels_of
from retrieval_tip.index import changes

WHATS = ("features", "images")
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
    fields = ("label", "probability", "labels", "probabilities", "text_logit", "cache_logit", "neighbours", "opposing",
              "no_match")  # fmt: skip
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
            return answer([f"row {i}" for i in range(len(features))], np.array(features, dtype=np.float32))

    else:
        assert cache.backbone is not None
        backbone = load_backbone(cache.backbone.model, cache.backbone.pretrained, device=device, precision="float32")

        @app.post("/v1/classify")
        def classify_images(images: list[UploadFile]) -> dict[str, object]:
            pixels = [pixels_of(image.file.read(), backbone)[None] for image in images]
            features = np.concatenate([unit(backbone.encode_images(own)) for own in pixels])
            return answer([image.filename or "" for image in images], features)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, backlog=1024)


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

    def memory(self) -> tuple[float, float]:
        """Return the resident memory in MiB, and its anonymous part, which the system cannot reclaim."""
        found = self.process.memory_info()
        return found.rss / MIB, (found.rss - found.shared) / MIB


@contextmanager
def serving(kind: str, folders: list[Path], what: str, device: str) -> Iterator[Server]:
    """Run the server ``ours`` or ``plain`` inside the context."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if kind == "ours":
        options = ("--port", port, "--device", device, "--precision", "float32")
        process = subprocess.Popen([*PROGRAM, "-q", "serve", *map(str, (*folders, *options))])
    else:
        process = multiprocessing.get_context("spawn").Process(target=plain, args=(folders[0], what, device, port))
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
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=MIB)
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

    def wait(self, share: float) -> float:
        """Return a quantile of the waiting times in milliseconds."""
        taken = sorted(self.taken) or [0.0]
        return 1000 * taken[min(len(taken) - 1, int(share * len(taken)))]

    def check(self, what: str) -> None:
        """Raise ClickException if a request failed."""
        if self.failures or not self.taken:
            lines = "\n".join(self.failures[:5])
            raise click.ClickException(f"{what}: {len(self.taken)} answers, {len(self.failures)} failures\n{lines}")


# The requests


@dataclass(frozen=True)
class Material:
    """An index, and the requests that are sent to it."""

    what: str
    index: Path
    requests: list[bytes]

    @classmethod
    def features(cls, place: Path, keys: int, dim: int, classes: int, index: str, k: int | None) -> Material:
        """Make an index of synthetic features, and queries for it."""
        made, folder = Made(classes, dim, SEED), place / "made"
        write_tables(place, made, keys)
        source = open_source(place / "table.parquet")
        build_index(source, folder, Reader(), text=place / "text.parquet", device="cpu", index=index, k=k)
        asked = made.draw(made.classes(REQUESTS["features"], 2), 3)
        bodies = [json.dumps({"features": [row.tolist()]}).encode() for row in asked]
        return cls("features", folder, [_request("application/json", body, folder.name) for body in bodies])

    @classmethod
    def images(cls, place: Path, shared: Path, shots: int) -> Material | None:
        """Make an index of Caltech101 with lit-mini, or return ``None`` if one of the two is not available."""
        split, folder = shared / "data/caltech101/split_zhou_Caltech101.json", place / "caltech"
        if not split.exists():
            click.echo(f"images: skipped; no such file {split}")
            return None
        backbone = load_backbone(f"local-dir:{shared / 'models/lit-mini'}")
        reader = Reader(backbone, cache=EncodingCache(EncodingCache.default_folder()), seed=1)
        template = ["a photo of a {}."]
        build_index(open_source(split), folder, reader, shots=shots, templates=template, device="cpu")
        paths = open_source(split, split="test").paths or ()
        chosen = [paths[at] for at in np.linspace(0, len(paths) - 1, REQUESTS["images"]).astype(int)]
        part = b'--image\r\nContent-Disposition: form-data; name="images"; filename="photo.jpg"\r\n'
        part += b"Content-Type: application/octet-stream\r\n\r\n"
        bodies = [part + Path(path).read_bytes() + b"\r\n--image--\r\n" for path in chosen]
        return cls("images", folder, [_request("multipart/form-data; boundary=image", b, folder.name) for b in bodies])

    @property
    def title(self) -> str:
        """Size and settings of the index."""
        cache = Index.load(self.index, device="cpu", verify="fast")
        return (
            f"{self.what}: {cache.n:,} keys x {cache.d}, {len(cache.class_names):,} classes, {cache.index.factory}, "
            f"k {cache.settings.k or 'all'}, top {TOP}, {NEIGHBOURS} neighbours"
        )


def _request(content_type: str, body: bytes, index: str) -> bytes:
    """Return the bytes of an HTTP request."""
    head = f"POST /v1/classify?index={index} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# The two measurements


def compare(material: Material, clients: tuple[int, ...], seconds: float, rounds: int, device: str) -> None:
    """Measure both servers on the same requests, for each number of clients."""
    what, folders = material.what, [material.index]
    with serving("ours", folders, what, device) as ours, serving("plain", folders, what, device) as other:
        servers = {"ours": ours, "plain": other}
        click.echo(f"\n{material.title}\n{agreement(material, servers, max(clients))}")
        lines: list[dict[str, object]] = []
        for number in clients:
            figures: dict[str, list[dict[str, float]]] = {name: [] for name in servers}

            def turn(name: str, number: int = number, figures: dict[str, list[dict[str, float]]] = figures) -> float:
                before = servers[name].processor()
                seen = Load(servers[name].port, material.requests, number, seconds).run()
                seen.check(f"{what}, {name}, {number} clients")
                processor = 1000 * (servers[name].processor() - before) / len(seen.taken)
                waits = {"p50, ms": seen.wait(0.5), "p99, ms": seen.wait(0.99)}
                figures[name].append(waits | {"processor, ms": processor})
                return seen.lasted / len(seen.taken)

            title = f"{what}, {number} clients"
            sides: dict[str, Side] = {name: lambda _, name=name, turn=turn: turn(name) for name in servers}
            taken = take_turns(title, sides, rounds)
            ratio = statistics.median(a / b for a, b in zip(taken["plain"], taken["ours"], strict=True))
            for name, turns in figures.items():
                line = {"clients": number, "server": name, "requests/s": 1 / statistics.median(taken[name])}
                line["ratio"] = ratio if name == "ours" else 1.0
                for figure in turns[0]:
                    values = [own[figure] for own in turns[1:]]  # the first turn was a warm-up
                    line[figure] = statistics.median(values)
                    record(title, f"{name}, {figure}", values)
                lines.append(line)
        show(f"{what}, medians of {rounds} turns", lines)


def agreement(material: Material, servers: dict[str, Server], clients: int) -> str:
    """Send every request to both servers, and describe how well their answers agree.

    Raises ClickException if the answers differ.
    """
    found: list[dict[int, dict[str, object]]] = []
    for name, server in servers.items():
        seen = Load(server.port, material.requests, clients, None).run()
        seen.check(f"{material.what}, {name}")
        found.append(seen.answers)
    pairs = [(found[0][number], found[1][number]) for number in range(len(material.requests))]
    difference = max(np.abs(np.subtract(a["probabilities"], b["probabilities"])).max() for a, b in pairs)
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
    with serving("ours", [material.index], material.what, device) as server:
        watching = threading.Thread(target=watch, args=(server, seconds))
        replacing.start()
        ready.wait(START_SECONDS)
        watching.start()
        seen = Load(server.port, material.requests, 8, seconds).run()
        watching.join()
        replacing.join()
    versions = sorted(seen.versions)
    click.echo(f"{len(seen.taken):,} requests, {len(seen.failures)} failures, {len(versions)} versions seen")
    click.echo(f"p50 {seen.wait(0.5):.1f} ms, p99 {seen.wait(0.99):.1f} ms")
    for reason in seen.failures[:5]:
        click.echo(f"  {reason}")
    return not seen.failures and len(versions) > 1 and replacing.exitcode == 0


def replace(folder: Path, seconds: float, every: float, ready: Barrier) -> None:
    """Repeatedly add, relabel and remove shots, rebuild the index and build it again. Runs in a separate process."""
    cache, added = Index.load(folder, device="cpu"), [0]
    table = folder.parent / "again.parquet"
    names = [cache.class_names[i] for i in cache.class_ids.tolist()]
    pq.write_table(rows(np.asarray(cache.keys), names, "again "), table)
    text, reader = folder.parent / "again-text.parquet", Reader(norms="keep")
    pq.write_table(rows(cache.text_weights.numpy(), list(cache.class_names)), text)
    source = open_source(table)
    ready.wait()
    begun = time.monotonic()
    for number in itertools.count():
        time.sleep(max(0.0, begun + (number + 1) * every - time.monotonic()))
        if time.monotonic() - begun > seconds:
            break
        match number % 5:
            case 0:
                added = list(changes.add(folder, source, reader, shots=1).key_ids)
            case 1:
                changes.relabel(folder, cache.class_names[-1], key_ids=added[:10])
            case 2:
                changes.remove(folder, key_ids=added)
            case 3:
                changes.rebuild(folder, index="Classes" if number % 2 else "Flat")
            case 4:
                build_index(source, folder, reader, fit="none", text=text, device="cpu")
    print(f"replaced {number} times")


def watch(server: Server, seconds: float) -> None:
    """Sample the memory of the server twenty times, and print the samples."""
    begun, samples = time.monotonic(), []
    for number in range(1, 21):
        time.sleep(max(0.0, begun + number * seconds / 20 - time.monotonic()))
        resident, anonymous = server.memory()
        samples.append({"seconds": round(time.monotonic() - begun), "memory, MiB": resident, "anonymous": anonymous})
    show("memory", samples)


@against
@click.command(help=__doc__)
@click.option(
    "--only",
    type=click.Choice(WHATS),
    multiple=True,
    help="Kind of requests to send. Can be repeated.  [default: both]",
)
@click.option("--keys", type=click.IntRange(min=1), default=16_000, show_default=True)
@click.option("--d", "--dim", "dim", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option("--index", default="Flat", show_default=True)
@click.option("-k", type=click.IntRange(min=1), help="Number of nearest keys to use per query.  [default: all]")
@click.option("--shared", type=click.Path(path_type=Path), default=SHARED, show_default=True)
@click.option(
    "--shots", type=click.IntRange(min=1), default=16, show_default=True, help="Number of shots per class, for images."
)
@click.option("--clients", type=int, multiple=True, default=(1, 8, 64), show_default=True, help="Clients; repeatable.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Length of a turn, in seconds.")
@click.option("--rounds", default=5, show_default=True, help="Number of timed turns. Use 0 for no turns.")
@click.option(
    "--soak",
    "soaked",
    type=float,
    metavar="SECONDS",
    help="Length of a load test during which the index is replaced, in seconds.",
)
@click.option("--every", type=float, default=5.0, show_default=True, help="Number of seconds between index versions.")
@click.option("--device", default="auto", show_default=True, help="Device to use: auto, cpu, cuda or cuda:N.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), default=tempfile.gettempdir,
              help="Folder for temporary files.")  # fmt: skip
def main(
    only: tuple[str, ...], keys: int, dim: int, classes: int, index: str, k: int | None, shared: Path, shots: int,
    clients: tuple[int, ...], seconds: float, rounds: int, soaked: float | None, every: float, device: str,
    folder: Path,
) -> None:  # fmt: skip
    """Measure both servers, and print the results."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    click.echo(machine("fastapi", "uvicorn"))
    good, chosen = True, only or WHATS
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-serve-", dir=folder) as name:
        place = Path(name)
        materials = [
            Material.features(place, keys, dim, classes, index, k) if "features" in chosen else None,
            Material.images(place, shared, shots) if "images" in chosen else None,
        ]
        for material in filter(None, materials):
            if rounds:
                compare(material, clients, seconds, rounds, device)
            if soaked is not None and material.what == "features":
                good &= soak(material, soaked, every, device)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
