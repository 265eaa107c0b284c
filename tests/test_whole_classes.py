"""Indexes that search whole classes, compared with dense float64."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import cache_of, tries
from dense import Case, cases, parts, shots_like_clip
from dense import betas as some_betas
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from tables import unit

from retrieval_tip import Index, tip, verify
from retrieval_tip.errors import StoreError
from retrieval_tip.retrieval import logits as retrieval
from retrieval_tip.retrieval.vector_index import VectorIndex, auto_factory
from retrieval_tip.retrieval.whole_classes import promising
from retrieval_tip.settings import Settings

C, SHOTS, D = 40, 16, 64
BETA, SCALE = 5.5, 100.0
alphas = st.sampled_from([0.0, 0.1, 1.0, 20.0])
betas = st.just(0.0) | some_betas


@st.composite
def at_the_means(draw):
    """Draw text logits, cache logits at the mean affinities, true ones of up to ``slack`` more, alpha and slack.

    Few distinct values make ties and reached bounds common. A class may have no keys.
    """
    q = draw(st.integers(1, 4))
    c = draw(st.integers(1, 6))
    alpha = draw(st.sampled_from([0.0, 0.5, 1.0, 4.0]))
    slack = draw(st.sampled_from([0.0, 0.125, 1.0, 10.0]))
    beta = draw(st.sampled_from([0.0, 1.0, 5.5]))
    numbers = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 16.0]), min_size=c, max_size=c))

    def matrix(values):
        rows = [draw(st.lists(values, min_size=c, max_size=c)) for _ in range(q)]
        return torch.tensor(rows, dtype=torch.float64).view(q, c)

    text = matrix(st.sampled_from([-1.0, 0.0, 0.25, 1.0, 2.0]) | st.floats(-20, 20))
    mean = matrix(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(-1, 1))
    used = matrix(
        st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    )  # share of the slack that each class uses
    cache = tip.at_mean(torch.tensor(numbers, dtype=torch.float64), mean, beta)
    return text, cache, cache * (1 + slack * used), alpha, slack


@tries(400)
@given(at_the_means(), st.integers(1, 7))
def test_every_class_that_could_win_is_promising(given_, most):
    text, cache, true, alpha, slack = given_
    classes, met = promising(tip.Terms(text, cache), Settings(alpha=alpha), slack, most)
    lower = text + alpha * cache
    exact = text + alpha * true
    assert classes.shape == met.shape == (len(text), min(most, text.shape[1]))
    ranked = lower.gather(1, classes)
    assert (ranked[:, 0] == lower.amax(1)).all()
    assert (ranked.diff(dim=1) <= 0).all()
    assert met[:, 0].all()
    if most < text.shape[1]:
        return
    tolerance = 1e-9 * (1 + text.abs().max() + alpha * true.max())
    for query in range(len(text)):
        own = classes[query, met[query]]
        best = exact[query].max()
        assert exact[query, own].max() >= best - tolerance
        known = lower[query].clone()
        known[own] = exact[query, own]
        assert exact[query, known.argmax()] >= best - tolerance  # the answer that is given


@pytest.mark.parametrize(
    ("text", "cache", "alpha", "slack", "met"),
    [
        ([2, 1, 0], [1, 1, 1], 1.0, 0.99, [0]),
        ([2, 1, 0], [1, 1, 1], 1.0, 1.0, [0, 1]),  # a tie
        ([2, 1, 0], [1, 1, 1], 1.0, 2.01, [0, 1, 2]),
        (
            [0, 3, 3, 1],
            [1e6, 1, 2, 0],
            0.0,
            10.0,
            [1, 2],
        ),  # without alpha, the text alone selects classes
        ([1, 2, 0], [0, 3, 1e-3], 1e300, 1e9, [1]),  # alpha overflows
    ],
)
def test_only_classes_that_could_win_are_promising(text, cache, alpha, slack, met):
    terms = tip.Terms(torch.tensor([text]).float(), torch.tensor([cache]).float())
    own = Settings(alpha=alpha)
    classes, found = promising(terms, own, slack, len(text))
    assert sorted(classes[found].tolist()) == met or alpha > 1e38
    assert found[0, 0]


@pytest.fixture(scope="module")
def material():
    """Keys, their class ids, text weights and queries like CLIP's."""
    return shots_like_clip(C, SHOTS, D, 400)


def model(array, ids, c, text=None, **changes):
    options = {"beta": BETA, "logit_scale": SCALE, "index": "Classes", "device": "cpu"} | changes
    return cache_of(array, ids, [f"class {i}" for i in range(c)], text, **options)


