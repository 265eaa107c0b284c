"""Objects at an address, on a disk and in a bucket, and errors when it cannot be reached."""

import hashlib
import http.server
import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import buckets
import pytest
from conftest import tries, uninstall
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import answering
from stored import made

from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.plugins.lance import bucket as bucket_files
from retrieval_tip.plugins.lance.bucket import BucketFiles, storage_options
from retrieval_tip.store.address import Address, parse
from retrieval_tip.store.files import LocalFiles
from retrieval_tip.store.manifest import DataFile

pytestmark = pytest.mark.timeout(60)

CLOSED = "http://127.0.0.1:9"
"""Address without a server: port 9 (discard)."""


parsed = Address.parse


@pytest.fixture(params=["lance", "s3"])
def place(request, bucket, tmp_path):
    """The address of an empty store, on a disk and in a bucket."""
    return made(tmp_path, request.param)


def at(text, **patience):
    address = parsed(text)
    if address.local is None:
        with mock.patch.dict(vars(bucket_files), patience):
            return BucketFiles(address)
    address.local.mkdir(parents=True, exist_ok=True)
    return LocalFiles(address.local, text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("lance://indexes/x", "lance://indexes/x"),
        ("lance:///abs/x/", "lance:///abs/x"),
        ("lance:////abs//./x//", "lance:///abs/x"),
        ("lance://../x y ü%41#", "lance://../x y ü%41#"),
        ("lance://a@b", "lance://a@b"),
        ("LANCE://x", "lance://x"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("s3://bucket//a//b/", "s3://bucket/a/b"),
        ("S3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("gs://my_bucket.de/a/ü b", "gs://my_bucket.de/a/ü b"),
    ],
)
def test_equal_addresses_have_one_canonical_form(text, canonical):
    address = parsed(text)
    assert str(address) == canonical
    assert parsed(canonical) == address
    assert len({parsed(canonical), address}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://", "no bucket"),
        ("s3://bucket", "no path"),
        ("lance://", "no path"),
        ("lance://a/..", "no path"),
        ("s3://b/x", "no bucket"),
        ("s3://bücket/x", "no bucket"),
        ("s3://bucket/a/../b", "'..'"),
        ("s3://bucket/a%41", "'%'"),
        ("s3://bucket/a\\b", "\\"),
        ("s3://bucket/x\n", "control characters"),
        ("lance://x\udcff", "UTF-8"),
        ("s3://host:9000/bucket", "AWS_ENDPOINT_URL"),
        ("s3://user:hunter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://user:hun/ter2@bucket/x", "remove the user"),
        ("gs://hunter2@bucket/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("lance://user:hunter2@host/x", "remove the user"),
        ("s3://bucket/x?secret=hunter2", "remove the query"),
    ],
)
def test_a_bad_address_is_refused_in_one_line_without_secrets(text, expected):
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    message = str(caught.value)
    assert expected in message
    assert message.isprintable()
    assert "hunter2" not in message
    assert "ter2" not in message


@tries(200)
@given(st.sampled_from(["s3://", "gs://", "lance://", ""]), st.text() | st.text(":@/?.ab%\n"))
@example("s3://", "a:b@c/d")
@example("lance://", "a:b/c@d")
def test_any_text_is_an_address_a_folder_or_refused(scheme, text):
    try:
        address = parse(scheme + text)
    except UsageError as error:
        refused = str(error)
        assert refused.isprintable()
        return
    if address is not None:
        assert parse(str(address)) == address
        assert "?" not in str(address)
        str(address).encode()
    else:
        assert not scheme


def test_a_local_address_for_lancedb_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(parsed("lance://a:b/x").uri) == Path("a:b/x").absolute()
    assert Path(parsed("lance://a/../x").uri) == tmp_path / "x"


def test_written_objects_are_read_back(place):
    store = at(place)
    assert store.sizes("a") == {}
    store.put("a/x", b"one")
    store.put("a/x", b"t", memoryview(b"wo"))
    store.put("a/y", b"")
    store.put("b/z", bytes(range(256)) * 8192)  # larger than one part of a multipart upload
    assert store.get("a/x", 3) == b"two"
    assert store.get("a/y", 0) == b""
    assert store.get("b/z", 1 << 21) == bytes(range(256)) * 8192
    assert [store.sizes(folder) for folder in ("a", "b", "c")] == [
        {"a/x": 3, "a/y": 0},
        {"b/z": 1 << 21},
        {},
    ]
    with pytest.raises(StoreError, match="b/z"):
        store.get("b/z", (1 << 21) - 1)


def test_a_missing_or_damaged_object_is_reported(place):
    store = at(place)
    file = DataFile("a/x", 1, 1, hashlib.sha256(b"1").hexdigest())
    with pytest.raises(FileNotFoundError):
        store.get("a/x", 1)
    assert "a/x: missing" in str(store.problem(file))
    assert store.problem(replace(file, bytes=0)) is None  # may be missing
    store.put("a/x", b"1")
    assert store.problem(file) is None
    store.put("a/x", b"2")
    assert "a/x: damaged" in str(store.problem(file))


def test_only_the_first_create_succeeds(place):
    store = at(place)
    assert store.create("v/1", b"first")
    assert not store.create("v/1", b"second")
    assert store.get("v/1", 9) == b"first"
    store.delete(["v/gone", "v/1", "b/gone"])  # missing objects are no error
    store.delete(["v/1"])
    store.delete([])
    assert store.create("v/1", b"second")
    assert store.sizes("v") == {"v/1": 6}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="SKIPPED: needs named pipes")
