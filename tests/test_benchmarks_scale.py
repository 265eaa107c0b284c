"""The benchmark of large caches at a toy size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

pytestmark = [pytest.mark.soak, pytest.mark.skipif(sys.platform == "win32", reason="SKIPPED: needs wait4")]

TOY = ("--keys", "3000", "--dim", "64", "--classes", "50", "--queries", "40")


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def measures(path: Path, **expected: object) -> dict[str, float]:
    rows = pq.read_table(path).to_pylist()
    assert all(row[name] == value for row in rows for name, value in expected.items())
    assert all("torch" in row["versions"] for row in rows)
    return {row["measure"]: row["value"] for row in rows}


def test_a_large_cache_is_built_opened_and_asked(tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    result = run(*TOY, "--exact-queries", 20, "--folder", tmp_path, "--out", out)
    assert result.returncode == 0, result.stderr
    found = measures(out, section="large", n=3000, d=64, c=50, dtype="float16", index="Classes", k=480)
    printed = result.stdout.splitlines()
    assert "torch" in printed[0]
    assert printed[-2:] == ["index Classes, k 480", "within the limit of 24 GiB"]
    assert [line[:52].rstrip() for line in printed[2:-2]] == list(found)
    for process in ("building", "answering"):
        assert 0.05 < found[f"{process}, peak resident"] < 2
        if sys.platform == "linux":
            assert 0 < found[f"{process}, of it anonymous"] < found[f"{process}, peak resident"]
    assert found["file of keys"] == pytest.approx(3000 * 64 * 2 / 2**30, rel=0.01)
    assert {"file of index", "file of labels", "file of text", "feature table"} <= found.keys()
    assert 90 <= found["agreement with all keys, on them"] <= 100
    assert 0 <= found["accuracy"] <= 100
    assert min(found[name] for name in found if not name.startswith(("accuracy", "file"))) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows.parquet"}  # the tables are gone


def test_answers_are_compared_with_those_of_all_keys(tmp_path: Path) -> None:
    out, own = tmp_path / "rows.parquet", ("--queries", 1000, "--exact-queries", 1000, "--index", "Flat", "-k", 1)
    result = run(*TOY, *own, "--folder", tmp_path, "--out", out)
    assert result.returncode == 0, result.stderr
    assert measures(out)["agreement with all keys, on them"] < 100  # one key is not all


def test_more_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    result = run("--keys", 10**12, "--folder", tmp_path)
    assert result.returncode == 1
    assert "of free space are needed" in result.stderr


def test_memory_of_exact_classification_above_the_limit_is_exit_status_1(tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    result = run("--memory", *TOY, "--limit", 0.01, "--out", out)
    assert result.returncode == 1
    assert "above the limit of 0.01 GiB" in result.stderr
    found = measures(out, section="memory", n=3000, d=64, c=50, dtype="float32", index="Flat", k=None)
    assert found["inputs: keys, queries, text weights"] == pytest.approx((3000 + 40 + 50) * 64 * 4 / 2**30)
    assert 0.05 < found["peak resident beyond the inputs"] < found["peak resident"]
    assert found["interpreter and libraries: peak of 8 queries"] > 0.05
