"""Counts, class sums and outer products of keys, by definition and in a fitted, changing index."""

import copy
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from sealing import npy, resealed
from tables import unit

from retrieval_tip import Index
from retrieval_tip.errors import StoreError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.forms import FORMS, Form, Within
from retrieval_tip.index import changes
from retrieval_tip.index.changes import fit_index
from retrieval_tip.model import verify
from retrieval_tip.retrieval.rows import ArrayRows
from retrieval_tip.store import sums as module
from retrieval_tip.store.edits import Edits, NewKeys
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.versions import Versions


@pytest.fixture(scope="module", autouse=True)
def _quick(one_thread):
    """Fit a single form, because the products in these tests are tiny."""
    forms, FORMS[:] = FORMS[:], [Form(Within(0.8), None, 1.0)]
    yield
    FORMS[:] = forms


C, D = 4, 8
NAMES = [f"class {i}" for i in range(C)]


def defined(keys, ids, c):
    """Compute the sums by definition, with a one-hot matrix."""
    wide = keys.astype(np.float64)
    one_hot = np.eye(c)[ids]
    return Sums(one_hot.sum(0).astype(np.int64), one_hot.T @ wide, wide.T @ wide)


def close(ours, theirs, tolerance=1e-12):
    assert_array_equal(ours.counts, theirs.counts)
    assert_allclose(ours.sums, theirs.sums, atol=tolerance)
    assert_allclose(ours.second, theirs.second, atol=tolerance)


