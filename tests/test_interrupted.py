"""A killed or interrupted writer leaves the old or the new version of an index; on a full disk, nothing changes.

Run as a script, this file is the writer.
"""

import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import buckets
import killing
import lancedb
import numpy as np
import pytest
from conftest import SOAK, few, sampled
from sealing import one_line, snapshot
from stored import copied, everything, made
from tables import unit_rows, write_table

from retrieval_tip.cli import main
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.build import build_index
from retrieval_tip.index.changes import fit_index
from retrieval_tip.plugins.lance import lance_store
from retrieval_tip.plugins.lance.bucket import BucketFiles, storage_options
from retrieval_tip.server import manage
from retrieval_tip.store import files as store_files
from retrieval_tip.store import versions as store_versions
from retrieval_tip.store.files import LocalFiles

pytestmark = [killing.needs_fork, pytest.mark.timeout(180)]

D = 8
CLASSES = 4
KEPT = 3
ADDED = (24, 8, 3)
QUERIES = unit_rows(4, D, 99)
PRUNED_EVERY = 5
"""Number of versions after which old versions of a table are deleted. The next change reaches this number."""
KILLS = 8 if SOAK else 1
"""Number of random moments at which a change is killed."""
REFUSED = 7
"""Exit status of a job that ends with an error of ours."""
UNFITTED = {"alpha": 2.0, "beta": 4.0}
FITTED = {"metric": "within", "values": "one-hot"}


def make_tables(place, added=ADDED):
    """Write feature tables: three for the index, one to add, one to build from, and two of text weights."""
    sizes = zip(("0", "1", "2", "more", "other"), (*added, 5, 20), strict=True)
    for number, (name, n) in enumerate(sizes):
        labels = [f"class {i % CLASSES}" for i in range(n)]
        labels[-1] = "class new" if name == "more" else labels[-1]
        write_table(
            place / f"{name}.parquet",
            unit_rows(n, D, number),
            labels,
            [f"{name} {i}" for i in range(n)],
        )
    names = [f"class {i}" for i in range(CLASSES)]
    write_table(place / "text.parquet", unit_rows(CLASSES, D, 50), names)
    write_table(place / "new text.parquet", unit_rows(CLASSES + 1, D, 51), [*names, "class new"])


def table(tables, name):
    return open_source(tables / f"{name}.parquet")


def built(place, tables, name, index=None, how=UNFITTED):
    text = tables / "text.parquet"
    return build_index(table(tables, name), place, Reader(), text=text, index=index, **how)


def make_index(place, tables, index):
    """Create an index from three tables at version 4."""
    built(place, tables, "0", index)
    for name in ("1", "2"):
        changes.add(place, table(tables, name), Reader())
    changes.relabel(place, "class 3", where="source = '2 0'")


def rebuild(place):
    return changes.rebuild(
        place, **({"index": "Classes"} if "://" in str(place) else {"dtype": "float16"})
    )


def label_again(place):
    """Save a label as a session that has saved another one in this minute."""
    photo = changes.PhotoLabel("new.jpg", "ab" * 32, "class 0", "suggested", unit_rows(1, D, 60)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_versions.Writer, "replaces", True)
        changes.label(place, [photo], Reader())


def command(place, tables, index):
    """Build an index with the command line, and exit like it."""
    files = [str(tables / "other.parquet"), "--text", str(tables / "text.parquet")]
    options = [
        "--alpha",
        "2",
        "--beta",
        "4",
        "--index",
        index,
        "--device",
        "cpu",
        "--out",
        str(place),
    ]
    status = main(["-q", "index", "build", *files, *options], standalone_mode=False)
    if status:
        os._exit(status)


