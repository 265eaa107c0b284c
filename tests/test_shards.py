"""How sources are cut into shards, and what a shard holds: tables, folders and tars, damaged ones too. No Ray."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import open_items, open_rows, open_source, read_item
from retrieval_tip.distributed import shards
from retrieval_tip.errors import InputError, UsageError


def jpeg(shade: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(data, "JPEG")
    return data.getvalue()


def tar(path, members, kind="w"):
    """A tar of (name, bytes)."""
    with tarfile.open(path, kind, format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def features(path, n, d=4, group=None, **extra):
    rows = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), d)
    table = pa.table({"id": [f"q{i}" for i in range(n)], "feature": column} | extra)
    pq.write_table(table, path, row_group_size=group or n)
    return rows


def opened(shard):
    """A shard's items with the bytes of each image, and what failed."""
    source = shards.open_shard(shard)
    return source, {path: read_item(path) for path in source.paths or ()}, list(source.failed)


@settings(max_examples=examples(40), deadline=None)
@given(n=st.integers(1, 60), group=st.integers(1, 60), size=st.integers(1, 70))
def test_the_shards_of_a_table_are_its_rows_once_and_in_order(tmp_path_factory, n, group, size):
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    rows = features(path, n, group=group)
    cut = shards.cut(path, size=size)
    assert [shard.number for shard in cut] == list(range(len(cut)))
    assert [row for shard in cut for row in range(shard.first, shard.last)] == list(range(n))
    assert all(shard.last - shard.first == size for shard in cut[:-1])
    assert cut == shards.cut(path, size=size)
    found, ids = [], []
    for shard in cut:
        one = shards.open_shard(shards.Shard.from_json(shard.to_json()))
        ids += one.sources
        found.append(Encoder().encode(one).features)
    assert ids == [f"q{i}" for i in range(n)]
    assert np.array_equal(np.concatenate(found), rows)


@settings(max_examples=examples(25), deadline=None)
@given(first=st.integers(0, 39), rows=st.integers(1, 40), group=st.integers(1, 40))
def test_rows_of_a_table_are_those_of_the_whole(tmp_path_factory, first, rows, group):
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    features(path, 40, group=group, label=[str(i % 3) for i in range(40)])
    whole, part = open_source(path), open_rows(path, first, min(40, first + rows), labelled=True)
    assert part.items.equals(whole.items.slice(first, rows))
    assert np.array_equal(Encoder().encode(part).features, Encoder().encode(whole).features[first : first + rows])


def test_only_the_row_groups_of_a_shard_are_looked_at(tmp_path):
    path = tmp_path / "t.parquet"
    good, bad = np.eye(4, dtype=np.float32), np.full((4, 4), np.nan, dtype=np.float32)
    rows = np.concatenate([good, bad])
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 4)
    pq.write_table(pa.table({"id": list("abcdefgh"), "feature": column}), path, row_group_size=4)
    one, two = shards.cut(path, size=4)
    assert len(Encoder().encode(shards.open_shard(one)).features) == 4
    with pytest.raises(InputError, match="rows 4, 5, 6, 7: the feature holds NaN"):
        Encoder().encode(shards.open_shard(two))


def test_rows_without_an_id_are_called_by_their_number_in_the_table(tmp_path):
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(6, dtype=np.float32).reshape(-1)), 6)
    pq.write_table(pa.table({"feature": column}), tmp_path / "t.parquet", row_group_size=2)
    assert opened(shards.cut(tmp_path / "t.parquet", size=4)[1])[0].sources == ["4", "5"]


