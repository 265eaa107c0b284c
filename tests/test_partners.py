"""The routes for other programs: Label Studio's ML backend, and PhotoPrism's labels."""

import base64
import copy
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from html import escape
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from conftest import SHARED, few, needs_real, tries
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from loopback import answering
from PIL import Image
from referees import referee
from sealing import altered
from serving import app_of, caltech_photos, running, server
from stored import made

from retrieval_tip import Index
from retrieval_tip.data import images
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import of_images
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index import changes, places
from retrieval_tip.index.changes import fit_index
from retrieval_tip.server import annotations
from retrieval_tip.server.app import create_app
from retrieval_tip.server.guard import Limits
from retrieval_tip.server.partners import interface_of
from retrieval_tip.server.served import Backbones, Served, open_all
from retrieval_tip.server.service import Service
from retrieval_tip.server.uploads import LabelStudioPhotos
from retrieval_tip.store.files import locked

TOKEN = "open sesame"
pytestmark = pytest.mark.usefixtures("one_encoder")
PATH = "/label-studio/own"


@pytest.fixture(scope="module")
def photos():
    """A photo of each class that is not in the index, with its label."""
    return caltech_photos(SHARED, "test", 10, 1)


def client(*folders, **more):
    """Return a client that sends the token as Label Studio does."""
    asking = TestClient(app_of(*folders, **({"token": TOKEN} | more)))
    asking.auth = ("label-studio", TOKEN)
    return asking


def config(names):
    choices = "".join(f'<Choice value="{escape(name)}"/>' for name in names)
    return f'<View><Image name="img" value="$photo"/><Choices name="kind" toName="img">{choices}</Choices></View>'


def data_url(data):
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def noise():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        file, "png"
    )
    return file.getvalue()


def event(action, photo, choices, names, **more):
    """An event as Label Studio sends it, reduced to what the server reads."""
    result = [
        {"from_name": "kind", "to_name": "img", "type": "choices", "value": {"choices": choices}}
    ]
    result += [
        {
            "from_name": "other",
            "to_name": "img",
            "type": "choices",
            "value": {"choices": ["blurred"]},
        }
    ]
    return {
        "action": action,
        "project": {"id": 3, "label_config": config(names)},
        "task": {"id": 17, "data": {"photo": photo}},
        "annotation": {"id": 42, "task": 17, "was_cancelled": False, "result": result, **more},
    }


def deleted(number=42):
    return {"action": "ANNOTATIONS_DELETED", "project": {"id": 3}, "annotations": [{"id": number}]}


def shrunk(path):
    """Return a photo as a small JPEG file, which is encoded quickly."""
    file = io.BytesIO()
    Image.open(path).convert("RGB").resize((64, 64)).save(file, "jpeg")
    return file.getvalue()


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


def labels_of(folder, photos):
    """Return the labels that an index has for each of some photos, which are bytes."""
    rows = places.at(folder).load().having("digest", map(digest_of, photos)).to_pylist()
    return [
        sorted(row["label"] for row in rows if row["digest"] == digest_of(data)) for data in photos
    ]


