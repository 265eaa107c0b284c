"""Concurrent writers and readers of one store: no reader fails, nothing is lost, history is linear.

Run as a script, this file is the writers and readers. RETRIEVAL_TIP_SECONDS sets their duration.
"""

import datetime
import fcntl
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import killing
import numpy as np
import pyarrow as pa
import pytest
from conftest import AS_ROOT, SOAK, mount, sampled
from sealing import refused
from stored import made
from tables import unit_rows, write_table

from retrieval_tip import Index, verify
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import StoreError
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.build import build_index
from retrieval_tip.retrieval import vector_index
from retrieval_tip.store import files as store_files
from retrieval_tip.store import versions as store_versions
from retrieval_tip.store.versions import Versions

D, CLASSES = 8, 4
NAMES = [f"class {i}" for i in range(CLASSES)]
SECONDS = float(os.environ.get("RETRIEVAL_TIP_SECONDS", "8" if SOAK else "1"))
QUERIES = unit_rows(4, D, 99)

pytestmark = [killing.needs_fork, pytest.mark.usefixtures("one_thread", "bucket")]


def vector(source):
    """Return the feature of a source, derived from its name, so that readers can check it."""
    return unit_rows(1, D, zlib.crc32(source.encode()))[0]


def table(path, sources, labels=None):
    labels = labels or [NAMES[zlib.crc32(source.encode()) % CLASSES] for source in sources]
    return write_table(path, np.stack([vector(source) for source in sources]), labels, sources)


def _write(job):
    """Add, remove and reorganise keys until the time is up, and return a record of the changes."""
    place = job["place"]
    number = job["number"]
    rng = random.Random(number)
    own = dict[str, int]()
    path = Path(f"{job['out']}.parquet")
    versions, key_ids, moved, removed, done = [], [], set(), [], 0
    end = time.monotonic() + job["seconds"]
    while time.monotonic() < end or not versions:
        done += 1
        what = rng.random()
        change = None
        try:
            if what < 0.6 or not own:
                sources = [f"{number}/{done}/{i}" for i in range(rng.randint(1, 5))]
                change = changes.add(place, open_source(table(path, sources)), Reader())
                own |= dict(zip(sources, change.key_ids, strict=True))
                key_ids += change.key_ids
            elif what < 0.7:
                source = rng.choice(sorted(own))
                made = changes.relabel(place, {own[source]: NAMES[number]})
                change = made if made.key_ids else None  # else no version was written
                moved.add(source)
            elif what < 0.9:
                gone = rng.sample(sorted(own), min(len(own), rng.randint(1, 6)))
                if rng.random() < 0.5:
                    change = changes.remove(place, key_ids=[own[source] for source in gone])
                else:
                    change = changes.remove(
                        place, where=f"source IN ({', '.join(map(repr, gone))})"
                    )
                assert sorted(change.key_ids) == sorted(own.pop(source) for source in gone)
                removed += gone
            elif number == 0:
                stores.at(place).collect(keep=2)
            else:
                change = changes.rebuild(place, index=rng.choice(["Flat", "Classes"]))
        except StoreError as error:  # in a bucket, another writer may be faster
            if not (place.startswith("s3://") and "changed meanwhile; run again" in str(error)):
                raise
        if change is not None:
            versions.append(change.version)
    return {
        "versions": versions,
        "key_ids": key_ids,
        "own": own,
        "moved": sorted(moved & own.keys()),
        "removed": removed,
    }


def check_whole(cache):
    """Check that an open index is one version: each key has its label, and is found by a search. Return the version."""
    rows = {row["key_id"]: row for row in cache.labels.to_pylist()}
    assert len({row["source"] for row in rows.values()}) == len(rows) == cache.n
    some = cache.rows.of(random.sample(sorted(rows), 4))
    named = [rows[key_id] for key_id in some.key_ids.tolist()]
    expected = np.stack([vector(row["source"]) for row in named])
    assert np.array_equal(some.keys, expected)
    for row, [near] in zip(named, cache.similar(expected, 1), strict=True):
        assert (near.source, near.label) == (row["source"], row["label"])
        assert near.affinity > 0.999
    return cache.version


