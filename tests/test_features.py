"""Images are read and encoded once. Feature tables are read exactly, and errors name the row. Views belong to shots."""

import hashlib
import json
import multiprocessing
import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake import IDENTITY, Fake, Reads, picture, pictures, source_of, with_identity
from tables import unit_rows

from retrieval_tip import errors
from retrieval_tip.backbones.base import unit
from retrieval_tip.data import images
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader, encode_table, view_names
from retrieval_tip.data.sources import of_images, open_items, open_source
from retrieval_tip.data.tables import TABLE_ROWS, check_backbone, read_rows, table_dim, table_identity
from retrieval_tip.errors import BackboneError, InputError, RetrievalTipError, UsageError


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "images")


def all_of(reader, source):
    """Return the positions and features of all blocks."""
    blocks = list(reader.blocks(source))
    return np.concatenate([b.positions for b in blocks]), np.concatenate([b.features for b in blocks])


@pytest.mark.parametrize("views", [1, 3])
def test_each_image_is_read_and_encoded_once(folder, tmp_path, views):
    reads, backbone = Reads(), Fake()
    reader = Reader(backbone, views=views, read=reads)
    with_cache(tmp_path, lambda cache: all_of(replace(reader, cache=cache), source_of(folder)))
    assert len(reads) == 12
    assert set(reads.values()) == {1}
    assert backbone.prepared == sum(backbone.batches) == 12 * views


def test_too_large_requests_are_refused_before_memory_is_allocated(folder, monkeypatch):
    fake = Fake(identity=replace(IDENTITY, preprocess={"size": (100, 200)}))  # a view has 240 kB
    source = source_of(folder)
    monkeypatch.setattr(errors, "memory", lambda: 10_000_000)
    reader = Reader(fake, read=lambda _: pytest.fail("an image was read"))
    for views, batch_size, words in (
        (40, None, "40 views of 12 images"),
        (4, 64, "4 views of 12 images"),  # a batch has at most all images
        (14, 1, "14 views of 3 images"),
    ):
        with pytest.raises(UsageError, match=words):
            next(replace(reader, views=views, batch_size=batch_size).blocks(source))
    with pytest.raises(UsageError, match="1000 views of 12 images"):
        replace(reader, backbone=replace(fake, dim=1000)).encode_views(source, view_names(1, 1000))
    assert not fake.prepared


def with_cache(folder, use):
    cache = EncodingCache(folder)
    try:
        return use(cache)
    finally:
        cache.close()


def test_features_equal_those_of_the_backbone_at_unit_norm(folder):
    backbone = Fake()
    positions, found = all_of(Reader(backbone), source_of(folder))
    assert positions.tolist() == list(range(12))
    for number, feature in enumerate(found):
        assert np.allclose(feature, backbone.expected(picture(number)), atol=1e-6)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert found.dtype == np.float32


@pytest.mark.parametrize("views", [1, 2, 5])
def test_batch_size_and_workers_do_not_change_features(folder, views):
    source = source_of(folder)
    expected = all_of(Reader(Fake(), views=views), source)
    for batch_size, workers in ((1, 1), (5, 3), (12, 2), (64, 8)):
        backbone = Fake()
        found = all_of(Reader(backbone, views=views, batch_size=batch_size, workers=workers), source)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])
        assert max(backbone.batches) <= batch_size
        assert sum(backbone.batches) == 12 * views