def test_tasks_get_predictions_in_order(things, photos, tmp_path):
    """Data URLs and files below ``--root`` are read; other tasks, and classes without a choice, get an empty result."""
    root = tmp_path / "root"
    outside = tmp_path / "outside.jpg"
    (root / "a b").mkdir(parents=True)
    shutil.copy(photos[0][0], root / "a b" / "é.jpg")
    shutil.copy(photos[0][0], outside)
    (root / "link.jpg").symlink_to(outside)
    names = [name for _, name in photos]
    with client(things, root=root) as asking:
        path = "/label-studio/things"
        whole = asking.post(
            f"{path}/setup", json={"schema": config(names), "access_token": "secret"}
        ).json()
        version = f"things@{Index.load(things).manifest.version}"
        assert whole == {"model_version": version, "classes_without_choice": []}
        lacking = asking.post(f"{path}/setup", json={"schema": config(names[1:])}).json()
        assert lacking["classes_without_choice"] == names[:1]
        truth = asking.post(
            "/v1/classify?top=1", files=[("images", photo.read_bytes()) for photo, _ in photos]
        ).json()
        local = "/data/local-files/?d="
        good = [data_url(photo.read_bytes()) for photo, _ in photos]
        good += [local + quote("a b/é.jpg"), local + quote(str(root / "a b" / "é.jpg").lstrip("/"))]
        bad = [
            local + quote(str(outside).lstrip("/")),
            f"{local}../outside.jpg",
            f"{local}link.jpg",
        ]
        bad += [
            f"{local}%00",
            local,
            "data:image/jpeg;base64,!",
            data_url(b"no image"),
            "http://127.0.0.1:1/a.jpg",
            7,
        ]
        tasks = [{"id": i, "data": {"photo": address}} for i, address in enumerate([*bad, *good])]
        sent = {"tasks": [*tasks, {"id": 99}], "label_config": config(names[1:])}
        found = asking.post(f"{path}/predict", json=sent).json()
        assert [one["input"] for one in found["skipped"]] == [
            f"task {i}" for i in [*range(len(bad)), 99]
        ]
        assert len(found["results"]) == len(sent["tasks"])
        assert {one["model_version"] for one in found["results"]} == {version}
        assert [one["result"] for one in found["results"][: len(bad)]] == [[]] * len(bad)
        rows = [*truth["results"], *truth["results"][:1] * 2]
        for one, row in zip(found["results"][len(bad) : -1], rows, strict=True):
            value = {"choices": [row["label"]]}
            choice = {"from_name": "kind", "to_name": "img", "type": "choices", "value": value}
            known = row["label"] in names[1:]
            assert one["result"] == ([choice] if known else [])
            assert one["score"] == pytest.approx(row["probability"] if known else 0.0, abs=1e-4)
        assert asking.get(f"{path}/health").json() == {"status": "UP", "model_version": version}
        assert (
            asking.post(f"{path}/predict", json={**sent, "tasks": [{}] * 10_001}).status_code == 422
        )
    assert "secret" not in json.dumps(whole)


def test_annotations_become_shots_and_follow_their_changes(own, photos):
    names, (path, name) = [label for _, label in photos], photos[0]
    photo = data_url(path.read_bytes())
    n = Index.load(own).n

    def shots():
        rows = Index.load(own).labels.to_pylist()
        return {row["label_studio"]: row["label"] for row in rows if row.get("label_studio")}

    with client(own) as asking:

        def send(body):
            before = Index.load(own).manifest.version
            answer = asking.post(f"{PATH}/webhook", json=body)
            assert answer.status_code == 200, answer.text
            again = asking.post(f"{PATH}/webhook", json=body).json()
            assert (again["key_ids"], again["version"]) == ([], answer.json()["version"])
            assert (answer.json()["version"] > before) == bool(
                answer.json()["key_ids"]
            ) or answer.json()["skipped"]
            return dict(answer.json())

        assert len(send(event("ANNOTATION_CREATED", photo, [names[1]], names))["key_ids"]) == 1
        assert shots() == {"3/42": names[1]}
        image = asking.get(
            f"/v1/indexes/own/keys/{max(Index.load(own).labels['key_id'].to_pylist())}/image"
        )
        assert image.headers["content-type"] == "image/jpeg"
        send(event("ANNOTATION_UPDATED", photo, ["new & new"], [*names, "new & new"]))
        assert shots() == {"3/42": "new & new"}
        assert send(deleted(43))["key_ids"] == []
        assert len(send(deleted())["key_ids"]) == 1
        for skipped in (
            event("ANNOTATION_CREATED", photo, [name], names, was_cancelled=True),
            event("ANNOTATION_CREATED", "http://127.0.0.1:1/data/upload/a.jpg", [name], names),
            event("ANNOTATION_CREATED", data_url(b"no image"), [name], names),
            event("TASKS_CREATED", photo, [name], names),
            {"action": "ANNOTATION_CREATED"},
            event("ANNOTATION_CREATED", photo, [name], names, id=True),
            event("ANNOTATION_CREATED", photo, [name], names)
            | {"project": {"id": True, "label_config": config(names)}},
            deleted(True),
        ):
            assert send(skipped)["skipped"][0]["reason"]
        assert Index.load(own).n == n


@pytest.fixture
def teach(own, photos, tmp_path):
    """Send an event to a server that has just started, and return what it has skipped.

    ``teach.photos`` are bytes that are below the document root, at ``teach.at``.
    """
    root = tmp_path / "root"
    root.mkdir()

    def send(body, *expected, folder=own, status=200):
        with client(folder, root=root) as asking:
            answer = asking.post(f"/label-studio/{folder.name}/webhook", json=body)
        assert answer.status_code == status, answer.text
        assert [*map("".join, labels_of(folder, send.photos))] == [*expected]
        return " ".join(one["reason"] for one in answer.json().get("skipped", ()))

    send.photos = [shrunk(path) for path, _ in photos[:2]]
    send.files = [root / "0.jpg", root / "1.jpg"]
    for file, data in zip(send.files, send.photos, strict=True):
        file.write_bytes(data)
    return send


