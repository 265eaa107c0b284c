"""The closed-form fit: metric and values against dense float64, held-out folds, and the commands."""

from __future__ import annotations

import itertools
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clusters import C, D, clusters, text_of
from conftest import SOAK, failed, few, fitted, json_of, needs_real, ok, parts_of, tries
from dense import affinity, cache_logits, discriminant, scatter, solved
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from sealing import manifest_of
from tables import read_features, unit, write_table

from retrieval_tip import Index, tip
from retrieval_tip.backbones.base import Identity, Part
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.evaluation.held_out import held_out_probabilities
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.blend import HeldTerms
from retrieval_tip.fit.closed_form import FitRequest
from retrieval_tip.fit.folds import Folds, Order, ranks_within
from retrieval_tip.fit.forms import DEFAULT_FORM, FORMS, ONE_SHOT, Form, Scatter, Within
from retrieval_tip.fit.scatter import dimensions, known_prior, pooled
from retrieval_tip.fit.visible import Queries
from retrieval_tip.index import places as stores
from retrieval_tip.retrieval import ridge
from retrieval_tip.settings import Settings
from retrieval_tip.store.edits import Edits, NewKeys
from retrieval_tip.store.labels import PICKED
from retrieval_tip.store.sums import Sums

NAMES = [f"class {i}" for i in range(C)]


def model(shots=6, text=True, seed=0, spread=0.6, **options):
    keys, ids = clusters(shots, seed, spread)
    return Index.from_features(keys, ids, NAMES, text_of() if text else None, **options)


def folds_of(keys, ids, c, text=None, images=None, **options):
    """Return keys in their present order, of which by default each shows a photo of its own."""
    images = np.arange(len(ids)) if images is None else images
    order = Order(np.arange(len(ids)), np.arange(c))
    return Folds(keys, torch.from_numpy(ids), c, text, images, order, **options)


def uneven_clusters(counts, seed=0, spread=0.6, d=D):
    """Return features of which class ``i`` has ``counts[i]``."""
    keys, ids = clusters(max(counts), seed, spread, len(counts), d)
    some = np.concatenate([np.flatnonzero(ids == i)[:n] for i, n in enumerate(counts)])
    return keys[some], ids[some]


def dense(cache, queries, form, fitted_to=None, class_prior="even", bonus=0.0):
    """Compute text logits, cache logits and points of a fitted index by the definition, in float64.

    The metric is fitted to other keys and class ids if ``fitted_to`` gives them.
    """
    keys = np.asarray(cache.keys, dtype=np.float64)
    q = queries.astype(np.float64)
    ids = cache.class_ids.numpy()
    counts = np.array(cache.counts)
    some = counts > 0
    c = len(counts)
    if form.metric is not None:
        shrinkage, (own, own_ids) = form.metric.shrinkage, fitted_to or (keys, ids)
        centre = np.mean([own[own_ids == i].mean(0) for i in np.unique(own_ids)], axis=0)
        s = scatter(own, own_ids)
        s = (1 - shrinkage) * s + shrinkage * np.trace(s) / len(s) * np.eye(len(s))
        transform = np.linalg.inv(np.linalg.cholesky(s)).T
        keys = unit((keys - centre) @ transform)
        q = unit((q - centre) @ transform)
    values = None
    if form.ridge is not None:
        ridges = form.ridge * (counts / counts[some].mean() if class_prior == "even" else counts**0)
        values = solved(keys, ids, c, form.beta, ridges[ids])
        values[:, ~some] = values[:, some].mean(1, keepdims=True) + bonus / len(keys)
    text = cache.settings.logit_scale * affinity(queries, cache.text_weights)
    return text, cache_logits(affinity(q, keys), ids, c, form.beta, values), keys


SOME = [
    Form(Within(0.8), 0.1, 1.0),
    Form(Within(0.5), None, 4.0),
    Form(None, 0.3, 2.0),
    Form(None, None, 5.5),
]


CASES = {
    "even": ([6] * C, D, "even"),
    "uneven": ([1, 2, 4, 8, 9], D, "even"),
    "shots of equal weight": ([1, 2, 4, 8, 9], D, "shots"),
    "a class without shots": ([4, 4, 4, 4, 0], D, "even"),
    "few keys": ([4] * C, 64, "even"),
}
"""Shots per class, values of a feature, and class prior."""


