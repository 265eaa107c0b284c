"""Comparisons of two indexes on the same photos, checked against NumPy and SciPy, and the choice of an encoder."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import failed, fitted, json_of, json_rows, ok
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from PIL import Image
from tables import read_features, tiny, unit, unit_rows, write_table

from retrieval_tip import Index, Reader, build_index, load_backbone, open_source
from retrieval_tip.backbones import catalogue
from retrieval_tip.data.sources import open_items
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation.compare import Side, compare, mcnemar
from retrieval_tip.index.encoders import EncoderTrial, recommended

NAMES = ["cat", "sea horse", "owl", "ant"]
CENTRES = unit_rows(4, 12, 3)


def rows_around(ids, seed, spread=0.35):
    return unit(CENTRES[ids] + spread * unit_rows(len(ids), 12, seed) * 3)


def side(name, names, each, seed):
    """Return a side with a fitted index of the named classes. Their spelling may differ from ``NAMES``."""
    known = [NAMES.index(own.replace("_", " ").lower()) for own in names]
    cache = fitted(
        Index.from_features(
            rows_around(np.repeat(known, each), seed),
            [own for own in names for _ in range(each)],
            names,
        )
    )
    return Side(name, cache, Reader())


@pytest.fixture
def sides():
    return side("few", ["ant", "cat", "Sea_Horse"], 3, 1), side("many", NAMES, 6, 2)


@pytest.fixture
def table(tmp_path):
    ids = default_rng(0).integers(0, 4, 90)
    return write_table(tmp_path / "test.parquet", rows_around(ids, 7, 0.5), [NAMES[i] for i in ids])


def test_the_figures_match_plain_counting(sides, table):
    stats = pytest.importorskip("scipy.stats")
    found = compare(*sides, open_source(table))
    features, labels = read_features(table)
    answers = []
    for own in sides:
        names = np.array([name.replace("_", " ").lower() for name in own.index.class_names])
        answers.append(names[own.index.logits(features).argmax(1).numpy()])
    no_match = sides[0].index.classify(features).to_arrow()["no_match"].to_numpy()
    answers[0] = np.where(no_match & (labels == "owl"), "no match", answers[0])
    right = [(answer == labels) | (answer == "no match") for answer in answers]
    assert [own.top1 for own in found.evaluations] == pytest.approx([part.mean() for part in right])
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    assert list(found.alone) == only
    assert min(only) > 0
    for own, part in zip(found.evaluations, right, strict=True):
        expected = stats.binomtest(int(part.sum()), len(part)).proportion_ci(0.95, "wilson")
        assert own.interval == pytest.approx((expected.low, expected.high), abs=1e-3)
    assert found.p_value == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    differ = np.flatnonzero(answers[0] != answers[1])
    rows = found.differences.to_pylist()
    assert [row["input"] for row in rows] == [f"item-{i}" for i in differ]
    for row, i in zip(rows, differ, strict=True):
        winner = "A" if right[0][i] else "B" if right[1][i] else "neither"
        assert tuple(row.values())[1:] == (labels[i], answers[0][i], answers[1][i], winner)
    owls = (labels == "owl").sum()
    recognised = (answers[0] == "no match").sum()
    assert 0 < recognised < owls
    few, many = found.evaluations
    assert (few.unknown, many.unknown) == ({"owl": owls}, {})
    assert (few.unknown_no_match, many.unknown_no_match) == (recognised / owls, None)
    assert (
        f'(owl); {recognised} of {owls} photos got "no match", which is right. On the other photos, few '
        in str(found)
    )
    assert few.known_top1 == pytest.approx(right[0][labels != "owl"].mean())


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_the_exact_binomial_test(a, b):
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(a, b) == pytest.approx(
        stats.binomtest(a, a + b).pvalue if a + b else 1, rel=1e-9
    )


def test_without_labels_only_the_differences_are_listed(sides, table, tmp_path):
    features, _ = read_features(table)
    bare = write_table(tmp_path / "bare.parquet", features)
    found = compare(*sides, open_items(bare))
    known = compare(*sides, open_source(table))
    assert (found.evaluations, found.p_value) == (None, None)
    assert set(found.differences["input"].to_pylist()) <= set(
        known.differences["input"].to_pylist()
    )
    assert "no match" not in found.differences["answer_a"].to_pylist()
    assert "sea horse" not in found.differences["answer_b"].to_pylist()  # spelled as in A
    assert set(found.differences["right"].to_pylist()) == {None}
    differ = len(found.differences)
    assert (
        str(found)
        == f"few and many classify 90 photos. They give different answers to {differ} photos."
    )


def test_shots_and_names_that_differ_in_case_count_as_in_an_evaluation(sides, table, tmp_path, run):
    features, labels = read_features(table)
    few = sides[0].index
    rows = np.concatenate([features, few.keys[:5]])
    own_labels = few.labels["label"].to_pylist()[:5]
    ids = [f"item-{i}" for i in range(90)] + few.labels["source"].to_pylist()[
        :5
    ]  # five shots of one index
    odd = [label.upper() if i % 3 else label for i, label in enumerate([*labels, *own_labels])]
    mixed = write_table(tmp_path / "mixed.parquet", rows, odd, ids)
    plain = write_table(tmp_path / "plain.parquet", rows, [*labels, *own_labels], ids)
    for own in sides:
        own.index.save(tmp_path / own.name)
    facts = json_of("compare", tmp_path / "few", tmp_path / "many", mixed)
    for letter, own, held_out in zip("ab", sides, (5, 0), strict=True):
        found, same = (json_of("evaluate", tmp_path / own.name, one) for one in (mixed, plain))
        assert found["held_out"] == held_out
        for name in (
            "top1",
            "held_out",
            "known_top1",
            "known_no_match",
            "unknown_no_match",
            "auroc",
        ):
            assert facts[f"{name}_{letter}"] == found[name] == same[name]
    said = f"5 of 95 photos are shots of {tmp_path / 'few'}; each was classified without itself."
    assert said in run("compare", tmp_path / "few", tmp_path / "many", mixed).stdout
    assert ([*facts["unknown_a"]], facts["unknown_b"]) == (["OWL"], {})
    assert {row["label"] for row in facts["differences"]} <= set(
        map(str.upper, NAMES)
    )  # one spelling of each class


def test_photos_that_cannot_be_compared_are_reported(sides, table, tmp_path):
    features, labels = read_features(table)
    for own, named in ((["zebra"] * 90, "unknown label: zebra"), ([*labels[:-1], None], "row 89")):
        with pytest.raises(InputError, match=f"odd.parquet: .*{named}"):
            compare(*sides, open_items(write_table(tmp_path / "odd.parquet", features, own)))
    with pytest.raises(InputError, match="no items"):
        compare(*sides, open_source(table).take([]))


def test_the_command_prints_the_comparison(sides, table, tmp_path, run):
    for own in sides:
        own.index.save(tmp_path / own.name)
    found = compare(*sides, open_source(table))
    folders = tmp_path / "few", tmp_path / "many"
    done = run("compare", *folders, table)
    first, heading, *lines = done.stdout.splitlines()
    assert (done.exit_code, heading.split()) == (
        0,
        ["input", "label", "answer_a", "answer_b", "right"],
    )
    assert first == str(found).replace("few", str(folders[0])).replace("many", str(folders[1]))
    assert len(lines) == len(found.differences)
    facts = json_of("compare", *folders, table)
    assert facts["differences"] == found.differences.to_pylist()
    assert (facts["top1_a"], facts["p_value"]) == (found.evaluations[0].top1, found.p_value)
    assert run("compare", folders[0], table).exit_code == 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of coloured noise images with one unreadable file, and two encoders."""
    place = tmp_path_factory.mktemp("photos")
    draw = default_rng(0)
    for name, colour in (("red", (200, 60, 60)), ("green", (60, 200, 60)), ("blue", (60, 60, 200))):
        (place / "test" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(draw.normal(colour, 90, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / "test" / name / f"{i}.png")
    (place / "test/red/broken.png").write_bytes(b"no image")
    return place, [
        f"local-dir:{tiny(place / name, seed)}" for name, seed in (("one", 0), ("two", 1))
    ]


def test_models_try_compares_the_encoders_on_this_machine(photos, tmp_path, run, monkeypatch):
    place, models = photos
    here = []
    monkeypatch.setattr(catalogue, "cached", lambda: iter(here))
    none = run("models --try", place / "test")
    assert (none.exit_code, none.stdout, "--model" in none.stderr) == (2, "", True)
    assert run("models --model", models[0]).exit_code == 2
    features = write_table(tmp_path / "features.parquet", unit_rows(4, 8), ["a", "a", "b", "b"])
    failed(
        run("models --try", features, "--model", models[0]),
        2,
        "features.parquet: has the features of one",
    )
    here.append(models[0])
    one = run("models --try", place / "test", "--format", "json")
    failed(one, 3, "only one encoder")
    other = f"{models[1]}@{models[1].removeprefix('local-dir:')}/open_clip_model.safetensors"
    done = run("models one --try", place / "test", "--model", other, "--format", "json")
    rows = json_rows(done)
    pairs = [f"{other}+{models[0]}", f"{models[0]}+{other}"]
    assert [row["encoder"] for row in rows] in ([other, models[0], pair] for pair in pairs)
    alone = json.loads(one.stdout)
    assert alone == rows[1] | {"images_per_second": alone["images_per_second"], "recommended": True}
    assert sum(row["recommended"] for row in rows) == 1
    built = build_index(
        open_source(place / "test"), tmp_path / "i", Reader(load_backbone(models[0], device="cpu"))
    )
    fit = built.provenance["fit"]
    assert (rows[1]["accuracy"], [rows[1]["low"], rows[1]["high"]]) == (
        fit["both"],
        fit["interval_95"],
    )


def test_models_try_takes_several_models_in_any_order(shared, tmp_path, run, monkeypatch):
    """A folder and a file of weights are joined in both orders, and an encoder with two names is tried once."""
    for name in ("okapi", "pizza"):
        files = sorted((shared / "data/caltech101/101_ObjectCategories" / name).iterdir())[:4]
        (tmp_path / "photos" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, tmp_path / "photos" / name)
    weights = tmp_path / "lite0+.pt"
    here = tmp_path / catalogue.DEMO[0]
    torch.save(timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict(), weights)
    here.parent.mkdir(parents=True)
    shutil.copy(weights, here)  # an encoder of this machine
    monkeypatch.chdir(tmp_path)
    one = f"local-dir:{shared / 'models/lit-mini'}"
    two = f"timm:tf_efficientnet_lite0@{weights}"
    asked = [("--model", one, "--model", two), ("--model", f"{two}+{one}")]
    for models in asked:
        done = run("models --try", tmp_path / "photos", *models, "--format", "json")
        tried = [json.loads(line)["encoder"] for line in done.stdout.splitlines()]
        assert (done.exit_code, done.stderr.count("was tried under another name"), len(tried)) == (
            0,
            1,
            3,
        ), done.stderr
        assert {*tried[:2]} == {one, two}
        assert tried[2] in (f"{one}+{two}", f"{two}+{one}")
    for models in ([f"{one}+{two}"], [f"{two}+{one}"], [two, one]):
        typed = [word for model in models for word in ("--model", model)]
        done = ok("index build", tmp_path / "photos", "--out", tmp_path / "index", *typed)
        parts = Index.load(tmp_path / "index").parts
        assert [part.identity.model.partition(":")[0] for part in parts] == re.findall(
            "local-dir|timm", str(models)
        )


@pytest.mark.parametrize(
    ("others", "speed", "best"),
    [
        (88, 3.0, "other"),
        (88, 1.4, "first"),
        (70, 3.0, "first"),
        (91, 0.1, "first"),
        (91, 0.8, "other"),
    ],
)
def test_a_faster_encoder_is_recommended_if_it_is_not_significantly_worse(others, speed, best):
    right = {
        "first": {i: i < 90 for i in range(100)},
        "other": {i: i < others for i in range(3, 103)},
    }
    right["other"][200] = True  # the first encoder could not read this photo
    trials = [
        EncoderTrial(name, share / 100, (0, 1), per_second, right[name])
        for name, share, per_second in (("first", 90, 10.0), ("other", others, 10 * speed))
    ]
    assert recommended(trials).name == best
    assert recommended(trials[::-1]).name == best
