"""Counts, class sums and outer products of keys: by property, against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_tip.store import sums as module
from retrieval_tip.store.sums import Sums


def defined(keys: np.ndarray, ids: np.ndarray, c: int) -> Sums:
    """The definition, with a one-hot matrix."""
    wide, one_hot = keys.astype(np.float64), np.eye(c)[ids]
    return Sums(one_hot.sum(0).astype(np.int64), one_hot.T @ wide, wide.T @ wide)


def close(ours: Sums, theirs: Sums, tolerance: float = 1e-12) -> None:
    np.testing.assert_array_equal(ours.counts, theirs.counts)
    np.testing.assert_allclose(ours.sums, theirs.sums, atol=tolerance)
    np.testing.assert_allclose(ours.second, theirs.second, atol=tolerance)


def drawn(n: int, c: int, d: int, seed: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
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
)
def test_they_are_what_is_defined_however_keys_come_and_go(n, c, d, seed, dtype, cuts):
    keys, ids = drawn(n, c, d, seed, dtype)
    parts = np.split(np.arange(n), sorted(min(cut, n) for cut in cuts))
    sums = Sums.of(((keys[part], ids[part]) for part in parts), c, d)
    close(sums, defined(keys, ids, c))
    assert sums.n == n
    rng = np.random.default_rng(seed)
    some = rng.permutation(n)[: n // 2]
    rest = np.setdiff1d(np.arange(n), some)
    less = sums.removed(keys[some], ids[some])
    close(less, defined(keys[rest], ids[rest], c))
    assert not less.sums[less.counts == 0].any()  # a class without keys has no rounding either
    close(less.added(keys[some], ids[some]), sums)
    close(sums, defined(keys, ids, c))  # a change is another value
    other = ids.copy()
    other[some] = c - 1
    close(sums.moved(keys[some], ids[some], c - 1), defined(keys, other, c))
    close(sums.widened(c + 2), defined(keys, ids, c + 2))
    close(Sums.of_array(sums.to_array(), c), sums, 0)


def test_a_thousand_changes_leave_nothing_behind():
    keys, ids = drawn(3000, 7, 24, 0)
    rng, there = np.random.default_rng(1), np.zeros(3000, dtype=bool)
    sums = Sums.of([], 7, 24)
    for _ in range(1000):
        rows = rng.permutation(3000)[: rng.integers(1, 200)]
        new, gone = rows[~there[rows]], rows[there[rows]]
        sums = sums.added(keys[new], ids[new]).removed(keys[gone], ids[gone])
        there[rows] ^= True
    close(sums, defined(keys[there], ids[there], 7), 1e-11)
    few = np.flatnonzero(there)[:5]
    gone = np.setdiff1d(np.flatnonzero(there), few)
    close(sums.removed(keys[gone], ids[gone]), defined(keys[few], ids[few], 7), 1e-11)
    assert sums.removed(keys[gone], ids[gone]).are_of([(keys[few], ids[few])])


def test_long_additions_are_counted_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    keys, ids = drawn(50, 4, 3, 2)
    close(Sums.of([(keys, ids)], 4, 3), defined(keys, ids, 4))


@pytest.mark.parametrize("what", ["a key", "a label", "a sum", "a product", "a key too few"])
def test_sums_of_other_keys_do_not_fit(what):
    keys, ids = drawn(20_000, 50, 16, 3)
    sums, order = Sums.of([(keys, ids)], 50, 16), np.argsort(ids, kind="stable")
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
        keys, ids = keys[1:], ids[1:]
    assert not sums.are_of([(keys, ids)])