def check_history(place):
    rows = stores.at(place).history().to_pylist()
    numbers = [row["version"] for row in rows]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert [row["parent"] for row in rows] == [version - 1 or None for version in numbers]
    assert [row["current"] for row in rows] == [False] * (len(rows) - 1) + [True]
    return numbers[-1]


def check_query(place):
    [found] = (
        stores.at(place)
        .query("SELECT count(*) AS n, count(DISTINCT source) AS m FROM labels")
        .to_pylist()
    )
    assert found["n"] == found["m"]
    return stores.at(place).query("SELECT max(version) AS v FROM versions").to_pylist()[0]["v"]


def check_description(place):
    facts = stores.at(place).describe()
    assert all(version < facts["version"] for version in facts["earlier_versions"])
    return facts["version"]


READ = {
    "load": lambda place, _: check_whole(stores.at(place).load()),
    "fast": lambda place, _: check_whole(stores.at(place).load(verify="fast")),
    "reload": lambda _, staying: check_whole(staying.reload()),
    "describe": lambda place, _: check_description(place),
    "history": lambda place, _: check_history(place),
    "query": lambda place, _: check_query(place),
    "verify": lambda place, _: check_whole(stores.at(place).verify()),
}
"""Ways to read an index, given its place and an open index. Each checks that it sees one version, and returns it."""


def _read(job):
    """Read in every way until the time is up. An open index does not change, and no version is older than another."""
    place = job["place"]
    ways = random.Random(job["number"])
    versions = [0]
    staying = stores.at(place).load()
    end = time.monotonic() + job["seconds"]
    while (
        time.monotonic() < end or len(versions) < 3
    ):  # even if a busy machine gives the reader no time
        expected = staying.logits(QUERIES)
        before = staying
        versions.append(READ[ways.choice([*READ])](place, staying))
        assert versions[-1] >= versions[-2]
        staying = staying.reload()
        assert np.array_equal(before.logits(QUERIES), expected)
    return {"reads": len(versions) - 1, "versions": len(set(versions[1:]))}


def _build(job):
    build_index(
        open_source(job["table"]),
        job["place"],
        Reader(norms=job.get("norms", "check")),
        fit="none",
    )


def _configure(job):
    changes.configure(job["place"], k=7)


WORK = {"write": _write, "read": _read, "build": _build, "configure": _configure}


def _work(job, steps):
    if job["work"] == "configure":
        steps.writes()
    result = WORK[job["work"]](job)
    if "out" in job:
        Path(job["out"]).write_text(json.dumps(result))


BASE = [f"base/{i}" for i in range(40)]

if __name__ == "__main__":
    store_files.LOCK_WAIT = 120.0
    store_versions.UNFINISHED = datetime.timedelta(
        minutes=1
    )  # other processes are writing versions, too
    killing.serve(_work)
    raise SystemExit


@pytest.fixture
def index(tmp_path):
    build_index(
        open_source(table(tmp_path / "base.parquet", BASE)),
        tmp_path / "index",
        Reader(),
        fit="none",
    )
    return tmp_path / "index"


@pytest.mark.timeout(300 + 4 * SECONDS)
@pytest.mark.parametrize(
    ("kind", "writers", "readers"), [("folder", 4, 4), ("lance", 3, 2), ("s3", 2, 1)]
)
def test_writers_lose_nothing_and_readers_never_fail(
    server, index, tmp_path, kind, writers, readers
):
    place = made(tmp_path, kind)
    changes.clone(index, place)
    jobs = [
        {
            "work": work,
            "number": number,
            "place": place,
            "seconds": SECONDS,
            "out": f"{tmp_path}/{work} {number}",
        }
        for work, count in (("write", writers), ("read", readers))
        for number in range(count)
    ]
    server.start(*jobs)
    assert server.wait() == [0] * len(jobs)
    records = [json.loads(Path(job["out"]).read_text()) for job in jobs]
    written = records[:writers]
    read = records[writers:]
    # No version was lost or made twice.
    versions = sorted(version for one in written for version in one["versions"])
    last = stores.at(place).manifest().version
    assert versions == list(range(2, last + 1))
    assert check_history(place) == last
    # No key was lost, and no key id was given twice.
    given = [key_id for one in written for key_id in one["key_ids"]]
    assert sorted(given) == list(range(len(BASE), len(BASE) + len(given)))
    cache = stores.at(place).verify()
    found = dict(
        zip(cache.labels["source"].to_pylist(), cache.labels["key_id"].to_pylist(), strict=True)
    )
    expected = {source: key_id for one in written for source, key_id in one["own"].items()}
    assert len(found) == cache.n
    assert found == expected | {source: i for i, source in enumerate(BASE)}
    assert not {source for one in written for source in one["removed"]} & found.keys()
    labels = dict(
        zip(cache.labels["source"].to_pylist(), cache.labels["label"].to_pylist(), strict=True)
    )
    for number, one in enumerate(written):
        assert {labels[source] for source in one["moved"]} <= {NAMES[number]}
    assert cache.next_key_id == len(BASE) + len(given)
    check_whole(cache)
    # All writers and readers made progress.
    assert all(one["versions"] for one in written)
    assert all(one["reads"] > 1 for one in read)
    assert (
        any(one["versions"] > 1 for one in read) or kind != "folder"
    )  # reading a table may take all the time