def test_blocks_stay_in_order_if_an_image_is_slow(folder):
    opened = []

    def late(path):
        data = images.read(path)
        opened.append(path)
        if path.endswith("00.png"):
            while len(opened) < 4:  # the first is ready after the others of its chunk
                pass
        return data

    blocks = list(Reader(Fake(), batch_size=4, workers=4, read=late).blocks(source_of(folder)))
    assert [block.positions.tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_cache_identifies_images_by_content(folder, tmp_path):
    backbone = Fake()
    with_cache(tmp_path / "c", lambda cache: all_of(Reader(backbone, cache=cache), source_of(folder)))
    (folder / "00.png").rename(folder / "renamed.png")
    picture(99).save(folder / "01.png")
    backbone.batches.clear()
    _, found = with_cache(tmp_path / "c", lambda cache: all_of(Reader(backbone, cache=cache), source_of(folder)))
    assert sum(backbone.batches) == 1
    assert np.allclose(found[0], backbone.expected(picture(99)))
    assert np.allclose(found[11], backbone.expected(picture(0)))


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({}, 0),
        ({"identity": replace(IDENTITY, weights="sha256:02")}, 12),
        ({"identity": replace(IDENTITY, config="sha256:02")}, 12),
        ({"identity": replace(IDENTITY, preprocess={"size": 5})}, 12),
        ({"identity": replace(IDENTITY, model="same weights, other name", pretrained=None)}, 0),
        ({"precision": "bfloat16"}, 12),
    ],
)
def test_another_backbone_or_precision_encodes_again(folder, tmp_path, change, fresh):
    source, backbone = source_of(folder), Fake(**change)
    right = fill(tmp_path / "c", source)
    found = with_cache(tmp_path / "c", lambda cache: all_of(Reader(backbone, cache=cache), source))
    assert np.array_equal(found[1], right)
    assert sum(backbone.batches) == backbone.prepared == fresh


@pytest.mark.parametrize(("views", "seed", "fresh"), [(3, 1, 0), (2, 1, 0), (4, 1, 12), (3, 2, 36), (1, 1, 12)])
def test_other_views_or_another_seed_encode_only_new_views(folder, tmp_path, views, seed, fresh):
    source = source_of(folder)
    with_cache(tmp_path / "c", lambda cache: all_of(Reader(Fake(), views=3, seed=1, cache=cache), source))
    backbone = Fake()
    reader = Reader(backbone, views=views, seed=seed)
    alone = all_of(reader, source)
    backbone.batches.clear()
    found = with_cache(tmp_path / "c", lambda cache: all_of(replace(reader, cache=cache), source))
    assert sum(backbone.batches) == fresh
    assert np.array_equal(found[1], alone[1])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_repeated_path_is_read_once(folder, batch_size):
    order, reads, backbone = [3, 0, 3, 11, 5, 3, 0, 7, 11], Reads(), Fake()
    source = source_of(folder).take(order)
    positions, found = all_of(Reader(backbone, batch_size=batch_size, read=reads), source)
    assert positions.tolist() == list(range(len(order)))
    assert sum(reads.values()) == sum(backbone.batches) == 5
    for number, feature in zip(order, found, strict=True):
        assert np.allclose(feature, Fake().expected(picture(number)), atol=1e-6)


def test_equal_images_are_encoded_once_per_batch(folder):
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    backbone = Fake()
    (block,) = Reader(backbone, batch_size=64).blocks(source_of(folder))
    assert sum(backbone.batches) == 12
    assert np.array_equal(block.features[0], block.features[12])
    assert block.digests[4] == hashlib.sha256((folder / "04.png").read_bytes()).hexdigest()


def test_an_unreadable_image_is_named_and_skipped(folder, caplog):
    (folder / "05.png").write_bytes(b"garbage")
    (folder / "07.png").unlink()
    (folder / "gone.png").symlink_to("nowhere")
    reader = Reader(Fake(), batch_size=4)
    source = of_images([str(folder / f"{n:02}.png") for n in range(12)] + [str(folder / "gone.png")])
    positions, found = all_of(reader, source)
    assert positions.tolist() == [0, 1, 2, 3, 4, 6, 8, 9, 10, 11]
    assert [Path(skipped.source).name for skipped in reader.skipped] == ["05.png", "07.png", "gone.png"]
    assert [skipped.reason for skipped in reader.skipped][1:] == ["no such file"] * 2
    for name in ("05.png", "07.png", "gone.png"):
        assert f"{folder / name}" in caplog.text
    assert np.allclose(found[5], Fake().expected(picture(6)), atol=1e-6)


