"""Views: features by shot, and pixels for training an encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake import IDENTITY, Fake, Reads, picture, pictures, source_of, with_identity
from tables import unit_rows

from retrieval_tip.backbones.base import unit
from retrieval_tip.data import images
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader, view_names
from retrieval_tip.data.sources import Source, open_items, open_source
from retrieval_tip.data.tables import TABLE_ROWS
from retrieval_tip.errors import BackboneError, InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[EncodingCache]:
    cache = EncodingCache(tmp_path / "cache")
    yield cache
    cache.close()


def by_hand(backbone: Any, path: str, name: str) -> torch.Tensor:
    data = images.read(path)
    digest = hashlib.sha256(data).hexdigest()
    decoded = images.decode(data)
    return backbone.preprocess(decoded) if name == "centre" else backbone.view(decoded, f"{digest}/{name}")


def test_views_are_named_by_seed_and_number() -> None:
    assert view_names(3, 1) == ["centre"]
    assert view_names(3, 2) == ["crop/3/0", "crop/3/1"]
    assert view_names(3, 4)[:2] == view_names(3, 2)


# -- images --


def test_each_view_of_a_photo_is_encoded(shared: Path, lit_mini: Any) -> None:
    source = open_source(shared / "data/caltech101/split_zhou_Caltech101.json").take([0, 40, 20])
    names = ["centre", *view_names(5, 2)]
    found = Reader(lit_mini).encode_views(source, names)
    assert found.positions.tolist() == [0, 1, 2]
    assert found.starts.tolist() == [0, 3, 6, 9]
    assert (found.positions.dtype, found.features.dtype, found.starts.dtype) == (np.int64, np.float32, np.int64)
    assert source.paths is not None
    for shot, path in enumerate(source.paths):
        for view, name in enumerate(names):
            expected = unit(lit_mini.encode_images(by_hand(lit_mini, path, name)[None]))[0]
            np.testing.assert_allclose(found.features[found.starts[shot] + view], expected, atol=1e-5)


@pytest.mark.parametrize("views", [1, 3])
def test_raw_views_average_to_the_feature_of_a_shot(folder: Path, cache: EncodingCache, views: int) -> None:
    backbone = Fake()
    source = source_of(folder)
    reader = Reader(backbone, views=views, seed=4, cache=cache)
    each = reader.encode_views(source, view_names(4, views))
    encoded = sum(backbone.batches)
    assert encoded == 12 * views
    block = reader.encode(source)
    assert sum(backbone.batches) == encoded  # blocks found every view in the cache
    assert source.paths is not None
    for shot, path in enumerate(source.paths):
        pixels = torch.stack([by_hand(backbone, path, name) for name in view_names(4, views)])
        raw = backbone.encode_images(pixels)
        np.testing.assert_allclose(each.features[each.starts[shot] : each.starts[shot + 1]], unit(raw), atol=1e-6)
        np.testing.assert_allclose(block.features[shot], unit(raw.mean(axis=0, keepdims=True))[0], atol=1e-6)


def test_a_repeated_path_is_one_shot(folder: Path) -> None:
    source, reads = source_of(folder).take([3, 0, 3, 11, 0, 5]), Reads()
    found = Reader(Fake(), batch_size=2, read=reads).encode_views(source, ["centre"])
    assert found.positions.tolist() == [0, 1, 3, 5]
    assert found.starts.tolist() == [0, 1, 2, 3, 4]
    assert sum(reads.values()) == 4
    for feature, number in zip(found.features, [3, 0, 11, 5], strict=True):
        np.testing.assert_allclose(feature, Fake().expected(picture(number)), atol=1e-6)


def test_an_unreadable_image_has_no_views(folder: Path) -> None:
    source = source_of(folder).take([2, 5, 5, 4])
    (folder / "05.png").write_bytes(b"garbage")
    reader = Reader(Fake())
    found = reader.encode_views(source, view_names(1, 2))
    assert found.positions.tolist() == [0, 3]
    assert found.starts.tolist() == [0, 2, 4]
    assert [Path(skipped.source).name for skipped in reader.skipped] == ["05.png"]
    reader.encode_views(source, view_names(2, 2))
    assert len(reader.skipped) == 1
    with pytest.raises(InputError, match=r"05\.png: not a readable image"):
        Reader(Fake(), strict=True).encode_views(source, ["centre"])
    with pytest.raises(InputError, match=r"^[^(]*05\.png"):
        reader.encode_views(source.take([1]), ["centre"])


# -- feature tables --


def table(path: Path, ids: list[str], rows: np.ndarray) -> Source:
    pq.write_table(pa.table({"id": ids, "label": ["x"] * len(ids), "feature": list(rows)}), path)
    return open_items(path)


def test_rows_that_share_an_id_are_the_views_of_a_shot(tmp_path: Path) -> None:
    rows = unit_rows(7, 4)
    source = table(tmp_path / "t.parquet", ["b", "a", "b", "c", "a", "b", "z"], rows)
    found = Reader().encode_views(source, [])
    assert found.positions.tolist() == [0, 1, 3, 6]
    assert found.starts.tolist() == [0, 3, 5, 6, 7]
    assert np.array_equal(found.features, rows[[0, 2, 5, 1, 4, 3, 6]])
    far = Reader().encode_views(source.take([0, 1] * TABLE_ROWS), [])  # in several blocks
    assert far.starts.tolist() == [0, TABLE_ROWS, 2 * TABLE_ROWS]
    assert np.array_equal(far.features[::TABLE_ROWS], rows[[0, 1]])
    turned = source.take([6, 4, 0, 5, 1])
    found = Reader().encode_views(turned, [])
    assert found.positions.tolist() == [0, 1, 2]
    assert found.starts.tolist() == [0, 1, 3, 5]
    assert np.array_equal(found.features, rows[[6, 4, 1, 0, 5]])


def test_one_row_per_shot_returns_the_table_itself(tmp_path: Path) -> None:
    rows = unit_rows(5, 4)
    found = Reader().encode_views(table(tmp_path / "t.parquet", list("edcba"), rows), view_names(1, 4))
    assert found.positions.tolist() == [0, 1, 2, 3, 4]
    assert found.starts.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(found.features, rows)


def test_views_of_tables_raise_the_errors_of_blocks(tmp_path: Path) -> None:
    rows = unit_rows(3, 4)
    rows[1] *= 2
    source = table(tmp_path / "t.parquet", ["a", "a", "b"], rows)
    with pytest.raises(InputError, match="row 1: norm 2"):
        Reader().encode_views(source, [])
    assert np.allclose(Reader(norms="unit").encode_views(source, []).features, unit_rows(3, 4), atol=1e-6)
    other = with_identity(tmp_path / "o.parquet", json.dumps(replace(IDENTITY, weights="sha256:09").to_dict()).encode())
    with pytest.raises(BackboneError, match=r"o\.parquet"):
        Reader(Fake()).encode_views(open_items(other), [])
