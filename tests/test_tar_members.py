"""What a webdataset tar holds: images with the labels beside them, whole or damaged."""

from __future__ import annotations

import gzip
import json
import os
import tarfile

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tarring import jpeg, tar

from retrieval_tip.data.sources import of_tars, read_item


def opened(path, labelled=False):
    """The items of a tar with the bytes of each image, and what failed."""
    source = of_tars("tar", [str(path)], labelled=labelled)
    return source, {path: read_item(path) for path in source.paths or ()}, list(source.failed)


@pytest.mark.parametrize("kind", ["t.tar", "t.tar.gz", "t.tgz"])
def test_a_tar_gives_images_with_the_labels_beside_them(tmp_path, kind):
    members = [
        ("a/one.jpg", jpeg(1)), ("a/one.cls", b"cat"),
        ("a/two.json", json.dumps({"label": "dog"}).encode()), ("a/two.JPG", jpeg(2)),
        ("a/three.jpg", jpeg(3)), ("a/three.txt", "é\n".encode()),
        ("b/three.jpg", jpeg(4)),
    ]  # fmt: skip
    path = tar(tmp_path / kind, members, "w" if kind == "t.tar" else "w:gz")
    source, data, failed = opened(path)
    assert failed == []
    assert source.sources == [f"{path}/{name}" for name in ("a/one.jpg", "a/two.JPG", "a/three.jpg", "b/three.jpg")]
    assert source.items["label"].to_pylist() == ["cat", "dog", "é", None]
    assert list(data.values()) == [jpeg(i) for i in (1, 2, 3, 4)]


def test_names_in_a_tar_are_names_only(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tar(tmp_path / "t.tar", [("../../out.jpg", jpeg()), ("/abs.jpg", jpeg())]), "a") as file:
        file.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source, data, failed = opened(tmp_path / "t.tar")
    assert (list(data.values()), failed) == ([jpeg(), jpeg()], [])
    assert source.sources == [f"{tmp_path}/t.tar/../../out.jpg", f"{tmp_path}/t.tar//abs.jpg"]
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
    source, data, failed = opened(path)
    assert source.sources == [f"{path}/good.jpg", f"{path}/\\xff.jpg"]
    assert list(data.values()) == [jpeg(1), jpeg(6)]
    reasons = {skipped.source.removeprefix(f"{path}/"): skipped.reason for skipped in failed}
    assert set(reasons) == {"lonely", "bytes.jpg", "list.jpg", "deep.jpg", "long.jpg", "good.jpg"}
    source, _, failed = opened(path, labelled=True)
    assert source.sources == [f"{path}/good.jpg"]
    assert f"{path}/\\xff.jpg" in {skipped.source for skipped in failed}


@settings(max_examples=examples(60), deadline=None)
@given(cut=st.integers(0, 6000), flip=st.integers(0, 6000))
def test_a_damaged_tar_gives_what_is_whole_and_says_so(tmp_path_factory, cut, flip):
    folder = tmp_path_factory.mktemp("tar")
    whole = tar(folder / "w.tar", [(f"{i}.jpg", jpeg(i)) for i in range(3)])
    data = bytearray(whole.read_bytes()[:6144])
    expected = list(opened(whole)[1].values())
    broken = folder / "t.tar"
    broken.write_bytes(data[:cut])
    _, found, failed = opened(broken)
    assert list(found.values()) == expected[: len(found)]
    assert len(found) == 3 or failed
    data[flip % len(data)] ^= 0xFF
    broken.write_bytes(data)
    opened(broken)  # whatever was hit, no exception


def test_a_truncated_gzip_and_no_tar_at_all(tmp_path):
    path = tar(tmp_path / "t.tar", [(f"{i}.jpg", os.urandom(20_000)) for i in range(5)])
    packed = tmp_path / "p.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes())[:50_000])
    (tmp_path / "n.tar").write_bytes(b"not a tar" * 100)
    some, none = opened(packed), opened(tmp_path / "n.tar")
    assert (len(some[0]) in (1, 2), bool(some[2]), len(none[0]), len(none[2])) == (True, True, 0, 1)
