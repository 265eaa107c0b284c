"""Hostile input through the real command line: the right exit status, one clear line, and nothing written."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from click.types import FloatParamType, IntParamType, Tuple
from conftest import SOAK, few, with_code
from PIL import Image

from retrieval_tip import CacheModel
from retrieval_tip.backbones.base import Backbone, Identity
from retrieval_tip.cli import program as cli
from retrieval_tip.cli.parameters import K
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import IDENTITY_KEY
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import MAX_LINE
from retrieval_tip.index.build import build_index

D = 8
CLASSES = ["cat", "dog", "owl"]
IDENTITY = {"model": "ViT-B-32", "pretrained": "t", "weights": "sha256:0", "config": "sha256:1", "preprocess": {}}

Run = Callable[..., Result]


def rows(number: int, d: int = D, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=(number, d)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def changed(row: int, value: Any, at: int | None = None) -> list[Any]:
    """Six good rows, one of them (or one value of it) changed."""
    good: list[Any] = rows(6).tolist()
    if at is None:
        good[row] = value
    else:
        good[row][at] = value
    return good


def table(features: Any, labels: Any = None, ids: Any = None, kind: Any = None, **more: Any) -> pa.Table:
    column = features if isinstance(features, pa.Array) else pa.array(list(features), kind or pa.list_(pa.float32()))
    n = len(column)
    columns = {
        "id": ids if ids is not None else [f"i{i}" for i in range(n)],
        "label": labels if labels is not None else [CLASSES[i % 3] for i in range(n)],
        "feature": column,
    }
    return pa.table({name: values for name, values in (columns | more).items() if values is not False})


def with_metadata(raw: bytes) -> pa.Table:
    return table(rows(6)).replace_schema_metadata({IDENTITY_KEY: raw})


def bytes_of(value: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(value, buffer)
    return buffer.getvalue()


def bad_text() -> pa.Array:
    places = np.arange(7, dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), 6, [None, pa.py_buffer(places), pa.py_buffer(b"\xff" * 6)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good index from features, and good tables beside it. Nothing may change here."""
    place = tmp_path_factory.mktemp("world")
    pq.write_table(table(rows(18)), place / "train.parquet")
    pq.write_table(table(rows(6, seed=1)), place / "test.parquet")
    pq.write_table(table(rows(3, seed=2), CLASSES), place / "text.parquet")
    pq.write_table(table(rows(6, 16)), place / "wide.parquet")
    (place / "list.csv").write_text("path,label\na.png,cat\n")
    (place / "file").write_text("x")
    (place / "other").mkdir()
    (place / "other" / "thesis.txt").write_text("ten years of work")
    build_index(
        open_source(place / "train.parquet"), place / "index", Encoder(), text=place / "text.parquet", device="cpu"
    )
    return place


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path with its size and time of change."""
    return {
        str(path): (path.lstat().st_size if path.is_file() else 0, path.lstat().st_mtime_ns if path.is_file() else 0)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def unchanged(world: Path, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Call it when the stage is set: at the end of the test everything must be as it was then."""
    before: list[dict[str, tuple[int, int]]] = []
    yield lambda: before.append(state(world) | state(tmp_path))
    if before:
        assert state(world) | state(tmp_path) == before[0]


def check(result: Result, status: int, *words: str) -> None:
    """The designed exit status; one line that says what is wrong, with these words; nothing on standard output."""
    said = result.stderr
    assert result.exit_code == status, (result.exit_code, said, result.stdout)
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
    if status in (1, 2):
        assert result.stdout == ""
        lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
        if status == 2:
            assert all(line.startswith(("Usage: ", "Try ")) or not line for line in lines[:-1]), said
        else:
            assert len(lines) == 1, said
        assert lines[-1].startswith("Error: "), said
        assert len(lines[-1]) > 15
        assert len(lines[-1]) < 2000


# -- feature tables that are wrong --

FEATURE_TABLES: dict[str, tuple[pa.Table, str]] = {
    "NaN": (table(changed(2, float("nan"), 3)), "row 2"),
    "infinity": (table(changed(0, float("inf"), 0)), "row 0"),
    "minus infinity": (table(changed(5, float("-inf"), 7)), "row 5"),
    "too large for float32": (table(changed(1, 1e300, 0), kind=pa.list_(pa.float64())), "row 1"),
    "all NaN": (table(np.full((6, D), np.nan)), "rows 0, 1, 2, 3, 4 and 1 more"),
    "null feature": (table(changed(3, None)), "row 3 without a feature"),
    "null value": (table(changed(4, None, 2)), "row 4 with a missing value"),
    "zero row": (table(changed(1, [0.0] * D)), "row 1: the feature is zero"),
    "unnormalised row": (table(changed(1, [1.0] * D)), "norms=unit"),
    "unnormalised table": (table(rows(6) * 17), "norm 17"),
    "shorter row": (table(changed(2, [1.0])), "row 2 has 1 values"),
    "longer row": (table(changed(2, [0.1] * (D + 1))), "row 2 has 9 values"),
    "empty row": (table(changed(2, [])), "row 2 has 0 values"),
    "no values at all": (table([[]] * 6), "row 0 has no values"),
    "no rows": (table([], kind=pa.list_(pa.float32(), D)), "no rows"),
    "whole numbers": (table([[1, 0], [0, 1]], kind=pa.list_(pa.int64())), "expected lists of float"),
    "decimals": (table([["1"], ["0"]], kind=pa.list_(pa.string())), "expected lists of float"),
    "single numbers": (table([1.0, 2.0], kind=pa.float32()), "expected lists of float"),
    "text": (table(["[1, 0]", "[0, 1]"], kind=pa.string()), "expected lists of float"),
    "bytes": (table([b"1234", b"1234"], kind=pa.binary()), "expected lists of float"),
    "tensor": (table([[[1.0]], [[1.0]]], kind=pa.list_(pa.list_(pa.float32()))), "expected lists of float"),
    "structs": (table([{"x": 1.0}] * 2, kind=pa.struct([("x", pa.float32())])), "expected lists of float"),
    "nothing": (table([None] * 2, kind=pa.null()), "expected lists of float"),
    "labels of numbers": (table(rows(6), [0.5] * 6), "'label'"),
    "labels of truth": (table(rows(6), [True] * 6), "'label'"),
    "labels of bytes": (table(rows(6), [b"a"] * 6), "'label'"),
    "labels of lists": (table(rows(6), [["a"]] * 6), "'label'"),
    "labels of damaged text": (table(rows(6), bad_text()), "'label'"),
    "labels too long": (table(rows(6), ["x" * 5000] * 6), "longer than"),
    "ids of numbers": (table(rows(6), ids=[0.5] * 6), "'id'"),
    "ids of dates": (table(rows(6), ids=pa.array([0] * 6, pa.timestamp("s"))), "'id'"),
    "ids of damaged text": (table(rows(6), ids=bad_text()), "'id'"),
    "ids missing": (table(rows(6), ids=["a", None, "c", None, "e", "f"]), "rows 1, 3 without an id"),
    "ids blank": (table(rows(6), ids=["a", " ", "c", "d", "e", "f"]), "row 1 without an id"),
    "column twice": (
        pa.table([["a"], ["b"], ["c"], [[1.0]]], names=["id", "label", "label", "feature"]),
        "stands twice",
    ),
    "feature twice": (pa.table([["a"], ["b"], [[1.0]], [[1.0]]], names=["id", "label", "feature", "feature"]), "twice"),
    "backbone no JSON": (with_metadata(b"{"), "backbone metadata"),
    "backbone a list": (with_metadata(b"[]"), "backbone metadata"),
    "backbone empty": (with_metadata(b"{}"), "backbone metadata"),
    "backbone not text": (with_metadata(b"\xff"), "backbone metadata"),
    "backbone too deep": (with_metadata(b"[" * 50_000), "backbone metadata"),
}
COMMANDS = {
    "build": ("index", "build", "{x}", "--out", "{t}/out"),
    "encode": ("encode", "{x}", "--out", "{t}/out.parquet"),
    "classify": ("classify", "{w}/index", "{x}"),
    "evaluate": ("evaluate", "{w}/index", "{x}"),
}