@pytest.mark.parametrize("form", SOME, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("where", few([None, "", "lance://"], 2))
def test_logits_match_the_definition(form, case, where, tmp_path):
    """In memory and in a store, and after each class has got another shot, with the same metric."""
    counts, d, class_prior = CASES[case]
    keys, ids = uneven_clusters(counts, d=d)
    cache = fitted(
        Index.from_features(keys, ids, NAMES, text_of(d=d)),
        FitRequest(class_prior=class_prior),
        forms=[form],
    )
    assert (cache.fitted.bonus > 0) == (case == "a class without shots" and form.ridge is not None)
    if where is not None:
        place = stores.at(f"{where}{tmp_path / 'index'}")
        place.copy_from(cache, "save")
        cache = place.load().in_memory() if where else place.load()
        files = place.manifest().files
        if case == "few keys" and form.metric is not None:  # the directions in which they vary
            assert files["metric"].rows == 2 + len(keys) - C
            assert "points" not in files
            assert pickle.loads(pickle.dumps(cache)).metric.factor is not None
    check_definition(cache, form, (keys, ids), class_prior, d)
    cache = cache.edited(Edits(add=NewKeys(clusters(1, 8, d=d)[0], NAMES)))
    check_definition(cache, form, (keys, ids), class_prior, d)


def check_definition(cache, form, fitted_to, class_prior, d):
    queries, _ = clusters(4, seed=5, d=d)
    text, alone, points = dense(cache, queries, form, fitted_to, class_prior, cache.fitted.bonus)
    if cache.settings.log_offset is not None:
        assert form.ridge is not None
        alone = np.log1p(np.maximum(alone, 0) / cache.settings.log_offset)
    own_text, own_cache = (part.numpy() for part in parts_of(cache, queries))
    assert_allclose(own_text, text, atol=1e-4)
    assert_allclose(own_cache, alone, atol=2e-4 * np.abs(alone).max())
    if d > D:  # another root of the same matrix turns all points
        assert_allclose(cache.vectors @ cache.vectors.T, points @ points.T, atol=1e-5)
        points = np.asarray(cache.vectors)
    assert_allclose(cache.vectors, points, atol=1e-5)
    averages = discriminant(unit_points(cache, queries), points, cache.class_ids.numpy(), C)
    expected = text + cache.settings.alpha * (alone + cache.settings.gamma * averages)
    assert_allclose(cache.logits(queries).numpy(), expected, atol=1e-3 * np.abs(expected).max())
    nearest = (unit_points(cache, queries) @ points.T).max(1)
    assert_allclose([one.affinity for [one] in cache.similar(queries, 1)], nearest, atol=1e-5)


def unit_points(cache, queries):
    return cache.retrieval.keys.phi(torch.from_numpy(queries)).numpy()


@pytest.mark.parametrize(("shots", "norm"), [(6, 1e-3), (6, 1.2), (1, 17.0), (6, 1e4), (1, 1e8)])
def test_keys_of_any_norm_are_fitted(shots, norm):
    keys, ids = clusters(shots)
    queries, truth = clusters(6, seed=5)
    cache = Index.from_features(norm * keys, ids, NAMES)
    cache, choice = closed_form.fit(cache)
    assert (cache.fitted.metric == "within") or norm < 2
    assert bool(list(choice.warnings)) == (norm > 1.1)
    assert (cache.logits(norm * queries).numpy().argmax(1) == truth).mean() > 0.6
    if norm > 2:
        with pytest.raises(InputError, match="metric none"):
            cache = fitted(cache, FitRequest(metric="none"))
    mixed = np.geomspace(1e-3, 1e3, len(keys))[:, None] * keys
    closed_form.fit(Index.from_features(mixed, ids, NAMES))
    with pytest.raises(InputError, match="norm"):
        closed_form.fit(Index.from_features(1e-20 * keys, ids, NAMES))


@tries(30)
@given(
    st.integers(0, 10**6),
    st.integers(2, 6),
    st.integers(1, 5),
    st.integers(2, 24),
)
def test_the_scatter_matches_the_definition(seed, c, shots, d):
    draw = default_rng(seed)
    ids = np.sort(draw.integers(0, c, c * shots))
    keys = unit(draw.normal(size=(len(ids), d)))
    found = folds_of(keys, ids, c).scatter(torch.arange(len(ids)))
    expected = scatter(keys, ids if np.bincount(ids).max() > 1 else 0 * ids)
    assert_allclose(found.matrix, expected, atol=1e-6)
    means = [keys[ids == i].astype(np.float64).mean(0) for i in np.unique(ids)]
    assert_allclose(found.mean, np.mean(means, axis=0), atol=1e-6)


def test_views_of_one_photo_stay_together():
    images = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4])
    ids = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    folds = folds_of(np.eye(9, dtype=np.float32), ids, 3, images=images).with_shots(4, 10**6)
    assert [held.ids.tolist() for held in folds.held] == [[0, 1]] * 2
    assert sorted(torch.cat([held.query_rows for held in folds.held]).tolist()) == [
        0,
        2,
        4,
        6,
    ]  # a class with one photo stays
    for held in folds.held:
        hidden = set(range(9)) - set(held.rows.tolist())
        assert hidden == {row + view for row in held.query_rows.tolist() for view in (0, 1)}


ORDERS = {
    "small": (6, 5),
    "two photos": (12, 2),
    "one photo": (8, 1),
    "more": (30, 8),
    "sampled": (80, 28),
}
"""Numbers of classes and of photos per class. The shares of encoders are chosen on a sample of the last set."""


@pytest.mark.parametrize(
    ("case", "encoders"), [*((case, 1) for case in [*ORDERS][:-1]), *((case, 2) for case in ORDERS)]
)
@pytest.mark.parametrize("text", [False, True])
def test_the_order_of_the_rows_changes_no_answer(case, text, encoders):
    c, shots = ORDERS[case]
    names = [f"class {i}" for i in range(c)]
    queries = [clusters(3, 50 + i, c=c)[0] for i in range(encoders)]
    parts = [clusters(shots, 7 + i, 0.6 + 0.2 * i, c)[0] for i in range(encoders)]
    ids = np.repeat(np.arange(c), shots)
    for part in parts:
        part[0] = part[min(1, shots - 1)]  # equal rows in one class,
        part[-1] = part[0]  # and in two
    words = [text_of(c, seed=99 + i) for i in range(encoders)] if text else None

    def answers(order):
        index = fitted(
            Index.from_features([part[order] for part in parts], ids[order], names, words)
        )
        return tip.probabilities(index.logits(queries), index.settings.temperature).numpy()

    before = answers(np.arange(len(ids)))
    few, many = (1, 20) if case == "sampled" else (2, 200)
    for seed in range(many if SOAK else few):
        assert_allclose(answers(default_rng(seed).permutation(len(ids))), before, atol=1e-4)


@tries(25)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([0.1, 3.0, 100.0]))
def test_the_blend_minimises_the_loss(seed, with_text, with_discriminant, scale):
    draw = default_rng(seed)
    y = torch.from_numpy(draw.integers(0, 4, 40))
    cache = torch.from_numpy(draw.normal(size=(40, 4))).float() + torch.nn.functional.one_hot(y, 4)
    text = scale * torch.from_numpy(draw.normal(size=(40, 4))).float() if with_text else None
    third = (
        torch.from_numpy(draw.normal(size=(40, 4))).float() + cache if with_discriminant else None
    )
    found = HeldTerms(text, cache, third, y).blend()
    assert (found.a > 0, found.g > 0) == (with_text, with_discriminant)

    def loss(a, b, g):
        parts = zip((a, b, g), (text, cache, third), strict=True)
        logits = sum(factor * part.double() for factor, part in parts if part is not None)
        q = len(y)
        rest = 0.5 / (q + 1)
        target = torch.full((q, 4), rest / 3, dtype=torch.float64).scatter_(1, y[:, None], 1 - rest)
        return float(-(target * logits.log_softmax(1)).sum() / q)

    best = loss(found.a, found.b, found.g)

    def around(factor, part):
        at_bound = (
            part is not None and factor * float((part - part.mean(1, keepdim=True)).std()) < 0.02
        )
        return (1, 1.1, 2) if at_bound else (0.5, 0.9, 1, 1.1, 2)

    for a in around(found.a, text):
        for b in around(found.b, cache):
            for g in around(found.g, third):
                assert best <= loss(a * found.a, b * found.b, g * found.g) + 1e-4


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_wrong_labels_do_not_make_the_answers_uncertain(share):
    """The blend is close to a blend of the correctly labelled queries."""
    draw = default_rng(0)
    c, q = 10, 600
    truth = torch.from_numpy(draw.integers(0, c, q))
    logits = (
        torch.from_numpy(draw.normal(size=(q, c))) + 6 * torch.nn.functional.one_hot(truth, c)
    ).float()
    wrong = torch.from_numpy(draw.permutation(q)[: round(share * q)])
    given = truth.clone()
    given[wrong] = (truth[wrong] + torch.from_numpy(draw.integers(1, c, len(wrong)))) % c
    kept = torch.ones(q, dtype=torch.float64)
    kept[wrong] = 0
    terms = HeldTerms(None, logits, None, given)
    found = terms.robust(terms.blend())
    expected = HeldTerms(None, logits, None, truth).blend(kept / kept.mean())
    if share:
        assert terms.blend().b < 0.45 * expected.b
        assert 0.55 * expected.b < found.b < 1.05 * expected.b
    else:
        assert found.b == pytest.approx(expected.b, rel=0.02)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == given).double().mean()))


