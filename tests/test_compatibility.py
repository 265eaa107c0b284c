"""Every format from 7 on can be read. Format N wrote ``indexes/vN``, which never changes.

``expected.json`` beside them holds queries ``features`` and the answers of each index at that time: logits over all
keys, in format 7 also over the 4 nearest, and the labels. Format 7 had segments of keys (``plain``, ``classes``,
``lists``, ``graph`` and ``metric`` have two), FAISS files for the type ``Flat``, and digests of the rows of a LanceDB
table.
"""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sealing import sealed, snapshot

from retrieval_tip.data.reader import Reader
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.index import changes
from retrieval_tip.index.changes import fit_index
from retrieval_tip.index.places import at
from retrieval_tip.model import Index
from retrieval_tip.settings import Settings
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.versions import Versions

INDEXES = Path(__file__).parent / "indexes"
FOLDERS = ["plain", "classes", "lists", "graph", "metric", "discriminant", "tuned"]
SEGMENTED = ["plain", "classes", "lists", "graph", "metric"]
STORES = ["lance-plain", "lance-metric", "lance-solved"]
LATER = [*itertools.product(["v8", "v9", "v10"], ["fitted", "lance-fitted"]), ("v9", "joined")]
"""Indexes of formats 8, which had one encoder, 9, which stored whole metrics of few keys, and 10, without groups."""


def check_answers(index, version, name):
    known = json.loads((INDEXES / version / "expected.json").read_text())
    features, answers = np.array(known["features"], dtype=np.float32), known["answers"][name]
    for entry, k in (("all", "all"), ("k4", 4)):
        if entry in answers:
            np.testing.assert_allclose(index.logits(features, k), answers[entry], rtol=1e-5, atol=1e-5)
    if "labels" in answers:
        assert [found.label for found in index.classify(features)] == answers["labels"]
    assert index.class_names == answers.get("names", ["crab", "newt", "owl"])
    if "key_ids" in answers:
        assert sorted(index.labels["key_id"].to_pylist()) == sorted(answers["key_ids"])


def manifest_of(folder):
    """Return the manifest of the current version as JSON, without the checks of the program."""
    path = folder / "manifest.json"
    path = path if path.exists() else sorted((folder / "manifests").iterdir())[-1]
    return json.loads(path.read_text())


def copied(version, name, to):
    """Copy an index, and return its address."""
    shutil.copytree(INDEXES / version / name, to / name)
    return f"lance://{to / name}" if name.startswith("lance-") else str(to / name)


@pytest.mark.parametrize("killed", [False, True])
def test_the_current_manifest_of_an_earlier_program_gets_its_number_before_the_first_change(
    killed, tmp_path, monkeypatch
):
    """Earlier programs copied it to its number before they replaced it. They may have been killed in between."""
    place, rename = Path(copied("v7", "plain", tmp_path)), Path.replace
    if killed:
        shutil.copy(place / "manifest.json", place / "manifests/000005.json")
    store = at(str(place))
    before, every = store.manifest(), snapshot(place)
    assert store.history()["version"].to_pylist() == [1, 2, 3, 4, 5]

    def late(old, new):
        if old.name == "manifest.json":
            assert Versions(place).manifest() == before
        return rename(old, new)

    monkeypatch.setattr(Path, "replace", late)
    with pytest.raises(StoreError, match="version 9"):
        changes.rollback(place, 9)
    assert snapshot(place) == every
    changes.configure(place, temperature=2.0)
    assert (store.manifest(5), (place / "manifest.json").exists()) == (before, killed)
    assert store.history()["version"].to_pylist() == [1, 2, 3, 4, 5, 6]


