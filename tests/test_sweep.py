"""Sweeps over shots, seeds and methods: draws, methods, resuming, intervals, and unused test labels."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import unit_rows, write_table
from test_search_hp import C, D, clusters

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.shots import few_shot
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.evaluation import sweep
from retrieval_tip.fit import closed_form
from retrieval_tip.settings import Settings

NAMES = [f"class {i}" for i in range(C)]


@pytest.fixture
def pool():
    keys, ids = clusters(60, C, D, 1)
    return CacheModel.from_features(
        keys, ids, NAMES, unit_rows(C, D, 5), settings=Settings(logit_scale=10.0), device="cpu"
    )


@pytest.fixture
def test_items():
    return sweep.Items(*clusters(80, C, D, 2), "test")


def rows_of(pool, items, path, **options):
    options = {"shots": [1, 4], "seeds": [1, 2]} | options
    return list(sweep.sweep(pool, "digest", items, path, **options))


def test_shots_are_drawn_from_the_pool_by_the_published_rule(pool):
    drawn = sweep.draw(pool, 3, 7)
    labels = [i % C for i in range(60)]
    assert sorted(drawn.labels["key_id"].to_pylist()) == sorted(few_shot(labels, 3, 7))
    source = {key: row for row, key in enumerate(pool.labels["key_id"].to_pylist())}
    for key, row in zip(drawn.labels["key_id"].to_pylist(), drawn.keys, strict=True):
        np.testing.assert_array_equal(row, pool.keys[source[key]])


def test_each_run_is_one_row_with_the_accuracy_of_its_method(pool, test_items, tmp_path):
    rows = rows_of(pool, test_items, tmp_path / "r.parquet")
    assert len(rows) == 2 * 2 * len(sweep.PLAIN)
    assert pq.read_table(tmp_path / "r.parquet").to_pylist() == rows
    for row in rows:
        assert row["parameters_trained"] == 0
        assert row["seconds"] > 0
        if row["method"] in ("closed-form", "class-means"):
            continue
        drawn = sweep.draw(pool, row["shots"], row["seed"])
        drawn.settings = drawn.settings.override(alpha=row["alpha"], beta=row["beta"])
        terms = drawn.terms(test_items.features, row["k"] or None)
        text, alone = terms.text, terms.cache
        logits = alone if row["method"] == "cache-alone" else text + row["alpha"] * alone
        assert row["top1"] == pytest.approx((logits.argmax(1).numpy() == test_items.ids).mean())
    by_run = {(row["method"], row["shots"], row["seed"]): row for row in rows}
    assert by_run["paper-constants", 4, 1]["beta"] == 5.5
    assert by_run["zero-shot", 4, 1]["alpha"] == 0
    assert by_run["tip-adapter", 4, 1]["chosen_on"] == "its own shots, each held out in turn"
    assert by_run["tip-adapter", 1, 1]["chosen_on"] == "the shots' affinities"  # a single image cannot be held out


def test_a_fine_tuned_pool_is_swept_without_the_closed_form(pool, test_items, tmp_path):
    pool.curve = pa.table({"epoch": [1]})
    rows = rows_of(pool, test_items, tmp_path / "r.parquet", shots=[4], seeds=[1])
    assert [row["method"] for row in rows] == [method for method in sweep.PLAIN if method != "closed-form"]
    with pytest.raises(InputError, match="fine-tuned"):
        rows_of(pool, test_items, tmp_path / "r.parquet", shots=[4], seeds=[1], methods=["closed-form"])


def test_baselines_and_closed_form_are_fitted_to_the_drawn_shots(pool, test_items, tmp_path):
    methods = ["closed-form", "class-means", "linear-probe"]
    rows = rows_of(pool, test_items, tmp_path / "r.parquet", methods=methods)
    for row in rows:
        drawn = sweep.draw(pool, row["shots"], row["seed"])
        if row["method"] == "closed-form":
            closed_form.fit(drawn)
            answering = drawn
            assert (row["alpha"], row["beta"], row["k"]) == (drawn.settings.alpha, drawn.settings.beta, 0)
        else:
            answering = sweep.LINEAR[row["method"]](drawn)
            assert row["alpha"] is row["beta"] is row["k"] is None
        right = answering.logits(test_items.features).argmax(1).numpy() == test_items.ids
        assert row["top1"] == pytest.approx(right.mean())
        assert row["parameters_trained"] == (C * (D + 1) if row["method"] == "linear-probe" else 0)
    chosen = {(row["method"], row["shots"]): row["chosen_on"] for row in rows}
    assert chosen["closed-form", 1] == chosen["class-means", 4] == "nothing"
    assert chosen["closed-form", 4] == chosen["linear-probe", 4] == "folds of the shots"


def test_a_fit_to_the_pool_does_not_affect_drawn_shots(pool, test_items, tmp_path):
    rows = rows_of(pool, test_items, tmp_path / "a.parquet", seeds=[1])
    closed_form.fit(pool, closed_form.Fit(metric="within", values="solved"))
    assert pool.fitted is not None
    fitted = rows_of(pool, test_items, tmp_path / "b.parquet", seeds=[1])
    same = ("method", "shots", "top1", "top5", "alpha", "beta", "k")
    assert [[row[name] for name in same] for row in fitted] == [[row[name] for name in same] for row in rows]


def test_a_sweep_resumes_after_the_last_run(pool, test_items, tmp_path, monkeypatch):
    path = tmp_path / "r.parquet"
    runs = sweep.sweep(pool, "digest", test_items, path, shots=[1, 4], seeds=[1, 2])
    first = [next(runs) for _ in range(7)]
    runs.close()
    assert pq.read_table(path).num_rows == 7
    answered = []
    answer = sweep._answer
    monkeypatch.setattr(sweep, "_answer", lambda *a: answered.append(1) or answer(*a))
    rows = rows_of(pool, test_items, path)
    assert rows[:7] == first
    assert len(answered) == len(rows) - 7
    assert rows_of(pool, test_items, path) == rows
    assert len(answered) == len(rows) - 7


def test_only_the_paper_protocol_uses_all_validation_items(pool, test_items, tmp_path):
    val = sweep.Items(*clusters(50, C, D, 3), "val")
    rows = rows_of(pool, test_items, tmp_path / "h.parquet", val=val, methods=["tip-adapter"])
    assert {row["chosen_on"] for row in rows} == {"val, 1 a class", "val, 4 a class"}
    rows = rows_of(pool, test_items, tmp_path / "p.parquet", val=val, methods=["tip-adapter"], protocol="paper")
    assert {row["chosen_on"] for row in rows} == {"val"}
    assert all(row["protocol"] == "paper" and row["alpha"] <= 3 and row["beta"] <= 7 for row in rows)


def test_poisoned_test_labels_change_no_setting(pool, test_items, tmp_path):
    poisoned = sweep.Items(test_items.features, (test_items.ids + 1) % C, "test")
    a = rows_of(pool, test_items, tmp_path / "a.parquet")
    b = rows_of(pool, poisoned, tmp_path / "b.parquet")
    assert [row["top1"] for row in a] != [row["top1"] for row in b]
    for name in ("alpha", "beta", "k", "chosen_on"):
        assert [row[name] for row in a] == [row[name] for row in b]


def test_intervals_use_students_t_distribution():
    rows = [{"method": "m", "shots": 4, "top1": value} for value in (0.5, 0.6, 0.7)]
    (line,) = sweep.summary(rows)
    assert line["top1"] == pytest.approx(0.6)
    assert line["half"] == pytest.approx(4.303 * 0.1 / np.sqrt(3))
    assert sweep.summary(rows[:1])[0]["half"] is None
    many = [{"method": "m", "shots": 4, "top1": i / 100} for i in range(20)]
    assert sweep.summary(many)[0]["half"] == pytest.approx(1.96 * np.std(np.arange(20) / 100, ddof=1) / np.sqrt(20))


def test_a_bad_sweep_is_refused(pool, test_items, tmp_path):
    for options in ({"methods": ["x"]}, {"protocol": "x"}, {"protocol": "paper"}):
        with pytest.raises(UsageError):
            rows_of(pool, test_items, tmp_path / "r.parquet", **options)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no")
    for name in ("other.parquet", "text.parquet"):
        with pytest.raises(InputError, match=name):
            rows_of(pool, test_items, tmp_path / name)


def test_sweep_works_as_a_command(run, tmp_path):
    keys, ids = clusters(60, C, D, 1)
    train = write_table(tmp_path / "train.parquet", keys, [NAMES[i] for i in ids])
    features, ids = clusters(40, C, D, 2)
    test = write_table(tmp_path / "test.parquet", features, [NAMES[i] for i in ids])
    text = write_table(tmp_path / "text.parquet", unit_rows(C, D, 5), NAMES)
    assert run("index", "build", train, "--text", text, "--out", tmp_path / "i").exit_code == 0
    options = ("--shots", 2, "--shots", 4, "--seeds", 2, "--results", tmp_path / "r.parquet")
    done = run("sweep", tmp_path / "i", test, *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].split() == ["method", "shots", "seeds", "top1", "half"]
    lines = [json.loads(line) for line in run("sweep", tmp_path / "i", test, *options, "--json").stdout.splitlines()]
    assert len(lines) == 2 * 2 * len(sweep.PLAIN)
    assert pq.read_table(tmp_path / "r.parquet").to_pylist() == lines
    assert run("sweep", tmp_path / "i", test, "--shots", 2).exit_code == 2
    paper = ("--protocol", "paper", "--results", tmp_path / "p.parquet", "--shots", 2)
    assert "give --val" in run("sweep", tmp_path / "i", test, *paper).stderr
    assert run("sweep", tmp_path / "i", test, *paper, "--val", test).exit_code == 0