def test_a_query_of_weight_2_counts_as_two_queries():
    draw = default_rng(0)
    y = torch.from_numpy(draw.integers(0, 4, 3000))
    cache, text = (
        torch.from_numpy(draw.normal(size=(3000, 4))).float() + torch.nn.functional.one_hot(y, 4)
        for _ in "ab"
    )
    twice = torch.cat([torch.arange(3000), torch.arange(1000)])
    weights = (torch.bincount(twice) / torch.bincount(twice).double().mean()).double()
    third = text.flip(0)
    found = HeldTerms(text, cache, third, y).blend(weights)
    expected = HeldTerms(text[twice], cache[twice], third[twice], y[twice]).blend()
    factors = ((one.a, one.b, one.g) for one in (found, expected))
    assert next(factors) == pytest.approx(
        next(factors), rel=5e-3, abs=5e-3
    )  # label smoothing depends on len(y)
    assert found.accuracy == pytest.approx(expected.accuracy)
    assert found.loss == pytest.approx(expected.loss, rel=1e-3)


# -- classes without shots --


def partly(covered, c=20, shots=4, noise=1.0, spread=0.6):
    """Return a model of ``c`` classes with text, of which the first ``covered`` have shots."""
    keys, ids = clusters(shots, c=c, spread=spread)
    some = ids < covered
    return Index.from_features(
        keys[some], ids[some], [f"class {i}" for i in range(c)], text_of(c, noise=noise)
    )


def test_an_estimate_does_not_take_a_bonus_for_a_discriminant():
    """Without shots of some classes, folds have no discriminant, whose weight is gamma."""
    index = fitted(partly(8))
    weighted = index.with_settings(replace(index.settings, gamma=1e3))
    assert closed_form.estimate(weighted).both == closed_form.estimate(index).both > 0.3


def test_each_fold_is_judged_by_a_fit_without_it():
    """A fold holds out shots of each class, or whole classes, which then have the mean of the other classes."""
    cache = partly(8)
    keys = np.asarray(cache.keys)
    ids = cache.class_ids.numpy()
    folds = folds_of(keys, ids, 20, cache.text_weights)
    folds = folds.with_shots(4, 10**6).with_classes(10**6)
    found = folds.terms(DEFAULT_FORM).cache.split([len(held.ids) for held in folds.held])
    for held, logits in zip(folds.held, found, strict=True):
        rows = held.rows.numpy()
        some, own = np.unique(ids[rows], return_inverse=True)
        rest = Index.from_features(keys[rows], own, [str(i) for i in some])
        expected = dense(rest, held.features.numpy(), DEFAULT_FORM)[1]
        assert_allclose(logits[:, some], expected, atol=2e-4)
        others = np.setdiff1d(np.arange(20), some)
        assert_allclose(
            logits[:, others], expected.mean(1)[:, None].repeat(len(others), 1), atol=2e-4
        )
    shots, whole = ([held for held in folds.held if held.of == of] for of in ("shots", "classes"))
    assert [len(held.ids) for held in shots] == [8] * 4
    assert sorted(np.concatenate([held.ids for held in whole])) == sorted(ids)
    assert not any(set(ids[held.rows.numpy()]) & set(held.ids.tolist()) for held in whole)
    weights = folds.weights
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[folds.held_of("classes")].sum() / weights.sum()) == pytest.approx(12 / 20)


def test_small_folds_are_added_if_the_others_contain_half_of_the_shots():
    """They hold out each photo once, never two of the same class, and have a fifth of the total weight."""
    for shots, c in ((2, 20), (2, 3), (3, 20), (4, 20)):
        keys, ids = clusters(shots, c=c)
        plain = folds_of(keys, ids, c).with_shots(8, 10**6)
        images = plain.images
        folds = plain.with_small(10**6)
        assert (folds is plain) == (shots > 2)
        small = [held for held in folds.held if held.of == "small"]
        if not small:
            continue
        held = [np.setdiff1d(images, one.rows.numpy()) for one in small]
        assert_array_equal(np.sort(np.concatenate(held)), images)
        for rows, one in zip(held, small, strict=True):
            assert_array_equal(keys[rows], one.features)
            assert len(set(ids[rows])) == len(rows) <= 0.3 * len(images) or c == 3
        assert folds.n == len(images)
        weights = folds.weights
        assert float(weights[folds.held_of("small")].sum() / weights.sum()) == pytest.approx(0.2)


@pytest.mark.parametrize("shots", [1, 2, 4])
@pytest.mark.parametrize("covered", [2, 5, 10, 19])
def test_shots_of_some_classes_do_not_reduce_the_accuracy_of_text_alone(shots, covered):
    cache = partly(covered, shots=shots)
    queries, truth = clusters(20, seed=7, c=20)
    cache, choice = closed_form.fit(cache)
    text, _ = parts_of(cache, queries)
    right, by_text = (
        (logits.argmax(1).numpy() == truth).mean()
        for logits in (torch.as_tensor(cache.logits(queries)), text)
    )
    assert right >= by_text - 0.01
    assert f"{20 - covered} class" in str(choice)
    assert closed_form.estimate(cache).both == pytest.approx(choice.both)


def test_merging_a_class_without_shots_keeps_the_values():
    cache = fitted(partly(8), forms=[DEFAULT_FORM])
    expected = cache.values[:, :9]
    cache = cache.edited(Edits(rename=("class 9", "class 0")))
    cache = cache.edited(Edits(rename=("class 10", "class 8")))
    torch.testing.assert_close(cache.values[:, :9], expected)


