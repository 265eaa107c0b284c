"""Smoothed answers follow the formula, and their evidence adds up."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import food_index, json_rows, needs_real, ok
from numpy.testing import assert_allclose
from tables import read_features, unit, write_table

from retrieval_tip import Index
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.evaluation.held_out import threshold_of
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.visible import without_folds
from retrieval_tip.labelling.smoothing import smooth
from retrieval_tip.settings import Ask

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def photos(number, seed, noise=0.5):
    """Return features of classes that overlap, and their labels."""
    ids = np.arange(number) % 5
    return unit(
        np.eye(12)[ids] + noise * np.random.default_rng(seed).normal(size=(number, 12))
    ), ids


def fitted(features, ids):
    index = Index.from_features(features, [NAMES[i] for i in ids], NAMES)
    index, _ = closed_form.fit(index)
    return index


@pytest.fixture(scope="module")
def index():
    return fitted(*photos(20, 0))


def chances(index, features):
    return (index.logits(features).double() / index.settings.temperature).softmax(1).numpy()


def smoothed(index, features):
    return torch.cat(
        [block.mixed for block in smooth(index, [FeatureBlock.of(features)]).blocks]
    ).numpy()


def alone_and_given(index, features, folder):
    """Return the probabilities of photos alone, and those that similar photos of a folder give, photo by photo."""
    answers = chances(index, folder)
    points, others = (
        index.retrieval.keys.phi(torch.from_numpy(one)).double().numpy()
        for one in (features, folder)
    )
    given = []
    for point in points:
        cosines = others @ point
        rows = [row for row in np.argsort(-cosines) if cosines[row] < 0.9999][:5]
        shares = np.maximum(cosines[rows], 0) ** 4
        given.append(shares @ answers[rows] / shares.sum())
    return chances(index, features), np.array(given)


def test_answers_follow_the_formula_and_held_out_photos_choose_the_weight(index):
    folder, _ = photos(60, 1)
    found = smooth(index, [FeatureBlock.of(folder[:25]), FeatureBlock.of(folder[25:])])
    held = np.zeros((2, 20, 5))
    for part, others in without_folds(index, np.arange(20)):
        held[:, part] = alone_and_given(others, index.keys[part], folder)
    weights = np.arange(15) / 20
    ids = index.class_ids.numpy()
    own, given = held[:, np.arange(20), ids, None]
    scores = (
        np.log((1 - weights) * own + weights * given + 1e-3).sum(0)
        - (weights - 0.6 / np.sqrt(4)) ** 2 / 0.02
    )
    weight = weights[scores.argmax()]
    assert weight > 0
    alone, others = alone_and_given(index, folder, folder)
    expected = (1 - weight) * alone + weight * others
    assert_allclose(torch.cat([block.mixed for block in found.blocks]), expected, atol=1e-5)
    assert_allclose(found.held.pred_probs, (1 - weight) * held[0] + weight * held[1], atol=1e-5)
    changed = (alone.argmax(1) != expected.argmax(1)).sum()
    assert found.words == (
        f"Similar photos count {100 * weight:.0f} %, chosen on 20 held-out photos; they changed {changed} of 60 answers"
    )


def test_what_was_found_is_kept_for_the_same_index_settings_and_photos(index):
    folder, other = (photos(40, seed)[0] for seed in (5, 6))
    found = smooth(index, [FeatureBlock.of(folder)])
    again = smooth(index, [FeatureBlock.of(folder[:7].copy()), FeatureBlock.of(folder[7:].copy())])
    assert again.held.pred_probs is found.held.pred_probs
    expected = smoothed(index, folder)
    assert_allclose(torch.cat([block.mixed for block in again.blocks]), expected, atol=1e-6)
    for asked, some, ask in (
        (index, other, Ask()),
        (fitted(*photos(20, 0)), folder, Ask()),
        (index, folder, Ask(beta=2.0)),
    ):
        before = smooth(index, [FeatureBlock.of(folder)])
        fresh = fitted(*photos(20, 0))
        mixes = [smooth(one, [FeatureBlock.of(some)], ask) for one in (asked, fresh)]
        assert mixes[0].held.pred_probs is not before.held.pred_probs
        assert_allclose(mixes[0].held.pred_probs, mixes[1].held.pred_probs, atol=1e-6)
        assert_allclose(mixes[0].blocks[0].mixed, mixes[1].blocks[0].mixed, atol=1e-6)


def test_misleading_photos_get_no_weight_and_copies_change_nothing(index):
    folder, ids = photos(60, 3, noise=0.1)
    eels = folder[ids == 4]  # which mislead about labelled photos of all other classes
    assert "count 0 %" in smooth(fitted(*photos(60, 2, noise=0.1)), [FeatureBlock.of(eels)]).words
    folder, _ = photos(8, 4)
    for some in (folder[:1], np.repeat(folder[:1], 9, axis=0)):
        assert_allclose(smoothed(index, some), chances(index, some), atol=1e-5)


@needs_real
def test_similar_photos_of_food_help(shared):
    features, labels = read_features(shared / "data/clip-food9/test.parquet")
    one = food_index(shared, 1)
    index = Index.from_features(
        np.array(one.keys), one.labels["label"].to_pylist(), one.class_names
    )
    index, _ = closed_form.fit(index)
    names = np.array(index.class_names)
    alone, mixed = (
        (names[p.argmax(1)] == labels).mean()
        for p in (chances(index, features), smoothed(index, features))
    )
    assert mixed > alone + 0.02


@pytest.fixture
def asked(index, tmp_path):
    """The beginning of a command that classifies photos."""
    index.save(tmp_path / "own")
    names = [str(tmp_path / f"{i}.jpg") for i in range(60)]
    for name in names:
        Path(name).write_text(name)
    table = write_table(tmp_path / "new.parquet", photos(60, 1)[0], ids=names)
    return "classify", tmp_path / "own", table, "--format", "json"


def test_commands_explain_smoothed_answers(index, asked, tmp_path, run):
    folder, _ = photos(60, 1)
    plain = json_rows(run(*asked))
    done = run(*asked, "--top", 5, "--smooth", "--explain")
    found = smooth(index, [FeatureBlock.of(folder)])
    rows = json_rows(done)
    alone = {row["input"]: row for row in plain}
    assert f"{found.words}\n" in done.stderr
    for row, mixed in zip(rows, smoothed(index, folder), strict=True):
        assert row["similar"][0]["input"] == row["input"]
        assert [one["label"] for one in row["similar"]] == [
            alone[one["input"]]["label"] for one in row["similar"]
        ]
        assert sum(one["gives"] for one in row["similar"]) == pytest.approx(
            row["probability"], abs=1e-5
        )
        assert [mixed[NAMES.index(label)] for label in row["labels"]] == pytest.approx(
            row["probabilities"], abs=1e-5
        )
        assert (row["label"], row["no_match"]) == (
            NAMES[mixed.argmax()],
            alone[row["input"]]["no_match"],
        )
    assert [row["label"] for row in rows] != [row["label"] for row in plain]
    held_back = json_rows(run(*asked, "--smooth", "--abstain", 0.6))
    assert [row["label"] is None for row in held_back] == [row["probability"] < 0.6 for row in rows]
    out = ("--into", tmp_path / "out", "--dry-run", "--smooth", "--at-most-wrong", "40%")
    planned = run("sort", *asked[1:3], *out)
    assert f"{threshold_of(found.held, 0.4)}\n" in planned.stderr
    assert [row["label"] for row in csv.DictReader(planned.stdout.splitlines())] == [
        row["label"] for row in rows
    ]
    for more in (["--logits"], ["--coverage", "0.9"], ["--group-no-match"], ["--burst", 10]):
        assert run(*asked, "--smooth", *more).exit_code == 2


def test_the_narrowest_group_has_its_smoothed_probability(index, asked, tmp_path, run):
    (tmp_path / "groups.csv").write_text(
        "species,family\nant,insect\nbee,insect\ncat,mammal\ndog,mammal\neel,fish\n"
    )
    ok("index set", asked[1], "--groups", tmp_path / "groups.csv")
    rows = json_rows(run(*asked, "--smooth", "--at-least", 0.8))
    for row, p in zip(rows, smoothed(index, photos(60, 1)[0]), strict=True):
        families = {"insect": p[0] + p[1], "mammal": p[2] + p[3], "fish": p[4]}
        best = max(families, key=families.get)
        expected = (
            (best, "family", families[best]) if families[best] >= 0.8 else (None, None, p.max())
        )
        expected = (NAMES[p.argmax()], "species", p.max()) if p.max() >= 0.8 else expected
        assert (row["label"], row["level"], pytest.approx(row["probability"], abs=1e-5)) == expected
    assert {row["level"] for row in rows} == {"species", "family", None}
