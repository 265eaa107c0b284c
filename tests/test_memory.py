"""Peak memory of a build from a large table: FAISS's copy of the keys and a mapped file. A fit adds the points."""

import sys

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from retrieval_tip import Index

sys.path.insert(0, str(ROOT / "benchmarks"))

from common import PROGRAM, launch
from made import Made, write_tables

ROWS, DIM = 200_000, 256
FEATURES = ROWS * DIM * 4 / 2**30

pytestmark = pytest.mark.soak


def peak(folder, rows, dim, *options, compressed=False):
    """Return the peak resident memory in GiB of a build from a table of ``rows`` rows."""
    folder.mkdir()
    write_tables(folder, Made(1000, dim, 1), rows)
    table = folder / "table.parquet"
    if compressed:  # pyarrow and pandas write one row group by default
        pq.write_table(pq.read_table(table), table)
        assert pq.ParquetFile(table).metadata.num_row_groups == 1
    return launch(*PROGRAM, "-q", "index", "build", table, "--out", folder / "index", *options).peak


@pytest.mark.parametrize(
    ("compressed", "fit", "most"), [(False, "none", 3), (True, "none", 3), (False, "auto", 4.5)]
)
def test_a_build_holds_few_copies_of_the_features(tmp_path, compressed, fit, most):
    """A fit also holds the keys transformed by the metric, which the index contains instead of the raw keys."""
    base = peak(tmp_path / "small", 1000, DIM, "--fit", fit)
    found = peak(tmp_path / "large", ROWS, DIM, "--fit", fit, compressed=compressed)
    assert Index.load(tmp_path / "large" / "index").n == ROWS
    assert FEATURES < found - base < most * FEATURES


def test_peak_memory_excludes_the_parent_process(tmp_path):
    """Linux includes the parent's memory at the fork, here 1 GiB, in a child's peak."""
    held = bytearray(b"x") * (1 << 30)
    assert 0.05 < peak(tmp_path / "small", 1000, 8) < len(held) / 2**30
