"""Class indexes and certified answers compared with dense float64: winners, bounds, neighbours, saved files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import cache_of, examples, parts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_keys import Case, Largest, dense, made_module, unit

from retrieval_tip import CacheModel, verify
from retrieval_tip.errors import StoreError
from retrieval_tip.retrieval import logits as retrieval
from retrieval_tip.retrieval.vector_index import auto_factory
from retrieval_tip.settings import Settings

Array = npt.NDArray[Any]
C, SHOTS, D = 40, 16, 64
BETA, SCALE = 5.5, 100.0


@pytest.fixture(scope="module")
def material() -> tuple[Array, Array, Array, Array]:
    """Keys, their class ids, text weights and queries like CLIP's."""
    maker = made_module().Made(c=C, d=D)
    ids = np.repeat(np.arange(C), SHOTS)
    return maker.draw(ids, 1), ids, maker.text, maker.draw(maker.classes(400, 2), 3)


def model(array: Array, ids: Array, c: int, text: Array | None = None, **changes: Any) -> CacheModel:
    options: dict[str, Any] = {"beta": BETA, "logit_scale": SCALE, "index": "Classes", "device": "cpu"} | changes
    return cache_of(array, ids, [f"class {i}" for i in range(c)], text, **options)


def of_case(case: Case, text: bool = True, **changes: Any) -> CacheModel:
    weights = unit(np.random.default_rng(11).standard_normal((case.c, case.array.shape[1]))) if text else None
    return model(case.array, case.ids, case.c, weights, **({"logit_scale": 10.0} | changes))


def exact_parts(cache: CacheModel, features: Array) -> tuple[Array, Array]:
    """Return text and cache logits over all keys by definition."""
    ids, c = cache.labels["class_id"].to_numpy(), len(cache.class_names)
    text = cache.settings.logit_scale * features.astype(np.float64) @ cache.text_weights.numpy().astype(np.float64).T
    values = None if cache.values is None else cache.values.numpy()
    return text, dense(features, np.asarray(cache.keys), ids, c, cache.settings.beta, values)


def at_means(cache: CacheModel, features: Array) -> Array:
    """Return cache logits in which each key counts at the mean affinity of its class."""
    ids, c = cache.labels["class_id"].to_numpy(), len(cache.class_names)
    one_hot = np.eye(c)[ids]
    counts = one_hot.sum(0)
    mean = features.astype(np.float64) @ np.asarray(cache.keys).astype(np.float64).T @ one_hot / np.maximum(counts, 1)
    return counts * np.exp(-cache.settings.beta * (1 - mean))


def check_winners(winners: Array, text: Array, alone: Array, alpha: float) -> None:
    """Check that each winner is the best over all keys, up to float32 rounding."""
    logits = text + alpha * alone
    tolerance = 2e-5 * (1 + np.abs(text).max() + alpha * np.abs(alone).max())
    chosen = np.take_along_axis(logits, np.asarray(winners)[:, None], axis=1)[:, 0]
    assert (chosen >= logits.max(1) - tolerance).all()


@st.composite
def cases(draw: st.DrawFn, least: int = 1) -> Case:
    counts = draw(st.lists(st.integers(0, 14), min_size=least, max_size=7).filter(any))
    return Case(draw(st.integers(0, 2**32)), counts, draw(st.integers(1, 8)), draw(st.integers(2, 9)))


# ------------------------------------------------------------------------------------------------------------ certified


@settings(max_examples=examples(30), deadline=None)
@given(
    cases(),
    st.sampled_from([0.0, 0.3, 1.0, 20.0]),
    st.floats(0, 30),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
)
def test_certified_winners_match_all_keys_after_exact_search(
    case: Case, alpha: float, beta: float, k: int, tail: bool, text: bool
) -> None:
    cache = of_case(case, text, alpha=alpha, beta=beta, index="Flat")
    found = cache.certified(case.f, k, tail)
    check_winners((found.text + alpha * found.cache).argmax(1), *exact_parts(cache, case.f), alpha)
    steps, at = {cache.n}, k
    while at <= cache.n // 8:
        steps.add(at)
        at *= 4
    assert found.keys.dtype == torch.int64
    assert set(found.keys.tolist()) <= steps


