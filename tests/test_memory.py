"""Building from a large feature table holds FAISS's copy of the keys and the mapped file, and a fit the points too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from retrieval_tip import CacheModel

ROWS, DIM = 200_000, 256
FEATURES = ROWS * DIM * 4 / 2**30

pytestmark = [pytest.mark.soak, pytest.mark.skipif(sys.platform == "win32", reason="SKIPPED: needs wait4")]


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    """The benchmark, whose small form this is."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmarks_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("layout", "fit", "most"),
    [("streamed", "none", 3), ("one compressed row group", "none", 3), ("streamed", "auto", 4.5)],
)
def test_build_holds_no_further_copy_of_the_features(
    memory: ModuleType, tmp_path: Path, layout: str, fit: str, most: float
) -> None:
    """A fit has the keys in the metric too; the index is over them alone."""
    table = tmp_path / "table.parquet"
    memory.write_table(table, ROWS, DIM)
    if layout != "streamed":  # what pyarrow and pandas write unless told otherwise
        pq.write_table(pq.read_table(table), table)
        assert pq.ParquetFile(table).metadata.num_row_groups == 1
    memory.write_table(tmp_path / "small.parquet", memory.CLASSES, DIM)
    base, _ = memory.build(tmp_path / "small.parquet", tmp_path / "small", ["--fit", fit])
    peak, _ = memory.build(table, tmp_path / "index", ["--fit", fit])
    assert CacheModel.load(tmp_path / "index", device="cpu").n == ROWS
    assert FEATURES < peak - base < most * FEATURES


def test_peak_memory_is_the_command_s_own(memory: ModuleType, tmp_path: Path) -> None:
    """Linux counts as a child's peak also what its parent held at the fork; here that is a whole GiB."""
    held = bytearray(b"x") * (1 << 30)
    memory.write_table(tmp_path / "small.parquet", memory.CLASSES, 8)
    peak, seconds = memory.build(tmp_path / "small.parquet", tmp_path / "small", [])
    assert 0.05 < peak < len(held) / 2**30
    assert seconds > 0


def test_benchmark_prints_its_figures_and_fails_above_the_limit(
    memory: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memory.py", "--folder", str(tmp_path), "--rows", "2000", "--dim", "8", "--limit", "0.01"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"above the limit of 0\.01 GiB"):
        memory.main()
    printed = capsys.readouterr().out
    for part in ("date ", "machine ", "versions ", "2,000 x 8 float32", "keys 64,128", "time ", "peak memory "):
        assert part in printed
    assert not list(tmp_path.iterdir())  # the temporary folder is gone
