"""The process ``retrieval-tip serve``: access, refusals, reloading and shutdown."""

import gc
import http.client
import json
import re
import shutil
import signal
import socket
import stat
import threading
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from fastapi import FastAPI, Request
from serving import app_of, caltech_photos, listens, random_index, rest, running, server, told
from tables import png

from retrieval_tip import Index
from retrieval_tip.index import changes
from retrieval_tip.server import run as run_module
from retrieval_tip.server.app import create_app
from retrieval_tip.server.guard import Limits
from retrieval_tip.server.served import Backbones, open_all
from retrieval_tip.server.service import Service
from retrieval_tip.store.edits import Edits, NewKeys

from conftest import SHARED, SOAK, failed  # isort: skip

MIB = 1 << 20
AT_ONCE = 400 * MIB
"""Memory that a server may need on top: for images of 50 megapixels that it decodes at once, and for bodies."""
CHANGES = 4 if SOAK else 2


@pytest.fixture(scope="module")
def served(things, warm_path):
    with server(things, path=warm_path) as (address, _):
        yield address, listens(address)


@pytest.fixture(scope="module")
def photo():
    return caltech_photos(SHARED, "test", 10, 1)[0]


@pytest.fixture(scope="module")
def random_things(tmp_path_factory):
    return random_index(tmp_path_factory.mktemp("random") / "random", 4000, 64, 10)


@pytest.fixture(scope="module")
def local(random_things):
    """An application in this process that answers only to local host names, with a short timeout."""
    with running(
        app_of(random_things, limits=Limits(hosts=run_module.LOOPBACK, seconds=2))
    ) as place:
        yield place


def connection(address, timeout=60):
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=timeout)


def feature(folder):
    return {"features": np.asarray(Index.load(folder).keys[:1], dtype=np.float64).tolist()}


ROWS = zlib.compress(bytes(10_000_000), 9)
"""Compressed black rows of a PNG file, usually fewer than its header claims."""


