"""The present format can be read, and no earlier one.

``indexes/v11`` never changes. ``expected.json`` beside its indexes holds queries ``features`` and the answers of each
index when it was written: logits over all keys and over the 4 nearest.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sealing import refused, sealed

from retrieval_tip.index import changes
from retrieval_tip.index.changes import fit_index
from retrieval_tip.index.places import at
from retrieval_tip.store.versions import UNREAD

INDEXES = Path(__file__).parent / "indexes" / "v11"


def check_answers(index, name):
    known = json.loads((INDEXES / "expected.json").read_text())
    features = np.array(known["features"], dtype=np.float32)
    for entry, k in (("all", "all"), ("k4", 4)):
        np.testing.assert_allclose(
            index.logits(features, k), known["answers"][name][entry], rtol=1e-5, atol=1e-5
        )
    assert index.class_names == ["crab", "newt", "owl"]


def copied(name, to):
    """Copy an index, and return its address."""
    shutil.copytree(INDEXES / name, to / name)
    return f"lance://{to / name}" if name.startswith("lance-") else str(to / name)


def outdated(place, version):
    """Rewrite the manifest of a version as one of format 10."""
    path = Path(place.removeprefix("lance://")) / f"manifests/{version:06d}.json"
    path.write_bytes(sealed(json.loads(path.read_bytes()) | {"format_version": 10}))


def test_an_index_of_the_present_format_gives_its_old_answers(tmp_path):
    place = copied("fitted", tmp_path)
    index = at(place).verify()
    check_answers(index, "fitted")
    assert (index.version, index.n, index.settings.temperature) == (3, 24, 0.5)
    assert index.groups.path("owl")[0] == "birds"
    assert index.labels["camera"].to_pylist()[-1] == "c"
    changes.configure(place, temperature=2.0)
    check_answers(at(place).verify(), "fitted")
    changes.rollback(place, 3)
    check_answers(at(place).verify(), "fitted")


def test_a_table_with_a_vector_index_compares_all_keys_until_it_is_rebuilt(tmp_path):
    """Earlier programs offered the vector indexes of LanceDB, here IvfFlat over the points."""
    place = copied("lance-vectors", tmp_path)

    def check_all():
        index = at(place).verify()
        check_answers(index, "lance-vectors")
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


@pytest.mark.parametrize("name", ["fitted", "lance-vectors"])
def test_an_earlier_version_in_an_earlier_format_is_listed_and_kept_but_not_restored(
    name, tmp_path
):
    place = copied(name, tmp_path)
    store = at(place)
    if name != "fitted":
        changes.configure(place, temperature=2.0)
    first = min(store.names())
    files = {file.name for file in store.manifest(first).data_files}
    outdated(place, first)
    assert (store.history()["version"][0].as_py(), store.history()["change"][0].as_py()) == (
        first,
        UNREAD,
    )
    refused(lambda: changes.rollback(place, first), "index format 10, which is no longer read")
    changes.configure(place, temperature=3.0)
    kept = store.manifest().version
    changes.gc(place, keep=len(store.names()))
    assert files <= {f"data/{path.name}" for path in (tmp_path / name / "data").iterdir()}
    assert store.verify().version == kept
    changes.gc(place, keep=1)
    assert store.history()["version"].to_pylist() == [kept]
    store.verify()


def test_a_manifest_whose_format_is_damaged_is_not_taken_for_an_earlier_one(tmp_path):
    place = copied("fitted", tmp_path)
    path = Path(place) / "manifests/000001.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 11', b'"format_version": 10'))
    refused(at(place).verify, "000001.json", "checksum")
    refused(at(place).history, "000001.json", "checksum")
