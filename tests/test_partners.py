"""The routes for other programs: Label Studio's ML backend, and PhotoPrism's labels."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from conftest import SHARED, examples
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from referees import referee
from serving import app_of, caltech_photos, server

from retrieval_tip import Index
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index.fit import fit_index
from retrieval_tip.server import served as served_module
from retrieval_tip.server.partners import interface_of

TOKEN = "open sesame"
PATH = "/label-studio/own"


@pytest.fixture(scope="module", autouse=True)
def one_encoder() -> Iterator[None]:
    """Load the encoder once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_module, "load_backbone", functools.cache(served_module.load_backbone))
        yield


@pytest.fixture
def own(things: Path, tmp_path: Path) -> Path:
    """A copy of the photo index that a test may change."""
    return Path(shutil.copytree(things, tmp_path / "own"))


@pytest.fixture(scope="module")
def photos() -> list[tuple[Path, str]]:
    """A photo of each class that is not in the index, with its label."""
    return caltech_photos(SHARED, "test", 10, 1)


def client(*folders: Path, **more: Any) -> TestClient:
    """Return a client that sends the token as Label Studio does."""
    asking = TestClient(app_of(*folders, **({"token": TOKEN} | more)))
    asking.auth = ("label-studio", TOKEN)
    return asking


def config(names: list[str]) -> str:
    choices = "".join(f'<Choice value="{escape(name)}"/>' for name in names)
    return f'<View><Image name="img" value="$photo"/><Choices name="kind" toName="img">{choices}</Choices></View>'


