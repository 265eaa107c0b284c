"""Answers without some of the keys, compared with the definition in dense float64."""

import csv
import hashlib
import io
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import cache_of, json_of, json_rows, ok
from dense import affinity, cache_logits, discriminant, nearest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose
from serving import app_of, build, caltech_photos
from tables import unit, write_table

from retrieval_tip import Classifier, Index, tip
from retrieval_tip.data import feature_table
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import of_images
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation import held_out
from retrieval_tip.fit.visible import without_folds
from retrieval_tip.index import places
from retrieval_tip.records import Fitted
from retrieval_tip.settings import Ask

N, D, C, Q = 90, 12, 6, 9
ALPHA, BETA, OFFSET = 1.7, 6.0, 0.05
RANDOM = default_rng(0)
MEANS = unit(RANDOM.normal(size=(C, D)))
IDS = np.sort(RANDOM.permutation(np.repeat(np.arange(C), [1, 30, 3, 20, 0, 36])))
KEYS = unit(MEANS[IDS] + 0.3 * RANDOM.normal(size=(N, D)))
VALUES = RANDOM.normal(size=(N, C)).astype(np.float32)
TEXT = unit(MEANS + 0.2 * RANDOM.normal(size=(C, D)))
QUERIES = np.concatenate(
    [KEYS[:3], unit(MEANS[RANDOM.integers(C, size=Q - 3)] + 0.3 * RANDOM.normal(size=(Q - 3, D)))]
)
NAMES = [f"class {i}" for i in range(C)]
METRIC = tip.Metric(torch.full((D,), 0.05), torch.from_numpy(np.eye(D, dtype=np.float32) + 0.1))
HIDDEN = (0, 1, 5, 31, 32, 33, 60, 89)
"""The only key of class 0, all keys of class 2, and some keys of the other classes."""


def index_of(kind="Flat", *, solved=False, metric=False, gamma=0.0):
    made = cache_of(
        KEYS,
        IDS,
        NAMES,
        TEXT,
        alpha=ALPHA,
        beta=BETA,
        gamma=gamma,
        log_offset=OFFSET if solved else None,
        index="Flat",
    )
    fitted = None
    if solved or metric:
        fitted = Fitted(
            "within" if metric else "none",
            "solved" if solved else "one-hot",
            0.8 if metric else None,
            0.1 if solved else None,
            N,
        )
    return made.with_fit(
        METRIC if metric else None, torch.from_numpy(VALUES) if solved else None, fitted, kind
    )


def dense(index, without, k, tail):
    """Return the logits by the definition."""
    own = index.settings
    seen = ~np.isin(np.arange(N), without)
    phi = (
        (lambda x: x)
        if index.metric is None
        else lambda x: index.metric(torch.from_numpy(x)).numpy()
    )
    K = phi(KEYS)[seen]
    f = phi(QUERIES.astype(np.float32))
    y = IDS[seen]
    A = affinity(f, K)
    cache = cache_logits(
        A, y, C, own.beta, None if index.values is None else VALUES[seen], nearest(A, k), tail=tail
    )
    if own.log_offset:
        cache = np.log1p(np.maximum(cache, 0) / own.log_offset)
    if own.gamma:
        cache = cache + own.gamma * discriminant(f, K, y, C)
    return own.logit_scale * affinity(QUERIES, TEXT) + own.alpha * cache


def answered(index, ask):
    return [
        one
        for block in index.answers([FeatureBlock.of(QUERIES)], ask)
        for one in block.predictions()
    ]


@pytest.mark.parametrize("kind", ["Flat", "HNSW32", "Classes", "lance://"])
@pytest.mark.parametrize("solved", [False, True], ids=["one-hot", "solved"])
@pytest.mark.parametrize(("gamma", "metric"), [(0.0, False), (3.0, True)], ids=["plain", "metric"])
def test_hidden_keys_count_nowhere(kind, solved, gamma, metric, tmp_path):
    stored = kind == "lance://"
    made = index = index_of("Flat" if stored else kind, solved=solved, metric=metric, gamma=gamma)
    if stored:
        place = places.at(f"{kind}{tmp_path / 'index'}")
        place.copy_from(made, "test")
        index = place.load()
    for k, tail in itertools.product((None, 7, 88), (False, True)):
        used = None if kind == "Classes" else k  # an index over classes then uses all keys
        found = answered(index, Ask(k=k, tail=tail, without=HIDDEN, neighbours=4))
        expected = dense(made, HIDDEN, used, tail)
        assert_allclose([one.logits for one in found], expected, rtol=1e-4, atol=1e-3)
        for one in found:
            assert one.neighbours
            assert not {
                *(shot.key_id for shot in one.neighbours),
                one.opposing and one.opposing.key_id,
            } & {*HIDDEN}


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, N - 1), max_size=N - 1), st.floats(0, 60), st.booleans())
def test_any_keys_may_be_hidden_at_any_beta(hidden, beta, solved):
    index = index_of(solved=solved, gamma=2.0).with_settings(
        replace(index_of().settings, beta=beta, gamma=2.0)
    )
    expected = dense(index, tuple(hidden), None, tail=True)
    found = answered(index, Ask(without=tuple(hidden)))
    assert_allclose([one.logits for one in found], expected, rtol=1e-4, atol=2e-3)


