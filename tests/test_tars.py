"""Tars and object stores as sources give the same results as folders of the same images."""

import gc
import gzip
import json
import os
import tarfile
import warnings
from pathlib import Path

import buckets
import numpy as np
import pytest
from conftest import examples, few
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import caltech_photos
from tables import tiny
from tarring import jpeg, tar

from retrieval_tip import Index
from retrieval_tip.data import remote, tars
from retrieval_tip.data.sources import is_there, of_tars, open_inputs, open_items, open_source, read_item
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit.finetune import shots_of


def members(items):
    """Yield photos as members of a tar, each followed by its label."""
    for number, (path, label) in enumerate(items):
        yield f"{number:03}.jpg", path.read_bytes()
        yield f"{number:03}.cls", label.encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return f"local-dir:{tiny(tmp_path_factory.mktemp('models') / 'model')}"


@pytest.fixture(scope="module")
def world(shared, tmp_path_factory):
    """Photos of three classes, in class folders and in two tars in the same order, and a tar of query photos."""
    folder = tmp_path_factory.mktemp("world")
    shots, queries = caltech_photos(shared, "train", 3, 4), caltech_photos(shared, "test", 3, 2)
    for number, (path, label) in enumerate(shots):
        (folder / "photos" / label).mkdir(parents=True, exist_ok=True)
        (folder / "photos" / label / f"{number:03}.jpg").write_bytes(path.read_bytes())
    (folder / "shards").mkdir()
    tar(folder / "shards/000.tar", members(shots[:7]))
    tar(folder / "shards/001.tar", members(shots[7:]))
    tar(folder / "queries.tar.gz", members(queries), "w:gz")
    return folder


@pytest.mark.parametrize("place", few(["folder", "range", "pattern"], 2))
def test_an_index_of_tars_equals_an_index_of_their_photos(run, world, model, tmp_path, place):
    source = {"folder": "shards", "range": "shards/{000..001}.tar", "pattern": "shards/*.tar"}[place]
    for name, what in (("a", "photos"), ("b", source)):
        done = run("index", "build", world / what, "--out", tmp_path / name, "--model", model, "--fit", "none")
        assert done.exit_code == 0, done.output
    a, b = (Index.load(tmp_path / name, device="cpu", precision="float32") for name in "ab")
    assert a.class_names == b.class_names
    np.testing.assert_allclose(a.keys, b.keys, atol=1e-6)
    assert a.labels["digest"].equals(b.labels["digest"])
    assert b.labels["source"][0].as_py() == f"{world}/shards/000.tar/000.jpg"
    # Both indexes answer and evaluate a compressed tar alike, and the index of tars finds its shots there again.
    rows = [run("classify", tmp_path / name, world / "queries.tar.gz", "--format", "json") for name in "ab"]
    assert rows[0].exit_code == 0, rows[0].output
    assert rows[0].stdout.count("\n") == 6
    figures = [run("evaluate", tmp_path / name, world / "queries.tar.gz", "--json").stdout for name in "ab"]
    assert figures[0] == figures[1]
    assert '"n": 6' in figures[0]
    shots = shots_of(b)
    assert [read_item(path) for path in shots.paths] == [path.read_bytes() for path in sorted(world.rglob("*.jpg"))]


def test_photos_and_tars_in_a_bucket_are_sources(run, world, model, tmp_path, monkeypatch):
    buckets.use(monkeypatch, buckets.endpoint())
    bucket = f"s3://{buckets.fresh_bucket()}"
    system = remote.system_of(bucket)
    for path in (world / "photos").rglob("*.jpg"):
        system.pipe_file(f"{bucket}/photos/{path.parent.name}/{path.name}", path.read_bytes())
    for name in ("shards/000.tar", "shards/001.tar", "queries.tar.gz"):
        system.pipe_file(f"{bucket}/{name}", (world / name).read_bytes())
    for name, what in (
        ("here", world / "photos"), ("photos", f"{bucket}/photos"), ("tars", f"{bucket}/shards/{{000..001}}.tar"),
    ):  # fmt: skip
        done = run("index", "build", what, "--out", tmp_path / name, "--model", model, "--fit", "none")
        assert done.exit_code == 0, done.output
    here, *others = (Index.load(tmp_path / n, device="cpu", precision="float32") for n in ("here", "photos", "tars"))
    for other in others:
        assert other.class_names == here.class_names
        np.testing.assert_allclose(other.keys, here.keys, atol=1e-6)
    first = next((world / "photos").rglob("*.jpg"))
    same = json.loads(run("classify", tmp_path / "here", first, "--format", "json").stdout)
    photo = f"{bucket}/photos/{first.parent.name}/{first.name}"
    done = run("classify", tmp_path / "tars", photo, f"{bucket}/queries.tar.gz", "--format", "json")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 7
    assert f'"input": "{photo}", "label": "{same["label"]}"' in done.stdout
    for wrong in (f"{bucket}/nothing", f"{bucket}/none.tar"):
        done = run("index", "build", wrong, "--out", tmp_path / "x", "--model", model)
        assert done.exit_code == 1, done.output
        assert wrong in done.stderr
    done = run("encode", world / "photos", "--model", model, "--out", f"{bucket}/t.parquet")
    assert (done.exit_code, "--engine ray" in done.stderr) == (2, True)


