"""Labelling photos: the order of the queue, the session over HTTP, and the command."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import caltech_photos, server

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import open_inputs
from retrieval_tip.errors import StoreError
from retrieval_tip.index import places
from retrieval_tip.labelling.queue import FIXED, QUEUED, RANDOM_EVERY, Queue, Queued
from retrieval_tip.server import labelling as module
from retrieval_tip.server.app import create_app
from retrieval_tip.server.labelling import Labelling
from retrieval_tip.server.served import Backbones, Maker, Served

TOKEN = "a token"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


@given(st.integers(1, 60), st.data())
def test_every_photo_is_shown_once_and_skipped_photos_come_last(m: int, data: st.DataObject) -> None:
    queue, skipped = Queue(m), data.draw(st.sets(st.integers(0, m - 1)))
    labelled: list[int] = []
    while shown := [one.photo for one in queue.show(labelled)]:
        assert len(set(shown)) == len(shown) == min(QUEUED, m - len(labelled))
        assert not set(shown) & set(labelled)
        if shown[0] in skipped - set(labelled) and set(range(m)) - skipped - set(labelled):
            queue.skip(shown[0])
        else:
            labelled.append(shown[0])
        if data.draw(st.booleans()):
            picks = data.draw(st.permutations(range(m)))
            queue.suggest([(photo, "") for photo in picks if photo not in skipped], labelled, len(labelled))
    assert sorted(labelled) == [*range(m)]
    assert set(labelled[m - len(skipped) :]) == skipped


@given(st.integers(0, 30), st.permutations(range(60)))
def test_suggestions_come_after_the_fixed_photos_and_every_fifth_photo_is_random(
    labelled: int, picks: list[int]
) -> None:
    queue, taken = Queue(60), set(range(labelled))
    front = queue.show(taken)[:FIXED]
    queue.suggest([(photo, "because") for photo in picks], taken, labelled)
    shown = queue.show(taken)
    assert shown[:FIXED] == front
    at_random = [(labelled + place) % RANDOM_EVERY == RANDOM_EVERY - 1 for place in range(FIXED, QUEUED)]
    assert [one.picked == "random" for one in shown[FIXED:]] == at_random
    drawn = {one.photo for one in shown if one.picked == "random"}
    wanted = [photo for photo in picks if photo not in taken and photo not in {one.photo for one in front}]
    suggested = [one.photo for one in shown[FIXED:] if one.picked == "suggested"]
    assert [photo for photo in wanted if photo not in drawn - set(suggested)][: len(suggested)] == suggested
    queue.put_first(Queued(59, "random"))
    assert queue.show(taken)[0].photo == 59


@pytest.fixture(scope="module")
def pool(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Labels of photos of four classes, by path. One photo is a near copy; the folder also has a damaged file."""
    folder = tmp_path_factory.mktemp("pool")
    found = {}
    for number, (path, label) in enumerate(caltech_photos(shared, "train", 4, 6)):
        found[shutil.copy(path, folder / f"{number}.jpg").as_posix()] = label
    copy = folder / "copy.jpg"
    Image.open(folder / "0.jpg").convert("RGB").save(copy, quality=70)
    (folder / "damaged.jpg").write_bytes(b"no image")
    return found | {copy.as_posix(): found[(folder / "0.jpg").as_posix()]}


class Client:
    """An HTTP client of a labelling session that knows the right labels."""

    def __init__(self, pool: dict[str, str], place: Path, backbone: Backbone, *classes: str) -> None:
        self.pool, backbones = pool, Backbones("cpu", "float32", None, backbone)
        self.sources = list(open_inputs([str(Path(next(iter(pool))).parent)]))
        labelling = Labelling(place, self.sources, Encoder(backbone), classes)
        served = [Served(place, backbones)] if places.at(place).exists() else []
        maker = Maker(place.parent, backbone, backbones)
        self.app = create_app({one.name: one for one in served}, token=TOKEN, maker=maker, labelling=labelling)

    def __enter__(self) -> Client:
        self.http = TestClient(self.app)
        self.http.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.__exit__(*error)

    def status(self) -> dict[str, Any]:
        return self.http.get("/v1/label").json()

    def set(self, labels: dict[int, str | None], *skip: int) -> dict[str, Any]:
        body = {"labels": [{"photo": photo, "label": label} for photo, label in labels.items()], "skip": skip}
        answer = self.http.post("/v1/label", json=body, headers=AUTHORISED)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def label(self, number: int) -> list[dict[str, Any]]:
        """Give the next photos their right labels, and return these photos."""
        done = []
        for _ in range(number):
            queue = self.status()["queue"]
            done.append(next(one for one in queue if one["name"] in self.pool))  # not the damaged file
            self.set({done[-1]["photo"]: self.pool[done[-1]["name"]]})
        return done

    def settled(self) -> dict[str, Any]:
        """Wait until the session is idle and every photo is encoded; return its state."""
        for _ in range(600):
            state = self.status()
            if not state["busy"] and state["encoded"] == len(self.pool):
                return state
            time.sleep(0.05)
        raise AssertionError(state)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "WAIT", 0.05)
    return tmp_path / "idx"


