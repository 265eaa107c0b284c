"""Images are read and encoded once. Feature tables are read exactly, and errors name the row. Views belong to shots."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tries
from fake import IDENTITY, Fake, Reads, picture, pictures, source_of, with_identity
from hypothesis import given
from hypothesis import strategies as st
from tables import odd_columns, unit_rows, write_parts

from retrieval_tip import machine
from retrieval_tip.backbones.base import Part, side_by_side, unit
from retrieval_tip.data import images
from retrieval_tip.data.cached_encoder import CENTRE
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.feature_table import FeatureTable, check_backbone
from retrieval_tip.data.reader import Reader, encode_table, view_names
from retrieval_tip.data.sources import of_features, of_images, open_items, open_source, read_item
from retrieval_tip.data.tables import MOST_OPEN, ParquetFiles
from retrieval_tip.errors import BackboneError, InputError, RetrievalTipError, UsageError
from retrieval_tip.index.build import build_index


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "images")


def all_of(reader, source):
    """Return the positions and features of all blocks."""
    blocks = list(reader.blocks(source))
    return np.concatenate([b.positions for b in blocks]), np.concatenate(
        [b.features for b in blocks]
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures, a copy of the first, two JPEGs of which one is large enough to be reduced, and two faults."""
    place = pictures(tmp_path_factory.mktemp("photos") / "images")
    (place / "12.png").write_bytes((place / "00.png").read_bytes())
    for name, size in (("13.jpg", (90, 70)), ("14.jpg", (23, 90))):
        picture(13).resize(size).save(place / name)
    (place / "15.png").write_bytes(b"garbage")
    return [*map(str, sorted(place.iterdir())), str(place / "missing.png")]


def by_hand(path, names, *, reduce=True):
    """Return the digest of an image and the raw features of its views. Only the centre may be of a reduced image."""
    data = read_item(path)
    backbone = Fake()
    digest = hashlib.sha256(data).hexdigest()
    image = images.decode(data)
    centre = backbone.preprocess(images.decode(data, 12) if reduce else image)
    views = [
        centre if name == CENTRE else backbone.view(image, f"{digest}/{name}") for name in names
    ]
    return digest, backbone.encode_images(torch.stack(views))


numbers = st.lists(st.integers(0, 16), min_size=1, max_size=20).filter(
    lambda order: min(order) < 15
)
drawn_views = st.tuples(st.integers(1, 4), st.integers(1, 2))


@tries(60)
@given(numbers, drawn_views, drawn_views, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_each_image_is_read_and_encoded_once(
    tmp_path_factory, photos, order, views, before, batch_size, workers, cached
):
    """Photos may repeat, or be the same under two names; the cache may know some views of all photos."""
    source, (number, seed), reads = of_images([photos[number] for number in order]), views, Reads()
    names = view_names(seed, number)
    each = [*names, CENTRE] if number > 1 else names
    found = {path: by_hand(path, each) for path in source.paths if path not in photos[15:]}
    cache = EncodingCache(tmp_path_factory.mktemp("cache")) if cached else None
    known = set()

    if cached:  # under other names, since images are identified by their content
        moved = shutil.copytree(Path(photos[0]).parent, tmp_path_factory.mktemp("moved") / "moved")
        first = view_names(before[1], before[0])
        known = set(first)
        Reader(Fake(), cache=cache).encode_views(
            of_images(sorted(map(str, moved.iterdir()))), first
        )
    for mean, own in ((True, names), (False, each)):
        backbone = Fake()
        fresh = set(own) - known
        reads.clear()
        reader = Reader(backbone, number, seed, "check", batch_size, workers, cache)
        counted = replace(source, load=reads)
        result = reader.encode(counted) if mean else reader.encode_views(counted, own)
        digests = [digest for digest, _ in found.values()]
        known = known | (set(own) if cached else set())
        assert reads == dict.fromkeys([Path(path).name for path in source.paths], 1)
        assert max(backbone.batches, default=0) <= batch_size
        assert len(set(digests)) * len(fresh) <= sum(backbone.batches) <= len(digests) * len(fresh)
        paths = [
            path
            for path in (source.paths if mean else dict.fromkeys(source.paths))
            if path in found
        ]
        raw = [found[path][1][: len(own)] for path in paths]
        if mean:
            assert result.positions.tolist() == [
                at for at, path in enumerate(source.paths) if path in found
            ]
            assert result.digests == [found[path][0] for path in paths]
            raw = [views.mean(axis=0, keepdims=True) for views in raw]
        else:
            assert list(result) == [source.paths.index(path) for path in paths]
        features = result.features if mean else np.concatenate(list(result.values()))
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, unit(np.concatenate(raw)), atol=1e-6)
        failed = [path for path in dict.fromkeys(source.paths) if path not in found]
        assert [skipped.source for skipped in reader.skipped] == failed
    if cached:
        cache.close()