def delete_at_every_access(monkeypatch, index, read):
    """Repeat ``read`` while a writer deletes its version before file access 0, 1, 2 ...; return the last number."""
    state = {"at": -1, "count": 0}

    def between():
        state["count"] += 1
        if state["count"] - 1 == state["at"]:
            state["at"] = -1
            changes.relabel(index, NAMES[state["turn"] % 2], key_ids=[0])
            Versions(index).collect(1)

    def watched(call):
        def access(*arguments, **named):
            between()
            return call(*arguments, **named)

        return access

    functions = [
        (io, "open"),
        (os, "stat"),
        (os, "scandir"),
        (pa, "OSFile"),
        (vector_index.faiss(), "read_index"),
    ]
    for turn in range(0, 1000, 1 if SOAK else 10):
        changes.relabel(index, NAMES[2 + turn % 2], key_ids=[1])  # a version to delete
        with monkeypatch.context() as patch:
            for module, name in functions:
                patch.setattr(module, name, watched(getattr(module, name)))
            patch.setattr(store_versions, "ThreadPoolExecutor", Inline)
            state |= {"at": turn, "count": 0, "turn": turn}
            read()
        if state["at"] == turn:  # read made fewer accesses
            return turn
    return pytest.fail("read accesses files without end")


class Inline:
    """A thread pool that runs each call at once."""

    def __init__(self, *_, **__):
        pass

    def submit(self, call, *arguments):
        done = Future()
        done.set_result(call(*arguments))
        return done

    def shutdown(self, wait):
        pass


@pytest.mark.parametrize("name", READ)
def test_a_reader_survives_deletion_of_its_version_at_any_access(index, monkeypatch, name):
    staying = Index.load(index)
    before = staying.logits(QUERIES)
    accesses = delete_at_every_access(monkeypatch, index, lambda: READ[name](index, staying))
    assert accesses > 5
    assert np.array_equal(staying.logits(QUERIES), before)


@pytest.mark.parametrize("other", ["good", "failing"])
def test_two_builds_into_one_new_folder_do_not_disturb_each_other(server, tmp_path, other):
    tables = [
        table(tmp_path / f"{name}.parquet", [f"{name}/{i}" for i in range(12)]) for name in "ab"
    ]
    if other == "failing":  # the build checks norms under the lock, and then removes its folder
        write_table(tables[1], 2 * unit_rows(4, D), NAMES)
    for number in range(12 if SOAK else 2):
        folder = tmp_path / str(number) / "index"
        jobs = [{"work": "build", "table": str(path), "place": str(folder)} for path in tables]
        server.start(*(jobs if number % 2 else jobs[::-1]))
        status = server.wait()
        assert (status if number % 2 else status[::-1]) == [0, int(other == "failing")]
        history = Versions(folder).history().to_pylist()
        assert [(row["version"], row["parent"]) for row in history] == [(1, None), (2, 1)][
            : len(history)
        ]
        names = [
            Index.load(folder, version=row["version"]).labels["source"][0].as_py()[0]
            for row in history
        ]
        assert sorted(names) == (["a", "b"] if other == "good" else ["a"])


