"""Trained values in each kind of index, against dense float64, and the files of a fine-tuned index."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import cache_of
from dense import affinity, cache_logits
from sealing import npy, refused, resealed, snapshot
from tables import unit

from retrieval_tip import Index, verify
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.fit.folds import Queries
from retrieval_tip.fit.search_hp import search
from retrieval_tip.store.versions import Manifest, Versions

C, D, Q = 5, 16, 23
NAMES = [f"class {i}" for i in range(C)]
COUNTS = [12, 1, 0, 30, 21]
N, BETA, SCALE = sum(COUNTS), 4.0, 20.0


_rng = np.random.default_rng(0)
_means = unit(_rng.standard_normal((C, D)))
Y = _rng.permutation(np.repeat(np.arange(C), COUNTS))
KEYS = unit(_means[Y] + 0.2 * _rng.standard_normal((N, D)))
TEXT = unit(_means + 0.3 * _rng.standard_normal((C, D)))
TRUTH = _rng.integers(C, size=Q)
QUERIES = unit(_means[TRUTH] + 0.2 * _rng.standard_normal((Q, D)))
VALUES = _rng.standard_normal((N, C)).astype(np.float32)
ONE_HOT = np.eye(C, dtype=np.float32)[Y]


def model(**changes):
    arguments = {
        "keys": KEYS, "labels": Y, "class_names": NAMES, "text_weights": TEXT, "alpha": 1.5, "beta": BETA,
        "logit_scale": SCALE, "device": "cpu", "values": VALUES,
    } | changes  # fmt: skip
    return cache_of(**arguments)


@pytest.mark.parametrize(
    "values",
    [
        VALUES[:-1], VALUES[:, :-1], VALUES[0], np.where(np.arange(N)[:, None] == 3, np.nan, VALUES), VALUES * np.inf,
        np.ones((N, C), int), [["x"] * C] * N,
    ],
    ids=["rows", "columns", "one dimension", "NaN", "infinity", "integers", "text"],
)  # fmt: skip
def test_bad_values_are_refused(values):
    with pytest.raises(InputError, match=r"^values: "):
        model(values=values)


def test_values_that_overflow_are_refused():
    for sign in (1, -1):
        with pytest.raises(InputError, match="overflow"):
            model(values=np.full((N, C), sign * 3e38), beta=0.0).logits(QUERIES)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_answers_with_values(tmp_path):
    model().save(tmp_path / "x")
    gpu, cpu = (Index.load(tmp_path / "x", device=device) for device in ("cuda", "cpu"))
    for cache in (gpu, cpu):
        cache.add(QUERIES[:2], [0, 1])
        cache.remove([4])
    for k, tail in ((None, True), (9, True), (9, False)):
        assert gpu.logits(QUERIES, k, tail).device.type == "cuda"
        torch.testing.assert_close(gpu.logits(QUERIES, k, tail).cpu(), cpu.logits(QUERIES, k, tail), rtol=0, atol=2e-3)
    taken = [cache.take(np.array([3, 1, 30])).logits(QUERIES).cpu() for cache in (gpu, cpu)]
    torch.testing.assert_close(*taken, rtol=0, atol=2e-3)
    gpu.save(tmp_path / "y")
    assert torch.equal(Index.load(tmp_path / "y", device="cpu").values, cpu.values)
    choice = [search(cache, Queries(QUERIES, TRUTH, "x")).accuracy for cache in (gpu, cpu)]
    assert choice[0] == pytest.approx(choice[1], abs=1.5 / Q)


def keys_with_two_images_per_class():
    """Return keys of at least two images per class, some with two views."""
    enough = np.flatnonzero(~np.isin(Y, [1, 2]))
    sources = [f"image {i // 2 if i < 20 else i}" for i in range(len(enough))]
    y = np.sort(Y[enough], kind="stable")
    return {"keys": KEYS[enough], "labels": y, "values": VALUES[enough], "sources": sources}


def validation(cache):
    return Queries(QUERIES, TRUTH, "x")


ASK = {
    "validation": validation,
    "leave-one-out": Queries.leave_one_out,
    "folds": lambda cache: Queries.in_folds(cache, 3),
}


def all_caches(cache, queries, betas):
    """Return cache logits of shape ``[betas, q, c]``."""
    found = np.full((len(betas), len(queries.ids), C), np.nan)
    for part, visible in queries.blocks(cache):
        for b, terms in enumerate(visible.terms(betas)):
            found[b, part] = terms.cache
    return found


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK.keys())
def test_the_search_with_values_matches_the_definition(ask):
    """Visible keys count more, to make up for hidden keys of their class. One-hot values equal no values."""
    arguments = keys_with_two_images_per_class()
    cache, plain = model(**arguments), model(**arguments | {"values": None})
    queries = ask(cache)
    one_hot = model(**arguments | {"values": np.eye(C)[arguments["labels"]]})
    both = [all_caches(one, queries, [0.5, 6.0]) for one in (one_hot, plain)]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)
    y, values = cache.class_ids.numpy(), cache.values.numpy().astype(np.float64)
    A = affinity(queries.features, cache.keys)
    found = all_caches(cache, queries, [3.0])[0]
    for q in range(len(queries.ids)):
        seen = np.arange(cache.n)
        if queries.groups is not None and queries.hidden is not None:
            seen = np.flatnonzero(queries.groups != queries.hidden[q])
        factor = np.bincount(y, minlength=C) / np.maximum(np.bincount(y[seen], minlength=C), 1)
        own = values[seen] * factor[y[seen]][:, None]
        expected = cache_logits(A[q : q + 1, seen], y[seen], C, 3.0, own)
        np.testing.assert_allclose(found[q], expected[0], rtol=1e-3, atol=1e-4)


def test_a_cautious_search_keeps_the_given_settings_unless_significantly_worse():
    cache = model(values=ONE_HOT + 0.2 * VALUES)
    rng = np.random.default_rng(3)
    hard = unit(_means[TRUTH] + 0.6 * rng.standard_normal((Q, D)))
    queries = Queries(hard, TRUTH, "x")
    trained = (0.02, 4.321)
    careful = search(cache, queries, cautious=True, kept=trained)
    assert (careful.alpha, careful.beta) == trained
    cache.settings = cache.settings.override(**dict(zip(("alpha", "beta"), trained, strict=True)))
    assert careful.accuracy == (cache.logits(hard).argmax(1).numpy() == TRUTH).mean()
    assert careful.best > careful.accuracy
    (kept,) = [warning for warning in careful.warnings if "--greedy selects them" in warning]
    assert kept.startswith("kept the settings (")
    assert trained[1] in careful.surface["beta"].to_pylist()
    untouched = search(cache, queries, cautious=True)
    assert all("kept the untouched settings" in w for w in untouched.warnings if "--greedy" in w)
    for betas in (None, [1.0, 2.0]):
        greedy = search(cache, queries, betas=betas, kept=trained)
        assert trained[1] in greedy.surface["beta"].to_pylist()
        assert greedy.accuracy == greedy.best
    wrong = model(values=-20 * ONE_HOT)  # bad training: the evidence against its settings is significant
    assert search(wrong, queries, cautious=True, kept=(50.0, 4.0)).alpha < 1
    with pytest.raises(UsageError, match=r"^alpha is -1"):
        search(cache, queries, cautious=True, kept=(-1.0, 2.0))


CURVE = pa.table({"epoch": [1, 2, 3], "loss": [0.9, 0.5, 0.4]})


@pytest.fixture
def index(tmp_path):
    replace(model(), curve=CURVE).save(tmp_path / "index")
    return tmp_path / "index"


def names(folder):
    return {kind: file.name for kind, file in Versions(folder).current().files.items()}


def test_a_fine_tuned_index_is_loaded_as_it_was_saved(index):
    cache, loaded = model(), Index.load(index, device="cpu")
    for k, tail in ((None, True), (9, True), (9, False)):
        assert torch.equal(loaded.logits(QUERIES, k, tail), cache.logits(QUERIES, k, tail))
    assert loaded.curve.equals(CURVE)
    manifest = Versions(index).current()
    assert {kind: file.rows for kind, file in manifest.files.items()} == {
        "keys": N, "labels": N, "text": C, "values": N, "curve": 3,
    }  # fmt: skip
    assert Manifest.from_bytes(manifest.to_bytes(), "x") == manifest
    described = Versions(index).describe()
    assert described["files"] == names(index)
    assert described["bytes"] == sum(path.stat().st_size for path in (index / "data").iterdir())
    assert verify(index).n == N


def test_optional_files_are_copied_to_the_next_version(index, tmp_path):
    first = names(index)
    cache = Index.load(index, device="cpu")
    cache.settings = cache.settings.override(alpha=9.0)
    cache.save_settings(index)
    assert names(index) == first
    cache.add(QUERIES[:2], [0, 1])
    cache.save(index)
    second = names(index)
    assert {kind for kind in first if first[kind] != second[kind]} == {"keys", "labels", "values"}
    cache.save(tmp_path / "elsewhere")
    shutil.rmtree(index)
    for folder in (tmp_path / "elsewhere", tmp_path / "again"):
        cache.save(folder)
        found = verify(folder)
        assert found.curve.equals(CURVE)
        assert torch.equal(found.logits(QUERIES, 9), cache.logits(QUERIES, 9))


@pytest.mark.parametrize(
    ("kind", "data", "entry"),
    [
        ("values", npy(VALUES[:-1]), {}),
        ("values", npy(VALUES[:, :-1]), {}),
        ("values", npy(VALUES.astype(np.float16)), {}),
        ("values", npy(VALUES), {"rows": N + 1}),
        ("curve", b"x", {}),
        ("curve", None, {"rows": 4}),
    ],
    ids=["rows", "columns", "dtype", "more rows", "damage", "rows of the curve"],
)
def test_a_file_that_contradicts_the_manifest_is_refused(index, kind, data, entry):
    path = resealed(index, kind, (index / names(index)[kind]).read_bytes() if data is None else data, **entry)
    for opened in (Index.load, verify):
        refused(partial(opened, index), index / "manifest.json" if entry == {"rows": N + 1} else path)


def test_verify_finds_values_that_are_not_finite(index):
    resealed(index, "values", npy(np.where(np.arange(C) == 1, np.nan, VALUES).astype(np.float32)))
    with pytest.raises(StoreError, match="values are not finite"):
        verify(index)


def test_a_bad_curve_is_refused_and_changes_nothing(index):
    before = snapshot(index)
    odd = pa.table({"loss": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])})
    with pytest.raises(InputError, match=r"^curve: cannot store a column"):
        replace(model(), curve=odd).save(index)
    assert snapshot(index) == before