def test_bad_uploads_are_refused_and_memory_stays_bounded(served, photo):
    """Many are sent at once. ``test_hostile.py`` sends others one by one."""
    address, process = served
    before = process.memory_info().rss
    most = 0
    whole = photo[0].read_bytes()
    bodies = [
        b"",
        whole[: len(whole) // 3],
        png(30_000, 30_000, ROWS),
        png(2_000_000_000, 1, ROWS),
        png(7000, 7000, ROWS),
        np.random.default_rng(0).bytes(100_000),
        bytes(30 * MIB),
    ]
    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(12) as pool:
        assert process.rlimit(psutil.RLIMIT_NOFILE)[0] <= run_module.FILES
        posted = [
            pool.submit(client.post, "/v1/classify", files={"images": body})
            for body in bodies * (3 if SOAK else 1)
        ]
        while not all(one.done() for one in posted):
            most = max(most, process.memory_info().rss)
            time.sleep(0.01)
    assert {one.result().status_code for one in posted} <= {422, 429, 503}
    assert most - before < 2 * AT_ONCE
    assert httpx.get(f"{address}/healthz").status_code == 200


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_body_of_200_mb_is_refused_before_it_is_read(served, announced):
    address, process = served
    before = process.memory_info().rss
    sent = 0
    client = connection(address)
    client.putrequest("POST", "/v1/classify")
    client.putheader("Content-Type", "multipart/form-data; boundary=x")
    client.putheader(
        *(("Content-Length", str(200 * MIB)) if announced else ("Transfer-Encoding", "chunked"))
    )
    client.endheaders()
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    part = head + bytes(MIB - len(head))  # the first part begins a file
    try:
        for _ in range(200):
            client.send(part if announced else b"%x\r\n%s\r\n" % (MIB, part))
            sent += MIB
    except OSError:  # the server has stopped reading
        pass
    answer = client.getresponse()
    assert (answer.status, json.loads(answer.read())["status"]) == (413, 413)
    assert process.memory_info().rss - before < 100 * MIB
    client.close()
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_local_server_answers_only_to_local_host_names(local):
    """This prevents DNS rebinding: another website cannot point its own name at this machine."""
    address = "http://{}:{}".format(*local)
    port = local[1]
    own = ("127.0.0.1", "localhost", "LOCALHOST", "[::1]", f"localhost:{port}", f"[::1]:{port}")
    others = (
        f"evil.example:{port}",
        "localhost.evil.example",
        "evil.example@localhost",
        "[::1].evil.example",
        "::1",
        "[::1]evil.example",
        "localhost:80:80",
        "localhost/",
        "",
    )
    for host in (*own, *others):
        answer = httpx.get(f"{address}/v1/indexes", headers={"Host": host})
        assert (answer.status_code == 200) == (host in own), host
        assert answer.status_code in (200, 400, 421), host
    assert (
        "--allow-host evil.example"
        in httpx.get(address, headers={"Host": others[0]}).json()["detail"]
    )


def test_slow_requests_are_dropped(local, random_things):
    address = "http://{}:{}".format(*local)
    answer = told(local, POST + b"Content-Length: 1000\r\n\r\n{")  # although the rest never arrives
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()
    assert b"2 s" in answer
    assert httpx.post(f"{address}/v1/classify", json=feature(random_things)).status_code == 200


def test_connections_without_a_whole_request_head_are_closed(random_things):
    """They are silent, send half a head or single bytes, or are open after an answer."""
    with running(app_of(random_things), idle=1) as place, ExitStack() as stack:
        answered, half, bytewise, silent = (
            stack.enter_context(socket.create_connection(place, timeout=20)) for _ in range(4)
        )
        answered.sendall(HEAD + b"\r\n" + HEAD)
        half.sendall(HEAD)
        with suppress(OSError):  # until the server has closed the connection
            for _ in range(200):
                bytewise.sendall(b"a")
                time.sleep(0.1)
        assert [rest(link) for link in (silent, half, bytewise)] == [b""] * 3
        assert rest(answered).count(b"HTTP/1.1 200 ") == 1


HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
CLOSE = b"Connection: close\r\n\r\n"
FIELD = b"x: " + bytes(1000).replace(b"\0", b"a") + b"\r\n"


@pytest.mark.parametrize(
    "data",
    {
        "one field": [HEAD, b"x: ", b"a" * (8 << 20)],
        "many fields": [HEAD, *[FIELD] * 8000],
        "an address": [b"GET /" + b"a" * (1 << 20)],
        "after a body": [CHUNKED, b"0\r\n", *[FIELD] * 8000],
        "beside a chunk": [CHUNKED, b"1;", b"a" * (1 << 20)],
    }.items(),
    ids=lambda item: item[0],
)
def test_oversized_headers_are_refused(local, data):
    assert told(local, *data[1]).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
    assert told(local, HEAD + FIELD * 60 + CLOSE).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, HEAD + b"Host: localhost\r\n\r\n"),
        (400, HEAD + b"Host: evil.example\r\n\r\n"),
        (400, b"GET /healthz HTTP/1.1\r\n\r\n"),
        (421, b"GET /healthz HTTP/1.0\r\n\r\n"),
        (404, b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n" + CLOSE),
        (421, b"GET http://localhost/healthz HTTP/1.1\r\nHost: evil.example\r\n" + CLOSE),
        (400, POST + b"Content-Length: 2, 3\r\n\r\n{}"),
        (400, b"SSH-2.0-OpenSSH\r\n\r\n"),
        (
            421,
            b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        ),
    ],
)
def test_requests_for_other_hosts_and_ambiguous_requests_are_refused(local, status, data):
    answer = told(local, data)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1


def with_close(request):
    """Return the request with a header that closes the connection."""
    return request.replace(b"Host", b"Connection: close\r\nHost", 1)


def classify_request(rows, query=""):
    """Return a request to classify features."""
    body = json.dumps({"features": [[0.125] * 64] * rows}).encode()
    return POST.replace(
        b"classify", b"classify" + query.encode()
    ) + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def test_only_received_bytes_count_towards_the_memory_limit(random_things):
    """An announced size takes no memory. Received bytes do until the timeout."""
    length = b"Connection: close\r\nContent-Length: %d\r\n\r\n"
    with (
        running(app_of(random_things, limits=Limits(held=200_000, seconds=2))) as place,
        ExitStack() as ends,
    ):
        waiting = [
            ends.enter_context(socket.create_connection(place, timeout=30)) for _ in range(12)
        ]
        for one in waiting:
            one.sendall(POST + length % (8 << 20) + b"{")
        assert told(place, with_close(classify_request(1))).startswith(b"HTTP/1.1 200")
        assert [rest(one).split()[1] for one in waiting] == [b"408"] * 12
        large = ends.enter_context(socket.create_connection(place, timeout=30))
        large.sendall(POST + length % 180_000 + b" " * 179_000)
        time.sleep(0.2)
        for post in (POST, POST.replace(b"classify", b"indexes/random/relabel")):
            assert told(place, post + length % 50_000 + b" " * 50_000).split()[1] == b"503"
        assert rest(large).split()[1] == b"408"
        assert told(place, POST + length % 50_000 + b" " * 50_000).split()[1] == b"422"


