"""Duplicates across classes: compared with all pairs, planted in synthetic keys, and in large numbers."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from conftest import tries
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from tables import unit_rows

from retrieval_tip.model import label_table
from retrieval_tip.retrieval import duplicates as module
from retrieval_tip.retrieval.duplicates import (
    NEAR,
    Duplicate,
    Duplicates,
    describe_duplicates,
    duplicates,
)
from retrieval_tip.store.labels import images_of

KINDS = ["identical image", "identical feature", "near-identical"]


def labels_of(ids, digests=None, key_ids=None, c=None):
    ids = np.asarray(ids, dtype=np.int64)
    names = [f"class {i}" for i in range(c or int(ids.max(initial=0)) + 1)]
    return label_table(
        names, ids, [f"{i}.jpg" for i in range(len(ids))], key_ids=key_ids, digests=digests
    )


def keys_with_duplicates(seed, n=24, c=3, d=6):
    """Return keys of any norm, some repeated, moved slightly or scaled, with class ids and repeated digests."""
    generator = default_rng(seed)
    keys = generator.normal(size=(n, d)).astype(np.float32)
    for row in range(1, n):
        draw = generator.integers(6)
        other = generator.integers(row)
        if draw == 0:
            keys[row] = keys[other]
        elif draw == 1:
            keys[row] = 3 * keys[other]
        elif draw == 2:
            keys[row] = keys[other] + 0.05 * generator.normal(size=d)
    some = [None, "", "a", "b", "c", "d"]
    digests = [some[i] for i in generator.choice(6, n, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1])]
    return keys, generator.integers(0, c, n), digests


def dense(keys, ids, digests, fresh=None, least=NEAR, near=True):
    """Return ``{(row, row): kind}`` from all pairs. Unless ``near``, fresh rows are compared by digest only."""
    f = np.asarray(keys, dtype=np.float64)
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    found = {}
    for i in range(len(f)):
        for j in range(i + 1, len(f)):
            if ids[i] == ids[j] or (fresh is not None and i not in fresh and j not in fresh):
                continue
            if digests[i] and digests[i] == digests[j]:
                found[i, j] = KINDS[0]
            elif (keys[i] == keys[j]).all() and (near or fresh is None):
                found[i, j] = KINDS[1]
            elif near and f[i] @ f[j] >= least:
                found[i, j] = KINDS[2]
    return found


def by_pair(found):
    return {(pair.key_id, pair.other_key_id): pair.kind for pair in found.pairs}


@tries(100)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([0, 10**6]), st.booleans())
def test_duplicates_match_a_comparison_of_every_pair(seed, some, budget, half):
    keys, ids, digests = keys_with_duplicates(seed)
    keys = keys.astype(np.float16) if half else keys
    cosines = unit(keys) @ unit(keys).T
    least = 0.97 if np.abs(cosines - 0.97).min() > 1e-5 else 0.97002
    fresh = default_rng(seed).choice(24, 5, replace=False) if some else None
    with mock.patch.object(module, "NEAR", least):
        found = duplicates(keys, labels_of(ids, digests), fresh, budget=budget)
    assert found.compared == ("all" if budget else "digests")
    expected = dense(keys, ids, digests, fresh, least, near=bool(budget))
    assert by_pair(found) == expected
    assert found.total == len(found.pairs) == len(expected)
    for pair in found.pairs:
        assert pair.affinity == pytest.approx(cosines[pair.key_id, pair.other_key_id], abs=1e-6)
        assert pair.label == f"class {ids[pair.key_id]}"
        assert pair.other_label == f"class {ids[pair.other_key_id]}"
        assert (pair.source, pair.other_source) == (
            f"{pair.key_id}.jpg",
            f"{pair.other_key_id}.jpg",
        )
    order = [(KINDS.index(p.kind), -p.affinity, p.key_id, p.other_key_id) for p in found.pairs]
    assert order == sorted(order)


def unit(keys):
    f = np.asarray(keys, dtype=np.float64)
    return f / np.linalg.norm(f, axis=1, keepdims=True)


@tries(200)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0, 10**6]))
def test_the_closest_duplicates_are_returned_and_all_are_counted(seed, most, budget):
    keys, ids, digests = keys_with_duplicates(seed)
    every = duplicates(keys, labels_of(ids, digests), budget=budget)
    found = duplicates(keys, labels_of(ids, digests), budget=budget, most=most)
    assert found.total == every.total
    assert len(found.pairs) == min(most, every.total)
    assert [p.kind for p in found.pairs] == [p.kind for p in every.pairs][:most] or budget
    if budget:  # only returned pairs are checked for equal features
        closest = [p for p in every.pairs if p.kind == KINDS[0]]
        closest += sorted((p for p in every.pairs if p.kind != KINDS[0]), key=lambda p: -p.affinity)
        key = [(p.kind == KINDS[0]) or round(p.affinity, 5) for p in found.pairs]
        wanted = [(p.kind == KINDS[0]) or round(p.affinity, 5) for p in closest[:most]]
        assert sorted(map(float, key)) == pytest.approx(sorted(map(float, wanted)), abs=2e-5)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_that_differ_in_one_value_are_told_apart(d, dtype):
    bits = min(d, 8)
    keys = np.zeros(
        (2 * 2**bits, d), dtype=dtype
    )  # 16 values: words of 8 bytes, whose low bits are all zero
    keys[:, -1 :: -(d // bits)] = [
        [float(bit) for bit in f"{i % 2**bits:0{bits}b}"] for i in range(len(keys))
    ]
    found = duplicates(keys, labels_of([0] * 2**bits + [1] * 2**bits), budget=0)
    assert by_pair(found) == {(i, i + 2**bits): KINDS[1] for i in range(2**bits)}


def test_one_image_in_every_class_does_not_fill_the_memory():
    n, c = 10_000, 100
    labels = labels_of(np.arange(n) % c, ["same"] * n)
    keys = np.ones((n, 2), dtype=np.float32)
    found = duplicates(keys, labels, budget=0, most=10)
    assert (len(found.pairs), found.total, found.compared) == (10, n * (n - n // c) // 2, "digests")
    one = duplicates(keys, labels, [17])
    assert (len(one.pairs), one.total) == (1000, n - n // c)
    assert all(17 in (pair.key_id, pair.other_key_id) for pair in one.pairs)


def test_the_lower_key_id_comes_first():
    keys = unit_rows(4, 8)
    keys[3] = keys[0]
    found = duplicates(keys, labels_of([0, 0, 1, 1], key_ids=np.array([9, 3, 4, 2])))
    assert [(p.key_id, p.source, p.other_key_id, p.other_source) for p in found.pairs] == [
        (2, "3.jpg", 9, "0.jpg")
    ]


def test_labels_may_have_several_chunks():
    keys = unit_rows(5, 8)
    labels = labels_of([0, 0, 1, 1, 2], ["x", "y", "y", "x", None])
    chunked = pa.concat_tables([labels[:2], labels[2:3], labels[3:]])
    assert by_pair(duplicates(keys, chunked)) == {(0, 3): KINDS[0], (1, 2): KINDS[0]}
    assert len(set(images_of(chunked).tolist())) == 3


def test_duplicates_are_described_one_per_line():
    keys = np.eye(6, 8, dtype=np.float32)
    keys[3], keys[4], keys[5] = keys[0], keys[1] + 0.01 * keys[2], keys[2]
    labels = labels_of([0, 0, 0, 1, 1, 1], [None, None, "z", None, None, "z"])
    lines = [
        "2.jpg (class 0) and 5.jpg (class 1): identical image",
        "0.jpg (class 0) and 3.jpg (class 1): identical feature",
        "1.jpg (class 0) and 4.jpg (class 1): near-identical (affinity 1.0000)",
    ]
    found = duplicates(keys, labels)
    assert describe_duplicates(found) == lines
    assert describe_duplicates(replace(found, total=9))[-1] == f"and {9 - len(lines)} more"
    assert describe_duplicates(Duplicates([], 0, "all")) == []
    hostile = Duplicate(0, "a\n\x1b[2J.jpg", "x", 1, "b", "y", 1.0, KINDS[0])
    assert describe_duplicates(Duplicates([hostile], 1, "all")) == [
        r"a\n\x1b[2J.jpg (x) and b (y): identical image"
    ]
