"""Random labelling sessions against a plain dictionary: no acknowledged label and no dropped photo is lost or changed.

Sessions label, relabel, skip, undo, get more photos, and are killed and continued. Other writers add and remove photos,
and the disk is full at times. Run as a script, this file is the process that is killed.
"""

from __future__ import annotations

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
from retrieval_tip.labelling.pool import MOST_PHOTOS
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
    """A labelling session, driven at random. ``wanted`` are the acknowledged labels, ``maybe`` those of a request.

    A killed session may or may not have done what it was last asked for. ``digests`` are those of the photos by number,
    and ``dropped`` those of the acknowledged dropped photos.
    """

    def __init__(self, job):
        self.job, self.draw = job, random.Random(f"{job['seed']} {job['round']}")
        self.place, self.folder = job["place"], Path(job["folder"])
        self.state = self.folder / "state.json"
        known = json.loads(self.state.read_text()) if self.state.exists() else {}
        self.wanted = known.get("wanted", {})
        self.maybe = known.get("maybe", self.wanted)
        self.dropped = known.get("dropped", {})
        self.undo = []
        self.full = self.folder / "disk" / "full"

    def run(self):
        self.full.unlink(missing_ok=True)
        self.backbone = (Words if self.job["seed"] % 2 else Wordless)()
        photos = self.folder / ("moved" if self.job["round"] % 2 else "photos")
        if not photos.exists():
            (self.folder / ("photos" if self.job["round"] % 2 else "moved")).rename(photos)
        sources = list(open_inputs([str(photos)]))
        app = labelling_app(self.place, sources, Reader(self.backbone), limits=Limits(poll=0.05))
        own = app.state.labelling.photos
        self.digests = {photo: digest_of(own.path(photo)) for photo in own.own(own.paths)}
        assert len(self.digests) >= PHOTOS + 1 + len(self.dropped)
        assert all(self.digests[int(photo)] == digest for photo, digest in self.dropped.items())
        with TestClient(app) as self.http:
            self.until(lambda state: state["encoded"] == len(self.digests) and saved(state))
            found = self.found()
            assert found in (self.wanted, self.maybe), (found, self.wanted, self.maybe)
            self.keep(found, found)
            for number in range(STEPS):
                steps = (
                    self.label,
                    self.label,
                    self.review,
                    self.back,
                    self.skip,
                    self.others,
                    self.fill,
                    self.drop,
                )
                self.draw.choice(steps)(f"{self.job['round']} {number}")
                time.sleep(self.draw.choice((0, 0, 0.05)))
            if self.draw.random() < 0.5:
                self.full.unlink(missing_ok=True)
        if not self.full.exists():
            rows = self.rows()  # the only label stays until there is another one
            assert self.found() == self.wanted or len(rows) == 1 > len(self.wanted), (
                rows,
                self.wanted,
            )

    def review(self, step):
        """Label many photos at once. The page then shows the acknowledged labels."""
        self.label(step, most=len(self.digests), reviewed=True)
        shown = self.http.get("/v1/label/answers").json()["photos"]
        labels = {self.digests[one["photo"]]: one["label"] for one in shown}
        assert labels == {digest: self.wanted.get(digest) for digest in labels}

    def label(self, step, most=3, **more):
        chosen = self.draw.sample([*self.digests], self.draw.randint(1, most))
        labels = {photo: self.draw.choice((*LABELS, f"new {step}")) for photo in chosen}
        new = self.wanted | {self.digests[photo]: label for photo, label in labels.items()}
        before = {
            digest: self.wanted.get(digest)
            for digest in new
            if new[digest] != self.wanted.get(digest)
        }
        body = [{"photo": photo, "label": label} for photo, label in labels.items()]
        if self.ask({"labels": body, "step": step, **more}, new):
            self.undo.append((step, before))

    def skip(self, step):
        if self.ask({"skip": [self.draw.choice([*self.digests])], "step": step}, self.wanted):
            self.undo.append((step, {}))

    def drop(self, _):
        """Drop a photo, perhaps once more, or a copy of a photo in the folder."""
        path = self.draw.choice(sorted((self.folder / "dropped").iterdir()))
        sent = [("images", ("x.png", path.read_bytes(), "image/png"))]
        answer = self.http.post("/v1/label/photos", files=sent, headers=AUTHORISED)
        assert answer.status_code in ((201, 503) if self.full.exists() else (201,)), answer.text
        if answer.status_code == 201:
            (photo,), digest = answer.json()["photos"], digest_of(path)
            assert self.digests.setdefault(photo, digest) == digest
            self.dropped |= {str(photo): digest} if photo >= MOST_PHOTOS else {}
            self.keep(self.wanted, self.maybe)

    def back(self, _):
        if not self.undo:
            return
        step, before = self.undo.pop()
        new = {
            digest: label for digest, label in (self.wanted | before).items() if label is not None
        }
        if not self.ask({"undo": step}, new):
            self.undo.append((step, before))

    def others(self, _):
        """Add and remove photos as another process does, when the session has saved everything."""
        if self.full.exists() or not places.at(self.place).exists():
            return
        self.until(saved)
        rows = self.rows()
        gone = self.draw.sample(rows, 1) if len(rows) > 2 and self.draw.random() < 0.5 else []
        path = self.folder / "others" / f"{self.draw.randrange(OTHERS)}.png"
        there = digest_of(path) in {row["digest"] for row in rows}
        new = {
            digest: label
            for digest, label in self.wanted.items()
            if digest not in {r["digest"] for r in gone}
        }
        if gone:
            self.keep(self.wanted, new)
            changes.remove(self.place, key_ids=[row["key_id"] for row in gone])
            self.keep(new, new)
        if not there:
            new = self.wanted | {digest_of(path): "other"}
            self.keep(self.wanted, new)
            changes.add(
                self.place,
                of_images([str(path)], "others", ["other"], ["other"]),
                Reader(self.backbone),
            )
            self.keep(new, new)
        version = places.at(self.place).manifest().version
        self.until(lambda state: state["version"] >= version)

    def fill(self, _):
        """Fill the disk, or make room again."""
        if not self.job["disk"]:
            return
        if self.full.exists():
            self.full.unlink()
            return
        with self.full.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 10):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    pass

    def ask(self, body, new):
        self.keep(self.wanted, new)
        answer = self.http.post("/v1/label", json=body, headers=AUTHORISED)
        assert answer.status_code in ((200, 503) if self.full.exists() else (200,)), answer.text
        done = answer.status_code == 200
        self.keep(new if done else self.wanted, new if done else self.wanted)
        return done

    def keep(self, wanted, maybe):
        self.wanted, self.maybe = wanted, maybe
        new = self.state.with_suffix(".tmp")
        new.write_text(json.dumps({"wanted": wanted, "maybe": maybe, "dropped": self.dropped}))
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
    return all(one["label"] is None for one in state["refused"]) and state["unsaved"] == len(
        state["refused"]
    )


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