@pytest.mark.parametrize("name", ["lock", "data", "folder"])
def test_a_writer_recreates_what_a_failed_build_removed(index, tmp_path, monkeypatch, name):
    """Another writer fails, and removes its files just before this writer gets the lock."""
    folder = tmp_path / "new"
    lock = store_files.lock
    tried = []

    def late(*arguments, **named):
        if not tried:
            tried.append(name)
            (folder / "lock").unlink(missing_ok=True)
            if name != "lock":
                (folder / "data").rmdir()
            if name == "folder":
                folder.rmdir()
        return lock(*arguments, **named)

    monkeypatch.setattr(store_files, "lock", late)
    Index.load(index).save(folder)
    assert tried
    assert verify(folder).version == 1


def test_a_read_only_folder_can_be_read_and_refuses_every_change(index, tmp_path):
    changes.add(index, open_source(table(tmp_path / "more.parquet", ["more"])), Reader())
    place = tmp_path / "mounted"
    more = open_source(table(tmp_path / "last.parquet", ["last"]))
    place.mkdir()
    if AS_ROOT:  # permissions do not stop root, a read-only file system does
        mount(place, "size=1m")
    try:
        folder = Path(shutil.copytree(index, place / "index"))
        if AS_ROOT:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        else:
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o555 if path.is_dir() else 0o444)
        writers = [
            lambda: changes.add(folder, more, Reader()),
            lambda: changes.remove(folder, key_ids=[1]),
            lambda: changes.relabel(folder, NAMES[0], key_ids=[0, 1, 2]),
            lambda: changes.configure(folder, k=7),
            lambda: changes.rebuild(folder),
            lambda: changes.rollback(folder),
            lambda: changes.merge(folder, index),
            lambda: Versions(folder).collect(1),
            lambda: build_index(more, folder, Reader(), fit="none"),
        ]
        for write in writers:
            with pytest.raises(StoreError) as error:
                write()
            assert str(error.value).startswith(str(folder))
            assert str(error.value).endswith(
                "cannot be written: Read-only file system; nothing was changed"
                if AS_ROOT
                else "nothing was changed"
            )
        staying = Index.load(folder, version=1)
        assert (staying.n, [read(folder, staying) for read in READ.values()]) == (
            len(BASE),
            [2] * 7,
        )
    finally:
        if AS_ROOT:
            subprocess.run(["umount", "-l", place], check=True)
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.parametrize("end", ["SIGCONT", "SIGKILL"])
def test_a_writer_waits_until_a_stopped_writer_continues_or_dies(server, index, monkeypatch, end):
    """Meanwhile, an impatient writer gets an error that names the process, and readers do not wait."""
    job = {"work": "configure", "place": str(index)}
    looks = []
    flock = fcntl.flock
    named = 0
    assert (
        server.run(job) == server.run(job) == 0
    )  # only the first creates the folder of earlier manifests
    locked, *_, released = [
        number for number, step in enumerate(server.steps) if step in ("fcntl.flock", "os.truncate")
    ]
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (looks.append(1), flock(*arguments)))
    for step in sampled(len(server.steps), 7):
        first = Versions(index).manifest().version
        server.start(job, step=step, how="SIGSTOP")
        stopped = server.stopped()
        with ThreadPoolExecutor(1) as pool:
            if is_locked := locked < step <= released:
                monkeypatch.setattr(store_files, "LOCK_WAIT", 0.05)
                owner = f"process {stopped} on {socket.gethostname()}"
                text = refused(
                    lambda: changes.configure(index, k=9), f"{index}: is being written by "
                )
                # A new owner is unnamed for a moment, but no other process is ever named.
                assert text in [
                    f"{index}: is being written by {who}; try later"
                    for who in (owner, "another process")
                ]
                named += owner in text
                assert Index.load(index).version in (first, first + 1)
            monkeypatch.setattr(store_files, "LOCK_WAIT", 60.0)
            looks.clear()
            waiting = pool.submit(changes.configure, index, k=8)
            while is_locked and len(looks) < 3:  # it has found the lock taken at least twice
                time.sleep(0.001)
            assert not (is_locked and waiting.done())
            os.kill(stopped, getattr(signal, end))
            version = waiting.result().version
        assert server.wait() == [0 if end == "SIGCONT" else -signal.SIGKILL]
        assert version in (first + 1, first + 2)
        assert verify(index).version == (first + 2 if end == "SIGCONT" else version)
    assert named > 1
