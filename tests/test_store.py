"""The index folder: manifests, versions, lock, damage, failing disks and folder names."""

import errno
import hashlib
import io
import json
import os
import pickle
import stat
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sealing import body_of, manifest_of, one_line, refused, resealed, sealed, snapshot

from retrieval_tip import Index, verify
from retrieval_tip.backbones.base import Identity
from retrieval_tip.errors import InputError, RetrievalTipError, StoreError
from retrieval_tip.files import sha256_of
from retrieval_tip.store.labels import LABEL_SCHEMA, label_table
from retrieval_tip.store.manifest import FORMAT_VERSION, SUFFIXES, Manifest, named_in
from retrieval_tip.store.versions import Check, Versions

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["cat", "dog", "owl", "eel"]
N, D = 40, 8


def model(seed=0, n=N, d=D, index="Flat"):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((n, d), dtype=np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    text = np.eye(
        len(CLASSES), d, dtype=np.float32
    )  # the same for every seed: versions share its file
    return Index.from_features(keys, np.arange(n) % len(CLASSES), CLASSES, text, index=index)


def answer(cache):
    return cache.logits(np.eye(D, dtype=np.float32), k=10).numpy().tobytes()


def describe(folder):
    return Versions(folder).describe()


def history(folder):
    return Versions(folder).history()


def checking(folder):
    """Start a check of the current version."""
    return Check(Versions(folder).files, Versions(folder).manifest())


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "index"
    model().save(folder)
    return folder


def test_a_manifest_preserves_unicode_names_and_exact_settings(tmp_path):
    cache = model()
    cache.class_names = ["Käse", "猫", "a\nb", '"\\\u2028\x00']
    cache.rows = replace(
        cache.rows, labels=label_table(cache.class_names, cache.labels["class_id"].to_numpy())
    )
    cache.settings = cache.settings.override(alpha=0.1 + 0.2, beta=1e-300, k=7, tail=False)
    cache.templates = ["a photo of {}."]
    cache.backbone = Identity.from_dict(BACKBONE)
    cache.provenance = {"seed": 1, "nested": {"list": [None, True, 1.5, "ü"]}}
    cache.save(tmp_path / "x")
    found = Index.load(tmp_path / "x")
    for name in ("class_names", "backbone", "settings", "templates", "provenance"):
        assert getattr(found, name) == getattr(cache, name)
    assert (
        repr(found)
        == "Index(40 keys of 8, 4 classes, index='Flat', alpha=0.3, beta=1e-300, k=7, device='cpu')"
    )


BACKBONE = {
    "model": "RN50",
    "pretrained": None,
    "weights": "ab",
    "config": "cd",
    "preprocess": {"mean": [0.5]},
}
JSON = [
    None,
    True,
    -1,
    0,
    1,
    2,
    0.5,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    ["x"],
    {},
    {"x": 1},
]
POSITIVE = [1, 2, 0.5, 10**30]
TEXT = ["", "x"]
NUMBER = [0, 1, 2, 0.5, 10**30]
VALID = {
    "version": [1, 2],
    "parent": [None],
    "created_by": TEXT,
    "change": TEXT,
    "templates": [[], ["x"]],
    "backbone": [None],
    "provenance": [{}, {"x": 1}],
    "parts": [[], {}, ""],
    "table": [None],
    "fitted": [None],
    "built": [{}],
    "digests": [{}],
    "groups": [None],
    "alpha": NUMBER,
    "beta": NUMBER,
    "gamma": NUMBER,
    "logit_scale": POSITIVE,
    "temperature": POSITIVE,
    "k": [None, 1, 2],
    "tail": [True],
    "log_offset": [None, *POSITIVE],
    "least_cache": [None, -1, *NUMBER],
}
"""The values of ``JSON`` that the manifest below may have, by entry."""
PART = {"width": 3, "column": "a", "identity": {}}
NAMED = {"levels": ["class", "genus"], "paths": {}}
WRONG = {
    "parent": [1],
    "n": [N + 1, N - 1],
    "d": [D + 1],
    "next_key_id": [N - 1, 2**63 - 1],  # would repeat a key id
    "created_at": ["yesterday", "2026-01-02T03:04:05", "0001-01-01T00:00:00+23:00", "2026-01-02"],
    "dtype": ["float16", "float64", "int8", "object"],
    "format": ["retrieval-tip"],
    "templates": [[["x"]], [1]],
    "class_names": [
        "abcd",
        [1, 2, 3, 4],
        ["a", "a", "b", "c"],
        CLASSES[:3],
        [*CLASSES, "fly"],
        [None] * 4,
    ],
    "backbone": [{"model": "RN50"}, BACKBONE | {"model": 5}, BACKBONE | {"preprocess": []}],
    "k": ["all"],
    "built": [{name: -1} for name in ("source", "shots", "seed", "views", "auto_index")],
    "parts": [[{}], [PART], [PART | {"width": 1, "identity": None}]],
    "files": [{"keys": None}],
    "groups": [
        {"levels": ["class", "genus"]},
        {"levels": ["class"], "paths": {}},
        NAMED | {"paths": {"cat": None}},
        {"levels": "ab", "paths": {"cat": ["x", "y"]}},
        NAMED | {"paths": {"cat": [5]}},
    ],
}
NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "data/../manifest.json",
    "manifest.json",
    "data/keys-{}/../../x.npy",
    "data/./keys-{}.npy",
    "data//keys-{}.npy",
    "data\\keys-{}.npy",
    "data/keys-{}.npy\n",
    "data/keys-{}.npy\x00",
    "data/keys-{}.npz",
    "data/text-{}.npy",
    "data/index-{}.faiss",
    "data/keys-0123456789abcdef.npy",
]
WRONG_FILE = {"rows": [N + 1], "bytes": [], "sha256": ["0" * 64, "0" * 63, "Z" * 64], "name": NAMES}


