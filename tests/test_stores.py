"""One contract for every store: a folder, and LanceDB on a disk and in a bucket.

Expected answers are computed in float64 from the keys and labels of the index.
"""

import datetime
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import buckets
import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SOAK, few
from dense import affinity, cache_logits, nearest
from fastapi.testclient import TestClient
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from sealing import refused
from serving import app_of
from stored import copied, done, everything, labels_of, made, path_of, put, rows_of, source
from tables import odd_columns, unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.index import added_photos, changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.build import build_index
from retrieval_tip.plugins.lance import key_table, lance_store
from retrieval_tip.plugins.lance import rows as lance_rows
from retrieval_tip.plugins.lance.bucket import BucketFiles
from retrieval_tip.settings import Settings
from retrieval_tip.store import versions as store_versions
from retrieval_tip.store.files import LocalFiles
from retrieval_tip.store.labels import VERSIONS_SCHEMA
from retrieval_tip.store.manifest import Table

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("bucket", "one_thread")]

KINDS = ("folder", "lance", "s3")
TRIED = KINDS if SOAK else KINDS[:2]
"""Kinds that most tests try. Only a soak tries all tests in a bucket."""
D, N = 16, 60
HOSTILE = "it's; DROP TABLE keys --"
NAMES = ["cat", HOSTILE, 'naïve "日本" %_\\']
BARE = "never seen"
"""A class with text weights but without keys."""
ALPHA, BETA = 1.5, 4.0
QUERIES = unit_rows(12, D, 99)
FORMS = ((None, True), (64, True), (8, True), (8, False))
"""Combinations of k and tail."""
EXACT = 1e-4


@dataclass
class Truth:
    """Expected contents of an index: keys and labels by key id, and logits computed from them."""

    names: list[str]
    text: np.ndarray
    keys: dict[int, np.ndarray] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    alpha: float = ALPHA
    beta: float = BETA
    scale: float = 100.0

    def arrays(self):
        ids = sorted(self.keys)
        keys = np.array([self.keys[i] for i in ids], dtype=np.float64)
        return np.array(ids), keys, np.array([self.names.index(self.labels[i]) for i in ids])

    def logits(self, features, k=None, tail=True):
        _, keys, classes = self.arrays()
        A = affinity(features, keys)
        cache = cache_logits(A, classes, len(self.names), self.beta, met=nearest(A, k), tail=tail)
        return self.scale * affinity(features, self.text) + self.alpha * cache

    def remove(self, *key_ids):
        for i in key_ids:
            del self.keys[i], self.labels[i]


