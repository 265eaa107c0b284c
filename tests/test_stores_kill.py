"""A writer of a LanceDB store that is killed leaves it as it was or as it would be, and the next one finishes.

Run as a script, this file is that writer.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import buckets
import killing
import lancedb
import numpy as np
import obstore
import pytest
from conftest import SOAK, few, sampled
from tables import unit_rows
from test_kill_changes import make_tables, table

from retrieval_tip.data.encoder import Encoder
from retrieval_tip.errors import StoreError
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.build import build_index
from retrieval_tip.index.fit import fit_index
from retrieval_tip.lance import key_table, lease, versions
from retrieval_tip.lance.address import Address, storage_options
from retrieval_tip.lance.objects import Objects
from retrieval_tip.store import history, lock

pytestmark = [killing.needs_fork, pytest.mark.timeout(180)]

D, KEPT = 8, 3
QUERIES = unit_rows(4, D, 99)
LEASE, LIVING = 0.4, 20.0
"""Seconds after which a holder in a bucket counts as dead, where all but one are, and where they live."""
PRUNED_EVERY = 5
"""So that the next version gives up versions of the table."""
KILLS = 4 if SOAK else 1
"""Random moments at which each of three changes is killed."""
GROWTH = 5 if SOAK else 3
"""Changes of each of two processes that are at work at once."""


UNFITTED = {"alpha": 2.0, "beta": 4.0}
FITTED = {"metric": "within", "values": "one-hot"}


def built(place, tables, name, how=UNFITTED):
    return build_index(table(tables, name), place, Encoder(), text=tables / "text.parquet", device="cpu", **how)


def make_index(place, tables):
    """An index in three pieces at its fourth version, of which three are kept."""
    built(place, tables, "0")
    for name in ("1", "2"):
        changes.add(place, table(tables, name), Encoder())
    changes.relabel(place, "class 3", where="source = '2 0'")


OPERATIONS = {
    "first": lambda place, tables: built(place, tables, "other", FITTED),  # whose table is made twice
    "build": lambda place, tables: built(place, tables, "other"),
    "add": lambda place, tables: changes.add(
        place, table(tables, "more"), Encoder(), text=tables / "new text.parquet"
    ),
    "remove": lambda place, _: changes.remove(place, where="source IN ('0 3', '1 2', '2 1')"),
    "relabel": lambda place, _: changes.relabel(place, "class 0", where="source IN ('1 1', '1 2')"),
    "compact": lambda place, _: changes.compact(place),
    "rebuild": lambda place, _: changes.rebuild(place, index="IvfFlat"),
    "fit": lambda place, _: fit_index(place, **FITTED),
    "fit to values": lambda place, _: fit_index(place, values="solved"),
    "rollback": lambda place, _: changes.rollback(place),
    "gc": lambda place, _: stores.at(place).collect(),
    "grow": lambda place, tables: [changes.add(place, table(tables, "1"), Encoder()) for _ in range(GROWTH)],
}  # fmt: skip


def around(steps, owner, name):
    """A step before each call of a method; signs of life of a lease are none, for their number is the clock's."""
    call = getattr(owner, name)

    def counted(*arguments, **more):
        if threading.current_thread() is threading.main_thread():
            steps.step(name)
        return call(*arguments, **more)

    setattr(owner, name, counted)


def _work(job, steps):
    if job["counted"]:
        for name in ("put", "create", "delete"):
            around(steps, Objects, name)
        for name in ("add", "delete", "restore", "optimize", "create_index", "add_columns"):
            around(steps, lancedb.table.LanceTable, name)
        around(steps, lancedb.db.LanceDBConnection, "create_table")
        for name in ("create", "delete"):
            around(steps, lancedb.table.Tags, name)
        around(steps, obstore, "copy")
        around(steps, os, "fsync")
        steps.events("fcntl.flock")
    lease.LEASE = job["lease"]
    OPERATIONS[job["name"]](job["place"], Path(job["tables"]))


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # of forks, which its engine has not been used before
    history.KEPT_VERSIONS, lock.LOCK_WAIT, versions.PRUNED_EVERY = KEPT, 60.0, PRUNED_EVERY
    killing.serve(_work)
    raise SystemExit


@pytest.fixture(scope="module", autouse=True)
def _as_in_the_server():
    with killing.one_thread(), pytest.MonkeyPatch.context() as patch:
        buckets.use(patch, buckets.endpoint())
        patch.setattr("retrieval_tip.store.history.KEPT_VERSIONS", KEPT)
        patch.setattr(versions, "PRUNED_EVERY", PRUNED_EVERY)
        patch.setattr(lease, "LEASE", LEASE)
        yield


@pytest.fixture(autouse=True)
def _patient(impatient, monkeypatch):
    monkeypatch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 60.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory, _as_in_the_server, warm_path):
    server = killing.Server(__file__, tmp_path_factory.mktemp("server"), warm_path)
    yield server
    server.close()


