"""The encoding benchmark at a toy size: it runs, and both sides give the same features."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import ROOT

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_encoding", ROOT / "benchmarks" / "encoding.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_plain_and_ours_give_the_same_features(benchmark, shared, lit_mini):
    paths = benchmark.chosen(shared / "data/caltech101", 6)
    expected = benchmark.plain(f"local-dir:{shared / 'models/lit-mini'}", None, "cpu", 4)(paths)
    for ours in (benchmark.ours(lit_mini), benchmark.ours(lit_mini, 3, reduce=False)):
        np.testing.assert_allclose(ours(paths), expected, atol=1e-5)


def test_the_command_prints_and_writes_a_row_a_side(benchmark, shared, tmp_path):
    out = tmp_path / "rows.parquet"
    places = ["--model", f"local-dir:{shared / 'models/lit-mini'}", "--folder", str(shared / "data/caltech101")]
    sizes = "--number 5 --large 2 --size 1600 1400 --rounds 1 --batch 2 --device cpu"
    result = CliRunner().invoke(benchmark.main, [*places, *sizes.split(), "--out", str(out)])
    assert result.exit_code == 0, result.output
    for expected in ("images/s", "x plain", "torch", "5 photographs", "reduced decoding", "goal"):
        assert expected in result.output
    rows = pq.read_table(out).to_pylist()
    assert [(row["photographs"], row["side"], row["precision"], row["batch"]) for row in rows] == [
        ("small", "plain loop", "float32", 64),
        ("small", "plain loop, small batches", "float32", 4),
        ("small", "ours", "float32", 16),
        ("small", "ours", "float32", 2),
        ("small", "ours", "bfloat16", 16),
        ("small", "ours", "bfloat16", 2),
        ("large", "plain loop", "float32", 64),
        ("large", "ours, whole decoding", "float32", 16),
        ("large", "ours, reduced decoding", "float32", 16),
    ]
    assert all(row["images_per_second"] > 0 and row["ratio"] > 0 for row in rows)
    cosines = [row["lowest_cosine"] for row in rows]
    assert min(cosines[:4] + cosines[6:8]) > 1 - 1e-5
    assert 0.99 < cosines[8] < 1 - 1e-6