def test_an_old_manifest_that_comes_back_beside_newer_ones_is_ignored(tmp_path):
    """A backup or a synchronised folder can bring it back after it was renamed."""
    place = Path(copied("v10", "fitted", tmp_path))
    old = (place / "manifest.json").read_bytes()
    for temperature in (2.0, 3.0):
        changes.configure(place, temperature=temperature)
    (place / "manifest.json").write_bytes(old)
    every, newest = snapshot(place), at(str(place)).manifest()
    with pytest.raises(InputError, match="9999"):
        changes.remove(place, key_ids=[9999])
    assert snapshot(place) == every
    changes.configure(place, temperature=4.0)
    assert at(str(place)).history()["version"].to_pylist()[-2:] == [newest.version, newest.version + 1]
    assert at(str(place)).manifest(newest.version) == newest
    at(str(place)).verify()


def test_a_setting_that_an_older_format_lacks_has_its_default(tmp_path):
    place, body = copied("v10", "fitted", tmp_path), manifest_of(INDEXES / "v10" / "fitted")
    del body["gamma"]
    (tmp_path / "fitted" / "manifest.json").write_bytes(sealed(body))
    assert at(place).manifest().settings.gamma == Settings().gamma
    (tmp_path / "fitted" / "manifest.json").write_bytes(sealed(body | {"format_version": 11}))
    with pytest.raises(StoreError, match="gamma"):
        at(place).manifest()


def test_the_indexes_have_everything_that_format_7_could_write():
    assert sorted(path.name for path in INDEXES.iterdir()) == ["v10", "v11", "v7", "v8", "v9"]
    manifests = {name: manifest_of(INDEXES / "v7" / name) for name in [*FOLDERS, *STORES]}
    assert {body["format_version"] for body in manifests.values()} == {7}
    there = {path.name for path in (INDEXES / "v7").iterdir() if path.is_dir()}
    assert there == {*manifests, "trained-encoder"}
    assert {name for name, body in manifests.items() if body["later"]} == set(SEGMENTED)
    assert all("index" in manifests[name]["files"] for name in FOLDERS)
    assert {"points", "sums"} <= manifests["metric"]["files"].keys()
    assert {"points", "prior", "values"} <= manifests["discriminant"]["files"].keys()
    assert all(len(manifests[name]["digests"]["rows"]) == 64 for name in STORES)


@pytest.mark.parametrize(("version", "name"), [*(("v7", name) for name in [*FOLDERS, *STORES]), *LATER])
def test_an_index_of_an_older_format_gives_its_old_answers_and_is_rewritten_by_a_change(version, name, tmp_path):
    place, folder, groups = copied(version, name, tmp_path), tmp_path / name, tmp_path / "groups.csv"
    before, old, index = at(place).manifest(), manifest_of(folder), at(place).verify()
    check_answers(index, version, name)
    assert (index.groups, bool(index.parts), manifest_of(folder)) == (None, name == "joined", old)
    assert Manifest.from_bytes(before.to_bytes(), "m") == before
    groups.write_text("class,order\n" + "".join(f"{name},order of {name}\n" for name in index.class_names))
    changes.configure(place, groups=groups, temperature=2.0)
    now, written = at(place).verify(), manifest_of(folder)
    check_answers(now, version, name)
    assert (written["format_version"], "later" in written) == (11, False)
    assert not (folder / "manifest.json").exists()
    assert (now.version, now.settings.temperature) == (before.version + 1, 2.0)
    assert now.groups.path(now.class_names[0])[0] == f"order of {now.class_names[0]}"
    assert at(place).history()["change"].to_pylist()[-1] == "set temperature 2, groups by order"
    files = now.manifest.files
    assert ("index" in files) == (now.manifest.index != "Flat" and name in FOLDERS)
    if version != "v7":
        assert files["metric"].rows == before.files["metric"].rows
        fit_index(place)
        files = at(place).verify().manifest.files
        assert files["metric"].rows <= 2 + before.n - 3
        assert version == "v8" or "points" not in files
    changes.rollback(place, before.version)
    check_answers(at(place).verify(), version, name)


def test_formats_8_and_9_had_one_encoder_and_whole_metrics_of_few_keys(tmp_path):
    old = at(copied("v8", "fitted", tmp_path)).load(device="cpu")
    assert (old.parts, old.fitted.shares, old.backbone.model) == ((), (), "fake")
    for name, has_points in (("lance-fitted", False), ("joined", True)):
        before = at(copied("v9", name, tmp_path)).manifest()
        assert (before.n, before.files["metric"].rows, "points" in before.files) == (15, 21, has_points)