@pytest.mark.parametrize("covered", [8, 16])
def test_the_bonus_of_classes_without_shots_lowers_the_loss(covered):
    cache = partly(covered, noise=2.0)
    queries, truth = clusters(20, seed=7, c=20)
    cache, choice = closed_form.fit(cache)
    assert closed_form.estimate(cache).both == pytest.approx(choice.both)

    def loss():
        logits = torch.as_tensor(cache.logits(queries)) / cache.settings.temperature
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(truth)))

    with_bonus = loss()
    for factor in (0, 2):
        cache.fitted = replace(cache.fitted, bonus=factor * choice.form.bonus)
        cache = cache.solved()
        assert loss() > with_bonus
    whole = fitted(model(shots=4))
    assert whole.fitted.bonus == 0


@needs_real
@pytest.mark.parametrize(
    ("covered", "shots", "least"), [(9, 1, 43.7), (9, 8, 44.7), (24, 1, 44.7), (24, 8, 51.0)]
)
def test_on_dtd_photos_of_some_classes_do_not_crowd_out_the_others(shared, covered, shots, least):
    """Zero-shot accuracy is 44.7 %. A cache that ignored classes without shots reached 15 % and 34 % with 8 shots."""
    (text, names), (keys, labels), (queries, truth) = (
        read_features(shared / f"data/clip-vitb32/dtd/{name}.parquet")
        for name in ("text", "val", "test")
    )
    draw = default_rng(1)
    chosen = draw.permutation(len(names))[:covered]
    rows = np.concatenate(
        [draw.permutation(np.flatnonzero(labels == names[i]))[:shots] for i in chosen]
    )
    cache = fitted(
        Index.from_features(unit(keys[rows]), labels[rows].tolist(), names.tolist(), text)
    )
    right = names[cache.logits(unit(queries)).argmax(1).numpy()] == truth
    assert 100 * right.mean() >= least


# -- a prior from other photos --


def test_a_prior_is_the_scatter_of_other_keys_around_their_class_means():
    parts = [clusters(9, seed) for seed in (1, 2)]
    prior = pooled([Sums.of([part], C, D) for part in parts])
    assert_allclose(
        prior, np.mean([scatter(*part) for part in parts], 0) * 9 / 8, rtol=1e-4, atol=1e-7
    )
    keys, ids = clusters(3)
    expected = (3 * C * scatter(keys, ids) + 1000 * prior) / (2 * C + 1000)
    found = folds_of(keys, ids, C, user_prior=prior).scatter(torch.arange(len(ids)))
    assert_allclose(found.matrix, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(InputError, match="no class has two"):
        pooled([Sums.of([clusters(1)], C, D)])


@pytest.mark.parametrize(("shots", "text"), few([*itertools.product((1, 2, 4), (True, False))], 2))
def test_a_prior_from_other_photos_improves_few_shot_accuracy(shots, text):
    prior = pooled([Sums.of([clusters(40, 77, c=20)], 20, D)])
    right = {}
    for spread in (None, prior):
        for seed in range(12):
            cache, (queries, truth) = (
                model(shots, text, seed, device="cpu"),
                clusters(40, seed=1000 + seed),
            )
            cache = fitted(cache, FitRequest(prior=spread))
            right.setdefault(spread is None, []).append(
                (cache.logits(queries).argmax(1).numpy() == truth).mean()
            )
    assert np.mean(right[False]) > np.mean(right[True]) + 0.01


def test_dimensions_of_joined_encoders_are_those_in_their_metric():
    root = default_rng(0).normal(size=(D, D)) * np.linspace(0.1, 2, D)
    joined = Scatter(torch.zeros(D), torch.from_numpy(root @ root.T), (6, 10))
    transform = joined.whitening(0.4).transform.double()
    inside = torch.linalg.eigvalsh(transform.T @ joined.matrix @ transform)
    expected = inside.sum() ** 2 / inside.square().sum()
    assert dimensions(joined, 0.4) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("d", "scale"), [(16, 1.0), (16, 0.0), (512, 1.0)])
def test_with_a_prior_one_photo_per_class_is_as_sure_as_the_metric_has_dimensions(d, scale):
    prior = scale * pooled([Sums.of([clusters(60, 77, c=20, d=d)], 20, d)])
    keys, ids = clusters(1, d=d)
    cache = fitted(Index.from_features(keys, ids, NAMES), FitRequest(prior=prior))
    inside = np.zeros((1, 1))
    if scale:
        transform = cache.metric.transform.double().numpy()
        inside = transform.T @ prior @ transform
    expected = 0.065 * np.trace(inside) ** 2 / max(np.trace(inside @ inside), 1e-9)
    assert (expected > 20) == (d > 16)  # few dimensions say little
    assert cache.settings.alpha == pytest.approx(max(20, expected), rel=1e-3)
    named = fitted(Index.from_features(keys, ids, NAMES, text_of(d=d)), FitRequest(prior=prior))
    assert named.settings.alpha != pytest.approx(
        cache.settings.alpha
    )  # text decides how much the cache counts


