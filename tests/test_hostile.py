"""Property-based tests of hostile images, tables, index folders, manifests, commands and requests.

The program answers, or fails with a one-line error: no traceback, no half-written file, bounded memory and time.
``make test`` tries the same few examples in each run, ``make attack`` many different ones.
"""

import functools
import io
import json
import math
import os
import resource
import shlex
import shutil
import socket
import struct
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import click
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ATTACK, SOAK, ok
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from PIL import Image
from sealing import altered, body_of, manifest_of, sealed, snapshot
from serving import listens, server
from tables import png, unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip.cli import main
from retrieval_tip.data import images
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_items, open_source
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.index import changes
from retrieval_tip.index.build import build_index
from retrieval_tip.store.versions import Versions
from retrieval_tip.wording import MAX_LINE

D = 8
CLASSES = ["cat", "dog", "owl"]
pytestmark = pytest.mark.timeout(1800 if ATTACK else 300)
SECONDS = 60
MEMORY = 1 << 30
"""Maximum seconds of one example on a busy machine, and maximum additional memory of a test."""


def tried(number):
    """Return settings that try ``number`` examples in an attack, a few in a soak, fewer otherwise."""
    few = max(8, number // (60 if SOAK else 120))  # the same in each run
    return settings(
        max_examples=number if ATTACK else few,
        derandomize=not ATTACK,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY


@contextmanager
def in_time():
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < SECONDS


def check_line(text):
    assert text.isprintable(), ascii(text)


def refused(call):
    """Return the result of a call, or ``None`` if it fails with a one-line error of ours."""
    with in_time():
        try:
            return call()
        except RetrievalTipError as error:
            check_line(str(error))
            return None


@st.composite
def mutated(draw, raws):
    """Draw bytes with a bit flipped, a run overwritten or cut out, an end missing, or a part repeated."""
    raw = draw(raws)
    at = draw(st.integers(0, len(raw) - 1))
    size = draw(st.integers(1, 64))
    if draw(st.booleans()):  # near the header
        at = min(at, 100)
    how = draw(st.sampled_from(["flip", "zeros", "ones", "noise", "cut", "head", "tail", "twice"]))
    if how == "flip":
        return raw[:at] + bytes([raw[at] ^ 1 << size % 8]) + raw[at + 1 :]
    filling = {
        "zeros": bytes(size),
        "ones": b"\xff" * size,
        "noise": draw(st.binary(max_size=64)),
        "cut": b"",
    }
    if how in filling:
        return raw[:at] + filling[how] + raw[at + size :]
    return {"head": raw[:at], "tail": raw[at:], "twice": raw[:at] + raw + raw[at:]}[how]


def picture(style, mode="RGB", side=48, **options):
    buffer = io.BytesIO()
    image = (
        Image.effect_noise((side, side - 7), 80) if side < 100 else Image.new("L", (side, side - 7))
    )  # few bytes
    image.convert(mode).save(buffer, style, **options)
    return buffer.getvalue()


PICTURES = [
    picture("PNG"),
    picture("PNG", "P"),
    picture("PNG", "I;16"),
    picture("JPEG"),
    picture("JPEG", progressive=True),
    picture("JPEG", "CMYK"),
    picture("WEBP"),
    picture("GIF"),
    picture("BMP"),
    picture("TIFF"),
    picture("TIFF", compression="tiff_deflate"),
    picture("TIFF", "F"),
    picture("PPM"),
    picture("MPO"),
]


@functools.cache
def bombs():
    """Return small files that claim or need much memory, and files that are not photos. They take a second to make."""
    return [
        png(30_000, 30_000, b""),
        png(2**31 - 1, 1, b""),
        png(9000, 9000, zlib.compress(bytes(9000 * 9001), 1), colour=0),
        picture("GIF", "L", 9000),
        picture("TIFF", "1", 9000, compression="group4"),
        b"P6\n60000 60000\n255\n" + bytes(99),
        b"",
        b"\xff",
        b"BM"
        + struct.pack(
            "<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0
        ),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        picture("EPS"),
        b"PK\3\4" + bytes(60),
    ]


DAMAGED = mutated(st.sampled_from(PICTURES))
A_PICTURE = st.one_of(
    DAMAGED, DAMAGED, DAMAGED, st.deferred(lambda: st.sampled_from(bombs())), st.binary(max_size=99)
)


@tried(2000)
@given(A_PICTURE, st.none() | st.integers(1, 64))
def test_any_bytes_are_decoded_or_refused(raw, least):
    found = refused(lambda: images.decode(raw, least))
    if found is not None:
        assert found.mode == "RGB"
        assert found.width * found.height <= images.MAX_PIXELS


NUMBER = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, 1e19, 1e300, -1e300, math.nan, math.inf, None])
)
TEXT = st.one_of(
    st.text(max_size=9),
    st.sampled_from(["cat", "", " ", "\x1b[31m", "\u202e", "é", "x" * 5000, None]),
)
ODD = [
    pa.array(values)
    for values in ([0.5] * 6, [b"\xff"] * 6, [["a"]] * 6, [True] * 6, [{"x": 1.0}] * 6)
]
ODD += [pa.nulls(6), pa.array(["a"] * 6).dictionary_encode(), pa.array([0] * 6, pa.timestamp("s"))]
ODD += [
    pa.Array.from_buffers(
        pa.string(),
        6,
        [None, pa.py_buffer(np.arange(7, dtype=np.int32)), pa.py_buffer(b"\xff" * 6)],
    )
]
NAME = st.sampled_from(["id", "label", "feature", "path", "Feature", "", "x\n", "vector"])