def test_strict_stops_at_the_first_unreadable_image(folder):
    (folder / "05.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"05\.png: empty file$"):
        all_of(Reader(Fake(), strict=True, batch_size=2), source_of(folder))


def test_a_source_without_readable_images_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none of 2 images could be read .*no such file"):
        all_of(Reader(Fake()), of_images([str(tmp_path / "a.png"), str(tmp_path / "b.png")]))


def test_an_image_without_a_usable_feature_is_skipped(folder):
    class Broken(Fake):
        def encode_images(self, pixels):
            raw = super().encode_images(pixels)
            raw[0] = np.nan
            return raw

    reader = Reader(Broken(), batch_size=6)
    positions, _ = all_of(reader, source_of(folder))
    assert positions.tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert "not finite" in reader.skipped[0].reason


@pytest.mark.parametrize(
    "wrong", [{"views": 0}, {"batch_size": 0}, {"workers": 0}, {"batch_size": -1}, {"norms": "sometimes"}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Reader(Fake(), **wrong)


def test_images_without_a_backbone_are_refused(folder):
    with pytest.raises(UsageError, match="--model"):
        all_of(Reader(), source_of(folder))


def fill(folder, source):
    return with_cache(folder, lambda cache: all_of(Reader(Fake(), cache=cache), source))[1]


def updated(change):
    def damage(file):
        with closing(sqlite3.connect(file, isolation_level=None)) as db:
            db.execute(f"UPDATE encodings SET {change}")

    return damage


def flipped(seed):
    def damage(file):
        generator, damaged = np.random.default_rng(seed), bytearray(file.read_bytes())
        for place in generator.integers(0, len(damaged) if seed % 2 else 4096, 40):
            damaged[place] ^= 1 << generator.integers(0, 8)
        file.write_bytes(damaged)

    return damage


OTHER = "(SELECT e.feature, e.crc FROM encodings e WHERE e.digest <> encodings.digest LIMIT 1)"
DAMAGES = [
    # what damages the file, at least how many images are encoded again, and whether the file is moved aside
    *((updated(f"{column} = {value}"), 11, False) for column, value in (
        ("feature", "zeroblob(24)"), ("crc", "crc + 1"), ("feature", "'text'"), ("crc", "'x'"),
        ("(feature, crc)", OTHER),  # as if a bit of SQLite's own index had flipped: entries under the key of another
    )),
    *((flipped(seed), 0, False) for seed in range(8)),
    (lambda file: file.write_bytes(b"garbage" * 1000), 12, True),
    (lambda file: file.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000), 12, True),
    (lambda file: file.write_bytes(file.read_bytes()[:4096].ljust(file.stat().st_size, b"\xee")), 12, True),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "fresh", "moved"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_cache_never_gives_wrong_features(
    folder, tmp_path, damage, fresh, moved,
    caplog
):  # fmt: skip
    source, file = source_of(folder), tmp_path / "c/encodings-2.sqlite"
    right = fill(tmp_path / "c", source)
    damage(file)
    raw, backbone = file.read_bytes(), Fake()
    reader = Reader(backbone)
    try:
        found = with_cache(tmp_path / "c", lambda cache: all_of(replace(reader, cache=cache), source))
    except InputError as error:
        assert fresh == 0  # flipped bytes may give an error
        assert "--no-cache" in str(error)  # noqa: PT017
    else:
        assert np.array_equal(found[1], right)
        assert sum(backbone.batches) >= fresh
    assert reader.skipped == []  # the cache is damaged, not the images
    if moved:
        (aside,) = (tmp_path / "c").glob("*damaged*")
        assert aside.read_bytes()[100:] == raw[100:]  # SQLite may have written its header
        assert "moved to" in caplog.text
    if fresh:
        again = Fake()
        second = with_cache(tmp_path / "c", lambda cache: all_of(Reader(again, cache=cache), source))
        assert np.array_equal(second[1], right)
        assert again.batches == []


def test_an_unusable_cache_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "d/encodings-2.sqlite").mkdir(parents=True)
    (tmp_path / "p").mkdir()
    os.mkfifo(tmp_path / "p/encodings-2.sqlite")
    for place in (tmp_path / "file", tmp_path / "file/below", tmp_path / "d", tmp_path / "p"):
        with pytest.raises(InputError, match="--no-cache"):
            EncodingCache(place)


def test_an_unusable_default_cache_gives_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file/below", Path("/dev/null/x")):
        monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(place))
        caplog.clear()
        assert EncodingCache.at(None) is None
        (said,) = caplog.messages
        assert str(place) in said
        with pytest.raises(InputError, match="--no-cache"):
            EncodingCache.at(place)


def homeless():
    raise RuntimeError("Could not determine home directory.")


def test_a_missing_home_folder_is_reported(monkeypatch):
    for name in ("RETRIEVAL_TIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert EncodingCache.at(None) is None
    with pytest.raises(UsageError, match="--cache"):
        EncodingCache.default_folder()


def test_a_read_only_cache_is_used_with_one_warning(folder, tmp_path, caplog):
    source = source_of(folder)
    fill(tmp_path / "c", source.take(range(3)))
    right = all_of(Reader(Fake()), source)[1]
    backbone = Fake()
    cache = EncodingCache(tmp_path / "c")
    cache._db.execute("PRAGMA query_only = 1")
    assert np.array_equal(all_of(Reader(backbone, cache=cache, batch_size=2), source)[1], right)
    cache.close()
    assert sum(backbone.batches) == 9  # cached encodings are used
    assert len(caplog.messages) == 1
    assert str(tmp_path / "c") in caplog.text


def test_environment_variables_set_the_cache_folder(monkeypatch):
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert EncodingCache.default_folder() == Path("/a")
    monkeypatch.delenv("RETRIEVAL_TIP_CACHE")
    assert EncodingCache.default_folder() == Path("/b/retrieval-tip")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert EncodingCache.default_folder() == Path("/home/me/.cache/retrieval-tip")


MEGABYTE = 1_000_000


def keep(cache, name, number):
    for start in range(0, number, 10):
        cache.put("s", {(f"{name}{i}", "centre"): np.full(512, i, np.float32) for i in range(start, start + 10)})


def kept(cache, name, number):
    return sum(cache.get("s", f"{name}{i}", "centre") is not None for i in range(number))


def test_a_full_cache_drops_its_least_recently_used_entries(tmp_path):
    with_cache(tmp_path, lambda cache: cache.limit(MEGABYTE))
    for name in "abc":
        with_cache(tmp_path, lambda cache, name=name: keep(cache, name, 60))
    assert with_cache(tmp_path, lambda cache: kept(cache, "a", 60)) == 60  # this counts as a use
    with_cache(tmp_path, lambda cache: keep(cache, "d", 90))
    left = {name: with_cache(tmp_path, lambda cache, name=name: kept(cache, name, 60)) for name in "abcd"}
    assert (left["a"], left["d"]) == (60, 60)
    assert left["b"] < 60
    assert left["c"] == 60 or left["b"] == 0
    assert (tmp_path / "encodings-2.sqlite").stat().st_size <= MEGABYTE


def test_a_source_larger_than_the_cache_can_be_encoded(tmp_path):
    file = tmp_path / "encodings-2.sqlite"

    def run(cache):
        cache.limit(MEGABYTE)
        for i in range(40):
            keep(cache, f"{i}/", 40)
            assert file.stat().st_size <= 1.1 * MEGABYTE  # also during the run
        assert kept(cache, "39/", 40) == 40

    with_cache(tmp_path, run)
    assert file.stat().st_size <= MEGABYTE


def _fills(folder, number):
    cache = EncodingCache(folder)
    for turn in range(10):
        keep(cache, f"{number}/{turn}/", 60)
        for i in range(60):
            found = cache.get("s", f"{1 - number}/{turn}/{i}", "centre")
            assert found is None or (found == i).all()
    cache.close()


def test_two_processes_share_a_small_cache(tmp_path):
    with_cache(tmp_path, lambda cache: cache.limit(MEGABYTE))
    workers = [multiprocessing.get_context().Process(target=_fills, args=(str(tmp_path), number)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert (tmp_path / "encodings-2.sqlite").stat().st_size <= MEGABYTE
    assert with_cache(tmp_path, len) > 100


def table_of(path, column, **more):
    pq.write_table(pa.table({"feature": column} | more), path)
    return path


def read_all(path, norms="check"):
    return np.concatenate([rows for _, rows in read_rows(path, norms)])


FLOATS = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
LISTS = {"fixed": lambda t: pa.list_(t, 4), "list": pa.list_, "large": pa.large_list}


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("shape", LISTS)
def test_features_of_every_float_and_list_type_are_read(tmp_path, kind, shape):
    rows = unit_rows(5, 4).astype(kind)
    path = table_of(tmp_path / "t.parquet", pa.array(list(rows), LISTS[shape](FLOATS[kind])))
    found = read_all(path)
    assert found.dtype == np.float32
    assert np.array_equal(found, rows.astype(np.float32))
    assert table_dim(path) == 4


GOOD = [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, None, GOOD, None], "rows 1, 3 without a feature"),
        ([GOOD, GOOD, [1.0, 0.0]], "row 2 with 2 values; earlier rows have 4"),
        ([[], []], "row 0 has no values"),
        ([GOOD, [1.0, None, 0.0, 0.0]], "row 1 with a missing value"),
        ([[np.inf, 0, 0, 0], GOOD, [0, -np.inf, 0, 0]], "rows 0, 2: the feature contains NaN or infinity"),
        ([GOOD, [1e300, 0, 0, 0]], "row 1: the feature contains NaN or infinity"),
        ([GOOD, [0.0, 0, 0, 0]], "row 1: the feature is zero"),
        ([GOOD, [2.0, 0, 0, 0]], "row 1: norm 2 instead of 1; use norms=unit"),
        ([[0.5, 0, 0, 0], GOOD], "row 0: norm 0.5 instead of 1"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_invalid_row_is_named(tmp_path, rows, words):
    path = table_of(tmp_path / "my table.parquet", pa.array(rows, pa.list_(pa.float64())))
    with pytest.raises(InputError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_rows_are_counted_over_the_whole_table(tmp_path):
    rows = list(unit_rows(10_000, 4))
    cases = {
        "row 9013 with 3": [1.0, 0.0, 0.0],
        "row 9013: the feature contains": [np.nan] * 4,
        "row 9013 without": None,
    }
    for words, wrong in cases.items():
        path = table_of(tmp_path / "t.parquet", pa.array([*rows[:9013], wrong, *rows[9014:]], pa.list_(pa.float32())))
        with pytest.raises(InputError, match=words):
            read_all(path)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.0, 2.0]),
        pa.array([[1, 0], [0, 1]]),
        pa.array([[[1.0]], [[1.0]]]),
        pa.array([{"x": 1.0}, {"x": 1.0}]),
        pa.nulls(2),
        pa.array([[None], [None]]),
    ],
)
def test_a_feature_of_another_type_is_refused(tmp_path, column):
    path = table_of(tmp_path / "t.parquet", column)
    with pytest.raises(InputError, match=r"t\.parquet: column 'feature' has type .*expected lists of float"):
        read_all(path)


def test_an_empty_table_and_one_without_features_are_refused(tmp_path):
    empty = table_of(tmp_path / "e.parquet", pa.array([], pa.list_(pa.float32(), 4)))
    assert list(read_rows(empty, "check")) == []
    with pytest.raises(InputError, match=r"e\.parquet: has no rows"):
        table_dim(empty)
    pq.write_table(pa.table({"id": ["a"], "vector": ["b"]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="one column 'feature'; its columns are id, vector"):
        read_all(tmp_path / "n.parquet")


def test_norms_can_be_scaled_or_kept(tmp_path):
    rows = unit_rows(6, 4) * np.arange(1, 7, dtype=np.float32)[:, None]
    path = table_of(tmp_path / "t.parquet", list(rows))
    assert np.allclose(read_all(path, "unit"), unit_rows(6, 4), atol=1e-6)
    assert np.array_equal(read_all(path, "keep"), rows)
    zero = table_of(tmp_path / "z.parquet", pa.array([GOOD, [0.0] * 4]))
    assert read_all(zero, "keep").tolist() == [GOOD, [0.0] * 4]
    with pytest.raises(InputError, match="row 1: the feature is zero"):
        read_all(zero, "unit")
    huge = table_of(tmp_path / "huge.parquet", list(1e30 * rows))
    check_backbone(None, 4, None, [open_items(huge)])
    assert np.allclose(read_all(huge, "unit"), unit_rows(6, 4), atol=1e-6)
    half = unit_rows(50, 512).astype(np.float16)  # of unit norm, up to rounding
    assert np.array_equal(read_all(table_of(tmp_path / "h.parquet", list(half))), half.astype(np.float32))


@pytest.mark.parametrize(
    "order", [[0, 1, 2], [19_000, 3, 11], [5, 5, 5], [19_999, 0, 19_999, 7, 0], [12], range(20_000)[::-1]]
)
def test_rows_can_be_taken_in_any_order_and_repeatedly(tmp_path, order):
    rows = unit_rows(20_000, 4)
    source = open_items(table_of(tmp_path / "t.parquet", list(rows))).take(order)
    positions, found = all_of(Reader(), source)
    assert positions.tolist() == list(range(len(order)))
    assert np.array_equal(found, rows[order])


def test_a_table_stores_its_backbone(tmp_path):
    path = with_identity(tmp_path / "t.parquet", json.dumps(IDENTITY.to_dict()).encode())
    assert table_identity(path) == IDENTITY
    assert table_identity(with_identity(tmp_path / "u.parquet", None)) is None


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"model": 1}', b"[" * 100_000])
def test_unreadable_backbone_metadata_is_refused(tmp_path, raw):
    with pytest.raises(InputError, match=r"t\.parquet: its metadata cannot be read"):
        table_identity(with_identity(tmp_path / "t.parquet", raw))


def test_a_table_of_another_backbone_is_refused(tmp_path):
    other = replace(IDENTITY, model="other", weights="sha256:09")
    source = open_items(with_identity(tmp_path / "t.parquet", json.dumps(other.to_dict()).encode()))
    with pytest.raises(BackboneError, match=r"other/tag .*fake/tag"):
        all_of(Reader(Fake()), source)
    with pytest.raises(BackboneError, match=r"t\.parquet"):
        check_backbone(IDENTITY, 6, None, [source])
    check_backbone(None, 6, None, [source])
    with pytest.raises(InputError, match="its features have 6 values; the index has 5"):
        check_backbone(None, 5, None, [source])
    with pytest.raises(BackboneError, match="index: made with encoder"):
        check_backbone(other, 6, Fake(), [])
    with pytest.raises(BackboneError, match="its features have 6 values; the index has 5"):
        check_backbone(None, 5, Fake(), [])


def test_an_encoded_table_contains_the_features(folder, tmp_path):
    lines = "".join(f"images/{n:02}.png,{'even' if n % 2 == 0 else 'odd'},note {n}\n" for n in range(12))
    (tmp_path / "list.csv").write_text(f"path,label,note\n{lines}")
    out = tmp_path / "caf\udce9.parquet"  # not UTF-8
    source = open_source(tmp_path / "list.csv")
    assert encode_table(source, out, Reader(Fake(), batch_size=5)) == 12
    table = pq.read_table(pa.BufferReader(out.read_bytes()))
    assert table.column_names == ["id", "label", "feature", "digest", "note"]
    assert table["feature"].type == pa.list_(pa.float32(), 6)
    assert table["id"].to_pylist() == source.sources
    assert table["label"].to_pylist() == source.labels
    assert table["note"].to_pylist() == [f"note {n}" for n in range(12)]
    assert all(len(digest) == 64 for digest in table["digest"].to_pylist())
    assert table_identity(out) == IDENTITY
    assert np.array_equal(read_all(out), all_of(Reader(Fake()), source)[1])
    assert open_source(out).class_names == source.class_names


def test_encoding_a_feature_table_copies_it(folder, tmp_path):
    first, second = tmp_path / "1.parquet", tmp_path / "2.parquet"
    encode_table(source_of(folder), first, Reader(Fake()))
    encode_table(open_items(first), second, Reader())
    one, two = pq.read_table(first), pq.read_table(second)
    assert one.equals(two, check_metadata=True)


def test_unreadable_images_have_no_row(folder, tmp_path):
    (folder / "03.png").write_bytes(b"")
    reader = Reader(Fake())
    assert encode_table(source_of(folder), tmp_path / "o.parquet", reader) == 11
    table = pq.read_table(tmp_path / "o.parquet")
    assert "03.png" not in "".join(table["id"].to_pylist())
    assert table["label"].to_pylist() == [None] * 11
    assert len(reader.skipped) == 1


def test_further_columns_of_any_type_are_kept(tmp_path):
    more = {
        "tags": pa.array([["a"], []]),
        "box": pa.array([{"x": 1, "y": None}, None]),
        "when": pa.array([1, None], pa.timestamp("us", "UTC")),
        "kind": pa.array(["u", "v"]).dictionary_encode(),
        "nothing": pa.nulls(2),
        "dotted.name": pa.array([1, 2]),
        "feature.note": pa.array(["n", "m"]),
    }
    path = table_of(tmp_path / "t.parquet", list(unit_rows(2, 4)), id=["a", "b"], **more)
    encode_table(open_items(path), tmp_path / "o.parquet", Reader())
    found = pq.read_table(tmp_path / "o.parquet")
    for name, column in more.items():
        assert open_items(path).items[name].type == column.type
        assert found[name].to_pylist() == column.to_pylist()


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_the_folder_as_it_was(folder, tmp_path, existed):
    place = tmp_path / "out"
    place.mkdir()
    out = place / "o.parquet"
    if existed:
        out.write_bytes(b"what was there")
    before = {path: path.read_bytes() for path in place.iterdir()}
    (folder / "11.png").write_bytes(b"")
    failing = [
        (source_of(folder), Reader(Fake(), strict=True, batch_size=2)),
        (of_images([str(tmp_path / "gone.png")]), Reader(Fake())),
        (source_of(folder), Reader()),
        (open_items(table_of(tmp_path / "t.parquet", pa.array([GOOD, [np.nan] * 4]))), Reader()),
    ]
    for source, reader in failing:
        with pytest.raises(RetrievalTipError):
            encode_table(source, out, reader)
        assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_an_unwritable_output_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.parquet").mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")
    before = sorted(tmp_path.rglob("*"))
    for out in ("gone/o.parquet", "file/o.parquet", "folder.parquet", "pipe.parquet", "x" * 300):
        with pytest.raises(InputError) as caught:
            encode_table(source_of(folder), tmp_path / out, Reader(Fake()))
        assert f"{tmp_path / out}: cannot be written" in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "pipe.parquet").is_fifo()
    with pytest.raises(InputError, match="cannot be written"):
        encode_table(source_of(folder), "", Reader(Fake()))


