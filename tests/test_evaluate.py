"""Evaluation compared with counts in plain NumPy."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import cache_of
from tables import unit

from retrieval_tip import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source, open_source
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation.evaluate import CONFUSIONS, Evaluation, evaluate

Array = npt.NDArray[Any]
C, D, SHOTS, Q = 8, 16, 4, 300
NAMES = [f"class {i}" for i in range(C)]


_rng = np.random.default_rng(0)
_means = unit(_rng.standard_normal((C, D)))
Y = np.repeat(np.arange(C), SHOTS)
KEYS = unit(_means[Y] + 0.4 * _rng.standard_normal((len(Y), D)))
TEXT = unit(_means + 0.4 * _rng.standard_normal((C, D)))
TRUTH = _rng.choice(C - 1, size=Q, p=np.arange(1, C) / np.arange(1, C).sum())  # unbalanced; the last never occurs
QUERIES = unit(_means[TRUTH] + 0.5 * _rng.standard_normal((Q, D)))


def model(c: int = C, **changes: Any) -> CacheModel:
    few = c * SHOTS  # keys are in class order
    arguments: dict[str, Any] = {"text_weights": TEXT[:c], "alpha": 2.0, "beta": 3.0, "logit_scale": 10.0} | changes
    return cache_of(KEYS[:few], Y[:few], NAMES[:c], device="cpu", **arguments)


def labelled(folder: Path, labels: list[str], features: Array) -> Source:
    path = folder / "features.parquet"
    pq.write_table(
        pa.table({"id": [f"q{i}" for i in range(len(labels))], "label": labels, "feature": list(features)}), path
    )
    return open_source(path)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return labelled(tmp_path, [NAMES[i] for i in TRUTH], QUERIES)


def expected(k: int | None = None) -> tuple[Array, Array, Array]:
    A = QUERIES.astype(np.float64) @ KEYS.T.astype(np.float64)
    weights = np.exp(-3 * (1 - A))
    if k is not None:
        weights[np.argsort(np.argsort(-A, axis=1), axis=1) >= k] = 0
    text, cache = 10 * (QUERIES.astype(np.float64) @ TEXT.T), weights @ np.eye(C)[Y]
    return text + 2 * cache, text, cache


@pytest.mark.parametrize("k", [None, 5])
def test_accuracies_match_plain_numpy(source: Source, k: int | None) -> None:
    logits, text, cache = expected(k)
    found = evaluate(model(), source, Encoder(), k=k, tail=False)
    predicted = logits.argmax(1)
    right = predicted == TRUTH
    assert 0.3 < right.mean() < 0.98  # neither trivial nor hopeless
    assert found.top1 == pytest.approx(right.mean())
    best = np.argsort(-logits, axis=1)[:, :5]
    assert found.top5 == pytest.approx((best == TRUTH[:, None]).any(1).mean())
    assert found.top1 < found.top5 < 1
    assert found.zero_shot_top1 == pytest.approx((text.argmax(1) == TRUTH).mean())
    assert found.cache_top1 == pytest.approx((cache.argmax(1) == TRUTH).mean())
    per_class = {NAMES[i]: right[np.equal(TRUTH, i)].mean() for i in range(C - 1)}
    assert found.per_class == pytest.approx(per_class)  # without the class that never occurs
    assert found.mean_per_class == pytest.approx(np.mean(list(per_class.values())))
    assert found.mean_per_class != pytest.approx(found.top1)
    assert (found.n, found.skipped, found.settings.k, found.settings.tail) == (Q, 0, k, False)
    assert (found.settings.alpha, found.settings.beta) == (2.0, 3.0)


def test_confusions_are_the_most_frequent_mistakes(source: Source) -> None:
    predicted = expected()[0].argmax(1)
    wrong = Counter((NAMES[a], NAMES[b]) for a, b in zip(TRUTH, predicted, strict=True) if a != b)
    found = evaluate(model(), source, Encoder()).confusions
    assert len(found) == CONFUSIONS < len(wrong)
    assert all(wrong[a, b] == times for a, b, times in found)
    assert [times for _, _, times in found] == [times for _, times in wrong.most_common(CONFUSIONS)]


def test_the_tail_is_used_if_asked(source: Source) -> None:
    cache = model()
    for tail in (False, True):
        found = evaluate(cache, source, Encoder(), k=3, tail=tail)
        predicted = cache.logits(QUERIES, 3, tail).argmax(1).numpy()
        assert (found.top1, found.settings.tail) == (pytest.approx((predicted == TRUTH).mean()), tail)
    everything = evaluate(cache, source, Encoder(), k=len(KEYS))
    assert replace(everything, settings=everything.settings.override(k="all")) == evaluate(cache, source, Encoder())


def test_without_text_zero_shot_is_missing(source: Source) -> None:
    found = evaluate(model(text_weights=None), source, Encoder())
    assert found.zero_shot_top1 is None
    assert found.top1 == found.cache_top1 == pytest.approx((expected()[2].argmax(1) == TRUTH).mean())


def test_an_evaluation_converts_to_json(source: Source) -> None:
    facts = json.loads(json.dumps(evaluate(model(), source, Encoder(), k=7).to_dict()))
    assert {"top1", "top5", "zero_shot_top1", "cache_top1", "n", "alpha", "beta", "k", "tail"} <= facts.keys()
    assert (facts["k"], facts["n"], facts["tail"]) == (7, Q, True)
    assert isinstance(facts["confusions"][0][2], int)
    everything: Evaluation = evaluate(model(), source, Encoder())
    assert everything.to_dict()["k"] == "all"


def test_unknown_labels_are_refused_by_name(tmp_path: Path) -> None:
    labels = [NAMES[0]] * 3 + [f"odd {i}" for i in range(7)]
    with pytest.raises(InputError) as caught:
        evaluate(model(), labelled(tmp_path, labels, QUERIES[:10]), Encoder())
    message = str(caught.value)
    assert "features.parquet: 7 unknown labels: odd 0, odd 1, odd 2, odd 3, odd 4; " in message
    assert message.endswith("class 0, class 1, class 2, class 3, class 4 ...")


def test_a_source_without_items_is_refused(source: Source) -> None:
    with pytest.raises(InputError, match="has no items"):
        evaluate(model(), source.take([]), Encoder())


def test_features_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected"):
        evaluate(model(), labelled(tmp_path, [NAMES[0]] * 3, unit(np.ones((3, D + 1)))), Encoder())
