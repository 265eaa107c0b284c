"""Code shared by the benchmarks.

It measures several sides in turn, prints tables, describes the machine, keeps finished runs in a file, runs processes
and compares two versions of the package. With ``--against``, a script measures this tree and another commit or checkout
in the same run::

    python benchmarks/throughput.py --only exact --against 17a8cd6

Both processes run the same script, but each of them uses its own package. They pass a token back and forth, so that one
process measures a turn while the other waits. The tables at the end show both medians, and the ratio of this tree's
time to the other tree's time (as the median, minimum and maximum over all turns). If the ratio is above 1, this tree is
slower.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.backbones.base import unit

SEED = 0
GIB = 2**30
SHARED = Path(__file__).resolve().parents[2] / "shared"
PROGRAM = (sys.executable, "-P", "-m", "retrieval_tip")
"""The real command, from the package on PYTHONPATH. The option ``-P`` excludes the current folder."""

shared_option = click.option(
    "--shared",
    type=click.Path(path_type=Path),
    default=SHARED,
    show_default=True,
    help="Folder of the datasets.",
)
folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True),
    default=tempfile.gettempdir(),
    help="Folder for temporary files.",
)


def sizes_option(sizes: Sequence[tuple[int, int, int]]) -> Callable[[Any], Any]:
    """Return the option ``--size`` for the parameter ``sizes``, whose default is given."""
    return click.option(
        "--size",
        "sizes",
        type=(int, int, int),
        multiple=True,
        default=sizes,
        show_default=True,
        help="Numbers of keys, dimensions and classes.",
    )


device_option = click.option(
    "--device", default="auto", show_default=True, help="Device to use: auto, cpu, cuda or cuda:N."
)
results_option = click.option(
    "--results",
    type=click.Path(path_type=Path),
    required=True,
    help="File with one JSON line per finished run. These runs are not repeated, and the tables show all of them.",
)

Side = Callable[[int], float]
"""Type of a measured function, which gets the number of the turn and returns seconds."""


def clocked(call: Callable[[], object]) -> float:
    """Return the number of seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(
    title: str, sides: Mapping[str, Side], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Measure each side once per turn, and return its seconds for each turn, excluding the first ``warm`` turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + warm):
        for name, side in sides.items():
            taken[name].append(side(turn))
        _hand_over()
    taken = {name: values[warm:] for name, values in taken.items()}
    for name, values in taken.items():
        record(title, name, values)
    return taken