def test_writing_to_a_link_replaces_its_target(folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.parquet").symlink_to("real/o.parquet")
    encode_table(source_of(folder), tmp_path / "link.parquet", Reader(Fake()))
    assert (tmp_path / "link.parquet").is_symlink()
    assert pq.read_metadata(tmp_path / "real/o.parquet").num_rows == 12


@pytest.fixture
def jpegs(tmp_path):
    """A JPEG that can be reduced for views of 4 x 4, a JPEG that is too small for this, and a PNG."""
    place = tmp_path / "jpegs"
    place.mkdir()
    for name, size in (("large.jpg", (90, 70)), ("small.jpg", (23, 90)), ("large.png", (90, 70))):
        picture(len(name)).resize(size).save(place / name)
    return of_images([str(place / name) for name in ("large.jpg", "small.jpg", "large.png")])


def test_reduction_only_changes_features_of_large_jpegs(jpegs):
    whole = Reader(Fake(), reduce=False).encode(jpegs).features
    reduced = Reader(Fake()).encode(jpegs).features
    assert [np.array_equal(*pair) for pair in zip(whole, reduced, strict=True)] == [False, True, True]
    assert (whole * reduced).sum(axis=1).min() > 0.98
    for path, feature in zip(jpegs.paths, reduced, strict=True):
        expected = Fake().expected(images.decode(Path(path).read_bytes(), 12))
        assert np.allclose(feature, expected, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_the_cache_separates_reduced_and_whole_images(jpegs, tmp_path, first):
    alone = {reduce: Reader(Fake(), reduce=reduce).encode(jpegs).features for reduce in (True, False)}
    for reduce, fresh in ((first, 3), (not first, 3), (first, 0), (not first, 0)):
        backbone = Fake()
        reader = Reader(backbone, reduce=reduce)
        found = with_cache(tmp_path / "c", lambda cache: replace(reader, cache=cache).encode(jpegs))  # noqa: B023
        assert sum(backbone.batches) == fresh
        assert np.array_equal(found.features, alone[reduce])


def test_augmented_views_use_the_whole_image(jpegs):
    for names in (["crop/1/0", "crop/1/1"], ["crop/1/0", "centre"]):
        whole, reduced = (Reader(Fake(), reduce=reduce).encode_views(jpegs, names) for reduce in (False, True))
        same = (whole.features == reduced.features).all(axis=1)
        assert same.tolist() == [True, "centre" not in names, True, True, True, True]


@pytest.fixture
def cache(tmp_path):
    cache = EncodingCache(tmp_path / "cache")
    yield cache
    cache.close()


def by_hand(backbone, path, name):
    data = images.read(path)
    digest = hashlib.sha256(data).hexdigest()
    decoded = images.decode(data)
    return backbone.preprocess(decoded) if name == "centre" else backbone.view(decoded, f"{digest}/{name}")


def test_each_view_of_a_photo_is_encoded(shared, lit_mini):
    source = open_source(shared / "data/caltech101/split_zhou_Caltech101.json").take([0, 40, 20])
    names = ["centre", *view_names(5, 2)]
    found = Reader(lit_mini).encode_views(source, names)
    assert found.positions.tolist() == [0, 1, 2]
    assert found.starts.tolist() == [0, 3, 6, 9]
    assert (found.positions.dtype, found.features.dtype, found.starts.dtype) == (np.int64, np.float32, np.int64)
    for shot, path in enumerate(source.paths):
        for view, name in enumerate(names):
            expected = unit(lit_mini.encode_images(by_hand(lit_mini, path, name)[None]))[0]
            np.testing.assert_allclose(found.features[found.starts[shot] + view], expected, atol=1e-5)


@pytest.mark.parametrize("views", [1, 3])
def test_raw_views_average_to_the_feature_of_a_shot(folder, cache, views):
    backbone = Fake()
    source = source_of(folder)
    reader = Reader(backbone, views=views, seed=4, cache=cache)
    each = reader.encode_views(source, view_names(4, views))
    encoded = sum(backbone.batches)
    assert encoded == 12 * views
    block = reader.encode(source)
    assert sum(backbone.batches) == encoded  # blocks found every view in the cache
    for shot, path in enumerate(source.paths):
        pixels = torch.stack([by_hand(backbone, path, name) for name in view_names(4, views)])
        raw = backbone.encode_images(pixels)
        np.testing.assert_allclose(each.features[each.starts[shot] : each.starts[shot + 1]], unit(raw), atol=1e-6)
        np.testing.assert_allclose(block.features[shot], unit(raw.mean(axis=0, keepdims=True))[0], atol=1e-6)


def test_a_repeated_path_is_one_shot(folder):
    source, reads = source_of(folder).take([3, 0, 3, 11, 0, 5]), Reads()
    found = Reader(Fake(), batch_size=2, read=reads).encode_views(source, ["centre"])
    assert found.positions.tolist() == [0, 1, 3, 5]
    assert found.starts.tolist() == [0, 1, 2, 3, 4]
    assert sum(reads.values()) == 4
    for feature, number in zip(found.features, [3, 0, 11, 5], strict=True):
        np.testing.assert_allclose(feature, Fake().expected(picture(number)), atol=1e-6)


def test_an_unreadable_image_has_no_views(folder):
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


def table(path, ids, rows):
    pq.write_table(pa.table({"id": ids, "label": ["x"] * len(ids), "feature": list(rows)}), path)
    return open_items(path)


def test_rows_that_share_an_id_are_the_views_of_a_shot(tmp_path):
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


def test_one_row_per_shot_returns_the_table_itself(tmp_path):
    rows = unit_rows(5, 4)
    found = Reader().encode_views(table(tmp_path / "t.parquet", list("edcba"), rows), view_names(1, 4))
    assert found.positions.tolist() == [0, 1, 2, 3, 4]
    assert found.starts.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(found.features, rows)


def test_views_of_tables_raise_the_errors_of_blocks(tmp_path):
    rows = unit_rows(3, 4)
    rows[1] *= 2
    source = table(tmp_path / "t.parquet", ["a", "a", "b"], rows)
    with pytest.raises(InputError, match="row 1: norm 2"):
        Reader().encode_views(source, [])
    assert np.allclose(Reader(norms="unit").encode_views(source, []).features, unit_rows(3, 4), atol=1e-6)
    other = with_identity(tmp_path / "o.parquet", json.dumps(replace(IDENTITY, weights="sha256:09").to_dict()).encode())
    with pytest.raises(BackboneError, match=r"o\.parquet"):
        Reader(Fake()).encode_views(open_items(other), [])
