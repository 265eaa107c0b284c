"""A fitted LanceDB store has the metric and values of a folder with the same keys.

The machine in ``test_living.py`` changes fitted folders and stores in any order.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from clusters import clusters, text_of
from fastapi.testclient import TestClient
from numpy.testing import assert_allclose
from sealing import refused
from serving import app_of
from stored import copied, done, everything, made, source
from tables import write_table

from retrieval_tip import model as index_model
from retrieval_tip.cli import main
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, StoreError, warn_once
from retrieval_tip.fit import closed_form
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.changes import fit_index
from retrieval_tip.plugins.lance import lance_store
from retrieval_tip.retrieval import ridge

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("bucket", "one_thread")]

FORMS = {
    "solved": ("within", "solved"),
    "metric": ("within", "one-hot"),
    "values": ("none", "solved"),
}
"""Metric and values of each form."""
NAMES = [f"class {i}" for i in range(5)]
QUERIES = clusters(4, seed=5)[0]
KINDS = ("folder", "lance")


def table(path, shots=8, seed=0, prefix="it's"):
    keys, ids = clusters(shots, seed)
    order = np.random.default_rng(1).permutation(len(ids))  # a source has random order
    return write_table(
        path, keys[order], [NAMES[i] for i in ids[order]], [f"{prefix} {i}" for i in order]
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A fitted folder and a fitted store of each form, built by the command line."""
    place = tmp_path_factory.mktemp("built")
    table(place / "train.parquet")
    write_table(place / "text.parquet", text_of(), NAMES)
    found = {}
    for name, (metric, values) in (FORMS | {"plain": ("none", "one-hot")}).items():
        for kind in KINDS:
            found[name, kind] = made(place, kind, f"{name}-{kind}")
            words = [
                "index",
                "build",
                place / "train.parquet",
                "--text",
                place / "text.parquet",
                "--out",
            ]
            words += [found[name, kind], "--metric", metric, "--values", values]
            done(CliRunner().invoke(main, [str(word) for word in words]))
    return found


def opened(*places):
    return [stores.at(place).verify() for place in places]


def check_same(one, other, *, every=(("all", True), (8, True), (8, False))):
    """Check that two indexes have the same fit, and with the same settings the same answers."""
    found = [
        [np.nan if part is None else part for part in asdict(model.settings).values()]
        for model in (one, other)
    ]
    assert_allclose(*found, rtol=1e-5)
    other = other.with_settings(one.settings)
    assert one.fitted == other.fitted
    for k, tail in every:
        a, b = (model.logits(QUERIES, k, tail).numpy() for model in (one, other))
        assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
    for a, b in zip(
        one.classify(QUERIES, neighbours=6), other.classify(QUERIES, neighbours=6), strict=True
    ):
        assert (a.label, a.no_match) == (b.label, b.no_match)
        assert [near.key_id for near in a.neighbours] == [near.key_id for near in b.neighbours]
        for what in ("affinity", "weight", "gives"):
            mine, theirs = ([getattr(near, what) for near in found.neighbours] for found in (a, b))
            assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_a_store_has_the_fit_of_a_folder(built, name):
    folder, store = opened(*(built[name, kind] for kind in KINDS))
    check_same(folder, store)
    assert (store.fitted.metric, store.fitted.values) == FORMS[name]
    assert store.provenance["fit"] == folder.provenance["fit"]
    for part in ("mean", "transform") if store.metric else ():
        found, expected = (getattr(model.metric, part).numpy() for model in (store, folder))
        assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    kept = {kind for kind in ("metric", "values", "scores") if getattr(store, kind) is not None}
    assert store.manifest.files.keys() == {"classes"} | kept
    assert has_points(built[name, "lance"]) == (
        name == "metric"
    )  # solved values need all keys, which are in memory


def has_points(place):
    store = stores.at(place)
    return store.table(store.manifest()).has_points


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_far_from_norm_1_is_refused_unless_a_metric_scales_it(built, name, kind, tmp_path):
    place = copied(tmp_path, kind, built[name, kind], kind)
    far = source(tmp_path / "far.parquet", 1000 * QUERIES[:1], NAMES[:1], ["far"])
    if name == "values":
        refused(lambda: changes.add(place, far, Reader(norms="keep")), "norm", error=InputError)
    else:
        changes.add(place, far, Reader(norms="keep"))
    (model,) = opened(place)
    assert model.n == 40 + (name != "values")


