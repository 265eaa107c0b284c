"""No version is lost: to a refused command, a missing manifest, a clock, a slow upload, or damage that is copied."""

import itertools
import logging
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import SOAK, few, ok
from fastapi.testclient import TestClient
from sealing import refused
from serving import app_of
from stored import copied, everything, made, path_of, put
from tables import unit_rows, write_table

from retrieval_tip import Classifier
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import RetrievalTipError, StoreError, warn_once
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.build import build_index
from retrieval_tip.model import Index
from retrieval_tip.plugins.lance import lance_store
from retrieval_tip.plugins.lance.bucket import BucketFiles
from retrieval_tip.store import versions as store_versions
from retrieval_tip.store.edits import Edits
from retrieval_tip.store.files import FAST_BYTES
from retrieval_tip.store.newest import Newest

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("bucket", "one_thread")]

KINDS = ("folder", "lance", "s3")
D, N = 8, 24
NAMES = ["cat", "dog", "newt"]
LEFT = (
    "data/labels-0123456789abcdef.parquet",
    "data/.keys.npy.01234567.tmp",
    ".x.01234567.tmp",
    "manifests/.y.01234567.tmp",
)
"""Files that a killed writer leaves."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Feature tables, good and bad, and tables of groups."""
    place = tmp_path_factory.mktemp("tables")
    labels = [NAMES[i % 3] for i in range(N)]
    write_table(place / "train.parquet", unit_rows(N, D), labels)
    write_table(place / "more.parquet", unit_rows(3, D, 1), NAMES, ["a", "b", "c"])
    write_table(place / "later.parquet", unit_rows(2, D, 2), NAMES[:2], ["d", "e"])
    write_table(place / "wide.parquet", unit_rows(3, D + 1, 1), NAMES)
    write_table(place / "unlabelled.parquet", unit_rows(3, D, 1))
    write_table(place / "nan.parquet", np.full((3, D), np.nan), NAMES)
    write_table(place / "stranger.parquet", unit_rows(3, D, 1), ["yak"] * 3)
    write_table(place / "text.parquet", unit_rows(3, D, 3), NAMES)
    (place / "groups.csv").write_text("class,order\ncat,carnivora\ncat,rodentia\n")
    (place / "suspects.csv").write_text("key_id,label,suggested\n0,cat,yak\n")
    return place


@pytest.fixture(scope="module")
def built(tables, tmp_path_factory):
    """An index of three versions in each kind of store."""
    place = tmp_path_factory.mktemp("built")
    found = {}
    for kind in KINDS:
        found[kind] = made(place, kind, kind)
        train = open_source(tables / "train.parquet")
        build_index(train, found[kind], Reader(), text=tables / "text.parquet", fit="none")
        changes.configure(found[kind], k=5)
        changes.add(found[kind], open_source(tables / "more.parquet"), Reader())
    return found


@pytest.fixture(params=KINDS)
def place(request, built, tmp_path):
    """A copy of the index at version 3, in each kind of store."""
    return copied(tmp_path, request.param, built[request.param])


@pytest.fixture(autouse=True)
def _untold():
    warn_once.cache_clear()


def own(place):
    """Return everything in a store except its lock and the rows of its table, which a refused change may write."""
    return {
        name: data
        for name, data in everything(place).items()
        if name != "lock" and "keys.lance" not in name
    }


