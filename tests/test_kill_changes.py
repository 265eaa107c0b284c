"""A writer that is killed leaves the index as it was or as it would be, whatever it was doing to it.

Run as a script, this file is that writer.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import killing
import numpy as np
import pytest
from conftest import SOAK, few, sampled
from tables import unit_rows, write_table

from retrieval_tip import CacheModel, verify
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source, open_source
from retrieval_tip.index import changes
from retrieval_tip.index.build import build_index
from retrieval_tip.index.fit import fit_index
from retrieval_tip.retrieval import labelled_keys
from retrieval_tip.store import folder as store
from retrieval_tip.store import history
from retrieval_tip.store.writer import FILE_NAME, TEMPORARY, collect

D, CLASSES, KEPT = 8, 4, 2
SEGMENTS = (24, 8, 3)
FACTORIES = ("Flat", "Classes")
KILLS = 12 if SOAK else 1
"""Random moments at which each of four changes is killed, for each type of index."""
QUERIES = unit_rows(4, D, 99)

pytestmark = killing.needs_fork


# --- an index, and what is done to it


def make_tables(place: Path, segments: tuple[int, ...] = SEGMENTS) -> None:
    """Feature tables: of each segment, of what is added, of what is built, and two of text."""
    for number, n in enumerate([*segments, 5, 20]):
        labels = [f"class {i % CLASSES}" for i in range(n)]
        if number == len(segments):
            labels[-1] = "class new"
        name = {len(segments): "more", len(segments) + 1: "other"}.get(number, str(number))
        write_table(place / f"{name}.parquet", unit_rows(n, D, number), labels, [f"{name} {i}" for i in range(n)])
    names = [f"class {i}" for i in range(CLASSES)]
    write_table(place / "text.parquet", unit_rows(CLASSES, D, 50), names)
    write_table(place / "new text.parquet", unit_rows(CLASSES + 1, D, 51), [*names, "class new"])


def table(place: Path, name: str) -> Source:
    return open_source(place / f"{name}.parquet")


def built(folder: Path, place: Path, name: str, index: str) -> CacheModel:
    return build_index(
        table(place, name), folder, Encoder(), text=place / "text.parquet", index=index, alpha=2.0, beta=4.0,
        device="cpu",
    )  # fmt: skip


def make_index(folder: Path, place: Path, index: str) -> None:
    """An index of three segments at its fourth version; the third one is kept, whose last segment is another."""
    built(folder, place, "0", index)
    for name in ("1", "2"):
        changes.add(folder, table(place, name), Encoder())
    changes.relabel(folder, "class 3", where="source = '2 0'")


Operation = Callable[[Path, Path, str], object]
OPERATIONS: dict[str, Operation] = {
    "add": lambda folder, place, _: changes.add(
        folder, table(place, "more"), Encoder(), text=place / "new text.parquet"
    ),
    "remove": lambda folder, *_: changes.remove(folder, where="source IN ('0 3', '1 2', '2 1')"),
    "remove late": lambda folder, *_: changes.remove(folder, where="source LIKE '2 %'"),
    "relabel": lambda folder, *_: changes.relabel(folder, "class 0", where="source IN ('1 1', '1 2')"),
    "compact": lambda folder, *_: changes.compact(folder),
    "rebuild": lambda folder, *_: changes.rebuild(folder, dtype="float16"),
    "rollback": lambda folder, *_: changes.rollback(folder),
    "gc": lambda folder, *_: collect(folder, 1),
    "fit": lambda folder, *_: fit_index(folder),
    "build": lambda folder, place, index: built(folder, place, "other", index),
}


def _work(job: killing.Job, steps: killing.Steps) -> None:
    if job["counted"]:
        steps.writes()
    OPERATIONS[job["name"]](Path(job["folder"]), Path(job["place"]), job["index"])


if __name__ == "__main__":
    labelled_keys.SMALL, history.KEPT_VERSIONS = 0, KEPT
    killing.serve(_work)
    raise SystemExit


@pytest.fixture(scope="module", autouse=True)
def _as_in_the_server() -> Iterator[None]:
    """Segments and versions are few and small."""
    with killing.one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled_keys, "SMALL", 0)
        patch.setattr("retrieval_tip.store.history.KEPT_VERSIONS", KEPT)
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, warm_path: str) -> Iterator[killing.Server]:
    server = killing.Server(__file__, tmp_path_factory.mktemp("server"), warm_path)
    yield server
    server.close()


@dataclass
class World:
    """The index before, the tables beside it, and what a reader finds: before, and after what nobody killed."""

    old: Path
    index: str
    before: Any
    after: dict[str, Any]

    @property
    def place(self) -> Path:
        return self.old.parent

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.old, folder))

    def job(self, name: str, folder: Path, counted: bool = True) -> killing.Job:
        return {
            "name": name, "folder": str(folder), "place": str(self.place), "index": self.index, "counted": counted
        }  # fmt: skip

    def do(self, name: str, folder: Path) -> None:
        OPERATIONS[name](folder, self.place, self.index)


def answer(folder: Path) -> tuple[bytes, str]:
    """All that a reader can tell versions apart by, after a check of every byte."""
    cache = verify(folder)
    logits = [cache.logits(QUERIES, k).numpy() for k in ("all", 5)]
    classes = [(name, row.tolist()) for name, row in zip(cache.class_names, cache.text_weights, strict=True)]
    return np.concatenate(logits).tobytes(), json.dumps([cache.labels.drop(["added_at"]).to_pydict(), classes])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    found = {}
    for index in FACTORIES:
        place = tmp_path_factory.mktemp(index)
        make_tables(place)
        make_index(place / "old", place, index)
        world = found[index] = World(place / "old", index, answer(place / "old"), {})
        for name in OPERATIONS:
            folder = world.copy(place / name)
            world.do(name, folder)
            world.after[name] = answer(folder)
    return found


@pytest.fixture(params=FACTORIES)
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


def test_what_is_killed_below_has_segments_and_versions(world: World) -> None:
    manifest = store.read_manifest(world.old)
    assert tuple(part.keys.rows for part in manifest.segments) == SEGMENTS
    assert [manifest.version, *(old.version for old in store.earlier_manifests(world.old))] == [4, 3]
    assert [name for name in OPERATIONS if world.after[name] == world.before] == ["gc"]


# --- killed


def check_collectable(folder: Path) -> None:
    """Nothing is there but what kept manifests name, and what the next writer knows for leftovers."""
    manifests = [store.read_manifest(folder), *store.earlier_manifests(folder)]
    named = {folder / file.name for manifest in manifests for file in manifest.data_files}
    own = {folder / "manifest.json", folder / "lock", *(folder / "manifests").glob("[0-9]*.json")}
    for path in {path for path in folder.rglob("*") if path.is_file()} - named - own:
        in_data = path.parent == folder / "data"
        assert TEMPORARY.fullmatch(path.name) or (in_data and FILE_NAME.fullmatch(path.name)), path


def check_tidy(folder: Path) -> None:
    """Nothing is there but what the kept manifests name."""
    manifests = [folder / "manifest.json", *(folder / "manifests").glob("[0-9]*.json")]
    read = [store.Manifest.from_bytes(path.read_bytes(), str(path)) for path in manifests]
    assert len({manifest.version for manifest in read}) == len(read) <= KEPT
    named = {folder / file.name for manifest in read for file in manifest.data_files}
    assert {path for path in folder.rglob("*") if path.is_file()} == {*manifests, *named, folder / "lock"}


def check_killed(folder: Path, world: World, name: str) -> str:
    """A killed change left one version or the other whole, and the next writers succeed and tidy up."""
    check_collectable(folder)
    version, found = store.read_manifest(folder).version, answer(folder)
    history = store.history(folder)
    assert history["version"].to_pylist() in ([4], [3, 4], [3, 4, 5], [4, 5])
    assert history["current"].to_pylist() == [False] * (len(history) - 1) + [True]
    earlier = store.describe(folder)["earlier_versions"]
    assert earlier == history["version"].to_pylist()[:-1]
    if name == "gc":
        assert (version, found) == (4, world.before)
        state = "before" if earlier == [3] else "after"
    else:
        assert (version, found) in [(4, world.before), (5, world.after[name])]
        state = "before" if version == 4 else "after"
    if state == "before":
        world.do(name, folder)
        version += name != "gc"
    else:
        changes.configure(folder, k=7)
        version += 1
    assert (store.read_manifest(folder).version, answer(folder)) == (version, world.after[name])
    check_tidy(folder)
    return state


def states(server: killing.Server, world: World, name: str, place: Path, moments: Iterator[killing.Job]) -> list[str]:
    """What is left by kills at these moments. One index is checked while the next is killed."""
    found, last = [], None
    for number, moment in enumerate(moments):
        folder = world.copy(place / str(number))
        server.start(world.job(name, folder, moment.get("step") is not None), **moment)
        try:
            if last is not None:
                found.append(check_killed(last, world, name))
                shutil.rmtree(last)
        finally:
            status = server.wait()
        assert status in ([-signal.SIGKILL], [0])
        last = folder if status != [0] else None
    if last is not None:
        found.append(check_killed(last, world, name))
    return found


ALL = [("Flat", name) for name in OPERATIONS] + [("Classes", name) for name in ("add", "relabel", "compact", "rebuild")]


@pytest.mark.parametrize(("index", "name"), few(ALL, 4))
def test_killed_at_every_step_the_index_is_the_old_or_the_new(
    server: killing.Server, worlds: dict[str, World], index: str, name: str, tmp_path: Path
) -> None:
    world = worlds[index]
    assert server.run(world.job(name, world.copy(tmp_path / "counted"))) == 0
    steps = server.steps
    assert {"fcntl.flock", "os.remove"} <= set(steps)
    assert name == "gc" or {"fsync", "os.rename", "open to write"} <= set(steps)
    found = states(server, world, name, tmp_path, ({"step": step} for step in sampled(len(steps))))
    # There is one moment at which the new version takes over, and steps on both sides of it.
    assert found == sorted(found, key=["before", "after"].index)
    assert len(found) == len(sampled(len(steps)))
    assert set(found) == {"before", "after"}


@pytest.mark.parametrize("name", few(["add", "remove", "rebuild", "build"], 2))
def test_killed_at_any_moment_the_index_is_the_old_or_the_new(
    server: killing.Server, world: World, name: str, tmp_path: Path
) -> None:
    seconds = []
    for number in range(3):
        assert server.run(world.job(name, world.copy(tmp_path / f"whole {number}"), counted=False)) == 0
        seconds.append(server.seconds)
    moments, killed, latest = random.Random(name), 0, min(seconds)
    for attempt in range(8):
        place = tmp_path / str(attempt)
        after = ({"after": moments.uniform(0, latest)} for _ in range(KILLS - killed))
        latest *= 0.7  # where the machine was busy when it was timed
        killed += len(states(server, world, name, place, after))
        if killed == KILLS:
            return
    pytest.fail("the moments do not lie within the change")


# --- waited for


@pytest.mark.parametrize("name", few(["add", "rebuild", "gc"], 2))
def test_a_writer_that_waits_goes_on_when_the_one_at_work_is_killed(
    server: killing.Server, worlds: dict[str, World], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl  # not on Windows

    world, looks, flock = worlds["Flat"], [0], fcntl.flock

    def look(*arguments: Any) -> None:
        looks[0] += 1
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", look)
    monkeypatch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 60.0)
    assert server.run(world.job(name, world.copy(tmp_path / "counted"))) == 0
    locked, *_, released = [number for number, step in enumerate(server.steps) if step == "fcntl.flock"]
    versions = []
    for step in range(locked + 1, released + 1, 4):
        folder = world.copy(tmp_path / str(step))
        server.start(world.job(name, folder), step=step, how="SIGSTOP")
        stopped = server.stopped()
        with ThreadPoolExecutor(1) as pool:
            looks[0] = 0
            waiting = pool.submit(changes.configure, folder, k=7)
            while looks[0] < 3:  # it has found the lock taken, and again
                time.sleep(0.001)
            assert not waiting.done()
            os.kill(stopped, signal.SIGKILL)
            version = waiting.result().version
        assert server.wait() == [-signal.SIGKILL]
        assert (version, answer(folder)) in [(5, world.before), (6, world.after[name])]
        check_tidy(folder)
        versions.append(version)
    assert len(versions) > 2
    assert versions == sorted(versions)
    assert set(versions) == ({5} if name == "gc" else {5, 6})
