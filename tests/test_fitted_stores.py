"""A fitted LanceDB store has the metric and values of a folder with the same keys."""

import itertools
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import lancedb
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clusters import clusters, text_of
from conftest import SOAK, few, nearest_keys
from dense import solved
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sealing import refused
from stored import copied, done, everything, labels_of, made, put
from tables import unit_rows, write_table

from retrieval_tip import model as index_model
from retrieval_tip.cli import main
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, StoreError, warn_once
from retrieval_tip.fit import closed_form
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.build import build_index
from retrieval_tip.index.changes import fit_index
from retrieval_tip.lance import lance_store
from retrieval_tip.lance import rows as lance_rows
from retrieval_tip.retrieval import ridge
from retrieval_tip.retrieval.rows import ArrayRows
from retrieval_tip.server.app import create_app
from retrieval_tip.server.served import open_all

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("bucket", "one_thread")]

FORMS = {"solved": ("within", "solved"), "metric": ("within", "one-hot"), "values": ("none", "solved")}
"""Metric and values of each form."""
NAMES = [f"class {i}" for i in range(5)]
QUERIES = clusters(4, seed=5)[0]
KINDS = ("folder", "lance")


def table(path, shots=8, seed=0, prefix="it's"):
    keys, ids = clusters(shots, seed)
    order = np.random.default_rng(1).permutation(len(ids))  # a source has random order
    return write_table(path, keys[order], [NAMES[i] for i in ids[order]], [f"{prefix} {i}" for i in order])


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
            words = ["index", "build", place / "train.parquet", "--text", place / "text.parquet", "--out"]
            words += [found[name, kind], "--metric", metric, "--values", values]
            done(CliRunner().invoke(main, [str(word) for word in words]))
    return found


def opened(*places):
    return [stores.at(place).verify() for place in places]


def check_same(one, other, *, every=(("all", True), (8, True), (8, False))):
    """Check that two indexes have the same fit, and with the same settings the same answers."""
    found = [[np.nan if part is None else part for part in asdict(model.settings).values()] for model in (one, other)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    other = other.with_settings(one.settings)
    assert one.fitted == other.fitted
    for k, tail in every:
        a, b = (model.logits(QUERIES, k, tail).numpy() for model in (one, other))
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
    for a, b in zip(one.classify(QUERIES, neighbours=6), other.classify(QUERIES, neighbours=6), strict=True):
        assert (a.label, a.no_match) == (b.label, b.no_match)
        assert [near.key_id for near in a.neighbours] == [near.key_id for near in b.neighbours]
        for what in ("affinity", "weight", "gives"):
            mine, theirs = ([getattr(near, what) for near in found.neighbours] for found in (a, b))
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_a_store_has_the_fit_of_a_folder(built, name):
    folder, store = opened(*(built[name, kind] for kind in KINDS))
    check_same(folder, store)
    assert (store.fitted.metric, store.fitted.values) == FORMS[name]
    assert store.provenance["fit"] == folder.provenance["fit"]
    for part in ("mean", "transform") if store.metric else ():
        found, expected = (getattr(model.metric, part).numpy() for model in (store, folder))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    kept = {kind for kind in ("metric", "values", "scores") if getattr(store, kind) is not None}
    assert store.manifest.files.keys() == {"classes"} | kept
    assert has_points(built[name, "lance"]) == (name == "metric")  # solved values need all keys, which are in memory


PIECES = [*itertools.product(("metric", "plain"), (1000, 20, 5)), ("solved", 20), ("values", 20)]


@pytest.mark.parametrize(("name", "held"), few(PIECES, 4))
def test_whole_classes_are_searched_as_in_a_folder(built, name, held, tmp_path, monkeypatch):
    """``held`` keys are all keys, some classes, or a part of a class. With solved values, all keys are in memory."""
    monkeypatch.setattr(lance_rows, "PIECE", held * 4 * QUERIES.shape[1])
    places = [copied(tmp_path, kind, built[name, kind], kind) for kind in KINDS]
    more = open_source(table(tmp_path / "more.parquet", 1, 9, "more"))
    for place in places:
        changes.rebuild(place, index="Classes")
        changes.add(place, more, Reader())
        changes.relabel(place, NAMES[2], key_ids=[1, 20, 41])
    folder, store = opened(*places)
    assert folder.index_type == store.index_type == "Classes"
    if name in ("metric", "plain"):
        keys, sums = store.retrieval.keys, torch.zeros(5, QUERIES.shape[1])
        for place, part, _ in keys.of_classes(np.arange(5)):
            sums[place] += part.sum(dim=0)
        np.testing.assert_allclose(sums, keys.sums, atol=1e-4)
        if held > max(folder.counts):  # otherwise the slack comes from different keys
            check_same(folder, store, every=[("all", True)])
            winners = [model.logits(QUERIES, 8).argmax(1) for model in (folder, store)]
            torch.testing.assert_close(*winners)  # the slack comes from different samples of the keys
    else:  # with solved values, a store searches the nearest keys in memory
        check_same(folder, store, every=[("all", True)])
    for place in places:
        fit_index(place)
    check_same(*opened(*places))  # one-hot values, because values cannot be solved for whole classes


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 4), st.integers(0, 999)),
        st.tuples(st.just("remove"), st.integers(1, 3), st.integers(0, 999)),
        st.tuples(st.just("relabel"), st.integers(1, 3), st.integers(0, 999)),
        st.tuples(st.just("set"), st.integers(1, 9), st.just(0)),
        st.tuples(st.just("rollback"), st.just(0), st.integers(0, 999)),
        st.tuples(st.just("rebuild"), st.just(0), st.just(0)),
        st.tuples(st.just("gc"), st.integers(1, 3), st.just(0)),
    ),
    min_size=5,
    max_size=7,
)