def test_hidden_keys_do_not_make_a_query_similar():
    index = index_of()
    index.settings = replace(index.settings, beta=200, least_cache=0.5)
    (alone,) = np.flatnonzero(IDS == 0)
    found = answered(index, Ask(without=(int(alone),)))
    assert answered(index, Ask())[0].no_match is False
    assert found[0].no_match is True


def test_unknown_keys_are_ignored_but_one_key_has_to_stay():
    index = index_of()
    assert answered(index, Ask(without=(N, 10**12))) == answered(index, Ask())
    with pytest.raises(InputError, match="leave at least one key"):
        answered(index, Ask(without=tuple(range(N))))


# --- photos that are shots


@pytest.fixture(scope="module")
def shots(shared, tmp_path_factory):
    """A fitted index of photos, and a folder with some of them among new ones."""
    folder = tmp_path_factory.mktemp("shots")
    (folder / "new").mkdir()
    train, test = (caltech_photos(shared, part, 3, 6) for part in ("train", "test"))
    for place, (path, _) in enumerate([*test[:3], *train[:2], *test[6:8], *train[7:10], test[13]]):
        shutil.copy(path, folder / "new" / f"{place:02}.jpg")
    return build(shared, folder / "index", train), sorted((folder / "new").iterdir())


def test_every_door_classifies_a_shot_without_itself_and_says_so(shots, run, lit_mini, tmp_path):
    place, photos = shots
    index = Index.load(place)
    features = Reader(lit_mini).encode(of_images([*map(str, photos)])).features
    known = [3, 4, 7, 8, 9]
    expected = list(index.classify(features))
    assert min(expected[i].probability for i in known) > 0.99
    keys = {digest: row for row, digest in enumerate(index.labels["digest"].to_pylist())}
    for i in known:  # eight photos or fewer are left out one at a time
        row = keys[hashlib.sha256(photos[i].read_bytes()).hexdigest()]
        [(_, others)] = without_folds(index, np.array([row]))
        assert others.n == index.n - 1
        expected[i] = others.classify(features[[i]])[0]
    labels = [one.label for one in expected]
    chances = [pytest.approx(one.probability, abs=1e-4) for one in expected]
    assert min(expected[i].probability for i in known) < 0.99

    shown = run(
        "classify",
        place,
        photos[0].parent,
        "--format",
        "json",
        "--explain",
        "--out",
        tmp_path / "a.json",
    )
    rows = [json.loads(line) for line in (tmp_path / "a.json").read_text().splitlines()]
    assert [row["input"] for row in rows] == [*map(str, photos)]
    told = "5 of 11 photos are shots of this index; each was classified without itself"
    assert shown.stderr.count(told) == 1
    grouped = run("classify", place, photos[0].parent, "--format", "json", "--group-no-match")
    assert told in grouped.stderr
    with TestClient(app_of(place)) as client:
        sent = [("images", (photo.name, photo.read_bytes())) for photo in photos]
        served = client.post("/v1/classify?neighbours=5", files=sent).json()["results"]
    own = Classifier.load(place).predict(photos)
    for found in (
        rows,
        json_rows(grouped),
        served,
        [*own.rows()],
    ):
        assert [(row["label"], row["probability"]) for row in found] == [
            *zip(labels, chances, strict=True)
        ]
    for found in (rows, served, [*own.rows()]):
        assert [i for i, row in enumerate(found) if row["shot"]] == known
        for i in known:
            digest = hashlib.sha256(photos[i].read_bytes()).hexdigest()
            assert keys[digest] not in [near["key_id"] for near in found[i]["neighbours"]]


