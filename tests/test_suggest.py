"""Suggestions of photos to label: against their definition, and the command on features and photos."""

import csv
import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import LIT_MINI, fitted, json_rows, ok
from hypothesis import given
from hypothesis import strategies as st
from serving import caltech_photos
from tables import unit, unit_rows, write_table

from retrieval_tip import Classifier, Index, tip
from retrieval_tip.cli import main
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.labelling import pool as module
from retrieval_tip.labelling import suggest as choice
from retrieval_tip.labelling.suggest import suggest


def kernel(a, b):
    return np.maximum(a @ b.T, 0) ** 2


@given(
    st.integers(1, 40),
    st.integers(1, 45),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_suggestions_match_the_greedy_definition(m, n, k, with_metric, seed):
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(m, 6)).astype(np.float32)
    known = draw.normal(size=(k, 6)).astype(np.float32)
    features[m // 2 :: 3] = features[0]  # copies
    weights = draw.random(m) * (draw.random(m) < 0.8)
    mean = features.mean(axis=0)
    transform = np.eye(6, dtype=np.float32)
    if with_metric:
        mean, transform = (draw.normal(size=shape).astype(np.float32) for shape in (6, (6, 6)))
    metric = tip.Metric(*map(choice.torch.from_numpy, (mean, transform))) if with_metric else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "STALE", 3)
        patch.setattr(choice, "BLOCK", 7)
        picks = suggest(
            features, n, uncertainty=weights, labelled=known if k else None, metric=metric
        )
    points, keys = ((rows - mean).astype(float) @ transform for rows in (features, known))
    points, keys = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        for rows in (points, keys)
    )
    similarity = kernel(points, points)
    covered = kernel(points, keys).max(axis=1, initial=0)
    left = np.ones(m, dtype=bool)
    assert len(set(picks.rows.tolist())) == len(picks.rows) == min(n, m)
    for row in picks.rows:
        gains = weights @ np.maximum(similarity - covered[:, None], 0)
        assert gains[row] >= gains[left].max() - 1e-4
        left[row], covered = False, np.maximum(covered, similarity[row])
    cosines = points @ points[picks.rows].T
    near = np.maximum(np.max(points @ keys.T, axis=1, initial=0), 0)
    clear = left & (np.abs(cosines.max(axis=1) - near) > 1e-5)
    counts = np.bincount(
        cosines[clear & (cosines.max(axis=1) > near)].argmax(axis=1), minlength=len(picks.rows)
    )
    assert abs(picks.covers - counts).sum() <= 2 * (left & ~clear).sum() + 2 * ties(cosines[left])


def ties(cosines):
    two = np.sort(cosines, axis=1)[:, -2:]
    return (np.diff(two, axis=1) < 1e-5).sum() if two.shape[1] > 1 else 0


def test_a_large_pool_needs_limited_memory_and_uncertain_photos_come_first(monkeypatch):
    sizes = []
    similarity = choice.similarity
    monkeypatch.setattr(
        choice, "similarity", lambda a, b: sizes.append(len(a) * len(b)) or similarity(a, b)
    )
    monkeypatch.setattr(choice, "CROWD", 64)
    features = unit_rows(5000, 16)
    weights = np.zeros(5000)
    features[40:60] = unit(unit_rows(20, 16, 1) + 3 * unit_rows(1, 16, 2))
    weights[40:60] = 1
    assert suggest(features, 1, uncertainty=weights).rows[0] in range(40, 60)
    picks = suggest(features, 30)
    assert len(set(picks.rows.tolist())) == 30
    points = unit(features - features.mean(axis=0))
    assert picks.covers.sum() == ((points @ points[picks.rows].T).max(axis=1) > 0).sum() - 30
    assert max(sizes) <= choice.BLOCK * choice.CROWD_PER_PICK * 30
    monkeypatch.setattr("retrieval_tip.machine.memory", lambda: 1000)
    with pytest.raises(UsageError, match="memory"):
        suggest(features, 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features": np.full((4, 8), np.nan)}, "features"),
        ({"features": np.ones(8)}, "features"),
        ({"n": 0}, "n"),
    ],
)
def test_errors_name_the_bad_argument(change, named):
    with pytest.raises((InputError, UsageError), match=f"^{named}\\b"):
        suggest(**{"features": unit_rows(4, 8), "n": 2} | change)


@pytest.fixture
def index(tmp_path):
    """A fitted index with an uneven number of shots, and a table of other features."""
    centres = 2 * unit_rows(3, 8, 5)
    ids = np.repeat([0, 1, 2], [8, 4, 2])
    rows = unit(centres[ids] + unit_rows(14, 8))
    cache = fitted(
        Index.from_features(rows, ids, ["a", "b", "c"], sources=[f"shot-{i}" for i in range(14)])
    )
    cache.save(tmp_path / "index")
    pool = unit(centres[np.arange(30) % 3] + unit_rows(30, 8, 1))
    return tmp_path / "index", write_table(tmp_path / "pool.parquet", pool), pool


