"""Calibration compared with explicit loops and planted temperatures, and the two commands that use it."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import examples, failed, food_index, json_of, ok
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy.special import log_softmax, softmax
from sealing import manifest_of
from tables import read_features, unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import UsageError
from retrieval_tip.evaluation.calibration import (
    BINS,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from retrieval_tip.evaluation.evaluate import evaluate

sized = settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
answers = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 15).map(lambda i: i / 15)), st.booleans()),
    min_size=1,
)


def nll(logits, labels, temperature):
    """Return the negative log likelihood by definition."""
    z = log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    return -float(z[np.arange(len(z)), labels].mean())


def planted(n, c, temperature, seed, scale=1.0):
    """Return logits, and labels drawn from their softmax at a temperature."""
    rng = default_rng(seed)
    logits = scale * rng.normal(size=(n, c))
    chances = softmax(logits / temperature, axis=1).cumsum(axis=1)
    labels = (rng.random((n, 1)) > chances[:, :-1]).sum(axis=1)
    return logits, labels


@sized
@given(answers, st.sampled_from((1, 2, 7, BINS)))
def test_the_error_and_the_bins_match_a_loop(items, bins):
    confidence, right = (list(column) for column in zip(*items, strict=True))
    edges = np.linspace(0, 1, bins + 1)
    expected = []
    for m in range(bins):
        inside = [
            i
            for i, p in enumerate(confidence)
            if edges[m] < p <= edges[m + 1] or (m == 0 and p == 0)
        ]
        if inside:
            means = [sum(column[i] for i in inside) / len(inside) for column in (confidence, right)]
            expected.append((m / bins, (m + 1) / bins, len(inside), *means))
    found = reliability(confidence, right, bins)
    assert [[*own] for own in found] == [pytest.approx([*own]) for own in expected]
    total = sum(n / len(items) * abs(accuracy - mean) for _, _, n, mean, accuracy in expected)
    error = expected_calibration_error(confidence, right)
    assert bins != BINS or error == pytest.approx(total, abs=1e-12)
    assert 0 <= error <= 1


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0, 40.0])
def test_a_planted_temperature_is_found(temperature):
    logits, labels = planted(
        20000, 6, temperature, seed=int(temperature * 100), scale=3 * temperature
    )
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


@sized
@given(
    st.integers(2, 40),
    st.integers(2, 8),
    st.integers(0, 10**6),
    st.sampled_from([0.02, 1.0, 30.0, 700.0]),
    st.floats(1e-3, 1e3),
)
@example(n=5, c=5, seed=8192, spread=0.02, factor=1.0)  # T is its bound
def test_the_temperature_is_optimal_and_scales_with_the_logits(n, c, seed, spread, factor):
    rng = default_rng(seed)
    logits = rng.normal(size=(n, c)) * spread
    labels = np.where(rng.random(n) < 0.7, logits.argmax(axis=1), rng.integers(0, c, n))
    found = fit_temperature(logits, labels)
    spread = (logits - logits.mean(axis=1, keepdims=True)).std(ddof=1)
    best = nll(logits, labels, found)
    for other in (*spread * np.exp(np.linspace(-9, 9, 80)), found * 0.99, found * 1.01):
        if abs(np.log(other / spread)) <= 9:
            assert best <= nll(logits, labels, other) + 1e-5
    assert fit_temperature(logits * factor, labels) == pytest.approx(found * factor, rel=1e-3)
    assert (logits / found).argmax(axis=1).tolist() == logits.argmax(axis=1).tolist()


def test_temperatures_of_degenerate_answers():
    logits = np.array([[5.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    assert 0 < fit_temperature(logits, [0, 1]) < 0.2  # all right: T tends to 0
    assert 200 < fit_temperature(logits, [2, 0]) < math.inf  # all wrong: T tends to infinity
    assert fit_temperature(logits[:1], [0]) > 0
    assert fit_temperature(np.zeros((4, 3)), [0, 1, 2, 0]) == 1  # nothing to fit
    assert fit_temperature(np.full((1, 1), 7.0), [0]) == 1
    assert fit_temperature([[1, 0], [1, 0], [1, 0]], [0, 0, 1]) == pytest.approx(
        1 / math.log(2), rel=1e-3
    )  # by hand


# ------------------------------------------------------------------------------------------- the index and its commands


def validation(shared):
    """Return a table of other photos of the same foods."""
    train = pq.read_table(shared / "data/clip-food9/train.parquet")
    labels = np.array(train["label"].to_pylist())
    return train.take(
        np.concatenate([np.flatnonzero(labels == name)[20:70] for name in np.unique(labels)])
    )


@pytest.fixture
def food(shared, tmp_path):
    food_index(shared).save(tmp_path / "food")
    pq.write_table(validation(shared), tmp_path / "val.parquet")
    return tmp_path / "food", tmp_path / "val.parquet", shared / "data/clip-food9/test.parquet"


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1.0, 1e3, 1e30, 1e300])
def test_the_temperature_never_changes_an_answer(shared, temperature):
    cache = food_index(shared)
    features = np.stack(validation(shared)["feature"].to_numpy())[::9]
    plain = cache.classify(features, top=9, k=16)
    cache.settings = cache.settings.override(temperature=temperature)
    for one, other in zip(plain, cache.classify(features, top=9, k=16), strict=True):
        assert one.labels == other.labels
        assert np.isfinite(other.probabilities).all()
        assert sum(other.probabilities) == pytest.approx(1, abs=1e-5)
        assert sorted(other.probabilities, reverse=True) == pytest.approx(
            other.probabilities, abs=1e-6
        )
        np.testing.assert_array_equal(one.logits, other.logits)


def test_calibrate_writes_a_version_with_its_provenance(food):
    folder, val, test = food
    features = read_features(test)[0]
    before = json_of("evaluate", folder, test)
    shown = ok("fit --calibrate", folder, "--val", val)
    facts = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert {"temperature", "n", "top1", "ece_before", "ece_after", "version"} == facts.keys()
    assert (facts["n"], facts["version"]) == ("450", "2")
    info = json_of("index info", folder)
    assert info["temperature"] == pytest.approx(float(facts["temperature"]), rel=1e-3)
    assert info["provenance"]["temperature"] == f"fitted on {val}, n=450"
    assert (info["version"], info["earlier_versions"]) == (2, [1])
    cache = Index.load(folder)
    assert cache.settings.temperature == info["temperature"]
    assert cache.classify(features[:3])[0].probability < 1
    after = json_of("evaluate", folder, test)
    assert after["ece"] < before["ece"]
    assert after["temperature"] == cache.settings.temperature
    assert {k: v for k, v in before.items() if k not in ("ece", "temperature")} == {
        k: v for k, v in after.items() if k not in ("ece", "temperature")
    }
    # a second fit ignores the previous temperature
    ok("fit --calibrate", folder, "--val", val)
    assert Index.load(folder).settings.temperature == cache.settings.temperature


def test_a_failed_calibration_changes_nothing(run, food, tmp_path):
    folder, _, _ = food
    manifest = manifest_of(folder).read_bytes()
    odd = write_table(
        tmp_path / "odd.parquet", unit_rows(3, 512), ["apple_pie", "nonsense", "tacos"]
    )
    failed(run("fit --calibrate", folder, "--val", odd), 1, "nonsense")
    assert run("fit --calibrate", folder, "--val", tmp_path / "nowhere.parquet").exit_code == 1
    assert run("fit --calibrate", folder).exit_code == 2
    assert manifest_of(folder).read_bytes() == manifest


def test_shots_are_classified_without_themselves(run, food, tmp_path):
    folder, _, _ = food
    cache = Index.load(folder)
    shots = write_table(
        tmp_path / "shots.parquet",
        cache.keys,
        cache.labels["label"].to_pylist(),
        cache.labels["source"].to_pylist(),
    )
    expected = json_of("evaluate", folder, shots)
    done = run("fit --calibrate", folder, "--val", shots)
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert expected["held_out"] == int(facts["n"]) == 72
    assert float(facts["top1"]) == pytest.approx(expected["top1"], rel=1e-3)
    assert float(facts["ece_before"]) == pytest.approx(expected["ece"], rel=1e-3)
    one = write_table(tmp_path / "one.parquet", cache.keys[:1], [cache.labels["label"][0].as_py()])
    assert "every answer is right" in run("fit --calibrate", folder, "--val", one).stderr
    assert (
        expected["top1"]
        < 1
        == (cache.logits(cache.keys).argmax(1) == cache.class_ids).double().mean()
    )


def test_classify_and_evaluate_withhold_the_same_answers(run, food):
    folder, val, test = food
    ok("fit --calibrate", folder, "--val", val)
    truth = pq.read_table(test)["label"].to_pylist()
    for threshold in (0.0, 0.7, 0.97, 1.0):
        result = json_of("evaluate", folder, test, "--abstain", threshold, "-k", 32)
        shown = run(
            "classify", folder, test, "--abstain", threshold, "-k", 32, "--format", "json"
        ).stdout
        rows = [json.loads(line) for line in shown.splitlines()]
        for row in rows:
            assert (row["label"] is not None) == (row["probability"] >= threshold)
        given_ = [
            (row["label"], name)
            for row, name in zip(rows, truth, strict=True)
            if row["label"] is not None
        ]
        assert result["abstain"] == threshold
        assert result["coverage"] == pytest.approx(len(given_) / len(rows))
        right = [one == other for one, other in given_]
        assert result["selective_top1"] == (pytest.approx(np.mean(right)) if right else None)
    assert result["coverage"] < 1
    everything = json_of("evaluate", folder, test)
    assert not {"abstain", "coverage", "selective_top1"} & everything.keys()
    assert "selective_top1" in run("evaluate", folder, test, "--abstain", 0.9).stdout


def test_every_format_shows_withheld_labels(run, food, tmp_path):
    folder, _, test = food
    table = run("classify", folder, test, "--abstain", 1, "--top", 2).stdout.splitlines()
    plain = run("classify", folder, test, "--top", 2).stdout.splitlines()
    changed = [
        (a.split(), b.split()) for a, b in zip(plain, table, strict=True) if a.split() != b.split()
    ]
    assert changed
    assert all(
        b[1] == "-" and (a[0], a[2]) == (b[0], b[2]) for a, b in changed
    )  # the probability is kept
    out = tmp_path / "out.parquet"
    run("classify", folder, test, "--abstain", 1, "--format", "parquet", "--out", out)
    withheld = pq.read_table(out)["label"].null_count
    assert withheld == len(changed)
    csv = run("classify", folder, test, "--abstain", 1, "--format", "csv").stdout.splitlines()
    assert sum(line.split(",")[1] == "" for line in csv) == withheld
    for wrong in (-0.1, 1.1, "x"):
        assert run("classify", folder, test, "--abstain", wrong).exit_code == 2
        assert run("evaluate", folder, test, "--abstain", wrong).exit_code == 2


def test_a_threshold_outside_0_to_1_is_refused(shared):
    cache = food_index(shared, 1)
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(UsageError, match="abstain is"):
            evaluate(
                cache, open_source(shared / "data/clip-food9/test.parquet"), Reader(), abstain=wrong
            )
