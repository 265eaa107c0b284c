"""Index compared with Tip-Adapter's definition in dense float64, its edits and its files."""

import copy
import math
import pickle
import shutil
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import cache_of, fitted, needs_real, parts_of, tries
from dense import affinity, nearest, parts
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from sealing import manifest_of, npy, refused, resealed, snapshot
from tables import read_features, unit

from retrieval_tip import Index, verify
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.fit import closed_form
from retrieval_tip.index.places import at
from retrieval_tip.settings import Settings
from retrieval_tip.store.edits import Edits, NewKeys
from retrieval_tip.store.versions import Manifest, Versions

Q, D, C = 70, 32, 12
NAMES = [f"class {i}" for i in range(C)]
ALPHA, BETA, SCALE = 1.3, 5.5, 100.0

EXACT_TYPES = ["Flat", "IVF16,Flat", "HNSW32"]
COMPRESSED = ["SQfp16", "SQ8", "IVF16,SQfp16", "PQ8", "PCA16,Flat"]


_rng = default_rng(0)
_means = unit(_rng.standard_normal((C, D)))
Y = _rng.permutation(np.repeat(np.arange(C), [1, 60, 3, 20, 40, 16, 16, 0, 80, 5, 25, 54]))
N = len(Y)
KEYS = unit(_means[Y] + 0.35 * _rng.standard_normal((N, D)) / math.sqrt(D) * 2)
TEXT = unit(_means + 0.2 * _rng.standard_normal((C, D)))
QUERIES = unit(_means[_rng.integers(C, size=Q)] + 0.25 * _rng.standard_normal((Q, D)))


def model(**changes):
    arguments = {
        "keys": KEYS,
        "labels": Y,
        "class_names": NAMES,
        "text_weights": TEXT,
        "alpha": ALPHA,
        "beta": BETA,
        "logit_scale": SCALE,
        "device": "cpu",
    } | changes
    return cache_of(**arguments)