@pytest.mark.parametrize("name", [*FOLDERS, *STORES])
def test_the_keys_of_an_index_of_format_7_can_be_changed(name, tmp_path):
    place = copied("v7", name, tmp_path)
    model = at(place).load(device="cpu")
    dog, largest = model.find(["dog"])["key_id"].to_pylist()[0], at(place).manifest().next_key_id
    feature = model.rows.of([dog]).keys[0].astype(np.float32)
    photo = changes.PhotoLabel("new.jpg", "ab" * 32, "cat", "asked", feature)
    assert changes.label(place, [photo], Reader()).key_ids == [largest]
    changes.relabel(place, "cat", key_ids=[dog])
    changes.remove(place, key_ids=model.find(["owl"])["key_id"].to_pylist()[:1])
    now = at(place).verify()
    assert now.n == model.n
    assert {largest, dog} <= set(now.find(["cat"])["key_id"].to_pylist())


def test_a_table_with_a_vector_index_compares_all_keys_until_it_is_rebuilt(tmp_path):
    """Earlier programs offered the vector indexes of LanceDB, here IvfFlat over the points."""
    place = copied("v11", "lance-vectors", tmp_path)

    def check_all():
        index = at(place).verify()
        check_answers(index, "v11", "lance-vectors")
        return index

    assert at(place).manifest().index == "IvfFlat"
    assert check_all().index_type == "Flat"
    changes.configure(place, temperature=2.0)
    assert (check_all().index_type, at(place).manifest().index) == ("Flat", "Flat")
    assert len(check_all().rows.table.table.list_indices()) == 1
    changes.rebuild(place, index="auto")
    assert not check_all().rows.table.table.list_indices()
    fit_index(place, values="solved")  # drops the points
    at(place).verify()


def test_the_versions_of_format_7_are_kept(tmp_path):
    place = copied("v7", "plain", tmp_path)
    assert Versions(Path(place)).history()["change"].to_pylist() == [
        "build",
        "add 2 keys",
        "add 2 keys and 1 class",
        "remove 1 key",
        "set alpha 2, k 4",
    ]
    changes.configure(place, temperature=2.0)
    old = Index.load(place, device="cpu", version=3)
    assert (old.n, old.labels["camera"].to_pylist()[:2]) == (22, ["a", "b"])
    assert changes.gc(place, 1).versions == [1, 2, 3, 4, 5]
    named = {file.name for file in Versions(Path(place)).manifest().data_files}
    assert {f"data/{path.name}" for path in (Path(place) / "data").iterdir()} == named


def test_an_index_of_an_earlier_format_or_with_trained_encoder_weights_is_refused_in_one_line(tmp_path, run):
    place, trained = Path(copied("v7", "plain", tmp_path)), INDEXES / "v7" / "trained-encoder"
    (place / "manifest.json").write_bytes(sealed(manifest_of(place) | {"format_version": 6}))
    for folder, words in (
        (place, "written by an earlier program"),
        (trained, "has trained encoder weights, which are no longer read"),
    ):
        failed = run("classify", folder, "photo.jpg")
        how = "build the index again, or delete earlier versions with index gc"
        assert (failed.exit_code, failed.stderr) == (1, f"Error: {folder}/manifest.json: {words}; {how}\n")


@pytest.mark.parametrize("old", ["format", "encoder"])
def test_an_earlier_version_that_is_no_longer_read_can_be_deleted(old, tmp_path):
    place = Path(copied("v7", "plain", tmp_path))
    first = place / "manifests/000001.json"
    body = json.loads(first.read_text())
    files = body["files"] | {"weights": body["files"]["keys"]}
    first.write_bytes(sealed(body | ({"format_version": 6} if old == "format" else {"files": files})))
    with pytest.raises(StoreError, match="or delete earlier versions with index gc"):
        Versions(place).history()
    changes.gc(place, 1)
    assert len(Versions(place).history()) == 1