def check(place, truth, forms=((None, True), (8, True))):
    """Verify an index, and check its classes, labels and answers."""
    model = stores.at(place).verify()
    assert model.class_names == truth.names
    rows = labels_of(place)
    assert {i: row["label"] for i, row in rows.items()} == truth.labels
    assert all(row["class_id"] == truth.names.index(row["label"]) for row in rows.values())
    assert model.counts == [
        sum(label == name for label in truth.labels.values()) for name in truth.names
    ]
    for k, tail in forms:
        assert_allclose(
            model.logits(QUERIES, k or "all", tail).numpy(),
            truth.logits(QUERIES, k, tail),
            atol=EXACT,
        )
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An index of sixty keys of three classes, and a class without keys, in each kind of store."""
    place = tmp_path_factory.mktemp("base")
    features = unit_rows(N, D)
    labels = [NAMES[i % 7 % 3] for i in range(N)]
    table = source(
        place / "train.parquet",
        features,
        labels,
        [f"it's {i}" for i in range(N)],
        camera=list("abc") * 20,
    )
    names = [*NAMES, BARE]
    text = unit_rows(4, D, 1)
    write_table(place / "text.parquet", text, names)
    found = {}
    for kind in KINDS:
        found[kind] = made(place, kind, kind)
        build_index(
            table,
            found[kind],
            Reader(),
            text=place / "text.parquet",
            alpha=ALPHA,
            beta=BETA,
            k=None,
        )
    truth = Truth(names, text, dict(enumerate(features)), dict(enumerate(labels)))
    return found, truth, place


@dataclass
class Pets:
    place: str
    truth: Truth
    tables: Path
    kind: str

    @property
    def store(self):
        return stores.at(self.place)

    def open(self, **more):
        return self.store.load(**more)

    def check(self, **more):
        return check(self.place, self.truth, **more)

    def refused(self, call, *words, error=StoreError):
        """Check that a call is refused and changes nothing."""
        version = self.store.manifest()
        before = labels_of(self.place)
        text = refused(call, *words, error=error)
        assert self.store.manifest() == version
        assert labels_of(self.place) == before
        return text

    def table(self, features, labels, **more):
        number = len(list(self.tables.glob("more-*.parquet")))
        ids = [f"more {number} {i}" for i in range(len(labels))]
        return source(self.tables / f"more-{number}.parquet", features, labels, ids, **more)

    def add(self, features, labels, **more):
        table = {name: more.pop(name) for name in list(more) if name not in ("text", "shots")}
        added = changes.add(self.place, self.table(features, labels, **table), Reader(), **more)
        for i, row, label in zip(added.key_ids, features, labels, strict=True):
            assert i not in self.truth.keys
            self.truth.keys[i], self.truth.labels[i] = row, label
        return added


def pets_of(kind, base, tmp_path):
    found, truth, _ = base
    own = Truth(list(truth.names), truth.text, dict(truth.keys), dict(truth.labels))
    return Pets(copied(tmp_path, kind, found[kind]), own, tmp_path, kind)


@pytest.fixture(params=TRIED)
def pets(request, base, tmp_path):
    """A copy of the index, in each kind of store."""
    return pets_of(request.param, base, tmp_path)


@pytest.fixture(params=TRIED[1:])
def lance_pets(request, base, tmp_path):
    """A copy of the index in LanceDB."""
    return pets_of(request.param, base, tmp_path)


@pytest.fixture
def local_pets(base, tmp_path):
    """A copy of the index in LanceDB on a disk."""
    return pets_of("lance", base, tmp_path)


def test_a_build_contains_the_keys_labels_and_columns_of_its_source(pets):
    pets.check(forms=FORMS)
    store = pets.store
    rows = labels_of(pets.place)
    manifest = store.manifest()
    assert (manifest.version, manifest.parent, manifest.n, manifest.d, manifest.next_key_id) == (
        1,
        None,
        N,
        D,
        N,
    )
    assert (manifest.dtype, manifest.index, manifest.change) == ("float32", "Flat", "build")
    assert (manifest.settings.alpha, manifest.settings.beta, manifest.settings.k) == (
        ALPHA,
        BETA,
        None,
    )
    assert store.exists()
    assert rows_of(store.query("SELECT * FROM labels")) == rows
    assert [(rows[i]["source"], rows[i]["camera"]) for i in range(N)] == [
        (f"it's {i}", "abc"[i % 3]) for i in range(N)
    ]
    for name in NAMES:  # shots are numbered in the order of the source
        shots = [row["shot"] for _, row in sorted(rows.items()) if row["label"] == name]
        assert shots == list(range(len(ids_of(pets, name))))
    counted = store.query("SELECT label, keys FROM class_counts ORDER BY class_id").to_pylist()
    assert {row["label"]: row["keys"] for row in counted if row["keys"]} == Counter(
        pets.truth.labels.values()
    )
    versions = store.query("SELECT version, change, keys FROM versions").to_pylist()
    assert versions == [{"version": 1, "change": "build", "keys": N}]
    assert len(store.query("SELECT * FROM versions WHERE created_at > '2026-01-01'")) == 1
    assert store.history().schema == VERSIONS_SCHEMA
    facts = store.describe()
    assert (facts["folder"], facts["n"], facts["classes"], facts["k"]) == (pets.place, N, 4, "all")
    assert (facts["keys_per_class"]["least"], facts["earlier_versions"]) == (0, [])


@pytest.mark.parametrize("kind", TRIED)
def test_an_index_of_one_key_answers(kind, tmp_path):
    place = made(tmp_path, kind)
    features = unit_rows(1, 4, 3)
    table = source(tmp_path / "one.parquet", features, ["only"])
    built = build_index(table, place, Reader(), fit="none")
    truth = Truth(
        ["only"],
        np.zeros((1, 4)),
        {0: features[0]},
        {0: "only"},
        built.settings.alpha,
        built.settings.beta,
    )
    asked = unit_rows(3, 4, 5)
    for k in (None, 1, 64):
        assert_allclose(
            built.logits(asked, k).numpy(), truth.logits(asked, k), rtol=1e-4, atol=EXACT
        )
    assert len(built.classify(asked, k=64)[0].neighbours) == 1
    stores.at(place).verify()
    refused(lambda: changes.remove(place, key_ids=[0]), "at least one key", error=InputError)


def test_columns_and_class_names_of_added_keys_may_be_new(pets, tmp_path):
    """``test_living.py`` makes sure that keys and answers are right after any edits."""
    pets.add(unit_rows(2, D, 20), ["cat", HOSTILE], camera=["z", None], weather=["sun", "rain"])
    names = [*pets.truth.names, "a' OR '1'='1", "日"]
    new = unit_rows(2, D, 21)
    text = write_table(tmp_path / "new.parquet", new, names[-2:])
    pets.truth.names = names
    pets.truth.text = np.concatenate([pets.truth.text, new])
    added = pets.add(
        unit_rows(4, D, 22), [*names[-2:], names[-2], BARE], text=text, weather=["fog"] * 4
    )
    assert added.classes == names[-2:]
    pets.check()
    rows = labels_of(pets.place)
    found = [(rows[i]["camera"], rows[i]["weather"]) for i in (0, 60, 61, 62)]
    assert found == [("a", None), ("z", "sun"), (None, "rain"), (None, "fog")]
    pets.refused(
        lambda: pets.add(unit_rows(1, D, 3), ["without text"]), "without text", error=InputError
    )
    pets.refused(
        lambda: pets.add(unit_rows(2, D, 21), ["cat", "cat"], camera=[1, 2]),
        "camera",
        error=InputError,
    )


def ids_of(pets, label):
    return [i for i, own in pets.truth.labels.items() if own == label]


def test_keys_are_found_removed_and_relabelled_by_id_and_by_condition(pets):
    place = pets.place
    model = pets.open()
    before = labels_of(pets.place)
    for name in [*NAMES, BARE, "nobody", "' OR ''='"]:
        assert sorted(model.find(labels=[name])["key_id"].to_pylist()) == ids_of(pets, name)
    assert sorted(model.find(source="IT'S 5")["key_id"].to_pylist()) == [5, *range(50, 60)]
    assert model.find(labels=["cat"], key_ids=[1, 10**6, -3, 0])["key_id"].to_pylist() == [0]
    assert changes.remove(place, key_ids=[5, 3, 5]).key_ids == [5, 3]
    quoted = HOSTILE.replace("'", "''")
    gone = changes.remove(place, where=f"label = '{quoted}' AND source LIKE 'it''s 1%'").key_ids
    assert (
        sorted(gone)
        == [i for i in ids_of(pets, HOSTILE) if str(i)[0] == "1" and i not in (3, 5)]
        != []
    )
    pets.truth.remove(3, 5, *gone)
    moved, (stays, other, *_) = ids_of(pets, "cat")[:3], ids_of(pets, HOSTILE)
    last = max(before[i]["shot"] for i in ids_of(pets, HOSTILE))
    changes.relabel(place, HOSTILE, key_ids=[*moved, stays])
    rows = labels_of(place)
    assert [rows[i]["shot"] for i in moved] == [last + 1, last + 2, last + 3]
    assert changes.relabel(place, HOSTILE, key_ids=[stays]).version == 4  # no change
    changes.relabel(place, BARE, where="source = 'it''s 9'")
    each = {moved[0]: "cat", moved[1]: BARE, 9: HOSTILE, stays: HOSTILE}
    assert changes.relabel(place, each).key_ids == [moved[0], moved[1], 9]
    pets.truth.labels |= {moved[2]: HOSTILE} | each
    pets.check()
    for wrong in ([3], [10**6], [-1], [2**63], [10**30], [0, 2**64]):
        for call in (changes.remove, partial(changes.relabel, label="cat")):
            pets.refused(partial(call, place, key_ids=wrong), str(wrong[-1]), error=InputError)
    each = {other: BARE, 10**30: BARE}
    pets.refused(partial(changes.relabel, place, each), str(10**30), error=InputError)
    both = partial(changes.relabel, place, each, key_ids=[other])
    pets.refused(both, "key_ids", error=UsageError)


def test_a_second_build_is_a_new_version_and_missing_versions_are_refused(pets):
    """The machine in ``test_living.py`` changes, restores and deletes versions in any order."""
    table = pets.table(QUERIES, ["cat", "dog"] * 6)
    assert build_index(table, pets.place, Reader(), alpha=1.0).class_names == [
        "cat",
        "dog",
    ]
    assert pets.open(version=1).n == N
    pets.refused(lambda: changes.rollback(pets.place, 77), "77")
    changes.rollback(pets.place, 1)
    pets.store.collect(1)
    refused(lambda: pets.open(version=1), "version 1")
    refused(lambda: changes.rollback(pets.place), "version")
    refused(lambda: pets.store.collect(0), "at least 1", error=UsageError)
    pets.check()


def test_the_versions_that_are_kept_have_marks_and_no_others(local_pets):
    """LanceDB never deletes a version with a mark. Another process may have added later versions."""
    table = key_table.KeyTable.at(local_pets.store.address)
    first = table.version
    for mark in ("kept-1700000000-killed", "mine"):
        table.table.tags.create(mark, first)
    for k in (1, 2, 3):
        local_pets.add(unit_rows(1, D, k), ["cat"])
    table = key_table.KeyTable.at(local_pets.store.address)
    table.prune([table.version - 2, table.version - 1])
    table.table.tags.create(f"kept-{table.version}", table.version)
    table.prune([table.version - 1])
    left = {f"kept-{version}": version for version in (table.version - 1, table.version)} | {
        "mine": first
    }
    assert {mark: entry["version"] for mark, entry in table.table.tags.list().items()} == left


def test_a_mark_that_another_process_removes_meanwhile_is_a_conflict(local_pets, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError(
            "lance error: Not found: pets/keys.lance/_refs/tags/kept-17-d2.json, refs.rs:956:21"
        )

    table = key_table.KeyTable.at(local_pets.store.address)
    monkeypatch.setattr(lancedb.table.LanceTable, "optimize", fails)
    refused(table.optimize, "changed meanwhile")


def test_settings_can_be_changed(pets):
    changes.configure(pets.place, alpha=0.5, beta=2.0, k=8, tail=False, temperature=3.0)
    pets.truth.alpha, pets.truth.beta = 0.5, 2.0
    model = pets.check()
    assert model.settings == Settings(0.5, 2.0, 100.0, 8, False, 3.0)
    assert model.provenance["alpha"] == "given"
    changes.configure(pets.place, k="all")
    model = pets.open()
    folder = made(pets.tables, "folder", "clone")
    changes.clone(pets.place, folder)
    assert model.settings.k is None
    same = stores.at(folder).load().rows.statistics()
    assert_allclose(model.rows.statistics().mean, same.mean, atol=1e-5)
    pets.refused(
        lambda: changes.configure(pets.place, templates=["a {}"]), "backbone", error=UsageError
    )
    pets.refused(
        lambda: changes.configure(pets.place, alpha=1e145), "alpha 1e+145", error=InputError
    )
    out = made(pets.tables, pets.kind, "out")
    table = pets.table(QUERIES, ["cat", "dog"] * 6)
    refused(
        lambda: build_index(table, out, Reader(), alpha=1e145),
        "alpha 1e+145",
        error=InputError,
    )
    assert not stores.at(out).exists()


def test_default_settings_in_lancedb_equal_those_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval_tip.retrieval.defaults.SAMPLE", 20)
    labels = ["cat" if i % 3 else "dog" for i in range(100)]
    table = source(
        tmp_path / "table.parquet", unit_rows(100, D, 40), labels, [str(i) for i in range(100)]
    )
    places = (str(tmp_path / "folder"), f"lance://{tmp_path / 'table'}")
    one, other = (build_index(table, place, Reader(), fit="none") for place in places)
    assert one.settings.alpha == pytest.approx(other.settings.alpha, rel=1e-6)
    assert one.settings.beta == pytest.approx(other.settings.beta, rel=1e-6)


def test_a_class_whose_keys_contradict_the_manifest_is_refused(local_pets):
    changes.rebuild(local_pets.place, index="Classes")
    tampered(
        local_pets,
        lambda table: table.update(where="key_id = 4", values={"class_id": 3, "label": BARE}),
    )
    refused(lambda: local_pets.open().logits(QUERIES, 45), local_pets.place, "index verify")


@pytest.mark.parametrize("sizes", [[], [1], [0, 3], [40, 40, 40, 40, 7]])
def test_rows_are_grouped_by_class_in_blocks(sizes, monkeypatch):
    ids = default_rng(0).integers(0, 9, sum(sizes)).astype(np.int32)
    rows = pa.record_batch(
        {"key_id": np.arange(len(ids)), "class_id": ids, "label": ids.astype(str)}
    )
    parts = [
        rows.slice(end - size, size) for size, end in zip(sizes, np.cumsum(sizes), strict=True)
    ]
    monkeypatch.setattr(key_table, "GROUPED", 80 * rows.nbytes // max(1, len(ids)))
    found = pa.Table.from_batches(key_table.grouped(iter(parts)), rows.schema)
    assert found.sort_by("key_id") == pa.table(rows)
    for start in range(0, len(found), 80):
        part = found.slice(start, 80)
        keys = list(zip(part["class_id"].to_pylist(), part["key_id"].to_pylist(), strict=True))
        assert keys == sorted(keys)
        assert set(part["key_id"].to_pylist()) == set(range(start, start + len(part)))


def test_a_labelling_session_keeps_one_version_per_minute_and_its_readers_can_finish(
    pets, monkeypatch
):
    noon = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)

    def label(second, name, label, last=None):
        clock = type(
            "Clock",
            (datetime.datetime,),
            {"now": lambda *_: noon + datetime.timedelta(seconds=second)},
        )
        monkeypatch.setattr(
            store_versions, "datetime", SimpleNamespace(**vars(datetime) | {"datetime": clock})
        )
        feature = unit_rows(1, D, ord(name))[0]
        photo = changes.PhotoLabel(f"{name}.jpg", name * 64, label, "suggested", feature)
        done = changes.label(pets.place, [photo], Reader(), last=last)
        for key_id, (_, new) in done.labels.items():
            pets.truth.keys.setdefault(key_id, feature)
            pets.truth.labels[key_id] = new
        return done

    first = label(5, "a", "cat")
    reader = pets.open()
    answers = reader.logits(QUERIES, 8).numpy()
    second = label(50, "b", BARE, first)
    third = label(70, "a", BARE, second)
    fourth = label(80, "b", None, third)
    pets.truth.remove(61)
    changes.configure(pets.place, temperature=2.0)
    fifth = label(90, "c", "cat", fourth)
    same = label(91, "c", "cat", fifth)
    label(92, "d", "cat", same)
    history = pets.store.history()
    assert history["version"].to_pylist() == [1, 3, 5, 6, 7, 8]
    assert history["parent"].to_pylist() == [None, 1, 3, 5, 6, 7]
    assert history["change"].to_pylist()[1:] == [
        f"2 examples: 1 cat, 1 {BARE}",
        f"1 example: cat became {BARE}; removed 1 example: 1 {BARE}",
        "set temperature 2",
        "1 example: 1 cat",
        "1 example: 1 cat",
    ]
    pets.check()
    assert_array_equal(reader.logits(QUERIES, 8).numpy(), answers)
    assert reader.find(key_ids=[60])["label"].to_pylist() == ["cat"]
    if pets.kind != "s3":  # where another writer may still need unnamed objects
        named = {
            file.name
            for version in (1, 3, 5, 6, 7, 8)
            for file in pets.store.manifest(version).data_files
        }
        assert {name for name in everything(pets.place) if name.startswith("data/")} == named
    changes.rollback(pets.place)
    changes.rollback(pets.place, 5)
    changes.rollback(pets.place)
    assert pets.store.history()["change"].to_pylist()[-3:] == [
        f"restored version {number}" for number in (7, 5, 9)
    ]


def test_gc_deletes_photos_that_only_deleted_versions_use(pets, monkeypatch):
    """Photos are in the folder ``DIR-shots``, named by their digest. A bucket has no such folder."""
    folder = pets.tables / "own-shots" / "cat"
    folder.mkdir(parents=True)
    unused, used = (
        folder / f"{hashlib.sha256(name).hexdigest()[:16]}.jpg" for name in (b"x", b"y")
    )
    foreign = [folder.parent / "notes.txt", folder / "0123456789abcdef.jpg", folder / "a.jpg"]
    elsewhere = pets.tables / unused.name
    for path in (unused, elsewhere, *foreign):
        path.write_bytes(b"x")
    used.write_bytes(b"y")
    link = pets.tables / "own-shots" / "dog" / unused.name
    link.parent.mkdir()
    link.symlink_to(elsewhere)
    (folder.parent / "linked").symlink_to(pets.tables)
    rows = source(
        pets.tables / "photos.parquet",
        unit_rows(2, D, 20),
        ["cat", "cat"],
        [str(unused), str(used)],
    )
    changes.add(pets.place, rows, Reader())
    changes.remove(pets.place, key_ids=[60])
    assert changes.gc(pets.place, 2).photos == 0  # the previous version still uses it
    monkeypatch.setattr("retrieval_tip.store.files.LOCK_WAIT", 0.0)
    with added_photos.adding(folder.parent):  # as the server does before it saves a version
        assert changes.gc(pets.place, 1).photos == 0
    gone = 0 if pets.kind == "s3" else 1
    assert changes.gc(pets.place, 1) == changes.Collected([], gone, gone)
    assert unused.exists() == (pets.kind == "s3")
    assert all(path.exists() for path in (used, *foreign, link, elsewhere))


def test_deleting_versions_leaves_no_copies_of_the_table(local_pets, monkeypatch):
    """LanceDB compacts the table when it deletes versions, in a new version that no manifest names."""
    monkeypatch.setattr("retrieval_tip.store.versions.KEPT_VERSIONS", 2)
    monkeypatch.setattr(lance_store, "PRUNED_EVERY", 4)
    pieces = []
    for seed in range(30, 42):
        local_pets.add(unit_rows(1, D, seed), ["cat"])
        manifest = local_pets.store.manifest()
        assert raw_table(local_pets).version == manifest.table.version
        pieces.append(
            len(
                [
                    name
                    for name in everything(local_pets.place)
                    if name.startswith("keys.lance/data/")
                ]
            )
        )
    assert max(pieces) < len(pieces)
    assert len(raw_table(local_pets).list_versions()) <= 6
    local_pets.check()


def test_a_change_succeeds_even_if_old_versions_cannot_be_deleted(lance_pets, monkeypatch):
    def fails(*_):
        raise StoreError("the disk fails")

    monkeypatch.setattr("retrieval_tip.store.versions.KEPT_VERSIONS", 1)
    monkeypatch.setattr(lance_store, "PRUNED_EVERY", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_table.KeyTable, "prune", fails)
        assert changes.configure(lance_pets.place, k=3).version == 2
        refused(lambda: lance_pets.store.collect(1), "the disk fails")
    assert changes.configure(lance_pets.place, k=4).version == 3
    assert lance_pets.store.history()["version"].to_pylist() == [3]
    lance_pets.check()


@pytest.mark.parametrize("kind", TRIED)
def test_removed_keys_are_erased_with_the_last_version_that_uses_them(kind, base, tmp_path):
    pets = pets_of(kind, base, tmp_path)
    key = pets.truth.keys[7].tobytes()
    assert any(key in data for data in everything(pets.place).values())
    changes.remove(pets.place, key_ids=[7])
    if kind != "folder":  # LanceDB only marks rows as deleted
        changes.rebuild(pets.place)
    pets.store.collect(1)
    assert not any(key in data for data in everything(pets.place).values())


@pytest.fixture
def bucket_pets(base, tmp_path):
    """A copy of the index in LanceDB in a bucket."""
    return pets_of("s3", base, tmp_path)


def beaten(monkeypatch, meanwhile, times=1, *, early=False):
    """Have another writer commit right before the next commits, or right after the next writers open their version."""
    owner, name = (lance_store.TableWriter, "__init__") if early else (BucketFiles, "create")
    real = getattr(owner, name)
    left = [*range(times)]

    def slow(self, *arguments):
        if early:
            real(self, *arguments)
        if left:
            left.pop()
            monkeypatch.setattr(owner, name, real)
            meanwhile()
            monkeypatch.setattr(owner, name, slow)
        return None if early else real(self, *arguments)

    monkeypatch.setattr(owner, name, slow)


def _add(pets, number):
    ids = [f"by {number}: {i}" for i in range(2)]
    more = source(
        pets.tables / f"{number}.parquet", unit_rows(2, D, 20 + number), ["cat", BARE], ids
    )
    return changes.add(pets.place, more, Reader())


def _merge(pets, number):
    other = pets.tables / f"other {number}"
    if not other.exists():
        keys = unit_rows(2, D, 30 + number)
        Index.from_features(keys, ["cat", BARE], ["cat", BARE]).save(other)
    return changes.merge(pets.place, other)


def _label(pets, number):
    photo = partial(changes.PhotoLabel, picked="suggested", feature=unit_rows(1, D, 40 + number)[0])
    both = photo("both.jpg", "b" * 64, [BARE, "cat"][number])
    alone = photo(f"{number}.jpg", str(number) * 64, "cat")
    return changes.label(pets.place, [both, alone], Reader())


EDITS = {
    "add": _add,
    "label": _label,
    "relabel": lambda pets, number: changes.relabel(pets.place, BARE, key_ids=[5, 7 + number]),
    "remove": lambda pets, number: changes.remove(pets.place, key_ids=[9 + number]),
    "merge": _merge,
    "rename": lambda pets, number: changes.rename(pets.place, [HOSTILE, NAMES[2]][number], "lynx"),
}
"""Edits of keys by writer 0 or 1. Some of them meet each other, so that the second one does something else."""
OTHERS = EDITS | {
    "settings": lambda pets, _: changes.configure(pets.place, k=5),
    "rebuild": lambda pets, _: changes.rebuild(pets.place),
    "fit": lambda pets, _: changes.fit_index(pets.place),
}


@pytest.mark.parametrize(
    ("edit", "other", "early"), few(itertools.product(EDITS, OTHERS, [False, True]), 6)
)
def test_the_second_of_two_writers_in_a_bucket_edits_the_newer_version(
    bucket_pets, base, monkeypatch, edit, other, early
):
    """The result is the same as if it had begun after the first one."""
    alone = pets_of("lance", base, bucket_pets.tables)
    OTHERS[other](alone, 0)
    expected = EDITS[edit](alone, 1)
    beaten(monkeypatch, lambda: OTHERS[other](bucket_pets, 0), early=early)
    found = EDITS[edit](bucket_pets, 1)
    assert (found.version, found.key_ids, found.labels) == (3, expected.key_ids, expected.labels)
    assert labels_of(bucket_pets.place) == labels_of(alone.place)
    own = bucket_pets.store.verify()
    same = alone.store.verify()
    assert (own.class_names, own.next_key_id) == (same.class_names, same.next_key_id)
    assert_allclose(own.logits(QUERIES, 8), same.logits(QUERIES, 8), atol=EXACT)
    assert bucket_pets.store.history()["change"] == alone.store.history()["change"]


@pytest.mark.parametrize("times", [2, 3])
def test_an_edit_in_a_bucket_is_tried_three_times(bucket_pets, monkeypatch, times):
    numbers = itertools.count(2)
    beaten(
        monkeypatch, lambda: changes.configure(bucket_pets.place, temperature=next(numbers)), times
    )
    if times == 3:
        text = refused(lambda: changes.remove(bucket_pets.place, key_ids=[7]), "changed meanwhile")
        assert text == f"{bucket_pets.place}: changed meanwhile; run again"
    else:
        assert changes.remove(bucket_pets.place, key_ids=[7]).version == 4
        bucket_pets.truth.remove(7)
    words = [f"set temperature {number}" for number in range(2, 2 + times)]
    assert bucket_pets.store.history()["change"].to_pylist()[1 : 1 + times] == words
    assert bucket_pets.store.manifest().version == 4
    bucket_pets.check()


NOT_AGAIN = {
    "fit": lambda pets: changes.fit_index(pets.place),
    "fit on other photos": lambda pets: changes.fit_index(
        pets.place, validation=pets.table(unit_rows(4, D, 50), ["cat", BARE] * 2), reader=Reader()
    ),
    "rollback": lambda pets: changes.rollback(pets.place),
}
"""Changes that depend on the version they began with."""


@pytest.mark.parametrize(("change", "early"), few(itertools.product(NOT_AGAIN, [False, True]), 3))
def test_a_fit_or_a_bare_rollback_in_a_bucket_is_not_tried_again(
    bucket_pets, monkeypatch, change, early
):
    bucket_pets.add(unit_rows(1, D, 21), ["cat"])
    beaten(monkeypatch, lambda: changes.relabel(bucket_pets.place, BARE, key_ids=[7]), early=early)
    refused(
        lambda: NOT_AGAIN[change](bucket_pets), f"{bucket_pets.place}: changed meanwhile; run again"
    )
    bucket_pets.truth.labels[7] = BARE
    bucket_pets.check()
    assert bucket_pets.store.manifest().version == 3


def test_a_version_that_is_restored_while_it_is_deleted_stays_whole(bucket_pets, monkeypatch):
    """The collector pauses right before or after it deletes the manifest of the version that is restored."""
    truth = dict(bucket_pets.truth.keys), dict(bucket_pets.truth.labels)
    for version, early in ((2, True), (4, False)):
        bucket_pets.add(unit_rows(2, D, 20 + version), ["cat", "cat"])
        real = BucketFiles.delete

        def slow(self, names, real=real, early=early):
            monkeypatch.setattr(BucketFiles, "delete", real)
            if early:
                assert changes.rollback(bucket_pets.place).version == 3
                real(self, names)
            else:
                real(self, names)
                refused(lambda: changes.rollback(bucket_pets.place, 3), "3")

        monkeypatch.setattr(BucketFiles, "delete", slow)
        bucket_pets.store.collect(1)
        assert bucket_pets.store.manifest().version == version + early
        bucket_pets.store.verify()
    changes.remove(bucket_pets.place, where="key_id > 59")
    bucket_pets.truth.keys, bucket_pets.truth.labels = truth
    bucket_pets.check()


def collect_before_create(store, monkeypatch):
    """Have another process delete unused files right before the next object is created."""
    real = BucketFiles.create

    def slow(self, name, data):
        monkeypatch.setattr(BucketFiles, "create", real)
        store.collect(1)
        return real(self, name, data)

    monkeypatch.setattr(BucketFiles, "create", slow)


def test_a_version_that_is_deleted_while_it_is_restored_is_withdrawn(bucket_pets, monkeypatch):
    bucket_pets.add(unit_rows(2, D, 20), ["cat", "cat"])
    collect_before_create(bucket_pets.store, monkeypatch)
    refused(lambda: changes.rollback(bucket_pets.place), "changed meanwhile; run again")
    assert bucket_pets.store.history()["version"].to_pylist() == [2]
    bucket_pets.check()


def test_objects_of_a_version_that_is_being_written_are_not_deleted(bucket_pets, monkeypatch):
    """The writer pauses right before it creates the manifest. Another process deletes unused files."""
    monkeypatch.setattr(store_versions, "UNFINISHED", datetime.timedelta(minutes=1))
    collect_before_create(bucket_pets.store, monkeypatch)
    bucket_pets.add(unit_rows(2, D, 20), ["cat", "cat"])
    bucket_pets.check()


@pytest.mark.skipif(sys.platform != "linux", reason="SKIPPED: needs /proc to observe flushed files")
def test_all_files_of_a_manifest_are_flushed_before_the_manifest(local_pets, monkeypatch):
    def files():
        return {path for path in path_of(local_pets.place).rglob("*") if path.is_file()}

    def fsync(handle):
        flushed.append(Path(f"/proc/self/fd/{handle}").resolve())
        real(handle)

    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    calls = (
        lambda: local_pets.add(unit_rows(2, D, 20), ["cat", BARE]),
        lambda: changes.remove(local_pets.place, key_ids=[0]),
        lambda: changes.rebuild(local_pets.place, index="Classes"),
    )
    for call in calls:
        before = files()
        flushed.clear()
        call()
        (last,) = (
            i
            for i, path in enumerate(flushed)
            if path.parent.name == "manifests" and path.suffix == ".tmp"
        )
        assert min(i for i, path in enumerate(flushed) if path.parent.name == "newest") > last
        new = {path for path in files() - before if path.parent.name not in ("manifests", "newest")}
        table = {path for path in new if "keys.lance" in path.parts}
        assert table <= set(flushed[:last])
        assert {path.parent for path in table} | {path_of(local_pets.place)} <= set(flushed[:last])
        assert all(
            path in flushed or any(f".{path.name}." in one.name for one in flushed[:last])
            for path in new
        )


def test_a_deletion_file_that_a_full_disk_left_empty_is_not_committed(local_pets, monkeypatch):
    """LanceDB reports no error if there is no room for the file, and goes on with its copy in memory."""
    real = lance_store.TableWriter.digests

    def digests(writer, table):
        files = (path_of(local_pets.place) / "keys.lance/_deletions").iterdir()
        max(files, key=lambda path: path.stat().st_mtime_ns).write_bytes(b"")
        return real(writer, table)

    monkeypatch.setattr(lance_store.TableWriter, "digests", digests)
    local_pets.refused(
        lambda: changes.remove(local_pets.place, key_ids=[0]), "reading what it wrote failed"
    )
    monkeypatch.undo()
    local_pets.check()
    changes.remove(local_pets.place, key_ids=[0])
    local_pets.truth.remove(0)
    local_pets.check()


def raw_table(pets):
    return lancedb.connect(pets.store.address.uri).open_table("keys")


def test_changes_to_the_table_by_other_programs_are_ignored(local_pets):
    table = raw_table(local_pets)
    table.delete("key_id < 30")
    table.add(table.to_arrow().slice(0, 2))
    table.update(where="key_id = 40", values={"label": "nobody"})
    local_pets.check()  # the manifest names its version of the table
    local_pets.add(unit_rows(1, D, 41), ["cat"])
    local_pets.check(forms=FORMS)


def test_a_folder_cannot_be_opened_as_lancedb_and_vice_versa(tmp_path, base):
    found, _, tables = base
    train = open_source(tables / "train.parquet")
    for kind, other in (("folder", "lance"), ("lance", "folder")):
        place = copied(tmp_path, kind, found[kind], kind)
        changes.configure(place, k=3)
        before = everything(place)
        wrong = place.removeprefix("lance://") if other == "folder" else f"lance://{place}"
        refused(lambda wrong=wrong: stores.at(wrong).load(), kind)
        refused(lambda wrong=wrong: build_index(train, wrong, Reader(), fit="none"), kind)
        refused(lambda wrong=wrong: changes.configure(wrong, k=4), kind)
        assert everything(place) == before
        assert stores.at(place).verify().settings.k == 3


@pytest.mark.parametrize("kind", TRIED)
def test_reading_a_missing_store_creates_nothing(kind, tmp_path, base):
    place = made(tmp_path, kind, "nowhere")
    calls = (
        lambda: stores.at(place).load(),
        lambda: stores.at(place).verify(),
        lambda: stores.at(place).history(),
        lambda: stores.at(place).describe(),
        lambda: stores.at(place).collect(1),
        lambda: stores.at(place).query("SELECT 1"),
        lambda: changes.remove(place, key_ids=[1]),
        lambda: changes.configure(place, k=2),
        lambda: changes.rollback(place),
        lambda: changes.add(place, open_source(base[2] / "train.parquet"), Reader()),
        lambda: changes.clone(place, made(tmp_path, "folder", "copy")),
    )
    for call in calls:
        refused(call, "nowhere", "index build")
    assert not stores.at(place).exists()
    assert not (everything(place) if kind == "s3" else path_of(place).exists())


def test_a_manifest_of_another_version_is_refused(pets):
    """``test_store.py`` tests other wrong manifests."""
    changes.configure(pets.place, k=3)
    first = everything(pets.place)["manifests/000001.json"]
    name = "manifests/000002.json"
    put(pets.place, name, first)
    for call in (pets.open, pets.store.history, lambda: changes.configure(pets.place, k=4)):
        refused(call, name)


@pytest.fixture(params=TRIED)
def fitted(request, base, tmp_path):
    """An index of four versions with files of every kind, and a reader of the second version."""
    pets = pets_of(request.param, base, tmp_path)
    changes.rebuild(pets.place, **({"index": "HNSW8"} if pets.kind == "folder" else {}))
    reader = pets.open()
    changes.remove(pets.place, key_ids=[1])
    changes.fit_index(pets.place, metric="within", values="solved")
    return pets, reader


def damaged(whole):
    """Yield the bytes of a file with a flipped bit, cut, or longer, and ``None`` for a missing file."""
    for bit in default_rng(0).choice(
        8 * len(whole), min(100 if SOAK else 2, 8 * len(whole)), replace=False
    ):
        yield whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
    yield from (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0", b" " + whole, None)


def refusing(pets, reader, name):
    """Return the calls that must refuse damage of a file: those of the current version, or a return to an earlier one.

    The files of a table are only read by ``verify`` and ``rollback``.
    """
    at = pets.store
    in_table = name.startswith("keys.lance")
    named = {
        m.version: {*m.digests, *(file.name for file in m.data_files)}
        for m in map(at.manifest, range(1, 5))
    }
    named[4].add("manifests/000004.json")
    owners = [version for version, names in named.items() if name in names]
    calls = [at.verify] if owners or name.startswith("manifests/") else []
    if 4 in owners and not in_table:
        copy = made(pets.tables, "folder", "copy")
        calls += [
            pets.open,
            lambda: changes.remove(pets.place, key_ids=[2]),
            lambda: changes.clone(pets.place, copy),
        ]
        calls += [reader.reload] if 2 not in owners else []
    if owners and 4 not in owners:
        calls += [lambda: changes.rollback(pets.place, owners[0])]
    return calls


@pytest.mark.timeout(400)
def test_damage_of_any_file_of_any_version_is_refused_by_name(fitted, capfd):
    """Nothing is changed on top of damage. In a bucket, ``verify`` reads the rows of a table instead of its files."""
    pets, reader = fitted
    whole = everything(pets.place)
    names = [
        name
        for name in whole
        if name != "lock" and not (pets.kind == "s3" and "keys.lance" in name)
    ]
    for name in names:
        calls = refusing(pets, reader, name)
        for data in damaged(whole[name]):
            put(pets.place, name, data)
            if data is None and name.startswith(("manifests/", "keys.lance")):
                continue  # the version may have been deleted, or never written
            for call in calls:
                refused(call, name)
        put(pets.place, name, whole[name])
    found = everything(pets.place)
    assert {name: found[name] for name in names} == {name: whole[name] for name in names}
    assert "panicked" not in capfd.readouterr().err
    assert pets.store.verify().version == 4
    if pets.kind != "folder":
        moved = copied(
            pets.tables, pets.kind, pets.place, "moved"
        )  # LanceDB has not cached the copy
        for name in whole:
            if name.startswith("keys.lance/data/"):
                put(moved, name, None)
        refused(stores.at(moved).verify, moved)
    put(pets.place, pets.store.manifest().files["metric"].name, b"damaged")
    changes.rollback(pets.place, 1)
    pets.store.collect(1)
    pets.check()


@pytest.mark.parametrize("version", [1, 2])
def test_verify_ignores_a_version_deleted_during_the_check(local_pets, monkeypatch, version):
    changes.rename(local_pets.place, BARE, "second")
    wanted = local_pets.store.manifest(version).files["classes"].name
    real = LocalFiles.problem
    raced = []

    def raced_with(self, file, whole):
        if file.name == wanted and not raced:
            raced.append(wanted)
            changes.rename(local_pets.place, "second", "third")
            local_pets.store.collect(1)
        return real(self, file, whole)

    monkeypatch.setattr(LocalFiles, "problem", raced_with)
    assert local_pets.store.verify().version == version + 1
    assert raced


def tampered(pets, tamper, **facts):
    """Change the table, and commit this as a version without digests."""
    with pets.store.write() as writer:
        tamper(writer.table.table)
        old = writer.parent
        found = {"n": writer.table.rows, "version": old.version + 1, "parent": old.version} | facts
        entry = Table("keys", writer.table.version, found["n"])
        writer.commit(replace(old, table=entry, digests={}, **found))


def changed_vector(table):
    key = table.search().where("key_id = 4").to_arrow()
    vector = np.array(key["vector"][0].as_py(), dtype=np.float32)
    vector[0] += 1e-3
    table.update(where="key_id = 4", values={"vector": vector.tolist()})


TAMPERED = {
    "a changed vector": (changed_vector, "do not match"),
    "no vector": (
        lambda t: t.update(where="key_id = 4", values_sql={"vector": "NULL"}),
        "missing values",
    ),
    "a missing class": (
        lambda t: t.update(where="key_id = 4", values={"class_id": 44}),
        "class ids",
    ),
    "a key of another class": (
        lambda t: t.update(where="key_id = 4", values={"class_id": 3, "label": BARE}),
        "do not match",
    ),
    "a missing row": (lambda t: t.delete("key_id = 4"), "do not match"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_verify_finds_rows_that_contradict_the_manifest(local_pets, what):
    tamper, word = TAMPERED[what]
    tampered(local_pets, tamper)
    refused(local_pets.store.verify, local_pets.place, word)
    changes.rollback(local_pets.place)
    local_pets.check()


def test_damaged_rows_are_not_written_again(lance_pets):
    tampered(lance_pets, changed_vector)
    damaged = changes.configure(lance_pets.place, k=4).version - 1
    for change in (
        lambda: changes.rollback(lance_pets.place, damaged),
        lambda: changes.rebuild(lance_pets.place),
        lambda: changes.rebuild(lance_pets.place, dtype="float16"),
        lambda: changes.clone(lance_pets.place, lance_pets.tables / "clone"),
    ):
        lance_pets.refused(change, "do not match")
    changes.rollback(lance_pets.place, 1)
    lance_pets.check()


@pytest.mark.parametrize("column", ["vector", "a.b", "_rowid", "`tick`"])
def test_columns_that_lancedb_cannot_store_are_refused(lance_pets, column, tmp_path):
    def table():
        return lance_pets.table(unit_rows(2, D, 60), ["cat", "cat"], **{column: ["x", "y"]})

    text = lance_pets.refused(
        lambda: changes.add(lance_pets.place, table(), Reader()), repr(column), error=InputError
    )
    assert "rename" in text
    new = made(tmp_path, lance_pets.kind, "new")
    refused(
        lambda: build_index(table(), new, Reader(), fit="none"),
        repr(column),
        error=InputError,
    )
    assert not stores.at(new).exists()
    folder = made(tmp_path, "folder", "with column")
    build_index(table(), folder, Reader(), fit="none")
    refused(lambda: changes.clone(folder, new), repr(column), error=InputError)


def test_columns_of_any_type_and_name_are_preserved(tmp_path):
    columns = odd_columns()
    features = unit_rows(2, D, 61)
    places = [made(tmp_path, kind, kind) for kind in ("folder", "lance")]
    table = source(tmp_path / "t.parquet", features, ["a", "b"], **columns)
    more = source(tmp_path / "u.parquet", -features, ["a", "b"], ["u", "v"], **columns)
    for place in places:
        build_index(table, place, Reader(), fit="none")
        changes.add(place, more, Reader())
        changes.relabel(place, "b", key_ids=[0])
        stores.at(place).verify()
    assert labels_of(places[0]) == labels_of(places[1])
    changes.clone(places[1], back := made(tmp_path, "folder", "back"))
    assert labels_of(back) == labels_of(places[0])
    assert set(columns) < set(labels_of(back)[0])


def test_no_credentials_are_written_to_a_store(base, tmp_path):
    found, _, _ = base
    own = copied(tmp_path, "s3", found["s3"])
    changes.configure(own, k=3)
    changes.remove(own, key_ids=[1])
    refused(lambda: changes.rollback(own, 99), own)
    changes.clone(own, made(tmp_path, "lance", "clone"))
    every = everything(own) | everything(f"lance://{tmp_path / 'clone'}")
    assert len(every) > 10
    for name, data in every.items():
        for secret in (buckets.SECRET, buckets.KEY):
            assert secret not in name
            assert secret.encode() not in data


def test_an_index_opened_before_a_fork_is_refused(local_pets):
    opened = local_pets.open()  # no row is read yet
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def ask():
        for call in (lambda: opened.logits(QUERIES, 8), local_pets.open):
            try:
                answers.put(str(call()))
            except StoreError as error:
                answers.put(str(error))

    child = context.Process(target=ask)
    child.start()
    for text in (answers.get(timeout=30), answers.get(timeout=30)):
        assert "forked" in text
        assert "\n" not in text
        assert local_pets.place in text
    child.join(10)


def test_threads_can_share_an_open_index(local_pets):
    opened = local_pets.open()
    expected = local_pets.truth.logits(QUERIES, 8)
    failed = []

    def ask():
        for _ in range(5):
            found = opened.logits(QUERIES, 8).numpy()
            near = opened.classify(QUERIES[:2], neighbours=3)
            if np.abs(found - expected).max() > EXACT or len(near[0].neighbours) != 3:
                failed.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


PLAIN = {"fit": "none"}


def clustered(n, seed, classes=20, d=32):
    """Return keys around one centre per class, like those of a backbone, and their labels."""
    labels = np.arange(n) % classes
    rows = unit_rows(classes, d, 70)[labels] + unit_rows(n, d, seed) * 0.7
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), [
        f"c{i:02}" for i in labels
    ]


@pytest.mark.parametrize("classes", [12, 20])
def test_many_keys_get_an_index_that_later_changes_update(tmp_path, monkeypatch, classes):
    drawn = partial(clustered, classes=classes)
    monkeypatch.setattr(lance_rows, "INDEX_FROM", 3000)
    monkeypatch.setattr(lance_rows, "UNINDEXED", 500)
    place = made(tmp_path, "lance")
    last = f"c{classes - 1}"
    rows, labels = drawn(2900, 1)
    build_index(source(tmp_path / "t.parquet", rows, labels), place, Reader(), fit="none")
    at = stores.at(place)
    assert at.load().index_type == "Flat"
    more, more_labels = drawn(200, 2)
    changes.add(place, source(tmp_path / "u.parquet", more, more_labels), Reader())
    model = at.verify()
    assert (model.index_type, model.n) == ("Classes", 3100)
    assert at.manifest().built.auto_index
    assert (
        model.settings.k == lance_rows.index_kind("auto", 3100, classes)[1]
    )  # as in a fresh build
    rows = np.concatenate([rows, more])
    labels = labels + more_labels
    queries, truths = drawn(200, 3)
    by_all = model.logits(queries, "all")
    by_index = model.logits(queries, 64)
    winners = by_index.argmax(dim=1)
    assert (winners == by_all.argmax(dim=1)).float().mean() >= 0.99
    assert (
        np.mean([model.class_names[i] == truth for i, truth in zip(winners, truths, strict=True)])
        > 0.9
    )
    found = model.retrieval.keys.nearest(torch.from_numpy(queries), 10)
    exact = np.sort(queries @ rows.T, axis=1)[:, ::-1][:, :10]
    near = found.affinity.numpy()
    assert (np.diff(near, axis=1) <= 0).all()
    assert np.isclose(near, exact, atol=1e-5).mean() > 0.95
    # Keys that are not indexed yet are found and counted.
    late, late_labels = drawn(100, 4)
    changes.add(place, source(tmp_path / "v.parquet", late, late_labels), Reader())
    assert at.describe()["not_indexed"] == 100
    model = at.verify()
    nearest = [one for [one] in model.similar(late[:50], 1)]
    assert [one.key_id for one in nearest] == list(range(3100, 3150))
    assert_allclose([one.affinity for one in nearest], 1, atol=1e-5)
    slack = at.load().retrieval.bounds.slack(5.5)
    monkeypatch.setattr(lance_rows, "SPREAD_BYTES", 1)  # as with too many keys
    few = at.load().retrieval.bounds.slack(5.5)
    assert few == pytest.approx(slack, rel=0.5)
    # More keys are added to the index.
    later, later_labels = drawn(450, 5)
    changes.add(place, source(tmp_path / "w.parquet", later, later_labels), Reader())
    assert at.describe()["not_indexed"] == 0
    model = at.verify()
    gone = [one.key_id for [one] in model.similar(later[:20], 1)]
    assert gone == list(range(3200, 3220))
    # A search respects removed and relabelled keys.
    changes.remove(place, key_ids=gone[:10])
    changes.relabel(place, last, key_ids=gone[10:])
    model = at.verify()
    near = [one for [one] in model.similar(later[:20], 1)]
    assert not {one.key_id for one in near[:10]} & set(gone[:10])
    changes.rebuild(place, index="Flat")
    assert at.verify().index_type == "Flat"
    assert not raw_table(Pets(place, None, tmp_path, "lance")).list_indices()
    changes.remove(place, key_ids=[0])
    assert at.load().index_type == "Flat"  # the choice of the rebuild


@pytest.mark.parametrize(
    ("dtype", "fit"),
    [
        ("float32", PLAIN),
        ("float16", PLAIN),
        ("float32", {"metric": "within", "values": "one-hot"}),
    ],
)
def test_affinities_are_inner_products_with_the_stored_keys_or_points(tmp_path, dtype, fit):
    place = made(tmp_path, "lance")
    n = 1000
    rows, labels = clustered(n, 1)
    table = source(tmp_path / "t.parquet", rows, labels)
    build_index(table, place, Reader(), index="Classes", dtype=dtype, **fit)
    model = stores.at(place).verify()
    assert (model.index_type, model.manifest.built.auto_index) == ("Classes", False)
    stored = model.rows.of(range(n)).keys
    column = "vector" if fit == PLAIN else "_point"
    assert stored.dtype == dtype
    assert np.array_equal(stored, rows.astype(dtype))
    pets = Pets(place, None, tmp_path, "lance")
    assert model.rows.table.vector_column == column
    assert [list(entry.columns) for entry in raw_table(pets).list_indices()] == [["class_id"]]
    assert (
        len([name for name in everything(place) if name.startswith("keys.lance/data/")]) == 1
    )  # none of an earlier version
    points = (
        (lambda x: x) if fit == PLAIN else (lambda x: model.metric(torch.from_numpy(x)).numpy())
    )
    queries = clustered(60, 3)[0]
    stored = points(stored.astype(np.float32))
    exact = points(queries) @ stored.T
    for q, one in enumerate(model.classify(queries, k=20, neighbours=10)):
        ids = [near.key_id for near in one.neighbours]
        assert_allclose([near.affinity for near in one.neighbours], exact[q, ids], atol=1e-6)
        assert len(set(ids)) == 10
    keys = model.retrieval.keys
    found = keys.nearest(keys.phi(torch.from_numpy(queries)), 10).affinity.numpy()
    assert np.isclose(found, -np.sort(-exact, axis=1)[:, :10], atol=1e-5).mean() > 0.9


def test_commands_take_the_address_of_a_bucket(run, bucket_pets):
    own = bucket_pets.place
    copy = made(bucket_pets.tables, "lance", "copy")
    for words, said in (
        (("verify", own), f"{own}: version 1 is intact (60 shots, 4 classes)\n"),
        (("info", own, "--json"), f'"folder": "{own}"'),
        (("query", own, "SELECT count(*) AS keys FROM labels", "--format", "json"), '{"keys": 60}'),
        (("clone", own, copy), copy),
        (("clone", copy, made(bucket_pets.tables, "s3", "back")), "s3://"),
    ):
        assert said in done(run("index", *words))
    asked = write_table(bucket_pets.tables / "asked.parquet", QUERIES)
    found = done(
        run("classify", own, asked, "-k", 8, "--logits", "--format", "json", "--verify", "full")
    )
    logits = [json.loads(line)["logits"] for line in found.splitlines()]
    assert_allclose(logits, bucket_pets.truth.logits(QUERIES, 8), atol=1e-3)


def test_the_server_answers_from_a_store_and_reloads_changes(local_pets, monkeypatch):
    monkeypatch.setattr(lance_store.LanceStore, "look_every", 0.1)
    expected = local_pets.open().classify(QUERIES, top=3, neighbours=3)
    with TestClient(app_of(local_pets.place, token="open sesame")) as client:

        def ask():
            sent = {"features": QUERIES.tolist()}
            answer = client.post(
                "/v1/classify", json=sent, params={"top": 3, "neighbours": 3, "features": True}
            )
            assert answer.status_code == 200, answer.text
            return answer.json()

        for row, one in zip(ask()["results"], expected, strict=True):
            assert (row["label"], row["labels"]) == (one.label, one.labels)
            assert [key["key_id"] for key in row["neighbours"]] == [
                key.key_id for key in one.neighbours
            ]
        for route in ("map", "keys?label=cat&limit=3", "audit", "accuracy"):
            assert client.get(f"/v1/indexes/own/{route}").status_code == 200
        gone = client.delete(
            "/v1/indexes/own/keys?key_id=5", headers={"authorization": "Bearer open sesame"}
        )
        assert (gone.status_code, gone.json()["version"]) == (200, 2), gone.text
        changes.relabel(local_pets.place, BARE, key_ids=[1])
        limit = time.monotonic() + 60
        while ask()["version"] != 3:
            assert time.monotonic() < limit
            time.sleep(0.05)