def test_classify_answers_shots_as_evaluate_does(run, tmp_path):
    features = unit(np.repeat(MEANS, 9, 0) + 0.5 * RANDOM.normal(size=(9 * C, D)))
    labels = np.repeat(NAMES, 9).tolist()
    table = write_table(tmp_path / "shots.parquet", features, labels)
    ok("index build", table, "--out", tmp_path / "index")
    ok("classify", tmp_path / "index", table, "--out", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["input"] for row in rows] == [f"item-{i}" for i in range(9 * C)]
    right = np.mean([row["label"] == label for row, label in zip(rows, labels, strict=True)])
    facts = json_of("evaluate", tmp_path / "index", table)
    assert right == pytest.approx(facts["top1"])
    assert right < 1
    numbered = write_table(
        tmp_path / "numbered.parquet", -features
    )  # the same ids, but other features
    done = run("classify", tmp_path / "index", numbered)
    assert (done.exit_code, "shots" in done.stderr) == (0, False)


def test_shots_among_many_rows_keep_their_order_and_their_sets(run, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "WINDOW", 16)
    monkeypatch.setattr(feature_table, "TABLE_ROWS", 7)
    draw = default_rng(3)
    features = unit(np.repeat(MEANS, 20, 0) + 0.4 * draw.normal(size=(20 * C, D)))
    labels = np.repeat(NAMES, 20)
    train = write_table(
        tmp_path / "train.parquet",
        features[::2],
        labels[::2].tolist(),
        ids=[f"k{i}" for i in range(10 * C)],
    )
    ok("index build", train, "--out", tmp_path / "index")
    ids = [f"k{i // 2}" if i % 2 == 0 and 30 < i < 70 else f"new{i}" for i in range(20 * C)]
    mixed = write_table(tmp_path / "mixed.parquet", features, ids=ids)
    done = run(
        "classify", tmp_path / "index", mixed, "--coverage", 0.9, "--explain", "--format", "json"
    )
    rows = json_rows(done)
    assert [row["input"] for row in rows] == ids
    assert [row["shot"] for row in rows] == [one.startswith("k") for one in ids]
    assert f"{sum(row['shot'] for row in rows)} of {20 * C} photos are shots" in done.stderr
    plain = Index.load(tmp_path / "index").classify(features, coverage=0.9)
    assert [row["set"] for row in rows if not row["shot"]] == [
        one.set for one, row in zip(plain, rows, strict=True) if not row["shot"]
    ]


def test_an_index_that_cannot_hide_its_shots_answers_as_before(run, tmp_path, monkeypatch):
    table = write_table(tmp_path / "t.parquet", KEYS[:2], ["a", "a"], ids=["x", "x"])
    ok("index build", table, "--out", tmp_path / "one")
    done = run("classify", tmp_path / "one", table, "--format", "json")
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["a", "a"]
    assert "shots of this index" not in done.stderr
    monkeypatch.setattr(held_out, "MOST_COPIED", 1)
    index_of().save(tmp_path / "large")
    rows = write_table(tmp_path / "r.parquet", KEYS, ids=index_of().labels["source"].to_pylist())
    assert "shots of this index" not in run("classify", tmp_path / "large", rows).stderr


def test_an_index_of_one_class_says_so_with_its_answers(run, tmp_path):
    table = write_table(tmp_path / "t.parquet", KEYS[:6], ["ant"] * 6)
    ok("index build", table, "--out", tmp_path / "ants")
    told = "the index has one class, so every answer is ant; add photos of other classes"
    queries = write_table(tmp_path / "q.parquet", QUERIES)
    done = run("classify", tmp_path / "ants", queries, "--format", "csv")
    assert done.stderr.count(told) == 1
    assert done.stdout.splitlines()[0] == "input,label,probability,no_match"
    assert {row["no_match"] for row in csv.DictReader(io.StringIO(done.stdout))} == {""}
    for style in ("json", "parquet"):
        ok("classify", tmp_path / "ants", queries, "--out", tmp_path / "a", "--format", style)
        rows = pq.read_table(tmp_path / "a").to_pylist() if style == "parquet" else None
        rows = rows or [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
        assert {row["no_match"] for row in rows} == {None}
    with TestClient(app_of(tmp_path / "ants")) as client:
        answer = client.post("/v1/classify", json={"features": QUERIES.tolist()}).json()
    assert answer["warnings"] == [told]
    assert [row["no_match"] for row in answer["results"]] == [None] * len(QUERIES)


def test_python_warns_of_an_index_of_one_class(caplog):
    few = Index.from_features(KEYS[:6], [0] * 6, ["bee"])
    answers = Classifier(few, Reader()).predict(QUERIES)
    assert caplog.text.count("the index has one class, so every answer is bee") == 1
    assert [one.no_match for one in answers] == [None] * len(QUERIES)
    assert answers.written(["label"], "auto")["label"].null_count == 0
