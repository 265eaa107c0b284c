"""The benchmark of changes at a toy size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

pytestmark = pytest.mark.soak


def test_a_build_additions_and_removals_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    sizes = ("--keys", "6000", "--added", "20", "--dim", "32", "--classes", "40", "--times", "2")
    command = [sys.executable, ROOT / "benchmarks" / "living.py", *sizes, "--folder", tmp_path, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    rows = pq.read_table(out).to_pylist()
    assert {(row["n"], row["added"], row["d"], row["c"], row["index"]) for row in rows} == {
        (6000, 20, 32, 40, "Classes")
    }
    measures = [row["measure"] for row in rows]
    assert measures == [
        "build", "add", "remove 10 of those added", "remove 10 of the first", "open, fast", "open, full",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows)
    assert result.stdout.splitlines()[1] == "20 keys to 6,000 x 32, 40 classes, index Classes"
    assert [path for path in tmp_path.iterdir() if path != out] == []
