"""TipAdapterClassifier: scikit-learn's own checks, and the same answers as its Index."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import warm
from conftest import cache_of, few, tries
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from tables import unit

from retrieval_tip import TipAdapterClassifier
from retrieval_tip.backbones.base import Part
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.data.writing import schema_of, table_of, write_table
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index.build import build_index

D, C = 16, 4
NAMES = np.array(["dog", "ant", "cat", "bee"])
SORTED = np.array(["ant", "bee", "cat", "dog"])
SORTING = [1, 3, 2, 0]


_rng = default_rng(0)
TEXT = unit(_rng.standard_normal((C, D)))  # in the order of NAMES
IDS = _rng.permutation(np.repeat(np.arange(C), [9, 20, 14, 17]))
X = unit(TEXT[IDS] + 0.3 * _rng.standard_normal((len(IDS), D)))
Y = NAMES[IDS]
QUERIES = unit(TEXT[_rng.integers(C, size=40)] + 0.4 * _rng.standard_normal((40, D)))


def classifier(**changes):
    """Return a classifier that is plain Tip-Adapter unless ``alpha`` is changed."""
    return TipAdapterClassifier(
        **{"text_weights": TEXT, "class_names": NAMES, "alpha": 1.0, "device": "cpu"} | changes
    )


def cache(**changes):
    """Return the same model as a ``Index`` with sorted classes."""
    arguments = {
        "keys": X,
        "labels": Y,
        "class_names": SORTED.tolist(),
        "text_weights": TEXT[SORTING],
        "device": "cpu",
    }
    return cache_of(**arguments | changes)


@parametrize_with_checks(
    few(
        [
            TipAdapterClassifier(),
            TipAdapterClassifier(k=3),
            TipAdapterClassifier(alpha=1.0, k=8, tail=False, index="HNSW8"),
            TipAdapterClassifier(alpha=1.0),
        ],
        2,
    )
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@tries(15)
@given(
    alpha=st.floats(0, 20),
    beta=st.floats(0, 50),
    k=st.none() | st.integers(1, 80),
    tail=st.booleans(),
    text=st.booleans(),
)
def test_logits_match_the_cache_model(alpha, beta, text, **how):
    weights = TEXT if text else None
    made = classifier(text_weights=weights, alpha=alpha, beta=beta, logit_scale=30.0, **how)
    expected = cache(
        text_weights=weights if weights is None else weights[SORTING], alpha=alpha, beta=beta
    )
    expected.settings = expected.settings.override(logit_scale=30.0)
    logits = expected.logits(QUERIES, **how)
    scores = made.fit(X, Y).decision_function(QUERIES)
    assert scores.dtype == np.float32
    assert_allclose(scores, logits, rtol=1e-5, atol=1e-4)
    proba = made.predict_proba(QUERIES)
    assert_allclose(proba, logits.softmax(dim=1), atol=1e-4)
    assert_array_equal(made.predict(QUERIES), SORTED[scores.argmax(axis=1)])


def test_default_settings_give_the_answers_of_a_built_index(tmp_path):
    """The classes of the index are in the order of the text, which is not sorted."""
    for name, labels, features in (("shots", Y, X), ("text", NAMES, TEXT)):
        rows = [f"{name} {i}" for i in range(len(labels))]
        table = table_of(
            schema_of([Part(D, "feature")], np.float32), rows, labels.tolist(), features
        )
        write_table(tmp_path / f"{name}.parquet", table.schema, [table])
    source = open_source(tmp_path / "shots.parquet")
    index = build_index(source, tmp_path / "index", Reader(), text=tmp_path / "text.parquet")
    made = TipAdapterClassifier(TEXT, NAMES, device="cpu").fit(X, Y)
    assert made.index_.fitted == index.fitted
    answers = index.classify(QUERIES, top=C)
    assert made.predict(QUERIES).tolist() == [answer.label for answer in answers]
    for probabilities, answer in zip(made.predict_proba(QUERIES), answers, strict=True):
        by_label = dict(zip(answer.labels, answer.probabilities, strict=True))
        assert_allclose(probabilities, [by_label[name] for name in made.classes_], atol=1e-5)


def test_text_weights_without_class_names_are_in_sorted_order():
    expected = classifier().fit(X, Y).decision_function(QUERIES)
    for text in (TEXT[SORTING], TEXT[SORTING].tolist(), torch.from_numpy(TEXT[SORTING])):
        made = classifier(text_weights=text, class_names=None).fit(X, Y)
        assert_array_equal(made.decision_function(QUERIES), expected)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([30, -1, 20, 10]),
        np.array([2.0, -1.0, 3.0, 0.0]),
        np.array(["", "ü b", "a\nb", " "]),
        np.array(["dog", "ant", "cat", "bee"], dtype=object),
        np.array(["dog", "ant", "cat", "bee"]).tolist(),
    ],
    ids=["ints", "floats", "odd strings", "objects", "list"],
)
def test_labels_can_have_any_type(labels):
    y = [labels[i] for i in IDS]
    made = classifier(class_names=labels).fit(X, y)
    assert_array_equal(made.classes_, np.unique(np.asarray(labels)))
    assert made.classes_.dtype == np.asarray(labels).dtype
    got = made.predict(QUERIES)
    assert got.tolist() == [
        labels[NAMES.tolist().index(name)] for name in classifier().fit(X, Y).predict(QUERIES)
    ]
    assert made.score(X, y) > 0.9


def test_one_or_two_classes_are_enough():
    two = np.isin(Y, ["ant", "cat"])
    made = classifier(text_weights=None, class_names=None).fit(X[two], Y[two])
    scores = made.decision_function(QUERIES)
    proba = made.predict_proba(QUERIES)
    assert scores.shape == (40,)
    assert_array_equal(made.predict(QUERIES), np.where(scores > 0, "cat", "ant"))
    assert_allclose(proba[:, 1], 1 / (1 + np.exp(-scores)), rtol=1e-4)
    one = TipAdapterClassifier(device="cpu").fit(X, np.full(len(X), 7))
    assert one.predict_proba(QUERIES).tolist() == [[1.0]] * 40
    assert one.predict(QUERIES).tolist() == [7] * 40


def test_a_class_without_keys_is_predicted_from_its_text():
    seen = Y != "bee"
    made = classifier().fit(X[seen], Y[seen])
    assert made.classes_.tolist() == SORTED.tolist()
    assert made.predict(TEXT).tolist() == NAMES.tolist()
    assert classifier(text_weights=None).fit(X[seen], Y[seen]).predict(TEXT)[3] != "bee"


def test_rows_are_normalised_by_default():
    lengths = default_rng(1).uniform(0.1, 100, (len(X), 1))
    expected = classifier().fit(X, Y).decision_function(QUERIES)
    long = classifier().fit(X * lengths, Y)
    assert_allclose(long.decision_function(7 * QUERIES), expected, atol=1e-4)
    for extreme in (1e-320, 1e-200, 1e200):
        assert_allclose(
            long.decision_function(QUERIES[:1].astype(float) * extreme), expected[:1], rtol=0.02
        )


def test_a_zero_row_stays_zero():
    keys = X.copy()
    queries = QUERIES.copy()
    keys[3], queries[2] = 0, 0
    queries[5] = 0.5 * np.eye(D)[7]  # zeros in some columns do not make a zero row
    made = classifier().fit(keys, Y)
    scores = made.decision_function(queries)
    assert_allclose(scores[2], np.exp(-5.5) * np.unique(Y, return_counts=True)[1], rtol=1e-5)
    assert made.predict(queries)[2] == "ant"  # it has the most keys
    assert_allclose(
        scores, cache(keys=keys).logits(np.where(queries == 0.5, 1, queries)), atol=1e-4
    )


@pytest.mark.parametrize(
    "how", [{}, {"k": 7}, {"k": 7, "tail": False, "index": "IVF2,Flat"}, {"alpha": "auto"}], ids=str
)
def test_partial_fits_equal_one_fit_on_all_rows(how):
    whole = classifier(**how).fit(X, Y)
    parts = classifier(**how)
    for some in np.array_split(np.arange(len(X)), [20, 21, 45]):
        assert parts.partial_fit(X[some], Y[some]) is parts
    expected = whole.decision_function(QUERIES)
    bound = (
        1e-5 * np.abs(expected).max()
    )  # the sums behind a fitted metric were added in another order
    assert_allclose(parts.decision_function(QUERIES), expected, rtol=0, atol=bound)
    near, same = (made.index_.similar(QUERIES, 9) for made in (parts, whole))
    assert [[one.key_id for one in own] for own in near] == [
        [one.key_id for one in own] for own in same
    ]
    assert parts.fit(X[:30], Y[:30]).index_.n == 30


def test_partial_fit_needs_to_know_the_classes():
    made = classifier(text_weights=TEXT[SORTING], class_names=None)
    with pytest.raises(UsageError, match=r"classes: .*partial_fit"):
        made.partial_fit(X, Y)
    made.partial_fit(X[:1], Y[:1], classes=NAMES)
    assert made.classes_.tolist() == SORTED.tolist()
    made.partial_fit(X[1:], Y[1:], classes=SORTED)
    whole = classifier().fit(X, Y).decision_function(QUERIES)
    assert_array_equal(made.decision_function(QUERIES), whole)
    for wrong in (["ant"], [*NAMES, "cow"]):
        with pytest.raises(UsageError, match=r"classes: .*first call"):
            made.partial_fit(X, Y, classes=wrong)
        with pytest.raises(UsageError, match=r"classes: .*first call"):
            classifier().partial_fit(X, Y, classes=wrong)
    with pytest.raises(InputError, match=r"row 1 is .*cow.* 4 classes"):
        made.partial_fit(X[:2], ["ant", "cow"])
    with pytest.raises(ValueError, match="expecting 16 features"):
        made.partial_fit(X[:, 1:], Y)
    assert_array_equal(made.decision_function(QUERIES), whole)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"alpha": -1.0}, UsageError, "alpha is -1"),
        ({"alpha": "auto", "beta": 3.0}, UsageError, "beta"),
        ({"metric": "within"}, UsageError, "metric"),
        ({"index": "Nonsense"}, UsageError, "index 'Nonsense'"),
        ({"text_weights": TEXT[1:]}, InputError, "text_weights"),
        ({"text_weights": TEXT[:, 1:]}, InputError, "text_weights"),
        ({"text_weights": TEXT * np.nan}, ValueError, "text_weights"),
        ({"class_names": ["dog", "ant", "cat", "dog"]}, InputError, "class_names"),
        ({"class_names": ["dog", "ant", "cat", "cow"]}, InputError, "bee"),
        (
            {"class_names": np.array(["dog", None, "cat", "bee"], dtype=object)},
            InputError,
            "classes",
        ),
    ],
    ids=lambda value: "" if isinstance(value, type | str) else next(iter(value)),
)
def test_bad_parameters_are_refused(changes, error, message):
    made = classifier(**changes)  # the constructor accepts anything, as scikit-learn requires
    with pytest.raises(error, match=message):
        made.fit(X, Y)
    with pytest.raises(NotFittedError):
        made.predict(X)


def test_a_failed_fit_keeps_the_fitted_model():
    made = classifier().fit(X, Y)
    before = made.decision_function(QUERIES)
    with pytest.raises(UsageError):
        made.set_params(index="Nonsense").fit(X, Y[::-1])
    assert_array_equal(made.decision_function(QUERIES), before)


def fresh(script, python=sys.executable):
    return subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)


def test_without_scikit_learn_one_line_says_what_to_install(warm_path):
    done = fresh(
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.base'] = None\n"
        "import retrieval_tip; retrieval_tip.Index\n"
        "from retrieval_tip import TipAdapterClassifier",
        warm.python(warm_path),
    )
    assert done.returncode == 1
    assert "during handling" not in done.stderr.lower()
    [line] = (
        line for line in done.stderr.splitlines() if line.startswith("ImportError")
    )  # a library may add a note
    assert line.startswith("ImportError: TipAdapterClassifier needs scikit-learn 1.6 or newer")
    assert re.search("pip install 'scikit-learn>=[0-9.]+'$", line)
