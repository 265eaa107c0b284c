"""The benchmark of both engines at a toy size; Ray's own part of it is what test_ray.py starts already."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import distributed
from made import Made

pytestmark = pytest.mark.soak


def test_its_queries_are_a_feature_table_and_the_same_each_time(tmp_path, run):
    made = Made(5, 16, 0)
    distributed.write_queries(tmp_path / "queries.parquet", made, 100)
    distributed.write_queries(tmp_path / "again.parquet", made, 100)
    assert pq.read_table(tmp_path / "queries.parquet").equals(pq.read_table(tmp_path / "again.parquet"))
    index = distributed.write_index(tmp_path, made)
    done = run("classify", index, tmp_path / "queries.parquet", "--format", "csv")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 101


def test_memory_is_told_by_quarters_of_the_time_in_which_answers_come():
    watched = distributed.Watched(9.0, times=[float(t) for t in range(10)], worker=[0, 0, *[1] * 8])
    values = [distributed.MIB * v for v in (9, 9, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert distributed.quarters(watched, values, "ray", 0.0) == (2.0, 4.0, 9.0)
    assert distributed.quarters(watched, values, "local", 2.0) == (2.0, 4.0, 9.0)


def test_answers_are_compared_input_by_input(tmp_path):
    rows = pa.table({"input": list("abcd"), "label": list("xxyy")})
    pq.write_table(rows, tmp_path / "one.parquet")
    pq.write_table(rows.slice(0, 2), tmp_path / "a.parquet")
    pq.write_table(pa.table({"input": ["c", "d"], "label": ["y", "x"]}), tmp_path / "b.parquet")
    one = pq.ParquetFile(tmp_path / "one.parquet")
    assert distributed.agreement(one, [tmp_path / "a.parquet", tmp_path / "b.parquet"]) == pytest.approx(0.75)
    with pytest.raises(Exception, match="other inputs"):
        distributed.agreement(one, [tmp_path / "b.parquet", tmp_path / "a.parquet"])
    one.close()


def test_a_failure_is_said(tmp_path):
    with pytest.raises(Exception, match=": 7: broken"):
        distributed.watch(sys.executable, "-c", "import sys; sys.stderr.write('broken'); sys.exit(7)")
    found = distributed.watch(sys.executable, "-c", "import time; time.sleep(0.6)")
    assert found.seconds > 0.5
    assert np.isfinite(found.own).all()