def test_the_known_prior_of_a_backbone_is_used_for_its_features():
    backbone = Identity("ViT-B-32", "openai", "w", "c", {})
    prior = known_prior(Part(512, "feature", backbone))
    assert_array_equal(prior, prior.T)
    values = np.linalg.eigvalsh(prior)
    assert 0.1 < values.sum() < 1  # the mean squared distance of a unit feature from its class mean
    assert values.min() > -1e-3 * values.max()
    others = (
        Part(16, "feature", backbone),
        Part(512, "feature", replace(backbone, pretrained="laion2b")),
    )
    assert list(map(known_prior, others)) == [None, None]
    keys, ids = clusters(2, d=512)
    one, other, plain = (Index.from_features(keys, ids, [str(i) for i in range(C)]) for _ in "abc")
    one.backbone = backbone
    one = fitted(one)
    other = fitted(other, FitRequest(prior=prior))
    plain = fitted(plain)
    assert one.prior is None  # it is not stored with every index
    torch.testing.assert_close(one.metric.transform, other.metric.transform, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(one.metric.transform, plain.metric.transform, rtol=0.1)


def test_a_prior_is_stored_in_the_index_and_must_have_the_same_dimension(run, tables):
    other = tables / "other"
    index = tables / "index"
    store = f"lance://{tables / 'store'}"
    ok("index build", tables / "test.parquet", "--out", other)
    for place in (index, store):
        ok(
            "index build",
            tables / "more.parquet",
            "--text",
            tables / "text.parquet",
            "--out",
            place,
        )
        ok("fit", place, "--prior", other)
    one, same = (stores.at(place).verify() for place in (index, store))
    expected = pooled([Sums.of([clusters(20, 5)], C, D)])
    assert_allclose(one.prior, expected, rtol=1e-5, atol=1e-8)
    assert_array_equal(one.prior, same.prior)
    torch.testing.assert_close(one.metric.transform, same.metric.transform)
    first = manifest_of(index).read_bytes()
    ok("fit", index)
    files = [json.loads(raw)["files"] for raw in (first, manifest_of(index).read_bytes())]
    assert [part["sha256"] for part in files[0].values()] == [
        part["sha256"] for part in files[1].values()
    ]
    wide = write_table(
        tables / "wide.parquet", np.eye(10, dtype=np.float32)[[0, 0, 1, 1]], ["a", "a", "b", "b"]
    )
    ok("index build", wide, "--out", tables / "wide")
    failed(run("fit", index, "--prior", tables / "wide"), 1, "10 values instead of 16")
    assert (
        run(
            "index build", wide, "--out", tables / "no", "--fit", "none", "--prior", other
        ).exit_code
        == 2
    )


# -- uneven shots --


def test_a_fit_keeps_the_class_prior_of_the_index(tables):
    index = tables / "index"
    for words, expected in (
        (
            ("index", "build", tables / "more.parquet", "--class-prior", "shots", "--out", index),
            "shots",
        ),
        (("fit", index), "shots"),
        (("fit", index, "--class-prior", "even"), "even"),
    ):
        ok(*words)
        assert Index.load(index).fitted.class_prior == expected


@pytest.mark.parametrize("kind", ["sorted", "shuffled", "residuals"])
def test_values_solve_the_linear_system(kind, monkeypatch):
    monkeypatch.setattr("retrieval_tip.retrieval.ridge.LEAST_HALF", 2)
    draw = default_rng(0)
    points = draw.normal(size=(30, 8)).astype(np.float32)
    ids = np.sort(draw.choice([0, 1, 3, 4, 6], 30))
    targets = np.eye(7, dtype=np.float32)[draw.permutation(ids) if kind == "shuffled" else ids]
    targets = targets - draw.random((30, 7), np.float32) if kind == "residuals" else targets
    gram = np.exp(unit(points) @ unit(points).T - 1)
    found = ridge.ridge_values(torch.from_numpy(gram.copy()), torch.from_numpy(targets), 0.1)
    assert_allclose(found, np.linalg.solve(gram + 0.1 * np.eye(30), targets), atol=1e-4)


def test_folds_of_uneven_shots_give_each_class_equal_weight():
    keys, ids = uneven_clusters((1, 2, 4, 8, 16))
    folds = folds_of(keys, ids, C).with_shots(8, 10**6)
    assert len(folds.held) == 6  # the median of 2, 4, 8 and 16
    held = torch.cat([one.ids for one in folds.held]).numpy()
    weights = folds.weights.numpy()
    assert weights.mean() == pytest.approx(1)
    assert_allclose(np.bincount(held, weights)[1:] / weights.sum(), 1 / 4)


@needs_real
def test_the_mean_class_accuracy_on_a_long_tail_of_flowers_is_high(shared):
    """Classes have 1 to 16 shots. With an unweighted ridge, the accuracy was 79.4 %."""
    (keys, labels), (queries, truth) = (
        read_features(shared / f"data/clip-vitb32/oxford_flowers/{name}.parquet")
        for name in ("shots_16", "test")
    )
    names, ids = np.unique(labels, return_inverse=True)
    draw = default_rng(1)
    numbers = np.round(16 ** (draw.permutation(len(names)) / (len(names) - 1))).astype(int)
    rows = np.concatenate(
        [draw.permutation(np.flatnonzero(ids == i))[:n] for i, n in enumerate(numbers)]
    )
    cache = fitted(Index.from_features(unit(keys[rows]), labels[rows].tolist(), names.tolist()))
    right = names[cache.logits(unit(queries)).argmax(1).numpy()] == truth
    assert 100 * np.mean([right[truth == name].mean() for name in names]) >= 83


def test_a_blend_of_perfect_logits_stays_finite():
    y = torch.arange(6) % 3
    logits = 10 * torch.nn.functional.one_hot(y, 3).float()
    found = HeldTerms(logits, logits, logits, y).blend()
    settled = found.settings(Settings(), 1.0)
    assert all(np.isfinite([settled.alpha, settled.gamma, settled.temperature]))
    assert bool(found.right.all())


class Diagonal(Within):
    """Scale each direction by its spread within classes."""

    name = "diagonal"

    def fit(self, scatter: Scatter) -> tip.Metric:
        spread = scatter.matrix.diagonal()
        shrunk = (1 - self.shrinkage) * spread + self.shrinkage * spread.mean()
        return tip.Metric(scatter.mean.float(), torch.diag(shrunk**-0.5).float())


def test_a_new_form_takes_one_class_and_one_entry(tmp_path):
    """The form is fitted, judged and stored. A stored index works even without the entry."""
    cache = model(shots=12, text=False)
    form = Form(Diagonal(0.1), 0.1, 1.0)
    queries, truth = clusters(40, seed=7)
    before = (cache.logits(queries).argmax(1).numpy() == truth).mean()
    FORMS.insert(0, form)
    try:
        cache, choice = closed_form.fit(cache)
        assert choice.form in FORMS
        assert (
            str(choice.trials[0][0])
            == "diagonal-class metric (shrinkage 0.1), solved values (ridge 0.1), beta 1"
        )
        cache, choice = closed_form.fit(cache, forms=[form])
        assert closed_form.estimate(cache).both == pytest.approx(choice.both)
    finally:
        FORMS.remove(form)
    cache.save(tmp_path / "index")
    found = Index.load(tmp_path / "index")
    assert (found.fitted.metric, found.fitted.shrinkage) == ("diagonal", 0.1)
    assert torch.equal(found.logits(queries), cache.logits(queries))
    after = (found.logits(queries).argmax(1).numpy() == truth).mean()
    assert abs(choice.both - after) < 0.1
    assert after > before + 0.05
    with pytest.raises(InputError, match="diagonal"):
        closed_form.estimate(found)


def test_the_metric_is_chosen_if_it_helps():
    cache = model(12, text=False, spread=1.0)
    queries, truth = clusters(40, seed=7, spread=1.0)
    before = (cache.logits(queries).argmax(1).numpy() == truth).mean()
    cache, choice = closed_form.fit(cache)
    after = (cache.logits(queries).argmax(1).numpy() == truth).mean()
    assert after > before + 0.05
    assert abs(choice.both - after) < 0.2
    assert cache.fitted.metric == "within"
    assert cache.fitted.keys == cache.n
    assert [form for form, _ in choice.trials] == [form for form in FORMS if form.ridge is not None]


@pytest.mark.parametrize(
    ("shots", "spread", "seed", "loss"), [(12, 0.6, 8, 0.03), (1, 0.3, 5, 0.05)]
)
def test_unhelpful_text_does_not_reduce_the_accuracy(shots, spread, seed, loss):
    """Even if it is confident, and there is one photo per class."""
    keys, ids = clusters(shots, spread=spread)
    noise = unit(default_rng(seed).normal(size=(C, D)))
    cache, choice = closed_form.fit(Index.from_features(keys, ids, NAMES, noise))
    queries, truth = clusters(20, seed=7, spread=spread)
    text, alone, both = (
        (logits.argmax(1).numpy() == truth).mean()
        for logits in (*parts_of(cache, queries), cache.logits(queries))
    )
    assert both >= alone - loss > text
    if shots > 1:
        assert choice.text < 0.5 < choice.photos
    else:  # the weight of the cache is limited, too
        most = closed_form.ONE_SHOT_MOST * 1.0001
        assert cache.settings.alpha / cache.settings.temperature <= most


def test_one_photo_per_class_uses_the_documented_settings():
    cache = model(shots=1)
    cache, choice = closed_form.fit(cache)
    assert (choice.form, choice.n, choice.both) == (ONE_SHOT, 0, None)
    cooled = max(1.0, cache.settings.temperature)
    assert cache.settings.alpha == pytest.approx(
        closed_form.ONE_SHOT_ALPHA * cooled**2 * cache.settings.temperature
    )
    assert cache.settings.least_cache is None
    assert "not estimated" in str(choice)
    assert closed_form.estimate(cache).both is None


def uneven(path, counts, seed=0):
    """Write a feature table in which class ``i`` has ``counts[i]`` photos."""
    keys, ids = uneven_clusters(counts, seed, 0.3)
    return write_table(path, keys, [f"class {i}" for i in ids])


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (
            [20] + [1] * 11,
            "Accuracy not estimated: only 1 of 12 classes could be tested (11 have one photo)",
        ),
        ([1] * 4, "Accuracy not estimated: each class has one photo"),
        ([9], "Accuracy not estimated: only one class has photos"),
        ([2, 2], "Accuracy not estimated: fewer than 8 photos"),
        (
            [6, 5] + [1] * 10,
            "Only 2 of 12 classes could be tested (10 have one photo). Estimated accuracy: ",
        ),
    ],
)
def test_an_estimate_that_rests_on_few_classes_or_photos_is_withheld_or_explained(
    run, tmp_path, counts, said
):
    index = tmp_path / "index"
    texts = [
        run("index build", uneven(tmp_path / "shots.parquet", counts), "--out", index).stderr,
        run("fit", index).stderr,
        run("index info", index).stdout,
    ]
    assert all(said in text and ("Estimated" in text) == ("Estimated" in said) for text in texts)
    cache = Index.load(index)
    assert (closed_form.estimate(cache).both is None) == ("not estimated" in said)
    if (
        counts[0] == 20
    ):  # form and settings do not rest on that class, either: no photo of another class has no match
        assert (cache.provenance["fit"]["form"], cache.settings.least_cache) == (
            str(ONE_SHOT),
            None,
        )