OPERATIONS = {
    "first": lambda place, tables, _: built(
        place, tables, "other", how=FITTED
    ),  # creates its table twice
    "build": lambda place, tables, index: built(place, tables, "other", index),
    "add": lambda place, tables, _: changes.add(
        place, table(tables, "more"), Reader(), text=tables / "new text.parquet"
    ),
    "label": lambda place, *_: label_again(place),
    "remove": lambda place, *_: changes.remove(place, where="source IN ('0 3', '1 2', '2 1')"),
    "remove late": lambda place, *_: changes.remove(place, where="source LIKE '2 %'"),
    "relabel": lambda place, *_: changes.relabel(
        place, "class 0", where="source IN ('1 1', '1 2')"
    ),
    "rebuild": lambda place, *_: rebuild(place),
    "fit": lambda place, *_: fit_index(place, **FITTED),
    "fit to values": lambda place, *_: fit_index(place, values="solved"),
    "rollback": lambda place, *_: changes.rollback(place),
    "gc": lambda place, *_: stores.at(place).collect(1),
    "move": lambda place, *_: manage.rename(place, "moved"),
    "duplicate": lambda place, *_: manage.duplicate(place, "copy"),
    "delete": lambda place, *_: manage.delete(place),
    "command": command,
}


def _work(job, steps):
    if job["counted"] and "://" not in job["place"]:
        steps.writes()
    elif job["counted"]:
        for owner, names in (
            (LocalFiles, ("put", "create", "delete")),
            (BucketFiles, ("put", "create", "delete")),
            (
                lancedb.table.LanceTable,
                ("add", "delete", "restore", "optimize", "create_index", "add_columns"),
            ),
            (lancedb.db.LanceDBConnection, ("create_table",)),
            (lancedb.table.Tags, ("create", "delete")),
            (os, ("fsync", "link")),
        ):
            for name in names:
                steps.before(owner, name)
        steps.events("fcntl.flock")
    try:
        OPERATIONS[job["name"]](job["place"], Path(job["tables"]), job["index"])
    except RetrievalTipError as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        os._exit(REFUSED)


def shrink_limits(patch):
    """Reduce the number of versions and the waiting times."""
    for owner, name, value in (
        (store_versions, "KEPT_VERSIONS", KEPT),
        (lance_store, "PRUNED_EVERY", PRUNED_EVERY),
        (store_versions, "UNFINISHED", datetime.timedelta()),
        (store_files, "LOCK_WAIT", 60.0),
    ):
        patch.setattr(owner, name, value)


if __name__ == "__main__":
    warnings.simplefilter(
        "ignore", RuntimeWarning
    )  # LanceDB warns of forks, but has not been used before the fork
    shrink_limits(pytest.MonkeyPatch())
    killing.serve(_work)
    raise SystemExit


@pytest.fixture(scope="module", autouse=True)
def _environment_of_the_server():
    with killing.one_thread(), pytest.MonkeyPatch.context() as patch:
        buckets.use(patch, buckets.endpoint())
        yield


@pytest.fixture(autouse=True)
def _limits(fresh, monkeypatch):
    shrink_limits(monkeypatch)


def answer(place):
    """Verify every byte or row, then return everything in which two versions can differ for a reader."""
    model = stores.at(place).verify()
    columns = [name for name in model.labels.column_names if name not in ("added_at", "version")]
    labels = model.labels.select(columns).sort_by("key_id")
    logits = np.concatenate([model.logits(QUERIES, k).numpy() for k in ("all", 5)])
    text = np.round(model.text_weights.numpy(), 5).tolist()
    return (
        np.round(logits, 3).tolist(),
        labels.to_pydict(),
        model.class_names,
        text,
        model.next_key_id,
    )


@dataclass
class World:
    """An index, its tables, and its answers before and after each uninterrupted operation.

    ``kind`` is ``lance``, ``s3`` or ``folder``; ``index`` is the type of index of a folder.
    """

    kind: str
    index: str | None
    tables: Path
    old: str = ""
    before: object = None
    after: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)

    def copy(self, folder, name, operation):
        """Copy the index byte for byte, except before the first version, and return the address."""
        return (made if operation == "first" else partial(copied, place=self.old))(
            folder, self.kind, name=name
        )

    def job(self, operation, place, counted=True):
        tables = str(self.tables)
        return {
            "name": operation,
            "place": place,
            "tables": tables,
            "index": self.index,
            "counted": counted,
        }

    def do(self, operation, place):
        OPERATIONS[operation](place, self.tables, self.index)

    def expected(self, operation):
        """Return the version and the answers after an uninterrupted operation."""
        if operation not in self.after:
            place = self.copy(self.tables, f"expected {operation}", operation)
            self.do(operation, place)
            self.after[operation] = stores.at(place).manifest().version, answer(place)
        return self.after[operation]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, _environment_of_the_server):
    found = {}
    for kind in ("Flat", "Classes", "lance", "s3"):
        store, index = (kind, None) if kind in ("lance", "s3") else ("folder", kind)
        world = found[kind] = World(store, index, tmp_path_factory.mktemp(kind))
        make_tables(world.tables)
        world.old = made(world.tables, store, "old")
        with pytest.MonkeyPatch.context() as patch:
            shrink_limits(patch)
            make_index(world.old, world.tables, world.index)
        world.before = answer(world.old)
    return found


