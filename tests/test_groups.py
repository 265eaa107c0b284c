"""Groups of photos without a match: average linkage, the threshold, and the command."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHARED, cache_of, failed, fitted, needs_real
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.random import default_rng
from sklearn.cluster import AgglomerativeClustering
from tables import unit, unit_rows, write_table

from retrieval_tip import Classifier, Index, tip
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit.forms import FORMS
from retrieval_tip.labelling import groups
from retrieval_tip.labelling.groups import group, group_similarity


def linked(points, threshold):
    """Return the rows of scikit-learn's groups."""
    clusters = AgglomerativeClustering(
        None, metric="precomputed", linkage="average", distance_threshold=1 - threshold
    )
    ids = clusters.fit_predict(1 - points @ points.T)
    assume(np.abs(clusters.distances_ - (1 - threshold)).min() > 1e-5)
    return [np.flatnonzero(ids == i) for i in set(ids)]


def parted(points, rows, threshold):
    """Return the parts of a group if at least half of it is in two or more parts of four, without the group's mean."""
    if len(rows) < 2:
        return []
    own = points[rows] - points[rows].mean(axis=0)
    parts = [
        rows[part]
        for part in linked(own / np.maximum(np.linalg.norm(own, axis=1)[:, None], 1e-5), threshold)
    ]
    large = [len(part) for part in parts if len(part) >= 4]
    if len(large) < 2 or sum(large) < len(rows) / 2:
        return [rows]
    return [one for part in parts for one in parted(points, part, threshold)]