def test_a_build_reports_damaged_members_of_a_tar_and_uses_the_others(run, shared, model, tmp_path):
    shots = list(members(caltech_photos(shared, "train", 2, 2)))
    path = tar(tmp_path / "t.tar", [*shots, ("lonely.jpg", jpeg())])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"lonely.jpg") + 512])  # ends after a header
    command = ("index", "build", path, "--out", tmp_path / "i", "--model", model, "--fit", "none")
    done = run(*command)
    assert done.exit_code == 3, done.output
    assert f"{path}" in done.stderr
    assert Index.load(tmp_path / "i").n == 4
    done = run(*command, "--strict")
    assert done.exit_code == 1
    assert "damaged after" in done.stderr
    unlabelled = tar(tmp_path / "u.tar", [("a.jpg", jpeg())])
    done = run("index", "build", unlabelled, "--out", tmp_path / "j", "--model", model)
    assert done.exit_code == 1
    assert "u.tar: no images in 1 tar" in done.stderr
    assert "no label" in done.stderr
    assert not (tmp_path / "j").exists()


def test_a_folder_is_read_as_tars_only_if_it_contains_nothing_else(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.jpg").write_bytes(jpeg())
    tar(tmp_path / "backup.tar", [("x.jpg", jpeg())])
    assert tars.find(str(tmp_path)) == []
    assert open_source(tmp_path).paths == (str(tmp_path / "cat/1.jpg"),)
    (tmp_path / "flat").mkdir()
    tar(tmp_path / "flat/b.tar", [("x.jpg", jpeg())])
    tar(tmp_path / "flat/a.TAR", [("x.jpg", jpeg())])
    assert tars.find(str(tmp_path / "flat")) == [str(tmp_path / "flat" / name) for name in ("a.TAR", "b.tar")]
    (tmp_path / "flat/y.png").write_bytes(jpeg())
    assert tars.find(str(tmp_path / "flat")) == []


def test_a_range_of_tars_is_expanded_and_a_missing_tar_is_reported(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-08"):
        tar(tmp_path / f"{name}.tar", [("x.jpg", jpeg())])
    found = tars.find(str(tmp_path / "a-{08..10}.tar"))
    assert [Path(place).name for place in found] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    with pytest.raises(InputError, match=r"a-11\.tar: no such file"):
        tars.find(str(tmp_path / "a-{10..12}.tar"))
    with pytest.raises(UsageError, match="more than 100,000 tars"):
        tars.find(str(tmp_path / "a-{0..999999999}.tar"))
    assert tars.find(str(tmp_path / "a-{08..10}")) == []


def test_only_a_few_of_many_tars_are_open_at_a_time(tmp_path):
    number = 3 * tars.HELD
    for i in range(number):
        tar(tmp_path / f"{i:03}.tar", [("x.jpg", jpeg(i)), ("x.cls", b"a")], "w")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_items(tmp_path)
        assert [read_item(path) for path in source.paths] == [jpeg(i) for i in range(number)]
        gc.collect()
        held = [fd for fd in Path("/proc/self/fd").iterdir() if tmp_path in fd.resolve().parents]
        assert len(held) <= tars.HELD


def test_a_replaced_tar_is_read_again(tmp_path):
    path = tar(tmp_path / "t.tar", [("x.jpg", jpeg(1))])
    (name,) = open_items(path).paths
    tar(path, [("y.jpg", jpeg(2)), ("x.jpg", jpeg(3))])
    os.utime(path, (1, 1))
    assert read_item(name) == jpeg(3)
    path.unlink()
    with pytest.raises(InputError):
        read_item(name)
    assert not is_there(name)


def test_a_tar_that_could_not_be_read_is_read_again(tmp_path, monkeypatch):
    buckets.use(monkeypatch, buckets.endpoint())
    url = f"s3://{buckets.fresh_bucket()}/t.tar"
    with pytest.raises(InputError, match=r"t\.tar: no images in 1 tar .*no such object"):
        open_items(url)
    remote.system_of(url).pipe_file(url, tar(tmp_path / "t.tar", [("x.jpg", jpeg(1))]).read_bytes())
    (name,) = open_items(url).paths
    assert (name, read_item(name), is_there(name)) == (f"{url}/x.jpg", jpeg(1), True)


def test_tars_and_other_inputs_are_read_in_order(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "3.jpg").write_bytes(jpeg(3))
    path = tar(tmp_path / "t.tar", [("2.jpg", jpeg(2))])
    arguments = [str(tmp_path / "1.jpg"), str(path), str(tmp_path / "3.jpg")]
    paths = [path for source in open_inputs(arguments) for path in source.paths]
    assert [read_item(path) for path in paths] == [jpeg(1), jpeg(2), jpeg(3)]


def read_tar(path, labelled=False):
    """Return the source of a tar, the bytes of each image, and the failed members."""
    source = of_tars("tar", [str(path)], labelled=labelled)
    return source, {path: read_item(path) for path in source.paths or ()}, list(source.failed)


@pytest.mark.parametrize("kind", ["t.tar", "t.tar.gz", "t.tgz"])
def test_images_in_a_tar_get_labels_from_files_of_the_same_name(tmp_path, kind):
    members = [
        ("a/one.jpg", jpeg(1)), ("a/one.cls", b"cat"),
        ("a/two.json", json.dumps({"label": "dog"}).encode()), ("a/two.JPG", jpeg(2)),
        ("a/three.jpg", jpeg(3)), ("a/three.txt", "é\n".encode()),
        ("b/three.jpg", jpeg(4)),
    ]  # fmt: skip
    path = tar(tmp_path / kind, members, "w" if kind == "t.tar" else "w:gz")
    source, data, failed = read_tar(path)
    assert failed == []
    assert source.sources == [f"{path}/{name}" for name in ("a/one.jpg", "a/two.JPG", "a/three.jpg", "b/three.jpg")]
    assert source.items["label"].to_pylist() == ["cat", "dog", "é", None]
    assert list(data.values()) == [jpeg(i) for i in (1, 2, 3, 4)]


def test_names_and_links_in_a_tar_cannot_access_other_files(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tar(tmp_path / "t.tar", [("../../out.jpg", jpeg()), ("/abs.jpg", jpeg())]), "a") as file:
        file.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source, data, failed = read_tar(tmp_path / "t.tar")
    assert (list(data.values()), failed) == ([jpeg(), jpeg()], [])
    assert source.sources == [f"{tmp_path}/t.tar/../../out.jpg", f"{tmp_path}/t.tar//abs.jpg"]
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_members_of_a_tar_are_reported_and_the_others_are_read(tmp_path):
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
    source, data, failed = read_tar(path)
    assert source.sources == [f"{path}/good.jpg", f"{path}/\\xff.jpg"]
    assert list(data.values()) == [jpeg(1), jpeg(6)]
    reasons = {skipped.source.removeprefix(f"{path}/"): skipped.reason for skipped in failed}
    assert set(reasons) == {"lonely", "bytes.jpg", "list.jpg", "deep.jpg", "long.jpg", "good.jpg"}
    source, _, failed = read_tar(path, labelled=True)
    assert source.sources == [f"{path}/good.jpg"]
    assert f"{path}/\\xff.jpg" in {skipped.source for skipped in failed}


@settings(max_examples=examples(60), deadline=None)
@given(cut=st.integers(0, 6000), flip=st.integers(0, 6000))
def test_a_damaged_tar_yields_its_intact_members_with_a_warning(tmp_path_factory, cut, flip):
    folder = tmp_path_factory.mktemp("tar")
    whole = tar(folder / "w.tar", [(f"{i}.jpg", jpeg(i)) for i in range(3)])
    data = bytearray(whole.read_bytes()[:6144])
    expected = list(read_tar(whole)[1].values())
    broken = folder / "t.tar"
    broken.write_bytes(data[:cut])
    _, found, failed = read_tar(broken)
    assert list(found.values()) == expected[: len(found)]
    assert len(found) == 3 or failed
    data[flip % len(data)] ^= 0xFF
    broken.write_bytes(data)
    read_tar(broken)  # no exception


def test_a_truncated_gzip_and_a_file_that_is_not_a_tar_are_reported(tmp_path):
    path = tar(tmp_path / "t.tar", [(f"{i}.jpg", os.urandom(20_000)) for i in range(5)])
    packed = tmp_path / "p.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes())[:50_000])
    (tmp_path / "n.tar").write_bytes(b"not a tar" * 100)
    some, none = read_tar(packed), read_tar(tmp_path / "n.tar")
    assert (len(some[0]) in (1, 2), bool(some[2]), len(none[0]), len(none[2])) == (True, True, 0, 1)
