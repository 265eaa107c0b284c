"""A fitted LanceDB store has the metric and values of a folder with the same keys."""

import itertools
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clusters import clusters, text_of
from conftest import SOAK, few
from dense import solved
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sealing import refused
from serving import app_of
from stored import copied, done, everything, made, rows_of, source
from tables import write_table

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


def check_derived(model):
    """Check that points belong to the keys, that solved values solve their system, and that the sums are right."""
    keys, ids, c = np.asarray(model.rows.in_memory().keys), model.class_ids.numpy(), len(model.class_names)
    if model.metric is not None and isinstance(model.rows, ArrayRows):
        points = model.metric(torch.from_numpy(keys.astype(np.float32))).numpy().astype(keys.dtype)
        np.testing.assert_allclose(np.asarray(model.rows.points), points, rtol=0, atol=4 * np.finfo(keys.dtype).eps)
    if model.values is not None:
        points, counts, own = np.asarray(model.vectors), np.array(model.counts), model.fitted
        ridges = (own.ridge * counts / counts[counts > 0].mean())[ids]
        expected = solved(points, ids, c, model.settings.beta, ridges)[:, counts > 0]
        np.testing.assert_allclose(model.values.numpy()[:, counts > 0], expected, atol=1e-4)
    if model.sums is not None:
        wide, one_hot = keys.astype(np.float64), np.eye(c)[ids]
        np.testing.assert_array_equal(model.sums.counts, one_hot.sum(0))
        np.testing.assert_allclose(model.sums.sums, one_hot.T @ wide, atol=1e-9)
        np.testing.assert_allclose(model.sums.second, wide.T @ wide, atol=1e-9)


FITS = [{"values": "one-hot"}, {"metric": "none"}, {"metric": "none", "values": "one-hot"}, {}]
EVERY = ["add", "class", "remove", "relabel", "rename", "merge", "beta", "dtype", "set", "rollback", "gc", "rebuild"]
EVERY += [f"fit {number}" for number in range(len(FITS))]


def step(place, model, tables, what, seed):
    """Make one change, which depends only on the key ids, class names and versions. Return the summary of its fit."""
    ids, names, random = sorted(model.labels["key_id"].to_pylist()), model.class_names, np.random.default_rng(seed)
    some, (first, second) = random.choice(ids, 3, replace=False).tolist(), random.permutation(names)[:2].tolist()
    there = stores.at(place).history()["version"].to_pylist()
    if what in ("add", "class"):
        labels, text = [first, second, first], None
        if what == "class":
            labels[0] = f"new {seed}"
            text = write_table(tables / "words.parquet", text_of()[seed % 5 :][:1], labels[:1])
        rows = clusters(1, 1000 + seed)[0][:3]
        more = source(tables / "step.parquet", rows, labels, [f"{seed} {i}" for i in range(3)])
        return changes.add(place, more, Reader(), text=text).fit
    calls = {
        "remove": lambda: changes.remove(place, key_ids=some),
        "relabel": lambda: changes.relabel(place, first, key_ids=some),
        "rename": lambda: changes.rename(place, first, f"renamed {seed}"),
        "merge": lambda: changes.rename(place, first, second) if len(names) > 3 else None,
        "beta": lambda: changes.configure(place, beta=1.0 + seed % 7),
        "dtype": lambda: changes.rebuild(place, dtype=["float16", "float32"][seed % 2]),
        "set": lambda: changes.configure(place, k=1 + seed % 9, alpha=0.5 * (1 + seed % 5)),
        "rollback": lambda: changes.rollback(place, there[seed % len(there)]),
        "gc": lambda: stores.at(place).collect(1 + seed % 3),
        "rebuild": lambda: changes.rebuild(place),
    }
    return fit_index(place, **FITS[int(what[4:])]) if what.startswith("fit") else getattr(calls[what](), "fit", None)


@settings(max_examples=6 if SOAK else 1, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.permutations(EVERY), st.integers(0, 999))
@pytest.mark.parametrize("name", FORMS)
def test_the_same_changes_give_the_same_folder_and_store(name, built, tmp_path_factory, steps, seed):
    """Each fit, answer, point, value and sum is the same, and copies have them, too."""
    tmp_path = tmp_path_factory.mktemp("ways")
    places = [copied(tmp_path, kind, built[name, kind], kind) for kind in KINDS]
    models, left_out = opened(*places), None if SOAK else [*FORMS].index(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_model, "SUMS_FROM", 0)
        for number, what in enumerate(steps):
            if number % 3 == left_out:
                continue
            one, other = (str(step(*both, tmp_path, what, seed + number)) for both in zip(places, models, strict=True))
            assert one.rpartition(" (")[0] == other.rpartition(" (")[0]
            models = one, other = opened(*places)
            assert rows_of(one.labels) == rows_of(other.labels)
            check_same(one, other)
            assert (one.counts, one.version) == (other.counts, other.version)
            assert has_points(places[1]) == (other.metric is not None and other.values is None)
            for model in models:
                check_derived(model)
    for kind, place in zip(("lance", "folder", "s3"), (*places, places[1]), strict=True):
        changes.clone(place, out := made(tmp_path, kind, f"{kind}-copy"))
        check_same(*opened(place, out))


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


def test_a_new_beta_fits_the_index_again_only_if_it_differs(built, tmp_path):
    place = copied(tmp_path, "folder", built["solved", "folder"])
    before = stores.at(place).load(device="cpu").settings
    assert str(changes.configure(place, beta=6.0, temperature=2.0).fit).startswith("Estimated accuracy")
    found = stores.at(place).load(device="cpu").settings
    assert (found.beta, found.temperature) == (6.0, 2.0)
    assert (found.alpha, found.least_cache) != (before.alpha, before.least_cache)
    changes.configure(place, beta=6.0, alpha=3.0)
    assert stores.at(place).load(device="cpu").settings == replace(found, alpha=3.0)


def test_a_different_beta_for_one_call_warns_once(run, built, tmp_path):
    asked, place = write_table(tmp_path / "asked.parquet", QUERIES), built["solved", "folder"]
    warn_once.cache_clear()
    for options, warnings in (((), 0), (("--beta", 6), 1), (("--beta", 7), 0)):
        stderr = run("classify", place, asked, "--format", "json", *options).stderr
        assert stderr.count("\n") == stderr.count("warning: beta") == warnings
    with TestClient(app_of(Path(place))) as client:
        for beta, warnings in ((None, 0), (6, 1)):
            found = client.post(
                "/v1/classify", json={"features": QUERIES.tolist()}, params={"beta": beta} if beta else {}
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
