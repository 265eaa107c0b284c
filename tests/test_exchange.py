"""Caches of Tip-Adapter's code and exported tables: complete rows, or one clear error and no file."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
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
from tables import unit_rows

from retrieval_tip.backbones.base import Identity
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import table_identity
from retrieval_tip.data.imports import import_table
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError
from retrieval_tip.index.build import build_index
from retrieval_tip.index.changes import import_index
from retrieval_tip.index.export import export_table, export_text
from retrieval_tip.index.items import read_text_table
from retrieval_tip.settings import Settings

IDENTITY = Identity("fake", "tag", "sha256:00", "sha256:01", {"size": 4})


def rows_of(table: Path) -> np.ndarray:
    column = pq.read_table(table)["feature"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def research(folder: Path, n: int = 12, d: int = 5, c: int = 3, dtype: Any = torch.float16, shots: int = 16):
    """Write a cache as the research code does. Return its keys, of shape ``[n, d]``, and their classes."""
    folder.mkdir(exist_ok=True)
    keys = torch.from_numpy(unit_rows(n, d)).to(dtype)
    ids = torch.from_numpy(np.random.default_rng(3).permutation(np.arange(n) % c))
    torch.save(keys.permute(1, 0), folder / f"keys_{shots}shots.pt")
    torch.save(torch.nn.functional.one_hot(ids, c).half(), folder / f"values_{shots}shots.pt")
    return keys, ids.tolist()


def refused(source: Path, named: Path | str, kind: type[Exception] = InputError, classes: Path | None = None) -> None:
    """Check that the import fails with one line that names a file, and writes no table."""
    out = source.parent / "refused.parquet"
    with pytest.raises(kind) as caught:
        import_table(source, out, classes)
    assert "\n" not in str(caught.value)
    assert str(named) in str(caught.value)
    assert not list(out.parent.glob("*refused*"))


# Tip-Adapter's caches


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_research_cache_becomes_rows_with_the_classes_of_its_values(tmp_path, dtype, legacy):
    keys, ids = research(tmp_path / "c", dtype=dtype)
    if legacy:
        for file in (tmp_path / "c").iterdir():
            torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    (tmp_path / "names.txt").write_bytes("\ufeffant\r\nbee \r\ncat\r\n\r\n".encode())
    out = tmp_path / "t.parquet"
    for source in (tmp_path / "c", tmp_path / "c/keys_16shots.pt"):
        assert import_table(source, out, tmp_path / "names.txt") == 12
        assert open_source(out).labels == [["ant", "bee", "cat"][i] for i in ids]
        assert open_source(out).sources == [str(i) for i in range(12)]
        expected = keys.numpy() if dtype in (torch.float16, torch.float32) else keys.float().numpy()
        np.testing.assert_array_equal(rows_of(out), expected)
        assert rows_of(out).dtype == expected.dtype
    import_table(tmp_path / "c", out)
    assert open_source(out).labels == [f"class {i}" for i in ids]


def test_a_trained_adapter_must_be_named_and_keeps_its_norms(tmp_path):
    research(tmp_path / "c", n=5, d=5)
    weight = torch.nn.Parameter(torch.from_numpy(unit_rows(5, 5, 8)).half() * 3)
    torch.save(weight, tmp_path / "c/best_F_16shots.pt")
    torch.save(torch.from_numpy(unit_rows(5, 5, 9)).half().T, tmp_path / "c/keys_16shots.pt")
    out = tmp_path / "t.parquet"
    import_table(tmp_path / "c/best_F_16shots.pt", out)
    np.testing.assert_array_equal(rows_of(out), weight.detach().numpy())
    with pytest.raises(InputError, match=r"best_F_16shots\.pt.* norm 3"):
        import_index(tmp_path / "c/best_F_16shots.pt", tmp_path / "i")
    assert import_index(tmp_path / "c/best_F_16shots.pt", tmp_path / "i", norms="keep").n == 5
    import_table(tmp_path / "c", out)
    np.testing.assert_array_equal(rows_of(out), unit_rows(5, 5, 9).astype(np.float16))


def test_the_orientation_of_square_keys_follows_from_their_norms(tmp_path):
    folder, out = tmp_path / "c", tmp_path / "t.parquet"
    research(folder, n=6, d=6)
    rows = unit_rows(6, 6, 4)
    for saved in (rows.T, rows):  # some copies of the code do not transpose
        torch.save(torch.from_numpy(saved.copy()), folder / "keys_16shots.pt")
        import_table(folder, out)
        np.testing.assert_array_equal(rows_of(out), rows)
    for saved in (np.eye(6, dtype=np.float32), rows * 2):
        torch.save(torch.from_numpy(saved), folder / "keys_16shots.pt")
        refused(folder, "keys_16shots.pt")


def test_an_import_needs_a_single_cache(tmp_path):
    research(tmp_path / "c")
    research(tmp_path / "c", shots=4)
    refused(tmp_path / "c", "keys_16shots.pt, keys_4shots.pt", UsageError)
    assert import_table(tmp_path / "c/keys_4shots.pt", tmp_path / "t.parquet") == 12
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "c/values_16shots.pt", tmp_path / "t.parquet"):
        refused(source, source, UsageError)
    refused(tmp_path / "nowhere", "nowhere")
    refused(tmp_path / ("x" * 300), "x" * 300)


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
    refused(tmp_path / "c", file)
    assert not marker.exists()


def bomb(file: Path) -> None:
    with zipfile.ZipFile(file) as saved:
        entries = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in entries.items():
            packed.writestr(name, data)
        packed.writestr("keys_16shots/data/1", bytes(1 << 24))
    assert file.stat().st_size < 1 << 16


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize(
    "make",
    [
        lambda f: f.write_bytes(f.read_bytes()[:-300]),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(b"hello, world"),
        lambda f: f.rename(f.with_suffix(".other")),
        lambda f: f.unlink() or os.mkfifo(f),
        bomb,
        lambda f: torch.save({"keys": torch.zeros(3)}, f),
        lambda f: torch.save(torch.eye(12).to_sparse(), f),
        lambda f: torch.save(torch.ones(1).expand(10**9, 12), f),
        lambda f: torch.save(torch.ones(5, 12, dtype=torch.complex64), f),
        lambda f: torch.save(torch.ones(5, 12, dtype=torch.float8_e4m3fn), f),
        *(lambda f, shape=shape: torch.save(torch.ones(shape), f) for shape in [(12,), (5, 7), (5, 0), (0, 12)]),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path, which, make: Callable[[Path], object]):
    research(tmp_path / "c")
    make(tmp_path / "c" / f"{which}_16shots.pt")
    refused(tmp_path / "c", tmp_path / "c", RetrievalTipError)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e300])
def test_invalid_keys_are_refused(tmp_path, value):
    research(tmp_path / "c")
    torch.save(torch.full((5, 12), value, dtype=torch.float64), tmp_path / "c/keys_16shots.pt")
    with pytest.raises(InputError, match="rows 0, 1, "):
        import_index(tmp_path / "c", tmp_path / "i")
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("value", [0.9, 2.0, float("nan"), 0.0, -1.0])
def test_trained_values_are_refused(tmp_path, value):
    research(tmp_path / "c")
    values = torch.load(tmp_path / "c/values_16shots.pt")
    values[7, int(values[7].argmax())] = value
    torch.save(values, tmp_path / "c/values_16shots.pt")
    refused(tmp_path / "c", "values_16shots.pt: row 7 ")


@pytest.mark.parametrize("text", [b"ant\nbee\n", b"ant\n\ncat", b"", b"ant\nant\ncat", b"\xff\xfe", None])
def test_invalid_lists_of_class_names_are_refused(tmp_path, text):
    research(tmp_path / "c")
    if text is not None:
        (tmp_path / "n.txt").write_bytes(text)
    refused(tmp_path / "c", tmp_path / "n.txt", classes=tmp_path / "n.txt")


@pytest.mark.parametrize("name", ["-", "--out", "é\u2028", "*?[x]", "x\udcff"])
def test_odd_names_work(tmp_path, name):
    place = tmp_path / name
    keys, _ = research(place)
    (place / f"{name}.txt").write_text("a\nb\nc")
    assert import_table(place, place / name, place / f"{name}.txt") == 12
    (place / name).rename(tmp_path / "t.parquet")
    np.testing.assert_array_equal(rows_of(tmp_path / "t.parquet"), keys.numpy())


@pytest.mark.parametrize("where", ["no/such/folder/t.parquet", "folder", "file/t.parquet", "y" * 300])
def test_an_unwritable_output_is_refused_in_one_line(tmp_path, where):
    research(tmp_path / "c")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(map(str, tmp_path.rglob("*")))
    for write in (lambda out: import_table(tmp_path / "c", out), lambda out: export_table(cache_of(), out)):
        with pytest.raises(InputError) as caught:
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


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["keys_16shots.pt", "values_16shots.pt"])
def test_files_with_changed_bytes_give_a_whole_table_or_one_line(tmp_path_factory, name, flips):
    folder = tmp_path_factory.mktemp("flips")
    research(folder)
    raw = bytearray((folder / name).read_bytes())
    for place, value in flips:
        raw[int(place * len(raw))] = value
    (folder / name).write_bytes(raw)
    out = folder / "t.parquet"
    problem = None
    try:
        assert import_table(folder, out) == len(open_source(out)) == len(rows_of(out))
    except InputError as error:
        problem = str(error)
    if problem is not None:
        assert str(folder) in problem
        assert "\n" not in problem
        assert not out.exists()
    assert not list(folder.glob(".*"))


# Exports


def cache_of(n: int = 40, d: int = 8, dtype: str = "float32", **options: Any) -> CacheModel:
    names = ["owl", "cat", "é dog"]  # not in alphabetical order
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
def test_an_index_built_from_an_export_is_the_same(tmp_path, dtype):
    cache = cache_of(dtype=dtype, sources=[f"s{i % 5}" for i in range(40)])  # with repeated sources
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


def test_the_exported_table_has_the_columns_of_the_label_store(tmp_path):
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
    np.testing.assert_array_equal(rows_of(tmp_path / "t.parquet"), cache.keys)


def test_fine_tuned_keys_are_exported_unchanged_and_need_their_norms(tmp_path, caplog):
    cache = cache_of()
    keys = np.asarray(cache.keys) * 3
    tuned = replace(cache, keys=keys, index=cache._index_over(keys, cache.labels["class_id"].to_numpy()))
    built = rebuilt(tuned, tmp_path, norms="keep")
    np.testing.assert_array_equal(built.keys, keys)
    queries = unit_rows(9, 8, 4)
    np.testing.assert_allclose(built.logits(queries), tuned.logits(queries), rtol=1e-5)
    assert not caplog.records
    export_table(replace(tuned, values=torch.ones(40, 3)), tmp_path / "keys.parquet")
    assert "a table cannot hold trained values" in caplog.text


def test_keys_without_a_source_get_their_key_id(tmp_path):
    cache = cache_of(4, sources=["a", "", None, "  "])
    export_table(cache, tmp_path / "t.parquet")
    ids = cache.labels["key_id"].to_pylist()
    expected = ["a" if i == 0 else f"key {i}" for i in ids]
    assert open_source(tmp_path / "t.parquet").sources == expected


def test_an_index_without_text_cannot_export_text(tmp_path):
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


def test_an_imported_cache_answers_like_the_research_code(tmp_path):
    research(tmp_path / "c", n=30, d=8, c=3, dtype=torch.float32)
    import_table(tmp_path / "c", tmp_path / "t.parquet")
    cache = build_index(open_source(tmp_path / "t.parquet"), tmp_path / "i", Encoder(), alpha=1.5, beta=4.0)
    queries = torch.from_numpy(unit_rows(10, 8, 7))
    affinity = queries @ torch.load(tmp_path / "c/keys_16shots.pt")
    expected = 1.5 * torch.exp(-4.0 * (1 - affinity)) @ torch.load(tmp_path / "c/values_16shots.pt").float()
    np.testing.assert_allclose(cache.logits(queries).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert cache.class_names == ["class 0", "class 1", "class 2"]
