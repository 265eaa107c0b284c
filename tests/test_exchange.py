"""Keys from and to other programs: what they wrote becomes a table row by row, or one clear error and no file."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval_tip.backbones.base import Identity
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data import feature_tables
from retrieval_tip.data import imports as exchange
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import IDENTITY_KEY, table_identity
from retrieval_tip.data.imports import import_table
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError
from retrieval_tip.index.build import build_index, read_text_table
from retrieval_tip.index.export import export_table, export_text
from retrieval_tip.settings import Settings

IDENTITY = Identity("fake", "tag", "sha256:00", "sha256:01", {"size": 4})


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(table: Path) -> np.ndarray:
    column = pq.read_table(table)["feature"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def research(folder: Path, n: int = 12, d: int = 5, c: int = 3, dtype: Any = torch.float16, shots: int = 16):
    """A cache as the research code writes it; its keys [n, d], and the class of each."""
    folder.mkdir(exist_ok=True)
    keys = torch.from_numpy(unit_rows(n, d)).to(dtype)
    ids = torch.from_numpy(np.random.default_rng(3).permutation(np.arange(n) % c))
    torch.save(keys.permute(1, 0), folder / f"keys_{shots}shots.pt")
    torch.save(torch.nn.functional.one_hot(ids, c).half(), folder / f"values_{shots}shots.pt")
    return keys, ids.tolist()


def refused(kind: type[Exception], words: str, source: Path, out: Path, **options: Any) -> str:
    """The one line of an error, after which nothing is left of the output."""
    before = sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(kind, match=words) as caught:
        import_table(source, out, **options)
    assert (sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else []) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tip-Adapter's caches


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_research_cache_becomes_rows_with_the_classes_of_its_one_hot_values(tmp_path, dtype, legacy):
    keys, ids = research(tmp_path / "c", dtype=dtype)
    if legacy:
        for file in (tmp_path / "c").iterdir():
            torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    out = tmp_path / "t.parquet"
    for source in (tmp_path / "c", tmp_path / "c/keys_16shots.pt"):
        assert import_table(source, out, classes=tmp_path / "names.txt") == 12
        source = open_source(out)
        assert source.labels == [["ant", "bee", "cat"][i] for i in ids]
        assert source.sources == [str(i) for i in range(12)]
        expected = keys.numpy() if dtype in (torch.float16, torch.float32) else keys.float().numpy()
        np.testing.assert_array_equal(rows_of(out), expected)
        assert rows_of(out).dtype == expected.dtype
    cache = build_index(
        source, tmp_path / "i", Encoder(), dtype="float16" if dtype == torch.float16 else "float32", fit="none"
    )
    assert cache.n == 12
    assert cache.class_names == ["ant", "bee", "cat"]


def test_classes_without_names_are_numbered(tmp_path):
    _, ids = research(tmp_path / "c")
    import_table(tmp_path / "c", tmp_path / "t.parquet")
    assert open_source(tmp_path / "t.parquet").labels == [f"class {i}" for i in ids]


def test_the_trained_adapter_is_taken_only_by_name_and_keeps_its_norms(tmp_path):
    research(tmp_path / "c", n=5, d=5)
    weight = torch.nn.Parameter(torch.from_numpy(unit_rows(5, 5, 8)).half() * 3)
    torch.save(weight, tmp_path / "c/best_F_16shots.pt")
    torch.save(torch.from_numpy(unit_rows(5, 5, 9)).half().T, tmp_path / "c/keys_16shots.pt")
    out = tmp_path / "t.parquet"
    import_table(tmp_path / "c/best_F_16shots.pt", out)
    np.testing.assert_array_equal(rows_of(out), weight.detach().numpy())
    with pytest.raises(InputError, match="norm 3 instead of 1; use norms=unit"):
        build_index(open_source(out), tmp_path / "i", Encoder(), fit="none")
    assert build_index(open_source(out), tmp_path / "i", Encoder(norms="keep"), fit="none").n == 5
    import_table(tmp_path / "c", out)
    np.testing.assert_array_equal(rows_of(out), unit_rows(5, 5, 9).astype(np.float16))


def test_square_keys_are_told_apart_by_their_norms_or_refused(tmp_path):
    folder, out = tmp_path / "c", tmp_path / "t.parquet"
    research(folder, n=6, d=6)
    rows = unit_rows(6, 6, 4)
    for saved in (rows.T, rows):  # a copy of the code that leaves out the transposing
        torch.save(torch.from_numpy(saved.copy()), folder / "keys_16shots.pt")
        import_table(folder, out)
        np.testing.assert_array_equal(rows_of(out), rows)
    out.unlink()
    for saved in (np.eye(6, dtype=np.float32), rows * 2):
        torch.save(torch.from_numpy(saved), folder / "keys_16shots.pt")
        refused(InputError, r"norms do not tell which are which; save the keys \[n, d\] as .npy", folder, out)


def test_several_caches_have_to_be_named(tmp_path):
    research(tmp_path / "c")
    research(tmp_path / "c", shots=4)
    out = tmp_path / "t.parquet"
    refused(UsageError, "keys_16shots.pt, keys_4shots.pt.*name one of them itself", tmp_path / "c", out)
    assert import_table(tmp_path / "c/keys_4shots.pt", out) == 12


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['RETRIEVAL_TIP_EVIL']}",))


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, which, how):
    marker = tmp_path / "ran"
    monkeypatch.setenv("RETRIEVAL_TIP_EVIL", str(marker))
    research(tmp_path / "c")
    file = tmp_path / "c" / f"{which}_16shots.pt"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save(Evil(), file, _use_new_zipfile_serialization=how == "torch")
    message = refused(InputError, "may be code and is not run", tmp_path / "c", tmp_path / "t.parquet")
    assert str(file) in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-300]), "damaged"),
        (lambda f: f.write_bytes(f.read_bytes()[:40]), "damaged"),
        (lambda f: f.write_bytes(b""), "damaged"),
        (lambda f: f.write_bytes(b"hello, world"), "damaged"),
        (lambda f: f.unlink(), "missing|no such file|holds nothing"),
        (lambda f: torch.save({"keys": torch.zeros(3)}, f), "holds a dict instead of a plain tensor"),
        (lambda f: torch.save([1, 2], f), "holds a list"),
        (lambda f: torch.save(torch.eye(12).to_sparse(), f), "instead of a plain tensor"),
        (lambda f: torch.save(torch.ones(1).expand(10**9, 12), f), "more than the file holds"),
        (lambda f: torch.save(torch.ones(12), f), r"shape \(12,\)"),
        (lambda f: torch.save(torch.ones(5, 7), f), r"shape \(5, 7\)|not one-hot"),
        (lambda f: torch.save(torch.ones(5, 0), f), r"shape \(5, 0\)"),
    ],
)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_damaged_or_other_file_is_one_line(tmp_path, which, make, words):
    research(tmp_path / "c")
    make(tmp_path / "c" / f"{which}_16shots.pt")
    message = refused((InputError, UsageError), words, tmp_path / "c", tmp_path / "t.parquet")
    assert str(tmp_path / "c") in message


def test_a_small_file_that_would_become_a_huge_one_is_refused(tmp_path):
    research(tmp_path / "c")
    file = tmp_path / "c/keys_16shots.pt"
    entries = {name: zipfile.ZipFile(file).read(name) for name in zipfile.ZipFile(file).namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in entries.items():
            bomb.writestr(name, data)
        bomb.writestr("keys_16shots/data/1", bytes(1 << 24))
    assert file.stat().st_size < 1 << 16
    refused(InputError, "it is compressed, which torch.save never does", tmp_path / "c", tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (torch.ones(5, 12, dtype=torch.int64), "int64"),
        (torch.ones(5, 12, dtype=torch.complex64), "complex64"),
        (torch.full((5, 12), torch.nan), "rows 0, 1, 2, 3, 4 and 7 more: the feature holds NaN"),
        (torch.zeros(5, 12), "the feature is zero"),
        (torch.ones(5, 12, dtype=torch.float8_e4m3fn), "float8"),
        (torch.full((5, 12), 1e300, dtype=torch.float64), "more than float32 can"),
    ],
)
def test_keys_that_cannot_be_features_are_refused(tmp_path, keys, words):
    research(tmp_path / "c")
    torch.save(keys, tmp_path / "c/keys_16shots.pt")
    refused(InputError, words, tmp_path / "c", tmp_path / "t.parquet")


@pytest.mark.parametrize("value", [0.9, 2.0, float("nan"), 0.0, -1.0])
def test_values_that_were_trained_are_refused(tmp_path, value):
    research(tmp_path / "c")
    values = torch.load(tmp_path / "c/values_16shots.pt")
    values[7, int(values[7].argmax())] = value
    torch.save(values, tmp_path / "c/values_16shots.pt")
    refused(InputError, "row 7 not one-hot; .* give the one-hot values", tmp_path / "c", tmp_path / "t.parquet")
    values[7] = 1
    torch.save(values, tmp_path / "c/values_16shots.pt")
    refused(InputError, "row 7 not one-hot", tmp_path / "c", tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n.txt", "ant\r\nbee\r\ncat \r\n\r\n"),
        ("n.json", '["ant", "bee", "cat"]'),
        ("n.json", '{"1": "bee", "0": "ant", "2": "cat"}'),
        ("n.json", '{"cat": 2, "ant": 0, "bee": 1}'),
        ("n.csv", "name\nant\nbee\ncat\n"),
        ("n.csv", "animals\nant\nbee\ncat\n"),
        ("n.csv", 'wordnet,class_name\nn1,ant\nn2,"bee"\nn3,cat\n'),
        ("n.txt", "\ufeffant\nbee\ncat"),
    ],
)
def test_class_names_come_in_every_form(tmp_path, name, text):
    _, ids = research(tmp_path / "c")
    (tmp_path / name).write_bytes(text.encode())
    import_table(tmp_path / "c", tmp_path / "t.parquet", classes=tmp_path / name)
    assert open_source(tmp_path / "t.parquet").labels == [["ant", "bee", "cat"][i] for i in ids]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("n.txt", b"ant\nbee\n", "2 names, but .*values_16shots.pt has 3 classes"),
        ("n.txt", b"ant\n\ncat", "class 1 has no name"),
        ("n.txt", b"", "class 0 has no name"),
        ("n.txt", b"ant\nant\ncat", "'ant' stands twice"),
        ("n.txt", b"\xff\xfe", "cannot be read"),
        ("n.txt", b"a" * 1025 + b"\nb\nc", "class 0 has no name; expected texts of 1 to 1024"),
        ("n.json", b"{", "cannot be read"),
        ("n.json", b"[" * 100_000, "cannot be read"),
        ("n.json", b"3", "has no name"),
        ("n.json", b"[]", "has no name"),
        ("n.json", b'["a", 3, "c"]', "class 1 has no name"),
        ("n.json", b'{"0": ["n01", "tench"], "1": "b", "2": "c"}', "class 0 has no name"),
        ("n.json", b'{"0": "a", "2": "b", "3": "c"}', "ids from 0 to 2"),
        ("n.json", b'{"a": 0, "b": 0, "c": 2}', "ids from 0 to 2"),
        ("n.csv", b"wordnet,animal\nn1,ant\n", "no column 'name' among wordnet, animal"),
        ("n.csv", b"", "cannot be read"),
        ("n.csv", b"name\n", "class has no name"),
        ("n.csv", b"name,b\n1\n", "cannot be read"),
        ("n.yaml", b"", "expected .txt, .json or .csv"),
        ("missing/n.txt", None, "no such file"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path, name, text, words):
    research(tmp_path / "c")
    if text is not None:
        (tmp_path / name).write_bytes(text)
    options = {"classes": tmp_path / name}
    refused((InputError, UsageError), words, tmp_path / "c", tmp_path / "t.parquet", **options)


# Arrays with labels


def save_array(tmp_path: Path, features: np.ndarray) -> Path:
    np.save(tmp_path / "f.npy", features)
    return tmp_path / "f.npy"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_keeps_its_dtype_or_becomes_float32(tmp_path, dtype, order):
    rows = np.asarray(unit_rows(6, 4), dtype=dtype, order=order)
    np.save(tmp_path / "l.npy", np.array(list("abcabc")))
    assert import_table(save_array(tmp_path, rows), tmp_path / "t.parquet", labels=tmp_path / "l.npy") == 6
    found = rows_of(tmp_path / "t.parquet")
    assert found.dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_array_equal(found, rows.astype(found.dtype))
    assert open_source(tmp_path / "t.parquet").labels == list("abcabc")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables_of_labels_bring_ids_and_further_columns(tmp_path, suffix):
    table = {"path": ['a,"1".jpg', "b\n2.jpg", "c\u00e9.jpg"], "label": ["x", "y", "x"], "camera": ["1", None, "3"]}
    file = tmp_path / f"labels{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(table).add_column(0, "feature", pa.array([1, 2, 3])), file)
    else:
        import csv

        with file.open("w", newline="", encoding="utf-8") as raw:
            writer = csv.writer(raw, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([list(table), *zip(*table.values(), strict=True)])
    out = tmp_path / "t.parquet"
    assert import_table(save_array(tmp_path, unit_rows(3, 4)), out, labels=file) == 3
    found = pq.read_table(out)
    assert found.column_names == ["id", "label", "feature", "camera"]
    assert found.drop_columns("feature").to_pydict() == {
        "id": table["path"],
        "label": table["label"],
        "camera": table["camera"],
    }
    np.testing.assert_array_equal(rows_of(out), unit_rows(3, 4))
    assert build_index(open_source(out), tmp_path / "i", Encoder(), fit="none").labels["camera"].to_pylist() == [
        "1",
        "3",
        None,
    ]


def test_another_column_of_labels(tmp_path):
    file = tmp_path / "l.csv"
    file.write_text("species,label,id\nant,1,i\nbee,2,j\n")
    out, array = tmp_path / "t.parquet", save_array(tmp_path, unit_rows(2, 4))
    import_table(array, out, labels=file, label_column="species")
    assert open_source(out).labels == ["ant", "bee"]
    out.unlink()
    refused(UsageError, "no column 'spezies' among species, label, id", array, out, labels=file, label_column="spezies")


def test_numbers_are_positions_among_the_classes_and_texts_are_names(tmp_path):
    (tmp_path / "n.json").write_text('["1", "0", "two"]')
    out, array = tmp_path / "t.parquet", save_array(tmp_path, unit_rows(3, 4))
    np.save(tmp_path / "l.npy", np.array([0, 1, 2], dtype=">i2"))
    import_table(array, out, labels=tmp_path / "l.npy", classes=tmp_path / "n.json")
    assert open_source(out).labels == ["1", "0", "two"]
    (tmp_path / "l.csv").write_text("label\n0\n1\n2\n")  # a text that is a name is that name
    import_table(array, out, labels=tmp_path / "l.csv", classes=tmp_path / "n.json")
    assert open_source(out).labels == ["0", "1", "two"]
    import_table(array, out, labels=tmp_path / "l.npy")
    assert open_source(out).labels == ["0", "1", "2"]
    out.unlink()
    for wrong in (-1, 3):
        np.save(tmp_path / "l.npy", np.array([0, wrong, 2]))
        options = {"labels": tmp_path / "l.npy", "classes": tmp_path / "n.json"}
        refused(InputError, f"row 1: label '{wrong}' is none of the classes", array, out, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label\na\nb\n", "3 rows, but 2 in"),
        ("label\na\nb\nc\nd\n", "3 rows, but 4 in"),
        ("label\n", "3 rows, but 0 in"),
        ("", "cannot be read"),
        ("name\na\nb\nc\n", "no column 'label' among name"),
        ("label,label\na,a\nb,b\nc,c\n", "a column name stands twice"),
        ("label,id\na,x\n ,y\nc,z\n", "row 1 without a label"),
        ("label,id\na,x\nb,\nc,z\n", "row 1 without an id"),
        (f"label\na\n{'b' * 1025}\nc\n", "row 1: label longer than 1024"),
        (f"label,id\na,1\nb,{'b' * 4097}\nc,2\n", "row 1: id longer than 4096"),
        ("label,id\na,1\nb\nc,3\n", "cannot be read"),
        ("label\nä\nb\udcff\nc\n", "cannot be read|no text"),
        ("path\na/x.jpg\nx.jpg\n./x.jpg\n", "rows 1, 2 without a folder of its own"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, text, words):
    (tmp_path / "l.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    array = save_array(tmp_path, unit_rows(3, 4))
    message = refused(InputError, words, array, tmp_path / "t.parquet", labels=tmp_path / "l.csv")
    assert "l.csv" in message


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([0.5, 1, 2]), "float64"),
        (np.array([[0], [1], [2]]), "shape"),
        (np.array([b"a", b"b", b"c"]), "whole numbers or strings"),
        (np.array(["a", None, {}], dtype=object), "cannot be read as .npy"),
        (np.array([0, 1]), "3 rows, but 2 in"),
        (np.array(["a", "", "c"]), "row 1 without a label"),
        (np.array(["a", "\ud800", "c"]), "no text"),
    ],
)
def test_arrays_of_labels_that_do_not_fit_are_refused(tmp_path, labels, words):
    np.save(tmp_path / "l.npy", labels, allow_pickle=True)
    refused(InputError, words, save_array(tmp_path, unit_rows(3, 4)), tmp_path / "t.parquet", labels=tmp_path / "l.npy")


def bad_rows(value: float, at: list[int], n: int = 6) -> np.ndarray:
    rows = unit_rows(n, 4)
    rows[at] = value
    return rows


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (bad_rows(np.nan, [1]), "row 1: the feature holds NaN"),
        (bad_rows(np.inf, [0, 5]), "rows 0, 5: the feature holds NaN"),
        (bad_rows(0, [2]), "row 2: the feature is zero"),
        (bad_rows(-0.0, [2]), "row 2: the feature is zero"),
        (unit_rows(6, 4).astype(np.float64) * 1e300, "more than float32 can"),
        (unit_rows(6, 4).astype(np.float64) * 1e-300, "the feature is zero"),
        (np.ones((6, 4), np.int32), "int32"),
        (np.ones((6, 4), np.complex64), "complex64"),
        (np.ones((6, 4), bool), "bool"),
        (np.ones(6, np.float32), "shape"),
        (np.ones((6, 0), np.float32), "shape"),
        (np.ones((6, 2, 2), np.float32), "shape"),
        (np.float32(1), "shape|rows"),
        (np.array([{}] * 6), "cannot be read as .npy"),
    ],
)
def test_arrays_that_are_no_features_are_refused_by_row(tmp_path, features, words):
    np.save(tmp_path / "f.npy", features, allow_pickle=True)
    np.save(tmp_path / "l.npy", np.arange(6))
    message = refused(InputError, words, tmp_path / "f.npy", tmp_path / "t.parquet", labels=tmp_path / "l.npy")
    assert "f.npy" in message


def test_all_bad_rows_of_a_file_are_counted_over_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "TABLE_ROWS", 7)
    np.save(tmp_path / "l.npy", np.arange(50))
    array = save_array(tmp_path, bad_rows(np.nan, [*range(20, 30), 45], 50))
    words = "rows 20, 21, 22, 23, 24 and 6 more: the feature holds NaN"
    refused(InputError, words, array, tmp_path / "t.parquet", labels=tmp_path / "l.npy")


def test_headers_that_lie_are_refused(tmp_path):
    np.save(tmp_path / "l.npy", np.arange(6))
    raw = save_array(tmp_path, unit_rows(6, 4)).read_bytes()
    for wrong in (
        raw[:-5],
        raw[:60],
        b"",
        raw.replace(b"(6, 4), ", b"(1 << 40"),
        raw.replace(b"(6, 4)", b"(6, 9)"),
        raw.replace(b"'<f4'", b"'|O' "),
        b"PK\x03\x04" + raw,
    ):
        (tmp_path / "f.npy").write_bytes(wrong)
        refused(
            InputError,
            "f.npy: cannot be read as .npy",
            tmp_path / "f.npy",
            tmp_path / "t.parquet",
            labels=tmp_path / "l.npy",
        )


# Folders of embeddings


def clip_folder(folder: Path, shards: list[int], *, width: int = 1, rows: int = 4, **columns: Any) -> np.ndarray:
    """clip-retrieval's output; its features in order."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    every = unit_rows(rows * len(shards), 4).astype(np.float16)
    for i, shard in enumerate(shards):
        part = range(i * rows, (i + 1) * rows)
        np.save(folder / f"img_emb/img_emb_{shard:0{width}}.npy", every[part.start : part.stop])
        made = {"image_path": [f"/data/class {j % 3}/{j}.jpg" for j in part], "caption": [f"no. {j}" for j in part]}
        made |= {name: make(part) for name, make in columns.items()}
        pq.write_table(pa.table(made), folder / f"metadata/metadata_{shard:0{width}}.parquet")
    return every