def wrong_manifests(body):
    """Yield manifests in which a value is wrong, missing or unknown."""
    files = body["files"]
    keys = body["files"]["keys"]
    entries = {key: value for key, value in body.items() if key != "sha256"}
    for field in entries:
        valid = [*map(repr, VALID.get(field, [])), repr(body[field])]
        yield from (
            body | {field: value}
            for value in [*JSON, *WRONG.get(field, [])]
            if repr(value) not in valid
        )
    for field, values in WRONG_FILE.items():
        for value in [*JSON, *values]:
            wrong = value.format(keys["sha256"][:16]) if isinstance(value, str) else value
            if field != "bytes" or value not in (1, 2) or value is True:
                yield body | {"files": files | {"keys": keys | {field: wrong}}}
    yield from without_one(entries)
    yield from (body | {"files": part} for part in [*without_one(files), files | {"extra": keys}])
    yield from (
        body | {"files": files | {"keys": part}}
        for part in [*without_one(keys), keys | {"extra": 1}]
    )


def without_one(entries):
    return [{k: v for k, v in entries.items() if k != left_out} for left_out in entries]


def test_a_manifest_with_a_wrong_missing_or_unknown_value_is_refused(index):
    for manifest in wrong_manifests(body_of(index)):
        manifest_of(index).write_bytes(sealed(manifest))
        try:
            Index.load(index)
        except StoreError as error:
            one_line(error, index)
        else:
            pytest.fail(f"accepted {manifest}")


def rejected(manifest, *parts):
    """Check that a manifest with a valid checksum is refused, and return the message."""
    return refused(lambda: Manifest.from_bytes(sealed(manifest), "m.json"), "m.json", *parts)


def test_malformed_table_digests_are_refused(index):
    table = Path(__file__).parent / "indexes/v11/lance-vectors/manifests"
    body = {
        key: value
        for key, value in json.loads(max(table.iterdir()).read_text()).items()
        if key != "sha256"
    }
    name = "keys.lance/_versions/1.manifest"
    digest = "0" * 64
    right = {name: digest}
    assert Manifest.from_bytes(sealed(body | {"digests": right}), "m.json").digests == right
    wrong = [[], "x", None, 5, {name: 5}, {name: "x"}, {name: "Z" * 64}]
    wrong += [
        {path: digest} for path in ("x", "../x/y", "/etc/passwd", "a/.b", "a//b", "a/b\n", "")
    ]
    folder = {key: value for key, value in body_of(index).items() if key != "sha256"}
    for manifest in [
        *(body | {"digests": digests} for digests in wrong),
        folder | {"digests": right},
    ]:
        rejected(manifest)