def test_reduction_only_changes_large_jpegs_and_those_little(photos):
    pairs = [
        [unit(by_hand(path, [CENTRE], reduce=reduce)[1]) for reduce in (True, False)]
        for path in photos[11:15]
    ]
    assert [np.array_equal(*pair) for pair in pairs] == [True, True, False, True]
    assert min((one * other).sum() for one, other in pairs) > 0.98


def test_an_unreadable_image_is_named(photos, caplog):
    reader = Reader(Fake())
    views = view_names(1, 2)
    for _ in range(2):
        reader.encode_views(of_images(photos), views)
    assert [skipped.reason.partition(":")[0] for skipped in reader.skipped] == [
        "not a readable image",
        "no such file",
    ]
    assert caplog.text.count(photos[15]) == caplog.text.count(photos[16]) == 1
    for read in (Reader.encode, lambda reader, source: reader.encode_views(source, views)):
        with pytest.raises(InputError, match=r"15\.png: not a readable image"):
            read(Reader(Fake(), strict=True, batch_size=2), of_images(photos))
        with pytest.raises(
            InputError, match=r"none of 2 images could be read .*not a readable image"
        ):
            read(Reader(Fake()), of_images(photos[15:]))
        with pytest.raises(InputError, match=r"^[^(]*missing\.png"):
            read(Reader(Fake()), of_images(photos[16:]))


def test_too_large_requests_are_refused_before_memory_is_allocated(folder, monkeypatch):
    fake = Fake(identity=replace(IDENTITY, preprocess={"size": (100, 200)}))  # a view has 240 kB
    source = replace(source_of(folder), load=lambda _: pytest.fail("an image was read"))
    monkeypatch.setattr(machine, "memory", lambda: 10_000_000)
    reader = Reader(fake)
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
    source = source_of(folder)
    backbone = Fake(**change)
    right = fill(tmp_path / "c", source)
    found = with_cache(tmp_path / "c", lambda cache: all_of(Reader(backbone, cache=cache), source))
    assert np.array_equal(found[1], right)
    assert sum(backbone.batches) == backbone.prepared == fresh


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
    "wrong",
    [{"views": 0}, {"batch_size": 0}, {"workers": 0}, {"batch_size": -1}, {"norms": "sometimes"}],
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
        generator = np.random.default_rng(seed)
        damaged = bytearray(file.read_bytes())
        for place in generator.integers(0, len(damaged) if seed % 2 else 4096, 40):
            damaged[place] ^= 1 << generator.integers(0, 8)
        file.write_bytes(damaged)

    return damage


OTHER = "(SELECT e.feature, e.crc FROM encodings e WHERE e.digest <> encodings.digest LIMIT 1)"
DAMAGES = [
    # what damages the file, and at least how many images are encoded again if the file can still be used
    *(
        (updated(f"{column} = {value}"), 11)
        for column, value in (
            ("feature", "zeroblob(24)"),
            ("crc", "crc + 1"),
            ("feature", "'text'"),
            ("crc", "'x'"),
            (
                "(feature, crc)",
                OTHER,
            ),  # as if a bit of SQLite's own index had flipped: entries under the key of another
        )
    ),
    *((flipped(seed), 0) for seed in range(8)),
    (lambda file: file.write_bytes(b"garbage" * 1000), 0),
    (lambda file: file.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000), 0),
    (
        lambda file: file.write_bytes(file.read_bytes()[:4096].ljust(file.stat().st_size, b"\xee")),
        0,
    ),
]