def says(number, file, *choices, **more):
    """An event that says that annotation ``number`` has these choices for a local file."""
    address = f"/data/local-files/?d={file.name}"
    return event("ANNOTATION_UPDATED", address, [*choices], ["a", "b"], id=number, **more)


def test_an_annotated_photo_is_decoded_once(own, teach, monkeypatch):
    decoded = []
    decode = images.decode

    def noted(data, *more, **options):
        decoded.append(data)
        return decode(data, *more, **options)

    monkeypatch.setattr(images, "decode", noted)
    teach(says(1, teach.files[0], "a"), "a", "")
    assert decoded == teach.photos[:1]


def test_a_photo_is_a_shot_while_its_annotations_agree(own, teach, caplog):
    """The annotations of two tasks, because a copy of the photo has another name, and servers that restart."""
    one = teach.files[0]
    copy = teach.files[0].with_name("copy.jpg")
    shutil.copy(one, copy)
    assert not teach(says(1, one, "a"), "a", "")
    several = teach(says(2, copy, "b"), "", "")
    assert (
        several
        == "its photo has several labels ('a', 'b'); it is no shot until its annotations agree"
    )
    assert several in caplog.text  # Label Studio does not show the answer
    assert teach(says(2, copy, "b"), "", "") == several
    assert not teach(deleted(2), "a", "")  # only the first annotation tells where the photo is
    assert "has 2 choices" in teach(says(1, one, "a", "b"), "", "")
    assert teach(says(2, copy, "b"), "", "")
    assert "has 0 choices" in teach(says(1, one, "b", was_cancelled=True), "b", "")
    key_ids = Index.load(own).having("digest", map(digest_of, teach.photos))["key_id"]
    assert not teach(says(2, copy, "a"), "a", "")
    assert Index.load(own).having("digest", map(digest_of, teach.photos))["key_id"] == key_ids
    assert not teach(says(2, copy, "b"), "b", "")
    assert teach(says(1, one, "a"), "", "")
    copy.write_bytes(teach.photos[1])
    assert "another photo" not in teach(deleted(2), "a", "")
    assert teach(says(2, one, "b"), "", "")
    one.write_bytes(teach.photos[1])
    assert "another photo is now at its address" in teach(deleted(2), "", "")
    gone = {"action": "TASKS_DELETED", "project": {"id": 3}, "tasks": [{"id": 17}]}
    assert not teach(gone, "", "")
    assert not teach(says(3, one, "b"), "", "b")


def test_a_label_stays_with_its_photo_if_the_task_shows_another(own, teach):
    one, two = teach.files
    teach(says(1, one, "a"), "a", "")
    teach(says(1, two, "b"), "", "b")
    teach(says(2, one, "b"), "b", "b")
    teach(says(1, one, "a"), "", "")
    teach(says(2, two, "a"), "a", "a")
    two.unlink()
    assert "no such file" in teach(says(2, two, "b"), "a", "b")  # it is the photo that was there
    assert "no such file" in teach(says(2, two.with_name("other.jpg"), "b"), "a", "")
    assert "no Choices" in teach(
        says(1, one, "a") | {"project": {"id": 3, "label_config": "<View/>"}}, "", ""
    )


def test_annotations_count_whatever_was_done_to_their_shots_meanwhile(own, teach, run):
    one = teach.files[0]
    teach(says(1, one, "a"), "a", "")
    teach(says(2, one, "b"), "", "")
    run("index rollback", own, 2)
    assert labels_of(own, teach.photos) == [["a"], []]
    assert "several labels" in teach(says(2, one, "b"), "", "")
    teach(deleted(1), "b", "")
    run("index rename", own, "b", "Faces")
    teach(says(3, one, "b"), "b", "")
    run("index remove", own, "--where", "label = 'b'")
    teach(deleted(3), "b", "")
    moved = own.rename(own.with_name("moved"))
    assert "several labels" in teach(says(1, one, "a"), "", "", folder=moved)
    teach(deleted(2), "a", "", folder=moved)


