"""The search for alpha and beta: against brute force, without test labels, and on the command line."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clusters import round_clusters as clusters
from conftest import examples, needs_real, parts_of
from dense import affinity, cache_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import tiny, unit_rows, write_table

from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit import search_hp
from retrieval_tip.fit.folds import Queries
from retrieval_tip.fit.search_hp import right_between, search
from retrieval_tip.model import Index
from retrieval_tip.settings import Built, Settings

C, D = 5, 12


def centres_of(n, seed):
    """Return the mean direction of each class of :func:`clusters`."""
    rows, ids = clusters(n, C, D, seed)
    means = np.stack([rows[ids == i].mean(axis=0) for i in range(C)])
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def small_cache(shots=6, text=True, spread=0.6):
    keys, ids = clusters(shots * C, C, D, 1, spread)
    weights = unit_rows(C, D, 5) if text else None
    names = [f"class {i}" for i in range(C)]
    return Index.from_features(keys, ids, names, weights, settings=Settings(logit_scale=10.0), device="cpu")


def queries_of(cache, n=60, seed=2):
    features, ids = clusters(n, C, D, seed)
    return Queries(features, ids, "x")


def dense(cache, features, beta):
    """Return text and cache logits by definition."""
    A, ids = affinity(features, cache.keys), cache.labels["class_id"].to_numpy()
    return 10 * affinity(features, cache.text_weights), cache_logits(A, ids, C, beta)


def best_over_alphas(text, alone, y):
    """Return the largest number of right answers over all alphas, tried between and beyond all crossings of classes."""
    q = np.arange(len(y))
    gain, lead = alone[q, y][:, None] - alone, text[q, y][:, None] - text
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = -lead / gain
    ends = np.unique(np.concatenate([[0], crossings[np.isfinite(crossings) & (crossings > 0)]]))
    alphas = [0.0, *((ends[:-1] + ends[1:]) / 2), ends[-1] * 2 + 1]
    return max(int(((text + alpha * alone).argmax(1) == y).sum()) for alpha in alphas)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_accuracy_over_all_alphas_and_betas(seed):
    cache = small_cache()
    queries = queries_of(cache, seed=seed)
    betas = [0.5, 2.0, 5.5, 12.0]
    choice = search(cache, queries, betas=betas)
    best = max(best_over_alphas(*dense(cache, queries.features, beta), queries.ids) for beta in betas)
    assert round(choice.accuracy * len(queries.ids)) == best
    # the model has this accuracy with the chosen alpha, and at both ends of the interval
    low, high = choice.interval
    for alpha in (choice.alpha, low + 1e-3 * (choice.alpha - low), *([high * 0.999] if np.isfinite(high) else [])):
        cache.settings = cache.settings.override(alpha=alpha, beta=choice.beta)
        right = (cache.logits(queries.features).argmax(1).numpy() == queries.ids).sum()
        assert right == best


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.booleans())
def test_a_query_is_right_inside_its_interval_and_wrong_outside(seed, c, coarse):
    generator = np.random.default_rng(seed)
    text, alone = generator.integers(0, 4, (2, 20, c)).astype(float) if coarse else generator.normal(size=(2, 20, c))
    y = generator.integers(0, c, 20)
    low, high = right_between(torch.from_numpy(text), torch.from_numpy(alone), torch.from_numpy(y))
    for alpha in (0.001, 0.37, 1.013, 2.71, 50.3):
        logits = text + alpha * alone
        rivals = np.where(np.eye(c, dtype=bool)[y], -np.inf, logits).max(axis=1)
        own = logits[np.arange(20), y]
        clear = np.abs(own - rivals) > 1e-9
        assert (((low < alpha) & (alpha < high)) == (own > rivals))[clear].all()


@pytest.mark.parametrize("gamma", [0.0, 20.0])
def test_leave_one_out_predicts_the_answers_without_the_shot(gamma):
    cache = small_cache(shots=4)
    cache.settings = replace(cache.settings, gamma=gamma)
    offsets = cache.retrieval.keys.discriminant.offsets
    queries = Queries.leave_one_out(cache)
    tried = search_hp._Tried.of(cache, queries, [4.0])
    for row in (0, 7, 19):
        without = small_cache(shots=4)
        without.remove([int(cache.labels["key_id"][row].as_py())])
        scale = torch.ones(C)
        scale[queries.ids[row]] = 4 / 3  # three of four keys of its class remain
        without.settings = without.settings.override(beta=4.0)
        text, alone = parts_of(without, queries.features[row : row + 1])
        average = torch.from_numpy(queries.features[row : row + 1]) @ without.retrieval.keys.means.T
        average = average + offsets  # one shot hardly changes the offsets
        for alpha in (0.3, 3.0, 30.0):
            right = int((text + alpha * (scale * alone + gamma * average)).argmax()) == queries.ids[row]
            assert tried.hits(0, alpha)[row] == right


def test_keys_of_the_same_image_are_held_out_together():
    keys, ids = clusters(20, C, D, 3)
    sources = [f"image {i // 2 if i < 10 else i}" for i in range(20)]
    order = np.argsort(np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, *ids[10:]]), kind="stable")
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, *ids[10:]])
    cache = Index.from_features(keys, labels, list("abcde"), sources=sources, device="cpu")
    queries = Queries.leave_one_out(cache)
    assert len(queries.ids) == 15  # five images have two keys each
    assert np.bincount(queries.groups).max() == 2
    assert [sources[i] for i in order] == cache.labels["source"].to_pylist()


def test_leave_one_out_needs_two_images_per_class():
    with pytest.raises(UsageError, match="has one image"):
        Queries.leave_one_out(small_cache(shots=1))


def test_each_fold_hides_an_equal_share_of_each_class():
    cache = small_cache(shots=6)
    queries = Queries.in_folds(cache, 3)
    ids = cache.labels["class_id"].to_numpy()
    for fold in range(3):
        assert (np.bincount(ids[queries.groups == fold], minlength=C) == 2).all()
    np.testing.assert_array_equal(queries.hidden, queries.groups)
    assert search(cache, queries).n == 30
    with pytest.raises(UsageError, match="folds"):
        Queries.in_folds(cache, 1)


def test_the_search_may_choose_text_alone_or_cache_alone():
    features, ids = clusters(60, C, D, 2, spread=0.2)
    centres = np.stack([features[ids == i].mean(axis=0) for i in range(C)])
    keys, key_ids = clusters(30, C, D, 1, spread=0.2)
    names = list("abcde")

    def chosen(weights, labels):
        cache = Index.from_features(keys, labels, names, weights, settings=Settings(logit_scale=10.0), device="cpu")
        return search(cache, Queries(features, ids, "x"))

    right = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    text = chosen(right, (key_ids + 1) % C)  # every key is labelled wrongly
    assert (text.part, text.accuracy, text.zero_shot) == ("text", 1.0, 1.0)
    assert text.interval[0] == 0
    alone = chosen(right[::-1].copy(), key_ids)  # the text is wrong
    assert (alone.part, alone.cache_alone) == ("cache", 1.0)
    assert alone.interval[1] == np.inf
    assert alone.accuracy == 1.0


def test_the_surface_contains_the_accuracy_of_each_setting():
    cache = small_cache()
    queries = queries_of(cache)
    choice = search(cache, queries, betas=[1.0, 6.0])
    for row in choice.surface.to_pylist():
        cache.settings = cache.settings.override(alpha=row["alpha"], beta=row["beta"])
        answers = cache.logits(queries.features).argmax(1).numpy()
        assert row["accuracy"] == pytest.approx((answers == queries.ids).mean())
    assert 0 <= choice.flat <= 1
    assert choice.low <= choice.accuracy <= choice.high


def test_bad_queries_are_refused():
    cache = small_cache()
    queries = queries_of(cache)
    for wrong in (
        Queries(queries.features[:0], queries.ids[:0], "x"),
        Queries(queries.features[:, :3], queries.ids, "x"),
        Queries(queries.features, queries.ids + C, "x"),
    ):
        with pytest.raises(InputError, match="x:"):
            search(cache, wrong)


@pytest.fixture
def split(tmp_path, shared):
    """A split file of photos of four classes of Caltech101."""
    data = json.loads((shared / "data/caltech101/split_zhou_Caltech101.json").read_text())
    kept = {part: [e for e in data[part] if e[2] in ("panda", "pizza", "camera", "butterfly")] for part in data}
    (tmp_path / "101_ObjectCategories").symlink_to(shared / "data/caltech101/101_ObjectCategories")
    (tmp_path / "split.json").write_text(json.dumps(kept))
    return tmp_path / "split.json"


def test_test_labels_cannot_reach_the_search(run, split, tmp_path):
    model = ("--model", f"local-dir:{tiny(tmp_path / 'model')}")
    chosen = []
    for poisoned in (False, True):
        if poisoned:
            data = json.loads(split.read_text())
            labels = [entry[1:] for entry in data["test"]]
            data["test"] = [[e[0], *labels[-1 - i]] for i, e in enumerate(data["test"])]
            split.write_text(json.dumps(data))
        out = tmp_path / f"i{poisoned}"
        assert run("index", "build", "--fit", "none", split, *model, "--shots", 4, "--out", out).exit_code == 0
        done = run("search-hp", out, "--val", split, "--json")
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout)
        assert facts["source"].endswith("split.json (val)")
        chosen.append({name: facts[name] for name in ("alpha", "beta", "accuracy", "n")})
    assert chosen[0] == chosen[1]
    assert chosen[0]["n"] == 16  # four per class


def test_the_choice_becomes_a_version_with_its_provenance(run, shared, tmp_path):
    food, out = shared / "data/clip-food9", tmp_path / "i"
    built = run(
        "index", "build", "--fit", "none", food / "train.parquet", "--text", food / "text.parquet", "--shots", 16,
        "--out", out,
    )  # fmt: skip
    assert built.exit_code == 0
    before = json.loads(run("index", "info", out, "--json").stdout)
    dry = json.loads(run("search-hp", out, "--leave-one-out", "--dry-run", "--json").stdout)
    assert json.loads(run("index", "info", out, "--json").stdout) == before
    surface = tmp_path / "s.parquet"
    done = run("search-hp", out, "--leave-one-out", "--surface", surface, "--json")
    facts = json.loads(done.stdout)
    assert {name: facts[name] for name in ("alpha", "beta")} == {name: dry[name] for name in ("alpha", "beta")}
    after = json.loads(run("index", "info", out, "--json").stdout)
    assert (after["version"], after["alpha"], after["beta"]) == (2, facts["alpha"], facts["beta"])
    assert after["files"] == before["files"]  # no data file was rewritten
    assert after["provenance"]["search"]["chosen_on"] == "its own shots, each held out in turn"
    assert pq.read_table(surface).column_names == ["beta", "alpha", "accuracy"]
    result = json.loads(run("evaluate", out, food / "test.parquet", "--json").stdout)
    assert result["alpha"] == facts["alpha"]
    assert run("search-hp", out, "--folds", 4, "--dry-run").exit_code == 0


def test_exactly_one_validation_source_is_required(run, tmp_path):
    table = write_table(tmp_path / "t.parquet", unit_rows(6, 8), ["cat", "dog"] * 3)
    assert run("index", "build", "--fit", "none", table, "--out", tmp_path / "i").exit_code == 0
    for options in ((), ("--leave-one-out", "--folds", 2), ("--val", table, "--leave-one-out")):
        refused = run("search-hp", tmp_path / "i", *options)
        assert refused.exit_code == 2
        assert "--leave-one-out" in refused.stderr


@needs_real
def test_validation_shots_match_the_published_draw(shared, tmp_path):
    """The validation draw continues after the training draw, as in the published index file."""
    from retrieval_tip.data.sources import Source

    split = shared / "data/splits/split_zhou_OxfordPets.json"
    published = json.loads((shared / "data/splits/indices/oxford_pets_shots16_seed1.json").read_text())["val"]
    import pyarrow as pa

    labels = [entry[2] for entry in json.loads(split.read_text())["val"]]
    val = Source("val", pa.table({"source": labels, "label": labels}))
    (tmp_path / "images").mkdir()
    first = json.loads(split.read_text())["train"]
    for entry in first:
        (tmp_path / "images" / entry[0]).touch()
    (tmp_path / "pets.json").symlink_to(split)
    cache = small_cache()
    cache.built = Built(f"{tmp_path / 'pets.json'} (train)", shots=16)
    assert search_hp.validation_shots(cache, val, tmp_path / "pets.json") == published
    assert len(search_hp.validation_shots(cache, val, number=2)) == 2 * 37


def test_a_cautious_search_changes_the_settings_only_on_significant_evidence():
    from retrieval_tip.retrieval.defaults import measure, plain_settings

    cache = replace(small_cache(), text_weights=torch.from_numpy(centres_of(400, 7)))
    alpha, beta = plain_settings(None, None, "both", measure(cache.keys, cache.labels["class_id"].to_numpy()))
    cache.settings = cache.settings.override(alpha=alpha, beta=beta)
    kept = 0
    for seed in range(8):
        queries = queries_of(cache, 12, seed)
        careful, greedy = search(cache, queries, cautious=True), search(cache, queries)
        assert careful.accuracy <= careful.best == greedy.accuracy == greedy.best
        right = cache.logits(queries.features).argmax(1).numpy() == queries.ids
        if (careful.alpha, careful.beta) == (alpha, beta):
            assert careful.accuracy == right.mean()
            if careful.best > careful.accuracy:
                assert any("kept the untouched settings" in warning for warning in careful.warnings)
                kept += 1
        else:  # the chosen settings are better on almost every query with different answers
            assert careful.accuracy > right.mean()
    assert kept
    # with right text and wrong labels of all keys, the evidence is significant
    features, ids = clusters(200, C, D, 2, spread=0.2)
    centres = np.stack([features[ids == i].mean(axis=0) for i in range(C)]).astype(np.float32)
    keys, key_ids = clusters(30, C, D, 1, spread=0.2)
    wrong = Index.from_features(
        keys, (key_ids + 1) % C, list("abcde"), centres, settings=Settings(logit_scale=1.0), device="cpu"
    )
    moved = search(wrong, Queries(features, ids, "x"), cautious=True)
    assert moved.accuracy == moved.best == 1.0


@pytest.mark.parametrize("kind", ["Classes", "Flat"])
def test_an_index_keeps_its_k(kind):
    keys, ids = clusters(60, 6, 16, seed=1)
    text, _ = clusters(6, 6, 16, seed=2)
    cache = Index.from_features(keys, ids, [f"c{i}" for i in range(6)], text, index=kind)
    cache.settings = cache.settings.override(k=20)
    choice = search_hp.search(cache, Queries.leave_one_out(cache))
    search_hp.apply(cache, choice)
    assert cache.settings.k == 20
    assert cache.settings.alpha == choice.alpha