@pytest.mark.parametrize(("damage", "fresh"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_cache_never_gives_wrong_features(folder, tmp_path, damage, fresh):
    source = source_of(folder)
    file = tmp_path / "c/encodings-2.sqlite"
    right = fill(tmp_path / "c", source)
    damage(file)
    backbone = Fake()
    reader = Reader(backbone)
    try:
        found = with_cache(
            tmp_path / "c", lambda cache: all_of(replace(reader, cache=cache), source)
        )
    except InputError as error:
        assert fresh == 0
        assert "remove it, or give" in str(error)  # noqa: PT017
    else:
        assert np.array_equal(found[1], right)
        assert sum(backbone.batches) >= fresh
    assert reader.skipped == []  # the cache is damaged, not the images
    if fresh:
        again = Fake()
        second = with_cache(
            tmp_path / "c", lambda cache: all_of(Reader(again, cache=cache), source)
        )
        assert np.array_equal(second[1], right)
        assert again.batches == []


def test_a_cache_that_cannot_be_used_is_refused_or_replaced_by_a_warning(
    tmp_path, monkeypatch, caplog
):
    """It is refused if the user names it. The default is left out, with a warning."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "d/encodings-2.sqlite").mkdir(parents=True)
    (tmp_path / "p").mkdir()
    os.mkfifo(tmp_path / "p/encodings-2.sqlite")
    for place in (
        *(tmp_path / name for name in ("file", "file/below", "d", "p")),
        Path("/dev/null/x"),
    ):
        monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(place))
        caplog.clear()
        assert EncodingCache.default() is None
        (said,) = caplog.messages
        assert str(place) in said
        with pytest.raises(InputError, match="--no-cache"):
            EncodingCache(place)


def test_environment_variables_set_the_cache_folder(monkeypatch):
    places = {
        "RETRIEVAL_TIP_CACHE": "",
        "XDG_CACHE_HOME": "/retrieval-tip",
        "USERPROFILE" if os.name == "nt" else "HOME": "/.cache/retrieval-tip",
    }
    for number, name in enumerate(places):
        monkeypatch.setenv(name, f"/{number}")
    for number, (name, below) in enumerate(places.items()):
        assert EncodingCache.default_folder() == Path(f"/{number}{below}")
        monkeypatch.delenv(name)
    monkeypatch.setattr(
        Path, "home", mock.Mock(side_effect=RuntimeError("Could not determine home directory."))
    )
    assert EncodingCache.default() is None
    with pytest.raises(UsageError, match="RETRIEVAL_TIP_CACHE"):
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


MEGABYTE = 1_000_000


def keep(cache, name, number):
    for start in range(0, number, 10):
        cache.put(
            "s",
            {
                (f"{name}{i}", "centre"): np.full(512, i, np.float32)
                for i in range(start, start + 10)
            },
        )


def kept(cache, name, number):
    return sum(cache.get("s", f"{name}{i}", "centre") is not None for i in range(number))


def test_a_cache_stays_within_its_size_while_it_grows(tmp_path):
    file = tmp_path / "encodings-2.sqlite"

    def run(cache):
        cache.limit(MEGABYTE)
        for i in range(40):
            keep(cache, f"{i}/", 40)
            assert file.stat().st_size <= 1.1 * MEGABYTE
        left = [kept(cache, f"{i}/", 40) for i in range(40)]
        assert left == sorted(left)
        assert (left[0], left[-1]) == (0, 40)

    with_cache(tmp_path, run)
    assert file.stat().st_size <= MEGABYTE


def test_a_full_cache_drops_its_least_recently_used_entries(tmp_path):
    with_cache(tmp_path, lambda cache: cache.limit(MEGABYTE))
    for name in "abc":
        with_cache(tmp_path, lambda cache, name=name: keep(cache, name, 60))
    assert with_cache(tmp_path, lambda cache: kept(cache, "a", 60)) == 60  # this counts as a use
    with_cache(tmp_path, lambda cache: keep(cache, "d", 90))
    left = {
        name: with_cache(tmp_path, lambda cache, name=name: kept(cache, name, 60))
        for name in "abcd"
    }
    assert (left["a"], left["d"]) == (60, 60)
    assert left["b"] < 60
    assert left["c"] == 60 or left["b"] == 0
    assert (tmp_path / "encodings-2.sqlite").stat().st_size <= MEGABYTE


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
    workers = [
        multiprocessing.get_context().Process(target=_fills, args=(str(tmp_path), number))
        for number in (0, 1)
    ]
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
    return Reader(norms=norms).encode(open_items(path)).features


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("lists", [lambda kind: pa.list_(kind, 4), pa.list_, pa.large_list])
def test_features_of_every_float_and_list_type_are_read(tmp_path, kind, lists):
    rows = unit_rows(5, 4).astype(kind.to_pandas_dtype())
    path = table_of(tmp_path / "t.parquet", pa.array(list(rows), lists(kind)))
    assert read_all(path).dtype == np.float32
    assert np.array_equal(read_all(path), rows.astype(np.float32))
    assert [part.width for part in FeatureTable(ParquetFiles(path)).parts()] == [4]


GOOD = [1.0, 0.0, 0.0, 0.0]
MANY = list(unit_rows(10_000, 4))
IN_MANY = {" with 3": [1.0, 0.0, 0.0], ": the feature contains": [np.nan] * 4, " without": None}
NOT_LISTS = [
    [1.0, 2.0],
    [[1, 0], [0, 1]],
    [[[1.0]], [[1.0]]],
    [{"x": 1.0}] * 2,
    [None, None],
    [[None], [None]],
]
BAD_ROWS = [
    ([GOOD, None, GOOD, None], "rows 1, 3 without a feature"),
    ([GOOD, GOOD, [1.0, 0.0]], "row 2 with 2 values; earlier rows have 4"),
    ([[], []], "row 0 has no values"),
    ([GOOD, [1.0, None, 0.0, 0.0]], "row 1 with a missing value"),
    (
        [[np.inf, 0, 0, 0], GOOD, [0, -np.inf, 0, 0]],
        "rows 0, 2: the feature contains NaN or infinity",
    ),
    ([GOOD, [1e300, 0, 0, 0]], "row 1: the feature contains NaN or infinity"),
    ([GOOD, [0.0, 0, 0, 0]], "row 1: the feature is zero"),
    ([GOOD, [2.0, 0, 0, 0]], "row 1: norm 2 instead of 1; use norms=unit"),
    ([[0.5, 0, 0, 0], GOOD], "row 0: norm 0.5 instead of 1"),
    *(([*MANY[:9013], row, *MANY[9014:]], f"row 9013{words}") for words, row in IN_MANY.items()),
]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        *((pa.array(rows, pa.list_(pa.float64())), words) for rows, words in BAD_ROWS),
        *((pa.array(column), "column 'feature' has type ") for column in NOT_LISTS),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_an_invalid_row_or_column_is_named(tmp_path, column, words):
    path = table_of(tmp_path / "my table.parquet", column)
    with pytest.raises(InputError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_table_without_rows_features_or_readable_metadata_is_refused(tmp_path):
    empty = table_of(tmp_path / "e.parquet", pa.array([], pa.list_(pa.float32(), 4)))
    with pytest.raises(InputError, match=r"e\.parquet: has no rows"):
        read_all(empty)
    assert (
        FeatureTable(ParquetFiles(with_identity(tmp_path / "u.parquet", None))).identity() is None
    )
    pq.write_table(pa.table({"id": ["a"], "vector": ["b"]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="one column 'feature'; its columns are id, vector"):
        FeatureTable(ParquetFiles(tmp_path / "n.parquet")).parts()
    for raw in (b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"model": 1}', b"[" * 100_000):
        with pytest.raises(InputError, match=r"t\.parquet: its metadata cannot be read"):
            read_all(with_identity(tmp_path / "t.parquet", raw))


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
    assert np.array_equal(
        read_all(table_of(tmp_path / "h.parquet", list(half))), half.astype(np.float32)
    )


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


def test_an_encoded_table_contains_the_features_of_readable_images(folder, tmp_path):
    lines = "".join(
        f"images/{n:02}.png,{'even' if n % 2 == 0 else 'odd'},note {n}\n" for n in range(12)
    )
    (tmp_path / "list.csv").write_text(f"path,label,note\n{lines}")
    (folder / "03.png").write_bytes(b"")
    out = tmp_path / "caf\udce9.parquet"  # not UTF-8
    source = open_source(tmp_path / "list.csv")
    reader = Reader(Fake(), batch_size=5)
    read = [0, 1, 2, *range(4, 12)]
    assert encode_table(source, out, reader) == 11
    assert len(reader.skipped) == 1
    table = pq.read_table(pa.BufferReader(out.read_bytes()))
    assert table.column_names == ["id", "label", "feature", "digest", "note"]
    assert table["feature"].type == pa.list_(pa.float32(), 6)
    assert table["id"].to_pylist() == [source.sources[n] for n in read]
    assert table["label"].to_pylist() == [source.labels[n] for n in read]
    assert table["note"].to_pylist() == [f"note {n}" for n in read]
    assert all(len(digest) == 64 for digest in table["digest"].to_pylist())
    assert FeatureTable(ParquetFiles(out)).identity() == IDENTITY
    assert np.array_equal(read_all(out), all_of(Reader(Fake()), source)[1])
    assert open_source(out).class_names == source.class_names


def test_encoding_a_feature_table_copies_columns_of_any_type(tmp_path):
    more = odd_columns() | dict.fromkeys(["dotted.name", "feature.note"], pa.array(["n", "m"]))
    first, second, third = (tmp_path / f"{number}.parquet" for number in range(3))
    table_of(first, list(unit_rows(2, 4)), id=["a", "b"], **more)
    encode_table(open_items(first), second, Reader())
    encode_table(open_items(second), third, Reader())
    found = pq.read_table(second)
    assert found.equals(pq.read_table(third), check_metadata=True)
    for name, column in more.items():
        assert name == "view" or open_items(first).items[name].type == column.type
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


@pytest.fixture(scope="module")
def large_table(tmp_path_factory):
    """A table whose rows are read in several blocks, and in which three rows share an id."""
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    rows = unit_rows(20_000, 4)
    return open_items(table_of(path, list(rows), id=[str(i % 6_667) for i in range(20_000)])), rows


@tries(60)
@given(
    st.lists(
        st.integers(0, 12) | st.sampled_from([6667, 6670, 13_334, 13_340, 19_999]),
        min_size=1,
        max_size=20,
    )
)
def test_rows_can_be_taken_in_any_order_and_those_that_share_an_id_are_the_views_of_a_shot(
    large_table, order
):
    whole, rows = large_table
    source = whole.take(order)
    positions, found = all_of(Reader(), source)
    assert positions.tolist() == list(range(len(order)))
    assert np.array_equal(found, rows[order])
    views = Reader().encode_views(source, [])
    shots = {}
    for place, row in enumerate(order):
        shots.setdefault(row % 6_667, []).append(place)
    assert list(views) == [places[0] for places in shots.values()]
    for own, places in zip(views.values(), shots.values(), strict=True):
        assert np.array_equal(own, rows[order][places])


def test_the_parts_of_a_folder_are_one_table(tmp_path):
    rows = unit_rows(6, 4)
    numbers = [f"{row}" for row in range(6)]
    kinds = [pa.float32(), pa.float16(), pa.float64()]
    halves = [
        pa.array(list(some), pa.list_(pa.float16()))
        for some in np.split(rows.astype(np.float16), 3)
    ]
    tables = [
        pa.table({"id": numbers[2 * i : 2 * i + 2], "feature": halves[i].cast(pa.list_(kind))})
        for i, kind in enumerate(kinds)
    ]
    places = write_parts(tmp_path / "x=1", *tables)
    (places[1].parent / "unfinished.parquet.tmp").write_bytes(b"")
    (tmp_path / "x=1/.hidden.parquet").write_bytes(b"")
    source = pickle.loads(pickle.dumps(open_items(tmp_path / "x=1")))
    assert (source.sources, source.items.column_names) == (numbers, ["source"])
    order = [5, 0, 3, 3]
    assert np.array_equal(
        Reader().encode(source.take(order)).features, rows.astype(np.float16)[order]
    )
    pq.write_table(pa.table({"id": ["a", "b"], "feature": [GOOD, [2.0, 0, 0, 0]]}), places[1])
    with pytest.raises(InputError, match=r"part-1\.parquet: row 1: norm 2"):
        Reader().encode(open_items(tmp_path / "x=1"))
    with_identity(places[0], json.dumps(IDENTITY.to_dict()).encode())
    with_identity(places[1], json.dumps(replace(IDENTITY, weights="sha256:09").to_dict()).encode())
    with_identity(places[2], None)
    with pytest.raises(BackboneError, match=r"part-1\.parquet: .*made with"):
        Reader().encode(open_items(tmp_path / "x=1"))
    with_identity(places[0], None)
    with pytest.raises(BackboneError, match=r"part-1\.parquet: .*made with"):
        Reader(parts=(Part(6, "feature", IDENTITY),)).encode(open_items(tmp_path / "x=1"))
    places[2].write_bytes(places[2].read_bytes()[:-9])
    with pytest.raises(InputError, match=r"part-2\.parquet: cannot be read"):
        open_items(tmp_path / "x=1")


def test_few_of_many_parts_are_open_at_a_time(tmp_path):
    rows = unit_rows(100, 4)
    write_parts(
        tmp_path / "parts",
        *(pa.table({"id": [str(at)], "feature": [rows[at]]}) for at in range(100)),
    )

    def opened():
        places = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(tmp_path in place.parents for place in places)

    source = open_items(tmp_path / "parts")
    assert 0 < opened() <= MOST_OPEN < 100
    for _ in range(2):
        assert np.array_equal(Reader().encode(source).features, rows)
        assert opened() == 0


def test_labelled_features_in_memory_are_a_source(tmp_path):
    rows = unit_rows(3, 4)
    labels = ["x", "y", "x"]
    source = of_features(["a", "b", "c"], labels, rows)
    assert (source.sources, source.labels, source.class_names) == (
        ["a", "b", "c"],
        labels,
        ("x", "y"),
    )
    for one in (source, pickle.loads(pickle.dumps(source))):
        assert np.array_equal(Reader().encode(one).features, rows)
    built = build_index(source, tmp_path / "index", Reader(), fit="none")
    assert np.array_equal(np.sort(built.keys, axis=0), np.sort(rows, axis=0))
    long = of_features(["a", "b", "c"], labels, rows * np.float32([[1], [2], [1]]))
    with pytest.raises(InputError, match="features: row 1: norm 2 instead of 1"):
        Reader().encode(long)
    for norms, length in (("unit", 1), ("keep", 2)):
        lengths = np.linalg.norm(Reader(norms=norms).encode(long).features, axis=1)
        assert lengths == pytest.approx([1, length, 1])
    parts = (Part(4, "clip", IDENTITY), Part(2, "cnn"))
    joined = side_by_side([rows, unit_rows(3, 2)])
    table = of_features(["a", "b", "c"], labels, joined, parts)
    assert table.table.parts(parts) == parts
    assert Reader(parts=parts).encode(table).features == pytest.approx(joined, abs=1e-6)
    for sources, reason in (
        (["a", "b", ""], "row 2 without an id"),
        (["a", "b", "x" * 5000], "longer than"),
    ):
        with pytest.raises(InputError, match=f"features: .*{reason}"):
            of_features(sources, labels, rows)
    with pytest.raises(InputError, match="features: has no rows"):
        of_features([], [], rows[:0])


def test_views_of_tables_raise_the_errors_of_blocks(tmp_path):
    rows = unit_rows(3, 4)
    rows[1] *= 2
    source = open_items(table_of(tmp_path / "t.parquet", list(rows), id=["a", "a", "b"]))
    with pytest.raises(InputError, match="row 1: norm 2"):
        Reader().encode_views(source, [])
    views = Reader(norms="unit").encode_views(source, [])
    assert np.allclose(np.concatenate(list(views.values())), unit_rows(3, 4), atol=1e-6)
    other = with_identity(
        tmp_path / "o.parquet",
        json.dumps(replace(IDENTITY, weights="sha256:09").to_dict()).encode(),
    )
    with pytest.raises(BackboneError, match=r"o\.parquet"):
        Reader(Fake()).encode_views(open_items(other), [])