def test_settings_can_be_fixed_and_bad_ones_are_refused():
    cache = fitted(model(), FitRequest(metric="none", values="one-hot"))
    assert (cache.fitted.metric, cache.fitted.values) == ("none", "one-hot")
    with pytest.raises(UsageError, match="metric 'all'"):
        cache = fitted(cache, FitRequest(metric="all"))
    cache.settings = cache.settings.override(k=3)
    with pytest.raises(UsageError, match=r"values solved: need a search over all keys, .* k is 3;"):
        cache = fitted(cache, FitRequest(values="solved"))
    with pytest.raises(UsageError, match=r"values solved: .* k is all, and Classes searches some;"):
        closed_form.fit(model(), FitRequest(values="solved"), factory="Classes")
    cache = fitted(cache)
    assert cache.fitted.values == "one-hot"


def test_validation_images_can_replace_the_shots_as_judges():
    cache = model()
    queries, truth = clusters(8, seed=5)
    cache, choice = closed_form.fit(cache, validation=Queries(queries, truth, "val"))
    assert choice.judged_on == "40 photos of val"
    assert choice.both == pytest.approx((cache.logits(queries).argmax(1).numpy() == truth).mean())


def test_photos_with_weak_cache_logits_of_the_classes_with_shots_have_no_match():
    cache = partly(15, shots=8)
    queries = unit(
        np.concatenate([clusters(20, 7, c=20)[0], default_rng(11).normal(size=(400, D))])
    )
    cache = fitted(cache)
    answers = cache.classify(queries, neighbours=0)
    assert answers.withheld("auto").to_pylist() == [
        one.no_match or one.probability < 0.5 for one in answers
    ]
    assert answers == cache.classify(queries, neighbours=0, k="all")
    found = [one.no_match for one in answers]
    strongest = cache.terms(queries).cache[:, :15].amax(1)
    assert found == (strongest < cache.settings.least_cache).tolist()
    known = np.mean(found[:400])
    unknown = np.mean(found[400:])
    assert 0.03 < known < 0.1
    assert unknown > 1.5 * known


@pytest.mark.parametrize("values", ["solved", "one-hot"])
def test_with_four_or_more_shots_about_one_in_twenty_known_photos_has_no_match(values):
    queries, _ = clusters(100, seed=7, c=30, d=32)
    for shots in (4, 12):
        no_match = []
        for seed in range(4):
            cache = fitted(
                Index.from_features(*clusters(shots, seed, c=30, d=32), [*map(str, range(30))]),
                FitRequest(values=values),
            )
            strongest = cache.terms(torch.from_numpy(queries)).cache.amax(1)
            no_match.append(float((strongest < cache.settings.least_cache).float().mean()))
        assert 0.03 <= np.mean(no_match) <= 0.08
    cache = fitted(model(shots=2), FitRequest(values=values))
    assert cache.settings.least_cache is None  # two shots per class are too few for a threshold