MAKER = "retrieval-tip 9.9"
NEWER = {"format_version": FORMAT_VERSION + 1, "alpha": {"new": "meaning"}}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            NEWER,
            [MAKER, f"index format {FORMAT_VERSION + 1}", f"this program reads {FORMAT_VERSION}"],
        ),
        (NEWER | {"sha256": "of another algorithm"}, [MAKER, f"index format {FORMAT_VERSION + 1}"]),
        ({"metric": "whitened"}, [MAKER, "metric"]),
        (
            {"format_version": 10},
            ["index format 10, which is no longer read; build the index again"],
        ),
    ],
)
def test_another_format_or_an_unknown_entry_is_refused_with_the_required_version(
    index, entries, words
):
    body = body_of(index) | {"created_by": MAKER} | entries
    manifest_of(index).write_bytes(
        json.dumps(body).encode() if "sha256" in entries else sealed(body)
    )
    before = snapshot(index)
    for opened in (Index.load, verify, describe, history, model(1).save):
        refused(partial(opened, index), *words)
    assert snapshot(index) == before
    assert "\x1b" not in rejected(body | {"created_by": "a\n\x1b[31mb"})
    for long in ({"x" * 9999: 1}, {"created_by": ["x" * 9999]}):
        assert len(rejected(body | long)) < 400


def nested(depth):
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b"\x00",
        b"{",
        b"\xff\xfe{}",
        '{"format": "retrieval-tip index"}'.encode("utf-16"),
        b'{"format": "retrieval-tip index", "x": "\xe9"}',
        b'{"format": "retrieval-tip index", "x": "\xed\xa0\x80"}',
        b'{"format": "retrieval-tip index", "x": "\\ud800"}',
        b'{"format": "retrieval-tip index", "x": ' + b"9" * 5000 + b"}",
        *(
            b'{"format": "retrieval-tip index", "x": ' + nested(depth) + b"}"
            for depth in (100, 300, 900, 990, 10**5)
        ),
        nested(10**5),
    ],
    ids=lambda raw: f"{raw[:44]!r}",
)
def test_a_bad_manifest_is_refused(index, raw):
    manifest_of(index).write_bytes(raw)
    for opened in (Index.load, verify, describe):
        refused(partial(opened, index), manifest_of(index))


@pytest.mark.parametrize(
    ("setting", "value"), [("templates", ["\ud800"]), ("provenance", {"x": {1, 2}})], ids=str
)
def test_settings_that_cannot_be_serialised_are_not_written(index, setting, value):
    before = snapshot(index)
    cache = model(1)
    setattr(cache, setting, value)
    refused(lambda: cache.save(index), error=RetrievalTipError)
    assert snapshot(index) == before


LEFTOVERS = [
    *("data/.keys.npy.01234567.tmp", "data/.labels-0123456789abcdef.parquet.01234567.tmp"),
    *("manifests/.000001.json.01234567.tmp", ".x.csv.01234567.tmp"),
    *(f"data/{kind}-0123456789abcdef{suffix}" for kind, suffix in SUFFIXES.items()),
]


def test_the_next_writer_removes_only_leftovers_of_an_interrupted_writer(index):
    foreign = [
        "data/notes.txt",
        ".notes.tmp",
        "data/.notes.tmp",
        "notes.tmp",
        "data/keys.npy",
        ".cache/.gitignore",
    ]
    (index / ".cache").mkdir()  # as ``hf download --local-dir`` does
    for name in [*LEFTOVERS, *foreign]:
        (index / name).write_bytes(b"x")
    model(1).save(index)
    assert not [name for name in LEFTOVERS if (index / name).exists()]
    assert all((index / name).exists() for name in foreign)
    assert verify(index).version == 2


def test_no_file_is_deleted_while_an_earlier_manifest_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval_tip.store.versions.KEPT_VERSIONS", 2)
    folder = tmp_path / "x"
    model(1).save(folder)
    model(2).save(folder)
    (folder / "manifests" / "000001.json").write_bytes(b"{}")
    files = set((folder / "data").iterdir())
    with Versions(folder).write():
        assert set((folder / "data").iterdir()) == files  # the damaged manifest may name them
    model(3).save(folder)  # its commit deletes version 1
    assert verify(folder).version == 3
    kept = [Versions(folder).manifest(), *Versions(folder).earlier(Versions(folder).manifest())]
    assert [manifest.version for manifest in kept] == [3, 2]
    named = {folder / file.name for manifest in kept for file in manifest.files.values()}
    assert set((folder / "data").iterdir()) == named


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_unreadable_manifest_is_not_overwritten_by_a_first_version(index, monkeypatch, code):
    before = snapshot(index)
    real = os.scandir

    def scandir(path):
        if str(path) == str(index / "manifests"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        assert Versions(index).exists()
        refused(lambda: model(2).save(index), index)
    assert snapshot(index) == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, InputError])
