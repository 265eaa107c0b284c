"""Peak memory of ``index build`` from a large feature table. Exit status 1 where it is above the limit.

    python benchmarks/memory.py --folder /tmp      # 1,000,000 x 512 float32: 10 GB of disk, about two minutes

The table is made in a temporary folder below --folder, which is removed afterwards. Peak memory is the largest resident
set of the command's own process as the system counts it, memory-mapped pages included.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLASSES = 1000
SEED = 1
ROWS_AT_A_TIME = 8192


def write_table(path: Path, n: int, d: int) -> None:
    """Random unit vectors, made a block at a time; labels go round the classes, so that no class lies together."""
    rng = np.random.default_rng(SEED)
    schema = pa.schema([("id", pa.string()), ("label", pa.string()), ("feature", pa.list_(pa.float32(), d))])
    with pq.ParquetWriter(path, schema, use_dictionary=["label"], compression="none") as writer:
        for start in range(0, n, ROWS_AT_A_TIME):
            rows = range(start, min(start + ROWS_AT_A_TIME, n))
            features = rng.standard_normal((len(rows), d), dtype=np.float32)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            ids = pa.array([f"image {row}" for row in rows])
            labels = pa.array([f"class {row % CLASSES:04d}" for row in rows])
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), d)
            writer.write_table(pa.table([ids, labels, values], schema=schema))


LAUNCH = """
import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""
"""A small process between: Linux counts as a child's peak also what its parent held when it started the child."""


def build(table: Path, out: Path, options: list[str]) -> tuple[float, float]:
    """Run the command; its peak resident memory in GiB and its wall-clock seconds."""
    command = [str(Path(sys.executable).with_name("retrieval-tip")), "-q", "index", "build", str(table)]
    start = time.perf_counter()
    launched = [sys.executable, "-S", "-c", LAUNCH, *command, "--out", str(out), *options]
    output = subprocess.run(launched, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - start
    status, peak = map(int, output.splitlines()[-1].split())
    if status:
        raise SystemExit(f"index build failed with exit status {status}")
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30, seconds


def _machine() -> str:
    cpu, facts = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if facts.exists():
        names = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.system()} {platform.release()}, {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB memory"


def main() -> None:
    """Make the table, build from it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where there is space for five times the features")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--limit", type=float, default=7.5, help="GiB; more is exit status 1")
    parser.add_argument("options", nargs="*", help="further options of index build, after --")
    given = parser.parse_args()
    need = given.rows * given.dim * 4 * 5
    if shutil.disk_usage(given.folder).free < need:
        raise SystemExit(f"{given.folder}: {need / 2**30:.1f} GiB of free space are needed")
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-memory-", dir=given.folder) as name:
        table, out, small = Path(name) / "table.parquet", Path(name) / "index", Path(name) / "small.parquet"
        write_table(small, CLASSES, given.dim)
        base, _ = build(small, Path(name) / "small", given.options)
        write_table(table, given.rows, given.dim)
        peak, seconds = build(table, out, given.options)
        sizes = {path.name.partition("-")[0]: path.stat().st_size for path in sorted((out / "data").iterdir())}
        table_size = table.stat().st_size
    features = given.rows * given.dim * 4 / 2**30
    packages = ("retrieval-tip", "torch", "numpy", "pyarrow", "duckdb")
    faiss = next(p for p in ("faiss-gpu", "faiss-cpu") if _installed(p))
    print(f"date        {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")
    print(f"machine     {_machine()}")
    print(
        f"versions    Python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in (*packages, faiss))}"
    )
    print(f"command     index build table.parquet --out index {' '.join(given.options)}".rstrip())
    print(f"table       {given.rows:,} x {given.dim} float32, {CLASSES} classes, seed {SEED}: {table_size:,} bytes")
    print(f"index       {', '.join(f'{kind} {size:,}' for kind, size in sizes.items())} bytes")
    print(f"time        {seconds:.1f} s")
    print(f"peak memory {peak:.2f} GiB resident (features {features:.2f} GiB; {CLASSES} rows take {base:.2f} GiB)")
    if peak > given.limit:
        raise SystemExit(f"above the limit of {given.limit:g} GiB")
    print(f"within the limit of {given.limit:g} GiB")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
