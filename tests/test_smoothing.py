"""Answers that are smoothed over the most similar photos of a folder, compared with a dense definition."""

from __future__ import annotations

import numpy as np
import pytest
from tables import unit

from retrieval_tip import Index
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation.held_out import without_parts
from retrieval_tip.fit import closed_form
from retrieval_tip.labelling import smoothing
from retrieval_tip.labelling.smoothing import LEAST, NEAREST, SPREAD, WEIGHTS, smoothed

CLASSES = ["ant", "bee", "cat", "dog"]


def folder(seed, noise=0.9, photos=60, labelled=14):
    """Return an index fitted to some photos of a folder, all features, their class ids, and the key id by row."""
    draw = np.random.default_rng(seed)
    ids = np.arange(photos) % 4
    features = unit(draw.normal(size=(4, 12))[ids] + noise * draw.normal(size=(photos, 12))).astype(np.float32)
    rows = draw.permutation(photos)[:labelled]
    index = Index.from_features(features[rows], [CLASSES[i] for i in ids[rows]], CLASSES, device="cpu")
    closed_form.fit(index)
    keys = index.keys[np.arange(index.n)]
    at = [int(np.abs(features - key).sum(axis=1).argmin()) for key in np.asarray(keys)]
    return index, features, ids, dict(zip(at, index.labels["key_id"].to_pylist(), strict=True))


def dense(index, features, known):
    """Return the probabilities of all photos, and the weighted means of those of their nearest photos, in float64."""
    logits = index.logits(features).numpy().astype(float) / index.settings.temperature
    logits[:, np.array(index.counts) == 0] = -np.inf
    own = np.exp(logits - logits.max(axis=1, keepdims=True))
    own /= own.sum(axis=1, keepdims=True)
    for row, class_id in known.items():
        own[row] = np.eye(len(CLASSES))[class_id]
    points = features.astype(float)
    if index.metric is not None:
        points = (points - index.metric.mean.numpy()) @ index.metric.transform.numpy().astype(float)
    cosines = unit(points) @ unit(points).T
    means = np.empty_like(own)
    for row, similar in enumerate(cosines):
        others = [other for other in np.argsort(-similar) if other != row][:NEAREST]
        weights = np.exp(similar[others] / SPREAD)
        means[row] = weights @ own[others] / weights.sum()
    return own, means


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_smoothed_probabilities_match_the_definition(seed, copies):
    index, features, ids, labels = folder(seed)
    first = np.array([*labels])  # in the order of the keys
    if copies:  # a copy must not give the label of a held-out photo away
        labels |= {len(ids) + place: key_id for place, key_id in enumerate(labels.values())}
        features, ids = np.concatenate([features, features[first]]), np.concatenate([ids, ids[first]])
    scores = np.zeros(len(WEIGHTS))
    for part, others in without_parts(index, np.arange(index.n)):
        held = {labels[row] for row in first[part]}
        known = {row: ids[row] for row, key_id in labels.items() if key_id not in held}
        own, means = dense(others, features, known)
        for row in first[part]:
            if ids[row] in {*known.values()}:
                chances = [(1 - a) * own[row, ids[row]] + a * means[row, ids[row]] for a in WEIGHTS]
                scores += np.log(np.maximum(chances, LEAST))
    best, rows = WEIGHTS[scores.argmax()], np.array([*labels])
    own, means = dense(index, features, {row: ids[row] for row in labels})
    expected = (1 - best) * own + best * means
    expected[rows] = np.eye(len(CLASSES))[ids[rows]]
    found, weight = smoothed(index, features, labels)
    assert weight == best
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_several_weights_are_chosen():
    assert len({smoothed(index, features, labels)[1] for index, features, _, labels in map(folder, range(4))}) > 1


def test_blocks_do_not_change_the_result(monkeypatch):
    index, features, _, labels = folder(1)
    whole = smoothed(index, features, labels)
    monkeypatch.setattr(smoothing, "BLOCK", 7)
    parts = smoothed(index, features, labels)
    assert whole[1] == parts[1]
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-6)


@pytest.mark.parametrize("photos", [1, 3])
def test_few_photos_are_smoothed(photos):
    index, features, *_ = folder(3)
    found, weight = smoothed(index, features[:photos], {})
    assert weight == 0
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    assert (found.argmax(1) == index.logits(features[:photos]).argmax(1).numpy()).all()


def test_bad_features_are_refused():
    index, features, _, labels = folder(4)
    with pytest.raises(InputError, match=r"^features: "):
        smoothed(index, features * np.nan, labels)
