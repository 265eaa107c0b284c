"""Photos that are dropped on a labelling session belong to it, as if they were in its folder. Also runs as a script."""

from __future__ import annotations

import io
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import killing
import numpy as np
import pytest
from PIL import Image
from serving import InProcess, caltech_photos, labelling_app

from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_inputs
from retrieval_tip.index import places
from retrieval_tip.labelling.dropped import dropped_in, keep
from retrieval_tip.labelling.pool import MOST_PHOTOS
from retrieval_tip.labelling.sort import undo_sort
from retrieval_tip.server import session as module

PHOTO = b"photo" * 100
AUTHORISED = {"Authorization": "Bearer t"}


def work(job, steps):
    """Keep a photo in a process that the test kills."""
    steps.writes()
    keep(Path(job["folder"]), MOST_PHOTOS, "x.jpg", PHOTO)


if __name__ == "__main__":
    killing.serve(work)
    raise SystemExit


@pytest.fixture
def photos(shared, tmp_path):
    """Twelve photos of three classes in a folder, and four others of the same classes outside, with their labels."""
    found = caltech_photos(shared, "train", 3, 6)
    (tmp_path / "photos").mkdir()
    (tmp_path / "outside").mkdir()
    for number, (path, _) in enumerate(found):
        shutil.copy(
            path, tmp_path / ("photos" if number % 6 < 4 else "outside") / f"{number:02}.jpg"
        )
    return {f"{number:02}.jpg": label for number, (_, label) in enumerate(found)}


class Session(InProcess):
    """A session in this process."""

    def __init__(self, folder, backbone, place=None):
        self.place = place or folder / "ix"
        self.app = labelling_app(
            self.place, list(open_inputs([str(folder / "photos")])), Reader(backbone)
        )

    def drop(self, *files, names=None, status=201):
        sent = [
            (
                "images",
                (name, Path(file).read_bytes() if isinstance(file, Path) else file, "image/jpeg"),
            )
            for name, file in zip(names or [file.name for file in files], files, strict=True)
        ]
        answer = self.http.post("/v1/label/photos", files=sent, headers=AUTHORISED)
        assert answer.status_code == status, answer.text
        return answer.json()["photos"] if status == 201 else answer.json()["detail"]

    def post(self, what="", **body):
        answer = self.http.post(f"/v1/label{what}", json=body, headers=AUTHORISED)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def label(self, labels):
        return self.post(
            labels=[{"photo": photo, "label": label} for photo, label in labels.items()]
        )

    def settled(self, number):
        for _ in range(1200):
            state = self.http.get("/v1/label").json()
            if not state["busy"] and state["encoded"] == state["photos"] == number:
                return state
            time.sleep(0.05)
        raise AssertionError(state)

    def answers(self):
        """Return the labels and answers by file name."""
        return {
            Path(one["name"]).name: one
            for one in self.http.get("/v1/label/answers").json()["photos"]
        }

    def file(self, photo):
        return self.http.get(f"/v1/label/photos/{photo}/file").content


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.05)


def numbered(session):
    """Return the numbers of the photos by file name."""
    return {
        Path(session.app.state.labelling.path(photo)).name: photo
        for photo in session.app.state.labelling.photos.paths
    }