def test_a_pipe_is_not_an_object(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe: is not a file"):
        at(f"lance://{tmp_path}").get("pipe", 10)


def test_disk_errors_leave_no_temporary_files(tmp_path):
    store = at(f"lance://{tmp_path}")
    (tmp_path / "a" / "x").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        store.put("a/x", b"")
    assert not store.create("a/x", b"")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


def test_without_obstore_the_error_explains_how_to_install_it(monkeypatch):
    uninstall("obstore", monkeypatch)
    for text in ("s3://bucket/x", "gs://bucket/x"):
        with pytest.raises(UsageError) as caught:
            at(text)
        assert str(caught.value).startswith(f"{text}: ")
        assert "'obstore>=" in str(caught.value)


def check_error(ask, *expected, within=20.0):
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        ask()
    assert time.monotonic() - began < within
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    for text in expected:
        assert text in message
    for text in (buckets.SECRET, buckets.KEY, "Debug source", "<"):
        assert text not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def check_errors(store, *expected, within=20.0):
    """Check that each operation on an object fails with these words and the address of the object."""
    for ask in (
        lambda: store.get("a/x", 10),
        lambda: store.put("a/x", b""),
        lambda: store.create("a/x", b""),
        lambda: store.delete(["a/x"]),
        lambda: store.sizes("a"),
    ):
        check_error(ask, f"{store.address}/a", *expected, within=within)


def test_a_missing_bucket_is_reported(bucket):
    check_errors(at("s3://no-such-bucket/indexes/x"), "no such bucket")


def test_an_unreachable_server_is_reported(monkeypatch):
    buckets.use(monkeypatch, CLOSED)
    check_errors(
        at("s3://bucket/x", RETRIES=1),
        "cannot connect to 127.0.0.1:9",
        "AWS_ENDPOINT_URL",
        within=5,
    )


def test_a_server_that_does_not_answer_is_reported(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        buckets.use(monkeypatch, f"http://127.0.0.1:{port}")
        store = at("s3://bucket/x", ANSWER=0.4, RETRY=1)
        for ask in (lambda: store.create("a", b""), lambda: store.get("a", 10)):
            check_error(ask, f"no answer from 127.0.0.1:{port}", within=4)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "InvalidAccessKeyId", "access denied (InvalidAccessKeyId)"),
        (403, "", "access denied (status 403)"),
        (401, "", "access denied (status 401)"),
        (301, "PermanentRedirect", "AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", "AWS_REGION"),
        (503, "SlowDown", "the service answered SlowDown"),
        (501, "NotImplemented", "the service answered NotImplemented"),
        (404, "NoSuchBucket", "no such bucket"),
    ],
)
def test_refusals_of_the_service_are_reported(status, code, expected, monkeypatch):
    echo = f"{buckets.KEY} {buckets.SECRET}"
    body = f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><AWSAccessKeyId>{echo}</AWSAccessKeyId></Error>".encode()
    with running_server(lambda *_: (status, body if code else b"\x1b[2J")) as server:
        buckets.use(monkeypatch, server)
        check_errors(at("s3://bucket/x", RETRIES=1), expected, within=5)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"AWS_ALLOW_HTTP": ""}, "AWS_ALLOW_HTTP=true"),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "AWS_ENDPOINT_URL is not a server address"),
        ({"AWS_ENDPOINT_URL": "http://[x"}, "AWS_ENDPOINT_URL is not a server address"),
        (
            {"AWS_ENDPOINT_URL_S3": f"http://u:{buckets.SECRET}@h"},
            "AWS_ENDPOINT_URL_S3 is not a server address",
        ),
        ({"AWS_ACCESS_KEY_ID": None}, "no credentials"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "no credentials"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
    ],
)
def test_a_bad_environment_is_reported(environment, expected, monkeypatch):
    buckets.use(monkeypatch, CLOSED)
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    address = parsed("s3://bucket/x")
    if None in environment.values():
        check_error(lambda: at("s3://bucket/x").get("a", 10), "s3://bucket/x", expected)
    else:
        check_error(lambda: BucketFiles(address), "s3://bucket/x: ", expected)
        check_error(lambda: storage_options(address), "s3://bucket/x: ", expected)