REFUSED = """
index remove PLACE --key-ids 9999 | index remove PLACE --key-ids 0,9999 | index remove PLACE --where "label = 'yak'"
index remove PLACE
index remove PLACE --where "key_id >= 0" | index remove PLACE --where "nonsense" | index remove PLACE --key-ids x
index relabel PLACE yak --key-ids 0 | index relabel PLACE cat --key-ids 9999 | index relabel PLACE cat
index rename PLACE yak emu | index rename PLACE cat "" | index rename PLACE cat "a{newline}b"
index set PLACE | index set PLACE --alpha nan | index set PLACE --temperature 0 | index set PLACE -k 0
index set PLACE --index Nonsense
index set PLACE --groups TABLES/groups.csv | index set PLACE --groups TABLES/missing.csv
index set PLACE --dtype float8
index add PLACE TABLES/missing.parquet | index add PLACE TABLES/wide.parquet
index add PLACE TABLES/unlabelled.parquet
index add PLACE TABLES/nan.parquet | index add PLACE TABLES/stranger.parquet
index add PLACE TABLES/more.parquet --shots 0
index add PLACE TABLES/stranger.parquet --text TABLES/text.parquet
index merge PLACE PLACE | index merge PLACE TABLES/missing | index rollback PLACE 99 | index rollback PLACE 0
index gc PLACE --keep 0
index audit PLACE --apply TABLES/suspects.csv | index audit PLACE --apply TABLES/missing.csv
index build TABLES/missing.parquet --out PLACE | index build TABLES/nan.parquet --out PLACE --text TABLES/text.parquet
index build TABLES/train.parquet --out PLACE --index Nonsense
index build TABLES/train.parquet --out PLACE --alpha nan
index build TABLES/train.parquet --out PLACE --text TABLES/wide.parquet
index build TABLES/unlabelled.parquet --out PLACE
index build TABLES/train.parquet --out PLACE --values solved --index Classes
index clone PLACE PLACE
fit PLACE --metric within --values solved --prior TABLES/missing
"""
"""Commands that are refused."""


@pytest.mark.parametrize("left", few([LEFT, ()], 1))
def test_a_refused_command_leaves_every_byte(run, place, tables, left):
    """It also leaves what a killed writer has left, because somebody may need it."""
    for name in left:
        put(place, name, b"left")
    before = own(place)
    for line in REFUSED.strip().splitlines():
        for command in line.replace("PLACE", place).replace("TABLES", str(tables)).split("|"):
            failed = run(*shlex.split(command.format(newline="\n")))
            assert failed.exit_code in (1, 2), (command, failed.output)
        assert own(place) == before, line
    ok("index remove", place, "--key-ids", 0)
    gone = (
        LEFT[:1] if place.startswith("s3:") else LEFT
    )  # no temporary file is written into a bucket
    assert not set(gone) & own(place).keys()


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("command", ["add", "build"])
def test_a_disk_that_a_killed_writer_has_filled_recovers_with_the_next_change(
    built, tables, small_disk, kind, command
):
    disk = small_disk(4096)
    place = copied(disk, kind, built[kind])
    left = path_of(place) / LEFT[0]
    with left.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        list(map(file.write, itertools.repeat(bytes(1 << 12))))
    words = ["add", place, tables / "later.parquet"]
    if command == "build":
        words = [
            "build",
            tables / "train.parquet",
            "--out",
            place,
            "--text",
            tables / "text.parquet",
        ]
    ok("index", *words)
    assert stores.at(place).verify().version == 4
    assert not left.exists()


def test_the_loss_of_the_newest_version_is_noticed_and_can_be_undone_or_accepted(
    place, tables, caplog
):
    """Readers warn, writers refuse and delete nothing, and a key id is never used again."""
    name = "manifests/000003.json"
    lost = everything(place)[name]
    whole = own(place)
    next_key_id = stores.at(place).manifest().next_key_id
    put(place, name, None)
    before = own(place)
    with caplog.at_level(logging.WARNING):
        assert stores.at(place).load().version == 2
    (warning,) = {record.getMessage() for record in caplog.records}
    command = shlex.join(["retrieval-tip", "index", "rollback", place, "2"])
    assert warning.startswith(
        f"{place}/{name}: is missing, but version 3 was written; restore the file, or "
    )
    assert warning.endswith(command)
    calls = (
        lambda: changes.remove(place, key_ids=[0]),
        lambda: changes.configure(place, k=2),
        lambda: changes.gc(place, keep=1),
        lambda: changes.rebuild(place),
        lambda: changes.rollback(place),
        lambda: changes.rollback(place, 1),
        lambda: changes.add(place, open_source(tables / "later.parquet"), Reader()),
        lambda: build_index(open_source(tables / "more.parquet"), place, Reader(), fit="none"),
    )
    for call in calls:
        refused(call, f"{place}/{name}", command)
        assert own(place) == before
    put(place, name, lost)
    assert stores.at(place).verify().version == 3
    assert own(place) == whole
    put(place, name, None)
    ok(*shlex.split(command)[1:])
    assert stores.at(place).verify().version == 4
    assert stores.at(place).history()["version"].to_pylist() == [1, 2, 4]
    added = changes.add(place, open_source(tables / "later.parquet"), Reader())
    assert min(added.key_ids) == next_key_id