def command(name: str, world: Path, folder: Path, source: Path) -> list[str]:
    return [part.format(x=source, w=world, t=folder) for part in COMMANDS[name]]


@pytest.mark.parametrize(
    ("case", "name"),  # one reader: all of its cases by one command, and one by each of the others
    [(case, "classify") for case in FEATURE_TABLES] + [(next(iter(FEATURE_TABLES)), name) for name in COMMANDS],
)
def test_a_wrong_feature_table_is_refused(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], case: str, name: str
) -> None:
    value, words = FEATURE_TABLES[case]
    source = tmp_path / "in put.parquet"
    pq.write_table(value, source)
    unchanged()
    check(run(*command(name, world, tmp_path, source)), 1, str(source), words)


LABEL_TABLES = {
    "no label column": (table(rows(6), False), "no column 'label'"),
    "null labels": (table(rows(6), ["cat", None] * 3), "rows 1, 3, 5 without a label"),
    "blank labels": (table(rows(6), ["cat", " "] * 3), "rows 1, 3, 5 without a label"),
    "labels of null type": (table(rows(6), pa.nulls(6)), "without a label"),
}


@pytest.mark.parametrize("name", ["build", "evaluate"])
@pytest.mark.parametrize("case", LABEL_TABLES)
def test_labels_are_needed_where_they_count(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], case: str, name: str
) -> None:
    value, words = LABEL_TABLES[case]
    source = tmp_path / "t.parquet"
    pq.write_table(value, source)
    unchanged()
    check(run(*command(name, world, tmp_path, source)), 1, str(source), words)


@pytest.mark.parametrize("name", ["encode", "classify"])
@pytest.mark.parametrize("case", LABEL_TABLES)
def test_labels_are_not_needed_elsewhere(run: Run, world: Path, tmp_path: Path, case: str, name: str) -> None:
    source = tmp_path / "t.parquet"
    pq.write_table(LABEL_TABLES[case][0], source)
    check(run(*command(name, world, tmp_path, source)), 0)


