"""The benchmark of the server at a toy size: its table, load while the index is replaced, and what counts as failed."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

pytestmark = pytest.mark.soak

SCRIPT = ROOT / "benchmarks" / "serve.py"
ANSWER = b'{"version":%d,"results":[]}'


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmarks_serve", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(SCRIPT.parent))


def test_both_servers_are_timed_and_none_fails_while_the_index_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    sizes = "--only features --keys 400 --classes 20 --d 32 --clients 1 --clients 4 --seconds 0.3 --rounds 1"
    soak = "--soak 3 --every 0.6 --sample 1"
    command = [sys.executable, SCRIPT, *sizes.split(), *soak.split(), "--folder", tmp_path, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    printed = result.stdout

    assert "fastapi" in printed.splitlines()[0]
    assert "features: 400 keys x 32, 20 classes, Flat, k all, top 5, 5 neighbours" in printed
    assert re.search(r"features: 256 requests, 0 answers differ, probabilities by \S+ at most", printed)
    table = [line.split() for line in printed.splitlines() if re.match(r"features +\d", line)]
    assert [(row[1], len(row)) for row in table] == [("1", 11), ("4", 11)]
    assert all(float(number) > 0 for row in table for number in row[1:])
    rows = pq.read_table(out).to_pylist()
    assert [(row["clients"], row["side"]) for row in rows] == [(1, "ours"), (1, "plain"), (4, "ours"), (4, "plain")]
    assert {(row["what"], row["n"], row["d"], row["c"], row["index"], row["k"]) for row in rows} == {
        ("features", 400, 32, 20, "Flat", None)
    }
    assert all(row["requests"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0 for row in rows)

    soaked = re.search(r"features: [\d,]+ requests, 0 failures, (\d+) versions seen \(1 to (\d+)\)", printed)
    assert soaked is not None, printed
    assert int(soaked[1]) >= 2
    replaced = re.search(r"replaced (\d) times: 1 add, 1 relabel, 1 remove, 1 rebuild", printed)
    assert replaced is not None, printed
    assert int(soaked[2]) <= 1 + int(replaced[1])
    assert re.search(r"memory after 1 s: \d+ to \d+ MiB, slope [+-][\d.]+ MiB a minute", printed)
    assert "the server said" not in printed
    assert [path for path in tmp_path.iterdir() if path != out] == []


class Answering(socketserver.BaseRequestHandler):
    """Answers each connection with the next status of its server's, and drops what is sent."""

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(answer(b"%d -" % self.server.statuses.pop(0), 1))
        while self.request.recv(1 << 20):
            pass


@pytest.mark.parametrize("third", [422, 200])
def test_what_bad_uploads_are_answered_with_is_shown_and_judged(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, third: int
) -> None:
    statuses = [422, 422, third, 413, 413, 503, 200]
    material = benchmark.Material("images", tmp_path / "things", tmp_path / "requests")
    material.columns = {"n": 1, "d": 1, "c": 1, "index": "Flat", "k": None}
    material.write([benchmark.of_image(b"a photograph", material.target)])
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answering) as server:
        server.statuses = [200, *statuses]
        fake = SimpleNamespace(port=server.server_address[1], memory=lambda: (1.0, 1.0))
        monkeypatch.setattr(benchmark.Server, "of_ours", lambda *_: nullcontext(fake))
        threading.Thread(target=server.serve_forever).start()
        good = benchmark.refuse(material, tmp_path, {"device": "cpu", "growth": 64.0})
        server.shutdown()
    assert good == (third == 422)
    table = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()[3:]]
    names = ["a text file", "a truncated JPEG", "a PNG of 30,000 x 30,000", "200 MB, said before", "200 MB, not said"]
    names += ["a slow one", "then a photograph"]
    assert [row[:2] for row in table] == [[name, str(status)] for name, status in zip(names, statuses, strict=True)]
    assert [row[0] for row in table if row[-1] == "not as it should be"] == ([] if good else [names[2]])


def seen_of(benchmark: ModuleType, folder: Path, answers: list[bytes | None], limit: float) -> dict[str, Any]:
    """What one client sees of a server that gives these answers in order; at ``None`` it hangs up."""
    folder.mkdir()
    (folder / "0000").write_bytes(b"GET / HTTP/1.1\r\n\r\n")
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while left:
            try:
                await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            answer = left.pop(0)
            if answer is None:
                break
            writer.write(answer)
        writer.close()

    async def run() -> dict[str, Any]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            load = benchmark.Load(port, str(folder), 1, limit)
            load.next = lambda: 0 if left else None
            return await load.run()

    return asyncio.run(run())


def answer(status: bytes, version: int) -> bytes:
    body = ANSWER % version
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


def test_refusals_lost_connections_and_older_versions_are_failures(benchmark: ModuleType, tmp_path: Path) -> None:
    good = answer(b"200 OK", 3)
    answers = [good, answer(b"503 Service Unavailable", 3), good, None, good, answer(b"200 OK", 2), good]
    seen = seen_of(benchmark, tmp_path / "requests", answers, 5)
    assert (seen["requests"], seen["failures"], seen["versions"]) == (4, 3, [3])
    refused, lost, older = seen["reasons"]
    assert "503" in refused
    assert "the connection was lost" in lost
    assert older == "version 2 after version 3"