@pytest.mark.parametrize("width", [1, 3])
def test_clip_retrieval_shards_are_read_in_the_order_of_their_numbers(tmp_path, width):
    every = clip_folder(tmp_path / "c", list(range(12)), width=width)
    out = tmp_path / "t.parquet"
    assert import_table(tmp_path / "c", out) == 48
    np.testing.assert_array_equal(rows_of(out), every)
    found = pq.read_table(out)
    assert found["label"].to_pylist() == [f"class {j % 3}" for j in range(48)]
    assert found["id"].to_pylist() == [f"/data/class {j % 3}/{j}.jpg" for j in range(48)]
    assert found["caption"].to_pylist() == [f"no. {j}" for j in range(48)]


def test_labels_of_shards_come_from_the_column_that_is_there(tmp_path):
    clip_folder(tmp_path / "c", [0, 1], label=lambda part: [f"l{j}" for j in part], wnid=lambda part: list(part))
    out = tmp_path / "t.parquet"
    import_table(tmp_path / "c", out)
    assert open_source(out).labels == [f"l{j}" for j in range(8)]
    import_table(tmp_path / "c", out, label_column="wnid")
    assert open_source(out).labels == [str(j) for j in range(8)]
    clip_folder(tmp_path / "d", [0], image_path=lambda part: [f"C:\\x\\cat\\{j}.jpg" for j in part])
    import_table(tmp_path / "d", out)
    assert open_source(out).labels == ["cat"] * 4
    clip_folder(tmp_path / "e", [0], image_path=lambda part: [f"{j:09}" for j in part])  # of a webdataset
    out.unlink()
    refused(InputError, "rows 0, 1, 2, 3 without a folder of its own", tmp_path / "e", out)