@given(
    st.integers(2, 60),
    st.floats(-0.3, 0.9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_groups_match_average_linkage(m, threshold, with_metric, with_copies, seed):
    draw = default_rng(seed)
    features = draw.normal(size=(m, 6)) + draw.normal(size=(5, 6))[np.arange(m) % 5]
    features = features.astype(np.float32)
    if with_copies:
        features[m // 2 :] = features[: m - m // 2]
    mean = draw.normal(size=6).astype(np.float32)
    transform = draw.normal(size=(6, 6)).astype(np.float32)
    metric = tip.Metric(*map(torch.from_numpy, (mean, transform))) if with_metric else None
    found = group(features, threshold, metric)
    points = unit(
        (features - mean).astype(float) @ transform if with_metric else features.astype(float)
    )
    expected = [
        part for rows in linked(points, threshold) for part in parted(points, rows, threshold)
    ]
    assert sorted(rows.tolist() for rows in found) == sorted(rows.tolist() for rows in expected)
    assert [(-len(rows), rows[0]) for rows in found] == sorted(
        (-len(rows), rows[0]) for rows in found
    )


def test_photos_beyond_the_limit_join_the_groups_of_a_sample(monkeypatch):
    sizes = []
    real = groups._linked
    monkeypatch.setattr(
        groups, "_linked", lambda points, t: sizes.append(len(points)) or real(points, t)
    )
    monkeypatch.setattr(groups, "MOST", 40)
    monkeypatch.setattr(groups, "BLOCK", 7)
    centres = np.eye(8, dtype=np.float32)[:3]
    features = unit(centres[np.arange(120) % 3] + 0.1 * unit_rows(120, 8))
    features[:5] = -features[:5]  # not similar to any group
    own = [set(rows.tolist()) for rows in group(features, 0.5)]
    alone = set(range(5))
    assert (sizes[0], max(sizes)) == (40, 40)
    assert (
        sorted(
            rows - alone == set(range(i, 120, 3)) - alone
            for rows in own
            for i in [min(rows - alone) % 3]
        )
        == [True] * 3
    )
    monkeypatch.setattr("retrieval_tip.machine.memory", lambda: 1000)
    with pytest.raises(UsageError, match="memory"):
        group(features, 0.5)
    with pytest.raises(InputError, match=r"^features"):
        group(np.full((3, 4), np.nan), 0.5)


@pytest.mark.parametrize("counts", [(4, 2, 1), (1, 1, 1), (3, 0, 0)])
@pytest.mark.parametrize("with_metric", [True, False])
def test_the_threshold_is_midway_between_same_class_and_other_class_similarity(counts, with_metric):
    ids = np.repeat(range(3), counts)
    keys = unit_rows(len(ids), 5)
    cache = cache_of(keys, ids, ["a", "b", "c"], device="cpu")
    points = keys.astype(float)
    if with_metric:
        mean = unit_rows(1, 5, 1)[0]
        transform = unit_rows(5, 5, 2)
        cache.metric = tip.Metric(torch.from_numpy(mean), torch.from_numpy(transform))
        points = unit((points - mean) @ transform)
    a, b = np.triu_indices(len(ids), 1)
    cosine = (points[a] * points[b]).sum(axis=1)
    same = [cosine[(ids[a] == i) & (ids[b] == i)].mean() for i in range(3) if counts[i] > 1]
    other = cosine[ids[a] != ids[b]]
    expected = (np.mean(same or [1]) + max(other.mean() if len(other) else 0, 0)) / 2
    assert group_similarity(cache) == pytest.approx(expected, abs=1e-5)


@needs_real
def test_unknown_classes_of_real_photos_become_groups(things):
    whole = Index.load(things)
    ids = whole.class_ids.numpy()
    keys = np.asarray(whole.keys)
    known = np.isin(ids, default_rng(0).permutation(10)[:6])
    cache = fitted(Index.from_features(keys[known], ids[known], whole.class_names), forms=FORMS[:1])
    answers = groups.group_no_match(cache, keys[~known], cache.classify(keys[~known]))
    numbers = answers.to_arrow()["group"].to_numpy(zero_copy_only=False)
    own = ids[~known]
    found = set()
    for number in range(1, int(np.nanmax(numbers)) + 1):
        classes, sizes = np.unique(own[numbers == number], return_counts=True)
        found |= set(classes[2 * sizes > sizes.sum()])
    assert len(found) >= 3


def features_of(path):
    table = pq.read_table(SHARED / "data" / path)
    return unit(np.stack(table["feature"].to_numpy())), np.array(table["label"].to_pylist())


@needs_real
@pytest.mark.parametrize("seed", range(3))
def test_far_photos_of_several_kinds_are_not_offered_as_one_group(seed):
    """Among photos of flowers, photos of five dishes resemble each other. Photos of one dish stay together."""
    draw = default_rng(seed)
    flowers, names = features_of("clip-vitb32/oxford_flowers/test.parquet")
    known = draw.permutation(np.unique(names))[:17]
    shots = np.concatenate([draw.permutation(np.flatnonzero(names == name))[:8] for name in known])
    index = fitted(
        Index.from_features(flowers[shots], np.repeat(range(17), 8), [str(name) for name in known])
    )
    food, dishes = features_of("clip-food9/train.parquet")
    rows = [np.flatnonzero(dishes == dish)[:80] for dish in draw.permutation(np.unique(dishes))[:5]]
    threshold = group_similarity(index)
    [one] = [part for part in group(food[rows[0]], threshold, index.metric) if len(part) > 4]
    assert len(one) > 60
    mixed = food[np.concatenate(rows)]
    kinds = np.repeat(range(5), 80)
    sizes = [
        np.bincount(kinds[part], minlength=5) for part in group(mixed, threshold, index.metric)
    ]
    assert {size.argmax() for size in sizes} == {*range(5)}
    assert (
        sum(size.max() for size in sizes)
        > 0.95 * sum(size.sum() for size in sizes)
        > 0.8 * len(kinds)
    )
    assert all(size.max() >= 0.9 * size.sum() for size in sizes[:5])


@pytest.fixture
def folder(tmp_path):
    """A fitted index of three classes."""
    ids = np.arange(60) % 3
    cache = fitted(
        Index.from_features(unit(3 * np.eye(16)[ids] + unit_rows(60, 16)), ids, ["a", "b", "c"])
    )
    cache.save(tmp_path / "index")
    return tmp_path / "index"


def test_the_command_numbers_the_groups_largest_first(folder, run, tmp_path, monkeypatch):
    kinds = np.array([0, 5, 5, 9, 1, 5, 9, 12, 2])
    rows = unit(4 * np.eye(16)[kinds] + unit_rows(9, 16, 1))
    rows[7] = unit(-rows[1:2] - rows[3:4])[0]  # unlike any other photo
    table = write_table(tmp_path / "new.parquet", rows)
    out = tmp_path / "answers.csv"
    done = run("classify", folder, table, "--group-no-match", "--out", out)
    assert (done.exit_code, "6 with no match" in done.stderr) == (0, True)
    with out.open() as file:
        written = list(csv.DictReader(file))
    assert [row["group"] for row in written] == ["", "1", "1", "2", "", "1", "2", "", ""]
    assert [row["no_match"] for row in written] == [str(kind > 2) for kind in kinds]
    clf = Classifier.load(folder)
    for photos in (table, rows):
        numbers = [answer.group for answer in clf.predict(photos, group_no_match=True)]
        assert numbers == [int(row["group"]) if row["group"] else None for row in written]
    assert clf.predict(rows[1], group_no_match=True).group is None  # a single photo has no group
    plain = run(
        "classify", folder, table, "--top", 2, "--explain", "--format", "json"
    ).stdout.splitlines()
    grouped = run(
        "classify", folder, table, "--top", 2, "--explain", "--group-no-match", "--format", "json"
    ).stdout.splitlines()
    without = [
        {name: value for name, value in json.loads(line).items() if name != "group"}
        for line in grouped
    ]
    assert without == [json.loads(line) for line in plain]
    monkeypatch.setattr(groups, "MOST", 3)
    assert "Grouped 3 of 6 images" in run("classify", folder, table, "--group-no-match").stderr


def test_photos_with_a_match_get_no_group(folder, run, tmp_path):
    table = write_table(tmp_path / "new.parquet", unit(np.eye(16)[:3]))
    done = run("classify", folder, table, "--group-no-match", "--format", "json")
    assert [json.loads(line)["group"] for line in done.stdout.splitlines()] == [None] * 3
    assert [
        answer.group for answer in Classifier.load(folder).predict(np.eye(16, dtype="f")[:1])
    ] == [None]


def test_groups_need_a_fitted_index(folder, run, tmp_path):
    table = write_table(tmp_path / "new.parquet", unit_rows(2, 16))
    cache_of(unit_rows(4, 16), [0, 0, 1, 1], ["a", "b"], device="cpu").save(tmp_path / "plain")
    failed(run("classify", tmp_path / "plain", table, "--group-no-match"), 2, "fit")
    for photos in (table, tmp_path / "none.png"):  # checked before any photo is read
        with pytest.raises(UsageError, match=r"group_no_match: .*fit"):
            Classifier.load(tmp_path / "plain").predict(photos, group_no_match=True)
