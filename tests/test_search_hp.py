"""The search for alpha and beta: against brute force, without test labels, and on the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from clusters import round_clusters as clusters
from conftest import json_of, ok, tries
from dense import affinity, cache_logits, parts
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose
from tables import tiny, unit, unit_rows

from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit import search_hp
from retrieval_tip.fit.search_hp import right_between, search
from retrieval_tip.fit.visible import Queries
from retrieval_tip.model import Index
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.settings import Settings
from retrieval_tip.store.labels import images_of

C, D = 5, 12
NAMES = [f"class {i}" for i in range(C)]


def centres_of(n, seed, spread=0.6):
    """Return the mean direction of each class of :func:`clusters`."""
    rows, ids = clusters(n, C, D, seed, spread)
    return unit(np.stack([rows[ids == i].mean(axis=0) for i in range(C)]))


ONE_HOT = np.repeat(np.eye(C, dtype=np.float32), 6, 0)


def small_cache(shots=6, text=True, spread=0.6, values=None, sources=None):
    """Return an index of keys in the order of their classes."""
    keys, ids = clusters(shots * C, C, D, 1, spread)
    order = np.argsort(ids, kind="stable")
    weights = unit_rows(C, D, 5) if text else None
    own = Settings(logit_scale=10.0)
    return Index.from_features(
        keys[order],
        ids[order],
        NAMES,
        weights,
        values=values,
        sources=sources,
        settings=own,
    )


def queries_of(cache, n=60, seed=2):
    features, ids = clusters(n, C, D, seed)
    return Queries(features, ids, "x")


def best_over_alphas(text, alone, y):
    """Return the largest number of right answers over all alphas, tried between and beyond all crossings of classes."""
    q = np.arange(len(y))
    gain = alone[q, y][:, None] - alone
    lead = text[q, y][:, None] - text
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = -lead / gain
    ends = np.unique(np.concatenate([[0], crossings[np.isfinite(crossings) & (crossings > 0)]]))
    alphas = [0.0, *((ends[:-1] + ends[1:]) / 2), ends[-1] * 2 + 1]
    return max(int(((text + alpha * alone).argmax(1) == y).sum()) for alpha in alphas)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_accuracy_over_all_alphas_and_betas(seed, monkeypatch):
    cache = small_cache()
    cache.settings = cache.settings.override(alpha=0.0, beta=0.5)  # the text is random
    queries = queries_of(cache, seed=seed)
    betas = [0.5, 2.0, 5.5, 12.0]
    monkeypatch.setattr(search_hp, "BETAS", np.array(betas))
    choice = search(cache, queries)
    best = max(
        best_over_alphas(*parts(cache, queries.features, beta=beta), queries.ids) for beta in betas
    )
    assert (
        round(choice.accuracy * len(queries.ids)) == round(choice.best * len(queries.ids)) == best
    )
    # the model has this accuracy with the chosen alpha, and at both ends of the interval
    low, high = choice.interval
    for alpha in (
        choice.alpha,
        low + 1e-3 * (choice.alpha - low),
        *([high * 0.999] if np.isfinite(high) else []),
    ):
        cache.settings = cache.settings.override(alpha=alpha, beta=choice.beta)
        right = (cache.logits(queries.features).argmax(1).numpy() == queries.ids).sum()
        assert right == best


@tries(200)
@given(st.integers(0, 10**6), st.integers(2, 6), st.booleans())
def test_a_query_is_right_inside_its_interval_and_wrong_outside(seed, c, coarse):
    generator = default_rng(seed)
    text, alone = (
        generator.integers(0, 4, (2, 20, c)).astype(float)
        if coarse
        else generator.normal(size=(2, 20, c))
    )
    y = generator.integers(0, c, 20)
    low, high = right_between(torch.from_numpy(text), torch.from_numpy(alone), torch.from_numpy(y))
    for alpha in (0.001, 0.37, 1.013, 2.71, 50.3):
        logits = text + alpha * alone
        rivals = np.where(np.eye(c, dtype=bool)[y], -np.inf, logits).max(axis=1)
        own = logits[np.arange(20), y]
        clear = np.abs(own - rivals) > 1e-9
        assert (((low < alpha) & (alpha < high)) == (own > rivals))[clear].all()


ASK = {
    "validation": lambda cache: queries_of(cache),
    "leave-one-out": Queries.leave_one_out,
}


def all_caches(cache, queries, betas):
    """Return cache logits of shape ``[betas, q, c]``."""
    found = np.full((len(betas), len(queries.ids), C), np.nan)
    for part, visible in queries.blocks(cache):
        for b, terms in enumerate(visible.terms(betas)):
            found[b, part] = terms.cache
    return found


@pytest.mark.parametrize("ask", ASK)
def test_the_search_with_values_matches_the_definition(ask):
    """Visible keys count more, to make up for hidden keys of their class. Keys of one image are hidden together."""
    sources = [
        f"image {i // 2 if i < 10 else i}" for i in range(30)
    ]  # five images have two keys each
    noise = default_rng(0).standard_normal(ONE_HOT.shape).astype(np.float32)
    cache, one_hot, plain = (
        small_cache(values=values, sources=sources) for values in (noise, ONE_HOT, None)
    )
    queries = ASK[ask](cache)
    both = [all_caches(one, queries, [0.5, 6.0]) for one in (one_hot, plain)]
    assert_allclose(*both, rtol=1e-4, atol=1e-5)
    if ask == "leave-one-out":
        assert len(queries.ids) == 25
    y = cache.class_ids.numpy()
    values = cache.values.numpy().astype(np.float64)
    images = np.unique(cache.labels["source"].to_pylist(), return_inverse=True)[1]
    A = affinity(queries.features, cache.keys)
    found = all_caches(cache, queries, [3.0])[0]
    for q in range(len(queries.ids)):
        seen = np.arange(cache.n)
        if queries.images is not None:
            seen = np.flatnonzero(images_of(cache.labels) != queries.images[q])
            assert not set(images[seen]) & set(images[np.setdiff1d(np.arange(cache.n), seen)])
        factor = np.bincount(y, minlength=C) / np.maximum(np.bincount(y[seen], minlength=C), 1)
        own = values[seen] * factor[y[seen]][:, None]
        expected = cache_logits(A[q : q + 1, seen], y[seen], C, 3.0, own)
        assert_allclose(found[q], expected[0], rtol=1e-3, atol=1e-4)


def test_leave_one_out_needs_two_images_per_class():
    with pytest.raises(UsageError, match="has one image"):
        Queries.leave_one_out(small_cache(shots=1))


def test_the_search_may_choose_text_alone_or_cache_alone():
    features, ids = clusters(60, C, D, 2, spread=0.2)
    right = centres_of(60, 2, 0.2)
    keys, key_ids = clusters(30, C, D, 1, spread=0.2)
    names = list("abcde")

    def chosen(weights, labels, alpha):
        own = Settings(alpha=alpha, logit_scale=10.0)  # all answers are wrong
        cache = Index.from_features(keys, labels, names, weights, settings=own)
        return search(cache, Queries(features, ids, "x"))

    text = chosen(right, (key_ids + 1) % C, 1e3)  # every key is labelled wrongly
    assert (text.accuracy, text.zero_shot, text.interval[0]) == (1.0, 1.0, 0)
    alone = chosen(right[::-1].copy(), key_ids, 0.0)  # the text is wrong
    assert (alone.accuracy, alone.interval[1]) == (1.0, np.inf)


@pytest.mark.parametrize("gamma", [0.0, 20.0])
def test_the_printed_accuracy_is_that_of_the_index(gamma):
    cache = small_cache()
    cache.settings = cache.settings.override(gamma=gamma)
    queries = queries_of(cache)
    choice = search(cache, queries)
    cache.settings = choice.settings(cache.settings)
    answers = cache.logits(queries.features).argmax(1).numpy()
    assert choice.accuracy == pytest.approx((answers == queries.ids).mean())
    assert choice.low <= choice.accuracy <= choice.high


def test_bad_queries_are_refused():
    cache = small_cache()
    queries = queries_of(cache)
    for wrong in (
        Queries(queries.features[:0], queries.ids[:0], "x"),
        Queries(queries.features[:, :3], queries.ids, "x"),
    ):
        with pytest.raises(InputError, match="x:"):
            search(cache, wrong)


@pytest.fixture
def split(tmp_path, shared):
    """A split file of photos of four classes of Caltech101."""
    data = json.loads((shared / "data/caltech101/split_zhou_Caltech101.json").read_text())
    kept = {
        part: [e for e in data[part] if e[2] in ("panda", "pizza", "camera", "butterfly")]
        for part in data
    }
    (tmp_path / "101_ObjectCategories").symlink_to(shared / "data/caltech101/101_ObjectCategories")
    (tmp_path / "split.json").write_text(json.dumps(kept))
    return tmp_path / "split.json"


def test_test_labels_cannot_reach_the_search(run, split, tmp_path):
    """Nor the temperature, nor the build. In the other split, test labels are wrong, and a test photo is missing."""
    data = json.loads(split.read_text())
    model = ("--model", f"local-dir:{tiny(tmp_path / 'model')}")
    wrong = [[entry[0], *data["test"][-1 - i][1:]] for i, entry in enumerate(data["test"])]
    poisoned = tmp_path / "poisoned.json"
    chosen = []
    poisoned.write_text(json.dumps(data | {"test": [*wrong, ["gone.jpg", 77, "poison"]]}))
    for number, part in enumerate((split, poisoned)):
        out = tmp_path / f"i{number}"
        ok("index build --fit none", part, *model, "--shots", 4, "--out", out)
        done = ok("search-hp", out, "--val", part, "--json")
        facts = json.loads(done.stdout)
        assert facts["source"].endswith(f"{part.name} (val)")
        ok("fit --calibrate", out, "--val", part)
        cache = Index.load(out)
        assert cache.provenance["temperature"] == f"fitted on {part} (val), n={len(data['val'])}"
        chosen.append(
            [
                *(facts[name] for name in ("alpha", "beta", "accuracy", "n")),
                cache.settings.temperature,
            ]
        )
    assert chosen[0] == chosen[1]
    assert chosen[0][3] == len(data["val"])
    assert run("fit --calibrate", out, "--val", split, "--split", "test").exit_code == 2


def test_the_choice_becomes_a_version_with_its_provenance(run, shared, tmp_path):
    food = shared / "data/clip-food9"
    out = tmp_path / "i"
    ok(
        "index build --fit none",
        food / "train.parquet",
        "--text",
        food / "text.parquet",
        "--shots",
        16,
        "--out",
        out,
    )
    before = json_of("index info", out)
    dry = json_of("search-hp", out, "--dry-run")
    assert json_of("index info", out) == before
    done = run("search-hp", out, "--json")
    facts = json.loads(done.stdout)
    assert {name: facts[name] for name in ("alpha", "beta")} == {
        name: dry[name] for name in ("alpha", "beta")
    }
    after = json_of("index info", out)
    assert (after["version"], after["alpha"], after["beta"]) == (2, facts["alpha"], facts["beta"])
    assert after["files"] == before["files"]  # no data file was rewritten
    assert after["provenance"]["search"]["chosen_on"] == "its own shots, each held out in turn"
    result = json_of("evaluate", out, food / "test.parquet")
    assert result["alpha"] == facts["alpha"]


@pytest.mark.parametrize("trained", [False, True])
def test_a_cautious_search_changes_the_settings_only_on_significant_evidence(trained):
    noise = default_rng(0).standard_normal(ONE_HOT.shape).astype(np.float32)
    cache = small_cache(values=ONE_HOT + 0.2 * noise if trained else None)
    cache = replace(cache, text_weights=torch.from_numpy(centres_of(400, 7)))
    alpha, beta = (
        (0.02, 4.321)
        if trained
        else untouched_settings(cache.keys, cache.labels["class_id"].to_numpy())
    )
    cache.settings = cache.settings.override(alpha=alpha, beta=beta)
    number = 0
    for seed in range(8):
        queries = queries_of(cache, 12, seed)
        careful = search(cache, queries)
        assert careful.accuracy <= careful.best
        right = cache.logits(queries.features).argmax(1).numpy() == queries.ids
        if (careful.alpha, careful.beta) == (alpha, beta):
            assert careful.accuracy == right.mean()
            if careful.best > careful.accuracy:
                kept = [
                    warning
                    for warning in careful.warnings
                    if warning.startswith("kept the settings (")
                ]
                assert "by chance" in kept[0]
                number += 1
        else:  # the chosen settings are better on almost every query with different answers
            assert careful.accuracy > right.mean()
    assert number
    # with right text and wrong keys, the evidence is significant
    features, ids = clusters(200, C, D, 2, spread=0.2)
    centres = torch.from_numpy(centres_of(200, 2))
    wrong = replace(small_cache(spread=0.2, values=-20 * ONE_HOT), text_weights=centres)
    wrong.settings = wrong.settings.override(alpha=50.0, beta=4.0)
    moved = search(wrong, Queries(features, ids, "x"))
    assert moved.accuracy == moved.best == 1.0


@pytest.mark.parametrize("kind", ["Classes", "Flat"])
def test_an_index_keeps_its_k(kind):
    keys, ids = clusters(60, 6, 16, seed=1)
    text, _ = clusters(6, 6, 16, seed=2)
    cache = Index.from_features(keys, ids, [f"c{i}" for i in range(6)], text, index=kind)
    cache.settings = cache.settings.override(k=20)
    choice = search_hp.search(cache, Queries.leave_one_out(cache))
    cache = search_hp.apply(cache, choice)
    assert cache.settings.k == 20
    assert cache.settings.alpha == choice.alpha
