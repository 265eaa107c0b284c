"""benchmarks/accuracy.py: every method is a row, runs in parts are one table, and test labels choose nothing."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from click.testing import CliRunner
from conftest import ROOT
from tables import unit_rows, write_table
from test_search_hp import C, D, clusters

NAMES = [f"class {i}" for i in range(C)]


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("benchmarks_accuracy", ROOT / "benchmarks" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def made(tmp_path):
    """Tables where those of DTD would be."""
    place = tmp_path / "data/clip-vitb32/dtd"
    place.mkdir(parents=True)
    for name, number, seed in (("shots_1", C, 1), ("val", 8 * C, 2), ("test", 60, 3)):
        features, ids = clusters(number, C, D, seed)
        write_table(place / f"{name}.parquet", features, [NAMES[i] for i in ids])
    write_table(place / "text.parquet", unit_rows(C, D, 5), NAMES)
    return tmp_path


def table(accuracy, made, results, *options):
    arguments = ["--shared", made, "--dataset", "dtd", "--seeds", 2, "--results", results, *options]
    done = CliRunner().invoke(accuracy.main, [str(argument) for argument in arguments], catch_exceptions=False)
    return done.stdout, [json.loads(line) for line in results.read_text().splitlines()]


def test_parts_become_one_table_with_a_row_of_each_method(accuracy, made, tmp_path):
    results = tmp_path / "r.jsonl"
    table(accuracy, made, results, "--shots", 1)
    text, rows = table(accuracy, made, results, "--shots", 1, "--shots", 4)
    assert [row["shots"] for row in rows] == [1] * 7 + [4] * 16  # of 1 shot there is one draw, and nothing to search on
    for method in accuracy.METHODS:
        of = [row for row in rows if (row["method"], row["shots"]) == (method, 4)]
        if method == accuracy.FINE_TUNED:
            assert not of
            continue
        line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
        assert line.split("|")[3].strip() == f"{50 * sum(row['top1'] for row in of):.1f}"
        assert all(0 <= row["ece"] <= 1 for row in of)
    points, told = accuracy.losses(rows)[0]
    best = max(accuracy.mean(rows, "top1", shots=4, method=method) for method in accuracy.RIVALS)
    assert points == pytest.approx(100 * (best - accuracy.mean(rows, "top1", shots=4, method=accuracy.DEFAULT)))
    assert text.splitlines()[-1] == f"| {points:.1f} | {told} |"


def test_labels_of_the_test_items_choose_nothing(accuracy, made, tmp_path, monkeypatch):
    found = []

    def scores(answering, items):
        found.append(answering.logits(items.features))
        return {"top1": 0.0, "ece": 0.0}

    monkeypatch.setattr(accuracy, "scores", scores)
    table(accuracy, made, tmp_path / "a.jsonl", "--shots", 2)
    features, ids = clusters(60, C, D, 3)
    write_table(made / "data/clip-vitb32/dtd/test.parquet", features, [NAMES[(i + 1) % C] for i in ids])
    table(accuracy, made, tmp_path / "b.jsonl", "--shots", 2)
    half = len(found) // 2
    assert half == 16
    assert all((a == b).all() for a, b in zip(found[:half], found[half:], strict=True))