@pytest.mark.parametrize("form", SOME, ids=str)
@pytest.mark.parametrize(
    ("text", "shots", "spread"), [(True, 8, 0.6), (False, 8, 0.6), (True, 8, 1.6), (True, 30, 1.0)]
)
def test_an_estimate_matches_the_fit_and_rises_with_corrected_labels(form, text, shots, spread):
    """In overlapping clusters, the logarithm changes answers."""
    cache = model(shots, text, spread=spread)
    wrong = cache.labels["key_id"].to_pylist()[::7]
    right = cache.labels["label"].to_pylist()[::7]
    others = [cache.class_names[(cache.class_names.index(label) + 1) % C] for label in right]
    cache = cache.edited(Edits(move=dict(zip(wrong, others, strict=True))))
    cache, choice = closed_form.fit(cache, forms=[form])
    before = closed_form.estimate(cache)
    assert before.interval == pytest.approx(choice.interval)
    assert before.weakest == choice.weakest
    names = ("photos", "text", "both", "names_hurt", "tested", "classes")
    assert [getattr(before, name) for name in names] == pytest.approx(
        [getattr(choice, name) for name in names]
    )
    settings = cache.settings
    cache = cache.edited(Edits(move=dict(zip(wrong, right, strict=True))))
    assert closed_form.estimate(cache).both > before.both + 0.05 or spread > 0.6
    assert cache.settings == settings


def test_in_a_large_index_only_added_and_relabelled_keys_get_new_values(monkeypatch):
    """The values of a smaller index are all solved again (``test_fitted_stores.py``)."""
    monkeypatch.setattr(ridge, "SOLVED_AGAIN", 0)
    cache = fitted(model(shots=6), forms=SOME[:1])
    cache.settings = cache.settings.unfitted()
    more, ids = clusters(2, seed=21)
    key_ids = [*range(cache.next_key_id, cache.next_key_id + len(ids))]
    cache = cache.edited(Edits(add=NewKeys(more, [NAMES[i] for i in ids])))

    def answered(cache):
        """Return ``(G + lambda / omega) V`` of the new keys, with ``omega = mean(n) / n_c``, and all values by key."""
        rows = [cache.labels["key_id"].to_pylist().index(key_id) for key_id in key_ids]
        counts = np.array(cache.counts)
        ridges = cache.fitted.ridge * (counts / counts.mean())[cache.class_ids[rows]][:, None]
        found = cache.terms(more).cache.numpy() + ridges * cache.values.numpy()[rows]
        return found, dict(
            zip(cache.labels["key_id"].to_pylist(), cache.values.tolist(), strict=True)
        )

    found, before = answered(cache)
    assert_allclose(found, np.eye(C)[ids], atol=1e-3)
    cache = cache.edited(Edits(move={key_ids[0]: NAMES[(ids[0] + 1) % C]}))
    found, after = answered(cache)
    assert_allclose(found[0], np.eye(C)[(ids[0] + 1) % C], atol=1e-3)
    assert [key_id for key_id in before if before[key_id] != after[key_id]] == key_ids[:1]


def test_a_fine_tuned_index_cannot_be_fitted():
    cache = model()
    cache.curve = pa.table({"epoch": [1]})
    with pytest.raises(InputError, match="fine-tuned"):
        cache = fitted(cache)


# -- through the commands --


@pytest.fixture
def tables(tmp_path):
    for name, shots, seed in (("train", 6, 0), ("test", 20, 5), ("more", 2, 21)):
        keys, ids = clusters(shots, seed)
        labels = [NAMES[i] for i in ids]
        names = [f"{name}-{i}" for i in range(len(ids))]
        write_table(tmp_path / f"{name}.parquet", keys, labels, names)
    write_table(tmp_path / "text.parquet", text_of(), NAMES)
    return tmp_path


def test_a_build_prints_its_estimate_and_add_fits_again(run, tables):
    out = tables / "index"
    built = ok(
        "index build", tables / "train.parquet", "--text", tables / "text.parquet", "--out", out
    )
    estimate = (
        r"Estimated accuracy: ([\d.]+) % \(95 % interval (\d+) to (\d+) %; 30 photos, each held out in turn; "
        r"photos alone [\d.]+ %, class names"
    )
    assert (percent := re.search(estimate, built.stderr))
    assert "Chosen form" not in built.stderr
    fit = Index.load(out).provenance["fit"]
    assert float(percent[1]) == pytest.approx(100 * fit["both"], abs=0.06)
    wrong = sum(held - right for _, right, held in fit["weakest"])  # in all 5 classes
    assert fit["both"] == pytest.approx(1 - wrong / 30, abs=1e-5)
    p, n, z = (
        fit["both"],
        30 / 2,
        1.96,
    )  # an interval of half as many photos, since the shots are drawn at random, too
    ends = np.sort(
        np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p])
    )  # where |p - x| = z sqrt(x (1 - x) / n)
    assert [int(end) for end in percent.groups()[1:]] == [round(100 * end) for end in ends]
    rates = [right / held for _, right, held in fit["weakest"]]
    assert rates == sorted(rates)
    run("index build", tables / "train.parquet", "--out", tables / "no-text")
    fit = Index.load(tables / "no-text").provenance["fit"]
    wrong = sum(held - right for _, right, held in fit["weakest"])
    left = (
        6 / 5
    ) ** -0.4  # a fold has 5 of the 6 photos of a class, and errors fall with their number
    assert fit["both"] == pytest.approx(1 - wrong / 30 * left, abs=1e-5)
    answers = run("classify", out, tables / "test.parquet", "--format", "json")
    assert set(json.loads(answers.stdout.splitlines()[0])) == {
        "input",
        "label",
        "probability",
        "no_match",
    }
    added = run("index add", out, tables / "more.parquet")
    assert (added.exit_code, "Fitted again" in added.stderr) == (0, True)
    assert json_of("index info", out)["fitted"]["keys"] == 40
    fitted = ok("-v fit", out, "--metric", "within", "--values", "one-hot")
    assert "Chosen form: within-class metric" in fitted.stderr
    assert "one-hot values" in fitted.stderr
    info = json_of("index info", out)
    assert (info["fitted"]["keys"], info["version"], info["change"]) == (40, 3, "fit")
    judged = run("fit", out, "--val", tables / "test.parquet")
    assert "100 photos of" in judged.stderr
    ok("index verify", out)
    added = run(
        "index add", out, tables / "test.parquet"
    )  # 140 shots instead of 40; add does not repeat --val
    assert (added.exit_code, "fit it again" in added.stderr) == (0, True)


