"""Exported tables, and the recipe for caches of Tip-Adapter's code: complete rows, or one clear error and no file."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from numpy.testing import assert_allclose, assert_array_equal
from tables import unit_rows

from retrieval_tip.backbones.base import Identity
from retrieval_tip.data.feature_table import FeatureTable
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.data.tables import ParquetFiles
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.export.feature_tables import export_table, export_text
from retrieval_tip.index.build import build_index
from retrieval_tip.index.items import read_text_table
from retrieval_tip.model import Index
from retrieval_tip.settings import Settings
from retrieval_tip.store.edits import Edits

IDENTITY = Identity("fake", "tag", "sha256:00", "sha256:01", {"size": 4})


def rows_of(table):
    column = pq.read_table(table)["feature"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def cache_of(n=40, d=8, dtype="float32", **options):
    names = ["owl", "cat", "é dog"]  # not in alphabetical order
    keys = unit_rows(n, d).astype(dtype)
    labels = [names[i % 3] for i in range(n)]
    cache = Index.from_features(
        keys,
        labels,
        names,
        unit_rows(3, d, 5),
        settings=Settings(alpha=2.0, beta=3.0),
        **options,
    )
    return replace(cache, backbone=IDENTITY)


def rebuilt(cache, tmp_path, **options):
    assert export_table(cache, tmp_path / "keys.parquet") == cache.n
    assert export_text(cache, tmp_path / "text.parquet") == len(cache.class_names)
    return build_index(
        open_source(tmp_path / "keys.parquet"),
        tmp_path / "built",
        Reader(norms=options.pop("norms", "check")),
        text=tmp_path / "text.parquet",
        alpha=cache.settings.alpha,
        beta=cache.settings.beta,
        **options,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_index_built_from_an_export_is_the_same(tmp_path, dtype):
    cache = cache_of(dtype=dtype, sources=[f"s{i % 5}" for i in range(40)])  # with repeated sources
    labels = cache.labels.append_column("camera", pa.array([f"c{i}" for i in range(40)]))
    cache = replace(cache, rows=replace(cache.rows, labels=labels))
    built = rebuilt(cache, tmp_path, dtype=dtype)
    assert_array_equal(built.keys, cache.keys)
    assert built.keys.dtype == cache.keys.dtype
    assert built.class_names == cache.class_names
    for column in ("label", "source", "shot", "views", "camera", "digest", "class_id"):
        assert built.labels[column].to_pylist() == cache.labels[column].to_pylist(), column
    assert built.backbone == IDENTITY
    queries = unit_rows(20, 8, 4)
    assert_allclose(built.text_weights, cache.text_weights, atol=1e-7)
    assert_allclose(built.logits(queries), cache.logits(queries), atol=2e-5)
    assert_allclose(built.logits(queries, 5), cache.logits(queries, 5), atol=2e-5)


def test_the_exported_table_has_the_columns_of_the_label_store(tmp_path):
    cache = cache_of(dtype="float16")
    cache = cache.edited(Edits(remove=[3, 7]))
    export_table(cache, tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    further = ["key_id", "shot", "views", "digest", "added_at"]
    assert table.column_names == ["id", "label", "feature", *further]
    assert table.schema.field("feature").type == pa.list_(pa.float16(), 8)
    for column in (*further, "label"):
        assert table[column].to_pylist() == cache.labels[column].to_pylist()
    assert table["id"].to_pylist() == cache.labels["source"].to_pylist()
    assert FeatureTable(ParquetFiles(tmp_path / "t.parquet")).identity() == IDENTITY
    assert_array_equal(rows_of(tmp_path / "t.parquet"), cache.keys)


def test_fine_tuned_keys_are_exported_unchanged_and_need_their_norms(tmp_path, caplog):
    cache = cache_of()
    keys = np.asarray(cache.keys) * 3
    tuned = replace(cache, rows=replace(cache.rows, keys=keys))
    built = rebuilt(tuned, tmp_path, norms="keep")
    assert_array_equal(built.keys, keys)
    queries = unit_rows(9, 8, 4)
    assert_allclose(built.logits(queries), tuned.logits(queries), rtol=1e-5)
    assert not caplog.records
    trained = replace(tuned, rows=replace(tuned.rows, values=torch.ones(40, 3)))
    export_table(trained, tmp_path / "keys.parquet")
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
    assert_allclose(weights, cache.text_weights.numpy(), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_an_index_from_the_recipe_answers_like_the_research_code(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    keys = torch.from_numpy(unit_rows(30, 8)).to(dtype).T
    values = torch.eye(3)[torch.arange(30) * 7 % 3]
    Path("caches").mkdir()
    torch.save(keys, "caches/keys_16shots.pt")
    torch.save(values.half(), "caches/values_16shots.pt")
    Path("classes.txt").write_text("ant\nbee\ncat\n")
    page = (ROOT / "docs/exchange.md").read_text(encoding="utf-8")
    (recipe,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "torch.load" in block
    )
    exec(recipe, {})
    cache = build_index(
        open_source("cache.parquet"), "index", Reader(norms="unit"), alpha=1.5, beta=4.0
    )
    assert cache.class_names == ["ant", "bee", "cat"]
    queries = torch.from_numpy(unit_rows(10, 8, 7))
    expected = (
        1.5
        * torch.exp(-4.0 * (1 - queries @ torch.nn.functional.normalize(keys.float(), dim=0)))
        @ values
    )
    assert_allclose(cache.logits(queries).cpu(), expected, rtol=1e-4, atol=1e-4)
