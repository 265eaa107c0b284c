"""Labelling photos: the order of the queue, the session over HTTP, and the command."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cameras import encoded
from conftest import LIT_MINI, failed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import InProcess, asked, caltech_photos, labelling_app, server

from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.source import whole_file
from retrieval_tip.data.sources import open_inputs
from retrieval_tip.errors import StoreError
from retrieval_tip.index import changes, places
from retrieval_tip.labelling import review
from retrieval_tip.labelling.clips import by_file
from retrieval_tip.labelling.labels import SessionPhotos
from retrieval_tip.labelling.pool import Pool
from retrieval_tip.labelling.queue import FIXED, QUEUED, RANDOM_EVERY, Queue, Queued
from retrieval_tip.labelling.session import Change, Dropped, Session
from retrieval_tip.server import session as module
from retrieval_tip.server.guard import Limits
from retrieval_tip.settings import Ask

TOKEN = "a token"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


@given(st.integers(1, 60), st.data())
def test_every_photo_is_shown_once_and_skipped_photos_come_last(m, data):
    queue = Queue(range(m))
    skipped = data.draw(st.sets(st.integers(0, m - 1)))
    labelled = []
    while shown := [one.photo for one in queue.show(labelled)]:
        assert len(set(shown)) == len(shown) == min(QUEUED, m - len(labelled))
        assert not set(shown) & set(labelled)
        if shown[0] in skipped - set(labelled) and set(range(m)) - skipped - set(labelled):
            queue.skip(shown[0])
        else:
            labelled.append(shown[0])
        if data.draw(st.booleans()):
            picks = data.draw(st.permutations(range(m)))
            queue.suggest(
                [(photo, "") for photo in picks if photo not in skipped], labelled, len(labelled)
            )
    assert sorted(labelled) == [*range(m)]
    assert set(labelled[m - len(skipped) :]) == skipped


@given(st.integers(0, 30), st.permutations(range(60)))
def test_suggestions_come_after_the_fixed_photos_and_every_fifth_photo_is_random(labelled, picks):
    queue = Queue(range(60))
    taken = set(range(labelled))
    front = queue.show(taken)[:FIXED]
    queue.suggest([(photo, "because") for photo in picks], taken, labelled)
    shown = queue.show(taken)
    assert shown[:FIXED] == front
    at_random = [
        (labelled + place) % RANDOM_EVERY == RANDOM_EVERY - 1 for place in range(FIXED, QUEUED)
    ]
    assert [one.picked == "random" for one in shown[FIXED:]] == at_random
    drawn = {one.photo for one in shown if one.picked == "random"}
    wanted = [
        photo for photo in picks if photo not in taken and photo not in {one.photo for one in front}
    ]
    suggested = [one.photo for one in shown[FIXED:] if one.picked == "suggested"]
    assert [photo for photo in wanted if photo not in drawn - set(suggested)][
        : len(suggested)
    ] == suggested
    queue.put_first(Queued(59, "random"))
    assert queue.show(taken)[0].photo == 59


@pytest.fixture(scope="module")
def pool(shared, tmp_path_factory):
    """Labels of photos of four classes, by path. One photo is a near copy; the folder also has a damaged file."""
    folder = tmp_path_factory.mktemp("pool")
    found = {}
    for number, (path, label) in enumerate(caltech_photos(shared, "train", 4, 6)):
        found[shutil.copy(path, folder / f"{number}.jpg").as_posix()] = label
    copy = folder / "copy.jpg"
    Image.open(folder / "0.jpg").convert("RGB").save(copy, quality=70)
    (folder / "damaged.jpg").write_bytes(b"no image")
    return found | {copy.as_posix(): found[(folder / "0.jpg").as_posix()]}


class Client(InProcess):
    """An HTTP client of a labelling session that knows the right labels."""

    def __init__(self, pool, place, backbone, *classes, limits=None):
        self.pool = pool
        self.sources = list(open_inputs([str(Path(next(iter(pool))).parent)]))
        self.names = [name for source in self.sources for name in source.sources]
        self.cache = EncodingCache.default()
        reader = Reader(backbone, cache=self.cache)
        self.app = labelling_app(place, self.sources, reader, classes, limits, TOKEN)

    def __exit__(self, *error):
        super().__exit__(*error)
        self.cache.close()

    def status(self):
        return self.http.get("/v1/label").json()

    def set(self, labels, *skip, **names):
        body = {"skip": skip, **names}
        body["labels"] = [{"photo": photo, "label": label} for photo, label in labels.items()]
        answer = self.http.post("/v1/label", json=body, headers=AUTHORISED)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def label(self, number):
        """Give the next photos their right labels, and return these photos."""
        done = []
        for _ in range(number):
            queue = self.status()["queue"]
            done.append(
                next(one for one in queue if one["name"] in self.pool)
            )  # not the damaged file
            self.set({done[-1]["photo"]: self.pool[done[-1]["name"]]})
        return done

    def settled(self):
        """Wait until the session is idle and every photo is encoded; return its state."""
        return self.until(lambda state: not state["busy"])

    def until(self, done):
        for _ in range(1200):
            if done(state := self.status()):
                return state
            time.sleep(0.05)
        raise AssertionError(state)

    def number(self, stem):
        return next(number for number, name in enumerate(self.names) if Path(name).stem == stem)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.05)
    return tmp_path / "idx"


def opened(place):
    return places.at(place).load()


def labels_of(place):
    """Return the labels in the index by source. No source may have two keys."""
    rows = opened(place).labels.to_pylist()
    assert len({row["source"] for row in rows}) == len({row["digest"] for row in rows}) == len(rows)
    return {row["source"]: row["label"] for row in rows}


def test_labels_build_an_index_that_guesses_and_sessions_can_be_resumed(pool, place, lit_mini):
    with Client(pool, place, lit_mini) as client:
        first = client.label(1)
        assert (first[0]["picked"], first[0]["guesses"]) == ("random", [])
        state = client.settled()
        assert (state["photos"], state["labelled"], state["unsaved"]) == (
            25,
            1,
            0,
        )  # without the damaged file
        done = first + client.label(9)
        state = client.settled()
        assert state["labelled"] == 10
        counts = Counter(pool[one["name"]] for one in done)
        assert state["classes"] == counts
        with pytest.raises(StoreError, match="another session"):
            Client(pool, place, lit_mini)
        assert not {one["photo"] for one in state["queue"]} & {one["photo"] for one in done}
    index = opened(place)
    saved = {(row["source"], row["label"], row["picked"]) for row in index.labels.to_pylist()}
    assert saved == {(one["name"], pool[one["name"]], one["picked"]) for one in done}
    assert {one["picked"] for one in done} == {"random", "suggested"}
    with Client(pool, place, lit_mini) as client:
        state = client.settled()
        assert state["labelled"] == 10
        shown = state["queue"][0]
        feature = Reader(lit_mini).encode(next(open_inputs([shown["name"]]))).features
        answer = index.classify(feature, "keep", top=3)[0]
        assert [one["label"] for one in shown["guesses"]] == answer.labels
        assert [one["probability"] for one in shown["guesses"]] == pytest.approx(
            answer.probabilities, abs=1e-4
        )
        client.label(15)
        assert client.settled()["queue"] == []
    assert opened(place).n == 25


def test_a_step_is_one_version_done_once_and_undo_restores_labels_and_skipped_photos(
    pool, place, lit_mini
):
    """``test_label_sessions.py`` undoes steps at random, with other writers."""
    with Client(pool, place, lit_mini) as client:
        one, other, third, *_ = client.settled()["queue"]
        client.set({one["photo"]: "a"}, step="1")
        client.set({one["photo"]: "b"}, step="2")
        steps = client.set({one["photo"]: "a"}, step="1")["steps"]  # the request was repeated
        assert steps == [
            {"step": n, "photos": [one["photo"]], "labels": [label]}
            for n, label in (("1", "a"), ("2", "b"))
        ]
        assert client.settled()["queue"][0]["photo"] == other["photo"]
        version = client.settled()["version"]
        client.set({other["photo"]: "x", third["photo"]: "tpyo"}, step="typo")
        assert client.settled()["version"] == version + 1
        client.set({}, undo="typo")
        assert client.settled()["version"] == version + 2
        assert "tpyo" not in opened(place).class_names
        state = client.set({}, other["photo"], step="3")
        assert state["steps"] == [*steps, {"step": "3", "photos": [other["photo"]], "labels": []}]
        assert other["photo"] != state["queue"][0]["photo"]
        for _ in range(2):  # the request is repeated
            state = client.set({}, undo="3")
            assert (state["queue"][0]["photo"], state["steps"]) == (other["photo"], steps)
        client.settled()
        assert labels_of(place) == {one["name"]: "b"}
        client.set({}, undo="2")
        client.settled()
        assert labels_of(place) == {one["name"]: "a"}
        assert client.set({}, undo="1")["queue"][0] | {"guesses": []} == one | {"guesses": []}


def test_a_session_is_busy_until_all_photos_are_read(pool, place, lit_mini, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    with Client(pool, place, lit_mini) as client:
        state = client.until(lambda state: not state["busy"])
    assert state["encoded"] == state["photos"] == len(pool)


def test_photos_that_are_labelled_while_they_are_read_keep_their_features(
    pool, place, lit_mini, monkeypatch
):
    monkeypatch.setattr(module, "CHUNK", 4)
    with Client(pool, place, lit_mini) as client:
        client.set({client.names.index(name): label for name, label in pool.items()})
        assert client.settled()["labelled"] == len(pool)
    index = opened(place)
    [source] = open_inputs([row["source"] for row in index.labels.to_pylist()])
    assert np.allclose(index.keys, Reader(lit_mini).encode(source).features, atol=1e-6)


def test_the_only_label_is_removed_as_soon_as_there_is_another(pool, place, lit_mini):
    with Client(pool, place, lit_mini) as client:
        one, other, *_ = client.settled()["queue"]
        client.set({one["photo"]: "typo"}, step="1")
        client.settled()
        client.set({}, undo="1")
        state = client.until(lambda state: state["refused"])
        assert ("only label" in state["refused"][0]["reason"], state["labelled"]) == (True, 0)
    with Client(pool, place, lit_mini) as client:
        assert client.until(lambda state: state["refused"])["labelled"] == 0
        client.set({other["photo"]: "x"})
        assert client.settled()["unsaved"] == 0
    assert labels_of(place) == {other["name"]: "x"}


def test_a_bad_label_is_named_and_kept_while_the_others_are_saved(pool, place, lit_mini):
    with Client(pool, place, lit_mini) as client:
        client.settled()
        bad = client.number("damaged")
        good = [client.number(name) for name in ("1", "2", "3", "4")]
        client.set(dict.fromkeys([good[0], bad, *good[1:]], "x"))
        (refused,) = client.until(lambda state: state["unsaved"] == 1 and state["refused"])[
            "refused"
        ]
        assert (refused["photo"], Path(refused["name"]).name, refused["label"]) == (
            bad,
            "damaged.jpg",
            "x",
        )
        assert "image" in refused["reason"]
        known = {row["source"]: row["key_id"] for row in opened(place).labels.to_pylist()}
        changes.remove(place, key_ids=[known[client.names[good[0]]]])  # by another process
        client.set(dict.fromkeys(good, "y"))
        client.until(lambda state: state["unsaved"] == 1)
        assert labels_of(place) == dict.fromkeys([client.names[number] for number in good], "y")
        assert client.set({bad: None})["refused"] == []
        assert client.settled()["unsaved"] == 0


def test_photos_are_recognised_by_their_bytes_from_any_folder(
    shared, place, lit_mini, tmp_path, monkeypatch
):
    photos = [path for path, _ in caltech_photos(shared, "train", 2, 2)]

    def client_in(folder):
        return Client({f"{folder}/IMG_0.jpg": "x", f"{folder}/IMG_1.jpg": "x"}, place, lit_mini)

    for number, path in enumerate(photos):
        folder = tmp_path / f"day{number // 2}" / "new"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"IMG_{number % 2}.jpg")
    for day in ("day0", "day1"):  # photos of other folders have the same relative names
        monkeypatch.chdir(tmp_path / day)
        with client_in("new") as client:
            assert client.settled()["labelled"] == 0
            client.label(2)
            client.settled()
    wanted = {str(tmp_path / f"day{day}/new/IMG_{n}.jpg"): "x" for day in (0, 1) for n in (0, 1)}
    assert labels_of(place) == wanted
    place = place.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "day0", tmp_path / "copy")
    for folder in ("day0/new", str(tmp_path / "day1" / "new"), "day0/../day1/new", "copy/new"):
        with client_in(folder) as client:
            assert client.settled()["labelled"] == 2
            if folder == "copy/new":
                client.set({0: "changed"})
                client.settled()
    assert labels_of(place) == wanted | {str(tmp_path / "day0/new/IMG_0.jpg"): "changed"}


def test_near_copies_name_each_other_and_photos_that_are_gone_can_be_relabelled(
    pool, place, lit_mini, tmp_path
):
    folder = shutil.copytree(Path(next(iter(pool))).parent, tmp_path / "pool")
    images = {name: folder / f"{name}.jpg" for name in ("0", "copy", "1", "2")}
    for path in {*folder.iterdir()} - {*images.values()}:
        path.unlink()
    with Client({str(path): "x" for path in images.values()}, place, lit_mini) as client:
        numbers = {name: client.number(name) for name in images}
        similar = {
            one["photo"]: one["similar"] for one in client.settled()["queue"] if one["similar"]
        }
        pair = numbers["0"], numbers["copy"]
        assert similar == {pair[0]: [pair[1]], pair[1]: [pair[0]]}
        for name in ("0", "1"):
            images[name].unlink()
        client.set(dict.fromkeys(numbers.values(), "x"), step="all")
        state = client.settled()
        assert (state["version"], state["labelled"], state["refused"]) == (1, 4, [])
        assert labels_of(place) == {str(path): "x" for path in images.values()}
        assert opened(place).provenance["precision"] == {"keys": "float32"}
        client.set({numbers["0"]: "y"})
        client.set({numbers["1"]: None, numbers["2"]: None})
        client.settled()
    assert labels_of(place) == {str(images["0"]): "y", str(images["copy"]): "x"}


def test_photos_of_a_visit_are_named_and_labelled_together(shared, place, lit_mini, tmp_path):
    """A visit is in one folder, and lasts as long as the gaps are short. Photos without a date belong to none."""
    seconds = {"a/0": 0, "a/1": 9, "a/2": 18, "a/3": 50, "a/4": None, "b/0": 9, "b/1": 12}
    photos = [path for path, _ in caltech_photos(shared, "train", 7, 1)]
    for (name, second), path in zip(seconds.items(), photos, strict=True):
        file = tmp_path / "traps" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        time = None if second is None else f"2026:01:02 03:04:{second:02}"
        file.write_bytes(encoded(time, image=Image.open(path).convert("RGB")))
    pool = {str(tmp_path / "traps" / "0"): "x"}  # whose parent is the folder of the cameras
    with Client(pool, place, lit_mini) as client:
        numbers = {Path(name).with_suffix(""): number for number, name in enumerate(client.names)}
        number = {name: numbers[tmp_path / "traps" / name] for name in seconds}
        queue = {one["photo"]: one for one in client.settled()["queue"]}
        first, second = ({number[f"a/{n}"] for n in range(3)}, {number["b/0"], number["b/1"]})
        for visit in (first, second):
            assert len({queue[photo]["visit"] for photo in visit}) == 1
            assert all({photo, *queue[photo]["similar"]} == visit for photo in visit)
        assert queue[number["a/3"]]["visit"] is queue[number["a/4"]]["visit"] is None
        client.set({number["a/0"]: "x", number["a/3"]: "y"})
        client.settled()
        answers = client.http.get("/v1/label/answers").json()["photos"]
        assert {one["photo"]: one["visit"] for one in answers} == {
            photo: one["visit"] for photo, one in queue.items()
        }
        queue = {one["photo"]: one for one in client.status()["queue"]}
        assert queue[number["a/1"]]["similar"] == [number["a/2"]]  # the third has a label


def test_the_answers_for_the_rest_are_reviewed_together(pool, place, lit_mini):
    with Client(pool, place, lit_mini) as client:

        def answers():
            answer = client.http.get("/v1/label/answers").json()
            return {one["photo"]: one for one in answer["photos"]}, answer

        assert answers() == ({}, {"version": None, "read": 0, "photos": [], "groups": []})
        labelled = client.label(8)
        client.set({labelled[0]["photo"]: "none of these"})
        client.settled()
        photos, answer = answers()
        assert (len(photos), answer["read"]) == (25, 25)
        assert answer["version"] == opened(place).version
        assert {photo for photo, one in photos.items() if one["label"] is not None} == {
            one["photo"] for one in labelled
        }
        rest = [photo for photo, one in photos.items() if one["label"] is None]
        names = [photos[photo]["name"] for photo in sorted(photos)]
        folder = Reader(lit_mini).encode(next(open_inputs(names))).features
        expected, _ = Pool(names, folder, []).smoothed(opened(place), Ask(top=3))
        for photo, right, feature in zip(sorted(photos), expected, folder, strict=True):
            if photo not in rest:
                continue
            similar = client.http.get(f"/v1/label/photos/{photo}/similar").json()
            assert similar == [pytest.approx(one, abs=1e-4) for one in right.similar]
            assert [
                one["label"] for one in photos[photo]["guesses"]
            ] == right.labels  # "none of these", too
            chances = [one["probability"] for one in photos[photo]["guesses"]]
            assert chances == pytest.approx(right.probabilities, abs=1e-4)
            assert photos[photo]["no_match"] == bool(right.no_match)
            sent = client.http.get(f"/v1/label/photos/{photo}/feature").content
            assert np.frombuffer(sent, "<f4") == pytest.approx(feature, abs=1e-5)
            assert (
                client.http.get(f"/v1/label/photos/{photo}/file").content
                == Path(photos[photo]["name"]).read_bytes()
            )
        assert all(photos[photo]["no_match"] for group in answer["groups"] for photo in group)
        assert (
            client.http.get(f"/v1/label/photos/{client.number('damaged')}/feature").status_code
            == 404
        )

        shown = client.status()["queue"][0]
        some = dict.fromkeys([shown["photo"], *rest[:5]], "panda") | {rest[6]: "a class of its own"}
        state = client.set(some, step="review", reviewed=True)
        assert state["steps"][-1] == {
            "step": "review",
            "photos": [*some],
            "labels": [*some.values()],
        }
        client.settled()
        assert {photo: one["label"] for photo, one in answers()[0].items() if photo in some} == some
        picked = {row["source"]: row["picked"] for row in opened(place).labels.to_pylist()}
        assert {picked[photos[photo]["name"]] for photo in some} == {"reviewed"}
        client.set({}, undo="review")
        client.settled()
        assert opened(place).n == 8
        client.set(
            {labelled[0]["photo"]: "panda"}, reviewed=True
        )  # the label changes, but not how it was chosen
        client.settled()
        assert [row["picked"] for row in opened(place).labels.to_pylist()].count("reviewed") == 0


def test_right_guesses_are_counted_until_they_are_undone(pool, place, lit_mini):
    with Client(pool, place, lit_mini) as client:
        client.label(3)
        state = client.settled()
        assert state["guessed"] == []  # there was no guess yet
        for number in range(6):
            one = state["queue"][0]
            guess = one["guesses"][0]["label"]
            client.set({one["photo"]: guess if number % 3 else f"not {guess}"}, step=str(number))
            state = client.settled()
            assert state["guessed"] == [earlier % 3 > 0 for earlier in range(number + 1)]
        assert client.set({}, undo="5")["guessed"] == state["guessed"][:-1]


def test_a_session_is_finished_with_copies_links_moved_photos_or_the_labelled_ones(
    pool, place, lit_mini, tmp_path
):
    folder = shutil.copytree(Path(next(iter(pool))).parent, tmp_path / "photos")
    moved = {str(folder / Path(name).name): label for name, label in pool.items()}
    with Client(moved, place, lit_mini) as client:

        def sort(into, status=200, **options):
            sent = {"into": str(tmp_path / into), **options}
            answer = client.http.post("/v1/label/sort", json=sent, headers=AUTHORISED)
            assert answer.status_code == status, answer.text
            return [path for path in (tmp_path / into).glob("*/*") if path.exists()], answer.json()

        sort("none", status=404)  # no labels yet
        labels = {Path(one["name"]).name: moved[one["name"]] for one in client.label(6)}
        client.settled()
        fixed, _ = sort("fixed", labelled=True)
        assert {path.name: path.parent.name for path in fixed} == labels
        _, answer = sort("none", action="xmp", labelled=True)
        assert answer["summary"].startswith("changed the keywords of 6 photos")
        written = {
            path.stem: path.read_text().split("<rdf:li>")[1] for path in folder.glob("*.xmp")
        }
        assert {name: text.partition("<")[0] for name, text in written.items()} == labels
        assert answer["undo"] == f"retrieval-tip classify {place} {folder} --format xmp --undo"
        _, answer = sort("none", action="xmp", undo=True)
        assert (answer["summary"], [*folder.glob("*.xmp")]) == (
            "restored the keywords of 6 photos",
            [],
        )
        nothing, plan = sort("copies", dry_run=True)
        assert (nothing, plan["folder"], plan["photos"]) == ([], str(tmp_path / "copies"), 25)
        copies, answer = sort("copies")  # by label or answer
        assert plan["aside"] == {
            name: sum(path.parent.name == name for path in copies)
            for name in ("no match", "not sure")
        }
        assert answer["summary"].startswith("copied 25 photos")
        assert answer["undo"] == f"retrieval-tip sort --undo --into {tmp_path / 'copies'}"
        assert labels.items() <= {path.name: path.parent.name for path in copies}.items()
        assert ", each classified by the others, " in sort("sure", at_most_wrong=0.9)[1]["promise"]
        links, _ = sort("links", action="link")
        assert [path.is_symlink() for path in links] == [True] * 25
        assert len(sort("moved", action="move")[0]) == 25
        assert [path.name for path in folder.iterdir()] == ["damaged.jpg"]
        left, answer = sort("moved", undo=True)
        assert (left, answer["skipped"]) == ([], [])
        assert answer["summary"].startswith("undid the sorting of 25 photos")
        assert len([*folder.iterdir()]) == 26
        sort("never", status=422, undo=True)


def test_invalid_requests_are_refused(pool, place, lit_mini, shared, run):
    with Client(pool, place, lit_mini, "owl") as client:
        post = client.http.post
        for body, status in (
            ({"labels": [{"photo": 99, "label": "x"}]}, 404),
            ({"skip": [99]}, 404),
            ({"labels": [{"photo": 0, "label": " "}]}, 422),
            ({"labels": [{"photo": -1, "label": "x"}]}, 422),
            ({"labels": [{"photo": 0, "label": "a\nb"}]}, 422),
        ):
            assert post("/v1/label", json=body, headers=AUTHORISED).status_code == status, body
        state = client.settled()
        assert (state["labelled"], state["classes"]) == (0, {"owl": 0})
        image = client.http.get(f"/v1/label/photos/{state['queue'][0]['photo']}/image?size=64")
        assert image.headers["content-type"] == "image/jpeg"
        for photo in (99, client.number("damaged")):
            assert client.http.get(f"/v1/label/photos/{photo}/image").status_code == 404
    table = shared / "data" / "clip-food9" / "test.parquet"
    failed(
        run("label", table, "--out", place, "--model", LIT_MINI),
        1,
        "labelling needs photos",
    )
    assert not place.exists()


def test_a_killed_session_keeps_its_labels_and_a_stopped_one_names_the_file_of_the_others(
    pool, tmp_path, shared, warm_path
):
    folder = tmp_path / "pool"
    index = tmp_path / "idx"
    shutil.copytree(Path(next(iter(pool))).parent, folder)
    right = {str(folder / Path(name).name): label for name, label in pool.items()}
    model = "--model", LIT_MINI, "--classes", "owl, crab"
    again = {"path": warm_path, "command": "label", "port": None}
    with server(folder, "--out", index, *model, **again) as (first_url, process):
        state = asked(url := first_url)
        assert [*state["classes"]] == ["owl", "crab"]
        first = [one for one in state["queue"] if one["name"] in right][
            :6
        ]  # without the damaged file
        for one in first:
            asked(url, {"labels": [{"photo": one["photo"], "label": right[one["name"]]}]})
        process.kill()  # the last labels are not in the index yet
        process.wait()
    folder = folder.rename(tmp_path / "renamed")
    printed = []
    with server(folder, "--out", index, *model, **again, printed=printed) as (url, process):
        assert url == first_url  # an open page still works
        asked(
            url,
            {
                "labels": [
                    {
                        "photo": sorted(folder.iterdir()).index(folder / "damaged.jpg"),
                        "label": "owl",
                    }
                ]
            },
        )
        process.send_signal(signal.SIGINT)
        assert process.wait() == 1
    assert {Path(name).name: label for name, label in labels_of(index).items()} == {
        Path(one["name"]).name: right[one["name"]] for one in first
    }
    journal = tmp_path / "idx-unsaved.jsonl"
    (entry,) = map(json.loads, journal.read_text().splitlines())
    assert (entry["path"], entry["label"]) == (str(folder / "damaged.jpg"), "owl")
    assert f"{journal}: has 1 label that could not be saved (not a readable image" in printed[-1]
    assert printed[-2] == "Labelled photos: 7 of 25\n"
    address, _, token = url.partition("/#token=")
    with (
        socket.create_server(
            ("127.0.0.1", int(address.rpartition(":")[2]))
        ),  # it may have received the token
        server(folder, "--out", index, **again) as (url, _),  # uses the encoder of the index
    ):
        assert not url.startswith(address)
        assert not url.endswith(token)
        while not (refused := asked(url)["refused"]):
            time.sleep(0.05)
        asked(url, {"labels": [{"photo": refused[0]["photo"], "label": None}]})
    assert len(labels_of(index)) == 6
    assert not journal.exists()


def test_answers_that_are_being_computed_are_not_computed_twice_at_once(
    pool, place, lit_mini, monkeypatch
):
    """A request meanwhile gets them, with the version that they belong to. The next one gets the newest."""
    proceed = threading.Event()
    versions = []

    def answers_to(index, *arguments):
        versions.append(index.version)
        assert proceed.wait(60)
        return review.answers_to(index, *arguments)

    monkeypatch.setattr(module, "answers_to", answers_to)
    with Client(pool, place, lit_mini, limits=Limits(patience=0.05)) as client:

        def answer():
            while (answer := client.http.get("/v1/label/answers")).status_code == 202:
                time.sleep(0.05)
            return answer.json()

        client.label(6)
        before = client.settled()["version"]
        assert client.http.get("/v1/label/answers").status_code == 202
        [late] = client.label(1)
        after = client.settled()["version"]
        assert after > before
        similar = f"/v1/label/photos/{client.number('copy')}/similar"
        for path in ("/v1/label/answers", similar):
            assert client.http.get(path).status_code == 202
        assert versions == [before]
        proceed.set()
        while (found := answer())["version"] == before:
            assert {one["photo"]: one["label"] for one in found["photos"]}[late["photo"]]
        assert (found["version"], found["read"]) == (after, 25)
        assert versions == [before, after]


def test_features_of_photos_in_order_are_not_copied(tmp_path):
    """They are read in any order, and later photos need more room."""
    features = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    photos = SessionPhotos({n: str(tmp_path / f"{n}.jpg") for n in range(6)}, Reader(None))
    for photo in (3, 5, 0, 4, 1):
        photos.note([photo], {photo: (f"{photo}", features[photo], None)})
    assert np.array_equal(photos.rows([0, 1, 3], None), features[[0, 1, 3]])
    for photo in (2, *range(6, 12)):
        if photo > 5:
            photos.add(photo, str(tmp_path / f"{photo}.jpg"), None)
        photos.note([photo], {photo: (f"{photo}", features[photo], None)})
    every = photos.rows(range(12), None)
    assert np.array_equal(every, features)
    assert np.shares_memory(every, photos.rows([4, 5, 6], None))
    assert np.array_equal(photos.rows([7, 2], None), features[[7, 2]])
    [block] = photos.remembered([*range(12)], None).known
    assert np.shares_memory(every, block.features)
    [(_, file, own)] = by_file([(photos.chosen(range(12)), block)], whole_file)
    assert (file, len(own.positions)) == ("", 12)
    assert np.shares_memory(every, own.features)


def test_an_event_leads_to_a_new_state_and_keeps_the_old_one(tmp_path):
    """If the journal cannot be written, the session goes on with the state before the event."""
    photos = SessionPhotos(
        {photo: str(tmp_path / f"{photo}.jpg") for photo in range(8)}, Reader(None)
    )
    state = Session(photos, Queue(range(8)))
    before = [queued.photo for queued in state.shown()]
    for event in (Change([(before[0], "ant")], skip=[before[1]], step="s"), Dropped(9)):
        state.apply(event)
        assert [queued.photo for queued in state.shown()] == before
        assert (state.labels(), state.steps, state.queue.order) == ({}, {}, before)
    labelled, effects = state.apply(Change([(before[0], "ant")], [before[1]], "s"))
    assert [entry["path"] for entry in effects.journal] == [photos.path(before[0])]
    assert [queued.photo for queued in labelled.shown()] == [*before[2:], before[1]]
    undone, _ = labelled.apply(Change(undo="s"))
    assert [queued.photo for queued in undone.shown()] == before
    assert undone.labels() == {}
