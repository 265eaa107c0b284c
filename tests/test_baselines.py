"""The baselines follow their equations and choose settings on the shots alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tables import unit_rows
from test_search_hp import C, D, clusters

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.evaluation import baselines
from retrieval_tip.settings import Settings

NAMES = [f"class {i}" for i in range(C)]
SETTINGS = Settings(logit_scale=10.0)


def cache_of(n, text=None, names=NAMES):
    keys, ids = clusters(n, C, D, 1, spread=1.2)
    return CacheModel.from_features(keys, ids, names, text, settings=SETTINGS, device="cpu")


QUERIES, _ = clusters(200, C, D, 2, spread=1.2)


def test_class_means_are_unit_means_of_the_shots():
    cache = cache_of(30)
    means = np.stack([np.asarray(cache.keys)[cache.class_ids.numpy() == c].mean(0) for c in range(C)])
    cosines = QUERIES @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    np.testing.assert_allclose(baselines.class_means(cache).logits(QUERIES), 100 * cosines, rtol=1e-5, atol=1e-4)


def test_the_linear_probe_is_scikit_learns():
    cache = cache_of(40)
    probe = baselines.linear_probe(cache)
    near = []
    for c in baselines.CS:
        theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(np.asarray(cache.keys), cache.class_ids.numpy())
        near.append(np.abs(theirs.predict_proba(QUERIES) - probe.logits(QUERIES).softmax(1).numpy()).max())
    assert min(near) < 5e-3, near


@pytest.mark.parametrize("rival", [baselines.class_means, baselines.linear_probe])
def test_one_shot_a_class_and_a_class_without_a_shot_are_answered(rival):
    names, text = [*NAMES, "none"], unit_rows(C + 1, D, 5)
    for n, weights in ((C, None), (4 * C, None), (4 * C, text)):
        logits = rival(cache_of(n, weights, names)).logits(QUERIES)
        assert logits.shape == (len(QUERIES), C + 1)
        assert torch.isfinite(logits).all()