def test_dropped_photos_are_shown_labelled_counted_and_finished(
    photos, tmp_path, lit_mini, monkeypatch
):
    monkeypatch.setattr(module, "DRAWN", 1)
    outside = sorted((tmp_path / "outside").iterdir())
    with Session(tmp_path, lit_mini) as session:
        session.settled(12)
        dropped = session.drop(*outside)
        session.settled(18)
        assert [session.file(photo) for photo in dropped] == [path.read_bytes() for path in outside]
        numbers = numbered(session)
        first = [
            name for name in photos if int(name[:2]) % 6 in (0, 4)
        ]  # two of each class, one of them dropped
        session.label({numbers[name]: photos[name] for name in first})
        state = session.settled(18)
        assert (state["labelled"], state["unsaved"], sum(state["classes"].values())) == (6, 0, 6)
        shown = set()
        while (
            len(queue := session.http.get("/v1/label").json()["queue"]) > 2
        ):  # which contains the dropped photos
            shown |= {Path(one["name"]).name for one in queue}
            session.label({queue[0]["photo"]: photos[Path(queue[0]["name"]).name]})
        assert shown == {*photos} - {*first}
        state = session.settled(18)
        assert state["progress"]["estimate"]["most_wrong"] <= 2
        answers = session.answers()
        assert {*answers} == {*photos}
        assert sum(one["label"] is not None for one in answers.values()) == 16
        assert all(one["label"] == photos[name] for name, one in answers.items() if one["label"])

        def finish(into, **options):
            answer = session.post("/sort", into=str(tmp_path / into), **options)
            return {
                path.name: path for path in (tmp_path / into).glob("*/*") if path.exists()
            }, answer["summary"]

        for into, options in (("copied", {}), ("linked", {"action": "link"})):
            found, summary = finish(into, **options)
            assert ({*found}, summary.split(" (")[0]) == ({*photos}, f"{into} 18 photos")
        assert {*finish("labelled", labelled=True)[0]} == {
            name for name, one in answers.items() if one["label"]
        }
        before = {
            path: path.read_bytes() for path in tmp_path.glob("*/**/*.jpg") if not path.is_symlink()
        }
        assert {*finish("moved", action="move")[0]} == {*photos}
        assert not [*(tmp_path / "ix-dropped").rglob("*.jpg")]
        assert undo_sort(tmp_path / "moved").skipped == []
        assert before.items() == {path: path.read_bytes() for path in before}.items()
        answer = session.post("/sort", into="none", action="xmp")
        written = [*tmp_path.rglob("*.xmp")]  # a photo without a match has none
        assert answer["summary"].startswith(f"changed the keywords of {len(written)} photos")
        assert len(written) >= 16
        undo = f"retrieval-tip classify {session.place} {tmp_path}/photos {tmp_path}/ix-dropped --format xmp --undo"
        assert answer["undo"] == undo
        assert len([*tmp_path.glob("ix-dropped/*/*.xmp")]) >= 4
        assert session.post("/sort", into="none", action="xmp", undo=True)["summary"].startswith(
            "restored"
        )
        assert not [*tmp_path.rglob("*.xmp")]
    assert places.at(session.place).load().n == 16


def test_a_later_session_has_the_dropped_photos_under_their_numbers(photos, tmp_path, lit_mini):
    """Otherwise, a page that stays open would label other photos."""
    outside = sorted((tmp_path / "outside").iterdir(), reverse=True)
    with Session(tmp_path, lit_mini) as session:
        dropped = session.drop(*outside[:2]) + session.drop(outside[2])
        session.label({0: "a", dropped[1]: "b"})
        session.settled(15)
        session.post("/sort", into=str(tmp_path / "moved"), action="move", labelled=True)
    shutil.copy(outside[0], tmp_path / "photos" / "00-new.jpg")  # more photos come into the folder
    with Session(tmp_path, lit_mini) as session:
        assert session.drop(outside[3]) == [
            max(dropped) + 1
        ]  # not that of the photo that was moved
        session.settled(15)
        left = {**dict(zip(dropped, outside, strict=False)), max(dropped) + 1: outside[3]}
        del left[dropped[1]]
        assert {photo: session.file(photo) for photo in left} == {
            n: path.read_bytes() for n, path in left.items()
        }
    assert undo_sort(tmp_path / "moved").skipped == []
    with Session(tmp_path, lit_mini) as session:
        session.settled(17)
        assert session.file(dropped[1]) == outside[1].read_bytes()
        assert session.answers()[outside[1].name]["label"] == "b"


def test_a_photo_of_the_session_is_not_kept_twice(photos, tmp_path, lit_mini):
    inside, outside = ((tmp_path / name).iterdir() for name in ("photos", "outside"))
    (one, *_), (other, *_) = sorted(inside), sorted(outside)
    with Session(tmp_path, lit_mini) as session:
        session.settled(12)
        assert session.drop(one) == [0]
        with ThreadPoolExecutor() as tabs:
            found = [*tabs.map(session.drop, [other] * 4)]
        assert found == [found[0]] * 4
        data = one.read_bytes()
        one.unlink()
        (again,) = session.drop(data, names=["again.jpg"])  # its file is gone
        assert session.file(again) == data
        session.settled(14)