def check_tidy(place, behind=False):
    """Check that the next writer has removed all rows, files, objects and tags of the killed writer."""
    at = stores.at(place)
    if "://" in place:
        if behind:  # the table has a version that no manifest names, which the next change removes
            changes.configure(place, temperature=2.0)
        manifest = at.manifest()
        options = storage_options(at.address) or None
        own = lancedb.connect(at.address.uri, storage_options=options).open_table("keys")
        assert (own.version, own.count_rows()) == (manifest.table.version, manifest.n)
        at.collect(1)
        assert list(own.tags.list()) == [f"kept-{manifest.table.version}"]
    versions = at.history()["version"].to_pylist()
    named = {file.name for version in versions for file in at.manifest(version).data_files}
    named |= {f"manifests/{version:06d}.json" for version in versions}
    named.add(f"newest/{versions[-1]:06d}-{at.manifest().next_key_id}")
    named |= {"clock"} if place.startswith("s3:") else set()
    assert len(versions) <= KEPT
    found = [name for name in everything(place) if name != "lock"]
    assert {name for name in found if not name.startswith("keys.lance")} == named
    assert not [name for name in found if name.endswith(".tmp")]
    at.verify()


def check_killed(place, world, operation):
    """Check that the old or the new version is intact, and that the next writer succeeds and removes leftovers."""
    at, (done, after) = stores.at(place), world.expected(operation)
    if operation == "first" and not at.exists():
        state = "before"
    else:
        version = at.manifest().version
        found = answer(place)
        kept = at.history()["version"].to_pylist()
        assert kept[-1] == version
        if operation == "gc":
            assert (version, found) == (4, world.before)
            state = "before" if kept == [2, 3, 4] else "after"
        else:
            assert (version, found) in [(4, world.before), (done, after)]
            state = "before" if version != done else "after"
    if state == "before" or operation == "gc":
        world.do(operation, place)
        assert (at.manifest().version, answer(place)) == (done, after)
    else:
        changes.configure(place, k=7)
        assert (at.manifest().version, answer(place)) == (done + 1, after)
    check_tidy(place, behind=operation in ("rollback", "gc"))
    return state


def stopped(server, world, operation, folder, moments):
    """Stop a change at each moment. Return the exit statuses, and whether each stop left the old or the new version."""
    statuses, states = [], []
    for number, moment in enumerate(moments):
        place = world.copy(folder, str(number), operation)
        statuses.append(server.run(world.job(operation, place, "step" in moment), **moment))
        if statuses[-1] > 128:  # a signal that the command handles
            assert not list(Path(place).rglob(".*"))
        states.append(check_killed(place, world, operation))
    return statuses, states


NEEDED = {
    "first": "create_table",
    "build": "create_table",
    "add": "add",
    "remove": "delete",
    "relabel": "add",
    "rebuild": "create_index",
    "gc": "optimize",
    "fit": "create_table",
}
WHOLE = {
    "move": ({"old"}, {"moved"}),
    "duplicate": ({"old"}, {"old", "copy"}),
    "delete": ({"old"}, set()),
}
"""Indexes before and after a change of the whole folder."""
CHANGES = [name for name in OPERATIONS if name not in ("first", "command", *WHOLE)]


