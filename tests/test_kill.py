"""A killed build leaves either the old index or the new index. Run as a script, this file is the builder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killing
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sampled
from tables import unit_rows, write_table

N, D, CLASSES = 120, 16, 6

if __name__ != "__main__":
    from retrieval_tip import verify
    from retrieval_tip.store.folder import is_index, read_manifest

pytestmark = [killing.needs_fork, pytest.mark.usefixtures("one_thread")]


def _build(job: dict[str, Any], steps: killing.Steps) -> None:
    from retrieval_tip.cli import main

    steps.writes()
    status = main(job["arguments"], standalone_mode=False)
    if status:
        os._exit(status)


if __name__ == "__main__":
    killing.serve(_build)
    raise SystemExit


class Builder(killing.Server):
    """A server that runs ``index build`` in child processes and kills them."""

    def begin(self, table: Path, out: Path, **when: Any) -> None:
        self.start({"arguments": ["-q", "index", "build", str(table), "--out", str(out)]}, **when)

    def build(self, table: Path, out: Path, **when: Any) -> int:
        self.begin(table, out, **when)
        return self.wait()[0]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory, warm_path: str) -> Iterator[Builder]:
    builder = Builder(__file__, tmp_path_factory.mktemp("builder"), warm_path)
    yield builder
    builder.close()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tables")
    paths = (folder / "before.parquet", folder / "after.parquet")
    for seed, path in enumerate(paths):
        labels, ids = [f"class {i % CLASSES}" for i in range(N)], [f"{path.stem} {i}" for i in range(N)]
        write_table(path, unit_rows(N, D, seed), labels, ids)
    return paths


@pytest.fixture(scope="module")
def old(builder: Builder, tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the first table at version 2, so that a build also has an old version to delete."""
    folder = tmp_path_factory.mktemp("old") / "index"
    assert builder.build(tables[1], folder) == 0
    assert builder.build(tables[0], folder) == 0
    return folder


QUERIES = np.eye(D, dtype=np.float32)[:4]


def answer(folder: Path) -> tuple[bytes, list[str]]:
    """Verify every byte, then return everything in which two versions can differ for a reader."""
    cache = verify(folder)
    logits = cache.logits(QUERIES, k=10).numpy().tobytes() + cache.logits(QUERIES).numpy().tobytes()
    return logits, cache.labels["source"].to_pylist()


@pytest.fixture(scope="module")
def answers(builder: Builder, tables: tuple[Path, Path], old: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Answers before and after an uninterrupted build, and the number of its steps."""
    new = tmp_path_factory.mktemp("new") / "index"
    shutil.copytree(old, new)
    assert builder.build(tables[1], new) == 0
    assert answer(old) != answer(new)
    return answer(old), answer(new), len(builder.steps)


def check_tidy(folder: Path) -> None:
    """Check that the folder contains only files that the kept manifests name."""
    manifests = [folder / "manifest.json", *(folder / "manifests").glob("*.json")]
    named = {folder / file["name"] for path in manifests for file in json.loads(path.read_bytes())["files"].values()}
    assert {path for path in folder.rglob("*") if path.is_file()} == {*manifests, *named, folder / "lock"}


def check_killed(folder: Path, answers: Any, builder: Builder, table: Path) -> str:
    """Check that the old or the new version is intact, and that the next build succeeds and removes leftovers."""
    before, after, *_ = answers
    version, found = read_manifest(folder).version, answer(folder)
    assert (version, found) in [(2, before), (3, after)]
    assert builder.build(table, folder) == 0
    assert read_manifest(folder).version == version + 1
    assert answer(folder) == after
    check_tidy(folder)
    return "before" if found == before else "after"


def test_a_build_killed_at_any_step_leaves_the_old_or_the_new_index(
    builder: Builder, tables: tuple[Path, Path], old: Path, answers: Any, tmp_path: Path
) -> None:
    steps = answers[2]
    assert steps > 20  # the steps are counted
    outcomes = []
    for step in sampled(steps):
        folder = tmp_path / str(step)
        shutil.copytree(old, folder)
        assert builder.build(tables[1], folder, step=step) == -signal.SIGKILL
        outcomes.append(check_killed(folder, answers, builder, tables[1]))
        shutil.rmtree(folder)
    # The new version takes over at one moment, with steps before and after it.
    assert sorted(outcomes, key=["before", "after"].index) == outcomes
    assert set(outcomes) == {"before", "after"}


def test_an_interrupted_build_leaves_no_partial_files_and_exits_with_128_plus_signal(
    builder: Builder, tables: tuple[Path, Path], old: Path, answers: Any, tmp_path: Path
) -> None:
    outcomes = []
    for step in sampled(answers[2], 6):
        folder, how = tmp_path / str(step), ("SIGINT", "SIGTERM", "SIGHUP")[step % 3]
        shutil.copytree(old, folder)
        assert builder.build(tables[1], folder, step=step, how=how) == 128 + getattr(signal, how)
        assert not list(folder.rglob(".*"))
        outcomes.append(check_killed(folder, answers, builder, tables[1]))
    assert sorted(outcomes, key=["before", "after"].index) == outcomes
    assert set(outcomes) == {"before", "after"}


def test_a_killed_first_build_leaves_a_complete_index_or_none(
    builder: Builder, tables: tuple[Path, Path], answers: Any, tmp_path: Path
) -> None:
    assert builder.build(tables[1], tmp_path / "counted" / "index") == 0
    whole = 0
    for step in sampled(len(builder.steps)):
        folder = tmp_path / str(step) / "index"
        assert builder.build(tables[1], folder, step=step) == -signal.SIGKILL
        if is_index(folder):
            whole += 1
            assert answer(folder) == answers[1]
        assert builder.build(tables[1], folder) == 0
        assert answer(folder) == answers[1]
        check_tidy(folder)
    assert whole  # the last steps follow the first manifest


def test_killing_the_console_script_while_it_writes_keys_changes_nothing(
    builder: Builder, tables: tuple[Path, Path], old: Path, answers: Any, tmp_path: Path
) -> None:
    """Use the console script with all its threads, and a table that takes long to write."""
    folder, table = tmp_path / "index", tmp_path / "large.parquet"
    shutil.copytree(old, folder)
    part = pq.read_table(tables[1])
    pq.write_table(pa.concat_tables([part] * 4000), table)
    command = [str(Path(sys.executable).with_name("retrieval-tip")), "-q", "index", "build", str(table)]
    process = subprocess.Popen([*command, "--out", str(folder)], stdout=subprocess.DEVNULL)
    while not list((folder / "data").glob(".keys-*.tmp")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert check_killed(folder, answers, builder, tables[1]) == "before"