def test_an_index_without_any_manifest_is_not_built_again(place, tables):
    for number in (1, 2, 3):
        put(place, f"manifests/{number:06d}.json", None)
    before = own(place)
    train = open_source(tables / "train.parquet")
    refused(
        lambda: build_index(train, place, Reader(), fit="none"),
        "000003.json",
        "restore",
    )
    assert own(place) == before


def test_an_index_without_the_second_place_has_lost_nothing(place):
    for name in own(place):
        if name.startswith("newest/"):
            put(place, name, None)
    assert changes.remove(place, key_ids=[0]).version == 4
    assert [name for name in own(place) if name.startswith("newest/")] == [f"newest/000004-{N + 3}"]


def test_a_commit_between_two_reads_is_no_loss(place, monkeypatch, caplog):
    """Readers look at the second place first."""
    real = store_versions.Versions.names

    def late(self):
        monkeypatch.setattr(store_versions.Versions, "names", real)
        changes.configure(place, k=2)
        return real(self)

    monkeypatch.setattr(store_versions.Versions, "names", late)
    assert stores.at(place).manifest().version == 4
    assert not caplog.records


def test_the_highest_version_never_goes_down(place):
    """A slow writer in a bucket may note its version after a later one."""
    files = stores.at(place).files
    for version, next_key_id in ((5, 50), (4, 40), (5, 50)):
        Newest(version, next_key_id).write(files)
        assert Newest.read(files) == (5, 50)


# The clock of a bucket


@pytest.fixture
def slow(built, tmp_path, monkeypatch):
    """Return a function that makes the next commit to a copy of the index in a bucket call ``meanwhile`` first."""
    place = copied(tmp_path, "s3", built["s3"])

    def wait(meanwhile):
        real = BucketFiles.create

        def create(self, name, data):
            monkeypatch.setattr(BucketFiles, "create", real)
            meanwhile()
            return real(self, name, data)

        monkeypatch.setattr(BucketFiles, "create", create)
        return place

    monkeypatch.setattr(store_versions, "UNFINISHED", timedelta(hours=24))
    return wait


@pytest.mark.parametrize("ahead", few(["+70m", "+23h", "+40d"], 1))
def test_a_clock_that_is_ahead_deletes_no_file_that_another_process_is_writing(slow, tables, ahead):
    """The other process is a real one, under faketime."""
    if subprocess.run(["which", "faketime"], capture_output=True, check=False).returncode:
        pytest.skip("SKIPPED: needs faketime (Debian's package)")
    code = "import sys; from retrieval_tip.cli import main; main()"

    def collect():
        command = [
            "faketime",
            "-f",
            ahead,
            sys.executable,
            "-c",
            code,
            "index",
            "gc",
            place,
            "--keep",
            "1",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 0, done.stderr

    place = slow(lambda: None)
    slow(collect)
    added = changes.add(place, open_source(tables / "later.parquet"), Reader())
    assert stores.at(place).verify().version == added.version == 4


def test_a_file_deleted_during_a_slow_upload_is_put_again(slow, tables):
    """As if more than a day has passed between the upload and the manifest."""

    def collect():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store_versions, "UNFINISHED", timedelta(0))
            stores.at(place).collect(1)

    place = slow(lambda: None)
    slow(collect)
    changes.add(place, open_source(tables / "later.parquet"), Reader())
    assert stores.at(place).verify().version == 4


def test_an_upload_of_half_a_day_is_repeated_before_the_manifest(slow, tables, monkeypatch):
    """Then no other process finds it old while the manifest is created."""
    put_again = []
    real = BucketFiles.put

    def note(self, name, *parts):
        put_again.append(name)
        real(self, name, *parts)

    place = slow(lambda: None)
    monkeypatch.setattr(store_versions, "UNFINISHED", timedelta(0))
    monkeypatch.setattr(BucketFiles, "put", note)
    changes.add(place, open_source(tables / "later.parquet"), Reader())
    uploads = [name for name in put_again if name.startswith("data/")]
    assert uploads
    assert all(uploads.count(name) == 2 for name in uploads)


def test_a_version_whose_rows_are_deleted_meanwhile_is_withdrawn(slow, tables):
    """They cannot be put again."""

    def delete_rows():
        manifest = stores.at(place).manifest()
        for name in everything(place):
            if name.startswith("keys.lance/_versions/") and name not in manifest.digests:
                put(place, name, None)

    place = slow(lambda: None)
    slow(delete_rows)
    with pytest.raises(RetrievalTipError):
        changes.add(place, open_source(tables / "later.parquet"), Reader())
    assert stores.at(place).history()["version"].to_pylist() == [1, 2, 3]