def of_case(case, text=True, **changes):
    return model(
        case.K, case.y, case.c, case.W if text else None, **({"logit_scale": 10.0} | changes)
    )


def test_no_queries_give_no_answers():
    case = Case(1, [4, 0, 9], q=3, d=5)
    none = case.f[:0]
    for index in ("Flat", "Classes"):
        cache = of_case(case, index=index)
        for k in (None, 2):
            assert cache.logits(none, k).shape == (0, 3)
            assert cache.classify(none, k=k) == []
        assert cache.nearest(torch.from_numpy(none), 2)[1].shape == (0, 2)


def test_whole_classes_give_nearly_all_answers_of_all_keys(material):
    array, ids, text, queries = material
    cache = model(array, ids, C, text)
    exact_text, exact = parts(cache, queries)
    winners = (exact_text + exact).argmax(1)
    assert (exact_text.argmax(1) != winners).mean() > 0.02  # the cache changes some answers
    k = round(8 * cache.n / C)  # auto's k for larger indexes
    assert auto_factory(16 * 1000, 1000) == ("Classes", 8 * 16)
    agree = [
        (cache.logits(queries, number).argmax(1).numpy() == winners).mean() for number in (SHOTS, k)
    ]
    assert agree[1] >= max(agree[0], 0.99)


block_sizes = st.tuples(
    st.sampled_from([1, 3, 512]), st.sampled_from([1, 5, 16384]), st.sampled_from([17, 1 << 23])
)


@tries(60)
@given(
    cases(), alphas, st.floats(0, 30), st.integers(1, 90), st.booleans(), st.booleans(), block_sizes
)
def test_each_class_counts_whole_or_at_its_mean(case, alpha, beta, k, text, valued, sizes):
    """With one-hot values, or without values."""
    values = np.eye(case.c, dtype=np.float32)[case.y] if valued else None
    cache = of_case(case, text, alpha=alpha, beta=beta, values=values)
    exact = case.logits(beta)
    lower = case.logits(beta, met=np.zeros(case.A.shape, dtype=bool), tail=True)
    queries, keys, gathered = sizes
    blocks = mock.patch.multiple(
        "retrieval_tip.retrieval.keys", QUERY_BLOCK=queries, KEY_BLOCK=keys, GATHERED=gathered
    )
    with mock.patch.object(retrieval, "QUERY_BLOCK", queries), blocks:
        with_tail, without = (cache.terms(case.f, k, tail).cache.numpy() for tail in (True, False))
    close = {"rtol": 1e-4, "atol": 1e-4}
    if k >= cache.n:
        assert_allclose(with_tail, exact, **close)
        assert_allclose(without, exact, **close)
        return
    assert (np.isclose(with_tail, exact, **close) | np.isclose(with_tail, lower, **close)).all()
    assert (np.isclose(without, exact, **close) | np.isclose(without, 0, **close)).all()
    if valued:  # classes searched without values are searched with them
        without = (
            of_case(case, text, alpha=alpha, beta=beta).terms(case.f, k, tail=False).cache.numpy()
        )
    met = without > 0
    assert_allclose(with_tail[met], exact[met], **close)
    if valued:
        return
    assert_allclose(with_tail[~met], lower[~met], **close)
    most = max(
        retrieval.LEAST_CLASSES, round(k / (cache.n / np.count_nonzero(np.bincount(case.y))))
    )
    assert (met.sum(1) <= most).all()
    # the most promising class is searched, unless its keys are missing or their weight is negligible
    logits = parts(cache, case.f)[0] + alpha * lower
    best = logits.argmax(1)
    clear = (np.sort(logits, axis=1)[:, -1:] - np.sort(logits, axis=1)[:, :-1] > 1e-3).all(1)
    seen = exact[np.arange(len(best)), best] > 1e-6
    assert met[np.arange(len(best)), best][clear & seen].all()


@pytest.mark.parametrize("beta", [5.5, 150.0])
def test_a_sharp_exponential_still_finds_the_nearest_class(beta):
    """Weights that underflow must not hide the nearest class."""
    case = Case(2, [12] * 5, q=30, d=16)
    case.f = case.K[::2].copy()  # each query is a key, whose weight is 1
    alone = of_case(case, text=False, beta=beta).terms(case.f, 12, tail=False).cache
    assert_array_equal(alone.argmax(1), case.y[::2])
    assert (alone.amax(1) >= 0.99).all()