def test_a_different_beta_for_one_call_warns_once(run, built, tmp_path):
    asked = write_table(tmp_path / "asked.parquet", QUERIES)
    place = built["solved", "folder"]
    warn_once.cache_clear()
    for options, warnings in (((), 0), (("--beta", 6), 1), (("--beta", 7), 0)):
        stderr = run("classify", place, asked, "--format", "json", *options).stderr
        assert stderr.count("\n") == stderr.count("warning: beta") == warnings
    with TestClient(app_of(Path(place))) as client:
        for beta, warnings in ((None, 0), (6, 1)):
            found = client.post(
                "/v1/classify",
                json={"features": QUERIES.tolist()},
                params={"beta": beta} if beta else {},
            )
            assert len(found.json()["warnings"]) == warnings


@pytest.fixture
def small_limits(monkeypatch):
    """Set limits below forty keys for reading keys, choosing a form and estimating accuracy."""
    for module in (closed_form, ridge):
        monkeypatch.setattr(module, "MOST_SOLVED", 30)
    monkeypatch.setattr(closed_form, "CHOSEN_ON", 20)
    monkeypatch.setattr(closed_form, "JUDGED", 25)
    monkeypatch.setattr(index_model, "SUMS_FROM", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_refused_if_its_index_changed_while_photos_were_encoded(
    built, kind, tmp_path, monkeypatch
):
    place = copied(tmp_path, kind, built["metric", kind], kind)
    path = write_table(
        tmp_path / "val.parquet", QUERIES, [NAMES[i] for i in clusters(4, seed=5)[1]]
    )
    encode = Reader.encode

    def changing(reader, source):
        changes.remove(place, key_ids=[4])
        return encode(reader, source)

    monkeypatch.setattr(Reader, "encode", changing)
    fitting = partial(fit_index, place, validation=open_source(path), reader=Reader())
    refused(fitting, "changed meanwhile; run again", error=StoreError)
    assert stores.at(place).manifest().change.startswith("removed")


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("form", [{}, {"metric": "within"}, {"metric": "none"}], ids=str)
@pytest.mark.parametrize("source", ["shots", "val"])
def test_keys_that_are_read_in_parts_give_the_same_fit(built, form, source, tmp_path):
    places = [copied(tmp_path, kind, built["solved", kind], kind) for kind in KINDS]
    val = {}
    if source == "val":
        path = write_table(
            tmp_path / "val.parquet", QUERIES, [NAMES[i] for i in clusters(4, seed=5)[1]]
        )
        val = {"validation": open_source(path), "reader": Reader()}
    for place in places:
        changes.remove(place, key_ids=[4, 17])
    choices = [fit_index(place, **form, **val).fit for place in places]
    assert choices[0].form == choices[1].form
    assert (choices[0].n, choices[0].weakest, choices[0].photos) == (
        choices[1].n,
        choices[1].weakest,
        choices[1].photos,
    )
    one, other = opened(*places)
    assert (other.values, other.fitted) == (None, one.fitted)
    assert other.fitted.keys == 38
    check_same(one, other)


def test_solved_values_of_too_many_keys_are_refused(run, built, tmp_path, monkeypatch):
    place = copied(tmp_path, "lance", built["solved", "lance"])
    before = everything(place)
    monkeypatch.setattr(lance_store, "MOST_HELD", 40 * (16 + 5) * 4)
    more = open_source(table(tmp_path / "more.parquet", 1, 9, "more"))
    wanted = f"retrieval-tip fit {place} --values one-hot"
    refused(lambda: changes.add(place, more, Reader()), "45 keys", wanted, error=InputError)
    assert everything(place) == before
    done(run("fit", place, "--values", "one-hot"))
    assert len(changes.add(place, more, Reader()).key_ids) == 5
    monkeypatch.setattr(lance_store, "MOST_HELD", 30)
    out = made(tmp_path, "lance", "copy")
    refused(lambda: changes.clone(built["solved", "folder"], out), "one-hot", error=InputError)
    assert not stores.at(out).exists()
    refused(lambda: fit_index(place, values="solved"), "one-hot", error=InputError)
    assert stores.at(place).verify().fitted.values == "one-hot"


def test_points_that_do_not_match_their_keys_are_refused(built, tmp_path):
    place = copied(tmp_path, "lance", built["metric", "lance"])
    changes.add(place, open_source(table(tmp_path / "more.parquet", 1, 9, "more")), Reader())
    model = stores.at(place).verify()
    wrong = model.metric
    model.metric = type(wrong)(wrong.mean, wrong.transform.flip(0))
    refused(lambda: model.rows.check(model.metric), "points", "index set --index auto")