def answer(place):
    """All that a reader can tell versions apart by, after a check of every row."""
    model = stores.at(place).verify()
    labels = model.labels.drop_columns(["added_at", "version"]).sort_by("key_id")
    assert len(set(labels["key_id"].to_pylist())) == len(labels) == model.n
    logits = np.concatenate([model.logits(QUERIES, k).numpy() for k in ("all", 5)])
    return np.round(logits, 3).tolist(), labels.to_pydict(), model.class_names, model.counts, model.next_key_id


@dataclass
class World:
    """A store before, the tables beside it, and what a reader finds: before, and after what nobody killed."""

    kind: str
    tables: Path
    old: str = ""
    before: object = None
    after: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)

    def place(self, folder, name):
        """An address with nothing there yet."""
        if self.kind == "s3":
            return f"s3://{buckets.fresh_bucket()}/{name}"
        return f"lance://{(folder / name).as_posix()}"

    def copy(self, folder, name, what):
        """A copy of the store, byte for byte, or nothing where the first version is to be made."""
        place = self.place(folder, name)
        if what == "first":
            return place
        if self.kind == "s3":
            source, target = (Objects(Address.parse(p))._bucket for p in (self.old, place))
            for batch in obstore.list(source):
                for entry in batch:
                    obstore.put(target, entry["path"], bytes(obstore.get(source, entry["path"]).bytes()))
        else:
            shutil.copytree(self.old.removeprefix("lance://"), place.removeprefix("lance://"))
        return place

    def job(self, what, place, counted=True, seconds=LEASE):
        job = {"name": what, "place": place, "tables": str(self.tables), "counted": counted}
        return job | {"lease": seconds}

    def do(self, what, place):
        OPERATIONS[what](place, self.tables)