def test_a_flat_folder_pairs_by_number_or_by_order(tmp_path):
    out = tmp_path / "t.parquet"
    for names in ([("e_2", "m_02"), ("e_10", "m_10")], [("alpha", "aaa"), ("beta", "bbb")]):
        folder = tmp_path / names[0][0]
        folder.mkdir()
        for i, (array, table) in enumerate(names):
            np.save(folder / f"{array}.npy", unit_rows(2, 4, i))
            pq.write_table(pa.table({"label": [f"{i}a", f"{i}b"]}), folder / f"{table}.parquet")
        (folder / "knn.index").write_bytes(b"x")
        (folder / ".hidden.npy").write_bytes(b"x")
        import_table(folder, out)
        np.testing.assert_array_equal(rows_of(out), np.concatenate([unit_rows(2, 4, 0), unit_rows(2, 4, 1)]))
        assert open_source(out).labels == ["0a", "0b", "1a", "1b"]
        assert open_source(out).sources == ["0", "1", "2", "3"]


def test_shards_may_lack_columns_and_differ_in_width(tmp_path):
    clip_folder(tmp_path / "c", [0, 1], url=lambda part: [f"u{j}" for j in part], width_px=lambda part: list(part))
    second = tmp_path / "c/metadata/metadata_1.parquet"
    table = pq.read_table(second).drop_columns("url")
    pq.write_table(table.set_column(2, "width_px", table["width_px"].cast(pa.float64())), second)
    np.save(tmp_path / "c/img_emb/img_emb_1.npy", unit_rows(4, 4))
    out = tmp_path / "t.parquet"
    import_table(tmp_path / "c", out)
    found = pq.read_table(out)
    assert found["url"].to_pylist() == ["u0", "u1", "u2", "u3", None, None, None, None]
    assert found["width_px"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert rows_of(out).dtype == np.float32
    np.testing.assert_array_equal(rows_of(out)[4:], unit_rows(4, 4))


def spoil(folder: Path, what: str) -> None:
    array, table = folder / "img_emb/img_emb_1.npy", folder / "metadata/metadata_1.parquet"
    outside = folder.parent / "outside"
    outside.mkdir()
    match what:
        case "count":
            pq.write_table(pq.read_table(table).slice(1), table)
        case "lost table":
            table.unlink()
        case "lost array":
            array.unlink()
        case "twice":
            array.with_name("img_emb_01.npy").write_bytes(array.read_bytes())
        case "dim":
            np.save(array, unit_rows(4, 5))
        case "nan":
            np.save(array, bad_rows(np.nan, [3], 4))
        case "array link" | "table link":
            file = array if what == "array link" else table
            file.rename(outside / file.name)
            file.symlink_to(outside / file.name)
        case "dangling":
            array.unlink()
            array.symlink_to(folder / "img_emb/nothing.npy")
        case "folder link":
            (folder / "metadata").rename(outside / "metadata")
            (folder / "metadata").symlink_to(outside / "metadata")
        case "no metadata":
            (folder / "metadata").rename(outside / "metadata")
        case "column":
            pq.write_table(pq.read_table(table).drop_columns("image_path"), table)
        case "type":
            found = pq.read_table(table)
            pq.write_table(found.set_column(1, "caption", pa.array([[1]] * 4)), table)
        case "no parquet":
            table.write_bytes(b"PAR1 not")
        case "label type":
            found = pq.read_table(table)
            pq.write_table(found.set_column(0, "image_path", pa.array([0.5] * 4)), table)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("count", r"img_emb_1.npy: 4 rows, but 3 in .*metadata_1.parquet"),
        ("lost table", "number 1 is not that of one .npy and one .parquet"),
        ("lost array", "number 1 is not that of one .npy and one .parquet"),
        ("twice", "number 1 is not that of one"),
        ("dim", "img_emb_1.npy: features of 5 values, .*img_emb_0.npy has 4"),
        ("nan", "img_emb_1.npy: row 3: the feature holds NaN"),
        ("array link", "img_emb_1.npy: is a link that leads out of the folder"),
        ("table link", "metadata_1.parquet: is a link that leads out of the folder"),
        ("dangling", "img_emb_1.npy: missing"),
        ("folder link", "is a link that leads out of the folder"),
        ("no metadata", "metadata: no such folder"),
        ("column", "metadata_1.parquet: no column 'image_path'"),
        ("type", "a column is of another type in another file"),
        ("no parquet", "metadata_1.parquet: cannot be read"),
        ("label type", "metadata_1.parquet: column 'id' is double"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, what, words):
    clip_folder(tmp_path / "c", [0, 1])
    spoil(tmp_path / "c", what)
    refused(InputError, words, tmp_path / "c", tmp_path / "t.parquet")


def test_links_within_a_folder_are_followed(tmp_path):
    every = clip_folder(tmp_path / "c", [0])
    array = tmp_path / "c/img_emb/img_emb_0.npy"
    array.rename(tmp_path / "c/blob")
    array.symlink_to("../blob")
    (tmp_path / "link").symlink_to("c")
    import_table(tmp_path / "link", tmp_path / "t.parquet")
    np.testing.assert_array_equal(rows_of(tmp_path / "t.parquet"), every)


def test_empty_shards_pass_and_empty_folders_do_not(tmp_path):
    every = clip_folder(tmp_path / "c", [0, 1])
    np.save(tmp_path / "c/img_emb/img_emb_0.npy", every[:0])
    first = tmp_path / "c/metadata/metadata_0.parquet"
    pq.write_table(pq.read_table(first).slice(0, 0), first)
    assert import_table(tmp_path / "c", tmp_path / "t.parquet") == 4
    (tmp_path / "t.parquet").unlink()
    np.save(tmp_path / "c/img_emb/img_emb_1.npy", every[:0])
    second = tmp_path / "c/metadata/metadata_1.parquet"
    pq.write_table(pq.read_table(second).slice(0, 0), second)
    refused(InputError, "0 rows in all", tmp_path / "c", tmp_path / "t.parquet")
    (tmp_path / "nothing").mkdir()
    refused(UsageError, "holds nothing that can be imported; expected", tmp_path / "nothing", tmp_path / "t.parquet")


# Of every kind


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nowhere", {}, "no such file or folder"),
        ("x" * 300, {}, "cannot be read"),
        ("c/values_16shots.pt", {}, "cannot be imported; expected"),
        ("c/keys_16shots.pt", {"labels": "l.csv"}, "go with a .npy"),
        ("c/keys_16shots.pt", {"label_column": "x"}, "has no columns"),
        ("c", {"labels": "l.csv"}, "go with a .npy"),
        ("f.npy", {}, "needs labels"),
        ("f.npy", {"labels": "l.xlsx"}, "no such file"),
        ("f.npy", {"labels": "c"}, "not a file"),
        ("f.npy", {"labels": "c/keys_16shots.pt"}, "not labels"),
        ("table.parquet", {}, "cannot be imported"),
        ("pipe.npy", {"labels": "l.csv"}, "not a file"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, source, options, words):
    research(tmp_path / "c")
    save_array(tmp_path, unit_rows(3, 4))
    (tmp_path / "table.parquet").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.npy")
    options = {name: value if name == "label_column" else tmp_path / value for name, value in options.items()}
    refused(RetrievalTipError, words, tmp_path / source, tmp_path / "t.parquet", **options)


def test_a_source_is_never_written_over(tmp_path):
    clip_folder(tmp_path / "c", [0])
    table = tmp_path / "c/metadata/metadata_0.parquet"
    before = table.read_bytes()
    refused(UsageError, "is what is read here", tmp_path / "c", table)
    assert table.read_bytes() == before


@pytest.mark.parametrize("name", ["-", "--out", "a b", "é\u2028", "*?[x]", "x\udcff", "..."])
def test_odd_names_work(tmp_path, name):
    place = tmp_path / name
    keys, _ = research(place)
    (place / f"{name}.txt").write_text("a\nb\nc")
    assert import_table(place, place / name, classes=place / f"{name}.txt") == 12
    found = tmp_path / "t.parquet"
    (place / name).rename(found)
    np.testing.assert_array_equal(rows_of(found), keys.numpy())
    (place / "keys_16shots.pt").rename(place / f"{name}keys.pt")
    np.save(place / f"{name}.npy", keys.numpy())
    (place / f"{name}.csv").write_text("label\n" + "a\n" * 12)
    assert import_table(place / f"{name}.npy", found, labels=place / f"{name}.csv") == 12


def test_a_long_import_stays_flat_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "TABLE_ROWS", 1024)
    n, d = 60_000, 64
    array = np.lib.format.open_memmap(tmp_path / "f.npy", mode="w+", dtype=np.float32, shape=(n, d))
    array[:] = 1
    (tmp_path / "l.csv").write_text("label\n" + "a\nb\n" * (n // 2))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    blocks = feature_tables.write_table

    def watched(out, schema, found):
        def each():
            for block in found:
                assert len(block) <= 1024
                assert pool.bytes_allocated() - before < 4 << 20
                yield block

        return blocks(out, schema, each())

    monkeypatch.setattr(exchange, "write_table", watched)
    try:
        assert import_table(tmp_path / "f.npy", tmp_path / "t.parquet", labels=tmp_path / "l.csv") == n
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # the features alone are 15 MiB
    finally:
        tracemalloc.stop()


def test_too_many_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "MAX_ROWS", 7)
    clip_folder(tmp_path / "c", [0, 1])
    refused(InputError, "8 rows in all; expected 1 to 7", tmp_path / "c", tmp_path / "t.parquet")


@pytest.mark.parametrize("where", ["no/such/folder/t.parquet", "folder", "file/t.parquet", "y" * 300])
def test_places_that_cannot_be_written_are_one_line(tmp_path, where):
    research(tmp_path / "c")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(map(str, tmp_path.rglob("*")))
    for write in (lambda out: import_table(tmp_path / "c", out), lambda out: export_table(cache_of(), out)):
        with pytest.raises(InputError, match="cannot be") as caught:
            write(tmp_path / where)
        assert "\n" not in str(caught.value)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_full_disk_leaves_the_old_table_and_nothing_else(tmp_path, monkeypatch):
    research(tmp_path / "c")
    out = tmp_path / "t.parquet"
    import_table(tmp_path / "c", out)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    for write in (
        lambda: import_table(tmp_path / "c", out),
        lambda: export_table(cache_of(), out),
        lambda: export_text(cache_of(), out),
    ):
        with pytest.raises(InputError, match=r"t\.parquet: cannot be written: No space left on device"):
            write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "t.parquet"]
    assert out.read_bytes() == before


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    d=st.integers(1, 5),
    block=st.integers(1, 5),
    group=st.integers(1, 4),
    data=st.data(),
)
def test_whatever_is_in_the_shards_is_in_the_table_row_by_row(
    tmp_path_factory, monkeypatch, counts, dtype, d, block, group, data
):
    folder = tmp_path_factory.mktemp("shards")
    labels = data.draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
            min_size=sum(counts),
            max_size=sum(counts),
        )
    )
    every = (np.random.default_rng(sum(counts)).normal(size=(sum(counts), d)) + 9).astype(dtype)
    start = 0
    for i, count in enumerate(counts):
        stop = start + count
        np.save(folder / f"a{i}.npy", every[start:stop])
        table = pa.table({"label": pa.array(labels[start:stop], pa.string()), "n": pa.array(range(start, stop))})
        pq.write_table(table, folder / f"b{i}.parquet", row_group_size=group)
        start = stop
    monkeypatch.setattr(exchange, "TABLE_ROWS", block)
    out = folder / "out" / "t.parquet"
    out.parent.mkdir()
    assert import_table(folder, out) == sum(counts)
    found = pq.read_table(out)
    assert found["label"].to_pylist() == labels
    assert found["n"].to_pylist() == list(range(sum(counts)))
    kept = "float16" if dtype == "float16" else "float32"
    np.testing.assert_array_equal(rows_of(out), every.astype(kept))
    assert len(open_source(out)) == sum(counts)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["keys_16shots.pt", "values_16shots.pt", "f.npy"])