def test_a_table_of_paths_is_cut_by_rows_and_missing_labels_are_named(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    table = pa.table({"path": [f"{i}.jpg" for i in range(5)], "label": ["a", "b", "a", None, "b"], "year": range(5)})
    pq.write_table(table, tmp_path / "t.parquet")
    source, data, failed = opened(shards.cut(tmp_path / "t.parquet", size=2)[1])
    assert source.sources == [str(tmp_path / "2.jpg"), str(tmp_path / "3.jpg")]
    assert source.items["year"].to_pylist() == [2, 3]
    assert data[str(tmp_path / "3.jpg")] == jpeg(3)
    assert failed == []
    with pytest.raises(InputError, match="row 3 without a label"):
        opened(shards.cut(tmp_path / "t.parquet", size=2, labelled=True)[1])


def test_class_folders_keep_labels_and_names_that_are_not_utf8(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "f" / label).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "f" / label / f"{i}.jpg").write_bytes(jpeg(i))
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f/dog/\xff.jpg"))
    odd.write_bytes(jpeg(9))
    cut = [shards.Shard.from_json(shard.to_json()) for shard in shards.cut(tmp_path / "f", size=4)]
    found = [opened(shard) for shard in cut]
    whole = open_items(tmp_path / "f")
    assert pa.concat_tables([source.items for source, _, _ in found]).equals(whole.items)
    assert [path for source, _, _ in found for path in source.paths] == list(whole.paths)
    assert jpeg(9) in found[1][1].values()


def test_the_digest_changes_with_the_cut_and_with_the_file(tmp_path):
    features(tmp_path / "t.parquet", 20)
    one = shards.digest(shards.cut(tmp_path / "t.parquet", size=5))
    assert one == shards.digest(shards.cut(tmp_path / "t.parquet", size=5))
    assert one != shards.digest(shards.cut(tmp_path / "t.parquet", size=4))
    features(tmp_path / "t.parquet", 21)
    os.utime(tmp_path / "t.parquet", (1, 1))
    assert one != shards.digest(shards.cut(tmp_path / "t.parquet", size=5)[:4])


@pytest.mark.parametrize("kind", ["t.tar", "t.tar.gz", "t.tgz"])
def test_a_tar_gives_images_with_the_labels_beside_them(tmp_path, kind):
    members = [
        ("a/one.jpg", jpeg(1)), ("a/one.cls", b"cat"),
        ("a/two.json", json.dumps({"label": "dog"}).encode()), ("a/two.JPG", jpeg(2)),
        ("a/three.jpg", jpeg(3)), ("a/three.txt", "é\n".encode()),
        ("b/three.jpg", jpeg(4)),
    ]  # fmt: skip
    path = tar(tmp_path / kind, members, "w" if kind == "t.tar" else "w:gz")
    (shard,) = shards.cut(path)
    source, data, failed = opened(shard)
    assert failed == []
    assert source.sources == [f"{path}/{name}" for name in ("a/one.jpg", "a/two.JPG", "a/three.jpg", "b/three.jpg")]
    assert source.items["label"].to_pylist() == ["cat", "dog", "é", None]
    assert list(data.values()) == [jpeg(i) for i in (1, 2, 3, 4)]


def test_a_folder_or_a_pattern_of_tars_is_a_shard_for_each_in_name_order(tmp_path):
    for i in (2, 0, 1):
        tar(tmp_path / f"s-{i}.tar", [("x.jpg", jpeg(i))])
    expected = [str(tmp_path / f"s-{i}.tar") for i in range(3)]
    assert [shard.place for shard in shards.cut(tmp_path)] == expected
    assert [shard.place for shard in shards.cut(tmp_path / "s-*.tar")] == expected
    assert [shard.place for shard in shards.cut(tmp_path / "s-[12].tar")] == expected[1:]


