"""Projection of keys to two dimensions, against the full decomposition."""

import numpy as np
import pytest
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from retrieval_tip import Index
from retrieval_tip.evaluation.projection import methods, projected


def cache_of(keys):
    labels = [f"class {i % 3}" for i in range(len(keys))]
    return Index.from_features(keys.astype(np.float32), labels, [f"class {i}" for i in range(3)])


@pytest.mark.parametrize(("n", "d"), [(300, 40), (20, 500), (7, 3), (3, 2)])
def test_principal_components_match_the_full_decomposition(n, d):
    rng = default_rng(0)
    scales = np.geomspace(1, 1e-2, d)
    cache = cache_of(rng.normal(size=(n, d)) * scales)
    found = projected(cache)
    keys = np.asarray(cache.keys, dtype=np.float64)
    *_, axes = np.linalg.svd(keys - keys.mean(axis=0), full_matrices=False)
    expected = (keys - keys.mean(axis=0)) @ axes[:2].T
    for own, other in zip(found.places.T, expected.T, strict=True):
        assert abs(np.corrcoef(own, other)[0, 1]) > 0.9999
    ratio = np.ptp(found.places, axis=0) / np.ptp(expected, axis=0)
    assert ratio[0] == pytest.approx(ratio[1], rel=1e-3)  # one scale for both axes
    assert np.abs(found.places).max() == pytest.approx(1)
    assert_allclose(found.places.max(axis=0), -found.places.min(axis=0), atol=1e-6)
    assert found.key_ids.tolist() == cache.labels["key_id"].to_pylist()


def test_a_projection_is_reproducible_and_keeps_the_random_state():
    import torch

    cache = cache_of(default_rng(1).normal(size=(50, 20)))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = projected(cache)
    two = projected(cache)
    assert torch.rand(3).tolist() == expected.tolist()
    assert_array_equal(one.places, two.places)


def test_a_sample_is_spread_over_the_keys():
    cache = cache_of(default_rng(2).normal(size=(100, 4)))
    found = projected(cache, limit=10)
    assert len(found.key_ids) == len(found.places) == 10
    rows = [cache.labels["key_id"].to_pylist().index(key_id) for key_id in found.key_ids]
    assert (rows[0], rows[-1]) == (0, 99)
    assert np.diff(rows).min() >= 10


@pytest.mark.parametrize("keys", [np.ones((1, 4)), np.ones((5, 4)), np.eye(3)[:, :1], np.eye(2)])
def test_few_or_equal_keys_can_be_projected(keys):
    found = projected(cache_of(keys))
    assert found.places.shape == (len(keys), 2)
    assert np.isfinite(found.places).all()


def test_unavailable_methods_and_bad_limits_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cache = cache_of(np.eye(3))
    assert methods() == ["pca"]
    with pytest.raises(ValueError, match="tsne"):
        projected(cache, "tsne")
    with pytest.raises(ValueError, match="limit is 0"):
        projected(cache, limit=0)


def test_tsne_keeps_neighbours_together_that_pca_cannot_separate():
    pytest.importorskip("sklearn")
    rng = default_rng(0)
    centres = rng.normal(size=(12, 64))
    keys = np.repeat(centres, 10, axis=0) + 0.5 * rng.normal(size=(120, 64))
    cache = Index.from_features(
        keys.astype(np.float32), np.repeat(np.arange(12), 10), [f"class {i}" for i in range(12)]
    )

    def same(found):
        far = np.linalg.norm(found.places[:, None] - found.places[None], axis=2) + 9 * np.eye(120)
        return float((found.class_ids[far.argmin(axis=1)] == found.class_ids).mean())

    near = projected(cache, "tsne")
    far = projected(cache, "pca")
    assert same(near) > 0.98
    assert same(far) < 0.95
    assert (near.method, far.method) == ("tsne", "pca")
    assert_array_equal(near.places, projected(cache, "tsne").places)