def test_files_with_changed_bytes_are_whole_tables_or_one_line(tmp_path_factory, name, flips):
    folder = tmp_path_factory.mktemp("flips")
    keys, ids = research(folder)
    options, source, out = {}, folder / "keys_16shots.pt", folder / "t.parquet"
    if name == "f.npy":
        np.save(folder / "l.npy", np.array(ids))
        source, options = save_array(folder, keys.numpy()), {"labels": folder / "l.npy"}
    raw = bytearray((folder / name).read_bytes())
    for place, value in flips:
        raw[int(place * len(raw))] = value
    (folder / name).write_bytes(raw)
    problem = None
    try:
        assert import_table(source, out, **options) == len(open_source(out)) == len(rows_of(out))
    except InputError as error:
        problem = str(error)
    if problem is not None:
        assert str(folder) in problem
        assert "\n" not in problem
        assert not out.exists()
    assert not list(folder.glob(".*"))


# Out of an index


def cache_of(n: int = 40, d: int = 8, dtype: str = "float32", **options: Any) -> CacheModel:
    names = ["owl", "cat", "é dog"]  # in an order of their own
    keys = unit_rows(n, d).astype(dtype)
    labels = [names[i % 3] for i in range(n)]
    cache = CacheModel.from_features(
        keys, labels, names, unit_rows(3, d, 5), settings=Settings(alpha=2.0, beta=3.0), device="cpu", **options
    )
    return replace(cache, backbone=IDENTITY)