def test_values_give_the_dense_form_if_k_covers_all_classes():
    """A class that cannot win may still decide the answer through its values for other classes."""
    case = Case(6, [8, 12, 7, 10, 5], q=40, d=8)
    values = (np.eye(5)[case.y] + 0.1 * case.V).astype(np.float32)
    cache = of_case(case, values=values)
    for tail in (False, True):
        for k in (cache.n - 1, cache.n, 1000):
            found = cache.terms(case.f, k, tail).cache
            assert_allclose(found, case.logits(BETA, values), rtol=1e-4, atol=1e-4)


def test_no_class_is_searched_if_only_one_without_keys_can_win():
    case = Case(7, [5, 0, 5], q=6, d=5)
    text = np.zeros((3, 5), dtype=np.float32)
    text[1] = 1
    f = unit(1 + 0.1 * default_rng(0).standard_normal((6, 5)))
    for values in (None, np.eye(3, dtype=np.float32)[case.y]):
        cache = model(case.K, case.y, 3, text, values=values, logit_scale=1000.0)
        met = cache.terms(f, 5, tail=False).cache
        assert values is not None or (met == 0).all()
        assert {p.label for p in cache.classify(f, k=5)} == {"class 1"}


@tries(30)
@given(cases(), st.integers(1, 120))
def test_nearest_keys_have_exact_affinities_in_order(case, k):
    """Up to 8 classes are all searched, so that no slot is empty."""
    affinity, rows = of_case(case).nearest(case.queries, k)
    k = min(k, len(case.y))
    assert rows.shape == tuple(affinity.shape) == (len(case.f), k)
    assert all(len(set(row.tolist())) == k for row in rows)
    assert_allclose(affinity, np.take_along_axis(case.A, rows, axis=1), atol=1e-5)
    assert_allclose(affinity, -np.sort(-case.A, axis=1)[:, :k], atol=1e-5)


def test_classes_with_few_or_no_keys_near_a_query_leave_no_slot_empty():
    """The mean of an empty class, 0, may be the nearest. Two classes hold most keys, and the ten nearest have one."""
    rng = default_rng(0)
    cache = model(unit(rng.standard_normal((40, 6)) + 3 * np.eye(6)[0]), np.repeat([0, 1], 20), 30)
    f = unit(rng.standard_normal((5, 6)) - 9 * np.eye(6)[0])
    assert (cache.nearest(torch.from_numpy(f), 4)[1] >= 0).all()
    assert all(len(p.neighbours) == 4 for p in cache.classify(f, k=30, neighbours=4))
    near = rng.standard_normal((10, 8)) * 0.1 + np.eye(8)[0]
    far = rng.standard_normal((200, 8)) + np.eye(8)[1]
    ids = np.r_[np.arange(10), np.repeat([10, 11], 100)]
    cache = model(unit(np.concatenate([near, far])), ids, 12)
    assert (cache.nearest(torch.from_numpy(np.eye(8, dtype=np.float32)[:1]), 20)[1] >= 0).all()


def check_same(one, other, queries, k=64):
    for number in ("all", k):
        torch.testing.assert_close(
            one.logits(queries, number), other.logits(queries, number), rtol=1e-5, atol=1e-3
        )
    f = torch.from_numpy(queries)
    assert_allclose(one.nearest(f, 5)[0], other.nearest(f, 5)[0], atol=1e-5)


@pytest.mark.parametrize("index", ["Classes", "Flat"])
def test_some_of_the_keys_give_the_answers_of_a_new_build(index, material):
    """The tests of changes in ``test_living.py`` add and remove keys."""
    array, ids, text, queries = material
    cache = model(array, ids, C, text, index=index)
    rows = np.r_[0:40, 60:400, 7, 7]
    cache.logits(queries[:5], 64)  # computes the sums of keys
    cache = cache.take(rows)
    check_same(cache, model(array[rows], ids[rows], C, text, index=index), queries[:50])
    text_, exact = parts(cache, queries[:50])
    assert_allclose(cache.logits(queries[:50]), text_ + exact, atol=1e-3)


def test_an_index_of_other_keys_or_another_type_is_refused(tmp_path, material):
    array, ids, text, _ = material
    other = model(np.ascontiguousarray(array[::-1]), ids, C, text)
    cache = model(array, ids, C, text)
    replace(cache, rows=replace(cache.rows, index=other.rows.index)).save(tmp_path / "means")
    with pytest.raises(StoreError, match="the FAISS index does not match"):
        verify(tmp_path / "means")
    cache = model(array, ids, C, text, index="Flat")
    keys = VectorIndex.build(array, "Flat", "cpu")
    keys.factory = "Classes"  # written to the manifest
    replace(cache, rows=replace(cache.rows, index=keys)).save(tmp_path / "type")
    with pytest.raises(StoreError, match="does not match the manifest"):
        Index.load(tmp_path / "type")