VALUES = default_rng(3).standard_normal((N, C)).astype(np.float32)
KINDS = {
    "float32": KEYS,
    "float16": KEYS.astype(np.float16),
    "fine-tuned": KEYS * default_rng(1).uniform(0.5, 1.5, (N, 1)).astype(np.float32),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function that returns an index in memory, or opened from a store with this scheme."""

    @cache
    def make(index, kind, store=None):
        made = model(index=index, keys=KINDS[kind])
        if store is None:
            return made
        place = at(f"{store}{tmp_path_factory.mktemp('built') / 'index'}")
        place.copy_from(made, "test")
        return place.load()

    return make


def dense(model_, k=None, tail=True):
    """Return text and cache logits by definition, and the weights, values and keys that count.

    An approximate search decides which keys count.
    """
    whole = model_.in_memory()
    A = affinity(QUERIES, whole.keys)
    if model_.index_type.startswith("Classes") or k is None or k >= model_.n:
        met = nearest(A, None)
    elif model_.index_type == "Flat":
        met = nearest(A, k)
    else:
        rows = model_.nearest(torch.from_numpy(QUERIES), k)[1]
        met = np.stack([np.isin(np.arange(model_.n), row) for row in rows])
    V = np.eye(C)[whole.class_ids] if whole.values is None else whole.values.numpy()
    return *parts(whole, QUERIES, met, tail=tail), A, V, met


def check_logits(model_, k=None, tail=True):
    text, alone, *_ = dense(model_, k, tail)
    terms = model_.terms(QUERIES, k, tail)
    scale = abs(alone).max()
    assert_allclose(terms.text, text, atol=1e-4)
    assert_allclose(terms.cache, alone, rtol=5e-4, atol=1e-4 * scale)
    logits = model_.logits(QUERIES, k, tail)
    alpha = model_.settings.alpha
    assert logits.dtype == torch.float32
    assert_allclose(logits, text + alpha * alone, rtol=5e-4, atol=2e-4 * (1 + alpha * scale))


def check_evidence(model_, k=None, tail=True, shown=7):
    """Check that answers follow from the logits, and that the shots with the largest contributions are named."""
    *_, A, V, met = dense(model_, k, tail)
    logits = model_.logits(QUERIES, k, tail).numpy()
    labels = model_.in_memory().labels.to_pylist()
    row_of = {row["key_id"]: i for i, row in enumerate(labels)}
    beta = model_.settings.beta
    for q, answer in enumerate(
        model_.classify(QUERIES, top=3, k=k or "all", tail=tail, neighbours=shown)[:4]
    ):
        best = [NAMES.index(label) for label in answer.labels]
        own = answer.logits  # in another batch, the last digits may differ
        assert_allclose(own, logits[q], rtol=1e-4, atol=1e-5 * abs(logits).max())
        assert_array_equal(own[best], -np.sort(-own)[:3])
        chances = np.exp(own.astype(np.float64) - own.max())
        assert_allclose(answer.probabilities, (chances / chances.sum())[best], atol=1e-6)
        assert (answer.label, answer.probability) == (answer.labels[0], answer.probabilities[0])
        total = answer.text_logit + answer.cache_logit
        assert total == pytest.approx(own[best[0]], rel=1e-5, abs=1e-4)
        weights = np.exp(-beta * (1 - A[q]))
        given = weights[:, None] * V[:, best]
        tolerance = {"rtol": 1e-3, "atol": 1e-6 * weights[met[q]].max()}
        rows = [row_of[one.key_id] for one in answer.neighbours]
        assert len(set(rows)) == len(rows) == min(shown, met[q].sum())
        assert_allclose(given[rows, 0], -np.sort(-given[met[q], 0])[:shown], **tolerance)
        for one, row in zip(answer.neighbours, rows, strict=True):
            assert met[q, row]
            assert (one.source, one.label) == (labels[row]["source"], labels[row]["label"])
            assert one.affinity == pytest.approx(A[q, row], abs=1e-5)
            assert_allclose([one.weight, *one.gives], [weights[row], *given[row]], **tolerance)
        lowest = given[met[q], 0].min()
        against = answer.opposing.gives if answer.opposing else [0, 0]
        expected = lowest if lowest < 0 else max(0, given[met[q], 1].max())
        assert_allclose(against[0 if lowest < 0 else 1], expected, **tolerance)


STORED = [("Flat", ""), ("Flat", "lance://")]
"""Types of index in a folder and in LanceDB, which cannot hold trained values."""


@pytest.mark.parametrize(
    ("index", "store"), [*((index, None) for index in EXACT_TYPES + COMPRESSED), *STORED]
)
@tries(60)
@given(
    st.sampled_from(sorted(KINDS)),
    st.booleans(),
    st.just(0.0) | st.floats(0.1, 50),
    st.floats(0, 20),
    st.none() | st.integers(1, 2 * N),
    st.booleans(),
    st.sampled_from([(512, 16384), (7, 50), (1, N), (64, N - 1)]),
)
def test_logits_match_the_dense_definition_for_any_settings(
    built, index, store, kind, valued, beta, alpha, k, tail, sizes
):
    own = built(index, kind, store)
    if store != "lance://":
        own = replace(
            own, rows=replace(own.rows, values=torch.from_numpy(VALUES) if valued else None)
        )
    keys = mock.patch.multiple(
        "retrieval_tip.retrieval.keys", QUERY_BLOCK=sizes[0], KEY_BLOCK=sizes[1]
    )
    at_a_time = mock.patch(
        "retrieval_tip.model.PREDICTED", max(3, sizes[0])
    )  # more queries are classified in parts
    with (
        keys,
        at_a_time,
        mock.patch("retrieval_tip.retrieval.logits.QUERY_BLOCK", sizes[0]),
    ):  # the sums use blocks, too
        own = own.with_settings(own.settings.override(alpha=alpha, beta=beta))
        check_logits(own, k, tail)
        check_evidence(own, k, tail)


@pytest.mark.parametrize("values", [None, VALUES], ids=["one-hot", "valued"])
def test_evidence_of_whole_classes_comes_from_all_keys(values):
    """``test_whole_classes.py`` tests the logits."""
    own = model(index="Classes")
    own = replace(
        own, rows=replace(own.rows, values=None if values is None else torch.from_numpy(values))
    )
    check_evidence(own, 40)


@needs_real
def test_real_features_give_the_published_accuracy(shared):
    food = shared / "data" / "clip-food9"
    (K, labels), (f, truth), (W, names) = (
        read_features(food / f"{part}.parquet") for part in ("train", "test", "text")
    )
    own = Settings(alpha=1.17, beta=5.5)
    cache = Index.from_features(K, labels.tolist(), names.tolist(), W, settings=own)
    assert (names[cache.logits(f).argmax(1).numpy()] == truth).mean() > 0.97
    assert round((names[cache.terms(f).text.argmax(1).numpy()] == truth).mean(), 3) == 0.973


LABELS = {
    "int32": Y.astype(np.int32),
    "uint8": Y.astype(np.uint8),
    "list of ids": Y.tolist(),
    "tuple": tuple(Y.tolist()),
    "tensor": torch.from_numpy(Y),
    "names": [NAMES[i] for i in Y],
    "array of names": np.array([NAMES[i] for i in Y]),
    "objects": np.array([NAMES[i] for i in Y], dtype=object),
}
FEATURES = {
    "tensor": torch.from_numpy,
    "with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "double tensor": lambda x: torch.from_numpy(x).double(),
    "float64": lambda x: x.astype(np.float64),
    "by column": np.asfortranarray,
    "list": np.ndarray.tolist,
    "read-only": lambda x: np.broadcast_to(x, x.shape),
    "array": np.asarray,
}


@pytest.mark.parametrize(("labels", "features"), [*zip(LABELS, FEATURES, strict=True)])
@pytest.mark.filterwarnings("error")
def test_labels_may_be_names_or_ids_and_features_tensors_or_arrays(labels, features):
    make = FEATURES[features]
    cache = model(keys=make(KEYS), text_weights=make(TEXT), labels=LABELS[labels])
    logits = cache.logits(make(QUERIES))
    assert not logits.requires_grad
    assert torch.equal(logits, model().logits(QUERIES))
    assert [p.label for p in cache.classify(make(QUERIES))] == [
        p.label for p in model().classify(QUERIES)
    ]


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_changing_the_arrays_later_has_no_effect(make):
    keys = make(KEYS)
    text = make(TEXT)
    queries = make(QUERIES)
    cache = model(keys=keys, text_weights=text)
    before = cache.logits(queries)
    keys *= 2
    text *= 2
    assert torch.equal(cache.logits(QUERIES), before)
    assert (np.asarray(queries) == QUERIES).all()


def test_without_text_the_cache_alone_decides():
    cache = model(text_weights=None)
    assert (cache.has_text, model().has_text) == (False, True)
    text, alone = parts_of(cache, QUERIES)
    assert (text == 0).all()
    torch.testing.assert_close(cache.logits(QUERIES), ALPHA * alone)


def test_the_number_of_neighbours_and_labels_is_limited():
    cache = model()
    some = QUERIES[:2]
    asked = ({}, 5), ({"k": 3}, 3), ({"neighbours": 10 * N}, N), ({"neighbours": 0}, 0)
    for options, number in asked:
        assert [len(one.neighbours) for one in cache.classify(some, **options)] == [number] * 2
    assert sorted(cache.classify(some, top=99)[0].labels) == sorted(NAMES)
    only = Index.from_features(KEYS[:9], ["only"] * 9, ["only"]).classify(some)[0]
    assert (len(only.neighbours), only.opposing) == (5, None)


def nan(x, row=3):
    x = x.copy()
    x[row, 0] = np.nan
    return x


BAD_MODELS = {
    "keys of one dimension": (
        {"keys": KEYS[0]},
        InputError,
        r"^keys: shape \(32,\); expected .*\[n, d\]",
    ),
    "no keys": ({"keys": KEYS[:0], "labels": []}, InputError, r"^keys: shape \(0, 32\)"),
    "keys of integers": (
        {"keys": np.ones((N, D), int)},
        InputError,
        "^keys: int64; expected floating-point",
    ),
    "a key with NaN": ({"keys": nan(KEYS)}, InputError, "^keys: row 3 contains"),
    "a label too few": (
        {"labels": Y[:-1]},
        InputError,
        rf"^labels: shape \({N - 1},\) .* {N} keys",
    ),
    "an unknown name": (
        {"labels": ["zebra"] * N},
        InputError,
        "^labels: row 0 is 'zebra'.* 12 classes",
    ),
    "an unknown id": ({"labels": [0] * (N - 1) + [C]}, InputError, f"^labels: row {N - 1} is 12;"),
    "a negative id": ({"labels": [-1] * N}, InputError, "^labels: row 0 is -1;"),
    "a missing label": ({"labels": [None] * N}, InputError, "^labels: row 0 is None;"),
    "labels of fractions": ({"labels": Y + 0.5}, InputError, "^labels: row 0 is "),
    "labels of unequal length": (
        {"labels": [[1], [1, 2]]},
        InputError,
        "^labels: rows have different",
    ),
    "no classes": ({"class_names": []}, InputError, "^class_names: expected at least one name"),
    "a class without name": ({"class_names": [*NAMES[:-1], ""]}, InputError, "^class_names: "),
    "a class twice": (
        {"class_names": [*NAMES[:-1], NAMES[0]]},
        InputError,
        "^class_names: 'class 0'",
    ),
    "text of other classes": (
        {"text_weights": TEXT[:-1]},
        InputError,
        r"^text_weights: shape \(11, 32\); .*\[12",
    ),
    "text of another length": (
        {"text_weights": TEXT[:, :-1]},
        InputError,
        r"^text_weights: shape \(12, 31\)",
    ),
    "text with NaN": ({"text_weights": nan(TEXT)}, InputError, "^text_weights: row 3 contains"),
    "values of too few keys": ({"values": VALUES[:-1]}, InputError, "^values: "),
    "values of too few classes": ({"values": VALUES[:, :-1]}, InputError, "^values: "),
    "values with NaN": ({"values": nan(VALUES)}, InputError, "^values: "),
    "a source too few": (
        {"sources": ["x"] * (N - 1)},
        InputError,
        f"^sources: .*{N - 1} sources for {N} keys",
    ),
    "a source too many": (
        {"sources": ["x"] * (N + 1)},
        InputError,
        f"^sources: .*{N + 1} sources for {N} keys",
    ),
    "negative beta": ({"beta": -1}, UsageError, "^beta is -1"),
    "an unknown index": ({"index": "Flut"}, UsageError, "^index 'Flut': "),
    "an index that normalises": (
        {"index": "L2norm,Flat"},
        UsageError,
        "^index 'L2norm,Flat': it normalises",
    ),
    "an unknown device": ({"device": "tpu"}, UsageError, "^device 'tpu'"),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"), BAD_MODELS.values(), ids=BAD_MODELS.keys()
)
def test_invalid_model_arguments_are_refused_in_one_line(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        model(**changes)
    assert "\n" not in str(caught.value)
    assert "np." not in str(caught.value)


BAD_CALLS = {
    "one dimension": (
        (QUERIES[0],),
        {},
        InputError,
        r"^features: shape \(32,\); expected \[q, 32\]",
    ),
    "another length": (
        (QUERIES[:, :-1],),
        {},
        InputError,
        r"^features: shape \(70, 31\); expected \[q, 32\]",
    ),
    "a tensor of another length": (
        (torch.ones(2, 3),),
        {},
        InputError,
        r"^features: shape \(2, 3\)",
    ),
    "NaN": ((nan(QUERIES),), {}, InputError, "^features: row 3 contains"),
    "a tensor with NaN": (
        (torch.from_numpy(nan(QUERIES)),),
        {},
        InputError,
        "^features: row 3 contains",
    ),
    "infinity": ((QUERIES * np.inf,), {}, InputError, "^features: row 0 contains"),
    "both infinities": (
        (np.where(np.eye(2, 32) > 0, [[np.inf], [-np.inf]], 1),),
        {},
        InputError,
        "^features: row 0 c",
    ),
    "too large": ((QUERIES.astype(float) * 1e300,), {}, InputError, "^features: row 0 contains"),
    "text": ((["a"],), {}, InputError, "^features: <U1; expected floating-point"),
    "complex": ((QUERIES * 1j,), {}, InputError, "^features: complex64; expected floating-point"),
    "unequal rows": (([[1.0], [1.0, 2.0]],), {}, InputError, "^features: rows have different"),
    "k 0": (
        (QUERIES,),
        {"k": 0},
        UsageError,
        "^k is 0: expected a whole number of keys, at least 1",
    ),
    "k a word": ((QUERIES,), {"k": "some"}, UsageError, "^k is some"),
}


@pytest.mark.parametrize(
    ("arguments", "settings_", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys()
)
def test_invalid_call_arguments_are_refused_in_one_line(arguments, settings_, error, message):
    cache = model()
    for ask in (cache.logits, cache.terms, cache.classify):
        with pytest.raises(error, match=message) as caught:
            ask(*arguments, **settings_)
        assert "\n" not in str(caught.value)


def test_features_whose_sum_overflows_are_accepted():
    features = np.full((2, 32), 3e38, dtype=np.float32)
    assert torch.equal(model().queries(features), torch.from_numpy(features))


def test_top_0_is_refused():
    with pytest.raises(UsageError, match=r"^top is 0: "):
        model().classify(QUERIES, top=0)


@pytest.mark.parametrize("k", [None, 16])
def test_overflow_is_an_error(k):
    with pytest.raises(InputError, match=r"^beta 1000: "):
        model(keys=KEYS * 10, beta=1000).logits(QUERIES, k)
    with pytest.raises(InputError, match=r"^alpha 1e\+39, .*overflow"):
        model(alpha=1e39).classify(QUERIES, k=k)
    with pytest.raises(InputError, match=r"logit_scale 1e\+39: .*overflow"):
        model(logit_scale=1e39).terms(QUERIES, k)
    for sign in (1, -1):
        with pytest.raises(InputError, match="overflow"):
            model(values=np.full((N, C), sign * 3e38), beta=0.0).logits(QUERIES, k)
    assert torch.isfinite(model(beta=1000.0).logits(QUERIES, k)).all()  # underflow is not an error


def test_invalid_settings_are_refused():
    assert Settings(0, 0, 1).alpha == 0
    assert Settings(np.float32(1), 5.5, 100.0, np.int64(1)) == Settings(1.0, 5.5, 100.0, 1)
    for name, values in {
        "alpha": (-1, math.nan, 10**400, True, "1", None, [1.0]),
        "beta": (-1e-9, math.inf),
        "logit_scale": (0, -1, -math.inf),
        "k": (0, -1, 2.5, "all", True, 2**63, math.nan),
        "temperature": (0.0, -1, math.inf),
    }.items():
        for value in values:
            with pytest.raises(UsageError, match=f"^{name} is "):
                Settings(**{name: value})


def table(cache):
    return cache.labels.drop_columns(["added_at"]).to_pydict()


@pytest.mark.parametrize("index", ["SQfp16", "IVF16,Flat"])
def test_added_keys_get_ids_and_one_hot_values_and_removed_keys_leave(index):
    """The machine in ``test_living.py`` adds and removes keys of other types of index, without values."""
    half = N // 2
    cache = model(
        keys=KEYS[:half].astype(np.float16), labels=Y[:half], values=VALUES[:half], index=index
    )
    cache.logits(QUERIES, 9)  # fills all caches
    cache = cache.edited(Edits(add=NewKeys(KEYS[half:], [NAMES[i] for i in Y[half:]])))
    assert sorted(cache.labels["key_id"].to_pylist()) == list(range(N))
    assert cache.keys.dtype == np.float16
    mixed = np.concatenate([VALUES[:half], np.eye(C)[Y[half:]]])
    assert_array_equal(cache.values, mixed[cache.labels["key_id"]])
    for gone in ([], [0, 5, *range(half, N, 2)]):
        cache = cache.edited(Edits(remove=gone))
        assert cache.n == cache.index.n == N - len(gone)
        for k in (None, 16):
            check_logits(cache, k)
    kept = cache.labels["key_id"].to_numpy()
    assert_array_equal(cache.keys, KEYS.astype(np.float16)[kept])
    assert_array_equal(cache.values, mixed[kept])


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        (Edits(add=NewKeys(QUERIES[:, :-1], [0] * Q)), InputError, "^keys: .*31.*32"),
        (Edits(add=NewKeys(QUERIES, [0])), InputError, r"^labels: shape \(1,\) .* 70 keys"),
        (Edits(add=NewKeys(QUERIES, ["zebra"] * Q)), InputError, "^labels: row 0 is 'zebra'"),
        (Edits(add=NewKeys(nan(QUERIES), [0] * Q)), InputError, "^keys: row 3 contains"),
        (Edits(add=NewKeys(QUERIES[:0], [])), InputError, r"^keys: shape \(0, 32\)"),
        (
            Edits(add=NewKeys(QUERIES[:2], [0, 1], ["one"])),
            InputError,
            "^sources: expected 2 values",
        ),
        (
            Edits(add=NewKeys(QUERIES[:2], [0, 1], digests=["one"])),
            InputError,
            "^digests: expected 2 values",
        ),
        (
            Edits(add=NewKeys(QUERIES[:2], [0, 1], extra=pa.table({"x": [1]}))),
            InputError,
            "^extra: expected 2 values",
        ),
        (Edits(add=NewKeys(QUERIES[:2] * 1e6, [0, 1])), InputError, "^keys: .*float16"),
        (Edits(remove=[5, N + 3]), InputError, f"^key ids {N + 3}: not in this index"),
        (Edits(remove=range(N)), InputError, "^remove: an index needs at least one key"),
    ],
)
def test_a_refused_change_changes_nothing(edits, error, message):
    cache = model(keys=KEYS.astype(np.float16), index="IVF16,Flat", values=VALUES)
    before = cache.logits(QUERIES, 16)
    labels = cache.labels
    with pytest.raises(error, match=message):
        cache.edited(edits)
    assert (cache.n, cache.index.n) == (N, N)
    assert cache.labels.equals(labels)
    assert torch.equal(cache.logits(QUERIES, 16), before)


def reopened(cache, place):
    cache.save(place)
    assert verify(place).n == cache.n
    return Index.load(str(place))


CARRY = {
    "saved": reopened,
    "copied": lambda cache, _: copy.deepcopy(cache),
    "pickled": lambda cache, _: pickle.loads(pickle.dumps(cache)),
}
CARRIED = [("saved", index, np.float32) for index in [*EXACT_TYPES, *COMPRESSED, "Classes"]]
CARRIED += [
    (how, index, np.float16)
    for how in CARRY
    for index in ("Flat", "IVF16,Flat", "HNSW32", "SQ8", "Classes")
]


@pytest.mark.parametrize(("how", "index", "dtype"), CARRIED)
def test_a_saved_or_pickled_index_gives_the_same_answers_bit_for_bit(how, index, dtype, tmp_path):
    cache = model(index=index, keys=KEYS.astype(dtype), sources=[f"ü{i}" for i in range(N)])
    if index == "Flat" and how != "saved":
        cache = fitted(cache, closed_form.FitRequest("within", "solved"))
    cache = reopened(cache, tmp_path / "index")
    cache = cache.edited(Edits(add=NewKeys(unit(KEYS[:5] + 0.1), Y[:5])))
    there = CARRY[how](cache, tmp_path / "there")
    shutil.rmtree(tmp_path / "index")
    assert how == "saved" or (there.folder, there.version) == (None, None)
    for k, tail in ((None, True), (16, True), (16, False)):
        assert torch.equal(there.logits(QUERIES, k, tail), cache.logits(QUERIES, k, tail))
    assert there.classify(QUERIES, top=3, k=16) == cache.classify(QUERIES, top=3, k=16)
    assert there.keys.dtype == dtype
    assert there.labels.equals(cache.labels)
    there = there.edited(Edits(add=NewKeys(QUERIES[:2], [0, 1])))
    assert (there.next_key_id, there.n, cache.n) == (N + 7, N + 7, N + 5)
    opened = reopened(there, tmp_path / "again")
    assert torch.equal(opened.logits(QUERIES), there.logits(QUERIES))


def test_a_pickle_from_a_gpu_is_loaded_on_the_cpu_of_another_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cache = model()
    cache.device = "cuda:1"
    there = pickle.loads(pickle.dumps(cache))
    assert there.device == "cpu"
    assert_array_equal(there.logits(QUERIES), model().logits(QUERIES))


CURVE = pa.table({"epoch": [1, 2, 3], "loss": [0.9, 0.5, 0.4]})


@pytest.fixture
def index(tmp_path):
    """A fine-tuned index."""
    replace(model(values=VALUES), curve=CURVE).save(tmp_path / "index")
    return tmp_path / "index"


def names(folder):
    return {kind: file.name for kind, file in Versions(folder).manifest().files.items()}


def test_a_fine_tuned_index_is_loaded_as_it_was_saved_and_its_files_are_copied_to_later_versions(
    index, tmp_path
):
    cache = model(values=VALUES)
    loaded = Index.load(index)
    first = names(index)
    for k, tail in ((None, True), (9, True), (9, False)):
        assert torch.equal(loaded.logits(QUERIES, k, tail), cache.logits(QUERIES, k, tail))
    manifest = Versions(index).manifest()
    described = Versions(index).describe()
    rows = {"keys": N, "labels": N, "text": C, "values": N, "curve": 3}
    assert {kind: file.rows for kind, file in manifest.files.items()} == rows
    assert Manifest.from_bytes(manifest.to_bytes(), "x") == manifest
    assert described["files"] == first
    assert described["bytes"] == sum(path.stat().st_size for path in (index / "data").iterdir())
    loaded.settings = loaded.settings.override(alpha=9.0)
    loaded.save(index)
    assert names(index) == first
    loaded = loaded.edited(Edits(add=NewKeys(QUERIES[:2], [0, 1])))
    loaded.save(index)
    second = names(index)
    assert {kind for kind in first if first[kind] != second[kind]} == {"keys", "labels", "values"}
    loaded.save(tmp_path / "elsewhere")
    shutil.rmtree(index)
    for folder in (tmp_path / "elsewhere", tmp_path / "again"):
        loaded.save(folder)
        found = verify(folder)
        assert found.curve.equals(CURVE)
        assert torch.equal(found.logits(QUERIES, 9), loaded.logits(QUERIES, 9))


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
    path = resealed(
        index, kind, (index / names(index)[kind]).read_bytes() if data is None else data, **entry
    )
    for opened in (Index.load, verify):
        refused(partial(opened, index), manifest_of(index) if entry == {"rows": N + 1} else path)


def test_verify_finds_values_that_are_not_finite(index):
    resealed(index, "values", npy(np.where(np.arange(C) == 1, np.nan, VALUES).astype(np.float32)))
    with pytest.raises(StoreError, match="values are not finite"):
        verify(index)


def test_a_bad_curve_is_refused_and_changes_nothing(index):
    before = snapshot(index)
    odd = pa.table({"loss": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])})
    with pytest.raises(InputError, match=r"^curve: cannot store a column"):
        replace(model(values=VALUES), curve=odd).save(index)
    assert snapshot(index) == before


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("index", "values"), [*((index, None) for index in EXACT_TYPES + COMPRESSED), ("Flat", VALUES)]
)
def test_gpu_answers_match_the_cpu(index, values, tmp_path):
    model(index=index, values=values).save(tmp_path / "x")
    cpu, gpu = (Index.load(tmp_path / "x", device=device) for device in ("cpu", "cuda"))
    for k, tail in ((None, True), (16, True), (16, False)):
        one = cpu.logits(QUERIES, k, tail)
        other = gpu.logits(torch.from_numpy(QUERIES).cuda(), k, tail)
        assert other.device.type == "cuda"
        torch.testing.assert_close(
            other.cpu(), one, rtol=0, atol=2e-3 if k is None or index == "Flat" else 0.05
        )
    answers = [m.classify(QUERIES, k=16) for m in (cpu, gpu)]
    assert [a.label for a in answers[0]] == [a.label for a in answers[1]]
    gpu, cpu = (
        own.edited(Edits(add=NewKeys(QUERIES[:2], [0, 1]), remove=[4])) for own in (gpu, cpu)
    )
    taken = [own.take(np.array([3, 1, 30])).logits(QUERIES).cpu() for own in (gpu, cpu)]
    torch.testing.assert_close(*taken, rtol=0, atol=2e-3)
    gpu.save(tmp_path / "x")
    found = Index.load(tmp_path / "x", device="cpu")
    torch.testing.assert_close(found.logits(QUERIES), cpu.logits(QUERIES), rtol=0, atol=1e-4)
    assert values is None or torch.equal(found.values, cpu.values)