def test_shots_of_earlier_versions_belong_to_their_annotations(own, teach):
    """They have a column, but no database."""
    teach(says(1, teach.files[0], "a"), "a", "")
    (own / annotations.NAME).unlink()
    teach(deleted(2), "a", "")
    assert "several labels" in teach(says(2, teach.files[0], "b"), "", "")
    assert not teach(deleted(1), "b", "")
    (own / annotations.NAME).write_bytes(b"no database")
    teach(deleted(2), "b", "", status=503)


def test_a_change_that_failed_is_made_by_the_next_event(own, teach):
    """Label Studio does not send it again."""
    one, two = teach.files
    teach(says(1, one, "a"), "a", "")
    with locked(own, own):
        teach(says(1, two, "b"), "a", "", status=503)
    teach(deleted(7), "", "b")


@pytest.mark.parametrize("kind", ["lance", "s3"])
def test_annotations_of_an_index_in_a_table_or_a_bucket_are_kept(
    own, photos, tmp_path, bucket, kind
):
    """For a bucket, in the folder of uploads."""
    place = made(tmp_path, kind, "table")
    changes.clone(own, place)
    data = shrunk(photos[0][0])
    for uploads in (None,) if kind == "lance" else (tmp_path / "uploads", None):
        for number, name, labels in ((1, "a", ["a"]), (2, "b", []), (1, "b", ["b"])):
            service = Service(
                open_all([place], Backbones("cpu", "float32", "fast")), uploads=uploads
            )
            with TestClient(create_app(service, token=TOKEN)) as asking:
                asking.auth = ("", TOKEN)
                body = event("ANNOTATION_UPDATED", data_url(data), [name], ["a", "b"], id=number)
                answer = asking.post("/label-studio/table/webhook", json=body)
            if kind == "s3" and uploads is None:
                assert "--uploads FOLDER" in answer.json()["detail"]
            else:
                assert answer.status_code == 200, answer.text
                assert labels_of(place, [data]) == [labels]


class Studio:
    """Two annotators in Label Studio. ``says`` is the task, the photo and the choices of each annotation."""

    def __init__(self, seed, photos, before, names):
        self.random = random.Random(seed)
        self.photos = photos
        self.before = before
        self.names = names
        self.tasks = [0, 0, *range(1, len(photos))]  # two tasks show the same photo
        self.says = {}
        self.sent = {}
        self.count = itertools.count(1)

    def event(self):
        """Return a random event, which may repeat the last event about an annotation, or come after a later one."""
        kinds = [
            "create",
            "create",
            "update",
            "update",
            "show",
            "delete",
            "delete task",
            "repeat",
            "late",
        ]
        kind = self.random.choice(kinds)
        made = [*self.says]
        task = self.random.randrange(len(self.tasks))
        if kind == "repeat" and self.sent:
            return self.random.choice([*self.sent.values()])[-1]
        if kind == "late" and made:
            return self.random.choice(self.sent[self.random.choice(made)])
        if kind == "delete task":
            for number in [number for number in made if self.says[number][0] == task]:
                del self.says[number], self.sent[number]
            return {"action": "TASKS_DELETED", "project": {"id": 3}, "tasks": [{"id": task}]}
        if kind == "delete" and made:
            number = self.random.choice(made)
            del self.says[number]
            self.sent[number] = [deleted(number)]
            return deleted(number)
        number = next(self.count)
        action = "ANNOTATION_CREATED"
        if kind in ("update", "show") and made:
            number = self.random.choice(made)
            action = "ANNOTATION_UPDATED"
            task = self.says[number][0]
        if kind == "show":
            self.tasks[task] = self.random.randrange(len(self.photos))
        data = self.photos[self.tasks[task]]
        choices = self.random.sample(self.names, self.random.choice([1] * 8 + [0, 2]))
        self.says[number] = task, data, choices
        body = event(action, data_url(data), choices, self.names, id=number)
        body["task"]["id"] = task
        body["annotation"]["updated_at"] = f"2026-12-02T09:00:00.{next(self.count):06}Z"
        self.sent.setdefault(number, []).append(body)
        return body

    def expected(self):
        """Return the labels that each photo must have, and the photos whose annotations must be named."""
        labels, named = [], []
        for data, before in zip(self.photos, self.before, strict=True):
            said = {
                choice
                for _, photo, choices in self.says.values()
                if photo == data
                for choice in choices
            }
            labels.append([before] if before else sorted(said) if len(said) == 1 else [])
            named += [data] if said - {*labels[-1]} else []
        return labels, named