def test_an_index_provides_metric_uncertainty_and_labelled_keys(index, run, tmp_path):
    folder, table, pool = index
    cache = Index.load(folder)
    answers = cache.classify(pool)
    examples = np.array([{"a": 8, "b": 4, "c": 2}[answer.label] for answer in answers])
    doubts = 1 - answers.to_arrow()["probability"].to_numpy() * examples / (examples + 4)
    picks = suggest(pool, 6, uncertainty=doubts, labelled=cache.keys, metric=cache.metric)
    out = tmp_path / "next.parquet"
    done = run("suggest", table, "-n", 6, "--index", folder, "--out", out)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "suggested 6 photos of 30\n")
    rows = pq.read_table(out).to_pylist()
    assert list(rows[0]) == ["rank", "input", "label", "probability", "covers", "why"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["input"] for row in rows] == [f"item-{row}" for row in picks.rows]
    assert [row["covers"] for row in rows] == picks.covers.tolist()
    assert [row["label"] for row in rows] == [answers[row].label for row in picks.rows]
    assert Classifier.load(folder).suggest(pool, 6).inputs == [str(row) for row in picks.rows]


def test_known_features_are_skipped_and_sampling_is_reported(index, run, monkeypatch, tmp_path):
    folder, table, pool = index
    opened = Index.load(folder)
    shots = dict(zip(opened.labels["source"].to_pylist(), opened.keys, strict=True))
    rows = [shots["shot-3"], pool[1], pool[2], shots["shot-0"]]
    mixed = write_table(
        tmp_path / "mixed.parquet", rows, ids=["shot-3", "new-1", "shot-2", "shot-0"]
    )
    done = run("suggest", mixed, "--index", folder, "--format", "json")
    assert {json.loads(line)["input"] for line in done.stdout.splitlines()} == {
        "new-1",
        "shot-2",
    }  # another photo
    assert "skipped 2" in done.stderr
    old = write_table(tmp_path / "old.parquet", rows[:1], ids=["shot-3"])
    assert run("suggest", old, "--index", folder).exit_code == 1
    monkeypatch.setattr(module, "MOST_PHOTOS", 9)
    done = run("suggest", table, mixed, "-n", 50, "--index", folder, "--format", "csv")
    assert len(done.stdout.splitlines()) == 1 + 9
    assert "9, drawn at random from 34" in done.stderr


def test_without_an_index_no_label_is_guessed(index, run, tmp_path):
    _, table, pool = index
    cold = list(
        csv.DictReader(io.StringIO(run("suggest", table, "-n", 5, "--format", "csv").stdout))
    )
    picks = suggest(pool, 5).rows
    assert [(row["input"], row["label"], row["probability"]) for row in cold] == [
        (f"item-{i}", "", "") for i in picks
    ]
    shorter = write_table(tmp_path / "short.parquet", unit_rows(2, 7), ["cat", "dog"])
    for wrong in ((table, shorter), (write_table(tmp_path / "nan.parquet", [[np.nan]]),)):
        done = run("suggest", *wrong)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert run("suggest", write_table(tmp_path / "long.parquet", 3 * pool)).exit_code == 1
    ok("suggest", write_table(tmp_path / "long.parquet", 3 * pool), "--norms", "unit")


def test_label_and_suggest_share_their_options():
    ours, theirs = (
        {one.name: one for one in main.commands[name].params} for name in ("suggest", "label")
    )
    shared = ours.keys() & theirs.keys()
    assert {"photos", "model", "no_cache"} <= shared
    assert all(ours[name].to_info_dict() == theirs[name].to_info_dict() for name in shared)
    assert ours.keys() - shared == {"number", "index", "named", "output"}
    assert theirs.keys() - shared == {"classes", "out", "port"}


def test_photos_are_suggested_from_a_folder_or_a_list(shared, things, tmp_path, run):
    inbox = tmp_path / "inbox"
    model = LIT_MINI
    inbox.mkdir()
    for place, (path, label) in enumerate(caltech_photos(shared, "test", 3, 2)):
        shutil.copy(path, inbox / f"{place}-{label}.jpg")
    known = caltech_photos(shared, "train", 1, 1)[0][0]
    shutil.copy(known, inbox / "copy-of-a-shot.jpg")
    (inbox / "broken.jpg").write_bytes(b"no image")
    new = {str(path) for path in inbox.iterdir() if path.name[0].isdigit()}
    done = run("suggest", inbox, known, "--index", things, "--format", "json")
    assert done.exit_code == 3, done.output
    rows = json_rows(done)
    assert {row["input"] for row in rows} == new
    assert "skipped 2" in done.stderr
    assert all(row["label"] and row["why"] for row in rows)
    listed = run("suggest - --index", things, "--format", "json", stdin="\n".join(sorted(new)))
    assert {json.loads(line)["input"] for line in listed.stdout.splitlines()} == new
    first = run("suggest", inbox, "-n", 3, "--model", model, "--format", "json")
    kinds = {json.loads(line)["input"].rpartition("-")[2] for line in first.stdout.splitlines()}
    assert (first.exit_code, len(kinds)) == (3, 3)
    clf = Classifier.load(things)
    assert clf.suggest(inbox).inputs == [row["input"] for row in rows]
    assert set(clf.suggest(sorted(new), 2).inputs) < new