def test_names_in_a_tar_are_names_only(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "t.tar", "w") as file:
        for name in ("../../out.jpg", "/abs.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg())
            file.addfile(info, io.BytesIO(jpeg()))
        file.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source, data, failed = opened(shards.cut(tmp_path / "t.tar")[0])
    assert list(data.values()) == [jpeg(), jpeg()]
    assert source.sources == [f"{tmp_path}/t.tar/../../out.jpg", f"{tmp_path}/t.tar//abs.jpg"]
    assert failed == []
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_wrong_within_a_tar_is_named_and_the_rest_is_there(tmp_path):
    members = [
        ("good.jpg", jpeg(1)), ("good.cls", b"cat"),
        ("lonely.cls", b"dog"),
        ("bytes.jpg", jpeg(2)), ("bytes.cls", b"\xff\xfe"),
        ("list.jpg", jpeg(3)), ("list.json", b'{"label": [1]}'),
        ("deep.jpg", jpeg(3)), ("deep.json", b"[" * 100_000),
        ("long.jpg", jpeg(4)), ("long.txt", b"x" * 5000),
        ("good.jpg", jpeg(5)),
        ("\udcff.jpg", jpeg(6)),
    ]  # fmt: skip
    path = tar(tmp_path / "t.tar", members)
    source, data, failed = opened(shards.cut(path)[0])
    assert source.sources == [f"{path}/good.jpg", f"{path}/\\xff.jpg"]
    assert list(data.values()) == [jpeg(1), jpeg(6)]
    reasons = {skipped.source.removeprefix(f"{path}/"): skipped.reason for skipped in failed}
    assert set(reasons) == {"lonely", "bytes.jpg", "list.jpg", "deep.jpg", "long.jpg", "good.jpg"}
    assert "no image" in reasons["lonely"]
    assert "twice" in reasons["good.jpg"]
    source, _, failed = opened(shards.cut(path, labelled=True)[0])
    assert source.sources == [f"{path}/good.jpg"]
    assert any("no label" in skipped.reason for skipped in failed)


@settings(max_examples=examples(60), deadline=None)
@given(cut=st.integers(0, 6000), flip=st.integers(0, 6000))
def test_a_damaged_tar_gives_what_is_whole_and_says_so(tmp_path_factory, cut, flip):
    folder = tmp_path_factory.mktemp("tar")
    whole = tar(folder / "w.tar", [(f"{i}.jpg", jpeg(i)) for i in range(3)])
    data = bytearray(whole.read_bytes()[:6144])
    expected = list(opened(shards.cut(whole)[0])[1].values())
    broken = folder / "t.tar"
    broken.write_bytes(data[:cut])
    _, found, failed = opened(shards.cut(broken)[0])
    assert list(found.values()) == expected[: len(found)]
    assert len(found) == 3 or failed
    data[flip % len(data)] ^= 0xFF
    broken.write_bytes(data)
    opened(shards.cut(broken)[0])  # whatever was hit, no exception


def test_a_truncated_gzip_and_no_tar_at_all(tmp_path):
    path = tar(tmp_path / "t.tar", [(f"{i}.jpg", os.urandom(20_000)) for i in range(5)])
    packed = tmp_path / "p.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes())[:50_000])
    source, _, failed = opened(shards.cut(packed)[0])
    assert 1 <= len(source) <= 2
    assert failed
    (tmp_path / "n.tar").write_bytes(b"not a tar" * 100)
    source, _, failed = opened(shards.cut(tmp_path / "n.tar")[0])
    assert len(source) == 0
    assert "cannot be read as a tar" in failed[0].reason


def test_what_is_not_there_or_cannot_be_cut(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        shards.cut(tmp_path / "none.parquet")
    with pytest.raises(UsageError, match="at least 1"):
        shards.cut(tmp_path, size=0)
    features(tmp_path / "t.parquet", 5)
    with pytest.raises(UsageError, match="only all rows"):
        shards.cut_source(open_items(tmp_path / "t.parquet").take([0, 1]))


def test_a_folder_of_parts_is_one_table(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    one = features(folder / "part-000000.parquet", 5)
    two = features(folder / "part-000001.parquet", 3)
    with pytest.raises(InputError, match=r"parts: some of its parts are missing"):
        open_items(folder)
    (folder / "complete.json").write_text("{}")
    source = open_items(folder)
    assert np.array_equal(Encoder().encode(source).features, np.concatenate([one, two]))
    some = source.take([6, 1])
    assert np.array_equal(Encoder().encode(some).features, np.stack([two[1], one[1]]))
    cut = shards.cut(folder, size=4)
    assert [(shard.place[-9:-8], shard.first, shard.last) for shard in cut] == [("0", 0, 4), ("0", 4, 5), ("1", 0, 3)]
