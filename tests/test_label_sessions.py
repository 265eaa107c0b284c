"""Random labelling sessions against a plain dictionary: no acknowledged label and no dropped photo is lost or changed.

Sessions label, relabel, skip, undo, get more photos, and are killed and continued. Other writers add and remove photos,
and the disk is full at times. Run as a script, this file is the process that is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import signal
import time
import warnings
from pathlib import Path

import killing
import numpy as np
import pytest
from conftest import SOAK, few
from fake import Fake
from fastapi.testclient import TestClient
from PIL import Image
from serving import labelling_app

from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import of_images, open_inputs
from retrieval_tip.index import changes, places
from retrieval_tip.server import session as module
from retrieval_tip.server.guard import Limits

pytestmark = [killing.needs_fork, pytest.mark.timeout(3600 if SOAK else 300)]

SESSIONS, ROUNDS, AT_ONCE = (50, 4, 4) if SOAK else (1, 2, 1)
"""Number of sessions of each kind, of starts of each session, and of sessions at a time."""
PHOTOS, OTHERS, STEPS = 14, 6, 25 if SOAK else 15
LABELS = ("ant", "bee", "cat", "dog")
AUTHORISED = {"Authorization": "Bearer t"}


class Words(Fake):
    """A backbone with text, so that new classes need text weights."""

    def encode_texts(self, texts):
        seeds = (
            int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts
        )
        return np.stack(
            [np.random.default_rng(seed).normal(size=self.dim) for seed in seeds]
        ).astype(np.float32)


class Wordless(Fake):
    has_text = False


class Session:
    """A labelling session, driven at random. ``wanted`` are the acknowledged labels by the digest of the photo.

    A killed session may or may not have done its last request, so ``maybe`` are the labels if it has. ``dropped`` are
    the digests of the acknowledged dropped photos.
    """

    def __init__(self, job):
        self.job = job
        self.draw = random.Random(f"{job['seed']} {job['round']}")
        self.place = job["place"]
        self.folder = Path(job["folder"])
        self.backbone = (Words if job["seed"] % 2 else Wordless)()
        self.full = self.folder / "disk" / "full"
        self.state = self.folder / "state.json"
        self.wanted, self.maybe, self.dropped = {}, {}, []
        if self.state.exists():
            self.wanted, self.maybe, self.dropped = json.loads(self.state.read_text())
        self.undo = []

    def run(self):
        self.full.unlink(missing_ok=True)
        before, photos = ("photos", "moved") if self.job["round"] % 2 else ("moved", "photos")
        photos = self.folder / photos
        if not photos.exists():
            (self.folder / before).rename(photos)
        app = labelling_app(
            self.place,
            list(open_inputs([str(photos)])),
            Reader(self.backbone),
            limits=Limits(poll=0.05),
        )
        known = app.state.labelling.photos
        self.digests = {photo: digest_of(known.path(photo)) for photo in known.own(known.paths)}
        assert {*self.dropped} <= {*self.digests.values()}
        with TestClient(app, headers=AUTHORISED) as self.http:
            self.until(saved)
            found = self.found()
            assert found in (self.wanted, self.maybe), (found, self.wanted, self.maybe)
            self.keep(found, found)
            steps = (
                self.label,
                self.label,
                self.label,
                self.back,
                self.skip,
                self.others,
                self.fill,
                self.drop,
            )
            for number in range(STEPS):
                self.draw.choice(steps)(f"{self.job['round']} {number}")
                time.sleep(self.draw.choice((0, 0, 0.05)))
            if self.draw.random() < 0.5:
                self.full.unlink(missing_ok=True)
        if not self.full.exists():
            only = len(self.rows()) == 1 > len(self.wanted)  # it stays until there is another label
            assert only or self.found() == self.wanted, (self.found(), self.wanted)

    def label(self, step):
        """Label some photos, or review many. The page then shows the acknowledged labels."""
        reviewed = self.draw.random() < 0.3
        most = len(self.digests) if reviewed else 3
        chosen = self.draw.sample([*self.digests], self.draw.randint(1, most))
        labels = [{"photo": n, "label": self.draw.choice((*LABELS, f"new {step}"))} for n in chosen]
        new = {self.digests[one["photo"]]: one["label"] for one in labels}
        before = {digest: self.wanted.get(digest) for digest in new}
        changed = {digest: old for digest, old in before.items() if old != new[digest]}
        if self.ask(new, labels=labels, step=step, reviewed=reviewed):
            self.undo.append((step, changed))
        if reviewed:
            for one in self.answers()["photos"]:
                assert one["label"] == self.wanted.get(self.digests[one["photo"]])

    def answers(self):
        """Return the answers, which a busy machine may not have computed within seconds."""
        while (answer := self.http.get("/v1/label/answers")).status_code == 202:
            time.sleep(0.1)
        assert answer.is_success, answer.text
        return answer.json()

    def skip(self, step):
        if self.ask({}, skip=[self.draw.choice([*self.digests])], step=step):
            self.undo.append((step, {}))

    def back(self, _):
        if self.undo and self.ask(self.undo[-1][1], undo=self.undo[-1][0]):
            self.undo.pop()

    def drop(self, _):
        """Drop a photo, perhaps once more, or a copy of a photo in the folder."""
        path = self.draw.choice(sorted((self.folder / "dropped").iterdir()))
        sent = [("images", ("x.png", path.read_bytes(), "image/png"))]
        answer = self.http.post("/v1/label/photos", files=sent)
        if self.is_acknowledged(answer):
            [photo] = answer.json()["photos"]
            assert self.digests.setdefault(photo, digest_of(path)) == digest_of(path)
            self.dropped.append(digest_of(path))
            self.keep(self.wanted, self.wanted)

    def others(self, _):
        """Add or remove a photo as another process does, when the session has saved everything."""
        if self.full.exists() or not places.at(self.place).exists():
            return
        self.until(saved)
        rows = self.rows()
        path = self.folder / "others" / f"{self.draw.randrange(OTHERS)}.png"
        if len(rows) > 2 and self.draw.random() < 0.5:
            gone = self.draw.choice(rows)
            new = self.after({gone["digest"]: None})
            self.keep(self.wanted, new)
            changes.remove(self.place, key_ids=[gone["key_id"]])
        else:
            source = of_images([str(path)], "others", ["other"], ["other"])
            new = self.wanted | {digest_of(path): "other"}
            self.keep(self.wanted, new)
            changes.add(self.place, source, Reader(self.backbone))
        self.keep(new, new)
        version = places.at(self.place).manifest().version
        self.until(lambda state: state["version"] >= version)

    def fill(self, _):
        """Fill the disk, or make room again."""
        if self.full.exists():
            self.full.unlink()
        elif self.job["disk"]:
            with self.full.open("wb", buffering=0) as file:
                for size in (1 << 20, 1 << 10):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"x" * size)

    def ask(self, changed, **body):
        """Send a request that sets labels, and return whether it was acknowledged."""
        new = self.after(changed)
        self.keep(self.wanted, new)
        done = self.is_acknowledged(self.http.post("/v1/label", json=body))
        new = new if done else self.wanted
        self.keep(new, new)
        return done

    def is_acknowledged(self, answer):
        assert answer.is_success or (answer.status_code == 503 and self.full.exists()), answer.text
        return answer.is_success

    def after(self, changed):
        """Return the wanted labels after a change, in which ``None`` removes a label."""
        new = self.wanted | changed
        return {digest: label for digest, label in new.items() if label is not None}

    def keep(self, wanted, maybe):
        self.wanted, self.maybe = wanted, maybe
        new = self.state.with_suffix(".tmp")
        new.write_text(json.dumps([wanted, maybe, self.dropped]))
        new.replace(self.state)

    def until(self, done):
        for _ in range(4000):
            if done(state := self.http.get("/v1/label").json()):
                self.emptied = any(one["label"] is None for one in state["refused"])
                return
            time.sleep(0.01)
        raise AssertionError(state)

    def rows(self):
        there = places.at(self.place)
        return there.load(device="cpu").labels.to_pylist() if there.exists() else []

    def found(self):
        rows = self.rows()
        labels = {row["digest"]: row["label"] for row in rows}
        assert len(labels) == len(rows)
        return {} if self.emptied and len(rows) == 1 else labels


def saved(state):
    """Return whether all labels are saved. The only label cannot be removed, so this waits for another one."""
    return not state["busy"] and all(one["label"] is None for one in state["refused"])


def digest_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _work(job, _):
    module.WAIT, module.RETRY, module.POLL = 0.02, 0.05, 0.05
    Session(job).run()


if __name__ == "__main__":
    warnings.simplefilter(
        "ignore", RuntimeWarning
    )  # LanceDB warns of forks, but has not been used before the fork
    killing.serve(_work)
    raise SystemExit


def make_photos(folder, number, first=0):
    """Write small photos. The last is a copy of the first."""
    folder.mkdir()
    for n in range(number):
        pixels = np.random.default_rng(first + n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())


@pytest.mark.parametrize(
    ("kind", "disk"), few([*itertools.product(("", "lance://"), (False, True))], 2)
)
def test_no_acknowledged_label_is_lost(server, tmp_path, small_disk, kind, disk):
    draw = random.Random(f"{kind} {disk}")
    killed = 0
    number = 1 if disk else AT_ONCE
    for start in range(0, SESSIONS, number):
        jobs = []
        for seed in range(start, min(start + number, SESSIONS)):
            folder = tmp_path / f"{seed}"
            folder.mkdir()
            make_photos(folder / "photos", PHOTOS)
            make_photos(folder / "others", OTHERS, 1000)
            make_photos(folder / "dropped", OTHERS, PHOTOS - 1)
            (folder / "disk").symlink_to(small_disk(65536)) if disk else (folder / "disk").mkdir()
            place = f"{kind}{folder / 'disk' / 'idx'}"
            jobs.append({"seed": seed, "place": place, "folder": str(folder), "disk": disk})
        for round_ in range(ROUNDS):
            last = round_ == ROUNDS - 1
            server.start(
                *[job | {"round": round_} for job in jobs],
                after=None if last else draw.uniform(0.2, 3) * len(jobs),
            )
            status = server.wait()
            killed += status.count(-signal.SIGKILL)
            assert set(status) <= {0, -signal.SIGKILL}, status
    assert killed or not SOAK
