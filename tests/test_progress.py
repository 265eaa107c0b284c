"""Estimated accuracy on unlabelled photos, checked against classifiers that are fitted without the random labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.special
from tables import unit, unit_rows

from retrieval_tip import Index
from retrieval_tip.errors import UsageError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.forms import Form
from retrieval_tip.labelling.progress import Estimate, estimate_rest, gain_of

NAMES = list("abcd")
CENTRES, TEXT = unit_rows(4, 10, 5), unit(unit_rows(4, 10, 5) + 0.8 * unit_rows(4, 10, 6))


def index_of(n, text, seed=0):
    """Return a fitted index of unequal classes, its features and its class ids. Photos 0 and 1 have the same source."""
    ids = np.random.default_rng(seed).choice(4, n, p=[0.5, 0.25, 0.2, 0.05])
    features = unit(CENTRES[ids] + 1.5 * unit_rows(n, 10, seed + 1))
    sources = [f"photo-{max(i, 1)}" for i in range(n)]
    index = Index.from_features(features, ids, NAMES, TEXT if text else None, sources=sources, device="cpu")
    closed_form.fit(index)
    return index, features, ids


def answers_without(index, features, ids, asked, kept):
    """Return the logits of each photo from a new index of the other kept photos."""
    form, logits = Form.of(index.fitted, index.settings.beta), []
    for photo in asked:
        others = [i for i in kept if i != photo and not {i, photo} <= {0, 1}]
        text = TEXT if index.has_text else None
        other = Index.from_features(features[others], ids[others], NAMES, text, device="cpu")
        closed_form.fit(other, forms=[form])
        other.settings = replace(index.settings)
        own = other.logits(features[photo : photo + 1])[0].numpy()
        own[[text is None and i not in ids[others] for i in range(4)]] = -np.inf
        logits.append(own)
    return np.array(logits)


def highest(logits, temperature):
    return scipy.special.softmax(logits / temperature, axis=1).max(axis=1)


@pytest.mark.parametrize("text", [True, False])
def test_each_random_photo_is_classified_without_its_label(text):
    index, features, ids = index_of(40, text)
    rest, temperature = unit(CENTRES[np.arange(60) % 4] + 1.5 * unit_rows(60, 10, 9)), index.settings.temperature
    before = index.logits(rest).numpy()
    random = [1, 7, 12, 20, 28, 33, 38]  # at most PARTS, so that each is held out alone
    logits = answers_without(index, features, ids, random, range(40))
    right = logits.argmax(axis=1) == ids[random]
    assert 0 < right.sum() < 7
    found = estimate_rest(index, [*random, 0, 999], rest)  # 0 has the same source as 1; 999 is unknown
    assert (found.right, found.n) == (right.sum(), 7)
    correction = 7 / 17 * (right.mean() - highest(logits, temperature).mean())
    assert found.accuracy == pytest.approx(highest(before, temperature).mean() + correction, abs=1e-4)
    assert (found.low, found.high) == closed_form.wilson(found.accuracy, 7)
    assert (index.logits(rest).numpy() == before).all()
    half = answers_without(index, features, ids, random, range(20)).argmax(axis=1) == ids[random]
    assert gain_of(index, random, found, 20) == pytest.approx(max(0, right.mean() - half.mean()) * np.log2(1.5))


def test_the_estimate_is_empty_without_random_labels():
    index, features, _ = index_of(30, False)
    none = estimate_rest(index, [99], features)
    assert none == Estimate(0, 0, 0.0, 0.0, 1.0)
    assert gain_of(index, [99], none, 20) is None
    with pytest.raises(UsageError, match="more"):
        gain_of(index, [99], none, 0)
    single = Index.from_features(features[:2], [0, 1], NAMES, device="cpu")
    closed_form.fit(single)
    found = estimate_rest(single, [0, 1], features)
    assert (found.right, found.n) == (0, 2)  # without its only photo, a class is unknown
    assert gain_of(single, [0, 1], found, 2) is None