def step(place, tables, what, m, seed, number):
    """Make one change, which depends only on the key ids, class names and versions of the index."""
    ids = sorted(labels_of(place))
    random = np.random.default_rng(seed)
    if what == "add":
        names = stores.at(place).manifest().class_names
        labels = [names[i] for i in random.integers(0, len(names), m)]
        table = write_table(
            tables / "step.parquet",
            unit_rows(m, QUERIES.shape[1], 1000 + number),
            labels,
            [f"s{number} {i}" for i in range(m)],
        )
        return changes.add(place, open_source(table), Reader())
    if what == "remove":
        return changes.remove(place, key_ids=random.choice(ids, min(m, len(ids) - 1), replace=False).tolist())
    if what == "relabel":
        chosen = random.choice(ids, min(m, len(ids)), replace=False).tolist()
        return changes.relabel(place, stores.at(place).manifest().class_names[seed % 3], key_ids=chosen)
    if what == "set":
        return changes.configure(place, k=m, alpha=0.5 * m)
    if what == "rollback":
        there = stores.at(place).history()["version"].to_pylist()
        return changes.rollback(place, there[seed % len(there)])
    if what == "gc":
        return stores.at(place).collect(m)
    return changes.rebuild(place)


@settings(max_examples=6 if SOAK else 1, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
@pytest.mark.parametrize("name", FORMS)
def test_the_same_changes_give_the_same_folder_and_store(steps, name, built, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("ways")
    places = [copied(tmp_path, kind, built[name, kind], kind) for kind in KINDS]
    for number, (what, m, seed) in enumerate(steps):
        for place in places:
            step(place, tmp_path, what, m, seed, number)
    assert labels_of(places[0]) == labels_of(places[1])
    one, other = opened(*places)
    check_same(one, other)
    assert one.counts == other.counts


@pytest.mark.parametrize("name", FORMS)
def test_classes_are_added_with_their_text_and_renamed(name, built, tmp_path):
    write_table(tmp_path / "words.parquet", text_of()[:1], ["new"])
    more = open_source(write_table(tmp_path / "new.parquet", clusters(1, 3)[0][:2], ["new", NAMES[0]]))
    places = [copied(tmp_path, kind, built[name, kind], kind) for kind in KINDS]
    for place in places:
        changes.add(place, more, Reader(), text=tmp_path / "words.parquet")
        changes.rename(place, NAMES[1], "renamed")
    one, other = opened(*places)
    assert other.class_names == [NAMES[0], "renamed", *NAMES[2:], "new"]
    check_same(one, other)
    with stores.at(places[1]).change() as change:
        change.index.rename("renamed", "again")
        same_names = [near.label for one in change.index.classify(QUERIES, neighbours=40) for near in one.neighbours]
        assert "again" in same_names
        assert "renamed" not in same_names


COPIES = [*itertools.product(FORMS, KINDS), ("solved", "s3"), ("metric", "s3")]


@pytest.mark.parametrize(("name", "to"), few(COPIES, 4))
def test_a_copy_keeps_the_fit(run, built, name, to, tmp_path):
    for kind in KINDS:
        out = made(tmp_path, to, f"{kind}-copy")
        done(run("index", "clone", built[name, kind], out))
        check_same(*opened(built[name, kind], out))
        changes.remove(out, key_ids=[5])
        assert stores.at(out).verify().n == 39


def test_a_store_can_be_fitted_again(run, built, tmp_path):
    """Fit other forms and the first one again, as in a folder. Columns of the previous form are removed."""
    places = [copied(tmp_path, kind, built["solved", kind], kind) for kind in KINDS]
    asked = write_table(tmp_path / "val.parquet", QUERIES, [NAMES[i] for i in clusters(4, seed=5)[1]])
    ways = (["--values", "one-hot"], ["--metric", "none", "--values", "one-hot"], ["--val", asked], [])
    for version, words in enumerate((*ways, ["--values", "one-hot", "--metric", "within"]), 2):
        said_by = [run("fit", place, *words) for place in places]
        assert [result.exit_code for result in said_by] == [0, 0], said_by[1].output
        judged = [result.stderr.splitlines()[-1].rpartition(" (")[0] for result in said_by]
        assert judged[0] == judged[1]
        one, other = opened(*places)
        check_same(one, other)
        assert other.version == version
        assert has_points(places[1]) == (other.metric is not None and other.values is None)
    assert done(run("index", "rollback", places[1], 1)).endswith("rolled back\n")
    check_same(*opened(built["solved", "folder"], places[1]))
    wrong = run("fit", places[1], "--values", "solved", "--metric", "none", "--val", "nothing.parquet")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)


def has_points(place):
    store = stores.at(place)
    return store.table(store.manifest()).has_points


def check_derived(model, dtype):
    """Check that points belong to the keys, and that solved values solve their system."""
    if model.metric is not None and isinstance(model.rows, ArrayRows):
        points = model.metric(torch.from_numpy(np.asarray(model.keys, dtype=np.float32))).numpy().astype(dtype)
        np.testing.assert_allclose(np.asarray(model.rows.points), points, rtol=0, atol=4 * np.finfo(dtype).eps)
    if model.values is not None:
        points, ids = np.asarray(model.vectors), model.class_ids.numpy()
        expected = solved(points, ids, len(model.class_names), model.settings.beta, model.fitted.ridge)
        np.testing.assert_allclose(model.values, expected, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_a_key_far_from_norm_1_is_refused_unless_a_metric_scales_it(built, name, tmp_path):
    """Over HTTP, the refusal is an error of the client."""
    for kind in KINDS:
        place = copied(tmp_path, kind, built[name, kind], kind)
        folder = place if kind == "lance" else Path(place)
        sent = {"features": (1000 * QUERIES[:1]).tolist(), "labels": [NAMES[0]]}
        app = create_app(open_all([folder], "cpu", "float32", None), token="open sesame")
        with TestClient(app) as client:
            route = f"/v1/indexes/{stores.at(place).name}/keys"
            headers = {"authorization": "Bearer open sesame"}
            answer = client.post(route, json=sent, params={"norms": "keep"}, headers=headers)
        assert answer.status_code == (422 if name == "values" else 201), answer.text
        (model,) = opened(place)
        assert model.n == 40 + (name != "values")


@pytest.mark.parametrize("name", FORMS)
def test_a_new_beta_refits_the_index(built, name, tmp_path):
    places = [copied(tmp_path, kind, built[name, kind], kind) for kind in KINDS]
    before = stores.at(places[0]).load(device="cpu").settings
    summaries = [str(changes.configure(place, beta=6.0, temperature=2.0).fit) for place in places]
    assert summaries[0] == summaries[1]
    assert summaries[0].startswith("Estimated accuracy")
    one, other = opened(*places)
    check_same(one, other)
    assert (one.settings.beta, one.settings.temperature) == (6.0, 2.0)
    for what in ("alpha", "least_cache"):
        assert getattr(one.settings, what) != getattr(before, what)
    for model in (one, other):
        check_derived(model, np.float32)
    changes.configure(places[0], beta=6.0, alpha=3.0)  # the beta is the same, so nothing is fitted
    assert stores.at(places[0]).load(device="cpu").settings == replace(one.settings, alpha=3.0)


def test_a_different_beta_for_one_call_warns_once(run, built, tmp_path):
    asked, place = write_table(tmp_path / "asked.parquet", QUERIES), built["solved", "folder"]
    warn_once.cache_clear()
    for options, warnings in (((), 0), (("--beta", 6), 1), (("--beta", 7), 0)):
        stderr = run("classify", place, asked, "--format", "json", *options).stderr
        assert stderr.count("\n") == stderr.count("warning: beta") == warnings
    with TestClient(create_app(open_all([Path(place)], "cpu", "float32", None))) as client:
        for beta, warnings in ((None, 0), (6, 1)):
            found = client.post(
                "/v1/classify", json={"features": QUERIES.tolist()}, params={"beta": beta} if beta else {}
            )
            assert len(found.json()["warnings"]) == warnings


@pytest.mark.parametrize("name", FORMS)
def test_derived_arrays_are_recomputed_for_another_dtype(built, name, tmp_path):
    for kind in KINDS:
        place = copied(tmp_path, kind, built[name, kind], kind)
        for dtype in (np.float16, np.float32):
            changes.rebuild(place, dtype=np.dtype(dtype).name)
            (model,) = opened(place)
            assert model.dtype == np.dtype(dtype).name
            check_derived(model, dtype)
        there = made(tmp_path, "lance" if kind == "folder" else "folder", f"there-{kind}")
        changes.clone(place, there)
        check_same(*opened(place, there))


@pytest.fixture
def small_limits(monkeypatch):
    """Set limits below forty keys for reading keys, choosing a form and estimating accuracy."""
    for module in (closed_form, ridge):
        monkeypatch.setattr(module, "MOST_SOLVED", 30)
    monkeypatch.setattr(closed_form, "CHOSEN_ON", 20)
    monkeypatch.setattr(closed_form, "JUDGED", 25)
    monkeypatch.setattr(index_model, "SUMS_FROM", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_refused_if_its_index_changed_while_photos_were_encoded(built, kind, tmp_path, monkeypatch):
    place = copied(tmp_path, kind, built["metric", kind], kind)
    path = write_table(tmp_path / "val.parquet", QUERIES, [NAMES[i] for i in clusters(4, seed=5)[1]])
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
        path = write_table(tmp_path / "val.parquet", QUERIES, [NAMES[i] for i in clusters(4, seed=5)[1]])
        val = {"validation": open_source(path), "reader": Reader()}
    for place in places:
        changes.remove(place, key_ids=[4, 17])
    choices = [fit_index(place, **form, **val) for place in places]
    assert choices[0].form == choices[1].form
    assert (choices[0].n, choices[0].folds, choices[0].photos) == (choices[1].n, choices[1].folds, choices[1].photos)
    one, other = opened(*places)
    assert (other.values, other.fitted) == (None, one.fitted)
    assert other.fitted.keys == 38
    check_same(one, other)


@pytest.mark.usefixtures("small_limits")
def test_the_vector_index_covers_the_points(tmp_path, monkeypatch):
    monkeypatch.setattr(lance_rows, "INDEX_FROM", 500)
    place, source = made(tmp_path, "lance"), table(tmp_path / "many.parquet", 200)
    build_index(open_source(source), place, Reader(), metric="within", k=16, device="cpu")
    model = stores.at(place).verify()
    assert (model.index_type, model.fitted.metric, model.rows.table.vector_column) == ("IvfFlat", "within", "_point")
    own = lancedb.connect(model.rows.table.address.uri).open_table("keys")
    assert [list(entry.columns) for entry in own.list_indices()] == [["_point"]]
    assert (
        len([name for name in everything(place) if name.startswith("keys.lance/data/")]) == 1
    )  # no data of an earlier version
    points = model.metric(torch.from_numpy(model.rows.in_memory().keys)).numpy()
    wanted = model.metric(torch.from_numpy(QUERIES)).numpy() @ points.T
    near = model.retrieval.keys.nearest(model.retrieval.keys.phi(torch.from_numpy(QUERIES)), 10).affinity.numpy()
    assert np.isclose(near, -np.sort(-wanted, axis=1)[:, :10], atol=1e-5).mean() > 0.9
    changes.add(place, open_source(table(tmp_path / "more.parquet", 1, 9, "more")), Reader())
    late = [one["key_id"] for [one] in nearest_keys(stores.at(place).verify(), clusters(1, 9)[0])]
    assert sorted(late) == list(range(1000, 1005))


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


@pytest.mark.parametrize("kind", ["metric", "values"])
@pytest.mark.parametrize("damage", ["changed", "missing", "of another index"])
def test_a_damaged_object_is_named(built, kind, damage, tmp_path):
    place = copied(tmp_path, "lance", built["solved", "lance"])
    entry = stores.at(place).manifest().files[kind]
    raw = everything(place)[entry.name]
    other = {"changed": raw[:-1] + bytes([raw[-1] ^ 1]), "missing": None, "of another index": raw[: len(raw) // 2]}
    put(place, entry.name, other[damage])
    for call in (lambda: stores.at(place).load(device="cpu"), stores.at(place).verify):
        refused(call, entry.name)


def test_points_that_do_not_match_their_keys_are_refused(built, tmp_path):
    place = copied(tmp_path, "lance", built["metric", "lance"])
    changes.add(place, open_source(table(tmp_path / "more.parquet", 1, 9, "more")), Reader())
    model = stores.at(place).verify()
    wrong = model.metric
    model.metric = type(wrong)(wrong.mean, wrong.transform.flip(0))
    refused(lambda: model.rows.check(model.metric), "points", "index set --index auto")


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_grown_photo_by_photo_is_as_accurate_as_one_built_at_once(kind, tmp_path):
    """It is fitted again whenever it has grown by an eighth, and then equals an index that was built at once."""
    keys, ids = clusters(8)
    order = np.argsort(np.arange(len(ids)) % 8, kind="stable")  # one shot per class at a time
    queries, truth = clusters(40, seed=5)
    text = write_table(tmp_path / "text.parquet", text_of(), NAMES)
    place, number = made(tmp_path, kind), 0
    for stop in (5, 6, 10, 11, 20, 22, 23, 25, 40):
        rows, number = order[number:stop], stop
        part = write_table(tmp_path / f"{stop}.parquet", keys[rows], [NAMES[i] for i in ids[rows]], [*map(str, rows)])
        if stop == 5:
            build_index(open_source(part), place, Reader(), text=text, device="cpu")
            continue
        added = changes.add(place, open_source(part), Reader())
        assert (added.fit is not None, added.fit_due) == (stop not in (11, 22, 25), False)
    grown = stores.at(place).verify()
    assert grown.fitted.keys == 40
    labels, names = [NAMES[i] for i in ids[order]], [*map(str, order)]
    whole = write_table(tmp_path / "whole.parquet", keys[order], labels, names)
    once = build_index(open_source(whole), made(tmp_path, kind, "once"), Reader(), text=text, device="cpu")
    right = [(model.logits(queries).argmax(1).numpy() == truth).mean() for model in (grown, once)]
    assert right[0] == pytest.approx(right[1], abs=0.01)
    found = [np.nan if part is None else part for part in asdict(grown.settings).values()]
    expected = [np.nan if part is None else part for part in asdict(once.settings).values()]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_change_if_a_class_gets_its_first_photos_or_loses_all(kind, tmp_path):
    keys, ids = clusters(6)
    text, some = write_table(tmp_path / "text.parquet", text_of(), NAMES), ids < 4
    first, rest = (
        write_table(
            tmp_path / name, keys[part], [NAMES[i] for i in ids[part]], [f"{name} {i}" for i in np.flatnonzero(part)]
        )
        for name, part in (("first.parquet", some), ("rest.parquet", ~some))
    )
    place = made(tmp_path, kind)
    build_index(open_source(first), place, Reader(), text=text, device="cpu")
    alphas = [stores.at(place).load(device="cpu").settings.alpha]
    added = changes.add(place, open_source(rest), Reader())
    alphas.append(stores.at(place).load(device="cpu").settings.alpha)
    assert (added.fit.without_shots, added.fit_due) == (0, False)
    removed = changes.remove(place, key_ids=added.key_ids)
    alphas.append(stores.at(place).load(device="cpu").settings.alpha)
    assert removed.fit.without_shots == 1
    assert alphas[0] == pytest.approx(alphas[2], rel=1e-3)
    assert alphas[0] != pytest.approx(alphas[1], rel=1e-3)
    assert changes.remove(place, key_ids=[0]).fit is None
    moved = changes.relabel(place, NAMES[4], key_ids=[1, 2])
    assert moved.fit.without_shots == 0
    changes.configure(place, alpha=3.0)
    merged = changes.rename(place, NAMES[4], NAMES[0])
    assert (merged.fit, merged.fit_due) == (None, False)  # all classes have photos, before and after
    removed = changes.remove(place, where=f"label = '{NAMES[1]}'")
    assert (removed.fit, removed.fit_due) == (None, True)
    assert stores.at(place).load(device="cpu").settings.alpha == 3.0