@pytest.mark.parametrize("tail", [False, True])
def test_few_keys_settle_some_queries_and_all_keys_the_rest(
    material: tuple[Array, Array, Array, Array], tail: bool
) -> None:
    array, ids, text, queries = material
    cache = model(array, ids, C, text, index="Flat", beta=20.0)
    found = cache.certified(queries, 30, tail)
    assert set(found.keys.tolist()) <= {30, 120, cache.n}
    few = found.keys.numpy() < cache.n
    assert few.mean() > 0.2
    assert not few.all()
    check_winners((found.text + found.cache).argmax(1), *exact_parts(cache, queries), 1.0)
    torch.testing.assert_close(found.cache[~few], cache.terms(queries).cache[~few], rtol=1e-5, atol=1e-4)
    # queries settled by few keys keep the logits of these keys
    parts = parts_of(cache, queries, 30, tail)
    first = found.keys.numpy() == 30
    torch.testing.assert_close(found.cache[first], parts[1][first], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.text, parts[0])


@pytest.mark.parametrize("index", ["Flat", "Classes", "IVF4,Flat"])
@pytest.mark.parametrize("tail", [False, True])
def test_certified_winners_agree_for_every_index_type(
    material: tuple[Array, Array, Array, Array], index: str, tail: bool
) -> None:
    array, ids, text, queries = material
    cache = model(array, ids, C, text, index=index)
    found = cache.certified(queries, 48, tail)
    over_all = cache.logits(queries).argmax(1)
    wrong = ((found.text + found.cache).argmax(1) != over_all).sum()
    assert wrong <= (0 if index == "Flat" else 2)
    if index == "Classes":
        assert (found.keys < cache.n).float().mean() > 0.5
        plain = (cache.logits(queries, 48, tail).argmax(1) != over_all).sum()
        assert wrong <= plain