def test_where_does_not_reduce_the_accuracy_of_excluded_classes(run, tmp_path):
    (keys, ids), names = clusters(6, c=20), [f"class {i}" for i in range(20)]
    queries, truth = clusters(20, seed=5, c=20)
    write_table(tmp_path / "train.parquet", keys, [names[i] for i in ids])
    write_table(tmp_path / "test.parquet", queries, [names[i] for i in truth])
    text = write_table(tmp_path / "text.parquet", text_of(c=20), names)
    index = tmp_path / "index"
    ok("index build", tmp_path / "train.parquet", "--text", text, "--out", index)
    few = ("--where", "class_id < 4", "--json")
    kept, given = (
        run("evaluate", index, tmp_path / "test.parquet", *few, *more)
        for more in ((), ("--alpha", 300))
    )
    kept = json.loads(kept.stdout)
    given = json.loads(given.stdout)
    assert kept["top1"] > kept["zero_shot_top1"] - 0.02
    assert (given["alpha"], given["top1"] < kept["top1"] - 0.05) == (300, True)


@pytest.mark.parametrize(
    "options",
    [
        ("--fit", "auto", "--alpha", "1"),
        ("--metric", "within", "--beta", "2"),
        ("--fit", "none", "--values", "solved"),
    ],
)
def test_conflicting_options_are_refused(run, tables, options):
    result = run("index build", tables / "train.parquet", "--out", tables / "o", *options)
    assert (result.exit_code, (tables / "o").exists()) == (2, False)
    assert "fit" in result.stderr


@pytest.mark.parametrize(
    ("accuracy", "most", "expected"),
    [(0.7, 1, "equal"), (0.999999, 1, 1.0), (0.1, 1, 2.0), (0.4, 16, "equal")],
)
def test_answers_are_as_sure_as_the_index_is_accurate(accuracy, most, expected):
    logits = torch.from_numpy(default_rng(0).normal(size=(200, 5)))
    weights = torch.from_numpy(default_rng(1).uniform(0.5, 1.5, 200))
    weights /= weights.mean()
    found = closed_form._as_sure(
        Settings(temperature=2.0), 3 * logits, weights, accuracy, most
    ).temperature
    if expected == "equal":
        assert 1.0 < found < 2.0 * most
        sure = float((weights * (3 * logits / found).softmax(1).amax(1)).mean())
        assert sure == pytest.approx(accuracy, abs=1e-3)
    else:
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("shots", "text", "of", "prior"),
    [
        (2, False, "small", False),
        (2, False, "small", True),
        (6, False, "shots", False),
        (6, True, "shots", False),
    ],
)
def test_the_temperature_of_a_fit_comes_from_photos_that_meet_almost_all_shots(
    shots, text, of, prior
):
    index = model(shots, text, spread=0.9)
    index, choice = closed_form.fit(
        index,
        FitRequest(prior=pooled([Sums.of([clusters(40, 77, c=20)], 20, D)]) if prior else None),
    )
    folds = closed_form._folds_of(index)
    assert folds.halves == (shots == 2)
    terms = folds.terms(Form.of(index.fitted, 1.0))
    linked = tip.log_cache(terms.cache.clone(), index.settings.log_offset)
    words = torch.zeros_like(linked) if terms.text is None else terms.text
    logits = tip.Terms(words, linked, terms.discriminant).logits(index.settings)
    sure = float((logits / index.settings.temperature).softmax(1).amax(1)[folds.held_of(of)].mean())
    assert sure == pytest.approx((choice.both * index.n + 0.5) / (index.n + 1), abs=2e-3)


@needs_real
def test_two_photos_per_class_are_about_as_sure_as_they_are_right(shared):
    table = pq.read_table(shared / "data/two-encoders/photos_16.parquet")
    features = np.stack(table["feature_lit"].to_numpy()).astype(np.float32)
    names, ids = np.unique(table["label"].to_pylist(), return_inverse=True)
    gaps = []
    for seed in range(3):
        ranks = ranks_within(ids, default_rng(seed))
        index = fitted(Index.from_features(features[ranks < 2], ids[ranks < 2], names.tolist()))
        p = tip.probabilities(index.logits(features[ranks >= 2]), index.settings.temperature)
        gaps.append(float(p.amax(1).mean()) - (p.argmax(1).numpy() == ids[ranks >= 2]).mean())
    assert (
        abs(np.mean(gaps)) < 0.05
    )  # 0.08 with the temperature of folds that have half of the shots


def test_only_photos_drawn_at_random_say_how_sure_an_index_of_chosen_photos_may_be():
    keys, ids = clusters(8, 3, spread=2.0)
    drawn = np.arange(len(ids)) % 4 == 0
    indexes = {}
    for name, picked in {"plain": None, "random": drawn, "suggested": ids < 0}.items():
        index = Index.from_features(keys, ids, NAMES)
        if picked is not None:
            how = pa.array(np.where(picked, "random", "suggested").tolist())
            index.rows = replace(index.rows, labels=index.rows.labels.append_column(PICKED, how))
        indexes[name] = fitted(index)
    settings = {name: index.settings for name, index in indexes.items()}
    assert all(
        replace(own, temperature=1.0) == replace(settings["plain"], temperature=1.0)
        for own in settings.values()
    )
    assert settings["suggested"].temperature == closed_form.EARLY  # nothing is known yet
    assert settings["random"].temperature != settings["plain"].temperature
    held = held_out_probabilities(indexes["random"])
    sure = held.pred_probs.max(1)[drawn].mean()
    right = held.right[drawn].mean()
    assert sure == pytest.approx(right, abs=0.15)
    few = fitted(Index.from_features(keys[::8], ids[::8], NAMES))
    before = few.settings.temperature
    few.rows = replace(
        few.rows, labels=few.rows.labels.append_column(PICKED, pa.array(["random"] * few.n))
    )
    few = fitted(few)
    assert few.settings.temperature == closed_form.EARLY * before


@pytest.mark.parametrize("address", ["{}", "lance://{}"], ids=["folder", "lance"])
def test_equal_and_nearly_equal_keys_can_be_built(tmp_path, address):
    for seed, (n, c, d, apart) in enumerate(
        itertools.product((12, 40), (3,), (8, 24), (0, 1e-8, 1e-6))
    ):
        draw = default_rng(seed)
        keys = unit(draw.normal(size=d) + apart * draw.normal(size=(n, d)))
        table = write_table(tmp_path / "keys.parquet", keys, [f"class {i % c}" for i in range(n)])
        place = address.format(tmp_path / f"index-{seed}")
        ok("index build", table, "--out", place)
        chances = stores.at(place).load().classify(keys).to_arrow()["probability"]
        assert np.isfinite(chances.to_numpy()).all()