def rebuilt(cache: CacheModel, tmp_path: Path, **options: Any) -> CacheModel:
    assert export_table(cache, tmp_path / "keys.parquet") == cache.n
    assert export_text(cache, tmp_path / "text.parquet") == len(cache.class_names)
    return build_index(
        open_source(tmp_path / "keys.parquet"),
        tmp_path / "built",
        Encoder(norms=options.pop("norms", "check")),
        text=tmp_path / "text.parquet",
        alpha=cache.settings.alpha,
        beta=cache.settings.beta,
        device="cpu",
        **options,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_index_built_from_what_was_exported_is_the_same(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(exchange, "TABLE_ROWS", 7)
    cache = cache_of(dtype=dtype, sources=[f"s{i % 5}" for i in range(40)])  # which repeat
    cache = replace(cache, labels=cache.labels.append_column("camera", pa.array([f"c{i}" for i in range(40)])))
    built = rebuilt(cache, tmp_path, dtype=dtype)
    np.testing.assert_array_equal(built.keys, cache.keys)
    assert built.keys.dtype == cache.keys.dtype
    assert built.class_names == cache.class_names
    for column in ("label", "source", "shot", "views", "camera", "digest", "class_id"):
        assert built.labels[column].to_pylist() == cache.labels[column].to_pylist(), column
    assert built.backbone == IDENTITY
    queries = unit_rows(20, 8, 4)
    np.testing.assert_allclose(built.text_weights, cache.text_weights, atol=1e-7)
    np.testing.assert_allclose(built.logits(queries), cache.logits(queries), atol=2e-5)
    np.testing.assert_allclose(built.logits(queries, 5), cache.logits(queries, 5), atol=2e-5)


def test_the_exported_table_says_what_the_index_knows(tmp_path):
    cache = cache_of(dtype="float16")
    cache.remove([3, 7])
    export_table(cache, tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    further = ["key_id", "shot", "views", "digest", "added_at"]
    assert table.column_names == ["id", "label", "feature", *further]
    assert table.schema.field("feature").type == pa.list_(pa.float16(), 8)
    for column in (*further, "label"):
        assert table[column].to_pylist() == cache.labels[column].to_pylist()
    assert table["id"].to_pylist() == cache.labels["source"].to_pylist()
    assert table_identity(tmp_path / "t.parquet") == IDENTITY
    assert json.loads(table.schema.metadata[IDENTITY_KEY]) == IDENTITY.to_dict()
    np.testing.assert_array_equal(rows_of(tmp_path / "t.parquet"), cache.keys)


def test_fine_tuned_keys_leave_as_they_are_and_build_with_norms_kept(tmp_path, caplog):
    cache = cache_of()
    keys = np.asarray(cache.keys) * 3
    tuned = replace(cache, keys=keys, index=cache._index_over(keys, cache.labels["class_id"].to_numpy()))
    built = rebuilt(tuned, tmp_path, norms="keep")
    np.testing.assert_array_equal(built.keys, keys)
    queries = unit_rows(9, 8, 4)
    np.testing.assert_allclose(built.logits(queries), tuned.logits(queries), rtol=1e-5)
    assert not caplog.records
    export_table(replace(tuned, values=torch.ones(40, 3)), tmp_path / "keys.parquet")
    assert "trained values of the index cannot be in a table" in caplog.text


class Sliced:
    """Keys that can be sliced and nothing else."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys, self.shape, self.dtype = keys, keys.shape, keys.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert isinstance(rows, slice)
        return self._keys[rows]


def test_keys_need_no_more_than_slicing(tmp_path):
    cache = cache_of()
    expected = np.asarray(cache.keys)
    cache.keys = Sliced(expected)
    assert export_table(cache, tmp_path / "t.parquet") == 40
    np.testing.assert_array_equal(rows_of(tmp_path / "t.parquet"), expected)


def test_keys_without_a_source_are_named_by_their_id(tmp_path):
    cache = cache_of(4, sources=["a", "", None, "  "])
    export_table(cache, tmp_path / "t.parquet")
    ids = cache.labels["key_id"].to_pylist()
    expected = ["a" if i == 0 else f"key {i}" for i in ids]
    assert open_source(tmp_path / "t.parquet").sources == expected


def test_an_index_without_text_has_none_to_export(tmp_path):
    cache = cache_of()
    bare = replace(cache, text_weights=torch.zeros(3, 8))
    with pytest.raises(UsageError, match="no text weights"):
        export_text(bare, tmp_path / "t.parquet")
    partly = replace(cache, text_weights=cache.text_weights * torch.tensor([[1.0], [0.0], [1.0]]))
    with pytest.raises(InputError, match="class 'cat' has no text weight"):
        export_text(partly, tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())
    export_text(cache, tmp_path / "t.parquet")
    names, weights = read_text_table(tmp_path / "t.parquet")
    assert list(names) == cache.class_names
    np.testing.assert_allclose(weights, cache.text_weights.numpy(), atol=1e-7)


def test_what_was_imported_and_built_answers_as_the_research_code(tmp_path):
    research(tmp_path / "c", n=30, d=8, c=3, dtype=torch.float32)
    import_table(tmp_path / "c", tmp_path / "t.parquet")
    cache = build_index(open_source(tmp_path / "t.parquet"), tmp_path / "i", Encoder(), alpha=1.5, beta=4.0)
    queries = torch.from_numpy(unit_rows(10, 8, 7))
    affinity = queries @ torch.load(tmp_path / "c/keys_16shots.pt")
    expected = 1.5 * torch.exp(-4.0 * (1 - affinity)) @ torch.load(tmp_path / "c/values_16shots.pt").float()
    np.testing.assert_allclose(cache.logits(queries).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert cache.class_names == ["class 0", "class 1", "class 2"]
