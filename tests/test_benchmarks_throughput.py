"""The throughput benchmark at a toy size: every table is there, its numbers make sense, and Parquet says the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, needs_shared

pytestmark = pytest.mark.soak

SCRIPT = ROOT / "benchmarks" / "throughput.py"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("made", ROOT / "benchmarks" / "made.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(*options: object) -> str:
    """Its output. One thread: many that wait for each other would take longer than the sums."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict]]:
    """Output and rows of a run without real features."""
    folder = tmp_path_factory.mktemp("throughput")
    out = folder / "rows.parquet"
    sizes = ("--exact-size", "512x64x32", "--sizes", "2560x64x64", "--sizes", "640x64x64", "--sizes", "2560x32x64")
    sizes += ("--files-size", "640x64x64", "--rows", "500", "--against", ROOT)
    printed = run(*sizes, "--queries", 64, "--large-batch", 128, "--rounds", 1, "--data", folder, "--out", out)
    return printed, pq.read_table(out).to_pylist()


def of(rows: list[dict], **expected: object) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in expected.items())]


def test_the_command_takes_turns_with_that_of_another_checkout(toy: tuple[str, list[dict]]) -> None:
    printed, rows = toy
    found = of(rows, section="files")
    assert [row["way"] for row in found] == [
        f"classify{how}{other}" for how in ("", " --explain", " --format json") for other in ("", " (against)")
    ]
    assert all(row["queries"] == 500 and row["n"] == 640 for row in found)
    assert [row["ratio_against"] for row in found[1::2]] == [1.0] * 3
    assert printed.count("rows/s") == 6


def test_the_machine_comes_first_and_is_in_every_row(toy: tuple[str, list[dict]]) -> None:
    printed, rows = toy
    for part in ("torch", "faiss", "1 threads", "device cpu", "seed 0", rows[0]["cpu"], rows[0]["date"]):
        assert part in printed.splitlines()[0]
    assert all(row["device"] == "cpu" and "torch" in row["versions"] and row["threads"] == 1 for row in rows)


def test_exact_rows_agree_with_each_other(toy: tuple[str, list[dict]]) -> None:
    rows = of(toy[1], section="exact", n=512, d=64, c=32)
    plain, bare, exact, halved, bare_halved = rows
    assert [row["precision"] for row in rows] == ["float32", "float32", "float32", "bfloat16", "bfloat16"]
    assert plain["ratio_dense"] == 1 == bare["ratio_gemm"]
    assert bare["agreement"] is bare_halved["agreement"] is None
    assert exact["agreement"] == 1
    assert exact["difference"] < 1e-5
    assert plain["difference"] < 1e-3  # logits are about 30
    assert plain["agreement"] >= 0.98
    assert halved["difference"] < 0.3
    assert exact["ratio_gemm"] == pytest.approx(exact["microseconds"] / bare["microseconds"])
    assert exact["ratio_dense"] == pytest.approx(plain["microseconds"] / exact["microseconds"])


def test_retrieval_has_every_index_with_the_tail_and_without(toy: tuple[str, list[dict]]) -> None:
    printed, rows = toy
    rows = of(rows, section="retrieval", n=2560, d=64)
    assert of(rows, way="all")[0]["agreement"] == 1
    assert of(rows, way="(a) plain dense")[0]["agreement"] >= 0.98
    auto = of(rows, way="auto", index="Classes", k=320)
    assert [row["tail"] for row in auto] == [True, False]
    assert auto[0]["queries"] == auto[0]["batch"] == 64
    assert auto[0]["agreement"] >= 0.95
    assert of(rows, way="auto, single")[0]["batch"] == 1
    assert of(rows, way="auto, large batch")[0]["batch"] == 128
    for factory in ("Flat", "IVF32,Flat", "IVF32,PQ8,RFlat", "HNSW32"):
        found = of(rows, way="k", index=factory)
        assert [(row["k"], row["tail"]) for row in found] == [
            (k, tail) for k in (16, 64, 256) for tail in (True, False)
        ]
        assert factory in printed
    for row in rows:
        assert row["microseconds"] > 0
        assert row["batch"] in (1, 128) or (0 <= row["agreement"] <= 1 and 0 <= row["accuracy"] <= 1)
        assert (row["search_share"] is not None) == (row["k"] is not None and row["batch"] != 128)