def steps_of(server, world, operation, folder):
    """Return the steps of an uninterrupted operation."""
    if operation not in world.steps:
        assert server.run(world.job(operation, world.copy(folder, "counted", operation))) == 0
        steps = server.steps
        # LanceDB may have to be asked several times to delete versions, which depends on the clock.
        again = (at for at in range(len(steps)) if steps[at - 2 : at + 1] == ["optimize"] * 3)
        steps = steps[: next(again, None)]
        world.steps[operation] = steps
        if world.index is None:
            assert operation not in NEEDED or NEEDED[operation] in steps
            assert operation == "gc" or "create" in steps
        else:
            assert {"fcntl.flock", "os.remove"} <= set(steps) or operation == "first"
            assert operation == "gc" or {"fsync", "os.rename", "open to write"} <= set(steps)
    return world.steps[operation]


FOLDERS = [
    *(("Flat", name) for name in CHANGES),
    *(("Classes", name) for name in ("add", "relabel", "rebuild")),
]
FAILING = ["build", "add", "first", "label", "gc", "rebuild", "rollback"]
STOPPED = [
    *((*case, "SIGKILL", 4) for case in few([*FOLDERS, ("Flat", "first")], 4)),
    *(("lance", name, "SIGKILL", 4) for name in few(["first", *CHANGES], 2)),
    *(("s3", name, "SIGKILL", 2) for name in few(["add", "first", "label", "gc"], 1)),
    *(("Flat", name, "EIO", 8) for name in few(FAILING, 3)),
    ("Flat", "command", "SIGINT SIGTERM SIGHUP", 6),
]
"""Kind of index, change, the signals or the error of the disk that stop it, and the number of steps to try."""