def test_an_unread_response_is_dropped(random_things):
    """Until then, it counts towards the memory limit."""
    large = classify_request(64, "?neighbours=500")  # about 5 MB
    with (
        running(app_of(random_things, limits=Limits(held=15_000_000, seconds=3))) as place,
        ExitStack() as ends,
    ):
        waiting = [ends.enter_context(socket.socket()) for _ in range(4)]
        for one in waiting:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(30)
            one.connect(place)
            one.sendall(large)
        assert {one.recv(12)[-3:] for one in waiting} == {b"200", b"503"}
        limit = time.monotonic() + 30
        while not told(place, with_close(large)).startswith(b"HTTP/1.1 200"):
            assert time.monotonic() < limit


@pytest.mark.parametrize(
    ("proxies", "client"),
    [
        ([], "127.0.0.1"),
        (["192.0.2.0/24"], "127.0.0.1"),
        (["127.0.0.1"], "192.0.2.7"),
        (["127.0.0.0/8", "192.0.2.0/24"], "198.51.100.1"),
    ],
)
def test_only_trusted_proxies_name_the_client(proxies, client):
    async def name(request: Request):
        return request.client.host if request.client else ""

    app = FastAPI()
    app.get("/")(name)
    with running(app, proxies=proxies) as (host, port):
        answer = httpx.get(
            f"http://{host}:{port}/", headers={"X-Forwarded-For": "198.51.100.1, 192.0.2.7"}
        )
    assert answer.json() == client


@pytest.mark.parametrize("waits", [False, True], ids=["before", "after"])
def test_a_client_that_disconnects_before_or_after_an_error_causes_no_server_error(
    local, caplog, waits
):
    bad = b"GET /healthz HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\nnone\r\n\r\n"
    for host in (b"localhost", b"evil.example"):  # the latter is refused
        for _ in range(20):
            with socket.create_connection(local, timeout=30) as client:
                client.sendall(
                    bad % host if waits else classify_request(200) + (HEAD + b"\r\n") * 2
                )
                if waits:
                    client.recv(1)
    assert told(local, HEAD + CLOSE).startswith(b"HTTP/1.1 200")
    assert "Exception in ASGI" not in caplog.text
    assert waits or not [record for record in caplog.records if record.levelname == "ERROR"]