def test_an_exception_during_a_write_leaves_the_folder_unchanged(index, tmp_path, kind):
    def interrupted(folder):
        with Versions(folder).write() as writer:
            array = writer.stage_array("keys", (N, D), "float32")
            array[:] = 1
            writer.seal_array("keys", array)
            writer.stage("labels").write_bytes(b"half")
            raise kind

    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for place in (index, tmp_path / "new", tmp_path / "a" / "b" / "c", tmp_path / "empty"):
        with pytest.raises(kind):
            interrupted(place)
        assert snapshot(tmp_path) == before
    assert not (tmp_path / "empty" / "lock").exists()


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00", b"a\nb\x1b[31m" * 1000])
def test_a_lock_with_unprintable_text_gives_a_printable_error(index, text):
    with Versions(index).write():
        (index / "lock").write_bytes(text)
        shown = refused(lambda: model().save(index), "is being written by")
        assert len(shown) < 1500
        assert "\x1b" not in shown


def test_file_permissions_follow_the_umask(tmp_path):
    for mask in (0o022, 0o027):
        previous = os.umask(mask)
        try:
            folder = tmp_path / f"{mask:o}"
            model(1).save(folder)
            model(2).save(folder)
        finally:
            os.umask(previous)
        for path in folder.rglob("*"):
            if path.name != "lock":
                assert (
                    stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask
                ), path


def test_a_place_that_cannot_contain_an_index_is_left_unchanged(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_text("x")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "data").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    for name in ("file", "file/below", "other", "blocked", "dangling", "x" * 300, "\udcff"):
        refused(
            partial(model().save, tmp_path / name),
            name.encode("utf-8", "backslashreplace").decode(),
        )
        assert snapshot(tmp_path) == before


def test_a_folder_without_an_index_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "strange" / "manifests" / "000001.json").mkdir(parents=True)
    for name in ("nowhere", "empty", "file", "strange", "\udcff"):
        for opened in (
            Index.load,
            verify,
            describe,
            lambda folder: Versions(folder).query("SELECT 1"),
        ):
            refused(
                partial(opened, tmp_path / name), name.encode("utf-8", "backslashreplace").decode()
            )
    with pytest.raises(
        StoreError, match=r"no such folder; .*retrieval-tip index build SOURCE --out INDEX"
    ):
        Index.load(tmp_path / "nowhere")


def test_an_array_allocated_without_fallocate_is_identical(tmp_path, monkeypatch):
    """Some systems have no ``posix_fallocate``."""
    model().save(tmp_path / "a")
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(
        "retrieval_tip.store.versions._ZEROS", bytes(100)
    )  # several blocks and a partial one
    model().save(tmp_path / "b")
    assert (
        Versions(tmp_path / "a").manifest().files["keys"]
        == Versions(tmp_path / "b").manifest().files["keys"]
    )
    verify(tmp_path / "b")


def test_saving_again_repairs_damaged_files(index):
    name = Versions(index).manifest().files["text"].name
    (index / name).write_bytes(b"x")
    with pytest.raises(StoreError, match="build the index again"):
        Index.load(index)
    model().save(index)
    assert verify(index).version == 2


def relabelled(index, change):
    """Replace the label store of an index, with valid digests."""
    name = body_of(index)["files"]["labels"]["name"]
    buffer = io.BytesIO()
    pq.write_table(change(pq.ParquetFile(index / name).read()), buffer)
    resealed(index, "labels", buffer.getvalue())