def test_certified_uses_all_keys_for_a_large_k_and_for_values(material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, queries = material
    for index in ("Flat", "Classes"):
        cache = model(array, ids, C, text, index=index)
        for k in (None, cache.n // 8 + 1, cache.n, 10 * cache.n):
            found = cache.certified(queries[:20], k)
            assert found.keys.tolist() == [cache.n] * 20
            assert torch.equal(found.cache, cache.terms(queries[:20]).cache)
        valued = replace(cache, rows=replace(cache.rows, values=torch.from_numpy(np.eye(C, dtype=np.float32)[ids])))
        assert valued.certified(queries[:20], 4).keys.tolist() == [cache.n] * 20
        assert [p.keys for p in valued.classify(queries[:3], k=4, certify=True)] == [cache.n] * 3


def test_a_certified_prediction_counts_the_keys_that_settled_it(material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, queries = material
    cache = model(array, ids, C, text, index="Flat", beta=20.0)
    found = cache.certified(queries[:60], 30)
    answers = cache.classify(queries[:60], k=30, certify=True, top=2)
    assert [a.keys for a in answers] == found.keys.tolist()
    assert len({a.keys for a in answers}) > 1
    over_all = cache.classify(queries[:60])
    assert [a.label for a in answers] == [a.label for a in over_all]
    assert [a.keys for a in over_all] == [None] * 60
    for a in answers:
        assert a.text_logit + a.cache_logit == pytest.approx(float(a.logits.max()), rel=1e-5)


def test_no_queries_give_no_answers() -> None:
    case = Case(1, [4, 0, 9], q=3, d=5)
    none = case.f[:0]
    for index in ("Flat", "Classes"):
        cache = of_case(case, index=index)
        for k in (None, 2):
            assert cache.certified(none, k).text.shape == (0, 3)
            assert cache.logits(none, k).shape == (0, 3)
            assert cache.classify(none, k=k) == []
            assert cache.classify(none, k=k, certify=True) == []
        assert cache.nearest(torch.from_numpy(none), 2)[1].shape == (0, 2)


# -------------------------------------------------------------------------------------------------------- whole classes


def test_whole_classes_give_nearly_all_answers_of_all_keys(material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, queries = material
    cache = model(array, ids, C, text)
    exact_text, exact = exact_parts(cache, queries)
    winners = (exact_text + exact).argmax(1)
    assert (exact_text.argmax(1) != winners).mean() > 0.02  # the cache changes some answers
    k = round(8 * cache.n / C)  # auto's k for larger indexes
    assert auto_factory(16 * 1000, 1000) == ("Classes", 8 * 16)
    agree = [(cache.logits(queries, number).argmax(1).numpy() == winners).mean() for number in (SHOTS, k)]
    assert agree[1] >= 0.99
    assert agree[1] >= agree[0]


@settings(max_examples=examples(30), deadline=None)
@given(cases(), st.sampled_from([0.0, 0.3, 1.0, 20.0]), st.floats(0, 30), st.integers(1, 90), st.booleans())
def test_each_class_counts_whole_or_at_its_mean(case: Case, alpha: float, beta: float, k: int, text: bool) -> None:
    cache = of_case(case, text, alpha=alpha, beta=beta)
    exact, lower = exact_parts(cache, case.f)[1], at_means(cache, case.f)
    with_tail, without = (cache.terms(case.f, k, tail).cache.numpy() for tail in (True, False))
    close = {"rtol": 1e-4, "atol": 1e-4}
    if k >= cache.n:
        np.testing.assert_allclose(with_tail, exact, **close)
        np.testing.assert_allclose(without, exact, **close)
        return
    assert (with_tail <= exact * (1 + 1e-4) + 1e-4).all()
    assert (np.isclose(with_tail, exact, **close) | np.isclose(with_tail, lower, **close)).all()
    met = without > 0
    np.testing.assert_allclose(without[met], exact[met], **close)
    np.testing.assert_allclose(with_tail[met], exact[met], **close)
    np.testing.assert_allclose(with_tail[~met], lower[~met], **close)
    most = max(retrieval.LEAST_CLASSES, round(k / (cache.n / np.count_nonzero(np.bincount(case.ids)))))
    assert (met.sum(1) <= most).all()
    # the most promising class is searched, unless its keys are missing or their weight is negligible
    logits = exact_parts(cache, case.f)[0] + alpha * lower
    best = logits.argmax(1)
    clear = (np.sort(logits, axis=1)[:, -1:] - np.sort(logits, axis=1)[:, :-1] > 1e-3).all(1)
    seen = exact[np.arange(len(best)), best] > 1e-6
    assert met[np.arange(len(best)), best][clear & seen].all()


@pytest.mark.parametrize("beta", [5.5, 150.0])
def test_a_sharp_exponential_still_finds_the_nearest_class(beta: float) -> None:
    """Weights that underflow must not hide the nearest class."""
    case = Case(2, [12] * 5, q=30, d=16)
    case.f = case.array[::2].copy()  # each query is a key, whose weight is 1
    cache = of_case(case, text=False, beta=beta)
    alone = cache.terms(case.f, 12, tail=False).cache
    np.testing.assert_array_equal(alone.argmax(1), case.ids[::2])
    assert (alone.amax(1) >= 0.99).all()


def test_classes_of_one_key_are_found() -> None:
    case = Case(3, [1] * 7, q=20, d=6)
    cache = of_case(case, text=False)
    exact = exact_parts(cache, case.f)[1]
    met = cache.terms(case.f, 1, tail=False).cache.numpy()
    assert (np.count_nonzero(met, axis=1) == 1).all()
    np.testing.assert_array_equal(met.argmax(1), exact.argmax(1))


def test_a_single_class_is_always_the_answer() -> None:
    case = Case(4, [9], q=4, d=5)
    cache = of_case(case)
    np.testing.assert_allclose(cache.terms(case.f, 2).cache, exact_parts(cache, case.f)[1], rtol=1e-5)
    assert {p.label for p in cache.classify(case.f, k=2)} == {"class 0"}
    assert cache.certified(case.f, 1).keys.tolist() == [1] * 4


@settings(max_examples=examples(25), deadline=None)
@given(cases(), st.integers(1, 90), st.booleans(), st.integers(1, 5), st.integers(1, 6))
def test_classes_do_not_depend_on_blocks(case: Case, k: int, tail: bool, of_queries: int, of_keys: int) -> None:
    cache = of_case(case)
    whole = cache.logits(case.f, k, tail)
    with (
        mock.patch.object(retrieval, "QUERY_BLOCK", of_queries),
        mock.patch.multiple("retrieval_tip.retrieval.keys", QUERY_BLOCK=of_queries, KEY_BLOCK=of_keys, GATHERED=17),
    ):
        torch.testing.assert_close(of_case(case).logits(case.f, k, tail), whole, rtol=1e-5, atol=1e-4)


def test_values_give_the_dense_form_if_k_covers_all_classes() -> None:
    """A class that cannot win may still decide the answer through its values for other classes."""
    case = Case(6, [8, 12, 7, 10, 5], q=40, d=8)
    cache = of_case(case, values=(np.eye(5)[case.ids] + 0.1 * case.values).astype(np.float32))
    exact = exact_parts(cache, case.f)[1]
    for tail in (False, True):
        for k in (cache.n - 1, cache.n, 1000):
            np.testing.assert_allclose(cache.terms(case.f, k, tail).cache, exact, rtol=1e-4, atol=1e-4)


@settings(max_examples=examples(25), deadline=None)
@given(cases(), st.integers(1, 60))
def test_classes_with_one_hot_values_count_whole_or_at_their_mean(case: Case, k: int) -> None:
    plain, valued = of_case(case), of_case(case, values=np.eye(case.c, dtype=np.float32)[case.ids])
    exact, lower = exact_parts(plain, case.f)[1], at_means(plain, case.f)
    found = valued.terms(case.f, k).cache.numpy()
    met = plain.terms(case.f, k, tail=False).cache.numpy() > 0
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert (np.isclose(found, exact, **close) | np.isclose(found, lower, **close)).all()
    np.testing.assert_allclose(
        found[met], exact[met], **close
    )  # classes searched without values are searched with them
    without = valued.terms(case.f, k, tail=False).cache.numpy()
    assert (np.isclose(without, exact, **close) | np.isclose(without, 0, **close)).all()
    np.testing.assert_allclose(without[met], exact[met], **close)


def test_no_class_is_searched_if_only_one_without_keys_can_win() -> None:
    case = Case(7, [5, 0, 5], q=6, d=5)
    text = np.zeros((3, 5), dtype=np.float32)
    text[1] = 1
    f = unit(1 + 0.1 * np.random.default_rng(0).standard_normal((6, 5)))
    for values in (None, np.eye(3, dtype=np.float32)[case.ids]):
        cache = model(case.array, case.ids, 3, text, values=values, logit_scale=1000.0)
        met = cache.terms(f, 5, tail=False).cache
        assert values is not None or (met == 0).all()
        assert {p.label for p in cache.classify(f, k=5)} == {"class 1"}


@pytest.mark.parametrize("index", ["Classes", "Flat"])
@pytest.mark.parametrize("valued", [False, True])
def test_searching_few_of_many_keys_needs_no_large_tensor(index: str, valued: bool) -> None:
    """Few classes give few logits, but each query still searches many keys."""
    case = Case(8, [60, 80], q=400, d=4)
    cache = of_case(case, index=index, values=np.eye(2, dtype=np.float32)[case.ids] if valued else None)
    cache.logits(case.f[:2], 50)  # computes the sums of keys once
    blocks = {"QUERY_BLOCK": 16, "KEY_BLOCK": 32}
    with (
        mock.patch.multiple(retrieval, QUERY_BLOCK=16, LOGITS=1024),
        mock.patch.multiple("retrieval_tip.retrieval.keys", **blocks, GATHERED=1024),
        Largest() as largest,
    ):
        cache.logits(case.f, 50)
    assert largest.most <= max(400 * 4, 16 * 140, 1024)  # each query searches 50 keys, or both classes


# -------------------------------------------------------------------------------------------------- the nearest keys


@settings(max_examples=examples(30), deadline=None)
@given(cases(), st.integers(1, 120))
def test_nearest_keys_have_exact_affinities_in_order(case: Case, k: int) -> None:
    cache = of_case(case)
    affinity, rows = cache.nearest(case.features, k)
    exact = case.f.astype(np.float64) @ cache.keys.astype(np.float64).T
    assert rows.shape == tuple(affinity.shape) == (len(case.f), min(k, cache.n))
    filled = rows >= 0
    assert (np.diff(filled.astype(int), axis=1) <= 0).all()  # empty slots come last
    np.testing.assert_allclose(
        affinity, np.where(filled, np.take_along_axis(exact, np.maximum(rows, 0), axis=1), 0), atol=1e-5
    )
    for row, values, whole in zip(rows, affinity.numpy(), exact, strict=True):
        found = row[row >= 0]
        assert len(set(found.tolist())) == len(found)
        assert (np.diff(values[row >= 0]) <= 0).all()
        assert len(found) == min(k, cache.n)  # up to 8 classes are all searched
        np.testing.assert_allclose(values, -np.sort(-whole)[: len(found)], atol=1e-5)


def test_a_search_by_classes_finds_most_of_the_nearest_keys(material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, queries = material
    classes, flat = (model(array, ids, C, text, index=index) for index in ("Classes", "Flat"))
    f = torch.from_numpy(queries[:200])
    for k in (1, 10, 100):
        rows, exact = classes.nearest(f, k)[1], flat.nearest(f, k)[1]
        assert (rows >= 0).all()
        recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])
        assert recall > 0.8


def test_classes_without_keys_leave_no_slot_empty() -> None:
    """The mean of an empty class, 0, is nearer to these queries than the means of classes with keys."""
    rng = np.random.default_rng(0)
    array = unit(rng.standard_normal((40, 6)) + np.array([3, 0, 0, 0, 0, 0]))
    ids = np.repeat([0, 1], 20)
    cache = model(array, ids, 30, None)
    f = unit(rng.standard_normal((5, 6)) - np.array([9, 0, 0, 0, 0, 0]))
    rows = cache.nearest(torch.from_numpy(f), 4)[1]
    assert (rows >= 0).all()
    assert all(len(p.neighbours) == 4 for p in cache.classify(f, k=30, neighbours=4))


def test_small_classes_near_a_query_leave_no_slot_empty() -> None:
    """Two classes hold most keys; each of the ten classes near the query has one."""
    rng = np.random.default_rng(1)
    near, far = (
        unit(rng.standard_normal((10, 8)) * 0.1 + np.eye(8)[0]),
        unit(rng.standard_normal((200, 8)) + np.eye(8)[1]),
    )
    ids = np.r_[np.arange(10), np.repeat([10, 11], 100)]
    cache = model(np.concatenate([near, far]), ids, 12, None)
    rows = cache.nearest(torch.from_numpy(np.eye(8, dtype=np.float32)[:1]), 20)[1]
    assert (rows >= 0).all()


@pytest.mark.parametrize("index", ["Classes", "Classes,HNSW8", "Classes,IVF2,Flat"])
def test_neighbours_have_their_own_labels_and_sources(index: str, material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, _ = material
    sources = [f"shot {i}" for i in range(len(ids))]
    cache = model(array, ids, C, text, index=index, sources=sources)
    for row, p in zip((0, 17, 500), cache.classify(array[[0, 17, 500]], k=128, neighbours=3), strict=True):
        assert {n.label for n in p.neighbours} == {p.label}
        for n in p.neighbours:
            assert (n.source, n.label) == (f"shot {n.key_id}", f"class {ids[n.key_id]}")
            assert n.affinity == pytest.approx(float(array[row] @ array[n.key_id]), abs=1e-5)
            assert n.weight == pytest.approx(np.exp(-BETA * (1 - n.affinity)), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ saving


def fresh(cache: CacheModel, **changes: Any) -> CacheModel:
    """Return a new model with the same keys and labels."""
    options = {"alpha": cache.settings.alpha, "index": cache.index.factory} | changes
    return model(
        np.asarray(cache.keys), cache.labels["class_id"].to_numpy(), len(cache.class_names),
        cache.text_weights.numpy(), **options,
    )  # fmt: skip


def check_same(one: CacheModel, other: CacheModel, queries: Array, k: int = 64) -> None:
    for number in ("all", k):
        torch.testing.assert_close(one.logits(queries, number), other.logits(queries, number), rtol=1e-5, atol=1e-3)
    f = torch.from_numpy(queries)
    np.testing.assert_allclose(one.nearest(f, 5)[0], other.nearest(f, 5)[0], atol=1e-5)


CLASS_INDEXES = ["Classes", "Classes,IVF2,Flat"]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("index", CLASS_INDEXES)
def test_a_saved_class_index_gives_the_same_answers(
    index: str, half: bool, tmp_path: Path, material: tuple[Array, Array, Array, Array]
) -> None:
    array, ids, text, queries = material
    cache = model(array.astype(np.float16) if half else array, ids, C, text, index=index)
    cache.settings = cache.settings.override(k=128)
    cache.save(tmp_path / "index")
    opened = verify(tmp_path / "index")
    assert (opened.index.factory, opened.settings.k, opened.n, opened.index.n) == (index, 128, C * SHOTS, C)
    check_same(opened, cache, queries[:50])


@pytest.mark.parametrize("change", ["take", "add", "remove", "replace"])
@pytest.mark.parametrize("index", [*CLASS_INDEXES, "Flat"])
def test_changed_keys_give_the_answers_of_a_new_build(
    index: str, change: str, material: tuple[Array, Array, Array, Array]
) -> None:
    array, ids, text, queries = material
    cache = model(array, ids, C, text, index=index)
    cache.logits(queries[:5], 64)  # computes the sums of keys
    if change == "take":
        cache = cache.take(np.r_[0:40, 60:400, 7, 7])
    elif change == "add":
        cache.add(queries[:30], (np.arange(30) * 7) % C)
    elif change == "remove":
        cache.remove([*range(16, 32), 100])  # one class loses all its keys
    else:
        keys = unit(array + 0.05 * np.random.default_rng(3).standard_normal(array.shape))
        rows = replace(cache.rows, keys=keys)
        cache = replace(cache, rows=rows, index=fresh(replace(cache, rows=rows)).index)
    check_same(cache, fresh(cache), queries[:50])
    text_, exact = exact_parts(cache, queries[:50])
    np.testing.assert_allclose(cache.logits(queries[:50]), text_ + exact, atol=1e-3)
    assert (cache.terms(queries[:50], 64).cache.numpy() <= exact * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("change", ["take", "add", "remove"])
def test_the_tuned_effort_survives_changes_of_keys(change: str, material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, queries = material
    cache = model(array, ids, C, text, index="IVF16,Flat")
    assert cache.index.effort != 3
    cache.index.effort = 3
    if change == "take":
        cache = cache.take(np.arange(600))
    elif change == "add":
        cache.add(queries[:3], [0, 1, 2])
    else:
        cache.remove([5])
    assert cache.index.effort == 3


def test_verify_finds_an_index_over_other_means(tmp_path: Path, material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, _ = material
    other = model(np.ascontiguousarray(array[::-1]), ids, C, text)
    replace(model(array, ids, C, text), index=other.index).save(tmp_path / "index")
    with pytest.raises(StoreError, match="the FAISS index does not match"):
        verify(tmp_path / "index")


def test_an_index_type_that_contradicts_the_manifest_is_refused(
    tmp_path: Path, material: tuple[Array, Array, Array, Array]
) -> None:
    array, ids, text, _ = material
    cache = model(array, ids, C, text, index="Flat")
    cache.index.factory = "Classes"  # written to the manifest
    cache.save(tmp_path / "index")
    with pytest.raises(StoreError, match="does not match the manifest"):
        CacheModel.load(tmp_path / "index", device="cpu")


def test_settings_are_saved_with_and_without_a_new_index(
    tmp_path: Path, material: tuple[Array, Array, Array, Array]
) -> None:
    array, ids, text, queries = material
    model(array, ids, C, text, index="Flat").save(tmp_path / "index")
    cache = CacheModel.load(tmp_path / "index", device="cpu")
    files = {path.name for path in (tmp_path / "index" / "data").iterdir()}
    cache.settings = cache.settings.override(alpha=2.0)
    cache.save_settings(tmp_path / "index")
    assert {path.name for path in (tmp_path / "index" / "data").iterdir()} == files
    cache.index, cache.settings = fresh(cache, index="Classes").index, cache.settings.override(k=128)
    cache.save(tmp_path / "index")
    added = {path.name for path in (tmp_path / "index" / "data").iterdir()} - files
    assert [name.partition("-")[0] for name in added] == ["index"]
    opened = verify(tmp_path / "index")
    assert (opened.index.factory, opened.settings.k, opened.settings.alpha, opened.version) == ("Classes", 128, 2.0, 3)
    check_same(opened, fresh(opened), queries[:50])
    stale = CacheModel.load(tmp_path / "index", device="cpu")
    cache.save_settings(tmp_path / "index")
    with pytest.raises(StoreError, match="try again"):
        stale.save(tmp_path / "index")


def test_auto_sets_index_and_k(material: tuple[Array, Array, Array, Array]) -> None:
    array, ids, text, queries = material
    few = model(array, ids, C, text, index="auto")
    assert (few.index.factory, few.settings.k) == ("Flat", None)
    rows = np.tile(np.arange(len(ids)), 4)
    many = model(array[rows], ids[rows], C, text, index="auto")
    assert (many.index.factory, many.settings.k) == ("Classes", 8 * 64)
    assert (many.logits(queries, many.settings.k).argmax(1) == many.logits(queries).argmax(1)).float().mean() >= 0.99
    lists = model(np.tile(array[:32], (70, 1)), np.tile(ids[:32], 70), 2, None, index="auto")
    assert (lists.index.factory, lists.settings.k) == ("IVF189,Flat", 256)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_precision_only_affects_all_keys_and_is_not_saved(
    precision: str, tmp_path: Path, material: tuple[Array, Array, Array, Array]
) -> None:
    array, ids, text, queries = material
    cache = model(array, ids, C, text, precision=precision)
    exact = model(array, ids, C, text)
    assert torch.equal(cache.logits(queries, 64), exact.logits(queries, 64))  # retrieved keys use float32
    assert torch.equal(cache.logits(queries), exact.logits(queries)) == (precision != "bfloat16")
    cache.save(tmp_path / "index")
    exact.save(tmp_path / "exact")
    one, other = (json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in ("index", "exact"))
    assert one.keys() == other.keys()
    assert "precision" not in one
    assert CacheModel.load(tmp_path / "index", device="cpu").precision == "auto"
    assert CacheModel.load(tmp_path / "index", device="cpu", precision="float32").precision == "float32"


def test_close_answers_of_half_precision_are_recomputed_in_float32() -> None:
    """Random queries have many close answers; half precision alone would change some of them."""
    rng = np.random.default_rng(5)
    common = 5 * rng.normal(size=48)
    keys, queries = (
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        for rows in (common + 5 * rng.normal(size=(m, 48)) for m in (1000, 4000))
    )
    ids, names = np.arange(1000) % 20, [f"class {i}" for i in range(20)]
    cache = CacheModel.from_features(keys, ids, names, settings=Settings(beta=8.0), device="cpu", precision="bfloat16")
    exact = replace(cache, precision="float32").logits(queries)
    assert (cache._keys.cache_logits(torch.from_numpy(queries), 8.0).argmax(1) != exact.argmax(1)).any()
    found = cache.logits(queries)
    assert torch.equal(found.argmax(1), exact.argmax(1))
    assert not torch.equal(found, exact)
    assert cache.logits(queries[:0]).shape == (0, 20)