def test_clients_see_no_error_while_the_index_changes_and_the_server_stops(
    things, photo, tmp_path, warm_path
):
    """A short version of ``benchmarks/serve.py --soak``."""
    own = Path(shutil.copytree(things, tmp_path / "own"))
    image = photo[0].read_bytes()
    sent = feature(things)
    stop = threading.Event()
    failures = []
    versions = set()

    def ask(address):
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/v1/classify", json=sent)
                if answer.status_code == 200:
                    versions.add(answer.json()["version"])
                else:
                    failures.append(answer.text)

    with (
        server(own, path=warm_path) as (address, process),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        threads = [threading.Thread(target=ask, args=(address,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(CHANGES):
            changes.remove(own, key_ids=[number + 1])
            limit = time.monotonic() + 30
            while number + 2 not in versions and not failures and time.monotonic() < limit:
                time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert versions >= {number + 2 for number in range(CHANGES)}
        with ThreadPoolExecutor(1) as pool:
            posted = pool.submit(client.post, "/v1/classify", files=[("images", image)] * 24)
            with httpx.Client(base_url=address) as other:
                while (
                    "retrieval_tip_in_flight 1.0" in other.get("/metrics").text
                ):  # only the request for metrics
                    assert not posted.done()
            process.send_signal(signal.SIGTERM)
            last = posted.result()
        assert (last.status_code, len(last.json()["results"])) == (200, 24)
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)


def test_bad_indexes_ports_and_options_are_refused(things, tmp_path, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", things, "--port", taken.getsockname()[1])
        failed(result, 2, "in use")
    for options in (
        ["--host", "256.1.1.1"],
        ["--token", " "],
        ["--token", "a", "--read-only"],
        ["--out", tmp_path],
    ):
        assert run("serve", things, *options, "--port", 0).exit_code == 2
    for proxy in ("proxy.example.org", "10.0.0.7/8", "*"):
        result = run("serve", things, "--trusted-proxy", proxy, "--port", 0)
        failed(result, 2, "10.0.0.0/8")
    assert run("serve --model", "local-dir:no such", "--port", 0).exit_code != 0
    failed(run("serve", tmp_path / "nothing", "--port", 0), 1, "no such folder")


def test_a_local_server_creates_and_prints_a_token(random_things, warm_path):
    key = feature(random_things) | {"labels": ["class 1"]}
    printed = []
    with server(random_things, path=warm_path, printed=printed) as (address, process):
        token = re.search(r"/#token=([\w-]{20,}) ", printed[-1]).group(1)
        right, wrong = ({"Authorization": f"Bearer {one}"} for one in (token, token[:-1]))
        index = f"{address}/v1/indexes/{random_things.name}"
        assert httpx.post(f"{index}/keys", json=key).status_code == 401
        assert (
            "token that serve printed"
            in httpx.post(f"{index}/keys", json=key, headers=wrong).json()["detail"]
        )
        assert httpx.post(f"{index}/keys", json=key, headers=right).status_code == 201
        assert httpx.post(f"{index}/rollback", json={"to": 1}, headers=right).json()["version"] == 3
        process.send_signal(signal.SIGINT)  # as Ctrl+C does
        assert process.wait(30) == 0
    with server(random_things, "--read-only", path=warm_path, printed=printed) as (other, _):
        assert "token" not in printed[-1]
        assert not httpx.get(f"{other}/v1/indexes").json()["changes"]
    options = ["--read-only", "--private"]
    port = int(address.rpartition(":")[2])
    with server(random_things, *options, port=port, path=warm_path, printed=printed):
        assert f"{address}/#token={token} to view it;" in printed[-1]  # an open page still works
        file = run_module.LastServer("serve", [random_things]).file
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.chmod(0o640)
        assert (
            run_module.LastServer("serve", [random_things]).token == ""
        )  # it is no secret any more
        assert httpx.get(f"{address}/v1/indexes").status_code == 401
        assert not httpx.get(f"{address}/v1/indexes", headers=right).json()["changes"]


def test_an_idle_encoder_leaves_memory_and_then_answers_the_same(things, photo):
    app = app_of(things, limits=Limits(poll=0.02))
    service = app.state.service
    backbone = service.served["things"].now.backbone
    sent = [("images", ("photo", photo[0].read_bytes()))] * 2
    answers = []
    with running(app) as place:
        url = "http://{}:{}/v1/classify?logits=true".format(*place)
        for _ in range(2):
            answers.append(httpx.post(url, files=sent, timeout=60).json()["results"])
            assert backbone._tower is not None
            service.limits = Limits(poll=0.02, idle=0)
            limit = time.monotonic() + 60
            while backbone._opened is not None or backbone._tower is not None:
                assert time.monotonic() < limit
                time.sleep(0.01)
            service.limits = Limits(poll=0.02)
    assert answers[1] == answers[0]


def test_an_old_version_is_freed_when_the_next_one_answers_and_every_index_when_the_server_stops(
    random_things, tmp_path
):
    """Their mapped files are freed too, without a garbage collection, which would delay every answer."""
    folder = shutil.copytree(random_things, tmp_path / "index")
    served = open_all([folder], Backbones("cpu", "float32", "fast"))
    app = create_app(Service(served, Limits(poll=0.1)))
    with running(app) as place:
        url = "http://{}:{}/v1/classify?explain=true".format(*place)
        before = weakref.ref(served["index"].now.index)
        first = served["index"].now.manifest.version
        gc.disable()
        try:
            for version in (first, first + 1):
                assert (
                    httpx.post(url, json={"features": [[0.125] * 64]}).json()["version"] == version
                )
                other = Index.load(folder)
                other = other.edited(
                    Edits(add=NewKeys(np.eye(64, dtype=np.float32)[:1], ["class 0"]))
                )
                other.save(folder)
                del other
                deadline = time.monotonic() + 30
                while (
                    served["index"].now.manifest.version == version and time.monotonic() < deadline
                ):
                    time.sleep(0.05)
            assert httpx.post(url, json={"features": [[0.125] * 64]}).json()["version"] == first + 2
            assert before() is None
        finally:
            gc.enable()
    service = weakref.ref(app.state.service)
    del app, served
    gc.collect()
    assert service() is None