@contextmanager
def in_here():
    """As in the server, where a module's fixture runs before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 60.0)
        yield


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, _as_in_the_server):
    found = {}
    for kind in ("lance", "s3"):
        tables = tmp_path_factory.mktemp(kind)
        make_tables(tables)
        world = found[kind] = World(kind, tables)
        with in_here():
            world.old = world.place(tables, "old")
            make_index(world.old, tables)
        world.before = answer(world.old)
    return found


def expected(world, what, folder):
    """What a reader finds after a change that nobody killed, and its version."""
    if what not in world.after:
        place = world.copy(folder, "expected", what)
        world.do(what, place)
        world.after[what] = stores.at(place).manifest().version, answer(place)
    return world.after[what]


def check_tidy(place, behind=False):
    """After the next writer nothing of the killed one is left: no row, no object, no mark."""
    at = stores.at(place)
    if behind:  # the table has a version that no manifest names, which the next change gives up
        changes.configure(place, temperature=2.0)
    manifest, table_ = at.manifest(), lancedb.connect(at.address.uri, storage_options=options(at)).open_table("keys")
    assert table_.version == manifest.table.version
    assert table_.count_rows() == manifest.n
    at.collect()
    kept = [at.manifest(), *at.earlier(at.manifest())]
    assert len(kept) == 1
    assert set(at.objects.names("data")) == {file.name for old in kept for file in old.data_files}
    assert at.objects.names("manifests") == [f"manifests/{manifest.version:06d}.json"]
    assert not table_.tags.list()
    if at.address.local is not None:
        assert not list(at.address.local.rglob("*.tmp"))
    at.verify()


def options(at):
    return storage_options(at.address) or None


def check_killed(place, world, what, folder):
    """A killed change left one version or the other whole, and the next writer succeeds and leaves nothing behind."""
    at, (done, after) = stores.at(place), expected(world, what, folder)
    if what == "first" and not at.exists():
        state = "before"
    elif what == "gc":
        assert (at.manifest().version, answer(place)) == (4, world.before)
        state = "before" if at.history()["version"].to_pylist() == [2, 3, 4] else "after"
    else:
        version, found = at.manifest().version, answer(place)
        assert (version, found) in [(4, world.before), (done, after)]
        assert at.history()["version"].to_pylist()[-1] == version
        state = "before" if version != done else "after"
    if state == "before" or what == "gc":
        world.do(what, place)
        assert (at.manifest().version, answer(place)) == (done, after)
    else:
        changes.configure(place, k=7)
        assert (at.manifest().version, answer(place)) == (done + 1, after)
    check_tidy(place, behind=what in ("rollback", "gc"))
    return state


def states(server, world, what, folder, moments):
    """What is left by kills at these moments. One store is checked while the next is killed."""
    found, last = [], None
    expected(world, what, folder)
    for number, moment in enumerate(moments):
        place = world.copy(folder, str(number), what)
        server.start(world.job(what, place, moment.get("step") is not None), **moment)
        try:
            if last is not None:
                found.append(check_killed(last, world, what, folder))
        finally:
            status = server.wait()
        assert status in ([-signal.SIGKILL], [0])
        last = place if status != [0] else None
    if last is not None:
        found.append(check_killed(last, world, what, folder))
    return found


NEEDED = {
    "first": "create_table", "build": "create_table", "add": "add", "remove": "delete", "relabel": "add",
    "compact": "optimize", "rebuild": "create_index", "gc": "optimize",
    "fit": "create_table",
}  # fmt: skip
CHANGES = [name for name in OPERATIONS if name != "grow"]


def steps_of(server, world, what, folder):
    """The steps of a change that nobody kills."""
    if what not in world.steps:
        assert server.run(world.job(what, world.copy(folder, "counted", what))) == 0
        world.steps[what] = server.steps
    return world.steps[what]


def killed_at(server, world, what, folder, choose=sampled):
    """The states after kills at every step, or at some."""
    steps = steps_of(server, world, what, folder)
    assert what not in NEEDED or NEEDED[what] in steps
    assert what == "gc" or "create" in steps
    return states(server, world, what, folder, ({"step": step} for step in choose(len(steps))))


@pytest.mark.parametrize("what", few(CHANGES, 2))
def test_killed_at_every_step_the_store_is_the_old_or_the_new(server, worlds, what, tmp_path):
    found = killed_at(server, worlds["lance"], what, tmp_path)
    # There is one moment at which the new version takes over, and steps on both sides of it.
    assert found == sorted(found, key=["before", "after"].index)
    assert set(found) == {"before", "after"}


@pytest.mark.parametrize("what", few(["add", "first", "gc"], 1))
def test_killed_at_some_steps_the_bucket_has_the_old_or_the_new(server, worlds, what, tmp_path):
    found = killed_at(server, worlds["s3"], what, tmp_path, lambda n: [0, n // 4, n // 2, n - 1][not SOAK :: 2 - SOAK])
    assert found == sorted(found, key=["before", "after"].index)
    assert "before" in found


@pytest.mark.parametrize("what", few(["build", "rebuild", "add"], 1))
def test_killed_at_any_moment_the_store_is_the_old_or_the_new(server, worlds, what, tmp_path):
    """Also within a step of the engine."""
    world, moments = worlds["lance"], random.Random(what)
    assert server.run(world.job(what, world.copy(tmp_path, "whole", what), counted=False)) == 0
    latest = server.seconds
    killed = 0
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        after = ({"after": moments.uniform(0.1, 1) * latest} for _ in range(KILLS - killed))
        killed += len(states(server, world, what, folder, after))
        latest *= 0.7  # where the machine was busy when it was timed
        if killed >= KILLS:
            return
    pytest.fail("the moments do not lie within the change")


@pytest.mark.parametrize("kind", ["lance", "s3"])
def test_two_processes_at_once_lose_nothing(server, worlds, kind, tmp_path):
    world = worlds[kind]
    place = world.copy(tmp_path, "grown", "grow")
    server.start(*[world.job("grow", place, counted=False, seconds=LIVING) for _ in range(2)])
    assert server.wait() == [0, 0]
    model = stores.at(place).verify()
    changes_, grown = 2 * GROWTH, 35 + 2 * GROWTH * 8
    assert (model.version, model.n, model.next_key_id) == (4 + changes_, grown, grown)
    found = model.labels.sort_by("key_id")
    assert found["key_id"].to_pylist() == list(range(grown))
    assert sorted(found["source"].to_pylist()[35:]) == sorted([f"1 {i}" for i in range(8)] * changes_)


def test_one_that_is_killed_while_another_waits_loses_the_store_to_it(server, worlds, tmp_path):
    """In a bucket: the lease of the dead ends, and its rows are in no version."""
    world = worlds["s3"]
    place = world.copy(tmp_path, "waited", "add")
    step = (
        steps_of(server, world, "add", tmp_path).index("add") + 1
    )  # its rows are in the table, and no manifest names them
    server.start(world.job("add", place), step=step)
    assert server.wait() == [-signal.SIGKILL]
    assert key_table.KeyTable.latest(stores.at(place).address, "keys").rows > 35
    assert changes.remove(place, key_ids=[0]).version == 5
    assert stores.at(place).verify().n == 34
    check_tidy(place)


def test_a_killed_writer_holds_a_bucket_for_no_longer_than_its_lease(server, worlds, tmp_path, monkeypatch):
    world = worlds["s3"]
    place = world.copy(tmp_path, "held", "add")
    server.start(world.job("add", place), step=3)
    assert server.wait() == [-signal.SIGKILL]
    monkeypatch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 0.0)
    with pytest.raises(StoreError, match="is being written") as caught:
        changes.configure(place, k=2)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 10 * LEASE)
    assert changes.configure(place, k=2).version == 5