def data_url(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def noise() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def event(action: str, photo: str, choices: list[str], names: list[str], **more: object) -> dict[str, Any]:
    """An event as Label Studio sends it, reduced to what the server reads."""
    result = [{"from_name": "kind", "to_name": "img", "type": "choices", "value": {"choices": choices}}]
    result += [{"from_name": "other", "to_name": "img", "type": "choices", "value": {"choices": ["blurred"]}}]
    return {
        "action": action, "project": {"id": 3, "label_config": config(names)},
        "task": {"id": 17, "data": {"photo": photo}},
        "annotation": {"id": 42, "task": 17, "was_cancelled": False, "result": result, **more},
    }  # fmt: skip


def deleted(number: int = 42) -> dict[str, Any]:
    return {"action": "ANNOTATIONS_DELETED", "project": {"id": 3}, "annotations": [{"id": number}]}


def test_tasks_get_predictions_in_order(things: Path, photos: list[tuple[Path, str]], tmp_path: Path) -> None:
    """Data URLs and files below ``--root`` are read; other tasks, and classes without a choice, get an empty result."""
    root, outside = tmp_path / "root", tmp_path / "outside.jpg"
    (root / "a b").mkdir(parents=True)
    shutil.copy(photos[0][0], root / "a b" / "é.jpg")
    shutil.copy(photos[0][0], outside)
    (root / "link.jpg").symlink_to(outside)
    names = [name for _, name in photos]
    with client(things, root=root) as asking:
        path = "/label-studio/things"
        whole = asking.post(f"{path}/setup", json={"schema": config(names), "access_token": "secret"}).json()
        version = f"things@{Index.load(things).manifest.version}"
        assert whole == {"model_version": version, "classes_without_choice": []}
        lacking = asking.post(f"{path}/setup", json={"schema": config(names[1:])}).json()
        assert lacking["classes_without_choice"] == names[:1]
        truth = asking.post("/v1/classify?top=1", files=[("images", photo.read_bytes()) for photo, _ in photos]).json()
        local = "/data/local-files/?d="
        good = [data_url(photo.read_bytes()) for photo, _ in photos]
        good += [local + quote("a b/é.jpg"), local + quote(str(root / "a b" / "é.jpg").lstrip("/"))]
        bad: list[object] = [local + quote(str(outside).lstrip("/")), f"{local}../outside.jpg", f"{local}link.jpg"]
        bad += [f"{local}%00", local, "data:image/jpeg;base64,!", data_url(b"no image"), "http://127.0.0.1:1/a.jpg", 7]
        tasks = [{"id": i, "data": {"photo": address}} for i, address in enumerate([*bad, *good])]
        sent = {"tasks": [*tasks, {"id": 99}], "label_config": config(names[1:])}
        for place in (path, ""):  # the only index also answers without its name
            found = asking.post(f"{place}/predict", json=sent).json()
            assert [one["input"] for one in found["skipped"]] == [f"task {i}" for i in [*range(len(bad)), 99]]
            assert len(found["results"]) == len(sent["tasks"])
            assert {one["model_version"] for one in found["results"]} == {version}
            assert [one["result"] for one in found["results"][: len(bad)]] == [[]] * len(bad)
            rows = [*truth["results"], *truth["results"][:1] * 2]
            for one, row in zip(found["results"][len(bad) : -1], rows, strict=True):
                choice = {
                    "from_name": "kind",
                    "to_name": "img",
                    "type": "choices",
                    "value": {"choices": [row["label"]]},
                }
                known = row["label"] in names[1:]
                assert one["result"] == ([choice] if known else [])
                assert one["score"] == pytest.approx(row["probability"] if known else 0.0, abs=1e-4)
        assert asking.get("/health").json() == {"status": "UP", "model_version": version}
    assert "secret" not in json.dumps(whole)


def test_annotations_become_shots_and_follow_their_changes(own: Path, photos: list[tuple[Path, str]]) -> None:
    names, (path, name) = [label for _, label in photos], photos[0]
    photo, n = data_url(path.read_bytes()), Index.load(own).n

    def shots() -> dict[str, str]:
        rows = Index.load(own).labels.to_pylist()
        return {row["label_studio"]: row["label"] for row in rows if row.get("label_studio")}

    with client(own) as asking:

        def send(body: dict[str, Any]) -> dict[str, Any]:
            before = Index.load(own).manifest.version
            answer = asking.post(f"{PATH}/webhook", json=body)
            assert answer.status_code == 200, answer.text
            again = asking.post(f"{PATH}/webhook", json=body).json()
            assert (again["key_ids"], again["version"]) == ([], answer.json()["version"])
            assert (answer.json()["version"] > before) == bool(answer.json()["key_ids"]) or answer.json()["skipped"]
            return dict(answer.json())

        assert len(send(event("ANNOTATION_CREATED", photo, [names[1]], names))["key_ids"]) == 1
        assert shots() == {"3/17/42": names[1]}
        image = asking.get(f"/v1/indexes/own/keys/{max(Index.load(own).labels['key_id'].to_pylist())}/image")
        assert image.headers["content-type"] == "image/jpeg"
        send(event("ANNOTATION_UPDATED", "/no/longer/there.jpg", [name], names))  # the shot has the photo already
        assert shots() == {"3/17/42": name}
        send(event("ANNOTATION_UPDATED", photo, ["new & new"], [*names, "new & new"]))
        assert shots() == {"3/17/42": "new & new"}
        two = send(event("ANNOTATION_UPDATED", photo, names[:2], names))
        assert "2 choices" in two["skipped"][0]["reason"]
        assert shots() == {}
        send(event("ANNOTATION_CREATED", photo, [name], names))
        assert send(deleted(43))["key_ids"] == []
        assert len(send(deleted())["key_ids"]) == 1
        for skipped in (
            event("ANNOTATION_CREATED", photo, [name], names, was_cancelled=True),
            event("ANNOTATION_CREATED", "http://127.0.0.1:1/data/upload/a.jpg", [name], names),
            event("ANNOTATION_CREATED", data_url(b"no image"), [name], names),
            event("TASKS_CREATED", photo, [name], names),
            {"action": "ANNOTATION_CREATED"},
        ):
            assert send(skipped)["skipped"][0]["reason"]
        assert Index.load(own).n == n


def test_the_token_is_accepted_as_a_password_on_these_routes_only(own: Path) -> None:
    names = Index.load(own).class_names
    sent = {"schema": config(names)}
    with client(own) as asking:
        assert asking.post(f"{PATH}/setup", json=sent).status_code == 200
        assert asking.delete("/v1/indexes/own/keys?key_id=0").status_code == 401
        for header in ({"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "cross-site"}):  # browsers send it unasked
            assert asking.post(f"{PATH}/setup", json=sent, headers=header).status_code == 401
        assert asking.post(f"{PATH}/setup", json=sent, auth=("label-studio", "wrong")).status_code == 401
        for text in ("Basic !", "Basic", f"Basic {TOKEN}", f"Basic {base64.b64encode(TOKEN.encode()).decode()}"):
            asking.auth = None
            assert asking.post(f"{PATH}/setup", json=sent, headers={"authorization": text}).status_code == 401
        asking.headers["authorization"] = f"Bearer {TOKEN}"
        for what, body in (("setup", sent), ("predict", {"tasks": [], "label_config": config(names)})):
            assert asking.post(f"{PATH}/{what}", json=body).status_code == 200
            assert asking.post(f"{PATH}/{what}", json=body, headers={"authorization": ""}).status_code == 401
        assert asking.post("/label-studio/other/setup", json=sent).status_code == 404
    for more, statuses in (({"token": None}, (200, 403)), ({"token": None, "private": TOKEN}, (200, 403))):
        with client(own, **more) as asking:
            webhook = asking.post(f"{PATH}/webhook", json=deleted())
            assert (asking.get(f"{PATH}/health").status_code, webhook.status_code) == statuses


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<View><Text name="t" value="$t"/><Choices name="a" toName="t"/><Image name="i" value="$p"/>'
         '<Choices name="b" toName="i" perRegion="true"/><Choices name="c" toName="i"><Choice value="x"/>'
         '<Choice value="y" alias="z"/></Choices><Choices name="d" toName="i"/></View>', ("c", "i", "p", {"x", "z"})),
        ('<View><Choices name="c" toName="i"><Choice value="x"/></Choices></View>', "has no Choices tag"),
        ('<View><Image name="i" valueList="$p"/><Choices name="c" toName="i"/></View>', "has no Choices tag"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>', "without a DOCTYPE"),
        ("<View>" * 200_000, "at most 1,048,576"),
        ("<View>" * 100_000, "is not XML"),
        ("<View><Image", "is not XML"),
        ("<View>\x00</View>", "is not XML"),
        ("<View>\ud800</View>", "is not XML"),
        (None, "must be XML"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_the_first_choices_of_an_image_count(text: str | None, found: tuple[Any, ...] | str) -> None:
    if isinstance(found, tuple):
        assert tuple(interface_of(text)) == found
    else:
        with pytest.raises(InputError, match=found):
            interface_of(text)


@contextmanager
def studio(uploads: dict[str, bytes]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Run a server that behaves like Label Studio, and yield its address and the list of its requests."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["authorization"]))
            allowed = self.headers["authorization"] in ("Bearer short", "Token legacy")
            data = uploads.get(self.path) if allowed else None
            redirected = self.path.endswith("moved.jpg")
            self.send_response(307 if redirected else 404 if data is None else 200)
            if redirected:
                self.send_header("location", next(iter(uploads)))
            self.end_headers()
            self.wfile.write(data or b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body["refresh"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"access": "short"} if body["refresh"] == "a.b.c" else {}).encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_only_uploads_of_the_configured_label_studio_are_fetched(
    things: Path, photos: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment(url: str, key: str) -> None:
        monkeypatch.setenv("LABEL_STUDIO_URL", url)
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", key)

    names, data = [name for _, name in photos], photos[0][0].read_bytes()
    uploads = {"/sub/data/upload/1/a.jpg": data, "/sub/data/upload/1/big.jpg": bytes(33 << 20), "/sub/api/a.jpg": data}
    with studio(uploads) as (url, asked), studio({"/data/upload/1/a.jpg": data}) as (other, elsewhere):
        good = ["/sub/data/upload/1/a.jpg", f"{url}/sub/data/upload/1/a.jpg"]
        bad = [f"{other}/data/upload/1/a.jpg", "/sub/data/upload/1/moved.jpg", "/sub/data/upload/1/big.jpg"]
        bad += ["/sub/data/../api/a.jpg", "/sub/api/a.jpg", f"//{other.removeprefix('http://')}/data/upload/1/a.jpg"]
        bad += [
            "http://[",
            f"{url}@{other.removeprefix('http://')}/data/upload/1/a.jpg",
            "s3://bucket/a.jpg",
            "file:///a",
        ]
        tasks = [{"data": {"photo": address}} for address in [*good, *bad]]
        for key, expected in (("a.b.c", "Bearer short"), ("legacy", "Token legacy")):
            environment(url=f"{url}/sub", key=key)
            with client(things) as asking:
                sent = {"tasks": tasks, "label_config": config(names)}
                found = asking.post("/predict", json=sent).json()
            assert [bool(one["result"]) for one in found["results"]] == [True] * len(good) + [False] * len(bad)
            assert {sent for path, sent in asked if path.startswith("/sub/data/")} == {expected}
            assert not elsewhere
            asked.clear()
        assert not [path for path, _ in asked if "/sub/api/a" in path]
        for key in ("wrong.a.b", "wrong"):  # the one cannot be exchanged, the other is refused
            environment(url=f"{url}/sub", key=key)
            with client(things) as asking:
                assert asking.post("/predict", json=sent).json()["results"][0]["result"] == []
    for address, key in (("ftp://a", "k"), ("nowhere", "k"), ("http://a:b", "k"), ("http://a", ""), ("", "k")):
        environment(address, key)
        with pytest.raises(UsageError, match="LABEL_STUDIO_URL"):
            client(things)


def test_photoprism_gets_the_labels_of_photos_that_match(own: Path, photos: list[tuple[Path, str]]) -> None:
    """The request and the answer are those of PhotoPrism's ``ApiRequest`` and ``ApiResponse``."""
    fit_index(own)
    path, name = photos[0]

    def body(*images: str) -> dict[str, object]:
        more = {"model": "own:latest", "version": "latest", "suffix": "", "stream": False}
        return {"id": "b0db2187-7a09-438c-8649-a9c6c0f0a8dc", "images": images} | more

    with client(own) as asking:
        asking.auth = None
        truth = asking.post("/v1/classify?top=1", files={"images": path.read_bytes()}).json()["results"][0]
        found = asking.post("/api/v1/vision/labels", json=body(data_url(path.read_bytes()), data_url(noise()))).json()
        p = pytest.approx(truth["probability"], abs=1e-4)
        version = str(Index.load(own).manifest.version)
        assert found == {
            "id": "b0db2187-7a09-438c-8649-a9c6c0f0a8dc",
            "code": 200,
            "model": {"type": "labels", "name": "own", "version": version},
            "result": {"labels": [{"name": name, "source": "image", "confidence": p, "topicality": p}]},
        }
        nothing = asking.post("/api/v1/vision/labels?index=own", json=body(data_url(noise()))).json()
        assert nothing["result"] == {"labels": []}
        for images in ((), ("http://127.0.0.1/a.jpg",), ("/etc/passwd",), (data_url(b""),), (data_url(noise()),) * 65):
            assert asking.post("/api/v1/vision/labels", json=body(*images)).status_code == 422
        config_of = config(Index.load(own).class_names)
        sent = {"tasks": [{"id": 1, "data": {"photo": data_url(noise())}}], "label_config": config_of}
        answer = asking.post(f"{PATH}/predict", json=sent, auth=("", TOKEN)).json()
        assert (answer["results"][0]["result"], answer["skipped"]) == ([], [])
    with client(own, private=TOKEN) as asking:
        statuses = [
            asking.post("/api/v1/vision/labels", json=body(data_url(noise())), **more).status_code
            for more in ({}, {"auth": None, "headers": {"authorization": f"Bearer {TOKEN}"}})
        ]
        assert statuses == [401, 200]


def test_any_json_is_answered_or_refused(things: Path) -> None:
    scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False)
    keys = st.sampled_from(["id", "data", "photo", "result", "value", "choices", "from_name", "annotations", "x"])
    anything = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
    )
    fields = ["tasks", "schema", "label_config", "action", "project", "task", "annotation", "annotations", "images"]
    valid = {
        "label_config": st.just(config(["a"])), "schema": st.just(config(["a"])),
        "action": st.sampled_from(["ANNOTATION_CREATED", "ANNOTATIONS_DELETED"]),
        "project": st.just({"id": 3, "label_config": config(["a"])}), "task": st.just({"id": 17}),
    }  # fmt: skip
    bodies = st.fixed_dictionaries({}, optional={name: valid.get(name, anything) | anything for name in fields})

    with client(things) as asking:

        @given(path=st.sampled_from(["setup", "predict", "webhook", "api/v1/vision/labels"]), body=bodies)
        @settings(max_examples=examples(400), deadline=None)
        def ask(path: str, body: dict[str, object]) -> None:
            assert asking.post(f"/{path}", json=body).status_code in (200, 422)

        ask()


@contextmanager
def real_studio(data: Path, root: Path) -> Iterator[httpx.Client]:
    """Run a real Label Studio, and yield a client of a user who is signed in."""
    program = referee(("label-studio==1.23.2",)).with_name("label-studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = {"email": "a@example.org", "password": "secret123"}
    command = [
        program,
        "start",
        "--no-browser",
        "--port",
        port,
        "--username",
        user["email"],
        "--password",
        user["password"],
    ]
    local = {"LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true", "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(root)}
    here = {"ML_BLOCK_LOCAL_IP": "false", "SSRF_PROTECTION_ENABLED": "false", "LATEST_VERSION_CHECK": "0"}
    more = {"LABEL_STUDIO_BASE_DATA_DIR": str(data), "SENTRY_DSN": "", "COLLECT_ANALYTICS": "false"}
    with (data / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=os.environ | local | here | more, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, follow_redirects=True) as asking:
            for _ in range(240):
                with suppress(httpx.ConnectError):
                    if asking.get("/health").is_success:
                        break
                assert process.poll() is None, (data / "log").read_text()
                time.sleep(0.5)
            asking.headers["referer"] = str(asking.base_url)
            for path, form in (("/user/login/", user), ("/api/token/", {})):
                asking.get("/user/login/")
                asking.headers["x-csrftoken"] = asking.cookies["csrftoken"]
                answer = asking.post(path, data=form)
            asking.headers["x-token"] = answer.raise_for_status().json()["token"]
            yield asking
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.soak
def test_a_real_label_studio_gets_predictions_that_follow_annotations(
    own: Path, photos: list[tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_path: str
) -> None:
    """Label Studio reads local files and uploads, is told of the token by the address only, and deletes a shot."""
    root = tmp_path / "root" / "set"
    root.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for number in (0, 1):
        Image.open(photos[0][0]).convert("RGB").resize((200, 150 + number)).save(root / f"{number}.jpg")
    label = "something new"
    interface = config([*Index.load(own).class_names, label])
    with real_studio(tmp_path / "data", root.parent) as asking:

        def post(path: str, /, **body: Any) -> Any:
            answer = asking.post(f"/api/{path}", **({"json": body} if "files" not in body else body))
            assert answer.is_success, answer.text
            return answer.json()

        def predicted(task: int) -> tuple[str, str]:
            """Ask for predictions of all tasks, and return the newest one of a task."""
            post(
                f"dm/actions?id=retrieve_tasks_predictions&project={project}",
                selectedItems={"all": True, "excluded": []},
            )
            newest = max(asking.get(f"/api/predictions?task={task}").json(), key=lambda one: one["id"])
            return newest["result"][0]["value"]["choices"][0], newest["model_version"]

        monkeypatch.setenv("LABEL_STUDIO_URL", str(asking.base_url))
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", asking.headers["x-token"])
        with server(own, "--root", root.parent, token="to-ken", path=warm_path) as (address, _):
            project = post("projects", title="Things", label_config=interface)["id"]
            url = address.replace("//", "//label-studio:to-ken@") + PATH
            assert post("ml", project=project, url=url)["model_version"] == "own@1"
            storage = post("storages/localfiles", project=project, path=str(root), use_blob_urls=True)
            post(f"storages/localfiles/{storage['id']}/sync")
            post(f"projects/{project}/import", files={"file": ("up.jpg", (root / "0.jpg").read_bytes(), "image/jpeg")})
            tasks = sorted(one["id"] for one in asking.get(f"/api/tasks?project={project}&fields=all").json()["tasks"])
            before = [predicted(task) for task in tasks]
            assert before == [(before[0][0], "own@1")] * 3
            assert before[0][0] != label
            result = event("", "", [label], [])["annotation"]["result"][:1]
            made = post(f"tasks/{tasks[0]}/annotations", result=result)
            assert [predicted(task) for task in tasks] == [(label, "own@2")] * 3
            asking.delete(f"/api/annotations/{made['id']}").raise_for_status()
            assert [predicted(task)[1] for task in tasks] == ["own@3"] * 3
            assert Index.load(own).class_names[-1] == label
            assert Index.load(own).counts[-1] == 0
