"""Segments: slices, rows, an index with added vectors, and every operation on a segmented index."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import cache_of, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import unit_rows, write_table
from test_search_hp import C, D, clusters

from retrieval_tip import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation.evaluate import evaluate
from retrieval_tip.fit import search_hp
from retrieval_tip.fit.finetune import Recipe, finetune
from retrieval_tip.index.tune import tune
from retrieval_tip.retrieval import keys as keys_module
from retrieval_tip.retrieval import labelled_keys
from retrieval_tip.retrieval.keys import Keys, beside, index_over
from retrieval_tip.retrieval.segments import Segments, joined, runs, segments_of
from retrieval_tip.retrieval.vector_index import VectorIndex
from retrieval_tip.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
NAMES = [f"class {i}" for i in range(C)]


# --- the array


@st.composite
def parts_of(draw: st.DrawFn) -> list[Array]:
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    whole = np.arange(3 * sum(sizes), dtype=dtype).reshape(-1, 3)
    return np.split(whole, np.cumsum(sizes)[:-1])


@settings(max_examples=examples(100), deadline=None)
@given(parts_of(), st.data())
def test_indexing_segments_matches_the_concatenated_array(parts: list[Array], data: st.DataObject) -> None:
    found, whole = Segments(parts), np.concatenate(parts)
    n = len(whole)
    assert (len(found), found.shape, found.dtype) == (n, whole.shape, whole.dtype)
    assert (found.size, found.nbytes) == (whole.size, whole.nbytes)
    np.testing.assert_array_equal(np.asarray(found), whole)
    np.testing.assert_array_equal(np.asarray(found, dtype=np.float64), whole.astype(np.float64))
    numbers = st.none() | st.integers(-n - 2, n + 2)
    for _ in range(4):
        part = slice(data.draw(numbers), data.draw(numbers), data.draw(st.sampled_from([None, 1, 2, 3, -1, -2])))
        np.testing.assert_array_equal(found[part], whole[part])
        assert found[part].dtype == whole.dtype
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    np.testing.assert_array_equal(found[mask], whole[mask])
    if n:
        rows = data.draw(st.lists(st.integers(-n, n - 1), max_size=6))
        for asked in (rows, np.array(rows, dtype=np.int64), np.array([rows, rows[::-1]], dtype=np.int64)):
            expected = whole[np.asarray(asked, dtype=np.int64)]
            np.testing.assert_array_equal(found[asked], expected)
            assert found[asked].shape == expected.shape
        one = data.draw(st.integers(-n, n - 1))
        np.testing.assert_array_equal(found[one], whole[one])
        assert found[one].shape == (3,)
    for row in (n, -n - 1):
        for asked in (row, [row], np.array([row])):
            with pytest.raises(IndexError):
                found[asked]


@settings(max_examples=examples(60), deadline=None)
@given(parts_of(), st.integers(1, 6))
def test_runs_cover_each_row_once_in_order_within_one_part(parts: list[Array], size: int) -> None:
    found, whole = joined(parts), np.concatenate(parts)
    slices = list(runs(found, size))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(len(whole)))
    assert all(part.stop - part.start <= size for part in slices)
    for part in slices:
        assert any(np.shares_memory(found[part], one) for one in parts)


def test_slices_within_a_part_are_views_and_joining_copies_nothing() -> None:
    parts = [np.zeros((4, 2), dtype=np.float32), np.ones((3, 2), dtype=np.float32)]
    found = Segments(parts)
    assert found.parts[0] is parts[0]
    assert segments_of(found) == tuple(parts)
    assert np.shares_memory(found[1:4], parts[0])
    assert np.shares_memory(found[4:7], parts[1])
    assert not np.shares_memory(found[3:5], parts[0])
    assert joined(parts[:1]) is parts[0]
    assert segments_of(parts[0]) == (parts[0],)
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(found, copy=False)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [np.zeros((2, 3), dtype=np.float32), np.zeros((2, 4), dtype=np.float32)],
        [np.zeros((2, 3), dtype=np.float32), np.zeros((2, 3), dtype=np.float16)],
        [np.zeros(3, dtype=np.float32)],
    ],
)
def test_parts_of_different_shape_or_dtype_are_refused(parts: list[Array]) -> None:
    with pytest.raises(InputError, match="segments: expected"):
        Segments(parts)


# --- an index with added vectors


def dense(queries: Array, vectors: Array, k: int) -> Array:
    """Return the k largest affinities of each query, largest first."""
    return -np.sort(-(queries @ vectors.T), axis=1)[:, :k]


@settings(max_examples=examples(80), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(4, 24),
    replaced=st.integers(0, 6),
    further=st.integers(0, 6),
    more=st.integers(0, 40),
    factory=st.sampled_from(["Flat", "IVF4,Flat"]),
    ties=st.booleans(),
)
def test_a_search_finds_added_vectors_like_indexed_ones(
    seed: int, n: int, replaced: int, further: int, more: int, factory: str, ties: bool
) -> None:
    rng = np.random.default_rng(seed)

    def vectors(m: int) -> Array:
        return (rng.integers(-1, 2, (m, 3)) if ties else rng.standard_normal((m, 3))).astype(np.float32)

    base, queries = vectors(n), vectors(5)
    rows = np.sort(rng.choice(n, min(replaced, n), replace=False))
    rows = np.concatenate([rows, np.arange(n, n + further)]).astype(np.int64)
    beside_it, k = vectors(len(rows)), min(replaced, n) + 1 + more
    index = VectorIndex.build(base, factory, "cpu")
    both = index.plus(rows, lambda: beside_it)
    expected = np.concatenate([base, np.zeros((further, 3), np.float32)])
    expected[rows] = beside_it
    assert (both.n, both.indexed, index.n) == (n + further, n, n)
    affinity, found = both.search(queries, k)
    assert affinity.shape == found.shape == (5, min(k, n + further))
    np.testing.assert_allclose(affinity, dense(queries, expected, k), atol=1e-5)
    np.testing.assert_allclose(affinity, np.einsum("qd,qkd->qk", queries, expected[found]), atol=1e-5)
    assert all(len(set(row)) == len(row) for row in found.tolist())
    np.testing.assert_array_equal(both.search_tensor(torch.from_numpy(queries), k)[1], found)
    np.testing.assert_allclose(both.vectors(), expected, atol=1e-6)
    for plain in (index, both.bare()):
        np.testing.assert_allclose(plain.search(queries, n)[0], dense(queries, base, n), atol=1e-5)


def test_many_replaced_rows_hide_no_other_row() -> None:
    queries = np.eye(1, 4, dtype=np.float32)
    base = np.zeros((50, 4), dtype=np.float32)
    base[:, 0] = np.linspace(1, 0.5, 50)
    index = VectorIndex.build(base, "Flat", "cpu").plus(np.arange(20), lambda: np.zeros((20, 4), dtype=np.float32))
    assert index.search(queries, 3)[1].tolist() == [[20, 21, 22]]


def test_empty_slots_of_an_index_stay_empty_with_added_vectors() -> None:
    base = unit_rows(64, 8)
    index = VectorIndex.build(base, "IVF16,Flat", "cpu")
    index.effort = 1
    late = unit_rows(2, 8, 1)
    affinity, rows = index.plus(np.arange(64, 66), lambda: late).search(unit_rows(4, 8, 2), 66)
    assert (rows < 0).any()
    assert (np.diff(rows < 0, axis=1) >= 0).all()  # empty slots come last
    assert (affinity[rows < 0] == np.finfo(np.float32).min).all()
    assert all({64, 65} <= set(row) for row in rows.tolist())


# --- keys


class Case:
    """Keys of classes in segments, and the same keys regrouped as one array."""

    def __init__(self, seed: int, counts: list[list[int]], half: bool) -> None:
        rng = np.random.default_rng(seed)
        self.c, d = len(counts[0]), 5
        ids = [np.repeat(np.arange(self.c), row) for row in counts]
        self.ids = np.concatenate(ids)
        array = unit_rows(len(self.ids), d, seed).astype(np.float16 if half else np.float32)
        self.parts = np.split(array, np.cumsum([len(part) for part in ids])[:-1])
        self.order = np.argsort(self.ids, kind="stable")
        self.array = array
        self.features = torch.from_numpy(unit_rows(6, d, seed + 1))
        self.values = torch.from_numpy(rng.standard_normal((len(self.ids), self.c)).astype(np.float32))
        self.classes = torch.from_numpy(rng.integers(0, self.c, (6, 3)))
        self.met = torch.from_numpy(rng.random((6, 3)) < 0.7)

    def keys(self, **options: Any) -> tuple[Keys, Keys]:
        """Return the keys in segments, and in one array."""
        one = Keys(self.array[self.order], self.ids[self.order], self.c, **options)
        return Keys(joined(self.parts), self.ids, self.c, **options), one


counts_of = st.integers(1, 5).flatmap(
    lambda c: st.lists(
        st.lists(st.integers(0, 6), min_size=c, max_size=c).filter(any), min_size=2, max_size=4
    )  # a class may be missing in some or all segments
)
cases = st.builds(Case, st.integers(0, 10**6), counts_of, st.booleans())
sizes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 60))


@settings(max_examples=examples(80), deadline=None)
@given(cases, st.floats(0, 12), sizes)
def test_keys_in_segments_give_the_same_results_as_one_array(
    case: Case, beta: float, blocks: tuple[int, int, int]
) -> None:
    names = ("QUERY_BLOCK", "KEY_BLOCK", "GATHERED")
    with mock.patch.multiple(keys_module, **dict(zip(names, blocks, strict=True))):
        parted, whole = case.keys()
        for name in ("sums", "means", "counts"):
            torch.testing.assert_close(getattr(parted, name), getattr(whole, name), rtol=0, atol=1e-5)
        near = {"rtol": 1e-5, "atol": 1e-5}
        f, own = case.features, case.values[torch.from_numpy(case.order)]
        torch.testing.assert_close(parted.cache_logits(f, beta), whole.cache_logits(f, beta), **near)
        torch.testing.assert_close(parted.cache_logits(f, beta, case.values), whole.cache_logits(f, beta, own), **near)
        torch.testing.assert_close(parted.value_sums(case.values), whole.value_sums(own), **near)
        found = parted.class_logits(f, case.classes, case.met, beta)
        torch.testing.assert_close(found, whole.class_logits(f, case.classes, case.met, beta), **near)
        rows = parted.rows_of(case.classes, case.met)
        for q, row in enumerate(rows.tolist()):
            asked = case.classes[q][case.met[q]].tolist()
            filled = [i for i in row if i >= 0]
            assert row == filled + [-1] * (len(row) - len(filled))
            assert sorted(filled) == sorted(i for c in asked for i in np.flatnonzero(case.ids == c).tolist())
        affinity = parted.affinity(f, rows)
        expected = f.numpy() @ case.array.astype(np.float32).T
        np.testing.assert_allclose(
            affinity, np.where(rows < 0, 0, np.take_along_axis(expected, rows.numpy(), 1)), atol=1e-5
        )
        slack = parted.slack(beta)
        assert np.isfinite(slack)
        assert slack >= 0


@settings(max_examples=examples(15), deadline=None)
@given(cases, st.floats(0, 8), st.sampled_from(["bfloat16", "float16"]))
def test_half_precision_products_do_not_depend_on_segments(case: Case, beta: float, precision: str) -> None:
    parted, whole = case.keys(precision=precision)
    found = parted.cache_logits(case.features, beta)
    torch.testing.assert_close(found, whole.cache_logits(case.features, beta), rtol=0.02, atol=1e-3)


def test_segments_not_grouped_by_class_are_refused() -> None:
    parts = Segments([unit_rows(2, 4), unit_rows(2, 4, 1)])
    assert Keys(parts, np.array([0, 1, 0, 1]), 2).counts.tolist() == [2, 2]
    for ids in ([1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0]):
        with pytest.raises(InputError, match="not grouped by class"):
            Keys(parts, np.array(ids), 2)


@settings(max_examples=examples(40), deadline=None)
@given(cases, st.sampled_from(["Classes", "Classes,HNSW8"]), st.integers(0, 2))
def test_added_keys_update_the_class_means_of_an_index(case: Case, factory: str, new: int) -> None:
    first, late = case.parts[0], case.parts[1:]
    ids, c = case.ids[: len(first)], case.c + new  # new classes without a key
    index = index_over(first, ids, case.c, factory, "cpu")
    found = beside(index, late, case.ids[len(first) :], np.bincount(ids, minlength=c))
    assert (found.n, found.indexed) == (c, case.c)
    expected = Keys(joined(case.parts), case.ids, c).means
    np.testing.assert_allclose(found.vectors(), expected, atol=1e-5)
    assert np.array_equal(index.vectors(), found.bare().vectors())


# --- operations on an index


def segmented(n: int = 60, **options: Any) -> CacheModel:
    """Return a classifier with four segments."""
    keys, ids = clusters(n, C, D, 1)
    keys = keys.astype(options.pop("dtype", np.float32))
    options = {"logit_scale": 10.0, "device": "cpu"} | options
    ends = [2 * n // 3, 13 * n // 15, 19 * n // 20, n]
    with mock.patch.object(labelled_keys, "SMALL", 0):
        cache = cache_of(keys[: ends[0]], ids[: ends[0]], NAMES, unit_rows(C, D, 5), **options)
        for start, end in itertools.pairwise(ends):
            cache.add(keys[start:end], ids[start:end])
    assert cache.segments == 4
    return cache


def test_a_compacted_index_equals_a_fresh_build() -> None:
    cache = segmented()
    whole = cache.whole()
    keys, ids = clusters(60, C, D, 1)
    built = CacheModel.from_features(
        keys, ids, NAMES, unit_rows(C, D, 5), settings=Settings(logit_scale=10.0), device="cpu"
    )
    assert whole.segments == 1
    assert whole.whole() is whole
    assert cache.segments == 4
    np.testing.assert_array_equal(whole.keys, built.keys)
    assert whole.labels["key_id"].equals(built.labels["key_id"])
    cache.compact()
    np.testing.assert_array_equal(cache.keys, built.keys)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("index", ["Flat", "Classes", "IVF4,Flat"])
def test_answers_match_the_compacted_index(index: str, dtype: type) -> None:
    cache = segmented(index=index, dtype=dtype)
    whole, queries = cache.whole(), clusters(30, C, D, 2)[0]
    np.testing.assert_allclose(cache.logits(queries), whole.logits(queries), atol=1e-4)
    np.testing.assert_allclose(cache.certified(queries, 6).text, whole.certified(queries, 6).text, atol=1e-4)
    for one, other in zip(cache.classify(queries, top=3), whole.classify(queries, top=3), strict=True):
        assert one.labels == other.labels
        assert [near.key_id for near in one.neighbours] == [near.key_id for near in other.neighbours]
        assert one.probability == pytest.approx(other.probability, abs=1e-4)
    if index != "Classes":  # a sample of the keys determines which classes count exactly
        for tail in (False, True):
            np.testing.assert_allclose(cache.logits(queries, 7, tail), whole.logits(queries, 7, tail), atol=1e-4)


@pytest.mark.parametrize(
    "ask", [search_hp.leave_one_out, lambda cache: search_hp.unseen(cache, *clusters(50, C, D, 2), "val")]
)
def test_the_search_for_settings_matches_the_compacted_index(ask: Any) -> None:
    cache = segmented()
    whole = cache.whole()
    one, other = (search_hp.search(model, ask(model)) for model in (cache, whole))
    assert (one.beta, one.k, one.part) == (other.beta, other.k, other.part)
    assert (one.accuracy, one.zero_shot, one.cache_alone) == (other.accuracy, other.zero_shot, other.cache_alone)
    assert one.interval == pytest.approx(other.interval, rel=1e-3)
    np.testing.assert_allclose(one.surface["accuracy"], other.surface["accuracy"], atol=1.01 / one.n)


def test_a_held_out_shot_meets_no_key_of_its_image() -> None:
    cache = segmented()
    queries = search_hp.leave_one_out(cache)
    assert sorted(queries.features[:, 0].tolist()) == sorted(np.asarray(cache.keys)[:, 0].tolist())
    for feature, own in zip(queries.features, queries.hidden.tolist(), strict=True):
        np.testing.assert_array_equal(cache.keys[queries.groups == own], feature[None])


def test_fine_tuning_matches_the_compacted_index_bit_for_bit(tmp_path: Path) -> None:
    cache = segmented()
    keys, ids = clusters(60, C, D, 1)
    shots = open_source(
        write_table(
            tmp_path / "t.parquet",
            keys,
            [NAMES[i] for i in ids],
            cache.whole().labels.sort_by("key_id")["source"].to_pylist(),
        )
    )
    recipe = Recipe(settings="own", batch=16, epochs=3, precision="float32", train=("keys", "values"))
    one, other = (finetune(model, shots, Encoder(), recipe).cache for model in (cache, cache.whole()))
    np.testing.assert_array_equal(one.keys, other.keys)
    assert one.values is not None
    assert torch.equal(one.values, other.values)
    assert not np.array_equal(one.keys, cache.whole().keys)
    assert cache.segments == 4


@pytest.mark.parametrize("k", [None, 7])
def test_an_evaluation_matches_the_compacted_index(tmp_path: Path, k: int | None) -> None:
    cache = segmented()
    features, ids = clusters(50, C, D, 2)
    test = open_source(write_table(tmp_path / "test.parquet", features, [NAMES[i] for i in ids]))
    one, other = (evaluate(model, test, Encoder(), k=k, tail=True).to_dict() for model in (cache, cache.whole()))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == (pytest.approx(other[name], abs=1e-5) if isinstance(value, float) else other[name]), name


def test_tuning_refuses_several_segments() -> None:
    with pytest.raises(InputError, match="index compact"):
        tune(segmented(), clusters(100, C, D, 2)[0])


@pytest.mark.parametrize("index", ["Flat", "Classes", "Classes,HNSW8", "IVF4,Flat"])
def test_removing_all_added_keys_restores_the_index(index: str) -> None:
    cache, queries = segmented(index=index), clusters(30, C, D, 2)[0]
    base = cache.take(np.arange(40))
    with mock.patch.object(labelled_keys, "SMALL", 0):
        cache.remove(range(57, 60))
        assert cache.segments == 3
        cache.remove(range(40, 57))
    assert cache.segments == 1
    assert cache.index.n == cache.index.indexed
    for k in (None, 7):
        np.testing.assert_allclose(cache.logits(queries, k), base.logits(queries, k), atol=1e-4)
    np.testing.assert_array_equal(
        cache.nearest(torch.from_numpy(queries), 5)[1], base.nearest(torch.from_numpy(queries), 5)[1]
    )
