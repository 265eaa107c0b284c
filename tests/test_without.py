"""Answers without some of the keys, compared with the definition in dense float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import cache_of
from dense import affinity, cache_logits, discriminant, nearest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import unit

from retrieval_tip import tip
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.errors import InputError
from retrieval_tip.index import places
from retrieval_tip.settings import Ask, Fitted

N, D, C, Q = 90, 12, 6, 9
ALPHA, BETA, OFFSET = 1.7, 6.0, 0.05
RANDOM = np.random.default_rng(0)
MEANS = unit(RANDOM.normal(size=(C, D)))
IDS = np.sort(RANDOM.permutation(np.repeat(np.arange(C), [1, 30, 3, 20, 0, 36])))
KEYS = unit(MEANS[IDS] + 0.3 * RANDOM.normal(size=(N, D)))
VALUES = RANDOM.normal(size=(N, C)).astype(np.float32)
TEXT = unit(MEANS + 0.2 * RANDOM.normal(size=(C, D)))
QUERIES = np.concatenate([KEYS[:3], unit(MEANS[RANDOM.integers(C, size=Q - 3)] + 0.3 * RANDOM.normal(size=(Q - 3, D)))])
NAMES = [f"class {i}" for i in range(C)]
METRIC = tip.Metric(torch.full((D,), 0.05), torch.from_numpy(np.eye(D, dtype=np.float32) + 0.1))
HIDDEN = (0, 1, 5, 31, 32, 33, 60, 89)
"""The only key of class 0, all keys of class 2, and some keys of the other classes."""


def index_of(kind="Flat", *, solved=False, metric=False, gamma=0.0):
    made = cache_of(
        KEYS, IDS, NAMES, TEXT, alpha=ALPHA, beta=BETA, gamma=gamma, log_offset=OFFSET if solved else None, index="Flat"
    )
    fitted = Fitted("none", "solved", None, 0.1, N) if solved else None
    made.set_fitted(METRIC if metric else None, torch.from_numpy(VALUES) if solved else None, fitted, kind)
    return made


def dense(index, without, k, tail):
    """Return the logits by the definition."""
    own, seen = index.settings, ~np.isin(np.arange(N), without)
    phi = (lambda x: x) if index.metric is None else lambda x: index.metric(torch.from_numpy(x)).numpy()
    K, f, y = phi(KEYS)[seen], phi(QUERIES.astype(np.float32)), IDS[seen]
    A = affinity(f, K)
    cache = cache_logits(A, y, C, own.beta, None if index.values is None else VALUES[seen], nearest(A, k), tail=tail)
    if own.log_offset:
        cache = np.log1p(np.maximum(cache, 0) / own.log_offset)
    if own.gamma:
        cache = cache + own.gamma * discriminant(f, K, y, C)
    return own.logit_scale * affinity(QUERIES, TEXT) + own.alpha * cache


def answered(index, ask):
    return [one for block in index.answers([FeatureBlock.of(QUERIES)], ask) for one in block.predictions()]


@pytest.mark.parametrize("kind", ["Flat", "HNSW32", "Classes"])
@pytest.mark.parametrize("solved", [False, True], ids=["one-hot", "solved"])
@pytest.mark.parametrize(("gamma", "metric"), [(0.0, False), (3.0, True)], ids=["plain", "metric"])
@pytest.mark.parametrize("k", [None, 7, 88])
def test_hidden_keys_count_nowhere(kind, solved, gamma, k, metric):
    index = index_of(kind, solved=solved, metric=metric, gamma=gamma)
    used = None if kind == "Classes" else k  # an index over classes then uses all keys
    for tail in (False, True):
        found = answered(index, Ask(k=k, tail=tail, without=HIDDEN, neighbours=4))
        np.testing.assert_allclose(
            [one.logits for one in found], dense(index, HIDDEN, used, tail), rtol=1e-4, atol=1e-3
        )
        for one in found:
            assert one.neighbours
            assert not {*(shot.key_id for shot in one.neighbours), one.opposing and one.opposing.key_id} & {*HIDDEN}


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, N - 1), max_size=N - 1), st.floats(0, 60), st.booleans())
def test_any_keys_may_be_hidden_at_any_beta(hidden, beta, solved):
    index = index_of(solved=solved, gamma=2.0).with_settings(replace(index_of().settings, beta=beta, gamma=2.0))
    expected = dense(index, tuple(hidden), None, tail=True)
    found = answered(index, Ask(without=tuple(hidden)))
    np.testing.assert_allclose([one.logits for one in found], expected, rtol=1e-4, atol=2e-3)


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


@pytest.mark.parametrize("solved", [False, True], ids=["one-hot", "solved"])
def test_an_index_in_lancedb_hides_the_same_keys(tmp_path, solved):
    place = places.at(f"lance://{tmp_path / 'index'}")
    place.copy_from(index_of(solved=solved, gamma=1.0), "test")
    index = place.load(device="cpu")
    for k in (None, 7):
        expected = dense(index_of(solved=solved, gamma=1.0), HIDDEN, k, True)
        found = answered(index, Ask(k=k, without=HIDDEN, neighbours=4))
        np.testing.assert_allclose([one.logits for one in found], expected, rtol=1e-4, atol=1e-3)
        assert not {shot.key_id for one in found for shot in one.neighbours} & {*HIDDEN}
