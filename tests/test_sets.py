"""Sets of classes: the quantile, the held-out photos of a fit, and what makes them out of date."""

import csv
import io
import json
import math
import pickle
import re

import numpy as np
import pytest
from conftest import json_of, ok
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from serving import app_of
from stored import made, source
from tables import unit, write_table

from retrieval_tip import tip
from retrieval_tip.data.reader import Reader
from retrieval_tip.errors import UsageError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.forms import Form
from retrieval_tip.index import changes
from retrieval_tip.index.build import build_index
from retrieval_tip.index.changes import fit_index
from retrieval_tip.index.places import at
from retrieval_tip.model import Index
from retrieval_tip.retrieval.conformal import Scores
from retrieval_tip.settings import Ask, Settings

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def photos(seed, each):
    """Return features of classes that overlap."""
    noise = np.random.default_rng(seed).normal(size=(each * 5, 12)) * 0.9
    return unit(np.repeat(np.eye(12)[:5] + 0.6, each, 0) + noise), np.repeat(NAMES, each).tolist()


def fitted(features, labels, names=NAMES, text=None):
    index = Index.from_features(features, labels, names, text)
    index, _ = closed_form.fit(index)
    return index


@pytest.fixture
def index(tmp_path):
    train = write_table(tmp_path / "train.parquet", *photos(0, 12))
    ok("index build", train, "--out", tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def queries(tmp_path):
    return write_table(tmp_path / "test.parquet", *photos(1, 40))


@given(
    st.lists(st.floats(0.001, 0.999), min_size=1, max_size=60, unique=True),
    st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]),
)
def test_the_threshold_is_the_conformal_quantile(own, coverage):
    m = len(own)
    sets = Scores(np.array([[p, 1 / m, 0] for p in own]), Settings()).sets(
        coverage, np.array([False])
    )
    if m * (1 - coverage) < 1 - 1e-9:
        assert sets.least == 0
    else:
        rank = math.ceil(round((m + 1) * coverage, 9))
        assert 1 - sets.least == pytest.approx(sorted(1 - p for p in own)[rank - 1])


@pytest.mark.parametrize("text", [False, True])
def test_a_fit_keeps_the_held_out_probability_of_each_photo(text):
    features, labels = photos(0, 6)
    index = fitted(features, labels, text=np.eye(12, dtype=np.float32)[:5] if text else None)
    folds = closed_form._folds_of(index, None, "even")
    expected = []
    for fold, held in enumerate(folds.held):
        if held.of == "shots":
            metric, values = folds.fitted(
                Form.of(index.fitted, index.settings.beta), held.rows, fold
            )
            other = index.take(held.rows.numpy())
            other = other.with_fit(metric, values, index.fitted)
            chances = tip.probabilities(other.logits(held.features), index.settings.temperature)
            expected += zip(
                chances[range(len(held.ids)), held.ids].tolist(), held.ids.tolist(), strict=True
            )
    own, weights, ids = index.scores.rows.T
    np.testing.assert_allclose(sorted(zip(own, ids, strict=True)), sorted(expected), atol=1e-4)
    assert len(own) == len(labels)
    assert (
        weights.sum() == pytest.approx(1) if text else 0.8 < weights.sum() < 1
    )  # text does not grow with the shots


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_every_door_gives_the_sets_of_the_definition(run, index, queries, coverage):
    opened, (features, labels) = Index.load(index), photos(1, 40)
    chances = tip.probabilities(opened.logits(features), opened.settings.temperature).numpy()
    own, weights, _ = opened.scores.rows.T
    least = max(p for p in own if 60 * weights[own < p].sum() + 1 <= (1 - coverage) * 61)
    expected = [[NAMES[i] for i in np.argsort(-row) if row[i] >= least] for row in chances]
    matched = np.array([not one.no_match for one in opened.classify(features)])
    assert 0 < matched.mean() < 1
    expected = [own if one else None for own, one in zip(expected, matched, strict=True)]
    shown = run("classify", index, queries, "--coverage", coverage, "--format", "json").stdout
    assert [json.loads(line)["set"] for line in shown.splitlines()] == expected
    assert "    set: " in run("classify", index, queries, "--coverage", coverage).stdout
    assert [one.set for one in opened.classify(features, coverage=coverage)] == expected
    with TestClient(app_of(index)) as client:
        answer = client.post(
            f"/v1/classify?coverage={coverage}", json={"features": features.tolist()}
        ).json()
    assert [row["set"] for row in answer["results"]] == expected
    report = json_of("evaluate", index, queries, "--coverage", coverage)
    assert report["set_size"] == pytest.approx(
        np.mean([len(one) for one in expected if one is not None])
    )
    covered = np.mean(
        [label in one for label, one in zip(labels, expected, strict=True) if one is not None]
    )
    assert report["set_coverage"] == pytest.approx(covered)
    assert covered == pytest.approx(coverage, abs=0.08)


def test_csv_separates_the_classes_of_a_set_by_a_bar_that_names_may_contain(tmp_path, queries):
    names = ["bluebell", "a|b", "back\\slash", "end\\", '|"|']
    features, labels = photos(0, 12)
    renamed = [names[NAMES.index(label)] for label in labels]
    train = write_table(tmp_path / "odd.parquet", features, renamed)
    ok("index build", train, "--out", tmp_path / "odd")

    def rows(style):
        done = ok("classify", tmp_path / "odd", queries, "--coverage", 0.95, "--format", style)
        return done.stdout

    expected = [json.loads(line) for line in rows("json").splitlines()]
    found = [row["set"] for row in csv.DictReader(io.StringIO(rows("csv")))]
    sets = [
        [re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|[^|\\])+", text)]
        for text in found
    ]
    assert sets == [row["set"] or [] for row in expected]
    assert max(map(len, sets)) > 2
    assert {name for one in sets for name in one} == set(names)
    assert [one["no_match"] for one in expected if one["set"] is None] == [True] * found.count("")