# Damage


def flip(path):
    """Flip a bit of the last byte but four, in place, so that an index that has mapped the file sees it."""
    with path.open("rb+") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 64]))


@pytest.mark.parametrize("verify", ["full", "fast"])
def test_damage_under_an_open_index_does_not_get_a_valid_digest(built, tmp_path, verify):
    place = copied(tmp_path, "folder", built["folder"])
    index = Index.load(place, verify=verify)
    name = index.manifest.files["keys"].name
    flip(path_of(place) / name)
    before = own(place)
    index = index.edited(Edits(remove=[0]))
    refused(lambda: index.save(place), name, "damaged")
    refused(lambda: index.save(tmp_path / "copy"), name, "damaged")
    assert own(place) == before


@contextmanager
def server(place, tables):
    """Yield the edits of a server. Each returns the error, or raises StoreError."""
    feature = {"features": unit_rows(1, WIDE, 9).tolist(), "labels": ["cat"]}

    def edit(method, what, **body):
        answer = http.request(method, f"/v1/indexes/{Path(place).name}/{what}", **body)
        if answer.status_code == 503:
            raise StoreError(answer.json()["detail"])
        assert answer.status_code in (200, 201), answer.text

    with TestClient(app_of(place, token="t"), headers={"Authorization": "Bearer t"}) as http:
        yield [
            partial(edit, "POST", "keys", json=feature),
            partial(edit, "DELETE", "keys?key_id=1"),
        ]


@contextmanager
def python(place, tables):
    more = open_source(tables / "wide.parquet")
    photo = changes.PhotoLabel("x", "0" * 64, "cat", "random", unit_rows(1, WIDE, 9)[0])
    yield [
        lambda: changes.add(place, more, Reader()),
        lambda: changes.label(place, [photo], Reader()),
        lambda: changes.remove(place, key_ids=[1]),
    ]


@contextmanager
def classifier(place, tables):
    opened = Classifier.load(place)
    yield [
        lambda: opened.add(tables / "wide.parquet"),
        lambda: opened.remove(key_ids=[1]),
    ]
    assert opened.index.version == stores.at(place).manifest().version


WIDE = 1024
"""Number of values of a key, of which 1,100 are more than a fast check hashes."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of an index whose keys only a full check reads, and of a table of one more key."""
    place = tmp_path_factory.mktemp("large")
    index = Index.from_features(unit_rows(1100, WIDE), ["cat", "dog"] * 550, ["cat", "dog"])
    index.save(place / "index")
    assert (place / "index" / index.manifest.files["keys"].name).stat().st_size > FAST_BYTES
    write_table(place / "wide.parquet", unit_rows(1, WIDE, 8), ["dog"])
    return place


@pytest.mark.parametrize("door", [server, python, classifier])
def test_an_edit_refuses_damage_and_succeeds_when_it_is_mended(large, tmp_path, door):
    """The index was opened before its keys were damaged."""
    place = copied(tmp_path, "folder", (large / "index").as_posix())
    name = stores.at(place).manifest().files["keys"].name
    with door(place, large) as edits:
        flip(path_of(place) / name)
        before = own(place)
        for edit in edits:
            refused(edit, name, "damaged")
            assert own(place) == before
        flip(path_of(place) / name)
        for number, edit in enumerate(edits, 2):
            edit()
            assert stores.at(place).verify().version == number


def test_damaged_rows_of_a_table_are_not_merged(built, tmp_path, monkeypatch):
    """Merging copies all rows into files with new digests."""
    place = copied(tmp_path, "lance", built["lance"])
    name = max(name for name in stores.at(place).manifest().digests if "/data/" in name)
    raw = everything(place)[name]
    at = raw.find(unit_rows(N, D)[0].tobytes()[:8]) if SOAK else len(raw) // 3
    put(place, name, raw[:at] + bytes([raw[at] ^ 64]) + raw[at + 1 :])
    monkeypatch.setattr(lance_store, "PRUNED_EVERY", 4)
    monkeypatch.setattr(store_versions, "KEPT_VERSIONS", 1)
    refused(lambda: changes.configure(place, k=2), name, "damaged")