@pytest.mark.parametrize(("kind", "operation", "how", "most"), STOPPED)
def test_a_change_stopped_at_any_step_leaves_the_old_or_the_new_version(
    server, worlds, kind, operation, how, most, tmp_path
):
    """A killed process, an interrupted command, which also removes its files, or a failed system call."""
    world = worlds[kind]
    names = steps_of(server, world, operation, tmp_path)
    steps = [at for at, name in enumerate(names) if how != "EIO" or name != "fcntl.flock"]
    if kind != "s3":
        steps = [steps[i] for i in sampled(len(steps), most)]
    elif operation == "gc":
        steps = [0, len(names) // 2]
    else:  # before the manifest, when the rows are there, and after it
        steps = [names.index("create"), len(names) // 2]
    hows = [how.split()[at % len(how.split())] for at in steps]
    moments = ({"step": at, "how": one} for at, one in zip(steps, hows, strict=True))
    statuses, found = stopped(server, world, operation, tmp_path, moments)
    if how == "EIO":
        assert REFUSED in statuses
        assert set(statuses) <= {0, REFUSED}
        if operation != "gc":  # which deletes one version after another
            assert [state == "before" for state in found] == [
                status == REFUSED for status in statuses
            ]
        return
    assert statuses == [
        -signal.SIGKILL if one == "SIGKILL" else 128 + getattr(signal, one) for one in hows
    ]
    # The new version takes over at one moment, with steps before and after it.
    assert found == sorted(found, key=["before", "after"].index)
    assert set(found) == {"before", "after"} or kind == "s3"
    assert "before" in found


@pytest.mark.parametrize("operation", WHOLE)
def test_a_killed_rename_copy_or_removal_leaves_whole_folders(server, worlds, operation, tmp_path):
    """Every visible folder can be read, and the next change removes hidden leftovers."""
    world = worlds["Flat"]
    found = []
    assert server.run(world.job(operation, world.copy(tmp_path / "counted", "old", operation))) == 0
    for step in sampled(len(server.steps)):
        beside = tmp_path / str(step)
        place = world.copy(beside, "old", operation)
        assert server.run(world.job(operation, place), step=step) == -signal.SIGKILL
        left = {path.name for path in beside.iterdir() if not path.name.startswith(".")}
        assert left in WHOLE[operation]
        assert all(answer(beside / name) == world.before for name in left)
        found.append(WHOLE[operation].index(left))
        shutil.copytree(world.old, beside / "another")
        manage.rename(beside / "another", "last")
        assert {path.name for path in beside.iterdir()} == left | {"last"}
    assert found == sorted(found)
    assert 0 in found


ANY = [
    ("Flat", "add"),
    ("lance", "rebuild"),
    ("Classes", "rebuild"),
    ("lance", "build"),
    ("Flat", "remove"),
    ("lance", "add"),
    ("Classes", "build"),
]


@pytest.mark.parametrize(("kind", "operation"), few(ANY, 2))
def test_a_change_killed_at_a_random_moment_leaves_the_old_or_the_new_version(
    server, worlds, kind, operation, tmp_path
):
    """The moment can also lie within a step."""
    world = worlds[kind]
    moments = random.Random(operation)
    seconds = []
    for number in range(2):
        assert (
            server.run(
                world.job(
                    operation, world.copy(tmp_path, f"whole {number}", operation), counted=False
                )
            )
            == 0
        )
        seconds.append(server.seconds)
    killed = 0
    latest = min(seconds)
    for attempt in range(8):
        after = ({"after": moments.uniform(0.1, 1) * latest} for _ in range(KILLS - killed))
        killed += sum(
            map(bool, stopped(server, world, operation, tmp_path / str(attempt), after)[0])
        )
        latest *= 0.7  # in case the machine was busy during the timing
        if killed >= KILLS:
            return
    pytest.fail("no kill happened during the change")


PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
ROWS = (300, 90, 40)
WRITING = [name for name in CHANGES if name not in ("fit to values", "gc")]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Tables and another index, on a disk with enough room."""
    room = tmp_path_factory.mktemp("room")
    make_tables(room, ROWS)
    built(room / "others", room, "1", "Flat")
    return room


def resize(disk, free):
    """Leave ``free`` bytes, a multiple of a page. The size stays above 0, which would mean no limit."""
    found = os.statvfs(disk)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    subprocess.run(["mount", "-o", f"remount,size={max(used + free, PAGE)}", disk], check=True)


def change_on(name, folder, room, index):
    """Change an index, and return its new address."""
    if name == "merge":
        changes.merge(folder, room / "others")
    elif name == "set":
        changes.configure(folder, alpha=3.0)
    elif name == "first":
        folder = folder.with_name("deep") / "index"
        built(folder, room, "0", index)
    else:
        OPERATIONS[name](folder, room, index)
    return folder.with_name("copy") if name == "duplicate" else folder


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("first", "Flat"),
        ("duplicate", "Flat"),
        *few(
            [(name, index) for index in ("Flat", "Classes") for name in [*WRITING, "merge", "set"]],
            3,
        ),
    ],
)
def test_a_change_on_a_full_disk_changes_nothing_and_succeeds_with_more_room(
    small_disk, room, tmp_path, name, index
):
    """The disk gets one more page of room each time; outside a soak, ten. Each refusal names the reason."""
    disk = small_disk(8192)
    for folder in (disk / "index", tmp_path / "index"):
        make_index(folder, room, index)
    expected = change_on(name, tmp_path / "index", room, index)
    before = snapshot(disk)
    old = answer(disk / "index")
    for pages in range(0, 1000, 1 if SOAK else 10):
        resize(disk, pages * PAGE)
        try:
            changed = change_on(name, disk / "index", room, index)
            break
        except RetrievalTipError as error:
            one_line(error, "No space left", disk)
            assert snapshot(disk) == before
            assert answer(disk / "index") == old
    assert pages > 1
    assert answer(changed) == answer(expected)
    assert stores.at(changed).manifest().version == stores.at(expected).manifest().version
    assert not list(disk.rglob("*.tmp"))


def test_gc_frees_space_on_a_full_disk(small_disk, room):
    folder = small_disk(8192) / "index"
    make_index(folder, room, "Flat")
    before = answer(folder)
    resize(folder.parent, 0)
    with pytest.raises(RetrievalTipError, match="No space left"):
        changes.rebuild(folder)
    gone, freed = stores.at(folder).collect(1)
    assert (gone, freed > 0) == ([2, 3], True)
    assert answer(folder) == before
    assert stores.at(folder).history()["version"].to_pylist() == [4]