def opened(place: Path) -> AnsweringIndex:
    return places.at(place).load(device="cpu")


def test_labels_build_an_index_that_guesses_and_sessions_can_be_resumed(
    pool: dict[str, str], place: Path, lit_mini: Backbone
) -> None:
    with Client(pool, place, lit_mini) as client:
        first = client.label(1)
        assert first[0]["picked"] == "random"
        assert first[0]["guesses"] == []
        state = client.settled()
        assert (state["photos"], state["labelled"], state["unsaved"]) == (25, 1, 0)  # without the damaged file
        done = first + client.label(9)
        state = client.settled()
        assert state["labelled"] == 10
        assert {one["label"]: one["photos"] for one in state["classes"]} == _counts(pool[one["name"]] for one in done)
        assert not {one["photo"] for one in state["queue"]} & {one["photo"] for one in done}
    index = opened(place)
    labels = {row["source"]: row for row in index.labels.to_pylist()}
    assert {name: row["label"] for name, row in labels.items()} == {one["name"]: pool[one["name"]] for one in done}
    assert {name: row["picked"] for name, row in labels.items()} == {one["name"]: one["picked"] for one in done}
    assert {one["picked"] for one in done} == {"random", "suggested"}
    with Client(pool, place, lit_mini) as client:
        state = client.settled()
        assert state["labelled"] == 10
        shown = state["queue"][0]
        feature = Encoder(lit_mini).encode(next(open_inputs([shown["name"]]))).features
        answer = index.classify(feature, 9, norms="keep")[0]
        assert [one["label"] for one in shown["guesses"]] == answer.labels
        assert [one["probability"] for one in shown["guesses"]] == pytest.approx(answer.probabilities, abs=1e-4)
        client.label(15)
        assert client.settled()["queue"] == []
    assert opened(place).n == 25


def _counts(names: Any) -> dict[str, int]:
    listed = [*names]
    return {name: listed.count(name) for name in listed}


def test_near_identical_photos_can_be_labelled_together(pool: dict[str, str], place: Path, lit_mini: Backbone) -> None:
    with Client(pool, place, lit_mini) as client:
        client.settled()
        pairs = {}
        while len(pairs) < 2:
            state = client.settled()
            pairs |= {Path(one["name"]).stem: one for one in state["queue"] if Path(one["name"]).stem in ("0", "copy")}
            if not pairs:
                client.set({}, *(one["photo"] for one in state["queue"]))
                client.label(1)
                continue
            break
        one = next(iter(pairs.values()))
        other = one["similar"][0]
        state = client.set({one["photo"]: "pair", other: "pair"})
        assert state["labelled"] >= 2
        client.settled()
    rows = opened(place).labels.to_pylist()
    assert {Path(row["source"]).stem for row in rows if row["label"] == "pair"} >= {"0", "copy"}


def test_undo_restores_the_previous_version_and_labels_can_be_changed(
    pool: dict[str, str], place: Path, lit_mini: Backbone
) -> None:
    with Client(pool, place, lit_mini) as client:
        (first,) = client.label(1)
        client.settled()
        state = client.set({first["photo"]: None})  # the index keeps its only label until there is another
        assert state["labelled"] == 0
        assert client.settled()["queue"][0]["photo"] == first["photo"]
        client.set({first["photo"]: "another class"})
        assert client.settled()["labelled"] == 1
        assert opened(place).labels["label"].to_pylist() == ["another class"]
        second, third = client.label(2)
        before = client.settled()["version"]
        typo = client.status()["queue"][0]
        client.set({typo["photo"]: "tpyo"})
        client.settled()
        assert "tpyo" in opened(place).class_names
        state = client.set({typo["photo"]: None})
        assert (state["labelled"], state["queue"][0]["photo"]) == (3, typo["photo"])
        assert client.settled()["version"] > before
        assert "tpyo" not in opened(place).class_names  # the previous version was restored
        client.set({second["photo"]: None})
        client.settled()
        assert sorted(opened(place).labels["source"].to_pylist()) == sorted([first["name"], third["name"]])
        state = client.set({third["photo"]: "x"}, client.status()["queue"][0]["photo"])
        client.settled()
    assert dict(zip(*(opened(place).labels[name].to_pylist() for name in ("source", "label")), strict=True)) == {
        first["name"]: "another class", third["name"]: "x",
    }  # fmt: skip