def drawn(n, c, d, seed, dtype="float32"):
    rng = default_rng(seed)
    keys = rng.standard_normal((n, d))
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(dtype), rng.integers(0, c, n)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    c=st.integers(1, 6),
    d=st.integers(1, 8),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(["float32", "float16"]),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    block=st.sampled_from([7, module.BLOCK]),
)
def test_sums_match_their_definition_as_keys_come_and_go(n, c, d, seed, dtype, cuts, block):
    keys, ids = drawn(n, c, d, seed, dtype)
    parts = np.split(np.arange(n), sorted(min(cut, n) for cut in cuts))
    with mock.patch.object(module, "BLOCK", block):
        sums = Sums.of(((keys[part], ids[part]) for part in parts), c, d)
    close(sums, defined(keys, ids, c))
    assert sums.n == n
    rng = default_rng(seed)
    some = rng.permutation(n)[: n // 2]
    rest = np.setdiff1d(np.arange(n), some)
    less = sums.added(keys[some], ids[some], -1)
    close(less, defined(keys[rest], ids[rest], c))
    assert not less.sums[less.counts == 0].any()  # without rounding errors
    close(less.added(keys[some], ids[some]), sums)
    close(sums, defined(keys, ids, c))  # a change does not modify the original
    other = ids.copy()
    other[some] = c - 1
    close(less.added(keys[some], other[some]), defined(keys, other, c))
    close(sums.widened(c + 2), defined(keys, ids, c + 2))
    close(Sums.of_array(sums.to_array(), c), sums, 0)


def test_a_thousand_changes_leave_no_rounding_error():
    keys, ids = drawn(3000, 7, 24, 0)
    rng = default_rng(1)
    there = np.zeros(3000, dtype=bool)
    sums = Sums.of([], 7, 24)
    for _ in range(1000):
        rows = rng.permutation(3000)[: rng.integers(1, 200)]
        new = rows[~there[rows]]
        gone = rows[there[rows]]
        sums = sums.added(keys[new], ids[new]).added(keys[gone], ids[gone], -1)
        there[rows] ^= True
    close(sums, defined(keys[there], ids[there], 7), 1e-11)
    few = np.flatnonzero(there)[:5]
    gone = np.setdiff1d(np.flatnonzero(there), few)
    close(sums.added(keys[gone], ids[gone], -1), defined(keys[few], ids[few], 7), 1e-11)
    assert sums.added(keys[gone], ids[gone], -1).are_of([(keys[few], ids[few])])


@pytest.mark.parametrize("what", ["a key", "a label", "a sum", "a product", "a key too few"])
def test_sums_of_other_keys_do_not_fit(what):
    keys, ids = drawn(20_000, 50, 16, 3)
    sums = Sums.of([(keys, ids)], 50, 16)
    order = np.argsort(ids, kind="stable")
    assert sums.are_of((keys[rows], ids[rows]) for rows in np.array_split(order, 9))
    if what == "a key":
        keys[0, 0] += 1e-2
    elif what == "a label":
        ids[[0, np.flatnonzero(ids != ids[0])[0]]] = ids[[np.flatnonzero(ids != ids[0])[0], 0]]
    elif what == "a sum":
        sums.sums[3, 3] += 1e-2
    elif what == "a product":
        sums.second[3, 4] += 1e-2
    else:
        keys = keys[1:]
        ids = ids[1:]
    assert not sums.are_of([(keys, ids)])


def shots(n, seed):
    """Return unit features around the mean of each class, and labels."""
    rng = default_rng(seed)
    ids = np.arange(n) % C
    means = default_rng(0).standard_normal((C, D))
    return unit(means[ids] + 0.7 * rng.standard_normal((n, D))), [NAMES[i] for i in ids]


def fitted(folder, n=600, dtype="float32"):
    keys, labels = shots(n, 1)
    cache = Index.from_features(keys.astype(dtype), labels, NAMES)
    cache, _ = closed_form.fit(cache)
    cache.save(folder)
    return Index.load(folder)


def fresh(cache):
    return defined(np.asarray(cache.keys), cache.class_ids.numpy(), len(cache.class_names))


def test_a_fit_with_stored_sums_equals_a_fit_from_the_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(closed_form, "JUDGED", 64)
    cache = fitted(tmp_path / "index")
    cache = cache.edited(Edits(add=NewKeys(*shots(40, 2))))
    cache.save(tmp_path / "index")
    kept = Index.load(tmp_path / "index")
    anew = copy.copy(kept)
    anew.rows = anew.rows.with_sums(None)
    kept, _ = closed_form.fit(kept)
    anew, _ = closed_form.fit(anew)
    assert_allclose(kept.metric.transform, anew.metric.transform, rtol=1e-6, atol=1e-7)
    assert_allclose(kept.metric.mean, anew.metric.mean, rtol=1e-6, atol=1e-8)
    assert kept.settings.alpha == pytest.approx(anew.settings.alpha, rel=1e-6)
    close(kept.rows.sums, anew.rows.sums)


def test_sums_are_dropped_after_a_huge_key_is_removed(tmp_path):
    cache = fitted(tmp_path / "index")
    key_id = cache.next_key_id
    cache = cache.edited(Edits(add=NewKeys(np.full((1, D), 3e5, dtype=np.float32), NAMES[:1])))
    cache = cache.edited(Edits(remove=[key_id]))
    assert cache.rows.sums is None
    cache.save(tmp_path / "index")
    fit_index(tmp_path / "index")
    close(verify(tmp_path / "index").rows.sums, fresh(cache))


def test_replaced_keys_have_no_sums_until_they_are_fitted(tmp_path):
    cache = fitted(tmp_path / "index")
    assert cache.rows.sums is not None
    assert (
        replace(cache, rows=ArrayRows(np.asarray(cache.keys) * 2, cache.labels)).rows.sums is None
    )  # as after finetune
    assert cache.take(np.arange(300)).rows.sums is None
    changes.rebuild(tmp_path / "index", dtype="float16")
    assert "sums" not in Versions(tmp_path / "index").manifest().files
    fit_index(tmp_path / "index")
    found = verify(tmp_path / "index")
    close(found.rows.sums, fresh(found))


@pytest.mark.parametrize("what", ["counts", "fraction", "products", "damage"])
def test_sums_of_other_keys_are_detected(tmp_path, what):
    folder = tmp_path / "index"
    cache = fitted(folder)
    name = Versions(folder).manifest().files["sums"].name
    other = np.array(np.load(folder / name))
    other[(0, 0) if what in ("counts", "fraction") else (C + 1, 3)] += (
        0.5 if what == "fraction" else 1
    )
    if what == "damage":
        np.save(folder / name, other)
    else:  # as if a program that does not know the sums had written the manifest
        resealed(folder, "sums", npy(other))
    with pytest.raises(StoreError, match="sums"):
        (Index.load if what == "fraction" else verify)(folder)
    if what == "products":
        changes.rebuild(folder)
        assert verify(folder).rows.sums is None
        fit_index(folder)
        close(verify(folder).rows.sums, fresh(cache))