def test_names_clash_in_nothing_and_lead_nowhere(photos, tmp_path, lit_mini):
    files = sorted((tmp_path / "outside").iterdir())
    names = ["x.jpg", "x.jpg", "../../x.jpg", ".hidden.jpg", "no suffix", "n" * 300 + ".jpg"]
    with Session(tmp_path, lit_mini) as session:
        dropped = session.drop(*files, names=names)
        assert len({*dropped}) == 6
        session.settled(18)
        session.label(dict.fromkeys(dropped, "x") | {0: "y"})
        session.settled(18)
        session.post("/sort", into=str(tmp_path / "moved"), action="move")
        assert undo_sort(tmp_path / "moved").skipped == []
    kept = [path for path in (tmp_path / "ix-dropped").rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in kept) == sorted(file.read_bytes() for file in files)
    assert sorted(tmp_path.iterdir()) == [
        tmp_path / name for name in ("ix", "ix-dropped", "moved", "outside", "photos")
    ]
    with Session(tmp_path, lit_mini) as session:
        session.settled(18)


def test_of_two_sessions_of_an_index_one_keeps_photos(photos, tmp_path, lit_mini):
    one, other = sorted((tmp_path / "outside").iterdir())[:2]
    with Session(tmp_path, lit_mini) as session, Session(tmp_path, lit_mini) as second:
        session.drop(one)
        assert "another session" in second.drop(other, status=503)
    assert [path.read_bytes() for path in (tmp_path / "ix-dropped").rglob("*.jpg")] == [
        one.read_bytes()
    ]


def test_a_photo_that_fills_the_disk_is_not_kept(photos, tmp_path, lit_mini, small_disk):
    noise = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(noise, "PNG")  # which cannot be compressed
    one = next((tmp_path / "outside").iterdir())
    disk = small_disk(256)
    with Session(tmp_path, lit_mini, disk / "ix") as session:
        assert "No space left" in session.drop(noise.getvalue(), names=["large.png"], status=503)
        session.drop(one)
        session.settled(13)
    files = [path for path in (disk / "ix-dropped").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in files] == [one.read_bytes()]


def test_what_is_no_photo_is_refused_or_skipped(photos, tmp_path, lit_mini):
    large = io.BytesIO()
    Image.new("L", (9000, 9000)).save(large, "PNG")
    good = next((tmp_path / "outside").iterdir())
    with Session(tmp_path, lit_mini) as session:
        for data, said in (
            (b"", "not a readable image"),
            (b"no image", "not a readable image"),
            (large.getvalue(), "too large"),
        ):
            assert said in session.drop(data, names=["x.jpg"], status=422)
        sent = [("images", ("bad.jpg", b"no image")), ("images", ("good.jpg", good.read_bytes()))]
        answer = session.http.post("/v1/label/photos", files=sent, headers=AUTHORISED).json()
        assert ([one["source"] for one in answer["skipped"]], len(answer["photos"])) == (
            ["bad.jpg"],
            1,
        )
        assert session.http.post("/v1/label/photos", files=sent).status_code == 401
        session.settled(13)
    assert len([*(tmp_path / "ix-dropped").rglob("*.jpg")]) == 1


@killing.needs_fork
def test_an_upload_that_is_killed_leaves_the_whole_photo_or_none(tmp_path, warm_path):
    process = killing.Server(__file__, tmp_path, warm_path)
    assert process.run({"folder": str(tmp_path / "whole")}) == 0
    number = len(process.steps)
    assert number > 5
    for step in range(number):
        folder = tmp_path / str(step) / "ix-dropped"
        assert process.run({"folder": str(folder)}, step=step) == -signal.SIGKILL
        found = [Path(path) for path in dropped_in(folder).values() if path]
        assert [path.read_bytes() for path in found] in ([], [PHOTO])
        assert [path for path in folder.rglob("*") if path.is_file()] == found
    assert found  # the last step comes after the photo has its name
    process.close()