def medians(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each side."""
    return {name: statistics.median(values) for name, values in taken.items()}


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a table that has the columns of the first row. Floats are rounded to four digits."""
    lines = [list(rows[0]), *([_cell(row.get(column)) for column in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [isinstance(value, int | float) for value in rows[0].values()]
    click.echo(f"\n{title}" if title else "")
    for line in lines:
        cells = zip(line, widths, right, strict=True)
        click.echo(
            "  ".join(
                cell.rjust(width) if r else cell.ljust(width) for cell, width, r in cells
            ).rstrip()
        )


def markdown(heads: Sequence[str], rows: Iterable[Iterable[object]], left: int = 1) -> str:
    """Return a table in Markdown, whose first ``left`` columns are aligned to the left and the others to the right."""
    rule = "|" + left * "---|" + (len(heads) - left) * "--:|"
    return "\n".join([_line(heads), rule, *map(_line, rows)])


def _line(cells: Iterable[object]) -> str:
    return "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def machine(*packages: str) -> str:
    """Return a line that describes the machine and the versions of relevant packages."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    found = []
    for name in ("retrieval-tip", "torch", "numpy", "faiss-cpu", "faiss-gpu", *packages):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return (
        f"{datetime.date.today()}, {cpu}{gpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {torch.get_num_threads()} "
        f"threads, load before {load()}, Python {platform.python_version()}, {', '.join(found)}, "
        f"seed {SEED}"
    )


def load() -> str:
    """Return the load of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def features_of(table: pa.Table, column: str = "feature") -> npt.NDArray[np.float32]:
    """Return the features in a table, scaled to norm 1, as an array of shape ``[n, d]``."""
    return unit(np.stack(table[column].to_numpy()).astype(np.float32))


# Runs that take long, and are resumed

Run = dict[str, Any]
"""The key of a run, for example its dataset and its draw, and the figures."""


def read_runs(results: Path | None) -> list[Run]:
    """Return the runs in a file."""
    if results is None or not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def add_runs(results: Path | None, runs: Iterable[Run]) -> None:
    """Append runs to a file."""
    if results is not None:
        with results.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(run)}\n" for run in runs)


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of values and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


# Processes


@dataclass(frozen=True)
class Finished:
    """A finished process, with its output, wall-clock seconds, and peak resident and anonymous memory in GiB."""

    output: str
    seconds: float
    peak: float
    anonymous: float


def launch(*command: object) -> Finished:
    """Run a command and sample its memory. Raises ClickException if the command fails.

    The peak is the one that Linux keeps for the program, which excludes the memory of the parent.
    """
    start, peaks = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            for name, kilobytes in re.findall(r"(VmHWM|RssAnon):\s+(\d+)", status):
                peaks[name] = max(peaks[name], int(kilobytes))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise click.ClickException(
            f"{' '.join(map(str, command))}: exit status {process.returncode}"
        )
    return Finished(printed, seconds, *(peak * 1024 / GIB for peak in peaks.values()))


def run(*command: object) -> str:
    """Run a command and return its output. Raises ClickException if the command fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))}: {done.stderr}")
    return done.stdout


# Two versions

TURNS = os.environ.pop("BENCHMARK_TURNS", "").split()
"""The pipe to wait on, the pipe to write to, and the file for records, if another version is measured in turn."""


def against(command: click.Command) -> click.Command:
    """Add the option ``--against`` to a script."""
    own = command.callback
    assert own is not None

    @functools.wraps(own)
    def callback(against: str | None, **given: object) -> object:
        if against is None:
            if TURNS:
                os.read(int(TURNS[0]), 1)
            return own(**given)
        if Path(against).is_dir():
            return _compare(Path(against).resolve(), against)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(__file__).resolve().parents[1]
            run(
                "git",
                "-C",
                root,
                "archive",
                "--output",
                f"{folder}/package.tar",
                against,
                "retrieval_tip",
            )
            shutil.unpack_archive(f"{folder}/package.tar", folder)
            return _compare(Path(folder), against)

    command.callback = callback
    command.params.append(
        click.Option(["--against"], help="Another checkout or commit to measure in turn.")
    )
    return command


def record(title: str, name: str, values: Sequence[float]) -> None:
    """Record one value per turn for a side, so that two versions can be compared. Lower values are better."""
    if TURNS:
        with Path(TURNS[2]).open("a", encoding="utf-8") as file:
            file.write(json.dumps([title, name, list(values)]) + "\n")


def _hand_over() -> None:
    """Let the other version measure its turn. If the other process has ended and closed its pipe, do not wait."""
    if TURNS:
        try:
            os.write(int(TURNS[1]), b".")
        except BrokenPipeError:
            return
        os.read(int(TURNS[0]), 1)


def _compare(other: Path, commit: str) -> None:
    """Run this script on both trees, and print their times side by side."""
    at = next(i for i, word in enumerate(sys.argv) if word.startswith("--against"))
    arguments = [*sys.argv[:at], *sys.argv[at + (1 if "=" in sys.argv[at] else 2) :]]
    trees = [Path(__file__).resolve().parents[1], other]
    pipes = [
        os.pipe(),
        os.pipe(),
    ]  # each process waits on its own pipe, and writes to the other pipe
    os.write(pipes[0][1], b".")
    with tempfile.TemporaryDirectory() as folder:
        files, processes = [Path(folder) / name for name in ("this", "other")], []
        for i, tree in enumerate(trees):
            ends = (pipes[i][0], pipes[1 - i][1])
            turns = f"{ends[0]} {ends[1]} {files[i]}"
            known = {
                "PYTHONPATH": str(tree),
                "OMP_WAIT_POLICY": "PASSIVE",
                "BENCHMARK_TURNS": turns,
            }
            shown = None if i == 0 else subprocess.DEVNULL
            command = [sys.executable, *arguments]
            processes.append(
                subprocess.Popen(command, env=os.environ | known, pass_fds=ends, stdout=shown)
            )
        for end in (end for pipe in pipes for end in pipe):
            os.close(end)
        if sum(process.wait() for process in processes):
            raise click.ClickException("a version failed: see above")
        ours, theirs = (
            [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files
        )
    tables: dict[str, list[dict[str, object]]] = {}
    for (title, name, mine), (_, _, others) in zip(ours, theirs, strict=True):
        ratios = sorted(a / b for a, b in zip(mine, others, strict=True))
        row = {"side": name, "this": statistics.median(mine), "other": statistics.median(others)}
        row |= {"this / other": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
        tables.setdefault(title, []).append(row)
    click.echo(f"\nThis tree against {commit}; ratios compare the same turns; load {load()}")
    for title, rows in tables.items():
        show(title, rows)