def test_labels_are_saved_later_if_saving_fails(
    pool: dict[str, str], place: Path, lit_mini: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = module.save_labels, True

    def save(*arguments: Any) -> None:
        if full:
            raise StoreError("idx: no space left on device")
        real(*arguments)

    monkeypatch.setattr(module, "save_labels", save)
    monkeypatch.setattr(module, "RETRY", 0.05)
    with Client(pool, place, lit_mini) as client:
        client.label(2)
        for _ in range(100):
            if (state := client.status())["problem"]:
                break
            time.sleep(0.05)
        assert state["problem"] == "idx: no space left on device"
        assert (state["labelled"], state["unsaved"], state["version"]) == (2, 2, None)
        full = False
        assert client.settled()["problem"] is None
    assert opened(place).n == 2


def test_deleted_photos_are_left_out(shared: Path, place: Path, lit_mini: Backbone, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    images = [shutil.copy(path, tmp_path / "pool") for path, _ in caltech_photos(shared, "train", 2, 2)]
    with Client(dict.fromkeys(map(str, images), "x"), place, lit_mini) as client:
        gone, other = client.settled()["queue"][:2]
        Path(gone["name"]).unlink()
        client.set({gone["photo"]: "x"})
        client.set({other["photo"]: "x"})
        state = client.settled()
        assert (state["photos"], state["labelled"], state["problem"]) == (3, 1, None)
        Path(state["queue"][0]["name"]).unlink()
        client.set({state["queue"][0]["photo"]: "x"})  # no photo in the batch can be read
        for _ in range(100):
            if (state := client.status())["problem"]:
                break
            time.sleep(0.05)
        assert "no such file" in state["problem"]
        assert (state["photos"], state["labelled"], state["unsaved"]) == (2, 1, 0)


def test_photos_are_sorted_by_label_or_answer(
    pool: dict[str, str], place: Path, lit_mini: Backbone, tmp_path: Path
) -> None:
    with Client(pool, place, lit_mini) as client:
        sort = {"url": "/v1/label/sort", "json": {"into": str(tmp_path / "sorted")}, "headers": AUTHORISED}
        assert client.http.post(**sort).status_code == 404  # no labels yet
        labelled = client.label(7)
        client.set({labelled[0]["photo"]: "a class of its own"})
        client.settled()
        answer = client.http.post(**sort).json()
        assert answer["summary"].startswith("copied 25 photos")
        assert answer["undo"] == f"retrieval-tip sort --undo --into {tmp_path / 'sorted'}"
    for one in labelled:
        label = "a class of its own" if one is labelled[0] else pool[one["name"]]
        assert (tmp_path / "sorted" / label / Path(one["name"]).name).is_file()
    assert len([*(tmp_path / "sorted").glob("*/*.jpg")]) == 25


def test_invalid_requests_are_refused(pool: dict[str, str], place: Path, lit_mini: Backbone) -> None:
    with Client(pool, place, lit_mini, "owl") as client:
        post = client.http.post
        assert post("/v1/label", json={"labels": []}).status_code == 401
        for body, status in (
            ({"labels": [{"photo": 99, "label": "x"}]}, 404), ({"skip": [99]}, 404),
            ({"labels": [{"photo": 0, "label": " "}]}, 422), ({"labels": [{"photo": -1, "label": "x"}]}, 422),
            ({"labels": [{"photo": 0, "label": "a\nb"}]}, 422),
        ):  # fmt: skip
            assert post("/v1/label", json=body, headers=AUTHORISED).status_code == status, body
        state = client.settled()
        assert (state["labelled"], state["classes"]) == (0, [{"label": "owl", "photos": 0}])
        image = client.http.get(f"/v1/label/photos/{state['queue'][0]['photo']}/image?size=64")
        assert image.headers["content-type"] == "image/jpeg"
        assert client.http.get("/v1/label/photos/99/image").status_code == 404
        damaged = client.sources[0].sources.index(next(n for n in client.sources[0].sources if "damaged" in n))
        assert client.http.get(f"/v1/label/photos/{damaged}/image").status_code == 404
    assert not place.exists()


def test_a_killed_session_keeps_its_labels_and_a_stopped_one_saves_the_last_label(
    pool: dict[str, str], tmp_path: Path, shared: Path, warm_path: str
) -> None:
    options: tuple[object, ...] = (Path(next(iter(pool))).parent, "--into", tmp_path / "idx")
    model = "--model", f"local-dir:{shared / 'models' / 'lit-mini'}", "--classes", "owl, crab"
    with server(*options, *model, path=warm_path, command="label") as (url, process):
        state = asked(url)
        assert [one["label"] for one in state["classes"]] == ["owl", "crab"]
        for one in [one for one in state["queue"] if one["name"] in pool][:5]:  # without the damaged file
            asked(url, {"labels": [{"photo": one["photo"], "label": pool[one["name"]]}]})
        until = time.monotonic() + 60
        while asked(url)["unsaved"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert opened(tmp_path / "idx").n == 5
    with server(*options, path=warm_path, command="label") as (url, _):  # uses the encoder of the index
        assert asked(url)["labelled"] == 5
        one = next(one for one in asked(url)["queue"] if one["name"] in pool)
        asked(url, {"labels": [{"photo": one["photo"], "label": "owl"}]})
    assert opened(tmp_path / "idx").n == 6


def asked(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the session's state from the printed address, or send labels and return the new state."""
    address, _, token = url.partition("/#token=")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/label", data, headers)) as answer:
        return json.load(answer)


def test_features_cannot_be_labelled(shared: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    table = shared / "data" / "clip-food9" / "test.parquet"
    told = run("label", table, "--into", tmp_path / "idx", "--model", f"local-dir:{shared / 'models' / 'lit-mini'}")
    assert told.exit_code == 1
    assert "labelling needs photos" in told.stderr