@st.composite
def feature_tables(draw):
    """Draw tables of six rows with mostly valid columns; some names, types or values are wrong."""
    width = draw(st.integers(1, 9))
    kind = draw(st.sampled_from([pa.float16(), pa.float32(), pa.float64()]))
    rows = [[*row] for row in unit_rows(6, width, draw(st.integers(0, 9))).tolist()]
    for _ in range(draw(st.integers(0, 2))):
        row = draw(st.integers(0, 5))
        rows[row] = [*rows[row][:-1], draw(NUMBER)]
        rows[row] = draw(st.sampled_from([rows[row], rows[row][:-1], [*rows[row], 0.0], None, []]))
        rows = [row if row is not None else [] for row in rows]
    features = pa.array(
        [[None if v is None else np.float64(v) for v in row] for row in rows],
        pa.list_(pa.float64()),
    )
    columns = [
        draw(
            st.lists(TEXT, min_size=6, max_size=6).map(pa.array)
            | st.just(pa.array([f"i{i}" for i in range(6)]))
        ),
        draw(st.just(pa.array(CLASSES * 2)) | st.lists(TEXT, min_size=6, max_size=6).map(pa.array)),
        features.cast(pa.list_(kind), safe=False),
    ]
    names = ["id", "label", "feature"]
    for at in range(3):
        if draw(st.integers(0, 9)) == 0:
            columns[at] = draw(st.sampled_from(ODD))
        if draw(st.integers(0, 9)) == 0:
            names[at] = draw(NAME)
    return pa.Table.from_arrays(columns, names=names)


@tried(3000)
@given(feature_tables(), st.sampled_from(["check", "unit", "keep"]), st.data())
def test_any_feature_table_is_refused_or_read_exactly(tmp_path_factory, table, norms, data):
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    pq.write_table(table, path)
    if (
        damaged := data.draw(st.integers(0, 3)) == 0
    ):  # a flip may pass for data: Parquet has few checksums
        path.write_bytes(data.draw(mutated(st.just(path.read_bytes()))))
    source = refused(lambda: open_source(path))
    assert source is None or all(label.strip() for label in source.labels)
    found = source and source.table and refused(lambda: Reader(norms=norms).encode(source).features)
    if found is not None and not damaged and "feature" in table.column_names:
        expected = np.array(table["feature"].to_pylist(), np.float32)
        assert np.isfinite(expected).all()
        lengths = np.linalg.norm(expected.astype(np.float64), axis=1, keepdims=True)
        if norms == "check":
            assert_allclose(lengths, 1, atol=1e-2)
        assert_allclose(found, expected / lengths if norms == "unit" else expected, rtol=1e-3)