FOREIGN = {
    "other dimension": (table(rows(6, 16)), "16 values"),
    "unknown labels": (table(rows(6), ["cat", "unicorn"] * 3), "unicorn"),
    "labels of numbers": (table(rows(6), [0, 1, 2] * 2), "no class of the index"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_does_not_fit_an_index_is_refused(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], case: str
) -> None:
    value, words = FOREIGN[case]
    source = tmp_path / "t.parquet"
    pq.write_table(value, source)
    unchanged()
    check(run("evaluate", world / "index", source), 1, str(source), words)


@pytest.mark.parametrize("seed", few(range(40), 12))
def test_a_damaged_parquet_file_is_refused_or_read(run: Run, world: Path, tmp_path: Path, seed: int) -> None:
    """Parquet has few checksums, so a flip may pass for data; it may never be a traceback or half an output."""
    generator = np.random.default_rng(seed)
    raw = bytearray(bytes_of(table(rows(6))))
    if seed < 10:
        raw = raw[: int(len(raw) * seed / 10)]
    for place in generator.integers(0, len(raw) or 1, 0 if seed < 10 else 1 + seed % 4):
        raw[-1 - place // (1 + seed % 3)] ^= 1 << generator.integers(0, 8)  # most of them in the footer
    source = tmp_path / "t.parquet"
    source.write_bytes(raw)
    for name in ("classify", "encode"):
        result = run(*command(name, world, tmp_path, source))
        assert result.exit_code in ((1,) if seed < 10 else (0, 1))
        if result.exit_code:
            check(result, 1, str(source))
    assert {path.name for path in tmp_path.iterdir()} <= {"t.parquet", "out.parquet"}


# -- sources that are wrong --

CSV_HEAD = b"path,label\n"
SOURCES: dict[str, tuple[str, bytes | None, str]] = {
    "empty csv": ("t.csv", b"", "cannot be read"),
    "blank csv": ("t.csv", b"\n\n\n", "cannot be read"),
    "header only": ("t.csv", CSV_HEAD, "no rows"),
    "no path column": ("t.csv", b"place,label\na.png,cat\n", "no column 'path'"),
    "no label column": ("t.csv", b"path,kind\na.png,cat\n", "no column 'label'"),
    "commas in a tsv": ("t.tsv", b"path,label\na.png,cat\n", "no column 'path'"),
    "column twice": ("t.csv", b"path,label,label\na.png,cat,dog\n", "twice"),
    "too many fields": ("t.csv", CSV_HEAD + b"a.png,cat\nb.png,cat,x\n", "cannot be read"),
    "too few fields": ("t.csv", CSV_HEAD + b"a.png,cat\nb.png\n", "cannot be read"),
    "damaged UTF-8": ("t.csv", CSV_HEAD + "café.png,cat\n".encode() + b"caf\xe9.png,cat\n", "UTF8"),
    "half a UTF-16": ("t.csv", "path,label\na.png,cat\n".encode("utf-16")[:-1], "cannot be read"),
    "no text": ("t.csv", CSV_HEAD + b"\x81\xff.png,cat\n", "cannot be read"),
    "json lines of lists": ("t.jsonl", b"[1]\n", "no object"),
    "json lines too deep": ("t.jsonl", b"[" * 50_000, "cannot be read"),
    "zeros": ("t.csv", b"\0" * 4096, "cannot be read"),
    "missing label": ("t.csv", CSV_HEAD + b"a.png,cat\nb.png,\n", "row 1 without a label"),
    "missing path": ("t.csv", CSV_HEAD + b",cat\n", "row 0 without a path"),
    "long label": ("t.csv", CSV_HEAD + b"a.png," + b"x" * 9999 + b"\n", "longer than"),
    "long path": ("t.csv", CSV_HEAD + b"x" * 9999 + b",cat\n", "longer than"),
    "parquet named csv": ("t.csv", bytes_of(table(rows(6))), "cannot be read"),
    "csv named parquet": ("t.parquet", CSV_HEAD + b"a.png,cat\n", "cannot be read"),
    "empty parquet": ("t.parquet", b"", "cannot be read"),
    "only the magic": ("t.parquet", b"PAR1PAR1", "cannot be read"),
    "picture named parquet": ("t.parquet", b"\x89PNG\r\n\x1a\n" * 20, "cannot be read"),
    "empty json": ("t.json", b"", "not JSON"),
    "half a json": ("t.json", b'{"train": [', "not JSON"),
    "json too deep": ("t.json", b"[" * 50_000, "not JSON"),
    "json not UTF-8": ("t.json", b'{"train": "\xff"}', "not JSON"),
    "json huge number": ("t.json", b'{"train": [["a", ' + b"9" * 5000 + b', "c"]]}', "not JSON"),
    "json list": ("t.json", b"[]", "no part 'train'"),
    "json null": ("t.json", b"null", "no part 'train'"),
    "json number": ("t.json", b"7", "no part 'train'"),
    "json text": ("t.json", b'"train"', "no part 'train'"),
    "json without train": ("t.json", b'{"val": []}', "no part 'train'"),
    "json empty train": ("t.json", b'{"train": []}', "empty"),
    "json train an object": ("t.json", b'{"train": {"a": 1}}', "entry 0"),
    "json train null": ("t.json", b'{"train": null}', "entry 0"),
    "json entry an object": ("t.json", b'{"train": [{"path": "a"}]}', "entry 0"),
    "json entry too short": ("t.json", b'{"train": [["a", 0]]}', "entry 0"),
    "json entry too long": ("t.json", b'{"train": [["a", 0, "c", 1]]}', "entry 0"),
    "json label text": ("t.json", b'{"train": [["a", "0", "c"]]}', "entry 0"),
    "json label a fraction": ("t.json", b'{"train": [["a", 0.5, "c"]]}', "entry 0"),
    "json label NaN": ("t.json", b'{"train": [["a", NaN, "c"]]}', "entry 0"),
    "json label true": ("t.json", b'{"train": [["a", true, "c"]]}', "entry 0"),
    "json path null": ("t.json", b'{"train": [[null, 0, "c"]]}', "entry 0"),
    "json class blank": ("t.json", b'{"train": [["a", 0, " "]]}', "entry 0"),
    "json two names for a label": ("t.json", b'{"train": [["a", 0, "c"], ["a", 0, "d"]]}', "entry 1"),
    "json two labels for a name": ("t.json", b'{"train": [["a", 0, "c"], ["a", 1, "c"]]}', "several"),
    "json images not there": ("t.json", b'{"train": [["a.png", 0, "c"]]}', "--root"),
    "json path with a zero": ("t.json", b'{"train": [["a\\u0000.png", 0, "c"]]}', "--root"),
    "json path too long": ("t.json", b'{"train": [["' + b"x" * 3000 + b'", 0, "c"]]}', "--root"),
    "json half a surrogate": ("t.json", b'{"train": [["\\ud800.png", 0, "c"]]}', "\\ud800"),
    "text file": ("t.txt", b"x", "not a source"),
    "no suffix": ("t", b"x", "not a source"),
    "picture": ("t.png", b"x", "one image"),
    "archive": ("t.zip", b"x", "archive"),
    "damaged tar": ("t.tar.gz", b"x", "cannot be read as a tar"),
    "missing": ("gone.csv", None, "no such file"),
    "name too long": ("x" * 300 + ".csv", None, "no such file"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_wrong_source_is_refused(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], case: str
) -> None:
    name, raw, words = SOURCES[case]
    source = tmp_path / name
    if raw is not None:
        source.write_bytes(raw)
    unchanged()
    result = run(
        "index", "build", source, "--out", tmp_path / "out", "--text", world / "text.parquet", "--split", "train"
    )
    check(result, 1, name, words)


@pytest.mark.parametrize("make", ["empty", "files", "hidden", "loop", "pipe.csv", "pipe.json", "pipe.parquet"])
def test_a_folder_or_pipe_without_images_is_refused(
    run: Run, tmp_path: Path, unchanged: Callable[[], None], make: str
) -> None:
    source = tmp_path / make
    if make == "loop":
        source.symlink_to("loop")
    elif make.startswith("pipe"):
        os.mkfifo(source)  # no one writes to it: opening it would wait for ever
    else:
        source.mkdir()
        if make != "empty":
            place = source / (".hidden" if make == "hidden" else "cat")
            place.mkdir()
            (place / ("a.png" if make == "hidden" else "a.txt")).write_text("x")
    unchanged()
    check(run("index", "build", source, "--out", tmp_path / "out"), 1, str(source))


# -- options that are wrong --

BUILD = ("index", "build", "{w}/train.parquet", "--out", "{t}/out")
CLASSIFY = ("classify", "{w}/index", "{w}/test.parquet")
EVALUATE = ("evaluate", "{w}/index", "{w}/test.parquet")
ENCODE = ("encode", "{w}/train.parquet", "--out", "{t}/out.parquet")
QUERY = ("index", "query", "{w}/index")


class Wrong(NamedTuple):
    arguments: tuple[str, ...]
    status: int
    words: tuple[str, ...]


def wrong(arguments: tuple[str, ...], status: int, *words: str) -> Wrong:
    return Wrong(arguments, status, words)


def status_of(index: str) -> int:
    """A file in place of an index is wrong usage: the index was forgotten."""
    return 2 if index in ("{w}/file", "{w}/train.parquet") else 1


OPTIONS = [
    *[
        wrong((*start, f"--{name}", value), 2, name)
        for start in (BUILD, CLASSIFY, EVALUATE)
        for name in ("alpha", "beta")
        for value in ("nan", "inf", "-inf", "-1", "one", "", "1e999")
    ],
    *[
        wrong((*start, "-k", v), 2, "-k")
        for start in (BUILD, CLASSIFY, EVALUATE)
        for v in ("0", "-1", "1.5", "ALL", "", "nan")
    ],
    *[wrong((*BUILD, "--logit-scale", value), 2, "logit") for value in ("0", "-1", "nan", "inf", "x")],
    *[wrong((*BUILD, "--shots", value), 2, "--shots") for value in ("0", "-1", "all", "1.5", "")],
    *[wrong((*BUILD, "--views", value), 2, "--views") for value in ("0", "-3", "x")],
    *[wrong((*BUILD, "--seed", value), 2, "--seed") for value in ("x", "1.5", "")],
    *[wrong((*BUILD, "--dtype", value), 2, "--dtype") for value in ("float64", "int8", "")],
    *[
        wrong((*BUILD, "--index", value), 2, "index")
        for value in (
            "", "Nonsense", "flat", "L2norm,Flat", "PQ3", "IVF9999,Flat", "Flat,Flat", "IVF2", "HNSW32,Nonsense",
        )
    ],
    *[
        wrong((*start, "--device", value), 2, "device")
        for start in (CLASSIFY, EVALUATE)
        for value in ("nonsense", "cuda:99", "cuda:x", "cuda:-1", "gpu", "mps", "")
    ],
    *[wrong((*start, "--norms", "maybe"), 2, "--norms") for start in (BUILD, CLASSIFY, EVALUATE, ENCODE)],
    *[wrong((*start, "--batch-size", "0"), 2, "--batch-size") for start in (BUILD, CLASSIFY, EVALUATE, ENCODE)],
    *[wrong((*start, "--workers", "0"), 2, "--workers") for start in (BUILD, CLASSIFY, EVALUATE, ENCODE)],
    *[wrong((*CLASSIFY, "--top", value), 2, "--top") for value in ("0", "-1", "x")],
    *[wrong((*CLASSIFY, "--neighbours", value), 2, "--neighbours") for value in ("0", "x")],
    *[wrong((*CLASSIFY, "--format", value), 2, "--format") for value in ("xml", "JSON", "")],
    *[
        wrong((*CLASSIFY, "--output", value), s, "output" if s == 2 else "o.csv")
        for value, s in (("{w}/other", 2), ("{t}/gone/o.csv", 1), ("{w}/file/o.csv", 1))
    ],
    *[
        wrong((*ENCODE[:2], "--out", value), s, "out")
        for value, s in (("{w}/other", 2), ("{t}/gone/out", 1), ("{w}/file/out", 1))
    ],
    wrong((*CLASSIFY, "--output", ""), 1, "cannot be written"),
    wrong((*ENCODE[:2], "--out", ""), 1, "cannot be written"),
    wrong((*BUILD, "--no-such-option"), 2, "--no-such-option"),
    wrong((*BUILD[:3],), 2, "--out"),
    wrong(("index", "build"), 2, "SOURCE"),
    wrong(("index", "build", "{w}/train.parquet", "more", "--out", "{t}/out"), 2, "more"),
    wrong(("index", "nonsense"), 2, "nonsense"),
    wrong(("nonsense",), 2, "nonsense"),
    wrong(("classify", "{w}/index"), 2, "INPUTS"),
    wrong(("evaluate", "{w}/index"), 2, "SOURCE"),
    wrong((*BUILD, "--template", "a photo"), 2, "template"),
    wrong((*BUILD, "--text", "{w}/text.parquet", "--template", "a {}"), 2, "template"),
    wrong((*BUILD, "--model", "NoSuchModel", "--pretrained", "x"), 2, "NoSuchModel"),
    wrong((*BUILD, "--model", "local-dir:{t}/gone"), 1, "gone"),
    wrong((*BUILD, "--model", "local-dir:{w}/other"), 1, "open_clip_config.json"),
    wrong((*BUILD, "--model", "RN50", "--pretrained", "no-such-tag"), 2, "no-such-tag"),
    wrong((*BUILD, "--model", "RN50", "--pretrained", "openai={t}/gone.pt"), 1, "gone.pt"),
    wrong((*BUILD, "--model", "RN50", "--pretrained", "openai={w}/file"), 1, "file"),
    wrong((*BUILD, "--precision", "float8"), 2, "--precision"),
    wrong(("classify", "{w}/index", "{w}/file"), 2, "--model"),
    wrong(("classify", "{w}/index", "{w}/*.nothing"), 1, "no file matches"),
    wrong(("classify", "{w}/index", "{w}/other"), 1, "no images"),
    wrong(("classify", "{w}/index", "{w}/wide.parquet"), 1, "16 values"),
    wrong(("evaluate", "{w}/index", "{w}/gone.parquet"), 1, "gone.parquet"),
    wrong(("encode", "{w}/gone", "--out", "{t}/o"), 1, "gone"),
    wrong((*QUERY, "DROP TABLE labels"), 2, "SELECT"),
    wrong((*QUERY, ""), 2, "SELECT"),
    wrong((*QUERY, "SELECT 1; SELECT 2"), 2, "SELECT"),
    wrong((*QUERY, "SELECT nonsense FROM labels"), 2, "nonsense"),
    wrong((*QUERY, "SELECT * FROM '{w}/train.parquet'"), 2, "query"),
    wrong((*QUERY, "SELECT * FROM read_csv('/etc/passwd')"), 2, "query"),
    wrong((*QUERY, "COPY labels TO '{t}/stolen.csv'"), 2, "SELECT"),
    wrong((*QUERY, "SELECT \x00"), 2, "query"),
    *[
        wrong((*start, place), status_of(place), place.rpartition("/")[2])
        for start in (("index", "info"), ("index", "verify"))
        for place in ("{w}/gone", "{w}/file", "{w}/other", "{w}/train.parquet", "{w}/file/below")
    ],
    *[
        wrong((command, place, "{w}/test.parquet"), status_of(place), place[4:])
        for command in ("classify", "evaluate")
        for place in ("{w}/gone", "{w}/file", "{w}/other")
    ],
    *[
        wrong((*BUILD[:3], "--out", place), status_of(place), place[4:])
        for place in ("{w}/file", "{w}/other", "{w}/file/below", "{t}/" + "x" * 300)
    ],
]  # fmt: skip


@pytest.mark.parametrize("case", few(OPTIONS, 90), ids=lambda case: " ".join(case.arguments)[:60])
def test_wrong_usage_is_refused(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], case: Wrong
) -> None:
    unchanged()
    arguments = [part.replace("{w}", str(world)).replace("{t}", str(tmp_path)) for part in case.arguments]
    check(run(*arguments), case.status, *case.words)


# -- numbers without end, and messages without end --


def every_option() -> Iterator[tuple[str, click.Parameter]]:
    waiting: list[tuple[str, click.Command]] = [("", cli.main)]
    while waiting:
        name, one = waiting.pop()
        if isinstance(one, click.Group):
            waiting += [(f"{name} {child}".strip(), below) for child, below in one.commands.items()]
        else:
            yield from ((f"{name} {parameter.name}", parameter) for parameter in one.params)


NUMBERS = [
    (name, one)
    for name, one in every_option()
    if isinstance(one.type, IntParamType | FloatParamType | K | Tuple) and not getattr(one, "count", False)
]


@pytest.mark.parametrize(("name", "parameter"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_every_number_has_bounds_and_is_one(name: str, parameter: click.Parameter) -> None:
    kinds = parameter.type.types if isinstance(parameter.type, Tuple) else [parameter.type]
    hostile = [
        "nan", "NAN", "inf", "-inf", "1e400", "1e308", "-1", str(2**63), str(10**400), "9" * 5000, "", "x", "0x1",
    ]  # fmt: skip
    for kind in kinds:
        for value in hostile:
            if value == str(2**63) and isinstance(kind, FloatParamType):
                continue  # a number like others
            with pytest.raises(click.BadParameter):
                kind.convert(value, parameter, None)


LONG = "x" * 60_000


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((LONG,), 2),
        (("index", LONG), 2),
        ((*BUILD, f"--{LONG}"), 2),
        *[((*BUILD, f"--{name}", LONG), 2) for name in ("shots", "alpha", "dtype", "index")],
        ((*BUILD, "--text", LONG), 1),
        ((*BUILD, "-k", LONG), 2),
        ((*BUILD, "--dataset", LONG), 2),
        ((*BUILD, "--model", LONG), 2),
        ((*BUILD, "--model", f"local-dir:{LONG}"), 1),
        ((*BUILD[:3], "--out", "{t}/" + LONG), 1),
        ((*BUILD[:3], "--out", "lance://{t}/" + LONG), 1),
        (("index", "build", LONG, "--out", "{t}/out"), 1),
        (("index", "info", LONG), 1),
        ((*QUERY, f"SELECT {LONG}"), 2),
        ((*QUERY, f"SELECT '{LONG}"), 2),
        ((*QUERY, f"DROP TABLE {LONG}"), 2),
        ((*CLASSIFY, "--where", f"label = {LONG}"), 2),
        (("classify", "{w}/index", LONG), 2),
        (("classify", "{w}/index", LONG + "*"), 1),
        (("index", "remove", "{w}/index", "--key-ids", LONG), 2),
        (("index", "import", "{w}/file", "--out", "{t}/out", "--labels", LONG), 2),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else str(value),
)
def test_a_message_has_a_length_whatever_it_quotes(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], arguments: tuple[str, ...], status: int
) -> None:
    unchanged()
    filled = [part.replace("{w}", str(world)).replace("{t}", str(tmp_path)) for part in arguments]
    result = run(*filled)
    assert result.exit_code == status, result.stderr[:1000]
    assert max(map(len, result.stderr.splitlines())) <= MAX_LINE + len("warning: ")
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_warning_has_a_length_too(run: Run, world: Path, tmp_path: Path) -> None:
    bad = tmp_path / "/".join(["x" * 200] * 15)
    result = run("classify", world / "index", world / "test.parquet", bad, "--model", "RN50")
    assert max(map(len, result.stderr.splitlines())) <= MAX_LINE + len("warning: ")


def test_a_split_file_of_very_many_parts_names_a_few(run: Run, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({f"part{i}": [] for i in range(10_000)}))
    result = run("index", "build", tmp_path / "s.json", "--out", tmp_path / "out")
    check(result, 1, "s.json", "part0", "and 9995 more")
    assert len(result.stderr) < 500


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A path of 1,500 folders, none of which is there; they are removed by a program that does not call itself."""
    yield tmp_path / "deep" / "/".join("a" * 1500)
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_an_output_may_lie_as_deep_as_a_path_is_long(run: Run, world: Path, deep: Path) -> None:
    check(run("index", "build", world / "train.parquet", "--out", deep), 0)
    check(run("classify", deep, world / "test.parquet"), 0)
    if SOAK:
        tuned = ("--source", world / "train.parquet", "--epochs", 1, "--out", deep.parent / "b/c/d")
        check(run("index", "verify", deep), 0)
        check(run("finetune", deep, *tuned), 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("index", "build", "{w}/train.parquet", "--out", "{x}"),
        ("index", "build", "{w}/train.parquet", "--out", "lance://{x}"),
        ("finetune", "{w}/index", "--source", "{w}/train.parquet", "--epochs", "1", "--out", "{x}"),
        ("index", "clone", "{w}/index", "{x}"),
        ("encode", "{w}/train.parquet", "--out", "{x}"),
        ("evaluate", "{w}/index", "{w}/test.parquet", "--plot", "{x}"),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_an_output_that_is_longer_than_a_path_makes_no_folder(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], arguments: tuple[str, ...]
) -> None:
    unchanged()
    long = tmp_path / "/".join("a" * 2500)
    check(run(*[part.replace("{w}", str(world)).replace("{x}", str(long)) for part in arguments]), 1, "too long")


# -- text tables that do not fit --

TEXTS: dict[str, tuple[pa.Table | bytes | None, str]] = {
    "other dimension": (table(rows(3, 16), CLASSES), "16"),
    "a class missing": (table(rows(2), CLASSES[:2]), "owl"),
    "other classes": (table(rows(3), ["a", "b", "c"]), "cat, dog, owl"),
    "no labels": (table(rows(3), pa.nulls(3, pa.string())), "without a label"),
    "no label column": (table(rows(3), False), "no column 'label'"),
    "no feature": (pa.table({"path": CLASSES, "label": CLASSES}), "no column 'feature'"),
    "no rows": (table([], kind=pa.list_(pa.float32(), D)), "no rows"),
    "NaN": (table([*rows(2), [np.nan] * D], CLASSES), "row 2"),
    "zero": (table([*rows(2), [0.0] * D], CLASSES), "row 2"),
    "unnormalised": (table(rows(3) * 3, CLASSES), "norm 3"),
    "prompts that cancel out": (table([*rows(3), -rows(3)[0]], [*CLASSES, "cat"]), "cancel out"),
    "wrong type": (table(["a"] * 3, CLASSES, kind=pa.string()), "expected lists of float"),
    "no parquet": (b"garbage", "cannot be read"),
    "missing": (None, "no such file"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_table_that_does_not_fit_is_refused(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], case: str
) -> None:
    value, words = TEXTS[case]
    text = tmp_path / "text.parquet"
    if isinstance(value, pa.Table):
        pq.write_table(value, text)
    elif value is not None:
        text.write_bytes(value)
    unchanged()
    check(run("index", "build", world / "train.parquet", "--out", tmp_path / "out", "--text", text), 1, words)


def test_a_text_table_of_another_backbone_is_refused(run: Run, tmp_path: Path, unchanged: Callable[[], None]) -> None:
    for name, weights in (("train", "sha256:a"), ("text", "sha256:b")):
        value = table(rows(3), CLASSES).replace_schema_metadata(
            {IDENTITY_KEY: json.dumps(IDENTITY | {"weights": weights}).encode()}
        )
        pq.write_table(value, tmp_path / f"{name}.parquet")
    unchanged()
    result = run("index", "build", tmp_path / "train.parquet", "--out", tmp_path / "out", "--text", tmp_path / "text.parquet")  # fmt: skip  # noqa: E501
    check(result, 1, "text.parquet", "cannot be compared")


@pytest.mark.parametrize("norms", ["unit", "keep"])
def test_the_way_out_of_unnormalised_text_works(run: Run, world: Path, tmp_path: Path, norms: str) -> None:
    text = tmp_path / "text.parquet"
    pq.write_table(table(rows(3, seed=2) * 3, CLASSES), text)
    for name, file in (("plain", world / "text.parquet"), ("scaled", text)):
        result = run("index", "build", "--fit", "none", world / "train.parquet", "--out", tmp_path / name, "--text", file, "--norms", norms)  # fmt: skip  # noqa: E501
        check(result, 0)
    answers = [run("classify", tmp_path / name, world / "test.parquet", "--format", "csv").stdout for name in ("plain", "scaled")]  # fmt: skip  # noqa: E501
    assert answers[0] == answers[1]


def test_kept_norms_that_float16_cannot_hold_are_refused(
    run: Run, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    pq.write_table(table(rows(6) * 1e6), tmp_path / "t.parquet")
    unchanged()
    result = run("index", "build", tmp_path / "t.parquet", "--out", tmp_path / "out", "--norms", "keep", "--dtype", "float16")  # fmt: skip  # noqa: E501
    check(result, 1, "float16")


# -- indexes that are wrong --


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [_truncate, _flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("file", ["manifest.json", "keys", "index", "labels", "text"])
def test_a_damaged_index_is_refused(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], harm: Callable[[Path], object], file: str
) -> None:
    place = tmp_path / "index"
    (place / "data").mkdir(parents=True)
    for path in (world / "index").rglob("*"):
        if path.is_file():
            (place / path.relative_to(world / "index")).write_bytes(path.read_bytes())
    (victim,) = place.glob(file if "." in file else f"data/{file}-*")
    harm(victim)
    unchanged()
    for arguments in (("classify", place, world / "test.parquet"), ("index", "verify", place)):
        check(run(*arguments), 1, str(place))


def test_a_build_that_fails_leaves_the_index_that_was_there(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    place = tmp_path / "index"
    check(run("index", "build", world / "train.parquet", "--out", place), 0)
    pq.write_table(table(changed(5, float("nan"), 0)), tmp_path / "bad.parquet")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != "lock"}
    check(run("index", "build", tmp_path / "bad.parquet", "--out", place), 1, "row 5")
    check(run("index", "build", world / "train.parquet", "--out", place, "--index", "PQ3"), 2, "PQ3")
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != "lock"}
    check(run("index", "verify", place), 0)


# -- images that are damaged --


def picture(style: str = "PNG", size: tuple[int, int] = (40, 30), seed: int = 0, **options: Any) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, style, **options)
    return buffer.getvalue()


def png(width: int, height: int, body: bytes = zlib.compress(b"\0" * 1000), colour: int = 2) -> bytes:
    """A small PNG that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def without_checksum(raw: bytes) -> bytes:
    place = raw.index(b"IDAT") + 10
    return raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :]


DAMAGED: dict[str, tuple[bytes, str]] = {
    **{
        f"cut{percent}.{style.lower()}": (picture(style)[: len(picture(style)) * percent // 100], "")
        for style in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM", "WEBP")
        for percent in (1, 20, 50, 85)
    },
    "empty.jpg": (b"", "empty file"),
    "one-byte.jpg": (b"\xff", "not an image"),
    "zeros.png": (b"\0" * 4096, "not an image"),
    "ones.gif": (b"\xff" * 4096, "not an image"),
    "text.jpg": (b"these are not pixels\n" * 9, "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "not an image"),
    "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "document.jpg": (b"%PDF-1.7\n1 0 obj\n", "not an image"),
    "postscript.jpg": (picture("EPS"), "not an image"),
    "archive.png": (b"PK\x03\x04" + b"\0" * 60, "not an image"),
    "program.png": (b"\x7fELF" + b"\0" * 60, "not an image"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not an image"),
    "table.png": (bytes_of(table(rows(6))), "not an image"),
    "pickle.png": (b"\x80\x04\x95\x0f\0\0\0\0\0\0\0\x8c\x05posix\x94.", "not an image"),
    "reversed.png": (picture()[::-1], "not an image"),
    "bomb.png": (png(30000, 30000), "refused before decoding"),
    "long-bomb.png": (png(2**31 - 1, 1), "refused before decoding"),
    "bomb.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 50000, 50000, 1, 24, 0, 0, 0, 0, 0, 0), ""),
    "bomb.ppm": (b"P6\n60000 60000\n255\n" + b"\0" * 100, "refused before decoding"),
    "no-pixels.png": (png(0, 0), ""),
    "huge-number.ppm": (b"P6\n" + b"9" * 400 + b" 1\n255\n", ""),
    "less-than-claimed.png": (png(500, 500), ""),
    "no-zlib.png": (png(10, 10, b"garbage"), ""),
    "bad-checksum.png": (without_checksum(picture()), ""),
    "only-header.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0", ""),
    "only-header.png": (b"\x89PNG\r\n\x1a\n", ""),
    "only-header.gif": (b"GIF89a\x10\0\x10\0\0\0\0", ""),
    "only-header.webp": (b"RIFF\x24\0\0\0WEBPVP8 ", ""),
    "only-header.tif": (b"II*\0\x08\0\0\0", ""),
    "endless.tif": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", ""),
    "stub.png": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, ""),
    "icon.png": (picture("ICO"), "not an image"),
    "large.png": (png(13_000, 13_000, colour=6), "MB of memory"),
    "odd-depth.pgm": (b"P5\n99 99\n254\n" + bytes(99 * 99), "save it as PNG"),
    "segments.jpg": (picture("JPEG").replace(b"\xff\xdb", b"\xff\xe5\0\2" * 140_000 + b"\xff\xdb", 1), "segments"),
    "film.jpg": (b"\0\0\x01\xb3\x16\0\xf0\x14\xff\xff\xe0\x18", ""),
}


class Gallery(NamedTuple):
    """A folder with an index built from images in class folders, and one good image."""

    place: Path
    index: Path
    good: Path


@pytest.fixture(scope="module")
def gallery(lit_mini: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    place = tmp_path_factory.mktemp("gallery")
    for number, name in enumerate(CLASSES * 2):
        (place / "train" / name).mkdir(parents=True, exist_ok=True)
        (place / "train" / name / f"{number}.png").write_bytes(picture(seed=number))
    (place / "good.jpg").write_bytes(picture("JPEG", seed=7))
    build_index(open_source(place / "train"), place / "index", Encoder(lit_mini), device="cpu")
    return Gallery(place, place / "index", place / "good.jpg")


@pytest.fixture
def see(run: Run, lit_mini: Backbone, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line with a backbone that is loaded already."""
    monkeypatch.setattr("retrieval_tip.backbones.loading.load_backbone", lambda *_, **__: lit_mini)
    return run


def skipped(result: Result, *bad: Path) -> None:
    """Done but for these, each named in a line of its own."""
    check(result, 3, "could not be read")
    said = ("left out:", "holds one class only")  # of the folder, not of an image
    lines = [line for line in result.stderr.splitlines() if not any(words in line for words in said)]
    assert len(lines) == len(bad) + 1, result.stderr
    for path in bad:
        assert sum(line.startswith(f"warning: skipped {path}: ") for line in lines) == 1, result.stderr


@pytest.mark.parametrize("name", few(DAMAGED, 24))
def test_a_damaged_image_is_named_and_the_others_are_answered(
    see: Run, gallery: Gallery, tmp_path: Path, unchanged: Callable[[], None], name: str
) -> None:
    raw, words = DAMAGED[name]
    bad = tmp_path / name
    bad.write_bytes(raw)
    unchanged()
    result = see("classify", gallery.index, bad, gallery.good, "--format", "json")
    skipped(result, bad)
    assert words in result.stderr
    assert [json.loads(line)["input"] for line in result.stdout.splitlines()] == [str(gallery.good)]
    check(see("classify", gallery.index, bad, gallery.good, "--strict", "--output", tmp_path / "o"), 1, str(bad), words)


def _make(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "linked folder":
        path.symlink_to(".")
    elif kind == "linked device":
        path.symlink_to("/dev/zero")
    elif kind == "endless":
        path.symlink_to("/proc/self/pagemap")


@pytest.mark.parametrize(
    "arguments",
    [
        ("index", "info", "{x}"),
        ("index", "verify", "{x}"),
        ("index", "clone", "{x}", "{t}/out"),
        ("index", "clone", "{w}/index", "{x}"),
        ("index", "clone", "{w}/index", "lance://{x}/../y"),
        ("index", "merge", "{w}/index", "{x}"),
        ("index", "export", "{w}/index", "--out", "{x}"),
        ("index", "import", "{x}", "--out", "{t}/out"),
        (*BUILD[:3], "--out", "{x}"),
        (*BUILD[:2], "{x}", "--out", "{t}/out"),
        (*BUILD, "--text", "{x}"),
        (*CLASSIFY, "--output", "{x}"),
        ("encode", "{w}/test.parquet", "--out", "{x}"),
        ("evaluate", "{x}", "{w}/test.parquet"),
        ("serve", "{x}", "--port", "0"),
        ("finetune", "{w}/index", "--source", "{w}/train.parquet", "--epochs", "1", "--out", "{x}"),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_a_link_in_a_circle_is_one_line(run: Run, world: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    places = {"{w}": world, "{t}": tmp_path, "{x}": tmp_path / "loop"}
    filled = []
    for part in arguments:
        for mark, place in places.items():
            part = part.replace(mark, str(place))
        filled.append(part)
    result = run(*filled)
    if result.exit_code:
        check(result, 1, "loop" if "lance" not in filled[-1] else "y")
    else:  # a file took its place
        assert (tmp_path / "loop").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    "kind", ["missing", "pipe", "loop", "dangling", "long name", "device", "linked device", "endless"]
)
def test_what_is_no_file_is_named(see: Run, gallery: Gallery, tmp_path: Path, kind: str) -> None:
    bad = {"long name": tmp_path / ("x" * 300), "device": Path("/dev/zero")}.get(kind, tmp_path / "x.png")
    _make(bad, kind)
    skipped(see("classify", gallery.index, gallery.good, bad), bad)
    skipped(see("classify", gallery.index, "-", stdin=f"{bad}\n{gallery.good}\n"), bad)


@pytest.mark.parametrize("kind", ["folder", "linked folder"])
def test_a_folder_in_a_list_of_paths_is_named(see: Run, gallery: Gallery, tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "x.png"
    _make(bad, kind)
    result = see("classify", gallery.index, "-", stdin=f"{bad}\n{gallery.good}\n")
    skipped(result, bad)
    assert "a folder, not an image" in result.stderr


def test_all_damaged_images_together(see: Run, gallery: Gallery, tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    folder.mkdir()
    for name, (raw, _) in DAMAGED.items():
        (folder / name).write_bytes(raw)
    for kind in ("pipe", "loop", "dangling", "linked device", "endless"):
        _make(folder / f"{kind}.png", kind)
    bad = sorted(folder.iterdir())
    (folder / "good.png").write_bytes(picture(seed=9))
    skipped(see("classify", gallery.index, tmp_path), *bad)
    skipped(see("encode", tmp_path, "--out", folder / "o.parquet"), *bad)
    assert pq.read_table(folder / "o.parquet")["id"].to_pylist() == [str(folder / "good.png")]
    skipped(see("evaluate", gallery.index, tmp_path), *bad)
    skipped(see("index", "build", "--fit", "none", tmp_path, "--out", folder / "out"), *bad)
    assert json.loads(see("index", "info", folder / "out", "--json").stdout)["n"] == 1


def test_nothing_but_damaged_images_is_a_failure(
    see: Run, gallery: Gallery, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("empty.jpg", "bomb.png"):
        (tmp_path / "cat" / name).write_bytes(DAMAGED[name][0])
    unchanged()
    for arguments in (
        ("classify", gallery.index, tmp_path, "--output", tmp_path / "o.csv"),
        ("evaluate", gallery.index, tmp_path),
        ("encode", tmp_path, "--out", tmp_path / "o.parquet"),
        ("index", "build", tmp_path, "--out", tmp_path / "out"),
    ):
        result = see(*arguments)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("Error: ")
        assert "none of its 2 items could be read" in result.stderr


def test_a_split_whose_images_are_elsewhere_names_each(see: Run, gallery: Gallery, tmp_path: Path) -> None:
    entries = [["cat/0.png", 0, "cat"], ["cat/gone.png", 0, "cat"], ["owl/\ud800.png", 2, "owl"]]
    (tmp_path / "s.json").write_text(json.dumps({"test": entries}))
    result = see("evaluate", gallery.index, tmp_path / "s.json", "--root", gallery.place / "train")
    skipped(result, gallery.place / "train/cat/gone.png", gallery.place / "train/owl/\\ud800.png")


# -- names that are unusual, and work --

NAMES = [
    "with space", "  two  ", "quo\"te", "apo'strophe", "new\nline", "carriage\rreturn", "tab\tstop", "日本語", "Ελλάδα",
    "кот", "e\u0301", "🦉", "שלום", "a,b;c", "*", "[x]", "?", "{}", "$HOME", "`id`", "back\\slash", "-dash", "--out",
    "#", "%s", "é.png", "\x1b[31mred", "\udcff", "x" * 200, "~", "dots..", "nul",
]  # fmt: skip


def csv_of(*lines: list[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(lines)
    return buffer.getvalue().encode()


def shown(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@pytest.mark.parametrize("name", few(NAMES, 8))
def test_any_name_works_for_images_classes_and_tables(see: Run, gallery: Gallery, tmp_path: Path, name: str) -> None:
    source, built = tmp_path / "source", tmp_path / "index"
    folder = source / name
    folder.mkdir(parents=True)
    image = folder / f"{name}.png"
    image.write_bytes(picture(seed=1))
    check(see("index", "build", source, "--out", built), 0)
    result = see("classify", built, image, folder, "--format", "json")
    check(result, 0)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["input"] for row in found] == [shown(image)] * 2
    assert [row["label"] for row in found] == [shown(Path(name))] * 2
    out = tmp_path / f"{name}.parquet".replace("\udcff", "x")
    check(see("encode", source, "--out", out), 0)
    assert pq.read_table(out)["id"].to_pylist() == [shown(image)]
    result = see("classify", built, out, image)
    check(result, 0)
    assert len(result.stdout.splitlines()) == 3  # a name breaks no table and reaches no terminal raw
    assert "\x1b" not in result.stdout
    if "\udcff" in name:  # neither a table nor a line of text can hold it
        return
    table = folder / f"{name}.csv"
    table.write_bytes(csv_of(["path", "label"], [f"{name}.png", name]))
    lines = "" if set(name) & set("\r\n") else f"{image}\n"
    result = see("classify", built, table, "-", "--format", "csv", stdin=lines)
    check(result, 0)
    assert len(list(csv.reader(io.StringIO(result.stdout, newline="")))) == (3 if lines else 2)


def test_a_relative_name_that_looks_like_an_option_works(
    see: Run, gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "--output").write_bytes(picture())
    result = see("classify", "--format", "json", "--", gallery.index, "--output")
    check(result, 0)
    assert json.loads(result.stdout)["input"] == "--output"


def test_a_table_may_have_a_name_that_is_not_utf8(see: Run, gallery: Gallery, tmp_path: Path) -> None:
    out = tmp_path / "\udcff.parquet"
    check(see("encode", gallery.place / "train", "--out", out), 0)
    check(see("classify", gallery.index, out), 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("search-hp", "{w}/index", "--val", "{w}/train.parquet", "--dry-run", "--surface", "{x}"),
        ("search-hp", "{w}/index", "--val", "{w}/train.parquet", "--dry-run", "--plot", "{x}"),
        ("sweep", "{w}/index", "{w}/test.parquet", "--shots", "2", "--seeds", "1", "--results", "{x}"),
        ("evaluate", "{w}/index", "{w}/test.parquet", "--plot", "{x}"),
        ("index", "export", "{w}/index", "--out", "{x}"),
        ("classify", "{w}/index", "{w}/test.parquet", "--format", "csv", "--output", "{x}"),
        ("classify", "{w}/index", "{w}/test.parquet", "--format", "parquet", "--output", "{x}"),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_an_output_may_have_a_name_that_is_not_utf8(
    run: Run, world: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    out = tmp_path / "\udcff.png"
    check(run(*[part.replace("{w}", str(world)).replace("{x}", str(out)) for part in arguments]), 0)
    assert list(tmp_path.iterdir()) == [out]


def test_names_that_are_not_utf8_come_through_standard_input(see: Run, gallery: Gallery, tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(raw)).write_bytes(picture())
    check(see("classify", gallery.index, "-", stdin=raw + b"\n"), 0)


@pytest.mark.parametrize("name", ["new\nline", "\x1b]2;title", "bell\a", "back\rward"])
def test_a_name_in_a_message_stays_in_its_line(see: Run, gallery: Gallery, tmp_path: Path, name: str) -> None:
    """Neither a second line that looks like another message, nor codes that a terminal obeys."""
    result = see("classify", gallery.index, tmp_path / name, gallery.good)
    assert len(result.stderr.splitlines()) == 2
    assert all(character.isprintable() or character == "\n" for character in result.stderr)
    result = see("index", "info", tmp_path / name)
    assert len(result.stderr.splitlines()) == 1
    assert all(character.isprintable() or character == "\n" for character in result.stderr)


# -- outputs --


def test_a_pipe_or_device_that_is_named_as_output_is_written_to_not_replaced(
    run: Run, world: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        check(
            run(*command("classify", world, tmp_path, world / "test.parquet"), "--format", "csv", "--output", pipe), 0
        )
        assert len(reader.communicate()[0].splitlines()) == 7
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("style", ["table", "json", "csv", "parquet"])
def test_a_failure_midway_leaves_the_output_that_was_there(
    run: Run, world: Path, tmp_path: Path, unchanged: Callable[[], None], style: str
) -> None:
    pq.write_table(table(changed(5, float("nan"), 0)), tmp_path / "bad.parquet")
    (tmp_path / "o").write_text("what was there")
    unchanged()
    test = world / "test.parquet"
    result = run("classify", world / "index", test, tmp_path / "bad.parquet", "--format", style, "--output", tmp_path / "o")  # fmt: skip  # noqa: E501
    check(result, 1, "row 5")


# -- inputs that are no files --

UNFIT = {
    "--text": (*BUILD, "--text", "{x}.parquet"),
    "--classes": ("index", "import", "{w}/keys_2shots.pt", "--classes", "{x}.txt", "--out", "{t}/out"),
    "split file": ("index", "build", "{x}.json", "--out", "{t}/out"),
    "table": ("index", "build", "{x}.csv", "--out", "{t}/out"),
    "feature table": ("index", "build", "{x}.parquet", "--out", "{t}/out"),
    "--predictions": ("index", "query", "{w}/index", "SELECT 1", "--predictions", "{x}.json"),
    "--results": ("sweep", *EVALUATE[1:], "--shots", "2", "--results", "{x}.parquet"),
    "checkpoint": (
        "finetune", "{w}/index", "--source", "{w}/train.parquet", "--train", "text", "--out", "{x}", "--resume",
    ),
    "dataset": ("index", "build", "{t}/data", "--dataset", "fgvc", "--out", "{t}/out"),
}  # fmt: skip


@pytest.mark.parametrize("kind", few(["pipe", "/proc/kmsg", "/dev/zero"], 2))
@pytest.mark.parametrize("name", UNFIT)
def test_an_input_that_is_no_file_is_named_and_not_waited_for(
    run: Run, world: Path, tmp_path: Path, name: str, kind: str
) -> None:
    torch.save(torch.from_numpy(rows(6)).T, world / "keys_2shots.pt")
    torch.save(torch.eye(6), world / "values_2shots.pt")
    (tmp_path / "data" / "fgvc_aircraft" / "images").mkdir(parents=True)
    places = [tmp_path / f"x.{ending}" for ending in ("parquet", "csv", "json", "npy", "txt", "checkpoint")]
    lists = [tmp_path / "data" / "fgvc_aircraft" / name for name in ("variants.txt", "images_variant_train.txt")]
    for place in [*places, *lists]:
        os.mkfifo(place) if kind == "pipe" else place.symlink_to(kind)
    result = run(
        *[
            part.replace("{w}", str(world)).replace("{t}", str(tmp_path)).replace("{x}", str(tmp_path / "x"))
            for part in UNFIT[name]
        ]
    )
    check(result, 1, "variants.txt" if name == "dataset" else "/x.")


# -- in a process of its own --


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("index", "build", "{t}/bad.parquet", "--out", "{t}/out", "--text", "{w}/text.parquet"), 1, "row 2"),
        (("classify", "{w}/other", "{w}/test.parquet"), 1, "other: not an index"),
        (("classify", "{w}/index", "{w}/test.parquet", "--alpha", "nan"), 2, "--alpha': 'nan'"),
        (("evaluate", "{w}/index", "{t}/cut.parquet"), 1, "cut.parquet: cannot be read"),
    ],
)
def test_a_process_says_one_line_and_no_traceback(
    world: Path, tmp_path: Path, unchanged: Callable[[], None], warm_path: str,
    arguments: tuple[str, ...], status: int, words: str,
) -> None:  # fmt: skip
    pq.write_table(table(changed(2, float("nan"), 3)), tmp_path / "bad.parquet")
    (tmp_path / "cut.parquet").write_bytes(bytes_of(table(rows(6)))[:-9])
    unchanged()
    filled = [part.format(w=world, t=tmp_path) for part in arguments]
    program = str(shutil.which("retrieval-tip", path=warm_path))
    done = subprocess.run([program, *filled], capture_output=True, text=True, timeout=120, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(lines) == (1 if status == 1 else 4), done.stderr
    assert lines[-1].startswith("Error: ")
    assert words in lines[-1]


@pytest.mark.parametrize("command", ["build", "classify"])
def test_a_process_runs_no_code_of_a_model_and_leaves_standard_input(
    world: Path, gallery: Gallery, tmp_path: Path, warm_path: str, command: str
) -> None:
    """Neither that of a model which is named, nor of one that an index names."""
    folder, cache = with_code(tmp_path / "model"), CacheModel.load(world / "index", device="cpu")
    cache.backbone = Identity(f"hf:{folder}", None, "sha256:0", "sha256:1", {})
    cache.save(tmp_path / "index")
    arguments = {
        "build": ["index", "build", gallery.place / "train", "--model", f"hf:{folder}", "--out", tmp_path / "out"],
        "classify": ["classify", tmp_path / "index", gallery.good],
    }[command]
    program = str(shutil.which("retrieval-tip", path=warm_path))
    (tmp_path / "answers").write_text("y\n" * 9)
    with (tmp_path / "answers").open() as answers:
        done = subprocess.run(
            [program, *arguments], stdin=answers, capture_output=True, text=True, timeout=120, check=False
        )
        assert os.lseek(answers.fileno(), 0, os.SEEK_CUR) == 0
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
    assert str(folder) in done.stderr
    assert not (folder / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_process_names_damaged_images_and_nothing_else_speaks(
    gallery: Gallery, tmp_path: Path, shared: Path, warm_path: str
) -> None:
    """No library below writes warnings of its own between the lines."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x03\0\x31\x01\x02\0\x04\0\0\x7fsix\0"
    (tmp_path / "exif.jpg").write_bytes(picture("JPEG", exif=exif))
    bad = [tmp_path / name for name in ("cut85.tiff", "cut50.jpeg", "bomb.png", "only-header.tif")]
    for path in bad:
        path.write_bytes(DAMAGED[path.name][0])
    model = f"local-dir:{shared / 'models' / 'lit-mini'}"
    arguments = ["classify", gallery.index, *bad, tmp_path / "exif.jpg", "--format", "json", "--model", model]
    program = str(shutil.which("retrieval-tip", path=warm_path))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == len(bad) + 1, done.stderr
    assert json.loads(done.stdout)["input"] == str(tmp_path / "exif.jpg")
