"""A server of the real command line in a process of its own, and a small index of real photographs to serve."""

from __future__ import annotations

import csv
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner

from retrieval_tip.cli import main

START_SECONDS = 120


def photographs(shared: Path, part: str, classes: int, each: int) -> list[tuple[Path, str]]:
    """Some photographs of Caltech101 of the first classes, with their labels."""
    data = shared / "data" / "caltech101"
    items = json.loads((data / "split_zhou_Caltech101.json").read_text())[part]
    names = sorted({name for _, _, name in items})[:classes]
    found = []
    for name in names:
        found += [(data / "101_ObjectCategories" / path, name) for path, _, own in items if own == name][:each]
    return found


def build(shared: Path, out: Path, items: list[tuple[Path, str]], *options: str) -> Path:
    """An index over labelled photographs, by the command line."""
    table = out.with_suffix(".csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((str(path), name) for path, name in items)])
    model = f"local-dir:{shared / 'models' / 'lit-mini'}"
    command = ["index", "build", str(table), "--out", str(out), "--model", model, *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return out


@contextmanager
def server(
    *arguments: object, token: str | None = None, path: str | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``retrieval-tip serve`` on a free port: its address and process. It is ended, and must end well.

    In a new interpreter, or by the program that is found on ``path``.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"} | ({"RETRIEVAL_TIP_TOKEN": token} if token else {})
    program = [str(shutil.which("retrieval-tip", path=path))] if path else [sys.executable, "-m", "retrieval_tip"]
    command = [*program, "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while " at http://" not in (line := lines.get(timeout=START_SECONDS) or "ended"):
            assert line != "ended", "".join(said)
        yield line.rpartition(" at ")[2].partition(";")[0], process
        process.terminate()
        assert process.wait(30) == 0, "".join(said)
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        assert process.stderr is not None
        process.stderr.close()
    assert "Traceback" not in "".join(said), "".join(said)