@pytest.mark.parametrize("seed", few(range(200), 6))
def test_a_label_is_what_the_annotations_say_after_any_events(own, photos, seed):
    """After each event of two annotators, and over restarts of the server, against a dictionary."""
    had = Index.load(own).labels.to_pylist()
    known = [had[0], had[-1]]
    data = [shrunk(path) for path, _ in photos[:3]] + [
        Path(row["source"]).read_bytes() for row in known
    ]
    studio = Studio(
        seed, data, [None] * 3 + [row["label"] for row in known], ["new", "Faces", had[0]["label"]]
    )
    for _ in range(3):
        with client(own) as asking:
            for _ in range(6):
                body = studio.event()
                answer = asking.post(f"{PATH}/webhook", json=body)
                assert answer.status_code == 200, answer.text
                labels, named = studio.expected()
                assert labels_of(own, data) == labels, body["action"]
                about = [
                    said for number, said in studio.says.items() if studio.sent[number][-1] is body
                ]
                assert answer.json()["skipped"] or all(photo not in named for _, photo, _ in about)
    assert Index.load(own).find(key_ids=[row["key_id"] for row in had]).select(
        ["label", "source"]
    ).to_pylist() == [{"label": row["label"], "source": row["source"]} for row in had]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_a_killed_server_has_learnt_an_event_or_not(own, photos, warm_path, seed):
    """If it was killed between the annotation and its shots, the next event about any annotation completes them."""
    data = [shrunk(path) for path, _ in photos[:3]]
    studio = Studio(seed, data, [None] * 3, ["new", "Faces"])
    with (
        server(own, token=TOKEN, path=warm_path) as (address, process),
        httpx.Client(auth=("", TOKEN)) as asking,
    ):
        labels = after = studio.expected()[0]
        while labels == after:
            body = studio.event()
            after = studio.expected()[0]
            if labels == after or len(studio.sent) < 3:
                assert asking.post(f"{address}{PATH}/webhook", json=body).is_success
                labels = after
        threading.Timer(random.Random(seed).random() / 8, process.kill).start()
        with suppress(httpx.TransportError):
            assert asking.post(f"{address}{PATH}/webhook", json=body).is_success
            labels = after
        process.wait()
    with client(own) as asking:
        assert asking.post(f"{PATH}/webhook", json=deleted(0)).is_success
    assert labels_of(own, data) in (labels, after)


def test_an_event_counts_even_if_label_studio_stops_waiting(own, photos):
    """By default, it waits for one second."""
    names = [label for _, label in photos]
    n = Index.load(own).n
    body = event("ANNOTATION_CREATED", data_url(photos[0][0].read_bytes()), names[:1], names)
    with (
        running(app_of(own, token=TOKEN)) as (host, port),
        httpx.Client(auth=("", TOKEN), timeout=60) as asking,
    ):
        address = f"http://{host}:{port}"
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                asking.post(
                    f"{address}{PATH}/webhook", json=body, timeout=httpx.Timeout(60, read=0.001)
                )
        asking.post(f"{address}{PATH}/webhook", json=deleted(43))  # waits for the others
        assert Index.load(own).n == n + 1


def test_the_token_is_accepted_as_a_password_on_these_routes_only(own):
    sent = {"schema": config(Index.load(own).class_names)}
    plain = base64.b64encode(TOKEN.encode()).decode()
    with client(own) as asking:

        def status(**more):
            return asking.post(f"{PATH}/setup", json=sent, **more).status_code

        assert status() == 200
        assert asking.delete("/v1/indexes/own/keys?key_id=0").status_code == 401
        assert (
            status(headers={"sec-fetch-site": "same-origin"}) == 401
        )  # browsers repeat passwords unasked
        assert status(auth=("label-studio", "wrong")) == 401
        asking.auth = None
        for text in ("", "Basic !", "Basic", f"Basic {TOKEN}", f"Basic {plain}"):
            assert [
                asking.post(f"{PATH}/{what}", json={}, headers={"authorization": text}).status_code
                for what in ("setup", "predict", "webhook")
            ] == [401] * 3
        assert status(headers={"authorization": f"Bearer {TOKEN}"}) == 200
    with client(own, token=None) as asking:
        assert asking.get(f"{PATH}/health").status_code == 200
        assert asking.post(f"{PATH}/webhook", json=deleted()).status_code == 403


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            '<View><Text name="t" value="$t"/><Choices name="a" toName="t"/><Image name="i" value="$p"/>'
            '<Choices name="b" toName="i" perRegion="true"/><Choices name="c" toName="i"><Choice value="x"/>'
            '<Choice value="y" alias="z"/></Choices><Choices name="d" toName="i"/></View>',
            ("c", "i", "p", {"x", "z"}),
        ),
        (
            '<View><Choices name="c" toName="i"><Choice value="x"/></Choices></View>',
            "has no Choices tag",
        ),
        (
            '<View><Image name="i" valueList="$p"/><Choices name="c" toName="i"/></View>',
            "has no Choices tag",
        ),
        ('<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>', "without a DOCTYPE"),
        ("<View>" * 200_000, "at most 1,048,576"),
        ("<View>" * 100_000, "is not XML"),
        ("<View><Image", "is not XML"),
        ("<View>\x00</View>", "is not XML"),
        ("<View>\ud800</View>", "is not XML"),
        (None, "must be XML"),
    ],
    ids=lambda value: (
        value[:20] if isinstance(value, str) else ""
    ),  # a set has another order in each process
)
def test_the_first_choices_of_an_image_count(text, found):
    if isinstance(found, tuple):
        assert tuple(interface_of(text)) == found
    else:
        with pytest.raises(InputError, match=found):
            interface_of(text)


