"""Baselines follow their equations, and choose settings on the shots only."""

import sys

import numpy as np
import pytest
import torch
from clusters import round_clusters as clusters
from conftest import ROOT
from numpy.testing import assert_allclose
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from tables import unit_rows

from retrieval_tip.model import Index
from retrieval_tip.settings import Settings

sys.path.insert(0, str(ROOT / "benchmarks"))
import baselines

C, D = 5, 12
NAMES = [f"class {i}" for i in range(C)]
SETTINGS = Settings(logit_scale=10.0)


def cache_of(n, text=None, names=NAMES):
    keys, ids = clusters(n, C, D, 1, spread=1.2)
    return Index.from_features(keys, ids, names, text, settings=SETTINGS)


QUERIES, _ = clusters(200, C, D, 2, spread=1.2)


def test_class_means_are_unit_means_of_the_shots():
    cache = cache_of(30)
    means = np.stack(
        [np.asarray(cache.keys)[cache.class_ids.numpy() == c].mean(0) for c in range(C)]
    )
    cosines = QUERIES @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert_allclose(
        baselines.class_means(cache).logits(QUERIES), 100 * cosines, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("uneven", [False, True])
def test_the_linear_probe_matches_scikit_learn_with_balanced_classes(uneven):
    cache = cache_of(60)
    if uneven:
        cache = cache.take(
            np.flatnonzero((cache.class_ids.numpy() < 2) | (np.arange(cache.n) % 3 == 0))
        )
    probe = baselines.linear_probe(cache)
    near = []
    for c in baselines.CS:
        theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-8, class_weight="balanced")
        theirs.fit(np.asarray(cache.keys), cache.class_ids.numpy())
        near.append(
            np.abs(theirs.predict_proba(QUERIES) - probe.logits(QUERIES).softmax(1).numpy()).max()
        )
    assert min(near) < 5e-3, near


def test_the_discriminant_without_text_matches_scikit_learn_up_to_a_temperature():
    cache = cache_of(40)
    theirs = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=D / (cache.n - 1 + D), priors=np.full(C, 1 / C)
    )
    theirs.fit(np.asarray(cache.keys), cache.class_ids.numpy())
    ours = baselines.discriminant(cache).logits(QUERIES).log_softmax(1).numpy()
    log = theirs.predict_log_proba(QUERIES)
    scales = (ours[:, :1] - ours[:, 1:]) / (
        log[:, :1] - log[:, 1:]
    )  # one common factor is a temperature
    assert_allclose(scales, np.median(scales), rtol=0.02)


def test_the_discriminant_with_text_is_a_weighted_sum_of_both():
    text = unit_rows(C, D, 5)
    bare = baselines.discriminant(cache_of(40))
    both = baselines.discriminant(cache_of(40, text))
    parts = torch.stack([bare.weights.flatten(), torch.from_numpy(text).flatten()], 1).double()
    solved = torch.linalg.lstsq(parts, both.weights.flatten().double()[:, None])
    assert (
        float((parts @ solved.solution - both.weights.flatten()[:, None]).abs().max())
        < 1e-4 * both.weights.abs().max()
    )
    assert (solved.solution > -1e-6).all()


@pytest.mark.parametrize(
    "rival", [baselines.class_means, baselines.linear_probe, baselines.discriminant]
)
def test_baselines_handle_single_shots_and_classes_without_shots(rival):
    names = [*NAMES, "none"]
    text = unit_rows(C + 1, D, 5)
    for n, weights in ((C, None), (4 * C, None), (4 * C, text)):
        logits = rival(cache_of(n, weights, names)).logits(QUERIES)
        assert logits.shape == (len(QUERIES), C + 1)
        assert torch.isfinite(logits).all()