def test_options_that_change_the_answers_exclude_sets(run, index, queries):
    for options in (
        ["--abstain", 0.5],
        ["--at-least", 0.9],
        ["--alpha", 2],
        ["--where", "key_id > 2"],
        ["-k", 3],
    ):
        for command in ("classify", "evaluate"):
            refused = run(command, index, queries, "--coverage", 0.9, *options)
            assert (refused.exit_code, refused.stdout) == (2, ""), options
            assert "coverage" in refused.stderr
    assert run("classify", index, queries, "--coverage", 0.9, "--burst", 10).exit_code == 2
    with pytest.raises(UsageError, match="coverage"):
        Index.load(index).classify(photos(1, 1)[0], coverage=0.9, without=[3])
    with TestClient(app_of(index)) as client:
        for asked in ("coverage=0.9&alpha=3", "coverage=0.9&at_least=0.9", "coverage=2"):
            assert (
                client.post(
                    f"/v1/classify?{asked}", json={"features": [[1.0] + [0.0] * 11]}
                ).status_code
                == 422
            )


def test_with_few_photos_every_set_has_all_classes(run, tmp_path, queries):
    for each, coverage, held in ((3, 0.95, 15), (1, 0.5, 0)):
        few = write_table(tmp_path / "few.parquet", *photos(0, each))
        ok("index build", few, "--out", tmp_path / "few")
        done = run(
            "classify", tmp_path / "few", queries, "--coverage", coverage, "--format", "json"
        )
        assert {
            len(one)
            for line in done.stdout.splitlines()
            if (one := json.loads(line)["set"]) is not None
        } == {5}
        assert f"{held} held-out photos do not suffice" in done.stderr
        if each > 1:
            done = run("classify", tmp_path / "few", queries, "--coverage", 0.9, "--format", "json")
            assert (
                min(
                    len(one)
                    for line in done.stdout.splitlines()
                    if (one := json.loads(line)["set"]) is not None
                )
                < 5
            )


@pytest.mark.parametrize("text", [False, True])
def test_an_untested_class_is_in_every_set_unless_its_name_ranks_it(text):
    features, labels = photos(0, 17)
    single = slice(0, 4 * 17 + 1)  # one eel
    names = [*NAMES, "fly"] if text else NAMES
    index = fitted(features[single], labels[single], names, np.eye(12)[:6] if text else None)
    matched = [one for one in index.classify(photos(1, 20)[0], coverage=0.8) if not one.no_match]
    assert all("eel" in one.set for one in matched) != text
    cautions = list(index.sets(Ask(coverage=0.8)).cautions(names))
    assert [
        "1 class has no photo that could be held out" in line and "eel" in line for line in cautions
    ] == [True][text:]


def test_only_photos_that_were_drawn_at_random_count_in_label(tmp_path):
    picked = ["random" if i % 3 else "suggested" for i in range(60)]
    train = source(tmp_path / "t.parquet", *photos(0, 12), picked=picked)
    rows = build_index(train, tmp_path / "i", Reader()).scores.rows
    assert len(rows) == 40
    assert 0.8 < rows[:, 1].sum() <= 1


def change(place, how, tmp_path):
    """Change an index in a way that does not fit it again."""
    more = (photos(5, 1)[0][:1], ["fly"] if how == "class" else ["ant"], ["new"])
    if how in ("add", "class"):
        changes.add(place, source(tmp_path / "more.parquet", *more), Reader())
    elif how == "remove":
        changes.remove(place, key_ids=[3])
    elif how == "relabel":
        changes.relabel(place, "dog", key_ids=[3])
    elif how == "merge":
        changes.rename(place, "ant", "bee")
    else:
        changes.configure(place, **how)


STALE = [
    "add",
    "class",
    "remove",
    "relabel",
    "merge",
    {"temperature": 3.0},
    {"alpha": 0.5},
    {"k": 5},
]


@pytest.mark.parametrize("kind", ["folder", "lance"])
def test_sets_need_another_fit_after_a_change(tmp_path, kind):
    place = made(tmp_path, kind)
    copy = made(tmp_path, "lance" if kind == "folder" else "folder", "copy")
    build_index(source(tmp_path / "t.parquet", *photos(0, 12)), place, Reader())
    features = photos(1, 10)[0]

    def sets(where=place):
        return [one.set for one in at(where).load().classify(features, coverage=0.9)]

    first = sets()
    assert at(place).manifest().files["scores"].rows == 60
    for how in STALE:
        change(place, how, tmp_path)
        with pytest.raises(UsageError, match="or fit again"):
            sets()
        assert "scores" not in at(place).manifest().files
        changes.rollback(place, 1)
        assert sets() == first
    changes.rename(place, "ant", "formica")
    assert [
        own and ["ant" if name == "formica" else name for name in own] for own in sets()
    ] == first
    changes.clone(place, copy)
    opened = pickle.loads(pickle.dumps(at(place).load()))
    assert sets() == sets(copy) == [one.set for one in opened.classify(features, coverage=0.9)]
    change(place, "relabel", tmp_path)
    fit_index(place)
    assert len(sets()) == len(first)
    changes.add(
        place,
        source(tmp_path / "more.parquet", *photos(5, 4), [f"new {i}" for i in range(20)]),
        Reader(),
    )
    assert at(place).manifest().files["scores"].rows == 80  # so many new photos fit the index again
    changes.configure(place, beta=2.0)  # also fits again
    assert len(sets()) == len(first)
    at(place).verify()