@contextmanager
def studio(uploads):
    """Run a server that behaves like Label Studio, and yield its address and the list of its requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, data):
            self.send_response(status)
            self.send_header("location", next(iter(uploads)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            asked.append((self.path, self.headers["authorization"]))
            known = self.headers["authorization"] in ("Bearer short", "Token legacy")
            found = uploads.get(self.path) if known else None
            self.answer(
                307 if "moved" in self.path else 404 if found is None else 200, found or b""
            )

        def do_POST(self):
            key = json.loads(self.rfile.read(int(self.headers["content-length"])))["refresh"]
            self.answer(200, json.dumps({"access": "short"} if key == "a.b.c" else {}).encode())

        def log_message(self, *_): ...

    with answering(Handler) as address:
        yield address, asked


def test_only_uploads_of_the_configured_label_studio_are_fetched(things, photos, monkeypatch):
    data = photos[0][0].read_bytes()
    interface = config([name for _, name in photos])
    encoded = [
        f"/sub/data/{path}"
        for path in ("%2e%2e/api", "..%2fapi", "%2E%2E/%2E%2E/x", "upload/.%2e/%2e./api")
    ]
    uploads = {
        "/sub/data/upload/a.jpg": data,
        "/sub/data/upload/big.jpg": bytes(2 << 20),
        "/sub/api/a.jpg": data,
    }
    uploads |= dict.fromkeys(encoded, data)
    with (
        studio(uploads) as (url, asked),
        studio({"/sub/data/upload/a.jpg": data}) as (other, elsewhere),
    ):
        good = ["/sub/data/upload/a.jpg", f"{url}/sub/data/upload/a.jpg"]
        host = other.removeprefix("http://")
        bad = [
            "/sub/data/upload/moved.jpg",
            "/sub/data/upload/big.jpg",
            "/sub/data/../api/a.jpg",
            "/sub/api/a.jpg",
        ]
        bad += [f"{at}/sub/data/upload/a.jpg" for at in (other, f"//{host}", f"{url}@{host}")]
        bad += [*encoded, *(f"{url}{path}" for path in encoded)]
        bad += ["http://[", "s3://bucket/data/upload/a.jpg", "file:///sub/data/upload/a.jpg"]
        sent = {
            "tasks": [{"data": {"photo": one}} for one in [*good, *bad]],
            "label_config": interface,
        }
        monkeypatch.setenv("LABEL_STUDIO_URL", f"{url}/sub")
        keys = {
            "a.b.c": "Bearer short",
            "legacy": "Token legacy",
            "x.y.z": None,
            "wrong": "Token wrong",
        }
        for key, used in keys.items():
            monkeypatch.setenv("LABEL_STUDIO_API_KEY", key)
            with client(things, limits=Limits(bytes=1 << 20)) as asking:
                found = asking.post("/label-studio/things/predict", json=sent).json()["results"]
            right = [key in ("a.b.c", "legacy")] * len(good)
            assert [bool(one["result"]) for one in found] == right + [False] * len(bad)
            expected = {(True, used)} if used else set()
            assert {
                (path.startswith("/sub/data/upload/") and "%" not in path, header)
                for path, header in asked
            } == expected
            asked.clear()
        assert not elsewhere
    for address, key in (
        ("ftp://a", "k"),
        ("nowhere", "k"),
        ("http://a:b", "k"),
        ("http://a", ""),
        ("", "k"),
    ):
        with pytest.raises(UsageError, match="LABEL_STUDIO_URL"):
            LabelStudioPhotos(None, 1, {"LABEL_STUDIO_URL": address, "LABEL_STUDIO_API_KEY": key})


def test_another_process_may_add_a_photo_while_it_is_fetched(own, teach, monkeypatch):
    """It then has the photo from before, so no annotation makes a second shot."""
    photo = teach.photos[0]
    address = "/data/upload/a.jpg"

    class Uploads(dict):
        late = False

        def get(self, path):
            if self.late:
                source = of_images([str(teach.files[0])], "another", ["b"], ["b"])
                known = Served(own, Backbones("cpu", "float32", "fast")).now.backbone
                changes.add(own, source, Reader(known))
            return super().get(path)

    uploads = Uploads({address: photo})
    with studio(uploads) as (url, _):
        monkeypatch.setenv("LABEL_STUDIO_URL", url)
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", "legacy")
        for number, label in ((1, "a"), (2, "b")):
            said = event("ANNOTATION_UPDATED", address, [label], ["a", "b"], id=number)
            teach(said, "a" if number == 1 else "", "")
        uploads.late = True
        several = teach(deleted(2), "b", "")
    assert (
        several
        == "its photo has several labels ('a', 'b'); the index had it before, and keeps its label"
    )


@needs_real
def test_photoprism_gets_the_labels_of_photos_that_match(own, photos):
    """The request and the answer are those of PhotoPrism's ``ApiRequest`` and ``ApiResponse``."""
    fit_index(own)
    (path, name), no_match = photos[0], data_url(noise())
    photo = path.read_bytes()

    def ask(asking, *images, **more):
        body = {
            "id": "b0db2187",
            "model": "own",
            "version": "latest",
            "suffix": "",
            "stream": False,
            "images": images,
        }
        return asking.post("/api/v1/vision/labels", json=body, auth=None, **more)

    with client(own) as asking:
        [truth] = asking.post("/v1/classify?top=1", files={"images": photo}).json()["results"]
        p = pytest.approx(truth["probability"], abs=1e-4)
        assert ask(asking, data_url(photo), no_match).json() == {
            "id": "b0db2187",
            "code": 200,
            "model": {
                "type": "labels",
                "name": "own",
                "version": str(Index.load(own).manifest.version),
            },
            "result": {
                "labels": [{"name": name, "source": "image", "confidence": p, "topicality": p}]
            },
        }
        assert ask(asking, no_match, params={"index": "own"}).json()["result"] == {"labels": []}
        for images in (
            (),
            ("http://127.0.0.1/a.jpg",),
            ("/etc/passwd",),
            (data_url(b""),),
            (no_match,) * 65,
        ):
            assert ask(asking, *images).status_code == 422
        sent = {
            "tasks": [{"id": 1, "data": {"photo": no_match}}],
            "label_config": config(Index.load(own).class_names),
        }
        answer = asking.post(f"{PATH}/predict", json=sent).json()
        assert (answer["results"][0]["result"], answer["skipped"]) == ([], [])
    with client(own, private=TOKEN) as asking:
        assert ask(asking, no_match).status_code == 401
        assert (
            ask(asking, no_match, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        )


def test_any_json_is_answered_or_refused(own):
    """Each body is valid except for one value."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    scalars |= st.sampled_from(["\ud800", 2**64])
    names = st.sampled_from(["id", "data", "photo", "result", "value", "choices", "from_name", "x"])
    anything = st.recursive(
        scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(names, part, max_size=3)
    )
    photo = data_url(noise())
    told = event("ANNOTATION_CREATED", photo, ["a"], ["a"], updated_at="2026-12-02T09:00:00Z")
    tasks = {"tasks": [told["task"]]}
    valid = [
        ("label-studio/own/setup", {"schema": config(["a"])}),
        ("label-studio/own/predict", tasks | {"label_config": config(["a"])}),
        ("label-studio/own/webhook", told),
        ("label-studio/own/webhook", deleted()),
        ("label-studio/own/webhook", told | tasks | {"action": "TASKS_DELETED"}),
        ("api/v1/vision/labels", {"id": "x", "images": [photo]}),
    ]

    with client(own) as asking:

        @given(st.sampled_from(valid), st.data())
        @tries(400)
        def ask(case, data):
            path, body = case
            body = altered(data.draw, copy.deepcopy(body), anything)
            answer = asking.post(
                f"/{path}", content=json.dumps(body), headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 422)

        ask()


@contextmanager
def real_studio(data, root):
    """Run a real Label Studio, and yield a client of a user who is signed in."""
    program = referee(("label-studio==1.23.2",)).with_name("label-studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name, word = "a@example.org", "secret123"
    command = [
        program,
        "start",
        "--no-browser",
        "--port",
        str(port),
        "--username",
        name,
        "--password",
        word,
    ]
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(root),
        "ML_BLOCK_LOCAL_IP": "false",
        "SSRF_PROTECTION_ENABLED": "false",
        "LATEST_VERSION_CHECK": "0",
        "COLLECT_ANALYTICS": "false",
        "SENTRY_DSN": "",
    }
    with (data / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=120, follow_redirects=True
        ) as asking:
            for _ in range(240):
                with suppress(httpx.ConnectError):
                    if asking.get("/health").is_success:
                        break
                assert process.poll() is None, (data / "log").read_text()
                time.sleep(0.5)
            asking.headers["referer"] = str(asking.base_url)
            for path, form in (
                ("/user/login/", {"email": name, "password": word}),
                ("/api/token/", {}),
            ):
                asking.get("/user/login/")
                asking.headers["x-csrftoken"] = asking.cookies["csrftoken"]
                answer = asking.post(path, data=form)
            asking.headers["x-token"] = answer.raise_for_status().json()["token"]
            yield asking
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_real_label_studio_gets_predictions_that_follow_annotations(
    own, photos, tmp_path, monkeypatch, warm_path
):
    """Label Studio reads local files and uploads, is told of the token by the address only, and deletes a shot."""
    root = tmp_path / "root" / "set"
    root.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for number in (0, 1):
        Image.open(photos[0][0]).convert("RGB").resize((200, 150 + number)).save(
            root / f"{number}.jpg"
        )
    label = "something new"
    interface = config([*Index.load(own).class_names, label])
    with real_studio(tmp_path / "data", root.parent) as asking:

        def post(path, /, **body):
            answer = asking.post(
                f"/api/{path}", **({"json": body} if "files" not in body else body)
            )
            assert answer.is_success, answer.text
            return answer.json()

        def predicted(task):
            """Ask for predictions of all tasks, and return the newest one of a task."""
            every = {"all": True, "excluded": []}
            post(f"dm/actions?id=retrieve_tasks_predictions&project={project}", selectedItems=every)
            newest = max(
                asking.get(f"/api/predictions?task={task}").json(), key=lambda one: one["id"]
            )
            return newest["result"][0]["value"]["choices"][0], newest["model_version"]

        monkeypatch.setenv("LABEL_STUDIO_URL", str(asking.base_url))
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", asking.headers["x-token"])
        with server(own, "--root", root.parent, token="to-ken", path=warm_path) as (address, _):
            project = post("projects", title="Things", label_config=interface)["id"]
            url = address.replace("//", "//label-studio:to-ken@") + PATH
            assert post("ml", project=project, url=url)["model_version"] == "own@1"
            storage = post(
                "storages/localfiles", project=project, path=str(root), use_blob_urls=True
            )
            post(f"storages/localfiles/{storage['id']}/sync")
            post(
                f"projects/{project}/import",
                files={"file": ("up.jpg", (root / "0.jpg").read_bytes(), "image/jpeg")},
            )
            tasks = sorted(
                one["id"]
                for one in asking.get(f"/api/tasks?project={project}&fields=all").json()["tasks"]
            )
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
            shown = {
                task: asking.get(f"/api/tasks/{task}").json()["data"]["photo"] for task in tasks
            }
            [copy] = [task for task, photo in shown.items() if photo.endswith("0.jpg")]
            [upload] = [task for task, photo in shown.items() if photo.endswith("up.jpg")]
            post(f"tasks/{upload}/annotations", result=result)
            other = event("", "", [Index.load(own).class_names[0]], [])["annotation"]["result"][:1]
            for undo in ("annotations", "tasks"):
                assert Index.load(own).counts[-1] == 1
                made = {
                    "tasks": copy,
                    "annotations": post(f"tasks/{copy}/annotations", result=other)["id"],
                }
                assert Index.load(own).counts[-1] == 0
                asking.delete(f"/api/{undo}/{made[undo]}").raise_for_status()
            assert Index.load(own).counts[-1] == 1
