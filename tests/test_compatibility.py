"""Indexes that older versions wrote load for ever: ``indexes/v1`` was written by format 1 and is never changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from retrieval_tip.cache_model import CacheModel, verify
from retrieval_tip.store import query

V1 = Path(__file__).parent / "indexes" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
"""Queries ``features`` [3, 8] and, for each index, its logits over all keys and the 4 nearest, as format 1 answered."""


@pytest.mark.parametrize("name", ["plain", "tuned", "classes"])
def test_an_index_of_format_1_answers_as_it_did(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(V1 / name, folder)
    cache, features = verify(folder), np.array(EXPECTED["features"], dtype=np.float32)
    answers = EXPECTED["answers"][name]
    np.testing.assert_allclose(cache.logits(features), answers["all"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache.logits(features, k=4), answers["k4"], rtol=1e-5, atol=1e-5)
    assert [found.label for found in cache.classify(features)] == answers["labels"]


def test_an_index_of_format_1_has_its_labels_and_settings() -> None:
    plain, tuned = CacheModel.load(V1 / "plain", device="cpu"), CacheModel.load(V1 / "tuned", device="cpu")
    assert (plain.version, plain.alpha, plain.beta, plain.k) == (2, 2.0, 4.0, 4)
    assert plain.provenance == {"alpha": "given", "beta": "given"}
    assert plain.labels["camera"].to_pylist() == ["a", "b", "a", "b", "a", "b"]
    assert query(V1 / "plain", "SELECT key_id FROM labels").column("key_id").to_pylist() == [1, 3, 2, 5, 0, 4]
    assert tuned.values is not None
    assert tuned.tuned is not None
    assert tuned.curve is not None
    assert tuned.curve["loss"].to_pylist() == [1.0, 0.5]