def test_others_run_once_a_number_of_keys(toy: tuple[str, list[dict]]) -> None:
    assert not of(toy[1], section="retrieval", n=2560, d=32, way="k")
    assert of(toy[1], section="retrieval", n=640, d=64, way="k", index="Flat")


def test_growth_compares_the_most_keys_with_the_fewest(toy: tuple[str, list[dict]]) -> None:
    printed, rows = toy
    batched, single, large = of(rows, section="growth")
    (few,), (many,) = (of(rows, section="retrieval", way="auto", n=n, d=64)[:1] for n in (640, 2560))
    assert batched["growth"] == pytest.approx(many["microseconds"] / few["microseconds"])
    assert (single["way"], large["way"]) == ("auto, single", "auto, large batch")
    assert "640 to 2,560 keys (4.0 x)" in printed


def test_the_tables_have_the_rows_of_the_file(toy: tuple[str, list[dict]]) -> None:
    printed, rows = toy
    lines = [
        line
        for line in printed.splitlines()
        if line.startswith(("(a)", "(b)", "exact,", "all ", "auto", "k ", "growth"))
    ]
    assert len(lines) == len(rows) - len(of(rows, section="files"))  # whose lines are counted above


def test_real_features_that_are_not_there_are_skipped(toy: tuple[str, list[dict]]) -> None:
    printed, rows = toy
    assert printed.count(": skipped, no ") == 2
    assert not of(rows, section="real")


@needs_shared
def test_real_features(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "clip-food9").symlink_to(shared / "data" / "clip-food9")
    out = tmp_path / "rows.parquet"
    printed = run("--only", "real", "--rounds", 1, "--data", tmp_path, "--out", out)
    rows = pq.read_table(out).to_pylist()
    assert "Caltech101: skipped" in printed
    for name, n in (("clip-food9, 16 shots", 144), ("clip-food9, all keys", 1800)):
        found = of(rows, section="real", data=name, n=n, c=9)
        ks = {k for k in (16, 64, 256) if k < n}
        assert {row["k"] for row in found if row["index"] == "Flat"} == ks
        assert {row["k"] for row in found if row["index"] == "Classes"} == ks | {n // 9, n * 2 // 9, n * 4 // 9}
        assert all(row["agreement"] >= 0.95 and row["accuracy"] >= 0.95 for row in found)
    assert of(rows, section="real", n=1800, index="Flat", k=256, tail=True)[0]["agreement"] >= 0.995


def test_made_features_are_unit_vectors_with_cosines_like_clip_s(made: ModuleType) -> None:
    world = made.Made(1000, 512)
    ids = np.arange(4000) % 1000
    keys, asked = world.draw(ids, 1), world.classes(1000, 2)
    queries = world.draw(asked, 3)
    for rows in (keys, queries, world.text):
        assert rows.dtype == np.float32
        assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    cosines, same = queries @ keys.T, asked[:, None] == ids
    assert cosines[same].mean() == pytest.approx(0.75, abs=0.03)
    assert cosines[~same].mean() == pytest.approx(0.52, abs=0.03)


def test_the_same_seed_makes_the_same_features(made: ModuleType) -> None:
    ids = np.arange(100) % 20
    first, again, other = made.Made(20, 32), made.Made(20, 32), made.Made(20, 32, seed=1)
    assert np.array_equal(first.draw(ids, 1), again.draw(ids, 1))
    assert np.array_equal(first.text, again.text)
    assert np.array_equal(first.classes(50, 2), again.classes(50, 2))
    assert not np.array_equal(first.draw(ids, 1), first.draw(ids, 2))
    assert not np.array_equal(first.draw(ids, 1), other.draw(ids, 1))
    assert not np.array_equal(first.text, other.text)


def test_made_features_in_float16(made: ModuleType) -> None:
    ids = np.arange(made.ROWS + 10) % 20
    world = made.Made(20, 32)
    rows = world.draw(ids, 1, np.float16)
    assert rows.dtype == np.float16
    assert np.array_equal(rows, world.draw(ids, 1).astype(np.float16))