def with_column(name, values, kind=None):
    return lambda t: t.set_column(
        t.column_names.index(name), name, pa.array(values, kind or t.schema.field(name).type)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.slice(1),
        lambda table: table.drop_columns(["source"]),
        lambda table: table.select(table.column_names[::-1]),
        with_column("class_id", [0] * (N - 1) + [4]),
        with_column("class_id", [-1] + [0] * (N - 1)),
        with_column("class_id", [1, 0] + [2] * (N - 2)),
        with_column("class_id", [None] + [0] * (N - 1)),
        with_column("class_id", [0.5] * N, pa.float64()),
        with_column("class_id", ["0"] * N, pa.string()),
        with_column("key_id", [None] * N),
        with_column("key_id", ["x"] * N, pa.string()),
        with_column("label", [None] * N),
        with_column("label", [1] * N, pa.int64()),
    ],
    ids=range(13),
)
def test_a_label_store_that_does_not_match_the_keys_is_refused(index, change):
    relabelled(index, change)
    for opened in (Index.load, verify, describe):
        refused(partial(opened, index), index / "data" / "labels-")


@pytest.mark.parametrize(
    "name",
    [
        "it's",
        "a b",
        'q"q',
        "a[1]",
        "[ab]",
        "a*",
        "**",
        "wh?",
        "x=1",
        "ünï",
        "{a,b}",
        "a;b",
        "file:x",
    ],
)
def test_query_and_load_work_with_any_folder_name(tmp_path, monkeypatch, name):
    # Another index, which the name would match as a pattern.
    model(9).save(tmp_path / "a1")
    cache = model(1, N + 4)
    cache.save(tmp_path / name / "sub=2")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / name / "sub=2", Path(name) / "sub=2"):
        table = Versions(folder).query("SELECT * FROM labels")
        assert table.column_names == LABEL_SCHEMA.names
        assert len(table) == N + 4
        assert verify(folder).labels.column_names == LABEL_SCHEMA.names
        assert answer(Index.load(folder)) == answer(cache)


@pytest.mark.parametrize("at_a_time", [1, 7, 1 << 24])
def test_a_file_digest_covers_every_block(index, tmp_path, at_a_time, monkeypatch):
    monkeypatch.setattr("retrieval_tip.files.HASHED_AT_A_TIME", at_a_time)
    for content in (b"", b"x", bytes(range(256)) * 3):
        (tmp_path / "file").write_bytes(content)
        assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    checking(index).wait()


def test_a_background_check_reports_the_first_bad_file(index):
    manifest = Versions(index).manifest()
    for kind in ("labels", "keys"):
        path = index / manifest.files[kind].name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    check = checking(index)
    assert check.manifest == manifest
    for _ in range(2):
        refused(check.wait, index / manifest.files["keys"].name)


def test_a_background_check_fixes_the_version_that_is_opened(index):
    """A version that is committed during the check is not opened."""
    check = checking(index)
    model(7).save(index)
    opened = Index.load(index, check=check)
    assert opened.version == check.manifest.version
    assert Index.load(index).version == check.manifest.version + 1
    with pytest.raises(StoreError, match="no such folder"):
        checking(index / "none")


def test_file_names_are_extracted_only_from_an_intact_manifest(index):
    raw = manifest_of(index).read_bytes()
    assert named_in(raw) == {file.name for file in Versions(index).manifest().data_files}
    for at in range(len(raw)):
        assert named_in(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]) is None
        assert named_in(raw[:at]) is None


class Evil:
    """An object that creates a folder when its pickle is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda file, evil: file.write(pickle.dumps(evil)),
        lambda file, evil: np.save(file, np.array([evil], dtype=object), allow_pickle=True),
        lambda file, evil: np.savez(file, np.array([evil], dtype=object)),
        lambda file, evil: torch.save(evil, file),
    ],
    ids=["pickle", "npy", "npz", "torch"],
)
@pytest.mark.parametrize("kind", ["keys", "text", "labels", "index"])
def test_a_pickle_is_never_loaded(index, tmp_path, kind, wrap):
    file = io.BytesIO()
    wrap(file, Evil(tmp_path / "mark"))
    model(index="HNSW8").save(index)
    path = resealed(index, kind, file.getvalue())
    refused(lambda: Index.load(index), path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["manifests", "data", "lock"])
def test_nothing_is_written_through_links_out_of_the_folder(index, tmp_path, name):
    outside = tmp_path / "outside"
    (index / name).rename(outside) if (index / name).exists() else outside.touch()
    (index / name).symlink_to(outside)
    before = snapshot(tmp_path)
    refused(lambda: model(3).save(index), index, "leads out")
    assert snapshot(tmp_path) == before
