"""Tuning: the frontier, the cheapest trial that agrees, the trials themselves, and errors."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import cache_of, examples
from dense import shots_like_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index import tune as tuning
from retrieval_tip.index.tune import LEAST_QUERIES, Trial, tune

C, SHOTS = 20, 16
QUERIES = 120


@pytest.fixture(scope="module")
def material():
    return shots_like_clip(C, SHOTS, 32, QUERIES)


def model(material, **changes):
    array, ids, text, _ = material
    names = [f"class {i}" for i in range(C)]
    return cache_of(array, ids, names, text, device="cpu", **changes)


def trial(microseconds, agreement, best=False):
    return Trial("Flat", None, 1, agreement, microseconds, best)


def winners(cache, features, k):
    return cache.logits(features, k).argmax(1).numpy()


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0]))))
def test_the_frontier_matches_its_definition(pairs):
    found = tuning._frontier([trial(*pair) for pair in pairs])
    assert sorted((t.microseconds, t.agreement) for t in found) == sorted(pairs)
    assert [t.microseconds for t in found] == sorted(t.microseconds for t in found)
    best = {(t.microseconds, t.agreement) for t in found if t.best}
    assert len(best) == sum(t.best for t in found)
    for cost, agreement in pairs:
        beaten = any(
            (other_cost < cost and other >= agreement) or (other_cost == cost and other > agreement)
            for other_cost, other in pairs
        )
        assert ((cost, agreement) in best) == (not beaten)


def by_cost(costs):
    """Replace the clock by fixed costs per index type that grow with the number of keys and the effort."""

    def timed(cache, f, k):
        effort = (cache.index.effort or 0) / 100
        return tuning._winners(cache, f, k), costs.get(cache.index.factory, 50.0) + (k or 5000) / 100 + effort

    return mock.patch.object(tuning, "_timed", timed)


def check_choice(found, agreement):
    assert found.chosen.agreement >= agreement
    assert all(t.agreement < agreement for t in found.trials if t.microseconds < found.chosen.microseconds)
    assert any(t is found.chosen for t in found.trials)
    assert found.chosen.best
    assert tuning._frontier([replace(t, best=False) for t in found.trials]) == found.trials


@settings(max_examples=examples(30), deadline=None)
@given(st.sampled_from(["Flat", "Classes", "IVF4,Flat"]), st.sampled_from([0.3, 0.999, 1.0]) | st.floats(0.01, 1))
def test_the_cheapest_trial_that_agrees_often_enough_is_chosen(material, own, agreement):
    cache, queries = model(material, index=own), material[3]
    with by_cost({"Classes": 1.0, "IVF8,Flat": 5.0}):
        found = tune(cache, queries, agreement=agreement, factories=["Classes", "IVF8,Flat", "HNSW8"])
    check_choice(found, agreement)
    assert found.n == QUERIES
    over_all = winners(cache, queries, None)
    chosen = replace(cache, rows=replace(cache.rows, index=found.index))
    assert (chosen.index.factory, chosen.index.effort) == (found.chosen.index, found.chosen.effort)
    same = (winners(chosen, queries, found.chosen.k) == over_all).mean()
    assert same == pytest.approx(found.chosen.agreement)


def test_each_trial_reports_the_agreement_of_its_setting(material):
    cache, queries = model(material), material[3]
    found = tune(cache, queries, factories=["Classes", "IVF8,Flat"])
    check_choice(found, 0.999)  # with the real clock
    over_all = winners(cache, queries, None)
    tried = {(t.index, t.effort, t.k) for t in found.trials}
    assert len(tried) == len(found.trials)
    assert {t for t in tried if t[0] == "Classes"} == {("Classes", None, SHOTS * n) for n in (1, 2, 4, 8, 16)}
    assert {t for t in tried if t[0] == "IVF8,Flat"} == {
        ("IVF8,Flat", effort, k) for effort in (1, 2, 4, 8) for k in (16, 64, 256)
    }
    assert {t for t in tried if t[0] == "Flat"} == {("Flat", None, None)}
    for t in found.trials:
        assert t.microseconds > 0
        if t.index == "Flat":
            assert t.agreement == 1
            continue
        other = model(material, index=t.index)
        other.index.effort = t.effort
        assert t.agreement == pytest.approx((winners(other, queries, t.k) == over_all).mean())
    assert len({t.agreement for t in found.trials}) > 2  # agreements differ


def test_all_keys_are_chosen_if_no_other_setting_agrees(material):
    cache, queries = model(material), material[3]
    with (
        by_cost({"IVF64,Flat": 1.0}),
        mock.patch.object(tuning, "KEYS", (1,)),
        mock.patch.object(tuning, "EFFORTS", (1,)),
    ):
        found = tune(cache, queries, agreement=1.0, factories=["IVF64,Flat"])
    assert [t.k for t in found.trials] == [1, None]
    assert found.trials[0].agreement < 1
    assert (found.chosen.k, found.chosen.index, found.index) == (None, "Flat", None)


def test_tuning_does_not_change_the_classifier(material):
    cache, queries = model(material, index="IVF4,Flat"), material[3]
    before = (cache.index, cache.index.effort, cache.settings.k, cache.settings.alpha, cache.settings.beta)
    answers = cache.logits(queries, 64)
    tune(cache, queries, agreement=0.5, factories=["IVF4,Flat", "Classes"])
    assert (cache.index, cache.index.effort, cache.settings.k, cache.settings.alpha, cache.settings.beta) == before
    assert torch.equal(cache.logits(queries, 64), answers)


def test_too_few_queries_are_refused(material):
    cache, queries = model(material), material[3]
    for n in (0, 1, LEAST_QUERIES - 1):
        with pytest.raises(InputError, match=rf"^{n} queries .*at least 100$"):
            tune(cache, queries[:n])
    assert tune(cache, queries[:LEAST_QUERIES], factories=["Classes"]).n == LEAST_QUERIES


@pytest.mark.parametrize("agreement", [0.0, -0.1, 1.0001, 99.9, float("nan"), float("inf")])
def test_an_agreement_that_is_not_a_fraction_is_refused(agreement, material):
    with pytest.raises(UsageError, match=r"^agreement is .*: expected a fraction above 0"):
        tune(model(material), material[3], agreement=agreement)