@tried(2000)
@given(
    st.lists(
        st.lists(TEXT.map(lambda text: text or ""), min_size=2, max_size=3), min_size=1, max_size=5
    ),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"]),
    st.sampled_from(
        ["path,label", "input,label", "label,path", "path", "path,path", "a,b", "id,text,label", ""]
    ),
    st.sampled_from([".csv", ".tsv", ".json", ".parquet", ".npy", ".tar", ".toml"]),
    st.data(),
)
def test_any_text_table_is_refused_or_read(
    tmp_path_factory, rows, separator, encoding, head, suffix, data
):
    lines = [head.split(","), *rows]
    if suffix == ".json":
        text = json.dumps({"train": rows, "test": [[row[0], 0, row[-1]] for row in rows]})
    else:
        text = "\r\n".join(
            separator.join(f'"{cell}"' if separator in cell else cell for cell in row)
            for row in lines
        )
    raw = text.encode(encoding, "replace")
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data.draw(mutated(st.just(raw))) if raw and data.draw(st.booleans()) else raw)
    for read in (open_source, open_items):
        found = refused(lambda read=read: read(path))
        if found is not None and read is open_source:
            assert all(label.strip() for label in found.labels)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working folder: an index of three versions with an added segment, and tables. Nothing may change here."""
    place = tmp_path_factory.mktemp("hostile")
    write_table(place / "train.parquet", unit_rows(18, D), CLASSES * 6)
    write_table(place / "queries.parquet", unit_rows(6, D, 1), CLASSES * 2)
    write_table(place / "text.parquet", unit_rows(3, D, 2), CLASSES)
    (place / "list.csv").write_text("path,label\na.png,cat\n")
    build_index(
        open_source(place / "train.parquet"),
        place / "index",
        Reader(),
        text=place / "text.parquet",
    )
    changes.configure(place / "index", alpha=2.0)
    changes.add(place / "index", open_source(place / "queries.parquet"), Reader())
    return place


@contextmanager
def copied(world, name="copy"):
    copy = world.parent / name
    shutil.copytree(world, copy, symlinks=True)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


SPECIAL = {
    "missing": lambda _: None,
    "empty": lambda path: path.write_bytes(b""),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "full": lambda path: path.symlink_to("/dev/full"),
    "kmsg": lambda path: path.symlink_to("/proc/kmsg"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "up": lambda path: path.symlink_to(".."),
    "sparse": lambda path: (path.touch(), os.truncate(path, 3 << 30)),
}


@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_no_file_is_refused_in_place_of_any_file(world, special):
    """``test_stores.py`` damages the bytes of every file. No change may build on damage."""
    with copied(world / "index") as index:
        paths = [index / file.name for file in Versions(index).manifest().data_files]
        for path in (
            paths if special == "missing" else [manifest_of(index), *paths]
        ):  # without it, version 2 is current
            whole = path.read_bytes()
            path.unlink()
            SPECIAL[special](path)
            for call in (
                lambda: Index.load(index),
                lambda: changes.configure(index, alpha=3.0),
            ):
                assert refused(call) is None, path.name
            shutil.rmtree(path) if special == "folder" else path.unlink(missing_ok=True)
            path.write_bytes(whole)
        assert Index.load(index).version == 3


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(
        ["../../x", "/etc/passwd", "data/keys-0000000000000000.npy", 2**63, 10**400, "x" * 10_000]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@tried(3000)
@given(st.data())
def test_any_manifest_is_refused_or_answers(world, data):
    """The manifest has a valid checksum, as an attacker could give it."""
    with copied(world / "index") as index:
        body = {key: value for key, value in body_of(index).items() if key != "sha256"}
        body = altered(data.draw, body, VALUES)
        manifest_of(index).write_bytes(sealed(body))
        cache = refused(lambda: Index.load(index))
        if cache is not None:
            refused(lambda: cache.classify(unit_rows(2, D)))
        refused(lambda: Versions(index).describe())
        refused(lambda: Versions(index).history())


GOOD = """
classify index queries.parquet | fit index --calibrate --val queries.parquet
encode train.parquet --out new.parquet | evaluate index queries.parquet | fit index | index add index queries.parquet
index audit index | index build train.parquet --out new --text text.parquet | index clone index new | models rn50
index export index --out new.parquet | index gc index | index history index | index info index
index query index SELECT(1) | index set index --index Flat | index relabel index cat --key-ids 1 | index list . | cache
index remove index --key-ids 1 | index rename index cat dog | index rollback index | index set index --alpha 1
index verify index | search-hp index --val queries.parquet | index merge index index
"""
LINES = [shlex.split(line) for line in GOOD.replace("\n", "|").split("|") if line.strip()]
WORDS = [
    "",
    " ",
    "-1",
    "0",
    "3",
    "0.5",
    "1e300",
    "1e400",
    "nan",
    "-inf",
    "2147483648",
    str(2**63),
    "9" * 5000,
    "0x10",
    "1,2",
    "all",
    "auto",
    "x",
    "\n",
    "\x1b[31m",
    "\u202e",
    "\udcff",
    "猫",
    "x" * 300,
    "x" * 100_000,
    "%s{}{0}",
    "~",
    "../../x",
    "-",
    "--",
    "*",
    "[",
    "**/*",
    "$(id)",
    "'; DROP TABLE labels",
    "lance://",
    "file:///etc/passwd",
    "con",
    "local-dir:/dev",
    "cuda:99",
    "IVF0,Flat",
    "HNSW2147483648",
    "PQ8x64",
    "IVF4(",
    "Classes",
    "true) --",
    "index",
    "key_id < 2",
    "train.parquet",
]
SLOW = {"epochs", "seeds", "folds", "shots", "ray", "help", "workers"}
"""Options that take long, start other programs, or draw. ``test_cli.py`` tests their bounds."""


def command_of(line):
    command = main
    words = list(line)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    return command, words


@tried(1500)
@given(st.data())
def test_any_command_answers_or_fails_in_one_line(run, world, monkeypatch, data):
    line = data.draw(st.sampled_from(LINES))
    command, needs = command_of(line)
    names = line[: len(line) - len(needs)]
    options = [
        one for one in command.params if isinstance(one, click.Option) and one.name not in SLOW
    ]
    special = data.draw(st.sampled_from(sorted(SPECIAL))) + data.draw(
        st.sampled_from(["", ".parquet", ".csv"])
    )
    value = st.sampled_from(WORDS) | st.just(special)
    arguments = [word if data.draw(st.integers(0, 3)) else data.draw(value) for word in needs]
    for option in data.draw(st.lists(st.sampled_from(options), max_size=2)) if options else ():
        if option.name == "output" and special.startswith("pipe"):
            continue  # the command would wait for a reader
        flag = option.is_flag or option.count
        arguments += [
            data.draw(st.sampled_from(option.opts)),
            *([] if flag else [data.draw(value)] * option.nargs),
        ]
    with copied(world) as folder, in_time():
        monkeypatch.chdir(folder)
        SPECIAL[special.partition(".")[0]](folder / special)
        before = snapshot(folder / "index")
        result = run(*names, *arguments, stdin="")
        lines = [
            text
            for text in result.stderr.splitlines()
            if not text.startswith(("warning: ", "Usage: ", "Try "))
        ]
        assert result.exit_code in (0, 1, 2, 3), result.stderr
        assert all(len(text) <= MAX_LINE + len("warning: ") for text in result.stderr.splitlines())
        if result.exit_code in (1, 2):
            assert lines[-1].startswith("Error: ")
            check_line(lines[-1])
            assert snapshot(folder / "index") == before
        assert not [path for path in folder.rglob("*.tmp") if path.name not in ("x.tmp",)]
        for place in (folder / "index", folder / "new"):
            if (place / "manifests").is_dir():
                ok("--quiet index verify", place)
        monkeypatch.chdir(world)


HOSTS = [
    "",
    "evil.example",
    "127.0.0.1:99999",
    "[::1",
    "a@127.0.0.1",
    "127.0.0.1\r\nHost: localhost",
    "h" * 20_000,
]
HEADERS = [
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Content-Length: 1e3",
    "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Connection: upgrade\r\nUpgrade: h2c",
    "X: " + "y" * 60_000,
    "Range: bytes=0-,-1",
    "Content-Encoding: gzip",
    "Content-Type: text/plain",
    "bad header",
    "A\0B: x",
    "Origin: http://x",
]
TARGETS = [
    "/",
    "/page/../app.py",
    "/page/%2e%2e/app.py",
    "/page//etc/passwd",
    "/page/%00",
    "/%ff%fe",
    "/v1/indexes/%2e%2e",
    "/v1/classify",
    "/v1/indexes/things/keys",
    "/openapi.json",
    "/" + "a" * 60_000,
    "/?" + "a=b&" * 10_000,
    "*",
]
BODIES = [
    b"",
    b"{",
    b"null",
    b"[" * 100_000,
    b'{"features": []}',
    b'{"features": [[NaN]]}',
    b'{"features": [[1e400]]}',
    b'{"features": ' + b"[" * 900 + b"]" * 900 + b"}",
    b" " * 2_000_000,
    b'{"features": [[' + b"1," * 400_000 + b"1]]}",
]


@pytest.fixture(scope="module")
def served(things, tmp_path_factory, warm_path):
    """The real server with an index of photos that it may change; its memory stays bounded."""
    place = tmp_path_factory.mktemp("served") / "things"
    shutil.copytree(things, place)
    with server(place, token="sesame", path=warm_path) as (address, _):
        httpx.post(f"{address}/v1/classify", files={"images": PICTURES[0]}, timeout=60)
        process = listens(address)
        idle = process.memory_info().rss
        yield address
        assert process.memory_info().rss - idle < MEMORY
    Index.load(place)


@tried(1500)
@given(st.data())
def test_any_request_gets_no_server_error(served, data):
    host, port = served.removeprefix("http://").split(":")
    method = data.draw(st.sampled_from(["GET", "POST", "DELETE", "PRI", "get"]))
    target = data.draw(st.sampled_from(TARGETS))
    headers = [f"Host: {data.draw(st.just(host) | st.sampled_from(HOSTS))}"]
    headers += data.draw(st.lists(st.sampled_from(HEADERS)))
    body = data.draw(st.sampled_from(BODIES))
    if not any(header.startswith(("Content-Length", "Transfer")) for header in headers):
        headers.append(f"Content-Length: {len(body)}")
    raw = "\r\n".join([f"{method} {target} HTTP/1.1", *headers, "", ""]).encode() + body
    with in_time(), socket.create_connection((host, int(port)), timeout=SECONDS) as link:
        try:
            link.sendall(
                data.draw(st.just(raw) | st.just(raw[: len(raw) // 2]) | mutated(st.just(raw)))
            )
            link.shutdown(socket.SHUT_WR)
            answered = link.recv(12)
        except OSError:  # the server may close the connection early
            answered = b""
    assert answered[9:10] != b"5" or answered[9:12] in (b"501", b"503", b"505", b"507"), (
        raw[:200],
        answered,
    )
    assert httpx.get(f"{served}/healthz", timeout=SECONDS).status_code == 200


@tried(600)
@given(
    st.lists(A_PICTURE, min_size=1, max_size=3),
    st.sampled_from(["a.png", "../../a", "", "\x1b", "x" * 5000]),
    st.sampled_from(["evil.example", None]),
    st.booleans(),
)
def test_a_hostile_upload_is_refused_or_answered(served, pictures, name, host, add):
    headers = {"Authorization": "Bearer sesame"} | ({"Host": host} if host else {})
    files = [("images", (name, raw)) for raw in pictures]
    where = f"{served}/v1/indexes/things/keys" if add else f"{served}/v1/classify"
    with in_time():
        answered = httpx.post(
            where,
            files=files,
            data={"label": "dog"} if add else {},
            headers=headers,
            timeout=SECONDS,
        )
    assert answered.status_code < 500, answered.text
    assert answered.headers["content-type"] in ("application/json", "application/problem+json")
    assert host is None or answered.status_code >= 400
    if answered.status_code >= 400:
        check_line(answered.json().get("detail", answered.text))