@pytest.mark.parametrize(
    ("variable", "region"),
    [("AWS_ENDPOINT_URL_S3", True), ("AWS_ENDPOINT_URL", False), ("AWS_ENDPOINT", True)],
)
def test_obstore_and_lancedb_use_the_same_server(variable, region, bucket, monkeypatch, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    pa = pytest.importorskip("pyarrow")
    order = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for later in order[order.index(variable) :]:  # variables of lower priority name another server
        monkeypatch.setenv(later, CLOSED)
    monkeypatch.setenv(variable, buckets.endpoint())
    if not region:
        monkeypatch.delenv("AWS_REGION")
    address = parsed(made(tmp_path, "s3"))
    options = storage_options(address)
    assert options["aws_endpoint"] == buckets.endpoint()
    assert not {buckets.KEY, buckets.SECRET} & set(options.values())
    database = lancedb.connect(address.uri, storage_options=options)
    database.create_table("t", pa.table({"a": [1, 2, 3]}))
    store = BucketFiles(address)
    assert store.sizes("t.lance/_versions")
    assert database.open_table("t").count_rows() == 3


def running_server(answer):
    """Return the context of a server whose answers ``answer(method, path with query, headers, body)`` returns."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, data = answer(self.command, self.path, headers, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"1"')
            self.send_header("x-goog-generation", "1")
            self.send_header("Last-Modified", "Wed, 25 Nov 2026 18:00:00 GMT")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, *_):
            pass

    return answering(Handler)


def test_objects_behave_in_the_same_way_on_gcs(tmp_path, monkeypatch):
    kept = {}

    def answer(method, path, headers, body):
        parts = urlsplit(path)
        name = unquote(parts.path)
        if name.strip("/") == "bucket":
            prefix = parse_qs(parts.query).get("prefix", [""])[0]
            found = [key for key in kept if key.removeprefix("/bucket/").startswith(prefix)]
            entry = "<Contents><Key>{}</Key><Size>1</Size><LastModified>2026-11-25T18:00:00Z</LastModified></Contents>"
            entries = "".join(entry.format(key.removeprefix("/bucket/")) for key in found)
            return 200, f"<ListBucketResult>{entries}</ListBucketResult>".encode()
        if method == "PUT":
            if name in kept and headers.get("x-goog-if-generation-match") == "0":
                return 412, b""
            kept[name] = body
            return 200, b""
        if name not in kept:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>"
        if method == "DELETE":
            del kept[name]
            return 204, b""
        return 200, kept[name]

    with running_server(answer) as server:
        buckets.use(monkeypatch, CLOSED)
        account = tmp_path / "account.json"
        entries = {
            "gcs_base_url": server,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
        }
        account.write_text(json.dumps(entries | {"private_key_id": ""}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
        store = at("gs://bucket/indexes/x")
        assert store.create("v/1", b"1")
        assert not store.create("v/1", b"2")
        store.put("v/2", b"22")
        assert store.get("v/1", 10) == b"1"
        assert list(store.sizes("v")) == ["v/1", "v/2"]
        store.delete(["gone", "v/1", "gone-too", "v/2"])
        assert kept == {}
        with pytest.raises(FileNotFoundError):
            store.get("v/1", 10)


def test_missing_gcs_credentials_are_reported(tmp_path, monkeypatch):
    buckets.use(monkeypatch, CLOSED)
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, "127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))  # gcloud keeps credentials there
    check_error(
        lambda: at("gs://bucket/x", RETRIES=1).get("a", 10),
        "gs://bucket/x/a: no credentials",
        "GOOGLE_APPLICATION_CREDENTIALS",
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    check_error(
        lambda: at("gs://bucket/x"),
        "gs://bucket/x: no credentials",
        "GOOGLE_APPLICATION_CREDENTIALS",
    )
